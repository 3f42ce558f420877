//! From a pod to a host on the IPv4 internet: Hextet's masquerade, the kernel's (nftables), and plain
//! forwarding without translation, with few and many flows in the tables.
//!
//! Each number of flows has a node of its own, so that all of them are measured in every round.

use std::time::Duration;

use anyhow::{Context, Result};
use hextet_tests::topology::Place;

use crate::{
    Bench, by_hand, flows, footprint,
    pods::{self, NODES},
    report::{Better, Metric, OURS},
    run_time, say,
    traffic::{self, Path},
};

const TABLE: &str = "pod to an IPv4 host";
const MEMORY: &str = "what flows cost, 1M of them";
const RUN_TIME: &str = "run time of a program, ns";
const NFTABLES: &str = "nftables";

/// Kept free of what conntrack may hold, for the connections that are measured.
const HEADROOM: u64 = 40_000;

/// A number of flows, the nodes that have it, and its rows.
struct Size {
    flows: u32,
    node: &'static str,
    by_hand: u8,
    opened: Metric,
    packets: Metric,
    stream: Metric,
    run_time: Metric,
    run_time_opened: Metric,
}

const SIZES: [Size; 3] = [
    Size {
        flows: 1_000,
        node: NODES[0],
        by_hand: 1,
        opened: metric("new TCP connections, 1k flows", "1/s"),
        packets: metric("UDP, 64 bytes each, 1k flows", "packets/s"),
        stream: metric("TCP, one stream, 1k flows", "Gbit/s"),
        run_time: run_time("UDP, 1k flows"),
        run_time_opened: run_time("new TCP connections, 1k flows"),
    },
    Size {
        flows: 100_000,
        node: NODES[1],
        by_hand: 3,
        opened: metric("new TCP connections, 100k flows", "1/s"),
        packets: metric("UDP, 64 bytes each, 100k flows", "packets/s"),
        stream: metric("TCP, one stream, 100k flows", "Gbit/s"),
        run_time: run_time("UDP, 100k flows"),
        run_time_opened: run_time("new TCP connections, 100k flows"),
    },
    Size {
        flows: 1_000_000,
        node: NODES[2],
        by_hand: 4,
        opened: metric("new TCP connections, 1M flows", "1/s"),
        packets: metric("UDP, 64 bytes each, 1M flows", "packets/s"),
        stream: metric("TCP, one stream, 1M flows", "Gbit/s"),
        run_time: run_time("UDP, 1M flows"),
        run_time_opened: run_time("new TCP connections, 1M flows"),
    },
];
const FEWEST: &Size = &SIZES[0];
const MOST: &Size = &SIZES[2];

const EMPTY: Metric = Metric { table: MEMORY, name: "without flows", unit: "MiB", better: Better::Less };
const SLAB: Metric =
    Metric { table: MEMORY, name: "for a flow, kernel objects", unit: "bytes", better: Better::Less };
const ACCOUNTED: Metric =
    Metric { table: MEMORY, name: "for a flow, as the maps account", unit: "bytes", better: Better::Less };

const PROCESSOR: Metric =
    Metric { table: MEMORY, name: "agent, of one processor", unit: "%", better: Better::Less };

const fn metric(name: &'static str, unit: &'static str) -> Metric {
    Metric { table: TABLE, name, unit, better: Better::More }
}

const fn run_time(name: &'static str) -> Metric {
    Metric { table: RUN_TIME, name, unit: "ns", better: Better::Less }
}

/// Fills the tables, then measures three loads with each number of flows on the three paths.
pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    let paths = paths(bench)?;
    flows::drop_at_router(&bench.cluster)?;
    flows::drop_at_router(&bench.by_hand.testbed)?;
    for (size, paths) in SIZES.iter().zip(&paths) {
        say(&format!("{TABLE}: {} flows", size.flows));
        fill_ours(bench, size, &paths[0].1)?;
        fill_kernel(bench, size)?;
    }
    for round in 1..=bench.rounds {
        say(&format!("{TABLE}: round {round} of {}", bench.rounds));
        let refused = refused(bench)?;
        for (size, paths) in SIZES.iter().zip(&paths) {
            // Flows live as long as somebody uses them.
            flows::send(&paths[0].1.from, size.flows)?;
            loads(bench, size, paths)?;
        }
        // Each costs its client a second: the first SYN is gone.
        let now = self::refused(bench)? - refused;
        bench
            .report
            .note(format!("round {round}: {now} first packets of flows were refused for want of a port"));
    }
    for (many, few) in
        [(MOST.opened, FEWEST.opened), (MOST.packets, FEWEST.packets), (MOST.stream, FEWEST.stream)]
    {
        bench.report.compare(many, few);
    }
    run_times(bench, &paths)
}

/// First packets of flows that found no port so far, on all nodes.
fn refused(bench: &Bench) -> Result<u64> {
    NODES.iter().map(|node| flows::refused(&bench.cluster, node)).sum()
}

