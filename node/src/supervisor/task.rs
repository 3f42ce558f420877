//! The life of one task as a state machine: what happened and when in, what is due out.
//!
//! It starts no process and reads no clock; [`super::Supervisor`] does.

use std::time::{Duration, Instant};

use super::status::{TaskState, TaskStatus, bounded_message};

/// The wait before the first restart.
pub(super) const RESTART_FIRST: Duration = Duration::from_millis(100);
/// The longest wait between two starts.
pub(super) const RESTART_MAX: Duration = Duration::from_secs(30);
/// A task that ran for this long starts again with the shortest wait.
pub(super) const STEADY_AFTER: Duration = Duration::from_secs(10);
/// How long a task may take to end after SIGTERM.
pub(super) const STOP_GRACE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting { start_at: Instant },
    Running { pid: i32, since: Instant },
    Stopping { pid: i32, kill_at: Instant, again: bool },
    Stopped,
}

/// The life of one task.
#[derive(Clone, Debug)]
pub(super) struct Life {
    phase: Phase,
    starts: u32,
    /// Starts that were ordered, as by a new text: they are no restarts.
    ordered: u32,
    short_runs: u32,
    message: String,
}

impl Life {
    /// A task that is due to start.
    pub(super) fn new(now: Instant) -> Life {
        let phase = Phase::Waiting { start_at: now };
        Life { phase, starts: 0, ordered: 0, short_runs: 0, message: String::new() }
    }

    pub(super) fn pid(&self) -> Option<i32> {
        match self.phase {
            Phase::Running { pid, .. } | Phase::Stopping { pid, .. } => Some(pid),
            Phase::Waiting { .. } | Phase::Stopped => None,
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.phase == Phase::Stopped
    }

    /// When [`Life::is_due`] or [`Life::overdue`] has something, at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Waiting { start_at } => Some(start_at),
            Phase::Stopping { kill_at, .. } => Some(kill_at),
            Phase::Running { .. } | Phase::Stopped => None,
        }
    }

    /// Whether its process is to be started.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        matches!(self.phase, Phase::Waiting { start_at } if start_at <= now)
    }

    /// The process that gets SIGKILL, with its group: again after each grace, until it has ended.
    pub(super) fn overdue(&mut self, now: Instant) -> Option<i32> {
        match &mut self.phase {
            Phase::Stopping { pid, kill_at, .. } if *kill_at <= now => {
                *kill_at = now + STOP_GRACE;
                Some(*pid)
            }
            _ => None,
        }
    }

    /// Its process was started.
    pub(super) fn started(&mut self, pid: i32, now: Instant) {
        self.starts = self.starts.saturating_add(1);
        self.phase = Phase::Running { pid, since: now };
    }

    /// Its process could not be started.
    pub(super) fn start_failed(&mut self, why: String, now: Instant) {
        self.starts = self.starts.saturating_add(1);
        self.wait(why, now);
    }

    /// Its process has ended; `how` is for people.
    pub(super) fn ended(&mut self, how: String, now: Instant) {
        match self.phase {
            Phase::Stopping { again: true, .. } => {
                (self.short_runs, self.ordered) = (0, self.ordered.saturating_add(1));
                self.message.clear();
                self.phase = Phase::Waiting { start_at: now };
            }
            Phase::Stopping { again: false, .. } | Phase::Stopped => self.phase = Phase::Stopped,
            Phase::Running { since, .. } => {
                if now.duration_since(since) >= STEADY_AFTER {
                    self.short_runs = 0;
                }
                self.wait(how, now);
            }
            Phase::Waiting { .. } => self.wait(how, now),
        }
    }

    /// Asks the task to end, for good or to be started `again`; the process that now gets SIGTERM.
    pub(super) fn stop(&mut self, again: bool, now: Instant) -> Option<i32> {
        match &mut self.phase {
            Phase::Running { pid, .. } => {
                let pid = *pid;
                self.phase = Phase::Stopping { pid, kill_at: now + STOP_GRACE, again };
                Some(pid)
            }
            Phase::Stopping { again: was, .. } => {
                *was = again;
                None
            }
            Phase::Waiting { .. } | Phase::Stopped => {
                self.short_runs = 0;
                // How the text before ended says nothing of this one.
                self.message.clear();
                // Before the first start there is nothing to start again.
                let is_again = again && self.starts > 0;
                self.ordered = self.ordered.saturating_add(is_again.into());
                self.phase = if again { Phase::Waiting { start_at: now } } else { Phase::Stopped };
                None
            }
        }
    }

    /// What the agent is told.
    pub(super) fn status(&self) -> TaskStatus {
        let state = match self.phase {
            // It never ran, or it was ended for a new text.
            Phase::Waiting { .. } if self.starts == 0 || self.message.is_empty() => TaskState::Starting,
            Phase::Waiting { .. } => TaskState::Failed,
            Phase::Running { .. } => TaskState::Running,
            Phase::Stopping { .. } | Phase::Stopped => TaskState::Stopping,
        };
        TaskStatus {
            state,
            pid: self.pid().map(i32::unsigned_abs),
            restarts: self.starts.saturating_sub(1).saturating_sub(self.ordered),
            message: self.message.clone(),
        }
    }

    fn wait(&mut self, why: String, now: Instant) {
        self.message = bounded_message(why);
        self.phase = Phase::Waiting { start_at: now + restart_delay(self.short_runs) };
        self.short_runs = self.short_runs.saturating_add(1);
    }
}

