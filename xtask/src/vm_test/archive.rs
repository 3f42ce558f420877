//! A tree of files in memory and the initramfs that the kernel unpacks: the cpio format "newc"
//! (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel).

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;

enum Entry {
    Folder,
    File { mode: u32, content: Vec<u8> },
    Link(String),
}

/// The files of a machine, by their path without the leading slash.
#[derive(Default)]
pub(super) struct Archive {
    entries: BTreeMap<PathBuf, Entry>,
}

impl Archive {
    /// Makes a folder and those above it.
    pub(super) fn folder(&mut self, path: impl AsRef<Path>) {
        let path = inside(path.as_ref());
        for above in path.ancestors().filter(|above| *above != Path::new("")) {
            self.entries.entry(above.to_owned()).or_insert(Entry::Folder);
        }
    }

    /// Writes a file with this mode.
    pub(super) fn file(&mut self, path: impl AsRef<Path>, mode: u32, content: impl Into<Vec<u8>>) {
        self.put(path.as_ref(), Entry::File { mode, content: content.into() });
    }

    /// Makes a symbolic link.
    pub(super) fn link(&mut self, path: impl AsRef<Path>, to: &str) {
        self.put(path.as_ref(), Entry::Link(to.to_owned()));
    }

    /// Copies a file of this machine with its mode, to the same path unless told.
    pub(super) fn copy(&mut self, from: &Path, to: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let mode = fs::metadata(from)?.permissions().mode() & 0o777;
        self.file(to, mode, content);
        Ok(())
    }

    /// Copies a folder of this machine and all below it. Links are followed.
    pub(super) fn copy_folder(&mut self, from: &Path, to: &Path) -> Result<()> {
        self.folder(to);
        let entries = fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
        for entry in entries {
            let path = entry?.path();
            let name = to.join(path.file_name().expect("an entry of a folder has a name"));
            if path.is_dir() {
                self.copy_folder(&path, &name)?;
            } else if path.is_file() {
                self.copy(&path, &name)?;
            }
        }
        Ok(())
    }

    /// Whether something is at this path.
    pub(super) fn contains(&self, path: &Path) -> bool {
        self.entries.contains_key(inside(path))
    }

    /// Writes the archive. A folder comes before what is in it, because the paths are in order.
    pub(super) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for (number, (path, entry)) in self.entries.iter().enumerate() {
            let (mode, content): (u32, &[u8]) = match entry {
                Entry::Folder => (FOLDER, &[]),
                Entry::File { mode, content } => (FILE | mode, content),
                Entry::Link(to) => (LINK, to.as_bytes()),
            };
            write_entry(out, number + 1, &path.to_string_lossy(), mode, content)?;
        }
        write_entry(out, 0, "TRAILER!!!", 0, &[])
    }

    fn put(&mut self, path: &Path, entry: Entry) {
        if let Some(above) = path.parent() {
            self.folder(above);
        }
        self.entries.insert(inside(path).to_owned(), entry);
    }
}

fn inside(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// One header of 6 + 13 * 8 hexadecimal digits, the name and the content, each padded to four bytes.
fn write_entry(out: &mut impl Write, number: usize, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
    let size =
        u32::try_from(content.len()).map_err(|_| io::Error::other(format!("{name} is larger than 4 GiB")))?;
    let links = 1;
    write!(out, "070701{number:08x}{mode:08x}{:08x}{:08x}{links:08x}", 0, 0)?;
    write!(out, "{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}", 0, 0, 0, 0, 0, name.len() + 1, 0)?;
    out.write_all(name.as_bytes())?;
    out.write_all(&ZEROS[..1 + padding(110 + name.len() + 1)])?;
    out.write_all(content)?;
    out.write_all(&ZEROS[..padding(content.len())])
}

const ZEROS: [u8; 4] = [0; 4];

fn padding(length: usize) -> usize {
    (4 - length % 4) % 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_made_above_a_file() {
        let mut archive = Archive::default();
        archive.file("/a/b/c", 0o644, "x");
        let paths: Vec<_> = archive.entries.keys().map(|path| path.display().to_string()).collect();
        assert_eq!(paths, ["a", "a/b", "a/b/c"]);
        assert!(archive.contains(Path::new("/a/b")));
    }

    #[test]
    fn entries_are_padded_to_four_bytes() {
        let mut archive = Archive::default();
        archive.file("/ab", 0o755, "12345");
        let mut bytes = Vec::new();
        archive.write(&mut bytes).unwrap();
        let header = "070701\
                      00000001000081ed000000000000000000000001\
                      00000000000000050000000000000000000000000000000000000003\
                      00000000";
        assert!(bytes.starts_with(header.as_bytes()), "{}", String::from_utf8_lossy(&bytes));
        assert_eq!(&bytes[110..124], b"ab\0\0\0\x0012345\0\0\0");
        assert_eq!(bytes.len() % 4, 0);
    }
}
