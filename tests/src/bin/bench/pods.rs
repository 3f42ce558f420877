//! Pod to pod across nodes: Hextet, the same path made by hand, and the nodes themselves without pods.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context, Result};
use hextet_tests::{Pod, topology::Place};

use crate::{
    Bench,
    report::{Better, Metric, OURS, median, percentile},
    say,
    traffic::{self, Path},
};

/// How many pings one sample is made of.
const PINGS: u32 = 500;

const TABLE: &str = "pod to pod across nodes";

/// The name of the job that holds one pod on each node.
pub(crate) const JOB: &str = "bench";
/// The nodes of the cluster.
pub(crate) const NODES: [&str; 3] = ["n1", "n2", "n3"];

/// Measures all four loads on the three paths.
pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    let paths = paths(bench)?;
    load(bench, TABLE, &paths)
}

fn paths(bench: &Bench) -> Result<Vec<(&'static str, Path)>> {
    let pods = pods(bench)?;
    let [from, to] = ["n1", "n2"].map(|node| pods.iter().find(|pod| pod.node == node));
    let (from, to) = (from.context("no pod on n1")?, to.context("no pod on n2")?);
    let (cluster, by_hand) = (&bench.cluster, &bench.by_hand);
    let n2 = Place::Node(2).addresses().expect("a node has addresses").v6;
    Ok(vec![
        (
            OURS,
            Path { from: cluster.netns(&from.id), to: cluster.netns(&to.id), address: to.address().into() },
        ),
        ("by hand", Path { from: by_hand.pod(1), to: by_hand.pod(2), address: by_hand.pod_address(2) }),
        ("node to node", Path { from: by_hand.node(1), to: by_hand.node(2), address: IpAddr::V6(n2) }),
    ])
}

/// One pod on each of [`NODES`], which do nothing.
pub(crate) fn pods(bench: &Bench) -> Result<Vec<Pod>> {
    let group = |node: &str| {
        format!(
            "  on-{node}:\n    count: 1\n    constraints: {{node: {node}}}\n    tasks:\n      idle:\n        \
             exec: [/bin/sleep, infinity]\n"
        )
    };
    bench.cluster.apply(&format!("job: {JOB}\ngroups:\n{}", NODES.map(group).concat()))?;
    bench.cluster.wait_running(JOB, NODES.len(), Duration::from_secs(20))
}

/// Runs every load on every path in turn, round after round.
pub(crate) fn load(bench: &mut Bench, table: &'static str, paths: &[(&'static str, Path)]) -> Result<()> {
    let metric = |name, unit, better| Metric { table, name, unit, better };
    let tcp = metric("TCP, one stream", "Gbit/s", Better::More);
    let udp = metric("UDP, 64 bytes each", "packets/s", Better::More);
    let opened = metric("new TCP connections", "1/s", Better::More);
    let p50 = metric("ping, median", "us", Better::Less);
    let p99 = metric("ping, 99 %", "us", Better::Less);
    for round in 1..=bench.rounds {
        say(&format!("{table}: round {round} of {}", bench.rounds));
        for (variant, path) in paths {
            let value = traffic::tcp_gbits(path, bench.span).with_context(|| format!("TCP, {variant}"))?;
            bench.report.add(tcp, variant, value);
        }
        for (variant, path) in paths {
            let value = traffic::udp_packets(path, bench.span).with_context(|| format!("UDP, {variant}"))?;
            bench.report.add(udp, variant, value);
        }
        for (variant, path) in paths {
            let value =
                traffic::connections(path, bench.span).with_context(|| format!("connections, {variant}"))?;
            bench.report.add(opened, variant, value);
        }
        for (variant, path) in paths {
            let times = traffic::pings(path, PINGS).with_context(|| format!("ping, {variant}"))?;
            bench.report.add(p50, variant, median(&times).context("no ping")?);
            bench.report.add(p99, variant, percentile(&times, 99.0).context("no ping")?);
        }
    }
    Ok(())
}
