//! Runs test binaries: reads their output as it comes, keeps it in a log, and ends what does not end.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::tally::Tally;
use crate::{artifacts::TestBinary, process, workspace::Workspace};

/// Lines of a failed run that are printed; the log holds all of them.
const TAIL_LINES: usize = 400;

/// A line of a test that says which seeds it plays.
const SEEDS: &str = "seeds ";

/// A program that has ended and whose streams are silent for this long has nothing more to say.
const QUIET: Duration = Duration::from_millis(500);

/// How runs are shown and when they are given up.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// A run that takes longer is killed and counts as failed.
    pub(crate) deadline: Duration,
    /// What is printed.
    pub(crate) show: Show,
}

/// What is printed of a run. The log holds all of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Show {
    /// Nothing at all.
    #[cfg(test)]
    Nothing,
    /// What failed or was skipped, and one line at the end.
    Result,
    /// Each test as it ends, too.
    EachTest,
}

/// Runs one test binary as cargo would.
pub(crate) fn run_binary(
    workspace: &Workspace,
    binary: &TestBinary,
    arguments: &[String],
    limits: Limits,
) -> Result<Tally> {
    let mut command = Command::new(&binary.executable);
    command.args(arguments).arg("--show-output").current_dir(&binary.folder);
    command.env("CARGO_MANIFEST_DIR", &binary.folder);
    run_command(workspace, &binary.name(), &mut command, limits)
}

/// Runs a command that prints what test harnesses print.
pub(crate) fn run_command(
    workspace: &Workspace,
    name: &str,
    command: &mut Command,
    limits: Limits,
) -> Result<Tally> {
    let started = Instant::now();
    let log = log_file(workspace, name)?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", process::text(command)))?;
    let lines = lines_of(&mut child);
    let mut run =
        Run { name, limits, tally: Tally::default(), tail: VecDeque::new(), log: File::create(&log)? };
    let ended = run.follow(&mut child, &lines, started + limits.deadline)?;
    run.conclude(ended, started.elapsed());
    Ok(run.tally)
}

struct Run<'a> {
    name: &'a str,
    limits: Limits,
    tally: Tally,
    tail: VecDeque<String>,
    log: File,
}

impl Run<'_> {
    /// Reads until the program and its streams end; the exit status, or nothing when the deadline came first.
    fn follow(
        &mut self,
        child: &mut Child,
        lines: &Receiver<String>,
        deadline: Instant,
    ) -> Result<Option<ExitStatus>> {
        loop {
            match lines.recv_timeout(QUIET) {
                Ok(line) => self.line(&line)?,
                Err(RecvTimeoutError::Disconnected) => return Ok(Some(child.wait()?)),
                Err(RecvTimeoutError::Timeout) => {
                    // A process that a test left behind holds the streams open: the status decides.
                    if let Some(status) = child.try_wait()? {
                        return Ok(Some(status));
                    }
                }
            }
            if Instant::now() > deadline {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
        }
    }

    fn line(&mut self, line: &str) -> Result<()> {
        writeln!(self.log, "{line}").context("cannot write the test log")?;
        let ends_a_test = self.tally.read(self.name, line);
        if ends_a_test && self.is_shown(line) {
            eprintln!("    {}", line.trim());
        }
        if line.starts_with(SEEDS) && self.limits.show >= Show::Result {
            eprintln!("    {line}");
        }
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(line.to_owned());
        Ok(())
    }

    fn is_shown(&self, line: &str) -> bool {
        match self.limits.show {
            Show::EachTest => true,
            Show::Result => line.contains("... FAILED") || line.trim().starts_with("SKIP"),
            #[cfg(test)]
            Show::Nothing => false,
        }
    }

    fn conclude(&mut self, ended: Option<ExitStatus>, took: Duration) {
        match ended {
            None => self.tally.fail(format!("{}: not done after {} s", self.name, took.as_secs())),
            Some(status) if !status.success() && self.tally.is_good() => {
                self.tally.fail(format!("{}: {status} without a failed test", self.name));
            }
            Some(status) if status.success() && self.tally.summaries() == 0 => {
                self.tally.fail(format!("{}: ended without a summary", self.name));
            }
            Some(_) => {}
        }
        if self.limits.show >= Show::Result {
            self.show(took);
        }
    }

    fn show(&self, took: Duration) {
        if !self.tally.is_good() {
            eprintln!("---- the last lines of {}", self.name);
            self.tail.iter().for_each(|line| eprintln!("{line}"));
            eprintln!("----");
        }
        eprintln!("  {}: {} in {:.1} s", self.name, self.tally, took.as_secs_f64());
    }
}

fn log_file(workspace: &Workspace, name: &str) -> Result<PathBuf> {
    let folder = workspace.target().join("test-logs");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder.join(format!("{}.log", name.replace('/', "-"))))
}

/// Both streams of `child`, line by line. What is not UTF-8 is replaced, never lost.
fn lines_of(child: &mut Child) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        forward(stdout, sender.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        forward(stderr, sender);
    }
    receiver
}

fn forward(stream: impl Read + Send + 'static, sender: Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line);
            if sender.send(text.trim_end_matches('\r').to_owned()).is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, deadline: Duration) -> Tally {
        let workspace = Workspace::here();
        let name = format!("xtask/harness-{script:.6}").replace(' ', "-");
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run_command(&workspace, &name, &mut command, Limits { deadline, show: Show::Nothing }).unwrap()
    }

    #[test]
    fn a_binary_that_dies_without_a_failed_test_is_a_failure() {
        let tally = run("echo 'test a ... ok'; kill -9 $$", Duration::from_secs(10));
        assert_eq!(tally.to_string(), "0 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn a_binary_that_hangs_is_killed() {
        let tally = run("exec sleep 100", Duration::from_millis(200));
        assert!(tally.details().contains("not done after"), "{}", tally.details());
    }

    #[test]
    fn a_binary_that_runs_nothing_is_a_failure() {
        let tally = run("true", Duration::from_secs(10));
        assert!(tally.details().contains("without a summary"), "{}", tally.details());
    }

    #[test]
    fn both_streams_are_read() {
        let summary = "test result: ok. 2 passed; 0 failed; 0 ignored;";
        let script = format!("echo 'SKIP a: because' >&2; echo '{summary}'");
        assert_eq!(run(&script, Duration::from_secs(10)).to_string(), "1 passed, 0 failed, 1 skipped");
    }
}
