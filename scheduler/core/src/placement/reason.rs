//! What keeps a pod off a node.

use std::{collections::BTreeMap, fmt};

use super::{Candidate, Demand, Occupied};
use crate::{
    job::Constraint,
    node::{Node, NodePhase},
    quantity::{Cpu, Memory},
};

/// Why a pod cannot go to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It takes no pods.
    NotReady(NodePhase),
    /// A constraint is not met.
    Label {
        /// The label.
        key: String,
        /// What the group asks for.
        wanted: Constraint,
        /// What the node has.
        found: Option<String>,
    },
    /// Pods are there that the group's are never put beside.
    Apart {
        /// Whose they are: `job/group`.
        whom: String,
        /// The label of which they have a value in common.
        by: String,
        /// The value, if the node has the label.
        found: Option<String>,
        /// Whether they are of the group itself.
        own: bool,
    },
    /// Too little processor time.
    Cpu {
        /// What the pod asks for.
        needs: Cpu,
        /// What the node has left, in thousandths.
        free: u64,
        /// What the node has in all.
        has: Cpu,
    },
    /// Too little memory.
    Memory {
        /// What the pod asks for.
        needs: Memory,
        /// What the node has left.
        free: Memory,
        /// What the node has in all.
        has: Memory,
    },
    /// Too few of what the user counts.
    Countable {
        /// What they are.
        name: String,
        /// How many the pod asks for.
        needs: u32,
        /// How many the node has left.
        free: u32,
        /// How many the node has in all.
        has: u32,
    },
    /// It has as many pods as it can have.
    Full(u32),
}

/// The first thing that keeps a pod of `demand` off a node.
#[must_use]
pub fn obstacle(demand: &Demand<'_>, candidate: &Candidate<'_>) -> Option<Reason> {
    obstacles(demand, candidate).next()
}

/// Everything that keeps a pod of `demand` off a node.
pub(super) fn obstacles(demand: &Demand<'_>, candidate: &Candidate<'_>) -> impl Iterator<Item = Reason> {
    let phase = candidate.node.phase;
    let phase = (phase != NodePhase::Ready).then_some(Reason::NotReady(phase));
    let labels = all_unmet(demand.constraints, candidate.node);
    let apart = demand.occupied.iter().filter_map(|occupied| occupied.reason(candidate.node));
    let countables =
        demand.countables.0.iter().filter_map(|(name, needs)| countable(candidate, name, *needs));
    let full = candidate.usage.pods >= demand.pods_per_node_max;
    let full = full.then_some(Reason::Full(demand.pods_per_node_max));
    phase
        .into_iter()
        .chain(labels)
        .chain(apart)
        .chain(cpu(demand, candidate))
        .chain(memory(demand, candidate))
        .chain(countables)
        .chain(full)
}

/// The first constraint that a node does not meet.
#[must_use]
pub fn unmet(constraints: &BTreeMap<String, Constraint>, node: &Node) -> Option<Reason> {
    all_unmet(constraints, node).next()
}

fn all_unmet(constraints: &BTreeMap<String, Constraint>, node: &Node) -> impl Iterator<Item = Reason> {
    constraints.iter().filter(|(key, wanted)| !wanted.is_met(node.label(key))).map(|(key, wanted)| {
        let found = node.label(key).map(str::to_owned);
        Reason::Label { key: key.clone(), wanted: wanted.clone(), found }
    })
}

impl Occupied {
    fn reason(&self, node: &Node) -> Option<Reason> {
        if self.values.is_empty() {
            return None;
        }
        let found = node.label(&self.by).map(str::to_owned);
        let there = self.values.contains(&found);
        there.then(|| Reason::Apart { whom: self.whom.clone(), by: self.by.clone(), found, own: self.own })
    }
}

fn cpu(demand: &Demand<'_>, candidate: &Candidate<'_>) -> Option<Reason> {
    let (needs, has) = (demand.resources.cpu, candidate.node.capacity.cpu);
    let free = u64::from(has.0).saturating_sub(candidate.usage.cpu_millis);
    (u64::from(needs.0) > free).then_some(Reason::Cpu { needs, free, has })
}

fn memory(demand: &Demand<'_>, candidate: &Candidate<'_>) -> Option<Reason> {
    let (needs, has) = (demand.resources.memory, candidate.node.capacity.memory);
    let free = Memory(has.0.saturating_sub(candidate.usage.memory_bytes));
    (needs > free).then_some(Reason::Memory { needs, free, has })
}

fn countable(candidate: &Candidate<'_>, name: &str, needs: u32) -> Option<Reason> {
    let has = candidate.node.countables.get(name);
    let free = has.saturating_sub(candidate.usage.countables.get(name));
    (needs > free).then(|| Reason::Countable { name: name.to_owned(), needs, free, has })
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NotReady(NodePhase::Joined) => f.write_str("has not attached yet"),
            Reason::NotReady(NodePhase::Lost) => f.write_str("its lease has ended"),
            Reason::NotReady(NodePhase::CutOff) => f.write_str("is cut off"),
            Reason::NotReady(NodePhase::Dead) => f.write_str("was declared dead"),
            Reason::NotReady(phase) => write!(f, "is {phase}"),
            Reason::Label { key, wanted, found } => {
                write!(f, "needs {}, has ", wanted.of(key))?;
                match found {
                    Some(found) => write!(f, "{key}={found}"),
                    None => write!(f, "no {key}"),
                }
            }
            Reason::Apart { whom, by, found: Some(found), .. } => {
                write!(f, "{whom} is at {by}={found} already")
            }
            Reason::Apart { whom, by, found: None, .. } => {
                write!(f, "has no {by}, and {whom} is on such a node already")
            }
            Reason::Cpu { needs, free, .. } => write!(f, "needs {needs} CPU, {free}m free"),
            Reason::Memory { needs, free, .. } => write!(f, "needs {needs} memory, {} free", free.rounded()),
            Reason::Countable { name, needs, free, .. } => write!(f, "needs {needs} {name}, {free} free"),
            Reason::Full(max) => write!(f, "has {max} pods, as many as fit"),
        }
    }
}
