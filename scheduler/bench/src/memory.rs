//! 10,000 nodes and 2,000,000 pods in memory.

use std::time::Instant;

use scheduler_core::{
    job::Spread,
    quantity::{Cpu, Memory, Resources},
};

use crate::{
    fleet::{Fleet, job},
    speed::shown,
};

const NODES: usize = 10_000;
const PODS: usize = 2_000_000;
const COUNT: u32 = 1_000;

pub(crate) fn run() {
    println!("\n10,000 nodes and 2,000,000 pods in memory, in jobs of 1,000\n");
    let before = resident_bytes();
    let mut fleet = Fleet::of(NODES, Resources { cpu: Cpu(256_000), memory: Memory(1 << 40) });
    let start = Instant::now();
    for number in 0..PODS / COUNT as usize {
        fleet.event(job(format!("j{number}"), COUNT, 1_000, Spread::Node));
    }
    let took = start.elapsed();
    assert_eq!(fleet.placed(), PODS, "every pod has a place");
    let bytes = resident_bytes().saturating_sub(before);
    println!("| memory | per pod | from empty |\n| --- | --- | --- |");
    println!("| {} MiB | {} bytes | {} |", bytes >> 20, bytes / PODS as u64, shown(took));
}

/// What the kernel says that this process has in memory (`VmRSS`).
pub(crate) fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes =
        line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|text| text.parse::<u64>().ok());
    kibibytes.unwrap_or(0) << 10
}