/// What a path carries within a span of time.
type Load = fn(&Path, Duration) -> Result<f64>;

type Paths = [(&'static str, Path); 3];

/// For each size: ours, the kernel's, and the one without translation.
fn paths(bench: &Bench) -> Result<Vec<Paths>> {
    let pods = pods::pods(bench)?;
    let address = Place::Wan.addresses().expect("wan has addresses").v4.into();
    let (cluster, by_hand) = (&bench.cluster, &bench.by_hand);
    let beyond = by_hand.testbed.netns("wan");
    let path = |from, to: &_| Path { from, to: Clone::clone(to), address };
    let of_size = |size: &Size| -> Result<Paths> {
        let pod = pods.iter().find(|pod| pod.node == size.node);
        let pod = pod.with_context(|| format!("no pod on {}", size.node))?;
        Ok([
            (OURS, path(cluster.netns(&pod.id), &cluster.netns("wan"))),
            (NFTABLES, path(by_hand.pod(size.by_hand), &beyond)),
            ("not translated", path(by_hand.pod(by_hand::ROUTED), &beyond)),
        ])
    };
    SIZES.iter().map(of_size).collect()
}

fn fill_ours(bench: &mut Bench, size: &Size, path: &Path) -> Result<()> {
    let (cluster, node) = (&bench.cluster, size.node);
    let (made, maps, slab) =
        (flows::made(cluster, node)?, flows::map_bytes(cluster, node)?, flows::slab_bytes()?);
    flows::fill(&path.from, size.flows, || Ok(flows::made(cluster, node)? - made))
        .with_context(|| format!("filling the table of {node}"))?;
    if size.flows == MOST.flows {
        let flows = f64::from(size.flows);
        let accounted = (flows::map_bytes(cluster, node)? - maps) / flows;
        bench.report.add(EMPTY, OURS, maps / f64::from(1 << 20));
        bench.report.add(ACCOUNTED, OURS, accounted);
        bench.report.add(SLAB, OURS, (flows::slab_bytes()? - slab) / flows);
        let agent = bench.cluster.agent(node).pid().context("the agent does not run")?;
        bench.report.add(PROCESSOR, OURS, footprint::busy(agent)?);
    }
    Ok(())
}

/// As many flows as the machine lets conntrack have, which is one limit for all namespaces.
fn fill_kernel(bench: &mut Bench, size: &Size) -> Result<()> {
    let (node, pod) = (bench.by_hand.node(size.by_hand), bench.by_hand.pod(size.by_hand));
    // Nothing answers; as long as this is measured a flow is to stay.
    node.set_sysctls(&[("net/netfilter/nf_conntrack_udp_timeout".to_owned(), "3600")])?;
    let most = flows::conntrack_max(&node)?.saturating_sub(HEADROOM);
    let count = size.flows.min(u32::try_from(most).unwrap_or(u32::MAX));
    if count < size.flows {
        bench.report.note(format!(
            "{NFTABLES} has {count} flows where {} were wanted: net.netfilter.nf_conntrack_max is the \
             machine's, and a namespace cannot raise it",
            size.flows
        ));
    }
    let slab = flows::slab_bytes()?;
    let before = flows::conntrack(&node)?;
    flows::fill(&pod, count, || flows::conntrack(&node))?;
    if size.flows == MOST.flows {
        let made = flows::conntrack(&node)?.saturating_sub(before);
        bench.report.add(SLAB, NFTABLES, (flows::slab_bytes()? - slab) / made as f64);
    }
    Ok(())
}

/// Every load on every path in turn.
fn loads(bench: &mut Bench, size: &Size, paths: &Paths) -> Result<()> {
    let loads: [(Metric, Load); 3] = [
        (size.stream, traffic::tcp_gbits),
        (size.packets, traffic::udp_packets),
        (size.opened, traffic::connections),
    ];
    for (metric, load) in loads {
        for (variant, path) in paths {
            let value = load(path, bench.span).with_context(|| format!("{}, {variant}", metric.name))?;
            bench.report.add(metric, variant, value);
        }
    }
    Ok(())
}

/// What each program takes for a packet.
fn run_times(bench: &mut Bench, paths: &[Paths]) -> Result<()> {
    let span = bench.span;
    let mut add = |metric, times: Vec<(&'static str, f64)>| {
        times.into_iter().for_each(|(program, ns)| bench.report.add(metric, program, ns));
    };
    for (size, paths) in SIZES.iter().zip(paths) {
        let path = &paths[0].1;
        let udp = || traffic::udp_packets(path, span);
        add(size.run_time, run_time::during(&bench.cluster, size.node, udp)?);
        let opened = || traffic::connections(path, span);
        add(size.run_time_opened, run_time::during(&bench.cluster, size.node, opened)?);
    }
    Ok(())
}
