//! Runs one program of a user's to its end: bounded in time and output, its result kept in a file.
//!
//! A process of its own (`netctl supervise --hook-dir`), started by the agent and independent of it: an agent that
//! comes back finds the program under way, by the lock in the folder, or its result. In the folder: `spec.json`,
//! `lock`, `output.log` (rotated once), `result.json`, and `work`, the program's working directory.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::{
        prctl,
        signal::{Signal, kill},
        signalfd::SignalFd,
        stat::{Mode, umask},
        wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    },
    unistd::{Pid, setsid},
};
use serde::{Deserialize, Serialize};

use super::{
    child, ended_how, enter, lock,
    log_file::LogFile,
    namespace::PidNamespace,
    poll_readable, signal_group, signals,
    spec::TaskSpec,
    strays::{self, Family},
};
use crate::{files, lease_file};

/// The output of a hook is moved to `output.log.1` when it has grown to this size.
pub(crate) const OUTPUT_BYTES_MAX: u64 = 64 * 1024;
/// The file of the output.
pub(crate) const OUTPUT_FILE: &str = "output.log";
/// How long a program may take to end after SIGTERM.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// How often the lease is looked at.
const LEASE_LOOK: Duration = Duration::from_millis(100);
const NO_LEASE: &str = "it waits for the node's lease: there must never be two that live";
const LEASE_ENDED: &str = "the node's lease has ended: there must never be two that live";
const SPEC_FILE: &str = "spec.json";
const RESULT_FILE: &str = "result.json";
const WORK_FOLDER: &str = "work";
const CHUNK_BYTES: usize = 16 * 1024;

/// What is to be run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HookSpec {
    /// Names this content and the machine's boot: a result of another run is none.
    pub(crate) run: String,
    pub(crate) name: String,
    pub(crate) exec: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    /// User and group; none: root.
    pub(crate) user: Option<(u32, u32)>,
    pub(crate) netns: Option<PathBuf>,
    pub(crate) timeout_ms: u64,
    /// It may run only while the node holds the lease in this file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) lease: Option<PathBuf>,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HookResult {
    pub(crate) run: String,
    /// None when it exited with status 0.
    pub(crate) error: Option<String>,
}

impl HookSpec {
    pub(crate) fn load(folder: &Path) -> io::Result<HookSpec> {
        serde_json::from_slice(&fs::read(folder.join(SPEC_FILE))?).map_err(io::Error::other)
    }

    /// Writes it for a run that has not begun.
    pub(crate) fn save(&self, folder: &Path) -> io::Result<()> {
        HookResult::forget(folder)?;
        let text = serde_json::to_vec_pretty(self).expect("a spec holds only strings and numbers");
        files::replace(&folder.join(SPEC_FILE), &text, 0o600)
    }
}

impl HookResult {
    pub(crate) fn load(folder: &Path) -> io::Result<HookResult> {
        serde_json::from_slice(&fs::read(folder.join(RESULT_FILE))?).map_err(io::Error::other)
    }

