//! From empty to full, and one more pod.

use std::time::Duration;

use scheduler_core::job::Spread;

use crate::{
    fleet::{Fleet, job},
    process::{busy, resident_bytes},
};

/// Pods on each node when the cluster is full.
const PODS_PER_NODE: usize = 30;
/// CPU of a pod: 30 of them leave room for one more on each node.
const POD_CPU: u32 = 1_000;
/// How often one more pod is placed.
const SAMPLES: usize = 2_000;

/// The shapes in which pods come: how many in a job, and how they are laid over the nodes.
const SHAPES: [(u32, &str); 11] = [
    (100, "node"),
    (1_000, "node"),
    (10, "node"),
    (1, "node"),
    (100, "pack"),
    (1, "pack"),
    (100, "rack"),
    (1_000, "rack"),
    (1, "rack"),
    (100, "zone"),
    (100, "machine"),
];

/// 5,000 nodes, 150,000 pods.
pub(crate) fn targets() {
    println!("\n5,000 nodes from empty to 150,000 pods, then {SAMPLES} times one pod more and gone again\n");
    println!(
        "| the pods come as | from empty | processor time | one pod, median | one pod, p99 | one pod, worst |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    for (count, spread) in SHAPES {
        let spread = Spread::from(spread);
        let (mut fleet, took, busy) = fill(5_000, count, &spread);
        let (took, busy) = (shown(took), shown(busy));
        let [median, p99, worst] = one_more(&mut fleet, &spread).map(shown);
        println!("| jobs of {count}, spread: {spread} | {took} | {busy} | {median} | {p99} | {worst} |");
    }
}

/// What each node more costs.
pub(crate) fn growth() {
    println!("\nGrowth with the cluster: {PODS_PER_NODE} pods per node, in jobs of 100, spread: node\n");
    println!("| nodes | pods | from empty | per pod | one pod, median | one pod, p99 | memory |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for nodes in [100, 300, 1_000, 3_000, 5_000, 10_000] {
        let before = resident_bytes();
        let (mut fleet, took, _) = fill(nodes, 100, &Spread::Node);
        let memory = resident_bytes().saturating_sub(before) >> 20;
        let pods = nodes * PODS_PER_NODE;
        let each = took / u32::try_from(pods).expect("it fits");
        let [median, p99, _] = one_more(&mut fleet, &Spread::Node);
        println!(
            "| {nodes} | {pods} | {} | {} | {} | {} | {memory} MiB |",
            shown(took),
            shown(each),
            shown(median),
            shown(p99)
        );
    }
}

/// A full cluster, how long filling it took, and for how long of that the thread was on a processor.
fn fill(nodes: usize, count: u32, spread: &Spread) -> (Fleet, Duration, Duration) {
    let mut fleet = Fleet::new(nodes);
    let jobs = nodes * PODS_PER_NODE / count as usize;
    let (mut took, start) = (Duration::ZERO, busy());
    for number in 0..jobs {
        took += fleet.event(job(format!("j{number}"), count, POD_CPU, spread.clone()));
    }
    let busy = busy() - start;
    assert_eq!(fleet.placed(), nodes * PODS_PER_NODE, "every pod has a place");
    (fleet, took, busy)
}

/// Median, 99th percentile and worst time of the event that adds one pod. It goes again each time, as a pod that
/// is still starting does: with a report of its node.
fn one_more(fleet: &mut Fleet, spread: &Spread) -> [Duration; 3] {
    use scheduler_core::event::{Event, PodReport};
    let mut times = Vec::new();
    for number in 0..SAMPLES {
        let name = format!("one{number}");
        times.push(fleet.event(job(name.clone(), 1, POD_CPU, spread.clone())));
        let pod = fleet.state.pods_of_job(&name).next().expect("it was made").clone();
        let node = pod.node.clone().expect("it has a place");
        fleet.event(Event::DeleteJob(name));
        let report = PodReport {
            id: pod.id.clone(),
            phase: pod.phase,
            message: String::new(),
            restarts: 0,
            gone: true,
            version: None,
            ending: None,
        };
        fleet.event(Event::PodReports(node, vec![report]));
    }
    times.sort();
    [times[SAMPLES / 2], times[SAMPLES * 99 / 100], times[SAMPLES - 1]]
}

/// Three digits of it.
pub(crate) fn shown(time: Duration) -> String {
    match time.as_nanos() {
        nanos @ 0..10_000 => format!("{:.2} us", nanos as f64 / 1e3),
        nanos @ 10_000..1_000_000 => format!("{:.0} us", nanos as f64 / 1e3),
        nanos @ 1_000_000..1_000_000_000 => format!("{:.1} ms", nanos as f64 / 1e6),
        nanos => format!("{:.2} s", nanos as f64 / 1e9),
    }
}
