//! Starts the process of a task with as little of the supervisor's rights and belongings as it can have.
//!
//! With the init's ([`super::namespace`]) the only `unsafe` of this crate: what runs between fork and exec.
#![allow(unsafe_code, reason = "Command::pre_exec")]

use std::{
    ffi::{CStr, CString},
    fs::{DirBuilder, File},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt as _,
            fs::{DirBuilderExt as _, chown},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        signal::{SigSet, SigmaskHow, Signal, sigprocmask},
        stat::{Mode, umask},
    },
    unistd::{Gid, Pid, Uid, chdir, getpid, getppid, pipe2, setgroups, setresgid, setresuid, setsid},
};
use thiserror::Error;

use super::{
    namespace::{NamespaceError, PidNamespace},
    spec::TaskSpec,
};

/// Why a task's process cannot be started.
#[derive(Debug, Error)]
pub(super) enum StartError {
    /// The argument vector is empty.
    #[error("exec is empty")]
    NoProgram,
    /// The private folder cannot be made.
    #[error("cannot make the folder {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no namespace to start it in.
    #[error("{}", chain(.0))]
    Namespace(#[from] NamespaceError),
    /// No pipe for the output.
    #[error("cannot make a pipe for the output: {0}")]
    Pipe(io::Error),
    /// fork, exec or a step between them failed.
    #[error("cannot run {program}: {source}")]
    Run {
        /// The program.
        program: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A process that was started: its id, and the end of the pipe that its output is read from.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: i32,
    pub(super) output: File,
}

/// Starts `task` as a user and group in its private folder; the supervisor's network namespace is inherited.
///
/// The process leads a session and a process group of its own, cannot gain privileges, and gets SIGKILL when
/// the supervisor ends. In a PID namespace all that it starts does so, too.
pub(super) fn start(
    task: &TaskSpec,
    user: Option<(u32, u32)>,
    folder: &Path,
    namespace: Option<&mut PidNamespace>,
) -> Result<Child, StartError> {
    let program = task.exec.first().ok_or(StartError::NoProgram)?;
    make_folder(folder, user).map_err(|source| StartError::Folder { path: folder.to_owned(), source })?;
    let (reader, writer) = output_pipe().map_err(StartError::Pipe)?;
    let mut command = Command::new(program);
    command.args(&task.exec[1..]).env_clear().envs(&task.env).current_dir(folder);
    command.stdin(Stdio::null());
    command.stdout(writer.try_clone().map_err(StartError::Pipe)?).stderr(writer);
    let supervisor = getpid();
    let mounts = namespace.map(PidNamespace::mounts).transpose()?.flatten();
    let path = CString::new(folder.as_os_str().as_bytes())
        .map_err(|error| StartError::Folder { path: folder.to_owned(), source: error.into() })?;
    // SAFETY: `leave_supervisor` runs in the forked child of a process with one thread, makes only system
    // calls on integers, on a string that is there and on an empty slice, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(move || leave_supervisor(user, supervisor, mounts.as_ref(), &path)) };
    let child = command.spawn().map_err(|source| StartError::Run { program: program.clone(), source })?;
    Ok(Child { pid: child.id().cast_signed(), output: File::from(reader) })
}

/// What the child does before exec; it is still root, and its working directory is set.
fn leave_supervisor(
    user: Option<(u32, u32)>,
    supervisor: Pid,
    mounts: Option<&File>,
    folder: &CStr,
) -> io::Result<()> {
    setsid()?;
    if let Some(mounts) = mounts {
        // Which changes the working directory to `/`.
        setns(mounts, CloneFlags::CLONE_NEWNS)?;
        chdir(folder)?;
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    umask(Mode::from_bits_truncate(0o022));
    if let Some((user, group)) = user {
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        setgroups(&[])?;
        setresgid(group, group, group)?;
        setresuid(user, user, user)?;
    }
    prctl::set_no_new_privs()?;
    // After the change of user, which clears it.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // In a PID namespace the supervisor has no id; there its end is the init's, and the init's is this process's.
    if mounts.is_none() && getppid() != supervisor {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    close_others()
}

fn chain(error: &NamespaceError) -> String {
    use std::error::Error as _;
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// Marks every descriptor but the standard three close-on-exec, also those that the supervisor inherited.
fn close_others() -> io::Result<()> {
    // SAFETY: close_range with this flag changes descriptor flags of the calling process and no memory.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn make_folder(path: &Path, user: Option<(u32, u32)>) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    user.map_or(Ok(()), |(user, group)| chown(path, Some(user), Some(group)))
}

/// A pipe whose reader does not block.
fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((reader, writer))
}
