//! The text files of the checkout, read once.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// Endings of files that people write.
const TEXT: [&str; 8] = ["rs", "toml", "md", "proto", "yaml", "sh", "out", "txt"];

/// One file: its path from the top of the checkout, and its text.
pub(crate) struct Text {
    pub(crate) path: PathBuf,
    pub(crate) text: String,
}

/// All of them.
pub(crate) struct Tree {
    pub(crate) files: Vec<Text>,
}

impl Tree {
    /// Reads the checkout at `root`, without hidden folders and `target`.
    pub(crate) fn read(root: &Path) -> Result<Self> {
        let mut files = Vec::new();
        read_folder(root, Path::new(""), &mut files)?;
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Self { files })
    }

    /// Files with this ending.
    pub(crate) fn ending(&self, ending: &str) -> impl Iterator<Item = &Text> {
        self.files.iter().filter(move |file| file.path.extension().is_some_and(|found| found == ending))
    }

    /// The text of one file, if it is there.
    pub(crate) fn text(&self, path: &str) -> Option<&str> {
        self.files.iter().find(|file| file.path == Path::new(path)).map(|file| file.text.as_str())
    }
}

fn read_folder(root: &Path, folder: &Path, files: &mut Vec<Text>) -> Result<()> {
    let full = root.join(folder);
    let entries = fs::read_dir(&full).with_context(|| format!("cannot read {}", full.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let path = folder.join(&name);
        if entry.file_type()?.is_dir() {
            let skipped = name.to_string_lossy().starts_with('.') || name == "target";
            if !skipped {
                read_folder(root, &path, files)?;
            }
        } else if path.extension().is_some_and(|ending| TEXT.iter().any(|known| ending == *known)) {
            // Test data may be no text on purpose.
            let bytes =
                fs::read(root.join(&path)).with_context(|| format!("cannot read {}", path.display()))?;
            files.push(Text { text: String::from_utf8_lossy(&bytes).into_owned(), path });
        }
    }
    Ok(())
}
