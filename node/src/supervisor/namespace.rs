//! The PID namespace of a pod's processes. When its init ends, the kernel kills all of them, wherever they have hidden.
//!
//! The init is a fork of the supervisor that does nothing: the kernel kills it when the supervisor ends, and it
//! ends by itself when its link to the supervisor does, so that no moment is left in which it could outlive it. Orphans
//! come to it, and the kernel buries them. The tasks are the supervisor's own children, born in the namespace: their
//! exit statuses and ids are as without it. A mount namespace of the same pod shows them a `/proc` that agrees
//! with the ids that they see, and no process of anybody else's.
#![allow(unsafe_code, reason = "fork, and closing what was inherited")]

use std::{
    fs::File,
    io::{self, Read as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        signal::{SigHandler, Signal, kill, signal},
        wait::waitpid,
    },
    unistd::{ForkResult, Pid, dup2_stdin, fork, geteuid, read, write},
};
use thiserror::Error;

use crate::pods::NETNS_DIR;

/// What an init says when tasks may be started.
const READY: &[u8] = b"ready";
/// How long an init may take to be ready.
const INIT_DEADLINE: Duration = Duration::from_secs(5);

/// Why processes cannot be started in a namespace.
#[derive(Debug, Error)]
pub(super) enum NamespaceError {
    /// Every process of the last run was killed, and one has not ended.
    #[error("a process of its last run was killed and has not ended: `ps` shows it in state D")]
    Ending,
    /// The kernel refused it.
    #[error("cannot make a PID namespace (the kernel needs CONFIG_PID_NS)")]
    Make(#[source] io::Error),
    /// The init could not do its part.
    #[error("the init of the PID namespace failed: {0}")]
    Init(String),
}

/// The namespace that the next task is born in; made when there is none.
#[derive(Debug, Default)]
pub(super) struct PidNamespace {
    init: Option<Init>,
}

#[derive(Debug)]
struct Init {
    pid: i32,
    mounts: File,
    /// Its end ends the init.
    _link: UnixStream,
    ending: bool,
}

/// Whether this kernel has PID namespaces: one is made, and gone with the thread that has made it.
///
/// # Errors
/// What the kernel says: EINVAL when it has none.
pub(crate) fn probe() -> io::Result<()> {
    let made = thread::spawn(|| unshare(CloneFlags::CLONE_NEWPID)).join();
    Ok(made.map_err(|_| io::Error::other("the thread that tried it has failed"))??)
}

impl PidNamespace {
    /// The mount namespace that belongs to it. Only root can have either: without root there is none, and its processes
    /// are swept.
    ///
    /// # Errors
    /// See [`NamespaceError`].
    pub(super) fn mounts(&mut self) -> Result<Option<File>, NamespaceError> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        let init = match self.init.take() {
            Some(init) => init,
            None => Init::start()?,
        };
        let init = self.init.insert(init);
        if init.ending {
            return Err(NamespaceError::Ending);
        }
        init.mounts.try_clone().map(Some).map_err(NamespaceError::Make)
    }

    /// Whether processes can live in it.
    pub(super) fn is_alive(&self) -> bool {
        self.init.as_ref().is_some_and(|init| !init.ending)
    }

    /// Kills everything in it. Its init can be reaped when all of it has ended.
    pub(super) fn kill(&mut self) {
        if let Some(init) = &mut self.init {
            init.ending = true;
            // It may have ended meanwhile.
            let _ = kill(Pid::from_raw(init.pid), Signal::SIGKILL);
        }
    }

    /// A child was reaped: with the init the namespace is gone.
    pub(super) fn reaped(&mut self, pid: Pid) {
        self.init.take_if(|init| init.pid == pid.as_raw());
    }
}

