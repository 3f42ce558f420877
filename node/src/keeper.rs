//! The agent's side of one pod's supervisor: starts it or finds it, listens to it, stops it.
//!
//! One small task per pod. The lock in the pod's run folder is the truth about whether a supervisor lives; the
//! socket is only how to talk to it.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    process::Command as Process,
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    config::{NodePaths, supervisor_program},
    leftovers::{self, Owner},
    scripts::ScriptNews,
    socket,
    supervisor::{
        READY_LINE,
        spec::PodSpec,
        status::{Command, LINE_BYTES_MAX, LOCK_FILE, SOCKET_FILE, Status},
    },
};

/// How long a supervisor may take to answer on its socket.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// How long it may take to stop: the grace of the tasks and some time for the rest.
const STOP_DEADLINE: Duration = Duration::from_secs(8);
/// How long a killed supervisor may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(20);
const LOG_FILE: &str = "supervisor.log";

/// Where a pod's supervisor lives.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) pod: String,
    /// The pod's run folder.
    pub(crate) run_dir: PathBuf,
    /// What starts a supervisor.
    pub(crate) program: PathBuf,
    /// Whose processes must be gone when it has ended.
    pub(crate) owner: Owner,
}

impl Place {
    /// That of the pod called `id`.
    pub(crate) fn of(paths: &NodePaths, id: &str) -> Place {
        Place {
            pod: id.to_owned(),
            run_dir: paths.pod_run_dir(id),
            program: supervisor_program(),
            owner: Owner::pod(paths, id),
        }
    }
}

/// What a keeper is told, or told again so that it looks where its supervisor lives; only the last word counts, so that nobody ever waits to say it.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// What the supervisor must run.
    pub(crate) spec: PodSpec,
    /// Stop the tasks and the supervisor, then say [`News::Stopped`].
    pub(crate) stop: bool,
}

/// What a keeper says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// The supervisor said this.
    Status(Status),
    /// There is no supervisor any more, or it could not be started; the keeper has ended.
    Lost(String),
    /// There is none of the pod's processes any more; the keeper has ended.
    Stopped,
    /// A hook of the pod, or what undoes one, has come to its end. It is the pod's so-manieth run.
    Hook { name: String, run: u64, result: Result<(), String> },
    /// A script has come to its end that followed an event of the pod.
    Script(ScriptNews),
}

/// Starts or finds the supervisor of a pod and follows it until it ends.
pub(crate) async fn keep(place: Place, wanted: watch::Receiver<Wanted>, news: mpsc::Sender<(String, News)>) {
    let last = match follow(&place, wanted, &news).await {
        Ok(last) => last,
        Err(error) => News::Lost(format!("{error:#}")),
    };
    // The agent may be ending.
    let _ = news.send((place.pod, last)).await;
}

/// Stops whatever runs for a pod, and returns when nothing does.
///
/// # Errors
/// When the supervisor or a process of the pod survives SIGKILL.
pub(crate) async fn stop(place: &Place) -> Result<()> {
    if let Ok(mut link) = Link::connect(&place.run_dir) {
        link.stop().await;
    }
    ensure_gone(place).await
}

/// No supervisor, and nothing that one has started.
async fn ensure_gone(place: &Place) -> Result<()> {
    ensure_dead(&place.run_dir).await?;
    leftovers::end(&place.owner).await.map(drop)
}

async fn follow(
    place: &Place,
    mut wanted: watch::Receiver<Wanted>,
    news: &mpsc::Sender<(String, News)>,
) -> Result<News> {
    let Some(mut link) = adopt_or_start(place, &mut wanted).await? else {
        return stopped(place).await;
    };
    let mut told = String::new();
    let mut last = Status::default();
    loop {
        tokio::select! {
            status = link.status() => {
                let Some(status) = status? else { return lost(place, "it has ended").await };
                last = status;
                let _ = news.send((place.pod.clone(), News::Status(last.clone()))).await;
            }
            changed = wanted.changed() => {
                if changed.is_err() {
                    return Ok(News::Lost("the agent ends".to_owned()));
                }
            }
        }
        let Wanted { spec, stop } = wanted.borrow_and_update().clone();
        if stop {
            link.stop().await;
            return stopped(place).await;
        }
        if is_elsewhere(&spec, &last) {
            link.stop().await;
            return lost(place, "the pod's network namespace was replaced").await;
        }
        if last.fingerprint != spec.fingerprint && told != spec.fingerprint {
            told = link.update(place, &spec).await?;
        }
    }
}

async fn lost(place: &Place, why: &str) -> Result<News> {
    ensure_gone(place).await?;
    Ok(News::Lost(why.to_owned()))
}

async fn stopped(place: &Place) -> Result<News> {
    stop(place).await?;
    Ok(News::Stopped)
}

/// A link to the pod's supervisor; none when the pod must end instead.
async fn adopt_or_start(place: &Place, wanted: &mut watch::Receiver<Wanted>) -> Result<Option<Link>> {
    let Wanted { spec, stop } = wanted.borrow_and_update().clone();
    if stop {
        return Ok(None);
    }
    if !PodSpec::load(&place.run_dir).is_ok_and(|there| there == spec) {
        spec.save(&place.run_dir)?;
    }
    if let Ok(link) = Link::connect(&place.run_dir) {
        return Ok(Some(link));
    }
    // One that lives without answering cannot be used.
    ensure_dead(&place.run_dir).await?;
    start(place).await?;
    Link::connect(&place.run_dir).context("cannot connect to it").map(Some)
}

