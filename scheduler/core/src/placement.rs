//! Which nodes a group's pods go to, and for those that go nowhere, why not, node by node.
//!
//! A pure function of a snapshot: it knows neither where the snapshot comes from nor what is done with the
//! answer. The pods of one demand are alike, so that `k` pods over `n` nodes cost `O((k + n) log n)`.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    fmt,
};

use crate::{
    job::Spread,
    node::{Node, NodePhase},
    quantity::{Cpu, Memory, Resources},
    state::Usage,
};

/// How many nodes a pod's message names before it counts the rest.
pub const REASONS_SHOWN_MAX: usize = 8;

/// Pods of one group, all alike.
#[derive(Clone, Debug)]
pub struct Demand<'a> {
    /// What each asks for.
    pub resources: Resources,
    /// Labels that a node must have.
    pub constraints: &'a BTreeMap<String, String>,
    /// How they are laid over the nodes.
    pub spread: Spread,
    /// How many are to be placed.
    pub count: usize,
    /// How many pods any node may hold.
    pub pods_per_node_max: u32,
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
}

/// The answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// A node for each pod that could be placed.
    pub nodes: Vec<String>,
    /// When some could not: why not, for every node.
    pub reasons: Vec<(String, Reason)>,
}

/// Why a pod cannot go to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It does not report.
    NotReady(NodePhase),
    /// A constraint is not met.
    Label {
        /// The label.
        key: String,
        /// What the group asks for.
        wanted: String,
        /// What the node has.
        found: Option<String>,
    },
    /// Too little processor time.
    Cpu {
        /// What the pod asks for.
        needs: Cpu,
        /// What the node has left.
        free: u64,
    },
    /// Too little memory.
    Memory {
        /// What the pod asks for.
        needs: Memory,
        /// What the node has left.
        free: Memory,
    },
    /// It has as many pods as it can have.
    Full(u32),
}

/// Chooses nodes for `demand`, one pod after the other: the best by its spread first, then the least used
/// (or, to pack, the most used), then by name.
#[must_use]
pub fn place(demand: &Demand<'_>, mut candidates: Vec<Candidate<'_>>) -> Placement {
    let fitting = (0..candidates.len()).filter(|at| obstacle(demand, &candidates[*at]).is_none());
    let mut heap: BinaryHeap<_> = fitting.map(|at| Reverse((rank(demand, &candidates[at]), at))).collect();
    let mut nodes = Vec::new();
    while nodes.len() < demand.count
        && let Some(Reverse((_, at))) = heap.pop()
    {
        let candidate = &mut candidates[at];
        candidate.take(demand.resources);
        nodes.push(candidate.node.name.clone());
        if obstacle(demand, candidate).is_none() {
            heap.push(Reverse((rank(demand, candidate), at)));
        }
    }
    let unplaced = nodes.len() < demand.count;
    let reason =
        |candidate: &Candidate<'_>| Some((candidate.node.name.clone(), obstacle(demand, candidate)?));
    let reasons = if unplaced { candidates.iter().filter_map(reason).collect() } else { Vec::new() };
    Placement { nodes, reasons }
}

/// The first thing that keeps a pod of `demand` off a node.
#[must_use]
pub fn obstacle(demand: &Demand<'_>, candidate: &Candidate<'_>) -> Option<Reason> {
    if candidate.node.phase != NodePhase::Ready {
        return Some(Reason::NotReady(candidate.node.phase));
    }
    unmet(demand.constraints, candidate.node).or_else(|| lack(demand, candidate))
}

/// The first constraint that a node does not meet.
#[must_use]
pub fn unmet(constraints: &BTreeMap<String, String>, node: &Node) -> Option<Reason> {
    let (key, wanted) = constraints.iter().find(|(key, wanted)| node.label(key) != Some(wanted.as_str()))?;
    let found = node.label(key).map(str::to_owned);
    Some(Reason::Label { key: key.clone(), wanted: wanted.clone(), found })
}

