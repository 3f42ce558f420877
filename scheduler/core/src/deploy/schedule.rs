//! What somebody asks of a deploy: its steps, and what their gates are.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// The most steps of a deploy.
const STEPS_MAX: usize = 32;
/// The most attempts after the first.
const RETRIES_MAX: u32 = 20;
/// The longest of its times.
const TIME_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Waits between attempts double up to this.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);

/// The steps of a deploy and their gates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// What it is called.
    pub strategy: Strategy,
    /// One after the other.
    pub steps: Vec<Step>,
    /// How long the new pods have to run without a failure before a step is passed.
    pub healthy_for_ms: u64,
    /// How long a step may take until they all run.
    pub timeout_ms: u64,
    /// How often steps that fail are tried again, all together.
    pub retries: u32,
    /// How long after the first failure; twice that after each further one, an hour at most.
    pub retry_after_ms: u64,
    /// What happens then.
    pub on_failure: OnFailure,
    /// Pods are given the next version's tasks where they are, and none is made beside them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_place: bool,
}

/// How a deploy goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Some pods after the others.
    Rolling,
    /// A few, which are watched for longer; then all.
    Canary,
    /// All of them beside the others, then all connections at once.
    BlueGreen,
    /// All of them in one step.
    AllAtOnce,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// How many of the pods are of the next version, in hundredths.
    pub percent: u32,
    /// What they are beside the others.
    pub form: Form,
    /// What has to be before the next step.
    pub pause: Pause,
}

/// How the pods of two versions share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Each of them serves.
    Split,
    /// Those of the next stand by.
    Standby,
    /// Those of the previous stand by.
    Switched,
}

/// What has to be before the next step, besides pods that do well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pause {
    /// Nothing.
    None,
    /// They do well for this long, in milliseconds.
    For(u64),
    /// Somebody says so.
    Hold,
}

/// What happens when a step has failed too often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// The previous version comes back, and the deploy has given up.
    Rollback,
    /// Nothing, until somebody says what.
    Hold,
}

/// What is wrong with a schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// No step.
    #[error("steps: at least one is needed")]
    NoSteps,
    /// More than fit.
    #[error("steps: {0} are more than {STEPS_MAX}")]
    TooManySteps(usize),
    /// The percentages do not grow to 100.
    #[error("steps: percentages grow from step to step, from 1 to 100, and {0} does not")]
    Order(u32),
    /// The last step is not all.
    #[error("steps: the last one is 100")]
    NotAll,
    /// Pods of both versions, and none may be beside the others.
    #[error("in-place: {0} has all pods of the next version stand by beside the others")]
    InPlace(Strategy),
    /// Too long.
    #[error("{field}: at most 30 days")]
    TooLong {
        /// Which of its times.
        field: &'static str,
    },
    /// Too short.
    #[error("{field}: it has to be more than nothing")]
    Zero {
        /// Which of its times.
        field: &'static str,
    },
    /// Too often.
    #[error("retries: {0} are more than {RETRIES_MAX}")]
    Retries(u32),
}

impl Schedule {
    /// The usual steps of a strategy. `pause` is the time that a canary, or the new pods of a switch, are watched for.
    #[must_use]
    pub fn steps_of(strategy: Strategy, pause: Pause) -> Vec<Step> {
        let split = |percent, pause| Step { percent, form: Form::Split, pause };
        match strategy {
            Strategy::Rolling => [20, 40, 60, 80]
                .map(|percent| split(percent, pause))
                .into_iter()
                .chain([split(100, Pause::None)])
                .collect(),
            Strategy::Canary => vec![split(10, pause), split(100, Pause::None)],
            Strategy::BlueGreen => vec![
                Step { percent: 100, form: Form::Standby, pause: Pause::None },
                Step { percent: 100, form: Form::Switched, pause },
                split(100, Pause::None),
            ],
            Strategy::AllAtOnce => vec![split(100, Pause::None)],
        }
    }

    /// Checks bounds.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), ScheduleError> {
        self.check_steps()?;
        if self.in_place && self.steps.iter().any(|step| step.form != Form::Split) {
            return Err(ScheduleError::InPlace(self.strategy));
        }
        if self.retries > RETRIES_MAX {
            return Err(ScheduleError::Retries(self.retries));
        }
        let pauses = self.steps.iter().map(|step| match step.pause {
            Pause::For(ms) => ("steps", ms),
            Pause::None | Pause::Hold => ("steps", 0),
        });
        let times = [
            ("healthy-for", self.healthy_for_ms),
            ("timeout", self.timeout_ms),
            ("retry-after", self.retry_after_ms),
        ];
        for (field, ms) in times.into_iter().chain(pauses) {
            if Duration::from_millis(ms) > TIME_MAX {
                return Err(ScheduleError::TooLong { field });
            }
        }
        if self.timeout_ms == 0 { Err(ScheduleError::Zero { field: "timeout" }) } else { Ok(()) }
    }

    fn check_steps(&self) -> Result<(), ScheduleError> {
        if self.steps.len() > STEPS_MAX {
            return Err(ScheduleError::TooManySteps(self.steps.len()));
        }
        let last = self.steps.last().ok_or(ScheduleError::NoSteps)?;
        let mut before = 0;
        for step in self.steps.iter().filter(|step| step.form == Form::Split) {
            if step.percent <= before || step.percent > 100 {
                return Err(ScheduleError::Order(step.percent));
            }
            before = step.percent;
        }
        if last.percent == 100 && last.form == Form::Split { Ok(()) } else { Err(ScheduleError::NotAll) }
    }

    /// How long it waits after so many failures of a step.
    #[must_use]
    pub fn wait(&self, failures: u32) -> Duration {
        let doubled = Duration::from_millis(self.retry_after_ms)
            .saturating_mul(1 << failures.saturating_sub(1).min(RETRIES_MAX));
        doubled.min(RETRY_AFTER_MAX)
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Strategy::Rolling => "rolling",
            Strategy::Canary => "canary",
            Strategy::BlueGreen => "blue-green",
            Strategy::AllAtOnce => "all-at-once",
        })
    }
}
