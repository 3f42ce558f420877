//! Processes of pods that nobody supervises any more: found in /proc, ended, and waited for.
//!
//! A pod's processes end with its supervisor; this is for those of an earlier version, which could outlive it, and for the
//! moment until a killed one is gone. A leftover has a pod's user id, belongs to this agent, and no living
//! supervisor or runner of a hook is among its ancestors. It belongs to this agent when it is in a network namespace of
//! one of its pods, or has its working directory or a variable in the agent's folders: more agents may share the machine
//! and the user ids. A tool that root runs in a pod's namespace is none.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};
use tracing::warn;

use crate::{
    config::NodePaths,
    pod_ipv4::UID_BASE,
    pods::NETNS_DIR,
    processes::{self, Process},
};

/// How long killed processes may take to be gone.
const END_DEADLINE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);
/// Ancestors that are looked at; the kernel's PID namespaces are no deeper than 32, a chain of shells may be.
const ANCESTORS_MAX: usize = 1000;
/// Processes that an error names.
const NAMED_MAX: usize = 5;

/// Whose processes are meant.
#[derive(Clone, Debug, Default)]
pub(crate) struct Owner {
    /// The pod's network namespace, when it has a name.
    netns: Option<PathBuf>,
    /// Folders of the agent that the processes work in.
    folders: Vec<PathBuf>,
}

/// A process that is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leftover {
    pid: i32,
    name: String,
    state: String,
}

impl Owner {
    /// One pod.
    pub(crate) fn pod(paths: &NodePaths, pod: &str) -> Owner {
        let folders = vec![paths.pod_state_dir(pod), paths.hooks_dir().join(pod)];
        Owner { netns: Some(Path::new(NETNS_DIR).join(pod)), folders }
    }

    /// Every pod of this agent, also those that it knows nothing of any more.
    pub(crate) fn agent(paths: &NodePaths) -> Owner {
        Owner { netns: None, folders: vec![paths.pods_state_dir(), paths.hooks_dir()] }
    }
}

/// Ends what is left of `owner` and returns when nothing is; how many there were.
///
/// # Errors
/// When a process outlives SIGKILL, which the kernel allows while it waits for a device (state D).
pub(crate) async fn end(owner: &Owner) -> Result<usize> {
    let deadline = Instant::now() + END_DEADLINE;
    let mut most = 0;
    loop {
        let whose = owner.clone();
        let left =
            spawn_blocking(move || find(&whose)).await?.context("cannot look for processes in /proc")?;
        if left.is_empty() {
            return Ok(most);
        }
        if most == 0 {
            warn!(processes = names(&left), "ending processes that a pod has left behind");
        }
        most = most.max(left.len());
        if Instant::now() > deadline {
            bail!(
                "processes of it were killed and do not end: {}; one in state D waits for a device or a server of \
                 files: `cat /proc/PID/stack` says for which",
                names(&left)
            );
        }
        for process in left {
            // It may have ended meanwhile.
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        sleep(LOOK).await;
    }
}

fn names(left: &[Leftover]) -> String {
    let more = left.len().saturating_sub(NAMED_MAX);
    let mut names: Vec<String> = left.iter().take(NAMED_MAX).map(Leftover::to_string).collect();
    names.extend((more > 0).then(|| format!("{more} more")));
    names.join(", ")
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, state {})", self.pid, self.name, self.state)
    }
}

/// What is left of `owner` now.
fn find(owner: &Owner) -> io::Result<Vec<Leftover>> {
    let netns = owner.netns.as_ref().and_then(|path| fs::metadata(path).ok()).map(|file| file.ino());
    let all = processes::all()?;
    let left = all.iter().filter(|(pid, process)| {
        process.uid >= UID_BASE
            && process.state != "Z"
            && process.state != "X"
            && belongs(**pid, netns, &owner.folders)
            && !is_supervised(&all, process.parent)
    });
    Ok(left
        .map(|(pid, process)| Leftover {
            pid: *pid,
            name: process.name.clone(),
            state: process.state.clone(),
        })
        .collect())
}

fn belongs(pid: i32, netns: Option<u64>, folders: &[PathBuf]) -> bool {
    let is_there = || netns.is_some() && processes::netns_of(pid).ok() == netns;
    let works_in = || {
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        folders.iter().any(|folder| cwd.starts_with(folder))
    };
    let is_told = || {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| is_inside(variable, folders))
    };
    is_there() || works_in() || is_told()
}

/// Whether the value of `NAME=VALUE` is a path in one of the folders.
fn is_inside(variable: &[u8], folders: &[PathBuf]) -> bool {
    let Some(at) = variable.iter().position(|byte| *byte == b'=') else { return false };
    let value = Path::new(std::ffi::OsStr::from_bytes(&variable[at + 1..]));
    folders.iter().any(|folder| value.starts_with(folder))
}

/// Whether the process or one before it in the chain supervises a pod or runs a hook.
fn is_supervised(all: &BTreeMap<i32, Process>, pid: i32) -> bool {
    let parent = |pid: &i32| all.get(pid).map(|process| process.parent);
    std::iter::successors(Some(pid), parent)
        .take(ANCESTORS_MAX)
        .any(|pid| all.get(&pid).is_some_and(|process| process.uid == 0) && is_supervisor(pid))
}

fn is_supervisor(pid: i32) -> bool {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = command.split(|byte| *byte == 0).skip(1);
    words.next() == Some(b"supervise")
        && words.next().is_some_and(|option| option == b"--pod-dir" || option == b"--hook-dir")
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::CommandExt as _,
        process::{Child, Command},
    };

    use nix::unistd::geteuid;

    use super::*;

    #[test]
    fn an_error_names_some_of_many() {
        let one = |pid| Leftover { pid, name: "sh".into(), state: "D".into() };
        assert_eq!(names(&[one(7)]), "7 (sh, state D)");
        assert!(names(&(1..=7).map(one).collect::<Vec<_>>()).ends_with("5 (sh, state D), 2 more"));
    }

    #[tokio::test]
    async fn what_works_in_the_folders_of_an_agent_is_its_own_and_nothing_else_is() {
        if !geteuid().is_root() {
            eprintln!("skipped: only root can start a process of another user");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let paths = NodePaths {
            state_dir: folder.path().join("state"),
            run_dir: folder.path().join("run"),
            bpf_dir: folder.path().join("bpf"),
        };
        let sleeper = |uid, home: PathBuf| {
            Command::new("/bin/sleep").arg("60").env("HOME", home).uid(uid).current_dir("/").spawn().unwrap()
        };
        let mut left = sleeper(UID_BASE + 9_999, paths.pod_state_dir("a-b-c").join("web"));
        let mut others = sleeper(UID_BASE + 9_999, folder.path().join("another"));
        let mut tool = sleeper(0, paths.pod_state_dir("a-b-c").join("web"));
        assert_eq!(end(&Owner::pod(&paths, "x-y-z")).await.unwrap(), 0);
        assert_eq!(end(&Owner::agent(&paths)).await.unwrap(), 1);
        let ended = |child: &mut Child| child.try_wait().unwrap().is_some();
        assert!(ended(&mut left) && !ended(&mut others) && !ended(&mut tool));
        for mut child in [others, tool] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
