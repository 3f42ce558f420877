//! `pod_guard` run by the kernel on crafted frames, and against the host's build of the same logic.

#[path = "bpf/support.rs"]
mod support;

use std::net::{Ipv4Addr, Ipv6Addr};

use dataplane::bpf::{Bpf, GuardEntry, Program::PodGuard};
use dataplane_common::{
    guard::{self, Entry, Verdict},
    ipv6::Address,
};
use support::*;

/// Test runs come from the loopback.
const IFINDEX: u32 = 1;
const POD_MAC: [u8; 6] = [2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];
const HOST_MAC: [u8; 6] = [6, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];
const MACS: ([u8; 6], [u8; 6]) = (HOST_MAC, POD_MAC);
const POD4: Ipv4Addr = Ipv4Addr::new(10, 254, 1, 9);

fn addr(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

fn pod() -> Ipv6Addr {
    addr("fd12:3456:789a:1:aaaa:bbbb:cc12:3456")
}

fn peer() -> Ipv6Addr {
    addr("fd12:3456:789a:2::9")
}

fn gateway() -> Ipv6Addr {
    addr("fe80::1")
}

fn entry() -> GuardEntry {
    GuardEntry {
        ipv6: pod(),
        ipv4: POD4,
        pod_ipv4: "10.254.0.0/20".parse().unwrap(),
        pod_mac: POD_MAC,
        host_mac: HOST_MAC,
    }
}

fn open(pins: &Pins) -> Bpf {
    let mut bpf = pins.open();
    bpf.set_guard(IFINDEX, entry()).unwrap();
    bpf
}

type Case = (&'static str, &'static str, Vec<u8>);

/// IPv4 of the pod with its MAC addresses.
fn v4(protocol: u8, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), rest: Transport) -> Vec<u8> {
    let mut frame = ipv4(protocol, from, to, rest);
    frame[..6].copy_from_slice(&HOST_MAC);
    frame[6..12].copy_from_slice(&POD_MAC);
    frame
}

fn tcp(to: Ipv6Addr) -> Vec<u8> {
    ipv6(MACS, pod(), to, 6, 64, &[0; 20])
}

fn icmp(to: Ipv6Addr, kind: u8) -> Vec<u8> {
    icmpv6(MACS, pod(), to, 255, &[vec![kind], vec![0; 31]].concat())
}

fn udp6(from: u16, to: u16) -> Vec<u8> {
    ipv6(MACS, pod(), peer(), 17, 64, &ports(from, to))
}

fn ports(from: u16, to: u16) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 8, 0, 0]].concat()
}

/// Behind `headers` extension headers of 8 bytes each.
fn extended(hop_limit: u8, headers: usize, upper: u8, payload: &[u8]) -> Vec<u8> {
    let next = |n: usize| if n + 1 == headers { upper } else { 60 };
    let chain: Vec<u8> = (0..headers).flat_map(|n| [next(n), 0, 1, 4, 0, 0, 0, 0]).collect();
    ipv6(MACS, pod(), peer(), 60, hop_limit, &[&chain, payload].concat())
}

/// A fragment of the packet whose upper layer begins with `payload`.
fn fragment(offset: u8, upper: u8, payload: &[u8]) -> Vec<u8> {
    ipv6(MACS, pod(), peer(), 44, 64, &[&[upper, 0, 0, offset << 3 | 1, 0, 0, 0, 7], payload].concat())
}

/// A report of version 2 behind hop-by-hop options with a router alert (RFC 3810 section 5.2).
fn report(source: Ipv6Addr) -> Vec<u8> {
    let payload = [&[58, 0, 5, 2, 0, 0, 1, 0, 143][..], &[0; 27]].concat();
    ipv6(MACS, source, addr("ff02::16"), 0, 1, &payload)
}

/// With options of 4 bytes: the header grows, and what follows moves.
fn with_options(mut frame: Vec<u8>, options: [u8; 4]) -> Vec<u8> {
    frame[14] = 0x46;
    frame.splice(34..34, options);
    frame
}

