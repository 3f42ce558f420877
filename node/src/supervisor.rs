//! The supervisor of one pod: starts its tasks, starts them again when they end, keeps their output.
//!
//! One process per pod (`netctl supervise`), started by the agent and independent of it: it goes on when the
//! agent ends, and all processes of its tasks end with it (`supervisor/namespace.rs`). One thread, one `poll`, no runtime: a machine has a hundred of them.
//! It deliberately knows no cluster, no store and no kernel object; all that it needs is in its
//! [`spec::PodSpec`].
//!
//! In the pod's run folder: `spec.json`, `lock` (held for the supervisor's whole life: there are never two),
//! `supervisor.sock` (see [`status`]).

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use hextet_lifecycle::Ending;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        signal::{SigSet, Signal, kill, killpg},
        signalfd::{SfdFlags, SignalFd},
        stat::{Mode, umask},
        wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    },
    unistd::{Pid, getpid, setsid},
};

mod child;
mod clients;
pub(crate) mod hook;
mod log_file;
pub(crate) mod namespace;
pub mod spec;
pub mod status;
mod strays;
mod tail;
mod task;

use self::{
    clients::Clients,
    log_file::LogFile,
    namespace::PidNamespace,
    spec::{PodSpec, TaskSpec},
    status::{Command, LOCK_FILE, Status, TaskState, TaskStatus},
    strays::Family,
    tail::Tail,
    task::Life,
};
use crate::lease_file;

pub use self::{
    hook::run as run_hook,
    log_file::{LOG_BYTES_MAX, rotated},
};

/// What the supervisor writes to its standard output once `supervisor.sock` answers.
pub const READY_LINE: &str = "ready";

/// The most that is read of one task's output before the others get their turn.
const OUTPUT_CHUNK_BYTES: usize = 64 * 1024;
/// Pipes of earlier runs that are still held open by something; the oldest is closed for a new one.
const OUTPUTS_MAX: usize = 4;
/// How often the lease is looked at by a pod that needs it.
pub(crate) const LEASE_LOOK: Duration = Duration::from_millis(100);
/// Sweeps for strays when the pod ends; each kills a generation of processes.
const STRAY_SWEEPS_MAX: u32 = 50;

/// Supervises the pod whose run folder is `pod_dir` until it is told to stop.
///
/// Returns when every task has ended, after `stop` or SIGTERM.
///
/// # Errors
/// When it cannot begin: another supervisor holds the lock, the spec cannot be read, the network namespace
/// cannot be entered. A task that cannot be started is no error; its status says why.
pub fn run(pod_dir: &Path) -> Result<()> {
    // Fails when the caller made this process a group leader, which is as good.
    let _ = setsid();
    umask(Mode::from_bits_truncate(0o077));
    let _lock = lock(pod_dir)?;
    let spec = PodSpec::load(pod_dir)?;
    enter(spec.netns.as_deref())?;
    prctl::set_child_subreaper(true).context("cannot become the parent of orphans")?;
    let mut supervisor = Supervisor::new(pod_dir, spec)?;
    supervisor.sweep_strays();
    announce();
    supervisor.supervise()
}

fn lock(pod_dir: &Path) -> Result<Flock<File>> {
    let path = pod_dir.join(LOCK_FILE);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0)?;
            writeln!(lock, "{}", getpid())?;
            Ok(lock)
        }
        Err((mut file, Errno::EWOULDBLOCK)) => {
            let mut holder = String::new();
            file.read_to_string(&mut holder)?;
            bail!("process {} supervises {} already", holder.trim(), pod_dir.display())
        }
        Err((_, errno)) => Err(errno).with_context(|| format!("cannot lock {}", path.display())),
    }
}