/// The wait before a start that follows `short_runs` runs which each ended early.
fn restart_delay(short_runs: u32) -> Duration {
    RESTART_FIRST.saturating_mul(1 << short_runs.min(16)).min(RESTART_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_their_bound() {
        let waits: Vec<u128> = (0..11).map(|runs| restart_delay(runs).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]);
        assert_eq!(restart_delay(u32::MAX), RESTART_MAX);
    }

    #[test]
    fn a_steady_run_resets_the_wait() {
        let now = Instant::now();
        let mut life = Life::new(now);
        for pid in 1..5 {
            life.started(pid, now);
            life.ended("exited with status 1".into(), now);
        }
        assert_eq!(life.deadline(), Some(now + Duration::from_millis(800)));
        life.started(9, now);
        let later = now + STEADY_AFTER;
        life.ended("exited with status 0".into(), later);
        assert_eq!(life.deadline(), Some(later + RESTART_FIRST));
    }

    #[test]
    fn the_first_start_is_no_restart() {
        let now = Instant::now();
        let mut life = Life::new(now);
        assert_eq!(life.status().state, TaskState::Starting);
        assert!(life.is_due(now));
        life.started(7, now);
        assert_eq!((life.status().restarts, life.status().pid), (0, Some(7)));
        life.ended("killed by SIGSEGV".into(), now);
        assert_eq!(life.status().state, TaskState::Failed);
        assert_eq!(life.status().message, "killed by SIGSEGV");
        life.started(8, now);
        assert_eq!(life.status().restarts, 1);
    }

    #[test]
    fn a_start_that_was_ordered_is_no_restart() {
        let now = Instant::now();
        let mut life = Life::new(now);
        life.stop(true, now);
        life.started(7, now);
        assert_eq!(life.status().restarts, 0, "the first start is none whatever was said before");
        life.stop(true, now);
        life.ended("killed by SIGTERM".into(), now);
        let status = life.status();
        assert_eq!((status.state, status.message.as_str()), (TaskState::Starting, ""), "it has not failed");
        life.started(8, now);
        assert_eq!(life.status().restarts, 0, "a new text");
        life.ended("exited with status 1".into(), now);
        life.started(9, now);
        assert_eq!(life.status().restarts, 1);
        life.stop(false, now);
        life.ended("killed by SIGTERM".into(), now);
        life.stop(true, now);
        life.started(10, now);
        assert_eq!(life.status().restarts, 1, "it was stopped and is wanted again");
        life.ended("exited with status 1".into(), now);
        life.stop(true, now);
        assert_eq!(life.status().state, TaskState::Starting, "a new text while it waits");
    }

    #[test]
    fn a_task_that_ignores_the_request_is_killed_after_the_grace() {
        let now = Instant::now();
        let mut life = Life::new(now);
        life.started(7, now);
        assert_eq!(life.stop(false, now), Some(7));
        assert_eq!(life.overdue(now), None);
        assert_eq!(life.deadline(), Some(now + STOP_GRACE));
        assert_eq!(life.overdue(now + STOP_GRACE), Some(7));
        life.ended("killed by SIGKILL".into(), now + STOP_GRACE);
        assert!(life.is_stopped());
        assert_eq!(life.deadline(), None);
    }

    #[test]
    fn a_changed_task_starts_again_at_once() {
        let now = Instant::now();
        let mut life = Life::new(now);
        life.started(7, now);
        assert_eq!(life.stop(true, now), Some(7));
        life.ended("killed by SIGTERM".into(), now);
        assert!(life.is_due(now));
    }

    #[test]
    fn a_waiting_task_stops_without_a_signal() {
        let now = Instant::now();
        let mut life = Life::new(now);
        life.start_failed("cannot run /no/such".into(), now);
        assert_eq!(life.stop(false, now), None);
        assert!(life.is_stopped());
    }

    #[test]
    fn the_last_word_on_stopping_wins() {
        let now = Instant::now();
        let mut life = Life::new(now);
        life.started(7, now);
        life.stop(true, now);
        assert_eq!(life.stop(false, now), None);
        life.ended("killed by SIGTERM".into(), now);
        assert!(life.is_stopped());
    }
}
