//! Which nodes a group's pods go to, and for those that go nowhere, why not, node by node.
//!
//! Pure functions of a snapshot: [`survey`] reads it from a [`State`](crate::state::State), [`place`] chooses and
//! [`explain`] says why not. There is no chance in it: the same snapshot gives the same answer. The pods of one
//! demand are alike, so that `k` pods over `n` nodes cost `O((k + n) log n)`; where the order in which the state
//! keeps its nodes decides already, only the first `k` that fit are looked at.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
};

pub use self::{
    reason::{Reason, obstacle, unmet},
    survey::{Survey, survey},
    why::{Explanation, Fix, REASONS_SHOWN_MAX, Verdict, explain, why_not},
};
use crate::{
    countable::Countables,
    job::{Constraint, Spread},
    node::Node,
    quantity::Resources,
    state::Usage,
};

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

/// Smaller is better.
type Rank = (u64, u64, u64);

/// Chooses a node for each pod of `demand` that fits somewhere, one pod after the other. First is the best by its
/// spread (where pods of the group failed lately, each failure counts as one more pod), then the least used or, to
/// pack, the most used, then the first of `candidates`.
#[must_use]
pub fn place(demand: &Demand<'_>, candidates: Vec<Candidate<'_>>) -> Vec<String> {
    let mut board = Board::new(demand, candidates);
    let mut nodes = Vec::new();
    while nodes.len() < demand.count
        && let Some(node) = board.next()
    {
        nodes.push(node);
    }
    nodes
}

/// A placement in the making.
struct Board<'a> {
    demand: Demand<'a>,
    candidates: Vec<Candidate<'a>>,
    /// Those that fitted when they were last looked at. Ranks of all but the node that was chosen last can only
    /// have become worse since: that is found out when one is on top.
    heap: BinaryHeap<Reverse<(Rank, usize)>>,
    domains: Domains,
}

/// Pods of the group at each value of the label that they are spread over; empty when there is none.
#[derive(Default)]
struct Domains {
    /// By candidate: which of `pods`.
    of: Vec<usize>,
    pods: Vec<u64>,
}

impl Domains {
    fn new(label: &str, candidates: &[Candidate<'_>]) -> Domains {
        let mut known: BTreeMap<Option<&str>, usize> = BTreeMap::new();
        let mut domains = Domains::default();
        for candidate in candidates {
            let next = known.len();
            let domain = *known.entry(candidate.node.label(label)).or_insert(next);
            if domain == next {
                domains.pods.push(0);
            }
            domains.pods[domain] += u64::from(candidate.group_pods);
            domains.of.push(domain);
        }
        domains
    }
}

impl<'a> Board<'a> {
    fn new(demand: &Demand<'a>, candidates: Vec<Candidate<'a>>) -> Board<'a> {
        let domains = match demand.spread {
            Spread::Label(label) => Domains::new(label, &candidates),
            Spread::Node | Spread::Pack => Domains::default(),
        };
        let mut board = Board { demand: demand.clone(), candidates, heap: BinaryHeap::new(), domains };
        let fitting = (0..board.candidates.len()).filter(|at| board.fits(*at));
        board.heap = fitting.map(|at| Reverse((board.rank(at), at))).collect();
        board
    }

    fn next(&mut self) -> Option<String> {
        loop {
            let Reverse((rank, at)) = self.heap.pop()?;
            if !self.fits(at) {
                continue;
            }
            let now = self.rank(at);
            if now > rank {
                self.heap.push(Reverse((now, at)));
                continue;
            }
            self.take(at);
            return Some(self.candidates[at].node.name.clone());
        }
    }

    fn fits(&self, at: usize) -> bool {
        obstacle(&self.demand, &self.candidates[at]).is_none()
    }

    fn take(&mut self, at: usize) {
        let (demand, candidate) = (&mut self.demand, &mut self.candidates[at]);
        candidate.take(demand);
        for occupied in demand.occupied.iter_mut().filter(|occupied| occupied.own) {
            occupied.values.insert(candidate.node.label(&occupied.by).map(str::to_owned));
        }
        if let Some(domain) = self.domains.of.get(at) {
            self.domains.pods[*domain] += 1;
        }
        self.heap.push(Reverse((self.rank(at), at)));
    }

    fn rank(&self, at: usize) -> Rank {
        let candidate = &self.candidates[at];
        let used = candidate.usage.share(candidate.node);
        let (pods, failures) = (u64::from(candidate.group_pods), u64::from(candidate.failures));
        match self.demand.spread {
            Spread::Node => (0, pods + failures, used),
            Spread::Pack => (failures, u64::MAX - pods, u64::MAX - used),
            Spread::Label(_) => (self.domains.pods[self.domains.of[at]], pods + failures, used),
        }
    }
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
