//! 10,000 nodes and 2,000,000 pods in memory.

use scheduler_core::{
    job::Spread,
    quantity::{Cpu, Memory, Resources},
};

use crate::{
    fleet::{Fleet, job},
    process::{busy, resident_bytes},
    speed::shown,
};

pub(crate) const NODES: usize = 10_000;
pub(crate) const PODS: usize = 2_000_000;
pub(crate) const COUNT: u32 = 1_000;
/// What a node has of all.
pub(crate) const CAPACITY: Resources = Resources { cpu: Cpu(256_000), memory: Memory(1 << 40) };

pub(crate) fn run() {
    println!("\n10,000 nodes and 2,000,000 pods in memory, in jobs of 1,000\n");
    let before = resident_bytes();
    let mut fleet = Fleet::of(NODES, CAPACITY);
    let start = busy();
    for number in 0..PODS / COUNT as usize {
        fleet.event(job(format!("j{number}"), COUNT, 1_000, Spread::Node));
    }
    let took = busy() - start;
    assert_eq!(fleet.placed(), PODS, "every pod has a place");
    let bytes = resident_bytes().saturating_sub(before);
    println!("| memory | per pod | from empty, processor time |\n| --- | --- | --- |");
    println!("| {} MiB | {} bytes | {} |", bytes >> 20, bytes / PODS as u64, shown(took));
}