impl Init {
    fn start() -> Result<Init, NamespaceError> {
        let make = |error: io::Error| NamespaceError::Make(error);
        let (link, far) = UnixStream::pair().map_err(make)?;
        link.set_read_timeout(Some(INIT_DEADLINE)).map_err(make)?;
        unshare_pids().map_err(make)?;
        // SAFETY: this process has one thread, so the child may do all that the parent may.
        let pid = match unsafe { fork() }.map_err(|errno| make(errno.into()))? {
            ForkResult::Child => be_init(&far),
            ForkResult::Parent { child } => child,
        };
        drop(far);
        let opened = hear(&link).and_then(|()| {
            let path = format!("/proc/{pid}/ns/mnt");
            File::open(&path).map_err(|error| NamespaceError::Init(format!("cannot open {path}: {error}")))
        });
        match opened {
            Ok(mounts) => Ok(Init { pid: pid.as_raw(), mounts, _link: link, ending: false }),
            Err(error) => {
                // It may have ended; there is nothing else in its namespace.
                let _ = kill(pid, Signal::SIGKILL);
                let _ = waitpid(pid, None);
                Err(error)
            }
        }
    }
}

/// Has the next child be the init of a namespace. Who has made one must come back from it before the next.
fn unshare_pids() -> io::Result<()> {
    setns(File::open("/proc/self/ns/pid")?, CloneFlags::CLONE_NEWPID)?;
    Ok(unshare(CloneFlags::CLONE_NEWPID)?)
}

/// Waits until the init is ready.
fn hear(mut link: &UnixStream) -> Result<(), NamespaceError> {
    let mut said = [0; 256];
    let len = link.read(&mut said).map_err(|error| NamespaceError::Init(error.to_string()))?;
    match &said[..len] {
        READY => Ok(()),
        [] => Err(NamespaceError::Init("it was killed".to_owned())),
        why => Err(NamespaceError::Init(String::from_utf8_lossy(why).into_owned())),
    }
}

/// The life of the init, from fork to the end of the supervisor.
fn be_init(link: &UnixStream) -> ! {
    let prepared = leave_supervisor(link).and_then(|()| own_mounts());
    let stdin = io::stdin();
    let link = stdin.as_fd();
    match prepared {
        Ok(()) => {
            // A supervisor that is gone is found out below.
            let _ = write(link, READY);
            // Nobody writes: this returns when the supervisor has ended, also before it could be watched.
            while matches!(read(link, &mut [0]), Ok(1..) | Err(Errno::EINTR)) {}
        }
        Err(why) => drop(write(link, why.as_bytes())),
    }
    // SAFETY: ends the process at once; what the supervisor would do at its own end is not to be done here.
    unsafe { libc::_exit(0) }
}

/// Keeps the link as standard input and nothing else of the supervisor's: above all not the pod's lock.
fn leave_supervisor(link: &UnixStream) -> Result<(), String> {
    let words = |what: &str, errno: Errno| format!("{what}: {errno}");
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|errno| words("cannot follow the supervisor", errno))?;
    dup2_stdin(link).map_err(|errno| words("cannot keep the link", errno))?;
    // SAFETY: closes descriptors whose owners are never used again in this process.
    if unsafe { libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0) } != 0 {
        return Err(words("cannot close what it inherited", Errno::last()));
    }
    // Not essential: what `ps -o comm` shows.
    let _ = prctl::set_name(c"pod-init");
    // SAFETY: no handler is installed. Ignored, the kernel buries orphans by itself.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }
        .map(drop)
        .map_err(|errno| words("cannot ignore SIGCHLD", errno))
}

/// A mount namespace that follows the machine's, with a `/proc` of this PID namespace.
fn own_mounts() -> Result<(), String> {
    let words = |what: &str, errno: Errno| format!("{what}: {errno}");
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| words("cannot make a mount namespace", errno))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(|errno| words("cannot keep mounts to itself", errno))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // Each pod would hold a mount for every other's network namespace. It is no mount where nobody made one of it.
    if umount2(NETNS_DIR, MntFlags::MNT_DETACH).is_ok() {
        // The files below are no namespaces, which `ip` would complain of.
        mount(
            Some("none"),
            NETNS_DIR,
            Some("tmpfs"),
            flags | MsFlags::MS_RDONLY,
            Some("size=4k,nr_inodes=2"),
        )
        .map_err(|errno| words("cannot hide the network namespaces of others", errno))?;
    }
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)
        .map_err(|errno| words("cannot mount /proc", errno))
}
