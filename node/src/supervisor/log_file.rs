//! The file that a task's output goes to: appended, rotated once, bounded.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// A log is moved to `.log.1` when it has grown to this size; a task keeps twice as much at most.
pub const LOG_BYTES_MAX: u64 = 10 * 1024 * 1024;

/// The log of one task.
///
/// When the disk is full, output is dropped and counted, and the count is written when there is room again:
/// a task never blocks on its log.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    bytes_max: u64,
    open: Option<(File, u64)>,
    dropped_bytes: u64,
}

impl LogFile {
    pub(super) fn new(path: PathBuf, bytes_max: u64) -> LogFile {
        LogFile { path, bytes_max, open: None, dropped_bytes: 0 }
    }

    /// Appends `data`, or counts it as dropped.
    pub(super) fn append(&mut self, data: &[u8]) {
        if self.report_dropped().and_then(|()| self.write(data)).is_err() {
            self.dropped_bytes += data.len() as u64;
            self.open = None;
        }
    }

    fn report_dropped(&mut self) -> io::Result<()> {
        if self.dropped_bytes > 0 {
            let note = format!("\n[{} bytes were lost: the log could not be written]\n", self.dropped_bytes);
            self.write(note.as_bytes())?;
            self.dropped_bytes = 0;
        }
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        if self.open.as_ref().is_some_and(|(_, size)| size + data.len() as u64 > self.bytes_max) {
            self.open = None;
            fs::rename(&self.path, rotated(&self.path))?;
        }
        let (file, size) = match &mut self.open {
            Some(open) => open,
            none => none.insert(open_log(&self.path)?),
        };
        file.write_all(data)?;
        *size += data.len() as u64;
        Ok(())
    }
}

fn open_log(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)?;
    let size = file.metadata()?.len();
    Ok((file, size))
}

/// Where the log `path` is moved when it is full.
pub fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_is_moved_once_and_the_older_one_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.log");
        let mut log = LogFile::new(path.clone(), 10);
        for line in ["first 6\n", "second \n", "third\n"] {
            log.append(line.as_bytes());
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "third\n");
        assert_eq!(fs::read_to_string(rotated(&path)).unwrap(), "second \n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn an_older_log_is_continued() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.log");
        LogFile::new(path.clone(), 100).append(b"before\n");
        LogFile::new(path.clone(), 100).append(b"after\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "before\nafter\n");
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("later/web.log");
        let mut log = LogFile::new(path.clone(), 100);
        log.append(b"lost\n");
        fs::create_dir(folder.path().join("later")).unwrap();
        log.append(b"kept\n");
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "\n[5 bytes were lost: the log could not be written]\nkept\n");
    }

    #[test]
    fn a_symbolic_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, target) = (folder.path().join("web.log"), folder.path().join("target"));
        std::os::unix::fs::symlink(&target, &path).unwrap();
        LogFile::new(path, 100).append(b"x");
        assert!(!target.exists());
    }
}
