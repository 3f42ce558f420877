//! What is told of a walk: each step with its times, its last error and what it waits for, and the longest chain.
//!
//! Times are ages and lengths, in milliseconds: no two machines have to agree on a clock.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    graph::Node,
    run::{Outcome, Run, State},
};

/// Errors are cut to this length.
pub const ERROR_BYTES_MAX: usize = 512;

/// How far a step is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It waits for others.
    #[default]
    Waiting,
    /// It is under way.
    Running,
    /// It is done.
    Done,
    /// Its last attempt failed, and another follows.
    Retrying,
    /// It has failed for good.
    Failed,
    /// Something that it needs has failed for good.
    Blocked,
    /// It is being undone.
    Stopping,
    /// Nothing of it is left, or it never was.
    Gone,
}

/// One step as it is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepStatus {
    /// Its name.
    pub name: String,
    /// Who does it.
    pub owner: String,
    /// How far it is.
    pub phase: Phase,
    /// Whether the others go on without it.
    #[serde(default)]
    pub optional: bool,
    /// When its first attempt began, in milliseconds after the pod's first step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_ms: Option<u64>,
    /// How long it took, or has taken until now, with all its attempts and the waits between them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub took_ms: Option<u64>,
    /// How long ago it came to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms_ago: Option<u64>,
    /// In how many milliseconds it is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_in_ms: Option<u64>,
    /// How often it was begun since it was not there, or since somebody asked for it again.
    #[serde(default)]
    pub attempts: u32,
    /// Why the last attempt that failed did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What it comes after, directly.
    #[serde(default)]
    pub follows: Vec<String>,
    /// What of that it still waits for.
    #[serde(default)]
    pub waits_for: Vec<String>,
    /// The last lines of what its program said, for a step that is one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
}

impl Run {
    /// Every step, each after all that it waits for.
    #[must_use]
    pub fn status(&self, now: Duration) -> Vec<StepStatus> {
        let outcomes = self.outcomes();
        (0..self.steps.len()).map(|index| self.step_status(index, &outcomes, now)).collect()
    }

    fn step_status(&self, index: usize, outcomes: &[Outcome], now: Duration) -> StepStatus {
        let (node, step) = (&self.graph.nodes()[index], &self.steps[index]);
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let since = self.since.unwrap_or_default();
        // Waits between attempts are a part of it.
        let end = step.ended.filter(|_| step.retry_at.is_none()).unwrap_or(now);
        StepStatus {
            name: node.step.name.clone(),
            owner: node.step.owner.to_string(),
            phase: self.phase(index, outcomes),
            optional: node.step.optional || step.late,
            at_ms: step.first.map(|first| ms(first.saturating_sub(since))),
            took_ms: step.first.map(|first| ms(end.saturating_sub(first))),
            ended_ms_ago: step.ended.map(|ended| ms(now.saturating_sub(ended))),
            retry_in_ms: step.retry_at.map(|at| ms(at.saturating_sub(now))),
            attempts: step.attempts,
            error: step.error.clone(),
            follows: self.names(node.needs.iter().chain(&node.after)),
            waits_for: self.waits_for_now(index, outcomes),
            output: String::new(),
        }
    }

    fn phase(&self, index: usize, outcomes: &[Outcome]) -> Phase {
        let step = &self.steps[index];
        match step.state {
            State::Idle if !step.wanted => Phase::Gone,
            State::Idle if matches!(outcomes[index], Outcome::Barred | Outcome::Skipped) => Phase::Blocked,
            State::Idle => Phase::Waiting,
            State::Starting => Phase::Running,
            State::Done => Phase::Done,
            State::Failed if step.is_failed_for_good() => Phase::Failed,
            State::Failed => Phase::Retrying,
            State::Stopping => Phase::Stopping,
        }
    }

    fn waits_for_now(&self, index: usize, outcomes: &[Outcome]) -> Vec<String> {
        let (node, step): (&Node, _) = (&self.graph.nodes()[index], &self.steps[index]);
        if !step.wanted {
            let left = |later: &&usize| self.steps[**later].touched;
            return if step.touched { self.names(node.then.iter().filter(left)) } else { Vec::new() };
        }
        if !matches!(step.state, State::Idle | State::Failed) {
            return Vec::new();
        }
        let needs =
            node.needs.iter().filter(|need| matches!(outcomes[**need], Outcome::Open | Outcome::Barred));
        self.names(needs.chain(node.after.iter().filter(|earlier| outcomes[**earlier] == Outcome::Open)))
    }

    fn names<'a>(&self, indexes: impl Iterator<Item = &'a usize>) -> Vec<String> {
        indexes.map(|index| self.graph.nodes()[*index].step.name.clone()).collect()
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Waiting => "waiting",
            Phase::Running => "running",
            Phase::Done => "done",
            Phase::Retrying => "retrying",
            Phase::Failed => "failed",
            Phase::Blocked => "blocked",
            Phase::Stopping => "stopping",
            Phase::Gone => "gone",
        })
    }
}

/// The chain of steps that a step had to wait for the longest, as `systemd-analyze critical-chain` draws it: after
/// each step's name when it began and how long it took. The longest of them is marked.
#[derive(Clone, Debug)]
pub struct Chain<'a>(Vec<&'a StepStatus>);

