//! Placement beside the best there is, on clusters that are small enough to try everything.

use std::collections::BTreeMap;

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use scheduler_core::{
    job::Spread,
    quantity::{Cpu, Memory, Resources},
};

use crate::fleet::{Fleet, job};

/// How many random cases of each kind.
const CASES: usize = 500;
const NODES: usize = 4;
/// CPU of a node.
const NODE_CPU: u32 = 4_000;
/// Groups, one pod of each.
const PODS: usize = 9;

pub(crate) fn run() {
    println!(
        "\nQuality on {CASES} random clusters of {NODES} nodes and {PODS} pods, beside the best of all placements\n"
    );
    println!("| spread | what | placed | the best |\n| --- | --- | --- | --- |");
    for spread in [Spread::Node, Spread::Pack] {
        let sums = totals(&spread);
        let row = |what, (ours, best): (f64, f64)| println!("| {spread} | {what} | {ours:.3} | {best:.3} |");
        row("part of the pods that have a place", sums.placed);
        match spread {
            Spread::Pack => row("nodes in use", sums.nodes),
            _ => {
                row("CPU of the fullest node less that of the emptiest, as a part of a node", sums.imbalance)
            }
        }
    }
    group_spread();
}

/// Each as the mean of what placement did and of the best.
#[derive(Default)]
struct Totals {
    placed: (f64, f64),
    nodes: (f64, f64),
    imbalance: (f64, f64),
}

fn totals(spread: &Spread) -> Totals {
    let mut totals = Totals::default();
    let mut rng = StdRng::seed_from_u64(7);
    let add = |sum: &mut (f64, f64), ours: f64, best: f64| {
        *sum = (sum.0 + ours / CASES as f64, sum.1 + best / CASES as f64);
    };
    for _ in 0..CASES {
        let sizes: Vec<u32> = (0..PODS).map(|_| rng.random_range(4..25) * 100).collect();
        let ours = placed(&sizes, spread);
        let best = search(&sizes, ours.pods);
        add(&mut totals.placed, ours.pods as f64 / PODS as f64, best.pods as f64 / PODS as f64);
        add(&mut totals.nodes, ours.nodes as f64, best.nodes as f64);
        let node = f64::from(NODE_CPU);
        add(&mut totals.imbalance, f64::from(ours.imbalance) / node, f64::from(best.imbalance) / node);
    }
    totals
}

/// What a placement comes to.
struct Outcome {
    pods: usize,
    nodes: usize,
    imbalance: u32,
}

fn placed(sizes: &[u32], spread: &Spread) -> Outcome {
    let mut fleet = Fleet::of(NODES, Resources { cpu: Cpu(NODE_CPU), memory: Memory(64 << 30) });
    for (number, cpu) in sizes.iter().enumerate() {
        fleet.event(job(format!("j{number}"), 1, *cpu, spread.clone()));
    }
    let used: Vec<u32> = (0..NODES)
        .map(|node| u32::try_from(fleet.state.usage(&format!("n{node}")).cpu_millis).unwrap_or(u32::MAX))
        .collect();
    outcome(fleet.placed(), &used)
}

fn outcome(pods: usize, used: &[u32]) -> Outcome {
    let nodes = used.iter().filter(|used| **used > 0).count();
    let imbalance = used.iter().max().unwrap_or(&0) - used.iter().min().unwrap_or(&0);
    Outcome { pods, nodes, imbalance }
}

/// The best of every way to put the pods on the nodes: most pods placed; and of the ways that place as many as we
/// did, the fewest nodes and the least imbalance, each for itself.
fn search(sizes: &[u32], at_least: usize) -> Outcome {
    let mut best = Outcome { pods: 0, nodes: usize::MAX, imbalance: u32::MAX };
    try_all(sizes, &mut [0; NODES], 0, &mut |pods, used| {
        let one = outcome(pods, used);
        best.pods = best.pods.max(pods);
        if pods >= at_least {
            best.nodes = best.nodes.min(one.nodes);
            best.imbalance = best.imbalance.min(one.imbalance);
        }
    });
    best
}

fn try_all(sizes: &[u32], used: &mut [u32; NODES], placed: usize, done: &mut impl FnMut(usize, &[u32])) {
    let Some((size, rest)) = sizes.split_first() else { return done(placed, used) };
    try_all(rest, used, placed, done);
    for node in 0..NODES {
        // Nodes are alike: of several empty ones the first is enough.
        let twin = used[node] == 0 && used[..node].contains(&0);
        if !twin && used[node] + size <= NODE_CPU {
            used[node] += size;
            try_all(rest, used, placed + 1, done);
            used[node] -= size;
        }
    }
}

/// One group over nodes that have room for different numbers of its pods: the most on one node, and the least that
/// is possible.
fn group_spread() {
    let mut rng = StdRng::seed_from_u64(9);
    let (mut ours, mut best) = (0.0, 0.0);
    for _ in 0..CASES {
        let mut fleet = Fleet::of(NODES, Resources { cpu: Cpu(NODE_CPU), memory: Memory(64 << 30) });
        for node in 0..NODES {
            fleet.event(job(format!("before{node}"), 1, rng.random_range(0..8) * 500, Spread::Node));
        }
        let room = |fleet: &Fleet| -> Vec<u32> {
            let free = |node| NODE_CPU - fleet.state.usage(&format!("n{node}")).cpu_millis as u32;
            (0..NODES).map(|node| free(node) / 500).collect()
        };
        let room = room(&fleet);
        let count = rng.random_range(1..=room.iter().sum::<u32>().clamp(1, 9));
        fleet.event(job("spread".to_owned(), count, 500, Spread::Node));
        let mut per_node = BTreeMap::<String, u32>::new();
        let pods = fleet.state.pods_of_job("spread").filter_map(|pod| pod.node.clone());
        pods.for_each(|node| *per_node.entry(node).or_default() += 1);
        let least = (1..=count).find(|most| room.iter().map(|room| room.min(most)).sum::<u32>() >= count);
        ours += f64::from(per_node.values().max().copied().unwrap_or(0)) / CASES as f64;
        best += f64::from(least.unwrap_or(count)) / CASES as f64;
    }
    println!("| node | most pods of one group on a node | {ours:.3} | {best:.3} |");
}
