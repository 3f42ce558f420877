//! Unix sockets in a folder whose path may be longer than a socket's may be (107 bytes).
//!
//! The folder is opened and named through `/proc/self/fd`, so that only the file name counts.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::OpenOptionsExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use nix::libc::{O_DIRECTORY, O_PATH};

/// Listens on `folder/name`. A socket that is there is taken to be a dead one's: the caller holds a lock.
///
/// # Errors
/// What the kernel said.
pub fn listen(folder: &Path, name: &str) -> io::Result<UnixListener> {
    match fs::remove_file(folder.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let folder = open(folder)?;
    UnixListener::bind(short_path(&folder, name))
}

/// Connects to `folder/name`.
///
/// # Errors
/// What the kernel said; `NotFound` and `ConnectionRefused` mean that nobody listens.
pub fn connect(folder: &Path, name: &str) -> io::Result<UnixStream> {
    let folder = open(folder)?;
    UnixStream::connect(short_path(&folder, name))
}

fn open(folder: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(O_PATH | O_DIRECTORY).open(folder)
}

/// Good as long as `folder` is open.
fn short_path(folder: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}
