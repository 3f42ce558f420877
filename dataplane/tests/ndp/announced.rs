//! What the node says of its own accord, and what it does to its neighbours.

use std::{
    fs,
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use dataplane::NdpBackend;
use dataplane_core::Action;

use crate::{
    ALL_NODES_MAC, ALL_ROUTERS_MAC, OVERRIDE, ROUTER, all_nodes, all_routers,
    rig::*,
    tap::{Advertised, Heard, Tap},
};

fn advertisement(heard: &Heard) -> Option<Advertised> {
    heard.advertisement()
}

fn to_nodes(mac: [u8; 6], target: Ipv6Addr) -> Advertised {
    Advertised {
        to_mac: ALL_NODES_MAC,
        from_mac: mac,
        source: target,
        to: all_nodes(),
        flags: ROUTER | OVERRIDE,
        target,
        mac: Some(mac),
    }
}

fn to_routers(mac: [u8; 6], target: Ipv6Addr) -> Advertised {
    Advertised { to_mac: ALL_ROUTERS_MAC, to: all_routers(), flags: ROUTER, ..to_nodes(mac, target) }
}

/// The four frames about an address, and no fifth.
fn expect_announcement(tap: &Tap, mac: [u8; 6], target: Ipv6Addr) {
    let (nodes, routers) = (to_nodes(mac, target), to_routers(mac, target));
    for expected in [nodes.clone(), routers, nodes.clone(), nodes] {
        assert_eq!(tap.find("an announcement", advertisement), expected);
    }
    assert_eq!(tap.all(Duration::from_millis(1200), advertisement), [], "one more announcement");
}

//= RFC 9131 6.1.2/announce
pub(crate) fn a_new_address_is_announced_and_a_restart_says_nothing(backend: NdpBackend) {
    let lan = Lan::new();
    let mut node = Node::start(&lan, Role::new("a", backend));
    let tap = Tap::open(&lan, "host");
    let ops = node.reconcile(&[pod(1)]);
    assert!(ops.iter().any(|op| matches!(op.action, Action::NdpSet { .. } | Action::ProxyAdd { .. })));
    expect_announcement(&tap, MAC_A, pod(1));
    node.restart();
    assert_eq!(node.reconcile(&[pod(1)]), []);
    assert_eq!(tap.all(Duration::from_millis(1200), advertisement), [], "everything was as it should be");
    // A second pod is no news of the first.
    node.reconcile(&[pod(1), pod(2)]);
    expect_announcement(&tap, MAC_A, pod(2));
    // A machine that was started anew holds nothing: everything is announced.
    node.teardown();
    node.restart();
    node.reconcile(&[pod(1)]);
    expect_announcement(&tap, MAC_A, pod(1));
}

/// The host asks, and not again for longer than the test takes.
fn ask_too_early(lan: &Lan, address: Ipv6Addr) -> UdpSocket {
    lan.on("host", || {
        fs::write("/proc/sys/net/ipv6/neigh/eth0/retrans_time_ms", "60000").unwrap();
        let socket = UdpSocket::bind(("::", 0)).unwrap();
        socket.send_to(b"early", (address, ECHO)).unwrap();
        socket
    })
}

pub(crate) fn a_host_that_asked_too_early_gets_through_at_once(backend: NdpBackend) {
    let lan = Lan::new();
    let waiting = |lan: &Lan| lan.neighbour("host", pod(1)).is_some_and(|(_, state)| state == "INCOMPLETE");
    let silent = Node::start(&lan, Role { announces: false, ..Role::new("b", backend) });
    let early = ask_too_early(&lan, pod(1));
    until("the host waits for an answer", || waiting(&lan).then_some(()));
    let tap = Tap::open(&lan, "host");
    silent.reconcile(&[pod(1)]);
    assert_eq!(tap.all(Duration::from_millis(300), advertisement), []);
    assert!(waiting(&lan), "without an announcement the host goes on waiting");
    silent.teardown();

    let node = Node::start(&lan, Role::new("a", backend));
    node.reconcile(&[pod(1)]);
    let _echo = Echo::start(&node.pod_namespace(pod(1)));
    until("the host knows where it is", || {
        lan.neighbour("host", pod(1)).is_some_and(|(mac, _)| mac == text(MAC_A)).then_some(())
    });
    early.set_read_timeout(Some(patience())).unwrap();
    let mut buffer = [0; 16];
    early.send_to(b"early", (pod(1), ECHO)).unwrap();
    assert_eq!(early.recv(&mut buffer).expect("the host gets through"), 5);
}

/// Linux ignores an advertisement for an entry that has failed, but it asks anew for the next packet.
pub(crate) fn a_host_that_gave_up_gets_through_with_its_next_packet(backend: NdpBackend) {
    let lan = Lan::new();
    lan.on("host", || {
        fs::write("/proc/sys/net/ipv6/neigh/eth0/retrans_time_ms", "20").unwrap();
        let socket = UdpSocket::bind(("::", 0)).unwrap();
        socket.send_to(b"early", (pod(1), ECHO)).unwrap();
    });
    until("the host has given up", || {
        lan.neighbour("host", pod(1)).is_none_or(|(_, state)| state == "FAILED").then_some(())
    });
    let node = Node::start(&lan, Role::new("a", backend));
    node.reconcile(&[pod(1)]);
    assert!(lan.pings("host", &pod(1).to_string()), "one echo request, one answer");
}

//= RFC 9131 6.1.2/announce
pub(crate) fn a_router_has_an_entry_before_the_first_packet(backend: NdpBackend) {
    let lan = Lan::new();
    // RFC 9131 in Linux, since 5.19.
    let accepts = lan.on("host", || {
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        fs::write("/proc/sys/net/ipv6/conf/eth0/accept_untracked_na", "1").is_ok()
    });
    if !accepts {
        eprintln!("skipped: a router's entry: needs the sysctl accept_untracked_na (Linux 5.19)");
        return;
    }
    let node = Node::start(&lan, Role::new("a", backend));
    let tap = Tap::open(&lan, "a");
    node.reconcile(&[pod(1)]);
    until("the router has an entry", || {
        let entry = lan.neighbour("host", pod(1));
        entry.is_some_and(|entry| entry == (text(MAC_A), "STALE".to_owned())).then_some(())
    });
    tap.clear();
    assert!(lan.pings("host", &pod(1).to_string()), "the first packet");
    let asked =
        |heard: &Heard| heard.bytes.starts_with(&[0x33, 0x33]).then(|| heard.solicitation()).flatten();
    assert_eq!(tap.all(Duration::from_millis(100), asked), [], "the router has asked around");
}

pub(crate) fn a_neighbour_follows_an_address_to_its_new_node(backend: NdpBackend) {
    let without = blindness(backend, false);
    assert_eq!(without, None, "a neighbour that is told nothing believes what it knows");
    let with = blindness(backend, true).expect("the neighbour follows");
    eprintln!("{backend}: a LAN neighbour was blind for {with:?}");
    assert!(with < patience());
}

/// For how long a host that talks to a pod hears nothing after the pod's address, and what listens there, is on
/// another node; `None` when it is longer than it should be by far.
fn blindness(backend: NdpBackend, announces: bool) -> Option<Duration> {
    const LONG: Duration = Duration::from_secs(3);
    let lan = Lan::new();
    // Left to itself the host doubts an entry after 15 to 45 seconds.
    let reachable = "/proc/sys/net/ipv6/neigh/eth0/base_reachable_time_ms";
    lan.on("host", || fs::write(reachable, "600000").unwrap());
    // And at once one that was announced: only who asked has it for sure.
    let from = Role { announces: false, ..Role::new("a", backend) };
    let to = Role { announces, ..Role::new("b", backend) };
    let (from, to) = (Node::start(&lan, from), Node::start(&lan, to));
    from.reconcile(&[pod(1)]);
    let _old = Echo::start(&from.pod_namespace(pod(1)));
    let stream = lan.on("host", || UdpSocket::bind(("::", 0)).unwrap());
    stream.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
    until("the host talks to the pod", || echoes(&stream, pod(1)).then_some(()));
    until("the host has an entry", || {
        lan.neighbour("host", pod(1)).is_some_and(|(mac, _)| mac == text(MAC_A)).then_some(())
    });
    // As a node that dies: its uplink hears and says no more.
    lan.run_ip("sw", "link set port-a down");
    // So that nothing but the neighbour entry is in the way.
    to.reconcile(&[]);
    let begun = Instant::now();
    to.reconcile(&[pod(1)]);
    let _new = Echo::start(&to.pod_namespace(pod(1)));
    let made = begun.elapsed();
    while begun.elapsed() < LONG + made {
        if echoes(&stream, pod(1)) {
            return Some(begun.elapsed().saturating_sub(made));
        }
    }
    if announces {
        until("the neighbour follows late", || echoes(&stream, pod(1)).then(|| Some(begun.elapsed())))
    } else {
        None
    }
}

fn echoes(stream: &UdpSocket, address: Ipv6Addr) -> bool {
    let _ = stream.send_to(b"echo", SocketAddr::from((address, ECHO)));
    stream.recv(&mut [0; 16]).is_ok()
}

pub(crate) fn a_new_mac_address_is_announced(backend: NdpBackend) {
    const NEW: [u8; 6] = [2, 0, 0, 0, 0, 0x1a];
    let lan = Lan::new();
    let node = Node::start(&lan, Role::new("a", backend));
    let tap = Tap::open(&lan, "host");
    node.reconcile(&[pod(1)]);
    expect_announcement(&tap, MAC_A, pod(1));
    lan.run_ip("a", &format!("link set eth0 address {}", text(NEW)));
    let of_pod = |heard: &Heard| heard.advertisement().filter(|advertised| advertised.target == pod(1));
    assert_eq!(tap.find("an announcement", of_pod), to_nodes(NEW, pod(1)));
    node.reconcile(&[pod(1)]);
    tap.send(&crate::ask(pod(1)));
    let solicited = |heard: &Heard| of_pod(heard).filter(|advertised| advertised.to == host());
    let answer = tap.find("an answer", solicited);
    assert_eq!((answer.from_mac, answer.mac), (NEW, Some(NEW)));
}

pub(crate) fn addresses_are_announced_again_when_the_carrier_is_back(backend: NdpBackend) {
    let lan = Lan::new();
    let node = Node::start(&lan, Role::new("a", backend));
    let tap = Tap::open(&lan, "host");
    node.reconcile(&[pod(1)]);
    expect_announcement(&tap, MAC_A, pod(1));
    lan.run_ip("sw", "link set port-a down");
    // The kernel tells of a change some time later, and of one that was undone by then not at all.
    until("the node sees the loss of its carrier", || {
        let state = lan.ip("a", &["link", "show", "eth0"])[0]["operstate"].clone();
        (state != "UP").then_some(())
    });
    lan.run_ip("sw", "link set port-a up");
    let of_pod = |heard: &Heard| heard.advertisement().filter(|advertised| advertised.target == pod(1));
    assert_eq!(tap.find("an announcement", of_pod), to_nodes(MAC_A, pod(1)));
}
