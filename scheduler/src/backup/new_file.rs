//! Where a backup is written: whole or not there.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

/// A file that gets its name when all of it is on the disk, and only if nothing has that name.
pub struct NewFile {
    path: PathBuf,
    unfinished: PathBuf,
    file: fs::File,
}

impl NewFile {
    /// Begins the file, for its owner alone.
    ///
    /// # Errors
    /// Something has that name, or it cannot be written.
    pub fn create(path: &Path) -> anyhow::Result<NewFile> {
        ensure!(!path.exists(), "{} is there already: give another name", path.display());
        let mut name = path.file_name().context("give the name of a file")?.to_owned();
        name.push(".unfinished");
        let unfinished = path.with_file_name(name);
        let file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished);
        let file = file.with_context(|| format!("cannot write {}", unfinished.display()))?;
        Ok(NewFile { path: path.to_owned(), unfinished, file })
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn append(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        io::Write::write_all(&mut self.file, bytes)
            .with_context(|| format!("cannot write {}", self.unfinished.display()))
    }

    /// Syncs it and gives it its name.
    ///
    /// # Errors
    /// The disk failed, or something has that name by now.
    pub fn finish(self) -> anyhow::Result<()> {
        self.file.sync_all().with_context(|| format!("cannot sync {}", self.unfinished.display()))?;
        // Unlike a rename, a link never replaces.
        fs::hard_link(&self.unfinished, &self.path)
            .with_context(|| format!("cannot make {}", self.path.display()))?;
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        fs::File::open(parent.unwrap_or(Path::new("."))).and_then(|dir| dir.sync_all())?;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // Under its own name the file stays, if it has got one.
        let _ = fs::remove_file(&self.unfinished);
    }
}
