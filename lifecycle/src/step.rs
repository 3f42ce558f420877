//! One named unit of a lifecycle: who does it, what it waits for, how long it may take, how often it is tried.

use std::{fmt, time::Duration};

/// Who does a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// The control plane.
    Server,
    /// The agent of the pod's node.
    Node,
    /// A program that the job's author added.
    Job,
    /// A program that the node's operator added.
    Operator,
}

/// How often and after which waits a step is tried again. The wait doubles with each failure in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Attempts until it has failed for good; none: it is tried for ever.
    pub attempts_max: Option<u32>,
    /// The wait after the first failure.
    pub first: Duration,
    /// The longest wait.
    pub max: Duration,
}

/// One step as it is registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its name, the only one of the graph.
    pub name: String,
    /// What it does, in words.
    pub what: String,
    /// Who does it.
    pub owner: Owner,
    /// Steps that must have come to an end, whichever, before it begins: order alone.
    pub after: Vec<String>,
    /// Steps that must be done before it begins: it is blocked when one has failed for good and is not optional.
    pub requires: Vec<String>,
    /// Steps that wait for this one, and need it unless it is optional. A target stands for all that belongs to it.
    pub before: Vec<String>,
    /// The target that it belongs to: reached when everything that belongs to it is done.
    pub part_of: Option<String>,
    /// A point that is reached without doing anything.
    pub is_target: bool,
    /// How long one attempt may take.
    pub deadline: Option<Duration>,
    /// What follows a failure.
    pub retry: Retry,
    /// Whether the others go on when it has failed for good.
    pub optional: bool,
    /// Whether there is something to do on the way down, too.
    pub undo: bool,
}

impl Retry {
    /// For ever.
    pub const ALWAYS: Retry =
        Retry { attempts_max: None, first: Duration::from_millis(250), max: Duration::from_secs(30) };

    /// The wait after this many failures in a row.
    #[must_use]
    pub fn wait(&self, failures: u32) -> Duration {
        self.first.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(self.max)
    }
}

impl Step {
    /// A step that waits for nothing, is needed, and is tried for ever.
    #[must_use]
    pub fn new(name: &str, owner: Owner, what: &str) -> Step {
        Step {
            name: name.to_owned(),
            what: what.to_owned(),
            owner,
            after: Vec::new(),
            requires: Vec::new(),
            before: Vec::new(),
            part_of: None,
            is_target: false,
            deadline: None,
            retry: Retry::ALWAYS,
            optional: false,
            undo: false,
        }
    }

    /// A point that is reached when all that it requires, and all that belongs to it, is done.
    #[must_use]
    pub fn target(name: &str, owner: Owner, what: &str) -> Step {
        Step { is_target: true, ..Step::new(name, owner, what) }
    }

    /// The same step with one more that it requires.
    #[must_use]
    pub fn requires(mut self, name: &str) -> Step {
        self.requires.push(name.to_owned());
        self
    }

    /// The same step with one more that it comes after.
    #[must_use]
    pub fn after(mut self, name: &str) -> Step {
        self.after.push(name.to_owned());
        self
    }

    /// The same step with one more that it comes before.
    #[must_use]
    pub fn before(mut self, name: &str) -> Step {
        self.before.push(name.to_owned());
        self
    }

    /// The same step as a part of `target`.
    #[must_use]
    pub fn part_of(self, target: &str) -> Step {
        Step { part_of: Some(target.to_owned()), ..self }
    }

    /// The same step, without which the others go on.
    #[must_use]
    pub fn optional(self) -> Step {
        Step { optional: true, ..self }
    }

    /// The same step with something to do on the way down.
    #[must_use]
    pub fn undo(self) -> Step {
        Step { undo: true, ..self }
    }

    /// The same step with a bound on the time of one attempt.
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> Step {
        Step { deadline: Some(deadline), ..self }
    }

    /// The same step with so many attempts.
    #[must_use]
    pub fn attempts(self, max: u32) -> Step {
        Step { retry: Retry { attempts_max: Some(max.max(1)), ..self.retry }, ..self }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Owner::Server => "server",
            Owner::Node => "node",
            Owner::Job => "job",
            Owner::Operator => "operator",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_their_bound() {
        let waits: Vec<u128> = (1..10).map(|failures| Retry::ALWAYS.wait(failures).as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(Retry::ALWAYS.wait(u32::MAX), Retry::ALWAYS.max);
    }
}