fn lack(demand: &Demand<'_>, candidate: &Candidate<'_>) -> Option<Reason> {
    let (needs, usage, capacity) = (demand.resources, candidate.usage, candidate.node.capacity);
    let free = u64::from(capacity.cpu.0).saturating_sub(usage.cpu_millis);
    if u64::from(needs.cpu.0) > free {
        return Some(Reason::Cpu { needs: needs.cpu, free });
    }
    let free = Memory(capacity.memory.0.saturating_sub(usage.memory_bytes));
    if needs.memory > free {
        return Some(Reason::Memory { needs: needs.memory, free });
    }
    (usage.pods >= demand.pods_per_node_max).then_some(Reason::Full(demand.pods_per_node_max))
}

/// Smaller is better.
fn rank(demand: &Demand<'_>, candidate: &Candidate<'_>) -> (u64, u64) {
    let used = used_share(candidate);
    match demand.spread {
        Spread::Node => (u64::from(candidate.group_pods), used),
        Spread::Pack => (u64::MAX - u64::from(candidate.group_pods), u64::MAX - used),
    }
}

/// The scarcer of CPU and memory, in millionths of the capacity.
fn used_share(candidate: &Candidate<'_>) -> u64 {
    let share = |used: u64, capacity: u64| {
        let millionths = u128::from(used) * 1_000_000 / u128::from(capacity.max(1));
        u64::try_from(millionths).unwrap_or(u64::MAX)
    };
    let capacity = candidate.node.capacity;
    let cpu = share(candidate.usage.cpu_millis, u64::from(capacity.cpu.0));
    cpu.max(share(candidate.usage.memory_bytes, capacity.memory.0))
}

impl Candidate<'_> {
    fn take(&mut self, resources: Resources) {
        self.usage.cpu_millis += u64::from(resources.cpu.0);
        self.usage.memory_bytes = self.usage.memory_bytes.saturating_add(resources.memory.0);
        self.usage.pods += 1;
        self.group_pods += 1;
    }
}

