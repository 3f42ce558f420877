//! Fills the tables of a masquerade: UDP flows of a pod to addresses that the router drops without a word
//! (198.18.0.0/15, RFC 2544). Hextet's table and conntrack get the same packets.

use std::net::{Ipv4Addr, UdpSocket};

use anyhow::{Context, Result, bail};
use hextet_tests::{Testbed, command::ip_batch, netns::NetNs};

use crate::run_time::bpftool;

/// The first remote.
const REMOTES: u32 = Ipv4Addr::new(198, 18, 0, 0).to_bits();
const PREFIX_LEN: u32 = 15;
/// Inside ports, each of which talks to every remote.
const PORTS: u16 = 8;
const FIRST_PORT: u16 = 20_000;
/// Where the packets go to.
const DISCARD: u16 = 9;
/// How often is sent what got lost.
const TRIES: usize = 3;

/// Has the router drop what the flows are made of.
pub(crate) fn drop_at_router(testbed: &Testbed) -> Result<()> {
    let line = format!("route replace blackhole {}/{PREFIX_LEN}", Ipv4Addr::from_bits(REMOTES));
    ip_batch(Some(&testbed.netns("router")), &[line])
}

/// Makes `flows` flows from `pod`, as `there` counts them, or keeps them alive.
pub(crate) fn fill(pod: &NetNs, flows: u32, there: impl Fn() -> Result<u64>) -> Result<()> {
    let wanted = u64::from(flows);
    for _ in 0..TRIES {
        send(pod, flows)?;
        if there()? >= wanted {
            return Ok(());
        }
    }
    bail!("only {} of {flows} flows came to be", there()?)
}

/// One packet for each flow.
pub(crate) fn send(pod: &NetNs, flows: u32) -> Result<()> {
    pod.run(|| -> Result<()> {
        let ports = FIRST_PORT..FIRST_PORT + PORTS;
        let socket =
            |port| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).context("cannot bind a flow's port");
        let sockets = ports.map(socket).collect::<Result<Vec<_>>>()?;
        for remote in (0..flows.div_ceil(PORTS.into())).map(|number| Ipv4Addr::from_bits(REMOTES + number)) {
            for socket in &sockets {
                // A full queue: whoever counts sees it.
                socket.send_to(b"flow", (remote, DISCARD)).ok();
            }
        }
        Ok(())
    })?
}

/// Flows that the kernel tracks in a namespace.
pub(crate) fn conntrack(node: &NetNs) -> Result<u64> {
    read_number(node, "/proc/sys/net/netfilter/nf_conntrack_count")
}

/// How many it may track: one limit for the whole machine, which only the machine's owner can raise.
pub(crate) fn conntrack_max(node: &NetNs) -> Result<u64> {
    read_number(node, "/proc/sys/net/netfilter/nf_conntrack_max")
}

fn read_number(node: &NetNs, path: &str) -> Result<u64> {
    let text = node.run(|| std::fs::read_to_string(path))?.with_context(|| format!("cannot read {path}"))?;
    text.trim().parse().with_context(|| format!("{path} holds no number"))
}

/// Flows that the programs of a node have made so far.
pub(crate) fn made(testbed: &Testbed, node: &str) -> Result<u64> {
    counter(testbed, node, "new_flow")
}

/// New flows that a node's programs have refused, because they found no port in the pod's blocks.
pub(crate) fn refused(testbed: &Testbed, node: &str) -> Result<u64> {
    counter(testbed, node, "drop_no_port")
}

fn counter(testbed: &Testbed, node: &str, name: &str) -> Result<u64> {
    let key = ("masquerade_egress".to_owned(), name.to_owned());
    let counters = testbed.counters(node)?;
    counters.get(&key).copied().with_context(|| format!("{node} has no counter {name}"))
}

/// Bytes of a node's masquerade maps, as the kernel accounts for them.
pub(crate) fn map_bytes(testbed: &Testbed, node: &str) -> Result<f64> {
    let folder = crate::run_time::layout(testbed, node)?;
    let pins = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let of_masquerade = |name: &str| name.starts_with("NAT_");
    let maps = pins
        .flatten()
        .map(|pin| pin.path())
        .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(of_masquerade));
    maps.map(|map| {
        let shown = bpftool(&["map", "show", "pinned", &map.to_string_lossy()])?;
        shown["bytes_memlock"].as_f64().context("bpftool shows no size of a map")
    })
    .sum()
}

/// Bytes that the kernel has in objects that it cannot give back: flows among them.
pub(crate) fn slab_bytes() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("SUnreclaim:")).context("no SUnreclaim")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().context("SUnreclaim is not a number")?;
    Ok(kib * 1024.0)
}
