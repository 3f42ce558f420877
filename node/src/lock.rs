//! One agent per state folder: a lock that its holder has for its whole life.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use thiserror::Error;

use crate::lease_file;

const LOCK_FILE: &str = "agent.lock";

/// Held for as long as it lives.
#[derive(Debug)]
pub(crate) struct NodeLock {
    file: Flock<File>,
}

/// Why this process may not act for the node.
#[derive(Debug, Error)]
pub(crate) enum LockError {
    /// Another process does.
    #[error("process {pid} runs the node in {} already", state_dir.display())]
    Held { pid: String, state_dir: PathBuf },
    /// The file cannot be used.
    #[error("cannot lock {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// How long a holder that is ending is waited for. A child that a killed agent had forked holds the lock, too,
/// until its exec.
const ENDING_MAX: Duration = Duration::from_secs(2);

/// Between two tries.
const RETRY: Duration = Duration::from_millis(20);

impl NodeLock {
    /// Takes the lock of the node in `state_dir`; one that is held is waited for a little.
    pub(crate) async fn take(state_dir: &Path) -> Result<NodeLock, LockError> {
        let end = Instant::now() + ENDING_MAX;
        loop {
            match Self::try_take(state_dir) {
                Err(LockError::Held { .. }) if Instant::now() < end => tokio::time::sleep(RETRY).await,
                result => return result,
            }
        }
    }

    /// Whether somebody acts for the node in `state_dir`, as far as can be told.
    pub(crate) fn is_held(state_dir: &Path) -> bool {
        let Ok(file) = File::open(state_dir.join(LOCK_FILE)) else { return false };
        matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, Errno::EWOULDBLOCK)))
    }

    /// Names this machine in its present boot: the kernel's boot id, and the file of which there is one in a boot that
    /// only one process can lock. A copy of the state folder has another, on another machine and on this one.
    pub(crate) fn machine(&self) -> io::Result<String> {
        let file = self.file.metadata()?;
        Ok(format!("{}/{:x}:{}", lease_file::boot_id()?, file.dev(), file.ino()))
    }

    fn try_take(state_dir: &Path) -> Result<NodeLock, LockError> {
        let path = state_dir.join(LOCK_FILE);
        let failed = |source| LockError::Io { path: path.clone(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
                Ok(NodeLock { file })
            }
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).map_err(failed)?;
                Err(LockError::Held { pid: pid.trim().to_owned(), state_dir: state_dir.to_owned() })
            }
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copied_state_folder_is_another_machine_and_a_restart_is_not() {
        let (folder, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let machine = |folder: &Path| NodeLock::try_take(folder).unwrap().machine().unwrap();
        let first = machine(folder.path());
        std::fs::copy(folder.path().join(LOCK_FILE), copy.path().join(LOCK_FILE)).unwrap();
        assert_ne!(machine(copy.path()), first);
        assert_eq!(machine(folder.path()), first);
        assert!(first.len() <= 128, "{first}");
    }

    #[test]
    fn a_second_agent_is_told_who_the_first_is() {
        let folder = tempfile::tempdir().unwrap();
        let first = NodeLock::try_take(folder.path()).unwrap();
        let text = NodeLock::try_take(folder.path()).unwrap_err().to_string();
        assert!(text.starts_with(&format!("process {} runs the node", std::process::id())), "{text}");
        assert!(NodeLock::is_held(folder.path()));
        drop(first);
        assert!(!NodeLock::is_held(folder.path()));
        NodeLock::try_take(folder.path()).unwrap();
    }
}
