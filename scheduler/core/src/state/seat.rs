//! A node and what is asked of it.

use std::sync::Arc;

use crate::{
    countable::Countables,
    node::{Node, NodePhase},
    pod::Pod,
    quantity::{Cpu, Memory, Resources},
};

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

impl Seat {
    /// The CPU and memory that are free; nothing while the node takes no pods.
    pub(super) fn free(&self) -> Resources {
        if self.node.phase != NodePhase::Ready {
            return Resources::default();
        }
        let capacity = self.node.capacity;
        let cpu = u64::from(capacity.cpu.0).saturating_sub(self.usage.cpu_millis);
        let memory = capacity.memory.0.saturating_sub(self.usage.memory_bytes);
        Resources { cpu: Cpu(u32::try_from(cpu).unwrap_or(u32::MAX)), memory: Memory(memory) }
    }
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