/// Whether the supervisor lives in another network namespace than the one that has the pod's name now.
fn is_elsewhere(spec: &PodSpec, status: &Status) -> bool {
    let now = spec.netns.as_ref().and_then(|path| fs::metadata(path).ok()).map(|file| file.ino());
    now.is_some() && status.netns_inode.is_some() && now != status.netns_inode
}

/// Starts a supervisor, which outlives the agent, and waits until it answers.
async fn start(place: &Place) -> Result<()> {
    let log_path = place.run_dir.join(LOG_FILE);
    let log = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&log_path);
    let log = log.with_context(|| format!("cannot make {}", log_path.display()))?;
    let mut child = Process::new(&place.program)
        .args(["supervise", "--pod-dir"])
        .arg(&place.run_dir)
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot run {}", place.program.display()))?;
    let mut stdout = BufReader::new(child.stdout.take().context("it has no standard output")?);
    let mut line = String::new();
    match timeout(START_DEADLINE, stdout.read_line(&mut line)).await {
        Ok(Ok(_)) if line.trim() == READY_LINE => Ok(()),
        Ok(_) => Err(anyhow!("it did not start: {}", last_line(&log_path))),
        Err(_) => {
            // Not fatal if it fails: the lock tells.
            let _ = child.start_kill();
            bail!("it did not start in {} s", START_DEADLINE.as_secs())
        }
    }
}

fn last_line(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

/// Returns when no supervisor holds the pod's lock, killing the one that does.
pub(crate) async fn ensure_dead(run_dir: &Path) -> Result<()> {
    let deadline = Instant::now() + KILL_DEADLINE;
    let polite = Instant::now() + Duration::from_secs(1);
    while is_locked(run_dir)? {
        if Instant::now() > deadline {
            bail!("it holds {} and cannot be killed", run_dir.join(LOCK_FILE).display());
        }
        if Instant::now() > polite {
            signal_holder(run_dir, Signal::SIGKILL);
        }
        sleep(LOCK_RETRY).await;
    }
    Ok(())
}

pub(crate) fn is_locked(run_dir: &Path) -> Result<bool> {
    let path = run_dir.join(LOCK_FILE);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("cannot open {}", path.display())),
    };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => Ok(false),
        Err((_, Errno::EWOULDBLOCK)) => Ok(true),
        Err((_, errno)) => Err(errno).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Signals the process that the lock names, if it is at work in this folder and not another with its old id.
pub(crate) fn signal_holder(run_dir: &Path, signal: Signal) {
    let holder =
        fs::read_to_string(run_dir.join(LOCK_FILE)).ok().and_then(|text| text.trim().parse::<i32>().ok());
    let Some(pid) = holder else { return };
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let own =
        arguments.split(|byte| *byte == 0).any(|argument| argument == run_dir.as_os_str().as_encoded_bytes());
    if own {
        // It may have ended meanwhile.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// A connection to a supervisor.
struct Link {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    line: Vec<u8>,
}

impl Link {
    fn connect(run_dir: &Path) -> io::Result<Link> {
        let stream = socket::connect(run_dir, SOCKET_FILE)?;
        stream.set_nonblocking(true)?;
        let (reader, writer) = UnixStream::from_std(stream)?.into_split();
        Ok(Link { reader: BufReader::new(reader), writer, line: Vec::new() })
    }

    /// The next status; none when the supervisor has hung up. May be dropped and called again.
    async fn status(&mut self) -> Result<Option<Status>> {
        let room = (LINE_BYTES_MAX - self.line.len().min(LINE_BYTES_MAX)) as u64;
        if (&mut self.reader).take(room).read_until(b'\n', &mut self.line).await? == 0 {
            return if room == 0 { bail!("its status is too long") } else { Ok(None) };
        }
        if self.line.last() != Some(&b'\n') {
            return Box::pin(self.status()).await;
        }
        let status = serde_json::from_slice(&self.line).context("its status cannot be read")?;
        self.line.clear();
        Ok(Some(status))
    }

    async fn send(&mut self, command: Command) -> Result<()> {
        let mut line = serde_json::to_vec(&command).expect("a command is a word");
        line.push(b'\n');
        self.writer.write_all(&line).await.context("cannot tell it")
    }

    /// Gives it another spec; the fingerprint of that.
    async fn update(&mut self, place: &Place, spec: &PodSpec) -> Result<String> {
        spec.save(&place.run_dir)?;
        self.send(Command::Update).await?;
        Ok(spec.fingerprint.clone())
    }

    /// Orders it to stop and waits until it hangs up or its time is over.
    async fn stop(&mut self) {
        let deadline = Instant::now() + STOP_DEADLINE;
        if self.send(Command::Stop).await.is_err() {
            return;
        }
        while let Ok(Ok(Some(_))) = timeout_at(deadline, self.status()).await {}
    }
}
