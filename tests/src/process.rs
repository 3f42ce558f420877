//! Processes that outlive us, and finding every process that lives in a namespace.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::netns::{Identity, NetNs};
use crate::wait::{scaled, wait_until};

/// How often namespaces are searched anew for processes that were born meanwhile.
const ROUNDS_MAX: usize = 20;

/// A detached program: where its pid and its words are.
#[derive(Clone, Debug)]
pub struct Daemon {
    name: String,
    place: NetNs,
    dir: PathBuf,
}

impl Daemon {
    /// The program called `name`, in `place`, with its files in `dir`.
    pub fn new(name: &str, place: NetNs, dir: &Path) -> Self {
        Self { name: name.to_owned(), place, dir: dir.to_owned() }
    }

    /// Where it says what it does: its stdout and stderr.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.name))
    }

    /// All that it has said so far, over all its lives.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// How long its log is: what comes after is [`Daemon::log_since`].
    pub fn log_len(&self) -> usize {
        std::fs::metadata(self.log_path()).map_or(0, |meta| meta.len() as usize)
    }

    /// What it has said after the first `len` bytes.
    pub fn log_since(&self, len: usize) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(len..).unwrap_or_default()).into_owned()
    }

    /// Its process, if it lives.
    pub fn pid(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.pid_path()).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?);
        reap(pid);
        // A number is used again one day: it must be in our namespace, too.
        (netns_of(pid)? == self.place.identity()?).then_some(pid)
    }

    /// Starts it, detached from this process and its terminal. Its words are added to its log.
    ///
    /// # Errors
    /// When it already runs or cannot be started.
    pub fn start(&self, mut command: Command) -> Result<Pid> {
        if let Some(pid) = self.pid() {
            bail!("{} runs already as process {pid}", self.name);
        }
        std::fs::create_dir_all(&self.dir)?;
        let log = OpenOptions::new().create(true).append(true).open(self.log_path())?;
        let errors = log.try_clone()?;
        command.stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0).current_dir("/");
        let child = self.place.spawn(&mut command)?;
        std::fs::write(self.pid_path(), child.id().to_string())
            .with_context(|| format!("cannot write {}", self.pid_path().display()))?;
        Ok(Pid::from_raw(child.id().cast_signed()))
    }

    /// Waits until `ready` holds, but not for a process that has ended. `since` is where in its log this life
    /// of it began.
    ///
    /// # Errors
    /// With what it said, when it ended or is not ready in time.
    pub fn wait_ready(&self, limit: Duration, since: usize, ready: impl Fn() -> bool) -> Result<()> {
        let mut alive = true;
        wait_until(limit, &format!("{} is ready", self.name), || {
            alive = self.pid().is_some();
            ready() || !alive
        })
        .with_context(|| format!("{} said: {}", self.name, self.log_since(since).trim()))?;
        if !alive && !ready() {
            bail!("{} ended and said: {}", self.name, self.log_since(since).trim());
        }
        Ok(())
    }

    /// Sends it a signal and waits until it is gone.
    ///
    /// # Errors
    /// When it does not run, or does not end.
    pub fn stop(&self, signal: Signal) -> Result<()> {
        let Some(pid) = self.pid() else { bail!("{} does not run", self.name) };
        kill(pid, signal).with_context(|| format!("cannot signal {} (process {pid})", self.name))?;
        wait_until(Duration::from_secs(15), &format!("{} ends", self.name), || self.pid().is_none())?;
        Ok(())
    }

    /// Ends it as a power failure would.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill9(&self) -> Result<()> {
        self.stop(Signal::SIGKILL)
    }

    fn pid_path(&self) -> PathBuf {
        self.dir.join(format!("{}.pid", self.name))
    }
}

/// Every process that lives in one of `places`, but not this one.
pub fn living_in(places: &BTreeSet<Identity>) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.map(Pid::from_raw)
        .filter(|pid| *pid != Pid::this())
        .filter(|pid| netns_of(*pid).is_some_and(|id| places.contains(&id)))
        .collect()
}

/// Ends every process in `places`: asks first, kills after `grace`, until none is left.
///
/// # Errors
/// Names those that would not die.
pub fn end_all_in(places: &BTreeSet<Identity>, grace: Duration) -> Result<()> {
    let mut ended = living_in(places);
    signal_all(&ended, Signal::SIGTERM);
    let asked = Instant::now();
    while asked.elapsed() < scaled(grace) && !living_in(places).is_empty() {
        std::thread::sleep(Duration::from_millis(10));
    }
    for _ in 0..ROUNDS_MAX {
        let living = living_in(places);
        if living.is_empty() {
            break;
        }
        signal_all(&living, Signal::SIGKILL);
        ended.extend(living);
        std::thread::sleep(scaled(Duration::from_millis(10)));
    }
    ended.into_iter().for_each(reap);
    let left = living_in(places);
    if left.is_empty() { Ok(()) } else { bail!("these processes do not end: {left:?}") }
}

/// Names of processes, for messages: `pid command`.
pub fn describe(pid: Pid) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    format!("{pid} {}", String::from_utf8_lossy(&line).replace('\0', " ").trim())
}

fn signal_all(pids: &[Pid], signal: Signal) {
    for pid in pids {
        // It may just have ended.
        kill(*pid, signal).ok();
    }
}

fn netns_of(pid: Pid) -> Option<Identity> {
    Identity::of(Path::new(&format!("/proc/{pid}/ns/net")))
}

/// Takes the exit status of a daemon that is a child of ours, so that it does not stay as a zombie. Never
/// called for processes that somebody else waits for.
fn reap(pid: Pid) {
    waitpid(pid, Some(WaitPidFlag::WNOHANG)).ok();
}
