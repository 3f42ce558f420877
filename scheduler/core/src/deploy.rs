//! A deploy: goes from one version of a job to the next by the steps of a rollout, each behind a gate.
//!
//! The record is what was asked for and how far it is; the job's text in force follows from it. [`Deploys`] says when it
//! goes on, [`health`] whether the new pods do well. Both are functions of the state and of time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

pub use self::{
    driver::{Deploys, Outlook},
    schedule::{Form, OnFailure, Pause, Schedule, ScheduleError, Step, Strategy},
};
use crate::{change::JobRecord, job::Job, pod::PodId, rollout::Rollout, state::Map, time::WallTime};

mod driver;
pub mod health;
mod schedule;

/// How many deploys of one job that gave up may wait until somebody has looked; a job that has them gets no other.
pub const GAVE_UP_MAX: usize = 16;

/// The job and the version that is gone to, `shop@4`: never another deploy's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeployId {
    /// The job.
    pub job: String,
    /// The version that is gone to.
    pub version: u32,
}

/// A deploy as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deploy {
    /// Its name.
    pub id: DeployId,
    /// The version that is left.
    pub previous: u32,
    /// The text that is in force once it is done.
    pub text: Arc<Job>,
    /// The groups whose pods are of two versions meanwhile.
    pub groups: BTreeSet<String>,
    /// What was asked for.
    pub schedule: Schedule,
    /// Which step of the schedule it is at, from 0.
    pub step: usize,
    /// How it is with that.
    pub stage: Stage,
    /// The new pods of the step have shown that they do well, and others have stopped for them.
    #[serde(default)]
    pub proven: bool,
    /// How often the stage has changed: what was decided for another is late.
    pub moves: u64,
    /// How often a step has failed since somebody began or resumed it.
    pub failures: u32,
    /// How often pods of the next version had failed when the stage began, of those that had.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub faults: BTreeMap<PodId, u32>,
    /// Why it is as it is, in words; empty while all is well.
    pub reason: String,
    /// The last lines of what has failed, if it wrote any.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
    /// Somebody wanted it to end.
    #[serde(default)]
    pub aborted: bool,
    /// Who began it.
    pub changer: String,
    /// When.
    pub begun: WallTime,
    /// When it came to an end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<WallTime>,
}

/// How it is with a deploy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The pods of the step are made beside the others, which stay until those do well.
    Growing,
    /// The others stop, and those of the step go on doing well.
    Watching,
    /// They do well, and somebody has to say that it goes on.
    Held,
    /// The step has failed and is left; it is tried again after a while.
    Waiting,
    /// The step has failed too often, and somebody has to say what is to be.
    Stuck,
    /// The pods of the previous version take the place of the new ones.
    GoingBack,
    /// The end: every pod is of the next version.
    Promoted,
    /// The end: every pod is of the previous version, because somebody wanted it.
    Aborted,
    /// The end: every pod is of the previous version, because the next one failed.
    GaveUp,
}

/// What the driver decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Move {
    /// The gate of the step is passed.
    Passed,
    /// It is not, and why.
    Failed(Fault),
    /// The wait before the next attempt is over.
    TryAgain,
    /// No pod of the next version is left.
    Back,
}

/// Why the gate of a step is not passed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// In words.
    pub why: String,
    /// The last lines of what has failed, if it wrote any.
    pub output: String,
}

/// What somebody wants of a deploy that is under way or over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// It goes on from where it is held, stuck, or waits.
    Resume,
    /// It goes back.
    Abort {
        /// At once: pods of the next version are given the tasks of the previous one where they are.
        now: bool,
    },
    /// Somebody has seen how it ended: it may be forgotten.
    Acknowledge,
}

/// Why a deploy is not begun, or an order not followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeployError {
    /// Something is wrong with what was asked for.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// There is nothing to go from.
    #[error("there is no job `{0}` to go from: `netctl apply` makes its first version")]
    FirstVersion(String),
    /// The job's text belongs to a deploy.
    #[error(
        "job `{job}` is being deployed: its text is that of deploy {id} of {owner} until it ends; \
         `netctl deploys` shows how far it is, `netctl deploy abort {job}` goes back"
    )]
    Busy {
        /// The job.
        job: String,
        /// The deploy.
        id: DeployId,
        /// Who began it.
        owner: String,
    },
    /// The text is in force already.
    #[error("job `{job}` is already so: version {version} has this text")]
    Unchanged {
        /// The job.
        job: String,
        /// The version in force.
        version: u32,
    },
    /// No pod would be replaced.
    #[error(
        "no group that is there has other tasks, resources, constraints or hooks in this text, so that there is nothing to watch: \
         `netctl apply` does it"
    )]
    NothingToWatch,
    /// Somebody's own rollout.
    #[error("groups.{0}.rollout: a deploy makes its own; take the line away")]
    RolloutInText(String),
    /// The same, in force.
    #[error(
        "groups.{0}.rollout is in force in job `{1}`: bring it to an end first, with `netctl apply` of a text without it"
    )]
    RolloutInForce(String, String),
    /// Of a singleton there are never two.
    #[error("group `{0}` is a singleton, of which there are never two: --in-place restarts it where it is")]
    Singleton(String),
    /// Too many that nobody has looked at.
    #[error(
        "{GAVE_UP_MAX} deploys of job `{0}` gave up and nobody has looked: see `netctl deploys`, then `netctl deploy ack {0}`"
    )]
    TooManyKept(String),
    /// There is none of this name.
    #[error("there is no deploy `{0}`; `netctl deploys` lists them")]
    NoDeploy(String),
    /// It is over.
    #[error("deploy {0} has ended: it {1}")]
    Ended(DeployId, Stage),
    /// There is nothing to go on from.
    #[error("deploy {0} {1}: there is nothing to resume")]
    NotHeld(DeployId, Stage),
    /// It does what is wanted.
    #[error(
        "deploy {0} is going back already; --now gives its pods the previous tasks where they are, without waiting for others"
    )]
    GoingBack(DeployId),
    /// It is not over.
    #[error("deploy {0} {1}: it can be acknowledged once it has ended")]
    UnderWay(DeployId, Stage),
}