    /// Removes it, if it is there.
    pub(crate) fn forget(folder: &Path) -> io::Result<()> {
        match fs::remove_file(folder.join(RESULT_FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn save(&self, folder: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self).expect("a result holds only strings");
        files::replace(&folder.join(RESULT_FILE), &text, 0o600)
    }
}

/// Runs what the spec in `folder` says and writes down how it ended.
///
/// # Errors
/// When it cannot begin, or the result cannot be written.
pub fn run(folder: &Path) -> Result<()> {
    // Fails when the caller made this process a group leader, which is as good.
    let _ = setsid();
    umask(Mode::from_bits_truncate(0o077));
    let _lock = lock(folder)?;
    let spec = HookSpec::load(folder).context("cannot read the hook's spec")?;
    let error = Program::start(folder, &spec).and_then(Program::wait).map_err(|error| format!("{error:#}"));
    let error = match error {
        Ok(error) => error,
        Err(why) => Some(why),
    };
    HookResult { run: spec.run, error }.save(folder).context("cannot write the hook's result")
}

struct Program {
    pid: i32,
    /// Of a job's program; an operator's is the machine's, and signals what it likes.
    _namespace: Option<PidNamespace>,
    outputs: Vec<fs::File>,
    signals: SignalFd,
    log: LogFile,
    end_at: Instant,
    timeout: Duration,
    lease: Option<PathBuf>,
    /// Why it is being ended.
    ending: Option<String>,
}

impl Program {
    fn start(folder: &Path, spec: &HookSpec) -> Result<Program> {
        enter(spec.netns.as_deref())?;
        prctl::set_child_subreaper(true).context("cannot become the parent of orphans")?;
        let signals = signals()?;
        wait_for_lease(spec, &signals)?;
        let task = TaskSpec { name: spec.name.clone(), exec: spec.exec.clone(), env: spec.env.clone() };
        let mut namespace = spec.netns.is_some().then(PidNamespace::default);
        // Its text names the cause.
        let child = child::start(&task, spec.user, &folder.join(WORK_FOLDER), namespace.as_mut())
            .map_err(|error| anyhow::Error::msg(error.to_string()))?;
        let timeout = Duration::from_millis(spec.timeout_ms);
        Ok(Program {
            pid: child.pid,
            _namespace: namespace,
            outputs: vec![child.output],
            signals,
            log: LogFile::new(folder.join(OUTPUT_FILE), OUTPUT_BYTES_MAX),
            end_at: Instant::now() + timeout,
            timeout,
            lease: spec.lease.clone(),
            ending: None,
        })
    }

    /// Why it failed; none when it did not.
    fn wait(mut self) -> Result<Option<String>> {
        let result = loop {
            if let Some(result) = self.reap() {
                break result;
            }
            self.expire(Instant::now());
            if lease_remaining(self.lease.as_deref()).is_zero() {
                self.end_with_lease();
            }
            self.sleep()?;
        };
        self.read_output();
        sweep();
        Ok(match result {
            _ if self.ending.is_some() => self.ending,
            WaitStatus::Exited(_, 0) => None,
            result => Some(ended_how(result)),
        })
    }

    fn sleep(&mut self) -> Result<()> {
        let mut timeout = self.end_at.saturating_duration_since(Instant::now());
        if self.lease.is_some() {
            timeout = timeout.min(LEASE_LOOK);
        }
        let mut sources = vec![self.signals.as_fd()];
        sources.extend(self.outputs.iter().map(|output| output.as_fd()));
        let ready = poll_readable(&sources, Some(timeout))?;
        if ready[0] {
            self.handle_signals()?;
        }
        if ready[1..].contains(&true) {
            self.read_output();
        }
        Ok(())
    }

    fn handle_signals(&mut self) -> Result<()> {
        while let Some(signal) = self.signals.read_signal().context("cannot read signals")? {
            if signal.ssi_signo == Signal::SIGTERM as u32 {
                self.end("it was ended".to_owned());
            }
        }
        Ok(())
    }

    fn expire(&mut self, now: Instant) {
        if now < self.end_at {
            return;
        }
        if self.ending.is_some() {
            self.end_at = now + GRACE;
            return signal_group(self.pid, Signal::SIGKILL);
        }
        self.end(format!("it took longer than {} s", self.timeout.as_secs_f32()));
    }

    /// Nothing of the pod may live any more, and another may be started elsewhere.
    fn end_with_lease(&mut self) {
        self.ending = Some(LEASE_ENDED.to_owned());
        signal_group(self.pid, Signal::SIGKILL);
        for pid in strays_of_this_process().into_iter().filter(|pid| *pid != self.pid) {
            // It may have ended meanwhile.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    fn end(&mut self, why: String) {
        if self.ending.is_none() {
            (self.ending, self.end_at) = (Some(why), Instant::now() + GRACE);
            signal_group(self.pid, Signal::SIGTERM);
        }
    }

    /// How the program ended, if it has; orphans that came to this process are buried, too.
    fn reap(&mut self) -> Option<WaitStatus> {
        let any = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        while let Ok(ended) = waitid(Id::All, any) {
            let pid = ended.pid()?;
            if pid.as_raw() == self.pid {
                // While the leader is not reaped, its group id is nobody else's.
                signal_group(self.pid, Signal::SIGKILL);
                return waitpid(pid, None).ok();
            }
            let _ = waitpid(pid, None);
        }
        None
    }

    fn read_output(&mut self) {
        let mut chunk = vec![0; CHUNK_BYTES];
        let log = &mut self.log;
        self.outputs.retain_mut(|output| {
            loop {
                match output.read(&mut chunk) {
                    Ok(0) => return false,
                    Ok(len) => log.append(&chunk[..len]),
                    Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
                }
            }
        });
    }
}

/// A program of a pod of which there may only be one waits for the lease as the tasks do.
fn wait_for_lease(spec: &HookSpec, signals: &SignalFd) -> Result<()> {
    let end_at = Instant::now() + Duration::from_millis(spec.timeout_ms);
    while lease_remaining(spec.lease.as_deref()).is_zero() {
        poll_readable(&[signals.as_fd()], Some(LEASE_LOOK))?;
        while let Some(signal) = signals.read_signal().context("cannot read signals")? {
            ensure!(signal.ssi_signo != Signal::SIGTERM as u32, "it was ended");
        }
        ensure!(Instant::now() < end_at, "{NO_LEASE}");
    }
    Ok(())
}

/// How long it may run yet; without end for most.
fn lease_remaining(lease: Option<&Path>) -> Duration {
    lease.map_or(Duration::MAX, lease_file::remaining)
}

fn strays_of_this_process() -> Vec<i32> {
    let family = Family { supervisor: std::process::id().cast_signed(), owner: None };
    strays::find(family).unwrap_or_default()
}

/// Kills what the program left behind.
fn sweep() {
    for _ in 0..10 {
        let strays = strays_of_this_process();
        if strays.is_empty() {
            return;
        }
        for pid in strays {
            // It may have ended meanwhile.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            let _ = waitpid(Pid::from_raw(pid), None);
        }
    }
}
