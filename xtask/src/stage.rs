//! Progress of long commands: one line when a stage starts and one when it ends, with the time since the
//! command started.

use std::time::{Duration, Instant};

/// The clock of one command.
pub(crate) struct Progress {
    started: Instant,
}

impl Progress {
    /// Starts the clock.
    pub(crate) fn start() -> Self {
        Self { started: Instant::now() }
    }

    /// Runs one stage between its two lines.
    pub(crate) fn stage<T>(&self, name: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let began = Instant::now();
        self.say(&format!("{name} ..."));
        let result = work();
        let word = if result.is_ok() { "done" } else { "FAILED" };
        self.say(&format!("{name}: {word} in {}", seconds(began.elapsed())));
        result
    }

    /// Prints one line with the elapsed time before it.
    pub(crate) fn say(&self, line: &str) {
        let elapsed = self.started.elapsed().as_secs();
        eprintln!("[{:02}:{:02}] {line}", elapsed / 60, elapsed % 60);
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