fn enter(netns: Option<&Path>) -> Result<()> {
    let Some(path) = netns else { return Ok(()) };
    let namespace = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    setns(&namespace, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter the network namespace {}", path.display()))
}

/// Tells who started this process that the socket answers; nobody may be listening.
fn announce() {
    let mut out = io::stdout();
    let _ = writeln!(out, "{READY_LINE}").and_then(|()| out.flush());
}

struct Supervisor {
    pod_dir: PathBuf,
    spec: PodSpec,
    netns_inode: Option<u64>,
    namespace: PidNamespace,
    signals: SignalFd,
    clients: Clients,
    tasks: BTreeMap<String, Task>,
    stopping: bool,
    ending: Option<Ending>,
    told: Status,
}

struct Task {
    spec: TaskSpec,
    life: Life,
    started: Instant,
    log: LogFile,
    /// Of the present run.
    tail: Tail,
    outputs: Vec<File>,
    /// Removed from the spec: forgotten once it has ended.
    leaving: bool,
}

/// What a descriptor that became readable is.
#[derive(Clone, Debug)]
enum Source {
    Signals,
    Clients,
    Output(String),
}

impl Supervisor {
    fn new(pod_dir: &Path, spec: PodSpec) -> Result<Supervisor> {
        let mut supervisor = Supervisor {
            pod_dir: pod_dir.to_owned(),
            netns_inode: std::fs::metadata("/proc/self/ns/net").ok().map(|namespace| namespace.ino()),
            namespace: PidNamespace::default(),
            signals: signals()?,
            clients: Clients::listen(pod_dir).context("cannot listen on the supervisor's socket")?,
            tasks: BTreeMap::new(),
            stopping: false,
            ending: None,
            told: Status::default(),
            spec,
        };
        let now = Instant::now();
        for task in &supervisor.spec.tasks {
            supervisor.tasks.insert(task.name.clone(), Task::new(&supervisor.spec, task, now));
        }
        Ok(supervisor)
    }

    fn supervise(mut self) -> Result<()> {
        loop {
            if self.lease_remaining().is_zero() {
                self.end_all();
            } else {
                self.start_due(Instant::now());
            }
            self.act(Instant::now());
            self.tell();
            if self.is_done() {
                break;
            }
            for source in self.wait()? {
                self.handle(source)?;
            }
        }
        self.sweep_strays();
        self.told = Status { stopped: true, ..self.status() };
        self.clients.send(&self.told);
        self.clients.close();
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.stopping && self.tasks.values().all(|task| task.life.is_stopped())
    }

    /// How long the tasks may run yet, when there must never be two of the pod that live.
    fn lease_remaining(&self) -> Duration {
        self.spec.lease.as_deref().map_or(Duration::MAX, lease_file::remaining)
    }

    /// The lease is over: nothing of the pod may live any more, and another may be started elsewhere.
    fn end_all(&mut self) {
        let alive: Vec<i32> = self.tasks.values().filter_map(|task| task.life.pid()).collect();
        if alive.is_empty() && !self.namespace.is_alive() {
            return;
        }
        eprintln!("the node's lease has ended: ending pod {}", self.spec.pod);
        alive.into_iter().for_each(|pid| signal_group(pid, Signal::SIGKILL));
        self.sweep_strays();
    }

    fn start_due(&mut self, now: Instant) {
        let spec = &self.spec;
        for task in self.tasks.values_mut().filter(|task| task.life.is_due(now)) {
            task.start(spec, &mut self.namespace, now);
            self.ending = task.ending().filter(|_| task.life.pid().is_none()).or(self.ending.take());
        }
    }

    /// Kills what is due, and forgets tasks that left.
    fn act(&mut self, now: Instant) {
        for task in self.tasks.values_mut() {
            if let Some(pid) = task.life.overdue(now) {
                signal_group(pid, Signal::SIGKILL);
            }
        }
        self.tasks.retain(|_, task| !(task.leaving && task.life.is_stopped()));
    }

    /// Sends the status when it is news.
    fn tell(&mut self) {
        let status = self.status();
        if status != self.told {
            self.clients.send(&status);
            self.told = status;
        }
    }

    fn status(&self) -> Status {
        Status {
            pid: std::process::id(),
            fingerprint: self.spec.fingerprint.clone(),
            netns_inode: self.netns_inode,
            stopped: false,
            ending: self.ending.clone(),
            tasks: self.tasks.iter().map(|(name, task)| (name.clone(), self.task_status(task))).collect(),
        }
    }

    fn task_status(&self, task: &Task) -> TaskStatus {
        let status = task.life.status();
        if status.pid.is_some() || !self.lease_remaining().is_zero() {
            return status;
        }
        let message = "waits for the node's lease: there must never be two that live".to_owned();
        TaskStatus { message, ..status }
    }

    /// Sleeps until something can be read or is due; what can be read.
    fn wait(&self) -> Result<Vec<Source>> {
        let mut sources = vec![(Source::Signals, self.signals.as_fd())];
        sources.extend(self.clients.sources().into_iter().map(|fd| (Source::Clients, fd)));
        for (name, task) in &self.tasks {
            sources.extend(task.outputs.iter().map(|output| (Source::Output(name.clone()), output.as_fd())));
        }
        let ready = poll_readable(&sources.iter().map(|(_, fd)| *fd).collect::<Vec<_>>(), self.timeout())?;
        Ok(sources
            .into_iter()
            .zip(ready)
            .filter(|(_, ready)| *ready)
            .map(|((source, _), _)| source)
            .collect())
    }

    fn timeout(&self) -> Option<Duration> {
        let next = self.tasks.values().filter_map(|task| task.life.deadline()).min();
        let next = next.map(|next| next.saturating_duration_since(Instant::now()));
        if self.spec.lease.is_none() {
            return next;
        }
        // Without a lease what is due waits; with one, its end must not be missed, also when the machine sleeps.
        let look = match self.lease_remaining() {
            Duration::ZERO => LEASE_LOOK,
            remaining => remaining.min(LEASE_LOOK).min(next.unwrap_or(LEASE_LOOK)),
        };
        Some(look)
    }

    fn handle(&mut self, source: Source) -> Result<()> {
        match source {
            Source::Signals => self.handle_signals()?,
            Source::Clients => self.handle_clients(),
            Source::Output(name) => {
                if let Some(task) = self.tasks.get_mut(&name) {
                    task.read_output();
                }
            }
        }
        Ok(())
    }

    fn handle_signals(&mut self) -> Result<()> {
        while let Some(signal) = self.signals.read_signal().context("cannot read signals")? {
            if signal.ssi_signo == Signal::SIGTERM as u32 {
                self.stop(Instant::now());
            }
        }
        self.reap();
        Ok(())
    }

    fn handle_clients(&mut self) {
        self.clients.accept(&self.told);
        for command in self.clients.receive() {
            match command {
                Command::Stop => self.stop(Instant::now()),
                Command::Update => self.update(Instant::now()),
            }
        }
    }

    fn stop(&mut self, now: Instant) {
        self.stopping = true;
        for task in self.tasks.values_mut() {
            task.stop(false, now);
        }
    }

    /// Takes over the spec that the agent has written; a pod that is stopping stays so.
    fn update(&mut self, now: Instant) {
        if self.stopping {
            return;
        }
        let spec = match PodSpec::load(&self.pod_dir) {
            Ok(spec) => spec,
            Err(error) => {
                eprintln!("error: {:#}; the tasks stay as they are", anyhow::Error::new(error));
                return;
            }
        };
        for (name, task) in &mut self.tasks {
            if !spec.tasks.iter().any(|wanted| wanted.name == *name) {
                task.leaving = true;
                task.stop(false, now);
            }
        }
        for wanted in &spec.tasks {
            match self.tasks.get_mut(&wanted.name) {
                Some(task) if task.spec == *wanted && !task.leaving => {}
                Some(task) => {
                    task.spec = wanted.clone();
                    task.leaving = false;
                    task.stop(true, now);
                }
                None => {
                    self.tasks.insert(wanted.name.clone(), Task::new(&spec, wanted, now));
                }
            }
        }
        if spec.tasks != self.spec.tasks {
            // How others ended says nothing of these.
            self.ending = None;
        }
        // Where the pod lives does not change while it lives.
        self.spec = PodSpec { netns: self.spec.netns.clone(), uid: self.spec.uid, ..spec };
    }

    /// Takes note of every process that has ended: tasks, and orphans that came to this process.
    fn reap(&mut self) {
        let any = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        while let Ok(ended) = waitid(Id::All, any) {
            let Some(pid) = ended.pid() else { return };
            let task = self.tasks.values_mut().find(|task| task.life.pid() == Some(pid.as_raw()));
            if task.is_some() {
                // While the leader is not reaped, its group id is nobody else's.
                signal_group(pid.as_raw(), Signal::SIGKILL);
            }
            let result = waitpid(pid, None);
            self.namespace.reaped(pid);
            if let (Some(task), Ok(result)) = (task, result) {
                task.ended(result, Instant::now());
                self.ending = task.ending().or(self.ending.take());
            }
        }
    }

    /// Kills what is left of the pod's processes: its namespace, and what an earlier supervisor may have left outside.
    fn sweep_strays(&mut self) {
        self.namespace.kill();
        let owner = self.spec.netns.is_some().then_some(self.spec.uid.zip(self.netns_inode)).flatten();
        let family = Family { supervisor: std::process::id().cast_signed(), owner };
        for sweep in 0..STRAY_SWEEPS_MAX {
            let strays = strays::find(family).unwrap_or_default();
            if strays.is_empty() {
                return;
            }
            for pid in strays {
                // It may have ended meanwhile.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(u64::from(sweep.min(20))));
            self.reap();
        }
        eprintln!("error: processes of pod {} cannot be killed", self.spec.pod);
    }
}

impl Task {
    fn new(pod: &PodSpec, spec: &TaskSpec, now: Instant) -> Task {
        Task {
            spec: spec.clone(),
            life: Life::new(now),
            started: now,
            log: LogFile::new(pod.log(&spec.name), LOG_BYTES_MAX),
            tail: Tail::default(),
            outputs: Vec::new(),
            leaving: false,
        }
    }

    fn start(&mut self, pod: &PodSpec, namespace: &mut PidNamespace, now: Instant) {
        self.tail = Tail::default();
        let (user, folder) = (pod.uid.map(|uid| (uid, uid)), pod.private_folder(&self.spec.name));
        match child::start(&self.spec, user, &folder, Some(namespace)) {
            Ok(child) => {
                if self.outputs.len() == OUTPUTS_MAX {
                    self.outputs.remove(0);
                }
                self.outputs.push(child.output);
                self.started = now;
                self.life.started(child.pid, now);
            }
            Err(error) => self.life.start_failed(error.to_string(), now),
        }
    }

    fn stop(&mut self, again: bool, now: Instant) {
        if let Some(pid) = self.life.stop(again, now) {
            signal_group(pid, Signal::SIGTERM);
        }
    }

    fn ended(&mut self, result: WaitStatus, now: Instant) {
        self.read_output();
        let how = ended_how(result);
        let after = now.duration_since(self.started).as_secs_f32();
        self.life.ended(format!("{how} after {after:.1} s"), now);
    }

    /// How it ended by itself, or why it could not be started, while it waits for its next start.
    fn ending(&self) -> Option<Ending> {
        let status = self.life.status();
        let what = format!("task {}: {}", self.spec.name, status.message);
        (status.state == TaskState::Failed).then(|| Ending::new(&what, self.tail.bytes()))
    }

    /// Moves what the pipes hold into the log; a pipe that nobody writes to any more is closed.
    fn read_output(&mut self) {
        let mut chunk = vec![0; OUTPUT_CHUNK_BYTES];
        let (log, tail) = (&mut self.log, &mut self.tail);
        self.outputs.retain_mut(|output| match output.read(&mut chunk) {
            Ok(0) => false,
            Ok(len) => {
                log.append(&chunk[..len]);
                tail.push(&chunk[..len]);
                true
            }
            Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        });
    }
}

fn ended_how(result: WaitStatus) -> String {
    match result {
        WaitStatus::Exited(_, status) => format!("exited with status {status}"),
        WaitStatus::Signaled(_, signal, _) => format!("was killed by {signal}"),
        other => format!("ended: {other:?}"),
    }
}

/// Signals a process group; one that has ended needs none.
fn signal_group(pid: i32, signal: Signal) {
    let _ = killpg(Pid::from_raw(pid), signal);
}

/// Makes SIGCHLD and SIGTERM readable; the keyboard's signals and SIGHUP mean the agent, not the pods.
fn signals() -> Result<SignalFd> {
    let mask: SigSet = [Signal::SIGCHLD, Signal::SIGTERM].into_iter().collect();
    let blocked: SigSet = mask.iter().chain([Signal::SIGINT, Signal::SIGHUP]).collect();
    blocked.thread_block().context("cannot block signals")?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).context("cannot read signals")
}

fn poll_readable(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> Result<Vec<bool>> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    // Rounded up: a timeout that ends early would make the loop spin.
    let timeout = timeout.map_or(PollTimeout::NONE, |time| {
        PollTimeout::try_from(time.as_millis() + 1).unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut polled, timeout) {
        Ok(_) => Ok(polled.iter().map(|fd| fd.any().unwrap_or(true)).collect()),
        Err(Errno::EINTR) => Ok(vec![false; fds.len()]),
        Err(errno) => Err(errno).context("cannot wait for the tasks"),
    }
}
