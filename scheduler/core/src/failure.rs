//! Where pods of a group have failed lately: such nodes come later when a place is chosen.
//!
//! Each failure weighs one pod when it is reported and half of that after every [`HALF_LIFE`]. Wall time is good
//! enough for it: it only orders nodes that fit, and decides nothing else.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use crate::time::WallTime;

/// In this time a failure loses half of its weight.
pub const HALF_LIFE: Duration = Duration::from_secs(600);

/// The most nodes that are remembered for a group; beyond it the one that weighs least is forgotten.
pub const NODES_MAX: usize = 64;

/// The most that a node weighs: it is used again after about an hour without failures.
pub const WEIGHT_MAX: u32 = 64 * ONE;

/// The weight of one failure that was reported just now.
const ONE: u32 = 1_000;

/// Where pods of one group have failed, by node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Failures(BTreeMap<String, Failed>);

/// How much the failures on one node weighed, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Failed {
    /// Thousandths of a pod.
    weight: u32,
    at: WallTime,
}

impl Failures {
    /// A pod of the group has failed on `node`.
    pub fn note(&mut self, node: &str, now: WallTime) {
        let weight = self.weight(node, now).saturating_add(ONE).min(WEIGHT_MAX);
        self.0.retain(|_, failed| failed.decayed(now) > 0);
        self.0.insert(node.to_owned(), Failed { weight, at: now });
        if self.0.len() > NODES_MAX {
            let least = self.0.iter().min_by_key(|(_, failed)| failed.decayed(now));
            let least = least.map(|(node, _)| node.clone());
            least.and_then(|node| self.0.remove(&node));
        }
    }

    /// How many pods the failures on `node` weigh by now, rounded to the nearest.
    #[must_use]
    pub fn pods(&self, node: &str, now: WallTime) -> u32 {
        (self.weight(node, now) + ONE / 2) / ONE
    }

    /// The nodes that still weigh something.
    pub fn nodes(&self, now: WallTime) -> impl Iterator<Item = &String> {
        self.0.iter().filter(move |(_, failed)| failed.decayed(now) > 0).map(|(node, _)| node)
    }

    fn weight(&self, node: &str, now: WallTime) -> u32 {
        self.0.get(node).map_or(0, |failed| failed.decayed(now))
    }
}

impl Failed {
    /// Half for each whole half-life, and a straight line between two of them. A clock that was set back
    /// lets nothing decay until it has caught up.
    fn decayed(self, now: WallTime) -> u32 {
        let half_life = HALF_LIFE.as_millis() as u64;
        let elapsed = now.0.saturating_sub(self.at.0);
        let halved =
            u32::try_from(elapsed / half_life).ok().and_then(|halves| self.weight.checked_shr(halves));
        let halved = u64::from(halved.unwrap_or(0));
        let rest = halved * (elapsed % half_life) / (2 * half_life);
        u32::try_from(halved - rest).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_weighs_half_after_each_half_life() {
        let mut failures = Failures::default();
        (0..4).for_each(|_| failures.note("n1", minutes(0)));
        let weights = [0, 10, 15, 20, 30, 40, 300].map(|at| failures.pods("n1", minutes(at)));
        assert_eq!(weights, [4, 2, 2, 1, 1, 0, 0]);
        assert_eq!((failures.pods("n2", minutes(0)), failures.nodes(minutes(300)).count()), (0, 0));
    }

    #[test]
    fn a_clock_that_was_set_back_harms_nothing() {
        let mut failures = Failures::default();
        failures.note("n1", minutes(100));
        assert_eq!(failures.pods("n1", minutes(0)), 1);
    }

    #[test]
    fn the_nodes_that_weigh_least_are_forgotten_first() {
        let mut failures = Failures::default();
        (0..NODES_MAX as u64 + 8).for_each(|node| failures.note(&format!("n{node}"), minutes(node)));
        assert_eq!(failures.0.len(), NODES_MAX);
        assert!(!failures.0.contains_key("n0") && failures.0.contains_key("n71"));
    }

    #[test]
    fn one_node_weighs_no_more_than_the_bound() {
        let mut failures = Failures::default();
        (0..100).for_each(|_| failures.note("n1", minutes(0)));
        assert_eq!(failures.pods("n1", minutes(0)), 64);
    }

    fn minutes(minutes: u64) -> WallTime {
        WallTime(minutes * 60_000)
    }
}