impl<'a> Chain<'a> {
    /// The chain that ends with `target`, the last first.
    #[must_use]
    pub fn to(target: &str, steps: &'a [StepStatus]) -> Chain<'a> {
        let find = |name: &str| steps.iter().find(|step| step.name == name);
        let mut chain: Vec<&StepStatus> = Vec::new();
        let mut next = find(target);
        while let Some(step) = next.filter(|_| chain.len() < steps.len()) {
            chain.push(step);
            next = step.follows.iter().filter_map(|name| find(name)).max_by_key(|step| step.hold());
        }
        Chain(chain)
    }

    /// The step of the chain that took the longest.
    #[must_use]
    pub fn long_pole(&self) -> Option<&'a StepStatus> {
        self.0.iter().copied().filter(|step| step.took_ms > Some(0)).max_by_key(|step| step.took_ms)
    }
}

impl StepStatus {
    /// How much a step holds up those that follow it: what is not done the most, then what ended last.
    fn hold(&self) -> (bool, bool, u64) {
        let over = matches!(self.phase, Phase::Done | Phase::Gone) || (self.optional && self.is_over());
        let open = !over;
        let end = self.at_ms.unwrap_or(0).saturating_add(self.took_ms.unwrap_or(0));
        (open, open && self.at_ms.is_some(), end)
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Failed | Phase::Blocked)
    }
}

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pole = self.long_pole().map(|step| &step.name);
        for (depth, step) in self.0.iter().enumerate() {
            if depth > 0 {
                write!(f, "{}└─", "  ".repeat(depth - 1))?;
            }
            write!(f, "{}", step.name)?;
            if let Some(at) = step.at_ms {
                write!(f, " @{}", time(at))?;
            }
            if let Some(took) = step.took_ms.filter(|took| *took > 0) {
                write!(f, " +{}", time(took))?;
            }
            if step.phase != Phase::Done {
                write!(f, " {}", step.phase)?;
            }
            if Some(&step.name) == pole {
                write!(f, "  <- the long pole")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// `340ms`, `12.3s`, `4min 5s`.
#[must_use]
pub fn time(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms}ms"),
        1_000..60_000 => format!("{}.{}s", ms / 1_000, ms % 1_000 / 100),
        60_000..3_600_000 => format!("{}min {}s", ms / 60_000, ms % 60_000 / 1_000),
        _ => format!("{}h {}min", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}

/// Cut to [`ERROR_BYTES_MAX`], at a character.
pub(crate) fn bounded(text: &str) -> String {
    text[..text.floor_char_boundary(ERROR_BYTES_MAX)].to_owned()
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn step(name: &str, phase: Phase, at_ms: u64, took_ms: u64, follows: &[&str]) -> StepStatus {
        StepStatus {
            name: name.to_owned(),
            phase,
            at_ms: Some(at_ms),
            took_ms: Some(took_ms),
            follows: follows.iter().map(|name| (*name).to_owned()).collect(),
            ..StepStatus::default()
        }
    }

    #[test]
    fn the_chain_follows_what_ended_last() {
        let steps = [
            step("link", Phase::Done, 0, 40, &[]),
            step("folders", Phase::Done, 0, 2, &[]),
            step("migrate", Phase::Done, 40, 61_000, &["link"]),
            step("tasks", Phase::Done, 61_040, 1_200, &["folders", "migrate"]),
            step("running", Phase::Done, 62_240, 0, &["tasks"]),
        ];
        expect![[r#"
            running @1min 2s
            └─tasks @1min 1s +1.2s
              └─migrate @40ms +1min 1s  <- the long pole
                └─link @0ms +40ms
        "#]]
        .assert_eq(&Chain::to("running", &steps).to_string());
    }

    #[test]
    fn what_is_not_done_holds_up_more_than_what_is() {
        let steps = [
            step("link", Phase::Done, 0, 90_000, &[]),
            step("migrate", Phase::Retrying, 10, 20, &[]),
            step("maybe", Phase::Failed, 10, 99, &[]),
            StepStatus {
                at_ms: None,
                took_ms: None,
                ..step("tasks", Phase::Waiting, 0, 0, &["link", "migrate"])
            },
        ];
        expect![[r#"
            tasks waiting
            └─migrate @10ms +20ms retrying  <- the long pole
        "#]]
        .assert_eq(&Chain::to("tasks", &steps).to_string());
    }

    #[test]
    fn times_are_read_at_a_glance() {
        assert_eq!(
            [0, 999, 1_000, 59_999, 61_000, 3_660_000].map(time),
            ["0ms", "999ms", "1.0s", "59.9s", "1min 1s", "1h 1min"]
        );
    }

    #[test]
    fn a_status_reads_back_and_an_older_one_does_too() {
        let one = step("a", Phase::Blocked, 1, 2, &["b"]);
        assert_eq!(serde_json::from_str::<StepStatus>(&serde_json::to_string(&one).unwrap()).unwrap(), one);
        let old: StepStatus = serde_json::from_str(r#"{"name":"a","owner":"node","phase":"done"}"#).unwrap();
        assert_eq!(old.phase, Phase::Done);
    }

    #[test]
    fn errors_are_cut_at_a_character() {
        assert_eq!(bounded(&"é".repeat(400)).len(), ERROR_BYTES_MAX);
        assert_eq!(bounded("short"), "short");
    }
}