/// An ICMP message of IPv4.
fn icmp4(kind: u8) -> Vec<u8> {
    let mut frame = v4(1, (POD4, 0), outside(), Transport::Udp);
    frame[34] = kind;
    frame
}

fn with(mut frame: Vec<u8>, at: usize, byte: u8) -> Vec<u8> {
    frame[at] = byte;
    frame
}

fn outside() -> (Ipv4Addr, u16) {
    ([198, 51, 100, 2].into(), 80)
}

fn passes() -> Vec<Case> {
    let me = (POD4, 40_000);
    vec![
        ("IPv6 TCP", "pass", tcp(peer())),
        ("IPv6 to the gateway", "pass", tcp(gateway())),
        ("echo request", "pass", icmp(peer(), 128)),
        ("packet too big", "pass", icmp(peer(), 2)),
        ("a first fragment", "pass", fragment(0, 6, &[0; 20])),
        ("IPv6 UDP", "pass", udp6(546, 547)),
        ("TCP behind extension headers", "pass", extended(64, 4, 6, &[0; 20])),
        ("a later fragment whose data looks like an advertisement", "pass", fragment(1, 58, &[134, 0])),
        ("IPv4 echo request", "pass", icmp4(8)),
        ("IPv4 TCP", "pass", v4(6, me, outside(), Transport::Tcp(2))),
        ("IPv4 UDP", "pass", v4(17, me, outside(), Transport::Udp)),
        (
            "IPv4 beside the range of the pods",
            "pass",
            v4(17, me, ([10, 254, 16, 1].into(), 1), Transport::Udp),
        ),
        ("a later fragment whose data looks like port 67", "pass", {
            let mut f = v4(17, (POD4, 67), outside(), Transport::Udp);
            f[21] = 1;
            f
        }),
    ]
}

