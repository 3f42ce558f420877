//! A node and what is asked of it, kept in the order in which placement looks at nodes.

use std::{collections::BTreeMap, sync::Arc};

use crate::{countable::Countables, node::Node, pod::Pod};

/// What is asked of a node's capacity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Thousandths of a CPU.
    pub cpu_millis: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// Pods.
    pub pods: u32,
    /// What nodes have a number of.
    pub countables: Countables,
}

/// A node and what is asked of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    /// The node.
    pub node: Arc<Node>,
    /// What is asked of it.
    pub usage: Usage,
}

impl Usage {
    /// The scarcer of CPU and memory, in millionths of what `node` has.
    #[must_use]
    pub fn share(&self, node: &Node) -> u64 {
        let cpu = millionths(self.cpu_millis, u64::from(node.capacity.cpu.0));
        cpu.max(millionths(self.memory_bytes, node.capacity.memory.0))
    }

    /// What `pod` asks for, too.
    pub fn add(&mut self, pod: &Pod) {
        self.cpu_millis += u64::from(pod.resources.cpu.0);
        self.memory_bytes = self.memory_bytes.saturating_add(pod.resources.memory.0);
        self.pods += 1;
        self.countables.add(&pod.countables);
    }

    /// What `other` says, too.
    pub fn merge(&mut self, other: &Usage) {
        self.cpu_millis += other.cpu_millis;
        self.memory_bytes = self.memory_bytes.saturating_add(other.memory_bytes);
        self.pods += other.pods;
        self.countables.add(&other.countables);
    }

    /// No longer what `pod` asks for.
    pub fn take_away(&mut self, pod: &Pod) {
        self.cpu_millis = self.cpu_millis.saturating_sub(u64::from(pod.resources.cpu.0));
        self.memory_bytes = self.memory_bytes.saturating_sub(pod.resources.memory.0);
        self.pods = self.pods.saturating_sub(1);
        if !pod.countables.is_empty() {
            self.countables.take_away(&pod.countables);
        }
    }
}

fn millionths(used: u64, capacity: u64) -> u64 {
    match used.checked_mul(1_000_000) {
        Some(product) => product / capacity.max(1),
        // Exact again below 2^44 bytes or thousandths; above, a millionth of the capacity is a whole number.
        None => used / (capacity / 1_000_000).max(1),
    }
}

/// Nodes by how much of them is used, and then by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Seats(BTreeMap<(u64, String), Seat>);

impl Seats {
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &Seat> {
        self.0.values()
    }

    pub(super) fn get(&self, node: &Node, usage: &Usage) -> Option<&Seat> {
        self.0.get(&(usage.share(node), node.name.clone()))
    }

    pub(super) fn insert(&mut self, node: &Arc<Node>, usage: Usage) {
        let key = (usage.share(node), node.name.clone());
        self.0.insert(key, Seat { node: node.clone(), usage });
    }

    pub(super) fn remove(&mut self, node: &Node, usage: &Usage) {
        self.0.remove(&(usage.share(node), node.name.clone()));
    }
}
