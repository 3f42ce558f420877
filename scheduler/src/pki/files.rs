//! Files for the server alone, whole or not there.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use super::PkiError;

/// Writes beside the file, syncs, renames: a crash leaves the old file or the new one.
pub(super) fn replace(path: &Path, text: &str) -> Result<(), PkiError> {
    let failed = |source| PkiError::Io { what: "write", path: path.to_owned(), source };
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = Path::new(&beside);
    let written = remove_if_there(beside).and_then(|()| write_private(beside, text));
    if let Err(error) = written.and_then(|()| fs::rename(beside, path)) {
        // The first error is the one to report.
        let _ = fs::remove_file(beside);
        return Err(failed(error));
    }
    path.parent().map_or(Ok(()), sync_folder).map_err(failed)
}

pub(super) fn remove(path: &Path) -> Result<(), PkiError> {
    remove_if_there(path).map_err(|source| PkiError::Io { what: "remove", path: path.to_owned(), source })
}

pub(super) fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::Io { what: "read", path: path.to_owned(), source })
}

pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

pub(super) fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}