fn drops() -> Vec<Case> {
    let me = (POD4, 40_000);
    let other = addr("fd12:3456:789a:1:aaaa:bbbb:cd12:3456");
    let ns =
        |source, to, target, options: &[u8]| icmpv6(MACS, source, to, 255, &solicitation(target, options));
    vec![
        ("another's MAC address, IPv6", "drop_source_mac", with(tcp(peer()), 11, 1)),
        (
            "another's MAC address, IPv4",
            "drop_source_mac",
            with(v4(6, me, outside(), Transport::Tcp(2)), 6, 1),
        ),
        ("another's IPv6 address", "drop_source_address", with(tcp(peer()), 37, 1)),
        ("a link-local source", "drop_source_address", ipv6(MACS, addr("fe80::9"), peer(), 6, 64, &[0; 20])),
        ("no source", "drop_source_address", ipv6(MACS, addr("::"), addr("ff02::16"), 0, 1, &[0; 8])),
        ("a report of groups, without a source", "drop_mld", report(addr("::"))),
        ("a report of groups", "drop_mld", report(pod())),
        ("a query for groups, without options", "drop_mld", icmp(addr("ff02::1"), 130)),
        (
            "another's IPv4 address",
            "drop_source_ipv4",
            v4(6, ([10, 254, 1, 8].into(), 1), outside(), Transport::Tcp(2)),
        ),
        ("router advertisement", "drop_router_advertisement", icmp(addr("ff02::1"), 134)),
        ("unicast router advertisement", "drop_router_advertisement", icmp(peer(), 134)),
        ("redirect", "drop_redirect", icmp(peer(), 137)),
        ("neighbour advertisement", "drop_neighbour_advertisement", icmp(peer(), 136)),
        ("router solicitation", "drop_router_solicitation", icmp(addr("ff02::2"), 133)),
        ("router solicitation to the gateway", "drop_router_solicitation", icmp(gateway(), 133)),
        ("IPv4 redirect", "drop_redirect", icmp4(5)),
        ("IPv4 router advertisement", "drop_router_advertisement", icmp4(9)),
        ("solicitation for another", "drop_solicitation", ns(pod(), peer(), peer(), &link_layer(1, POD_MAC))),
        (
            "solicitation for the gateway, malformed",
            "drop_solicitation",
            with(ns(pod(), gateway(), gateway(), &[]), 57, 0),
        ),
        (
            "what could hide an advertisement",
            "drop_extension_header",
            ipv6(MACS, pod(), gateway(), 60, 255, &[58, 0, 1, 4, 0, 0, 0, 0, 134, 0]),
        ),
        (
            "an advertisement behind extension headers",
            "drop_extension_header",
            extended(64, 2, 58, &[134, 0, 0, 0]),
        ),
        ("an advertisement in a first fragment", "drop_extension_header", fragment(0, 58, &[134, 0, 0, 0])),
        ("a first fragment without its upper layer", "drop_header", fragment(0, 58, &[])),
        ("too many extension headers", "drop_extension_header", extended(64, 5, 6, &[0; 20])),
        (
            "a DHCPv6 server behind extension headers",
            "drop_dhcp_server",
            extended(64, 1, 17, &ports(547, 546)),
        ),
        ("to another pod's link-local address", "drop_link_local", tcp(addr("fe80::2"))),
        ("IPv6 multicast", "drop_multicast", tcp(addr("ff02::fb"))),
        ("IPv4 multicast", "drop_multicast", v4(17, me, ([224, 0, 0, 251].into(), 5353), Transport::Udp)),
        ("IPv4 broadcast", "drop_multicast", v4(17, me, (Ipv4Addr::BROADCAST, 67), Transport::Udp)),
        (
            "IPv4 to another pod",
            "drop_ipv4_between_pods",
            v4(6, me, ([10, 254, 1, 10].into(), 80), Transport::Tcp(2)),
        ),
        ("DHCP server", "drop_dhcp_server", v4(17, (POD4, 67), outside(), Transport::Udp)),
        ("DHCP to a client", "drop_dhcp_server", v4(17, me, ([198, 51, 100, 2].into(), 68), Transport::Udp)),
        ("DHCPv6 server", "drop_dhcp_server", udp6(547, 1)),
        ("DHCPv6 to a client", "drop_dhcp_server", udp6(1, 546)),
        (
            "a loose source route",
            "drop_ipv4_options",
            with_options(v4(17, me, outside(), Transport::Udp), [131, 3, 4, 0]),
        ),
        ("ARP", "drop_arp", [&[0xff; 6][..], &POD_MAC, &[8, 6], &[0; 42]].concat()),
        ("VLAN", "drop_vlan", [&HOST_MAC[..], &POD_MAC, &[0x81, 0], &[0; 46]].concat()),
        ("service VLAN", "drop_vlan", [&HOST_MAC[..], &POD_MAC, &[0x88, 0xa8], &[0; 46]].concat()),
        ("LLDP", "drop_ether_type", [&HOST_MAC[..], &POD_MAC, &[0x88, 0xcc], &[0; 46]].concat()),
        (
            "version 6 with the EtherType of IPv4",
            "drop_header",
            with(v4(6, me, outside(), Transport::Tcp(2)), 14, 0x65),
        ),
        ("version 4 with the EtherType of IPv6", "drop_header", with(tcp(peer()), 14, 0x45)),
        (
            "another of that source, own address spoofed in the middle",
            "drop_source_address",
            ipv6(MACS, other, peer(), 6, 64, &[0; 20]),
        ),
    ]
}

//= RFC 6105 3/stateless, RFC 7113 3/header-chain, RFC 7113 3/first-fragment, RFC 7113 3/hop-limit
//= RFC 7113 3/others
#[test]
fn the_table_holds() {
    if !may_run("pod_guard table") {
        return;
    }
    let pins = Pins::new("guard-table");
    let mut bpf = open(&pins);
    for (name, counter, packet) in passes().into_iter().chain(drops()) {
        let before = pins.count("pod_guard", counter);
        let (verdict, out) = run(&mut bpf, PodGuard, &packet);
        assert_eq!(verdict, if counter == "pass" { NEXT } else { DROP }, "{name}: {:?}", pins.counters());
        assert_eq!(pins.count("pod_guard", counter), before + 1, "{name}: {counter}; {:?}", pins.counters());
        assert_eq!(out, packet, "{name}: the frame is left as it is");
    }
}

