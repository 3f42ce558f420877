//! Addresses that others claim: probes before use, and defence after.

use std::{net::Ipv6Addr, time::Duration};

use dataplane::{NdpBackend, announce::Conflict};
use dataplane_core::Mac;

use crate::{
    ALL_NODES_MAC, GROUP_MAC, OVERRIDE, all_nodes,
    rig::*,
    support::{icmpv6, link_layer, solicitation},
    tap::{Heard, Tap},
};

const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x66];

fn probing(lan: &Lan, backend: NdpBackend) -> Node {
    Node::start(lan, Role { probes: true, ..Role::new("a", backend) })
}

fn conflict(mac: [u8; 6], probed: bool) -> Vec<Conflict> {
    vec![Conflict { address: pod(1), mac: Mac(mac), probed }]
}

fn wait_conflicts(node: &Node) -> Vec<Conflict> {
    until("a conflict", || Some(node.conflicts()).filter(|conflicts| !conflicts.is_empty()))
}

/// An advertisement that overrides what neighbours know, of the node.
fn overriding(heard: &Heard) -> Option<[u8; 6]> {
    let advertised = heard.advertisement().filter(|advertised| advertised.target == pod(1))?;
    (advertised.flags & OVERRIDE != 0 && advertised.from_mac == MAC_A).then_some(advertised.from_mac)
}

/// An unsolicited advertisement for the pod's address.
fn claim(mac: [u8; 6]) -> Vec<u8> {
    let mut message = vec![136, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(pod(1).octets());
    message.extend(link_layer(2, mac));
    icmpv6((ALL_NODES_MAC, mac), pod(1), all_nodes(), 255, &message)
}

//= RFC 4429 3.3/use
pub(crate) fn a_host_that_has_the_address_is_a_conflict(backend: NdpBackend) {
    let lan = Lan::new();
    lan.run_ip("host", &format!("addr add {}/128 dev eth0 nodad", pod(1)));
    let node = probing(&lan, backend);
    let tap = Tap::open(&lan, "host");
    node.reconcile(&[pod(1)]);
    assert_eq!(wait_conflicts(&node), conflict(HOST_MAC, true));
    let overridden = tap.all(Duration::from_millis(2500), overriding);
    assert_eq!(overridden, [] as [[u8; 6]; 0], "it is another's, and is left to it");
    // Another address, as the server would choose, is nobody's.
    node.reconcile(&[pod(2)]);
    tap.find("the new address is announced", |heard| {
        heard.advertisement().filter(|a| a.target == pod(2) && a.flags & OVERRIDE != 0)
    });
    assert_eq!(node.conflicts(), []);
}

/// The node's probe, as the host hears it.
fn probe(tap: &Tap) -> Vec<u8> {
    tap.find("the node's probe", |heard| {
        (heard.solicitation()? == (pod(1), true)).then(|| heard.bytes.clone())
    })
}

pub(crate) fn anothers_probe_at_the_same_time_is_a_conflict(backend: NdpBackend) {
    let lan = Lan::new();
    let node = probing(&lan, backend);
    let tap = Tap::open(&lan, "host");
    node.reconcile(&[pod(1)]);
    probe(&tap);
    let message = solicitation(pod(1), &[14, 1, 9, 9, 9, 9, 9, 9]);
    tap.send(&icmpv6((GROUP_MAC, OTHER_MAC), Ipv6Addr::UNSPECIFIED, group(), 255, &message));
    assert_eq!(wait_conflicts(&node), conflict(OTHER_MAC, true));
}

/// Whether a socket of the node sees every packet: one of protocol `ETH_P_ALL` (0003).
fn hears_everything(lan: &Lan) -> bool {
    let sockets = lan.on("a", || std::fs::read_to_string("/proc/thread-self/net/packet").unwrap());
    sockets.lines().skip(1).any(|line| line.split_whitespace().nth(3) == Some("0003"))
}

/// RFC 7527: a hub that sends everything back, with another MAC address to make it worse.
pub(crate) fn an_echo_of_the_probe_is_no_conflict(backend: NdpBackend) {
    let lan = Lan::new();
    let node = probing(&lan, backend);
    let tap = Tap::open(&lan, "host");
    node.reconcile(&[pod(1)]);
    let mut echo = probe(&tap);
    assert!(hears_everything(&lan), "others' probes are listened for");
    assert_eq!(echo[78..80], [14, 1], "a nonce: {echo:02x?}");
    tap.send(&echo);
    echo[6..12].copy_from_slice(&OTHER_MAC);
    tap.send(&echo);
    tap.find("the address is announced", overriding);
    until("no socket sees every packet any more", || (!hears_everything(&lan)).then_some(()));
    assert_eq!(node.conflicts(), []);
    // Now it is the node's, and another that probes for it is answered (RFC 4862 section 5.4.3).
    tap.clear();
    let message = solicitation(pod(1), &[14, 1, 9, 9, 9, 9, 9, 9]);
    tap.send(&icmpv6((GROUP_MAC, OTHER_MAC), Ipv6Addr::UNSPECIFIED, group(), 255, &message));
    tap.find("an answer", |heard| {
        heard.advertisement().filter(|a| a.to == all_nodes() && a.flags & OVERRIDE == 0)
    });
    assert_eq!(node.conflicts(), []);
}

pub(crate) fn a_later_claim_is_a_conflict(backend: NdpBackend) {
    let lan = Lan::new();
    let mut node = Node::start(&lan, Role::new("a", backend));
    node.reconcile(&[pod(1)]);
    // Also of an address that this agent has not announced.
    node.restart();
    node.reconcile(&[pod(1)]);
    let tap = Tap::open(&lan, "host");
    let mut forwarded = claim(OTHER_MAC);
    forwarded[21] = 254;
    let mut other_pod = claim(OTHER_MAC);
    other_pod[70] ^= 0x40;
    crate::support::fix_icmpv6(&mut other_pod);
    for harmless in [forwarded, other_pod, claim(MAC_A)] {
        tap.send(&harmless);
    }
    for _ in 0..100 {
        tap.send(&claim(OTHER_MAC));
    }
    assert_eq!(wait_conflicts(&node), conflict(OTHER_MAC, false), "and nothing of the three before");
    tap.send(&claim(OTHER_MAC));
    tap.all(Duration::from_millis(300), |_| Some(()));
    assert_eq!(node.conflicts(), [], "one of a hundred is told");
}
