//! Network namespaces of pods: files under `/run/netns`, so that `ip netns exec POD` works.
//!
//! Everything that must be done inside of a namespace is done on a thread that is thrown away after: a thread
//! of the runtime never leaves its own namespace, and nothing is forked.

use std::{
    fs::{self, File},
    future::Future,
    io,
    path::{Component, Path, PathBuf},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{NSFS_MAGIC, statfs},
};
use tokio::{runtime, sync::oneshot};

/// The namespace file of a pod, unless its ID is not a plain file name.
pub(crate) fn path(dir: &Path, id: &str) -> io::Result<PathBuf> {
    let mut components = Path::new(id).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(_)), None) => Ok(dir.join(id)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{id:?} cannot name a namespace"))),
    }
}

/// Whether a namespace is mounted at `path`.
pub(crate) fn exists(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == NSFS_MAGIC)
}

/// Makes a namespace and mounts it at `path`. A plain file there is what a crash left and is used.
pub(crate) async fn add(path: PathBuf) -> io::Result<()> {
    File::create(&path)?;
    let made = on_thread(move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let source = Path::new("/proc/thread-self/ns/net");
        mount(Some(source), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(())
    });
    made.await?
}

/// Unmounts and removes the file. Processes inside keep the namespace until they end.
pub(crate) fn delete(path: &Path) -> io::Result<()> {
    if exists(path) {
        umount2(path, MntFlags::MNT_DETACH)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Runs `work` inside each of `paths` in turn, on one thread with a small runtime of its own.
pub(crate) async fn visit<T, F>(paths: Vec<PathBuf>, work: F) -> io::Result<Vec<io::Result<T>>>
where
    T: Send + 'static,
    F: AsyncFn(usize) -> T + Send + 'static,
{
    on_thread(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let enter = |path: &PathBuf| Ok(setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?);
        let visits = paths.iter().enumerate();
        Ok(visits.map(|(n, path)| enter(path).map(|()| runtime.block_on(work(n)))).collect())
    })
    .await?
}

fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> impl Future<Output = io::Result<io::Result<T>>> {
    let (done, result) = oneshot::channel();
    let spawned = thread::Builder::new().name("hextet-netns".to_owned()).spawn(move || {
        // Nobody waits any more when the caller was cancelled.
        let _ = done.send(work());
    });
    async move {
        spawned?;
        result.await.map_err(|_| io::Error::other("the thread in the namespace panicked"))
    }
}
