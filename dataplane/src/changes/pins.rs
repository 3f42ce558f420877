//! Tells when a pin or a namespace's name is removed: what is behind it ends with its last name, and no netlink message
//! says so.

use std::{io, path::Path};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::{io::AsyncReadExt as _, net::unix::pipe, task::JoinHandle};

use super::{Heard, message::Subject};

/// Room for several events; only their arrival matters.
const EVENTS_BYTES: usize = 4096;

/// Watches the folder.
pub(super) fn watch(folder: &Path, heard: Heard) -> io::Result<JoinHandle<()>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    inotify.add_watch(folder, AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM)?;
    // It is read as a pipe is.
    let mut events = pipe::Receiver::from_owned_fd_unchecked(inotify.into())?;
    Ok(tokio::spawn(async move {
        let mut buffer = [0; EVENTS_BYTES];
        while events.read(&mut buffer).await.is_ok() {
            heard.change(Subject::Pin, None);
        }
    }))
}
