//! Which nodes a group's pods go to, and for those that go nowhere, why not, node by node.
//!
//! Pure functions of a snapshot: [`survey`] reads it from a [`State`](crate::state::State), [`place`] chooses and
//! [`explain`] says why not. There is no chance in it: the same snapshot gives the same answer. The pods of one
//! demand are alike, and the state keeps its nodes in the order in which they are wanted, so that few nodes are looked
//! at: those where the group has pods or has failed, and of the others one at a time.

use std::collections::{BTreeMap, BTreeSet};

pub use self::{
    board::{Pool, Pools},
    reason::{Reason, obstacle, unmet},
    survey::{Survey, survey},
    why::{Explanation, Fix, REASONS_SHOWN_MAX, Verdict, explain, why_not},
};
use board::Board;

use crate::{
    countable::Countables,
    job::{Constraint, Spread},
    node::Node,
    quantity::Resources,
    state::Usage,
};

mod board;
mod reason;
mod survey;
mod why;

/// Pods of one group, all alike.
#[derive(Clone, Debug)]
pub struct Demand<'a> {
    /// What each asks for.
    pub resources: Resources,
    /// What each takes of what nodes have a number of.
    pub countables: Countables,
    /// What is asked of a node's labels.
    pub constraints: &'a BTreeMap<String, Constraint>,
    /// How they are laid over the nodes.
    pub spread: &'a Spread,
    /// What they are never put beside.
    pub occupied: Vec<Occupied>,
    /// How many are to be placed.
    pub count: usize,
    /// How many pods any node may hold.
    pub pods_per_node_max: u32,
}

/// Values of a label at which pods of the demand may not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Occupied {
    /// Whose pods are there: `job/group`.
    pub whom: String,
    /// The label.
    pub by: String,
    /// Its values; `None` is every node without the label.
    pub values: BTreeSet<Option<String>>,
    /// Pods of the demand itself occupy the values of their nodes, too.
    pub own: bool,
}

/// A node that pods might go to.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// The node.
    pub node: &'a Node,
    /// What is asked of it already.
    pub usage: Usage,
    /// How many pods of the demand's group it has.
    pub group_pods: u32,
    /// How many pods the group's late failures on it weigh.
    pub failures: u32,
}

/// Chooses a node for each pod of `demand` that fits somewhere, one pod after the other: of the pools that have a node
/// with room one with the fewest pods, and there the best by its spread (where pods of the group failed lately, each
/// failure counts as one more pod), then the least used or, to pack, the most used, then by name.
#[must_use]
pub fn place(demand: &Demand<'_>, pools: Pools<'_>) -> Vec<String> {
    let mut board = Board::new(demand.clone(), pools);
    let mut nodes = Vec::new();
    while nodes.len() < demand.count
        && let Some(node) = board.next()
    {
        nodes.push(node);
    }
    nodes
}

impl Candidate<'_> {
    /// One more pod of the demand is there.
    fn take(&mut self, demand: &Demand<'_>) {
        self.usage.cpu_millis += u64::from(demand.resources.cpu.0);
        self.usage.memory_bytes = self.usage.memory_bytes.saturating_add(demand.resources.memory.0);
        self.usage.countables.add(&demand.countables);
        self.usage.pods += 1;
        self.group_pods += 1;
    }
}

#[cfg(test)]
mod tests;
