//! Running a program with a deadline and keeping all that it said.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::machine::Lock;
use crate::netns::NetNs;
use crate::wait::{interrupted, scaled};

/// How long a program may take unless its caller says otherwise (scaled).
pub const USUAL_LIMIT: Duration = Duration::from_secs(30);

/// What a program did.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command line, for messages.
    pub line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Output {
    /// Whether it exited with 0.
    pub fn ok(&self) -> bool {
        self.status.success()
    }

    /// Its exit code; -1 when a signal ended it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Its output, if it exited with 0.
    ///
    /// # Errors
    /// With the command line, the status and everything it said.
    pub fn success(self) -> Result<String> {
        if self.ok() {
            return Ok(self.stdout);
        }
        bail!("{self}");
    }

    /// Everything it said when it did exit with `code`.
    ///
    /// # Errors
    /// When it exited with another code.
    pub fn failed_with(self, code: i32) -> Result<String> {
        if self.code() != code {
            bail!("exit code {code} was expected: {self}");
        }
        Ok(format!("{}{}", self.stdout, self.stderr))
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = format!("{}{}", self.stdout, self.stderr);
        write!(f, "`{}` ended with {}: {}", self.line, self.status, said.trim())
    }
}

/// Where and how a program runs.
pub struct Run {
    command: Command,
    place: Option<NetNs>,
    stdin: Vec<u8>,
    stdout: Option<File>,
    limit: Duration,
}

impl Run {
    /// The program `args[0]` with its arguments, here.
    pub fn new<S: AsRef<str>>(args: &[S]) -> Self {
        let mut command = Command::new(args.first().map_or("", AsRef::as_ref));
        command.args(args.iter().skip(1).map(AsRef::as_ref));
        Self { command, place: None, stdin: Vec::new(), stdout: None, limit: USUAL_LIMIT }
    }

    /// In a namespace.
    pub fn inside(mut self, place: &NetNs) -> Self {
        self.place = Some(place.clone());
        self
    }

    /// With another limit (scaled).
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// With this text on its standard input.
    pub fn stdin(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.stdin = text.into();
        self
    }

    /// With its standard output in this file, which it so keeps open, and locked if it is, for as long as
    /// it lives.
    pub fn stdout(mut self, file: File) -> Self {
        self.stdout = Some(file);
        self
    }

    /// With an environment variable.
    pub fn env(mut self, key: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it cannot be started, or was killed because its limit was over. An exit code other than 0 is
    /// not an error here.
    pub fn output(mut self) -> Result<Output> {
        let line = command_line(&self.command);
        let stdout = self.stdout.take().map_or_else(Stdio::piped, Stdio::from);
        self.command.stdin(Stdio::piped()).stdout(stdout).stderr(Stdio::piped());
        let mut child = match &self.place {
            Some(place) => place.spawn(&mut self.command)?,
            None => self.command.spawn().with_context(|| format!("cannot start `{line}`"))?,
        };
        let writer = feed(&mut child, std::mem::take(&mut self.stdin));
        let stdout = drain(child.stdout.take());
        let stderr = drain(child.stderr.take());
        let status =
            wait_within(&mut child, scaled(self.limit)).with_context(|| format!("`{line}` was stopped"))?;
        let text = |reader: JoinHandle<String>| reader.join().unwrap_or_default();
        writer.join().ok();
        Ok(Output { line, status, stdout: text(stdout), stderr: text(stderr) })
    }

    /// Runs it and gives its output when it exits with 0.
    ///
    /// # Errors
    /// As [`Run::output`] and [`Output::success`].
    pub fn success(self) -> Result<String> {
        self.output()?.success()
    }
}

/// Waits for `child` to end, and kills it when that takes longer than `limit`.
///
/// # Errors
/// When it had to be killed.
pub fn wait_within(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(500);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if start.elapsed() >= limit || interrupted() {
            child.kill().ok();
            child.wait().ok();
            match interrupted() {
                true => bail!("interrupted"),
                false => bail!("it took longer than {:.1} s", limit.as_secs_f64()),
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Runs lines of `ip` commands in one process, in a namespace or (none) where we are.
///
/// # Errors
/// With the line that `ip` did not accept.
pub fn ip_batch(place: Option<&NetNs>, lines: &[String]) -> Result<()> {
    ip_lines(Run::new(IP_BATCH), place, lines)
}

/// As [`ip_batch`]; the process holds `lock` for as long as it lives: when we are killed, `down` waits until
/// it makes nothing more.
///
/// # Errors
/// With the line that `ip` did not accept.
pub fn ip_batch_holding(lock: &Lock, place: Option<&NetNs>, lines: &[String]) -> Result<()> {
    ip_lines(Run::new(IP_BATCH).stdout(lock.share()?), place, lines)
}

const IP_BATCH: &[&str] = &["ip", "-batch", "-"];

fn ip_lines(run: Run, place: Option<&NetNs>, lines: &[String]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let run = run.stdin(lines.join("\n") + "\n");
    let output = match place {
        Some(place) => run.inside(place).output()?,
        None => run.output()?,
    };
    if !output.ok() {
        let at = failed_line(&output.stderr).and_then(|number| lines.get(number - 1));
        let place = place.map_or("this namespace", NetNs::name);
        bail!("ip {} failed in {place}: {}", at.map_or("-batch", String::as_str), output.stderr.trim());
    }
    Ok(())
}

/// The number in `Command failed -:7`.
fn failed_line(stderr: &str) -> Option<usize> {
    let rest = stderr.split("Command failed -:").nth(1)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok().filter(|number| *number > 0)
}

fn command_line(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

fn feed(child: &mut Child, text: Vec<u8>) -> JoinHandle<()> {
    let stdin = child.stdin.take();
    std::thread::spawn(move || {
        if let Some(mut stdin) = stdin {
            // A program may end without reading all of it; how it ended tells the rest.
            stdin.write_all(&text).ok();
        }
    })
}

fn drain(stream: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            stream.read_to_end(&mut bytes).ok();
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_killed_and_named() {
        let error = Run::new(&["sleep", "60"]).limit(Duration::from_millis(50)).output().unwrap_err();
        assert!(format!("{error:#}").contains("sleep 60"), "{error:#}");
    }

    #[test]
    fn the_line_that_ip_refused_is_found() {
        assert_eq!(failed_line("Cannot find device \"x\"\nCommand failed -:12\n"), Some(12));
        assert_eq!(failed_line("Command failed -:0"), None);
        assert_eq!(failed_line("something else"), None);
    }

    #[test]
    fn both_streams_and_the_code_are_kept() {
        let output = Run::new(&["sh", "-c", "echo out; echo err >&2; cat; exit 3"]).stdin("in\n").output();
        let output = output.unwrap();
        assert_eq!(
            (output.code(), output.stdout.as_str(), output.stderr.as_str()),
            (3, "out\nin\n", "err\n")
        );
    }
}
