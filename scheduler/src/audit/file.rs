//! A file that lines are added to, and that makes way for the next when it is full.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// A file that is longer than this makes way for the next.
const FILE_LEN_MAX: u64 = 8 * 1024 * 1024;
/// Files in all; the oldest goes.
const FILES_MAX: u32 = 8;

/// The newest file. It is opened when it is needed, and again after it could not be written.
#[derive(Debug)]
pub(super) struct RotatedFile {
    path: PathBuf,
    open: Option<(File, u64)>,
    len_max: u64,
}

impl RotatedFile {
    pub(super) fn new(path: PathBuf) -> RotatedFile {
        RotatedFile { path, open: None, len_max: FILE_LEN_MAX }
    }

    /// Adds a line. What a crash left of a line before is ended first; a full disk leaves nothing of one.
    pub(super) fn append(&mut self, line: &str) -> io::Result<()> {
        let (mut file, len) = match self.open.take() {
            Some(open) => open,
            None => open(&self.path)?,
        };
        let text = format!("{line}\n");
        if let Err(error) = file.write_all(text.as_bytes()) {
            // Half a line ends those who read it as JSON. If it stays, the next line begins below it.
            let _ = file.set_len(len);
            return Err(error);
        }
        let len = len + text.len() as u64;
        if len < self.len_max {
            self.open = Some((file, len));
            return Ok(());
        }
        self.rotate()
    }

    fn rotate(&self) -> io::Result<()> {
        for number in (1..FILES_MAX - 1).rev() {
            rename_if_there(&self.numbered(number), &self.numbered(number + 1))?;
        }
        rename_if_there(&self.path, &self.numbered(1))
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!(".{number}"));
        name.into()
    }
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path)?;
    let len = file.metadata()?.len();
    if len > 0 && !ends_with_newline(&file, len)? {
        file.write_all(b"\n")?;
    }
    Ok((file, len))
}

fn ends_with_newline(file: &File, len: u64) -> io::Result<bool> {
    let mut last = [0];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut last, len - 1)?;
    Ok(last == *b"\n")
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn full_files_make_way_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let mut file = RotatedFile { len_max: 10, ..RotatedFile::new(path.clone()) };
        (0..40).for_each(|number| file.append(&format!("line {number:02}")).unwrap());
        let mut names: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names.len(), 7, "{names:?}");
        assert_eq!(fs::read_to_string(dir.path().join("audit.log.1")).unwrap(), "line 38\nline 39\n");
        assert_eq!(fs::read_to_string(dir.path().join("audit.log.7")).unwrap(), "line 26\nline 27\n");
    }

    #[test]
    fn a_line_that_a_crash_cut_off_does_not_swallow_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        fs::write(&path, "{\"half").unwrap();
        RotatedFile::new(path.clone()).append("whole").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"half\nwhole\n");
    }

    #[test]
    fn a_line_for_which_there_is_no_room_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let mut file = RotatedFile::new(path.clone());
        assert_eq!(file.append("x").unwrap_err().kind(), io::ErrorKind::StorageFull);
        fs::remove_file(&path).unwrap();
        file.append("y").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "y\n");
    }

    #[test]
    fn the_file_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        RotatedFile::new(path.clone()).append("x").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
