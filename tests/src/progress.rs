//! Saying what goes on during long work: a line that is completed on a terminal, plain lines otherwise.

use std::io::{IsTerminal, Write, stderr};
use std::time::Instant;

/// Who is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A person at a terminal, or a log.
    Told,
    /// Nobody: scenarios.
    Quiet,
}

impl Progress {
    /// Does one step and says its name and how long it took.
    ///
    /// # Errors
    /// Those of the step.
    pub fn step<T, E>(self, what: &str, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        if self == Self::Quiet {
            return work();
        }
        let terminal = stderr().is_terminal();
        if terminal {
            write_now(&format!("  {what} ..."));
        }
        let start = Instant::now();
        let result = work();
        let state = if result.is_ok() { "" } else { "  failed" };
        let took = start.elapsed().as_secs_f64();
        let clear = if terminal { "\r\x1b[K" } else { "" };
        write_now(&format!("{clear}  {what}  {took:.1} s{state}\n"));
        result
    }

    /// Says a line.
    pub fn say(self, line: &str) {
        if self == Self::Told {
            write_now(&format!("{line}\n"));
        }
    }
}

/// Writes to stderr past the capture of the test harness, so that skips and checks of passing tests can be
/// seen and counted.
pub fn write_now(text: &str) {
    // Nobody to read it is no reason to fail.
    stderr().write_all(text.as_bytes()).ok();
}