impl Deploy {
    /// The job's text in force at this stage; `before` is that of the previous version.
    ///
    /// Groups that the new text leaves out stay as they are until the end.
    #[must_use]
    pub fn text_in_force(&self, before: &Job) -> Job {
        let mut text = Job::clone(&self.text);
        for (name, group) in &before.groups {
            text.groups.entry(name.clone()).or_insert_with(|| group.clone());
        }
        let rollout = self.rollout();
        for name in &self.groups {
            if let Some(group) = text.groups.get_mut(name) {
                group.rollout = Some(rollout);
            }
        }
        text
    }

    /// What is in force of its two versions: at the last good step while it waits, nothing of the next when it goes back.
    fn rollout(&self) -> Rollout {
        let (previous, next) = (self.previous, self.id.version);
        let steps = &self.schedule.steps;
        let step = match self.stage {
            Stage::Waiting => self.step.checked_sub(1).and_then(|step| steps.get(step)),
            Stage::GoingBack => None,
            _ => steps.get(self.step),
        };
        let rollout =
            |percent| Rollout { in_place: self.schedule.in_place, ..Rollout::new(previous, next, percent) };
        let Some(step) = step else { return rollout(0) };
        let rollout = rollout(step.percent);
        match step.form {
            Form::Split if !self.proven && self.stage != Stage::Waiting => {
                let before = self.step.checked_sub(1).and_then(|step| steps.get(step));
                let percent_previous = Some(100 - before.map_or(0, |before| before.percent));
                Rollout { percent_previous, ..rollout }
            }
            Form::Split => rollout,
            Form::Standby => Rollout { standby: true, ..rollout },
            Form::Switched => Rollout { previous: next, next: previous, standby: true, ..rollout },
        }
    }

    /// The stage in which a step begins: it grows first, unless its pods are there already, stand by, or never are more.
    #[must_use]
    pub fn first_stage(&self, step: usize) -> Stage {
        let form = |step: usize| self.schedule.steps.get(step).map(|step| step.form);
        let after_switch = step.checked_sub(1).and_then(form) == Some(Form::Switched);
        let grows = form(step) == Some(Form::Split) && !after_switch && !self.schedule.in_place;
        if grows { Stage::Growing } else { Stage::Watching }
    }

    /// How long its pods have to do well in this stage.
    #[must_use]
    pub fn healthy_for(&self) -> Duration {
        let pause = match self.schedule.steps.get(self.step).map(|step| step.pause) {
            Some(Pause::For(ms)) => ms,
            _ => 0,
        };
        let gate = self.schedule.healthy_for_ms;
        Duration::from_millis(match (self.stage, self.first_stage(self.step)) {
            (Stage::Growing, _) => gate,
            (_, Stage::Growing) => pause,
            _ => pause.max(gate),
        })
    }

    /// Groups whose tasks or place would be others by this text.
    #[must_use]
    pub fn groups_between(before: &Job, after: &Job) -> BTreeSet<String> {
        let both = after.groups.iter().filter_map(|(name, new)| Some((name, before.group(name)?, new)));
        let changed = both.filter(|(_, old, new)| {
            old.tasks != new.tasks
                || old.resources != new.resources
                || old.constraints != new.constraints
                || old.hooks != new.hooks
        });
        changed.map(|(name, ..)| name.clone()).collect()
    }

    /// The text of the version that is left, which is kept as long as the deploy goes on.
    #[must_use]
    pub fn before<'a>(&self, record: &'a JobRecord) -> Option<&'a Arc<Job>> {
        record.versions.get(&self.previous)
    }
}

impl Stage {
    /// Whether it is over.
    #[must_use]
    pub fn is_end(self) -> bool {
        matches!(self, Stage::Promoted | Stage::Aborted | Stage::GaveUp)
    }
}

/// The deploys of a job, the oldest first.
pub fn of_job<'a>(
    deploys: &'a Map<DeployId, Arc<Deploy>>,
    job: &str,
) -> impl Iterator<Item = &'a Arc<Deploy>> {
    let id = |version| DeployId { job: job.to_owned(), version };
    deploys.range(id(0)..=id(u32::MAX)).map(|(_, deploy)| deploy)
}

impl fmt::Display for DeployId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.job, self.version)
    }
}

/// Why a text does not name a deploy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` does not name a deploy: write JOB@VERSION, such as shop@4")]
pub struct DeployIdError(String);

impl FromStr for DeployId {
    type Err = DeployIdError;

    fn from_str(text: &str) -> Result<DeployId, DeployIdError> {
        let wrong = || DeployIdError(text.to_owned());
        let (job, version) = text.split_once('@').ok_or_else(wrong)?;
        let version = version.parse().map_err(|_| wrong())?;
        Ok(DeployId { job: job.to_owned(), version })
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Growing | Stage::Watching => "is under way",
            Stage::Held => "is held",
            Stage::Waiting => "waits before it tries again",
            Stage::Stuck => "is stuck",
            Stage::GoingBack => "goes back",
            Stage::Promoted => "was promoted",
            Stage::Aborted => "was aborted",
            Stage::GaveUp => "gave up",
        })
    }
}
