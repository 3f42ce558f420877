//! The agent's side of a user's program: starts its runner or finds it, and waits for its result.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::sys::signal::Signal;
use tokio::{
    process::Command,
    time::{Instant, sleep},
};

use crate::{
    files,
    keeper::{ensure_dead, is_locked, signal_holder},
    pods::{UP, folders},
    supervisor::hook::{GRACE, HookResult, HookSpec, OUTPUT_FILE},
};

const LOOK: Duration = Duration::from_millis(50);
/// How much of a hook's output is shown.
const TAIL_BYTES: u64 = 2048;
const TAIL_LINES: usize = 10;

/// Where a hook runs, and what runs it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Folders above it belong to the agent; the last is the hook's own.
    pub(crate) folder: PathBuf,
    pub(crate) program: PathBuf,
}

/// Runs a hook to its end. With `adopt`, a run of the same spec that is under way is waited for, and one that has
/// succeeded counts; without, whatever is under way ends first.
///
/// # Errors
/// Why it failed, in words.
pub(crate) async fn run(place: &Place, spec: &HookSpec, adopt: bool) -> Result<(), String> {
    let words = |what: &str, error: anyhow::Error| format!("{what}: {error:#}");
    if adopt && HookSpec::load(&place.folder).is_ok_and(|there| there.run == spec.run) {
        wait_until_free(&place.folder).await.map_err(|error| words("cannot look for it", error))?;
        if HookResult::load(&place.folder)
            .is_ok_and(|result| result.run == spec.run && result.error.is_none())
        {
            return Ok(());
        }
    }
    end(&place.folder).await.map_err(|error| words("an earlier run cannot be ended", error))?;
    start(place, spec).await.map_err(|error| format!("it cannot be started: {error}"))?;
    match HookResult::load(&place.folder) {
        Ok(HookResult { run, error: None }) if run == spec.run => Ok(()),
        Ok(HookResult { run, error: Some(why) }) if run == spec.run => Err(why),
        _ => Err("it was killed, and what ran it too".to_owned()),
    }
}

/// Ends a run that is under way: SIGTERM, and SIGKILL after a grace.
pub(crate) async fn end(folder: &Path) -> anyhow::Result<()> {
    if !is_locked(folder)? {
        return Ok(());
    }
    signal_holder(folder, Signal::SIGTERM);
    let deadline = Instant::now() + GRACE + Duration::from_secs(2);
    while is_locked(folder)? && Instant::now() < deadline {
        sleep(LOOK).await;
    }
    ensure_dead(folder).await
}

/// What was done for the hooks of a pod counts no more: it may begin anew.
pub(crate) fn forget_results(pod_folder: &Path) -> io::Result<()> {
    for hook in folders(pod_folder) {
        HookResult::forget(&pod_folder.join(hook).join(UP))?;
    }
    Ok(())
}

/// The last lines of what a hook said.
pub(crate) fn output(folder: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(folder.join(OUTPUT_FILE))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut tail = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(tail)
    };
    let text = read().map(|tail| String::from_utf8_lossy(&tail).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

async fn wait_until_free(folder: &Path) -> anyhow::Result<()> {
    while is_locked(folder)? {
        sleep(LOOK).await;
    }
    Ok(())
}

/// Starts the runner, which outlives the agent, and waits for its end.
async fn start(place: &Place, spec: &HookSpec) -> io::Result<()> {
    // The program walks through the folders above to its own, and cannot list them.
    for folder in place.folder.ancestors().take(3).collect::<Vec<_>>().into_iter().rev() {
        files::folder(folder, 0o711)?;
    }
    spec.save(&place.folder)?;
    let log = place.folder.join("runner.log");
    let log = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&log)?;
    let mut child = Command::new(&place.program)
        .args(["supervise", "--hook-dir"])
        .arg(&place.folder)
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()?;
    let status = child.wait().await?;
    if status.success() {
        return Ok(());
    }
    let said = fs::read_to_string(place.folder.join("runner.log")).unwrap_or_default();
    let line = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("what ran it was killed");
    Err(io::Error::other(line.strip_prefix("error: ").unwrap_or(line).to_owned()))
}