impl Placement {
    /// Why the rest was not placed, for people: `no node fits; n1: needs 4000m CPU, 500m free`.
    #[must_use]
    pub fn explain(&self) -> String {
        if self.reasons.is_empty() {
            return "no node has joined yet; `netctl token --for node` makes the line to join one".to_owned();
        }
        let shown = self.reasons.iter().take(REASONS_SHOWN_MAX);
        let mut text = "no node fits".to_owned();
        for (node, reason) in shown {
            text.push_str(&format!("; {node}: {reason}"));
        }
        let rest = self.reasons.len().saturating_sub(REASONS_SHOWN_MAX);
        if rest > 0 {
            text.push_str(&format!("; and {rest} more nodes"));
        }
        text
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NotReady(NodePhase::Joined) => f.write_str("has not attached yet"),
            Reason::NotReady(_) => f.write_str("its lease has ended"),
            Reason::Label { key, wanted, found: Some(found) } => {
                write!(f, "needs {key}={wanted}, has {key}={found}")
            }
            Reason::Label { key, wanted, found: None } => write!(f, "needs {key}={wanted}, has no {key}"),
            Reason::Cpu { needs, free } => write!(f, "needs {needs} CPU, {free}m free"),
            Reason::Memory { needs, free } => write!(f, "needs {needs} memory, {} free", free.rounded()),
            Reason::Full(max) => write!(f, "has {max} pods, as many as fit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use hextet_address::{GroupId, NodePrefix};

    use super::*;
    use crate::time::WallTime;

    #[test]
    fn spread_takes_the_node_with_the_fewest_pods_of_the_group() {
        let nodes = [node("n1", 4000, 8), node("n2", 4000, 8), node("n3", 4000, 8)];
        assert_eq!(placed(Spread::Node, 5, 100, &nodes), ["n1", "n2", "n3", "n1", "n2"]);
    }

    #[test]
    fn spread_prefers_the_less_used_node_among_equals() {
        let nodes = [node("n1", 1000, 8), node("n2", 4000, 8)];
        let mut all = candidates(&nodes);
        all[0].usage.cpu_millis = 500;
        all[1].usage.cpu_millis = 600;
        assert_eq!(place(&demand(Spread::Node, 1, 100), all).nodes, ["n2"]);
    }

    #[test]
    fn pack_fills_one_node_before_the_next() {
        let nodes = [node("n1", 300, 8), node("n2", 300, 8)];
        assert_eq!(placed(Spread::Pack, 5, 100, &nodes), ["n1", "n1", "n1", "n2", "n2"]);
    }

    #[test]
    fn the_answer_says_why_not_for_every_node() {
        let mut nodes = [node("n1", 500, 8), node("n2", 9000, 8), node("n3", 9000, 0), node("n4", 9000, 8)];
        nodes[1].phase = NodePhase::Lost;
        nodes[3].labels.insert("rack".into(), "b".into());
        let constraints = BTreeMap::from([("rack".to_owned(), "a".to_owned())]);
        nodes[0].labels.insert("rack".into(), "a".into());
        nodes[2].labels.insert("rack".into(), "a".into());
        let demand = Demand { constraints: &constraints, ..demand(Spread::Node, 1, 4000) };
        let answer = place(&demand, candidates(&nodes));
        assert_eq!(
            answer.explain(),
            "no node fits; n1: needs 4000m CPU, 500m free; n2: its lease has ended; \
             n3: needs 64Mi memory, 0 free; n4: needs rack=a, has rack=b"
        );
    }

    #[test]
    fn a_node_holds_no_more_pods_than_it_has_addresses_for() {
        let nodes = [node("n1", 9000, 800)];
        let demand = Demand { pods_per_node_max: 2, ..demand(Spread::Node, 3, 1) };
        let answer = place(&demand, candidates(&nodes));
        assert_eq!(answer.nodes, ["n1", "n1"]);
        assert_eq!(answer.explain(), "no node fits; n1: has 2 pods, as many as fit");
    }

    #[test]
    fn long_answers_are_cut_and_no_nodes_is_said_in_words() {
        let nodes: Vec<Node> = (0..20).map(|number| node(&format!("n{number}"), 0, 8)).collect();
        let answer = place(&demand(Spread::Node, 1, 1), candidates(&nodes));
        assert_eq!(answer.reasons.len(), 20);
        assert!(answer.explain().ends_with("; and 12 more nodes"));
        assert!(place(&demand(Spread::Node, 1, 1), vec![]).explain().starts_with("no node has joined yet"));
    }

    fn placed(spread: Spread, count: usize, cpu: u32, nodes: &[Node]) -> Vec<String> {
        place(&demand(spread, count, cpu), candidates(nodes)).nodes
    }

    fn demand(spread: Spread, count: usize, cpu: u32) -> Demand<'static> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        let resources = Resources { cpu: Cpu(cpu), memory: Memory(64 << 20) };
        Demand { resources, constraints: &NONE, spread, count, pods_per_node_max: 4000 }
    }

    fn candidates(nodes: &[Node]) -> Vec<Candidate<'_>> {
        nodes.iter().map(|node| Candidate { node, usage: Usage::default(), group_pods: 0 }).collect()
    }

    fn node(name: &str, cpu: u32, memory_units: u64) -> Node {
        Node {
            name: name.to_owned(),
            key: String::new(),
            prefix: NodePrefix::new("fd00:1:2:3::/64".parse().unwrap()).unwrap(),
            group_id: GroupId::new(1).unwrap(),
            underlay: None,
            underlay_v4: None,
            labels: BTreeMap::new(),
            capacity: Resources { cpu: Cpu(cpu), memory: Memory(memory_units << 26) },
            agent_version: String::new(),
            phase: NodePhase::Ready,
            left: Vec::new(),
            joined: WallTime(0),
        }
    }
}