#[test]
fn the_gateway_is_answered_for() {
    if !may_run("pod_guard gateway") {
        return;
    }
    let pins = Pins::new("guard-gateway");
    let mut bpf = open(&pins);
    let mut message = vec![136, 0, 0, 0, 0xe0, 0, 0, 0];
    message.extend(gateway().octets());
    message.extend(link_layer(2, HOST_MAC));
    let answer = icmpv6((POD_MAC, HOST_MAC), gateway(), pod(), 255, &message);
    for (to, options) in [
        (addr("ff02::1:ff00:1"), link_layer(1, POD_MAC)),
        (gateway(), link_layer(1, POD_MAC)),
        (gateway(), vec![]),
    ] {
        let packet = icmpv6(MACS, pod(), to, 255, &solicitation(gateway(), &options));
        assert_eq!(run(&mut bpf, PodGuard, &packet), (REDIRECT, answer.clone()), "to {to}");
    }
    assert_eq!(pins.count("pod_guard", "answered"), 3);
}

#[test]
fn an_interface_without_an_entry_passes_nothing() {
    if !may_run("pod_guard no entry") {
        return;
    }
    let pins = Pins::new("guard-none");
    let mut bpf = open(&pins);
    assert_eq!(bpf.guards().unwrap().into_iter().collect::<Vec<_>>(), [(IFINDEX, entry())]);
    bpf.remove_guard(IFINDEX).unwrap();
    bpf.remove_guard(IFINDEX).unwrap();
    assert_eq!(run(&mut bpf, PodGuard, &tcp(peer())).0, DROP);
    assert_eq!(pins.count("pod_guard", "drop_no_entry"), 1);
}

/// The same source compiled for the kernel and for the host must do the same with every frame.
#[test]
fn the_kernels_build_and_the_hosts_agree_on_20_000_mutations() {
    if !may_run("pod_guard differential") {
        return;
    }
    const SEED: u64 = 0x6775_6172_6400;
    let pins = Pins::new("guard-diff");
    let mut bpf = open(&pins);
    let entry = Entry {
        ipv6: Address::new(pod().octets()),
        ipv4: u32::from_ne_bytes(POD4.octets()),
        pod_network: u32::from_ne_bytes([10, 254, 0, 0]),
        pod_mask: u32::from_ne_bytes([255, 255, 240, 0]),
        pod_mac: POD_MAC,
        host_mac: HOST_MAC,
    };
    let seeds: Vec<Vec<u8>> = passes().into_iter().chain(drops()).map(|(_, _, packet)| packet).collect();
    let mut random = Random(SEED);
    let (mut passed, mut dropped) = (0, 0);
    for i in 0..20_000 {
        let frame = mutate(&mut random, &seeds);
        let (verdict, out) = run(&mut bpf, PodGuard, &frame);
        let (want, want_out) = match guard::check(&frame[..], &entry) {
            Verdict::Pass => (NEXT, frame.clone()),
            Verdict::Drop(_) => (DROP, frame.clone()),
            Verdict::Answer(answer) => (REDIRECT, answer.frame().to_vec()),
        };
        assert_eq!((verdict, &out), (want, &want_out), "seed {SEED:#x}, mutation {i}: {frame:02x?}");
        passed += u32::from(want == NEXT);
        dropped += u32::from(want == DROP);
    }
    assert!(passed > 1_000 && dropped > 1_000, "{passed} passed, {dropped} dropped");
}

fn mutate(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut frame = seeds[random.below(seeds.len())].clone();
    frame.resize(frame.len().max(FRAME_BYTES_MIN), 0);
    for _ in 0..random.below(3) {
        let at = random.below(frame.len());
        frame[at] = random.next() as u8;
    }
    frame.truncate(FRAME_BYTES_MIN + random.below(frame.len() - FRAME_BYTES_MIN + 1));
    frame
}
