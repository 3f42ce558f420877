//! The masquerade in `uplink_egress` and `uplink_ingress`, run by the kernel on crafted frames, and
//! against the host's build of the same logic.

#[path = "bpf/support.rs"]
mod support;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, UdpSocket},
    thread,
    time::Duration,
};

use dataplane::Filtering;
use dataplane::bpf::{
    Bpf, BpfOptions, GuardEntry, Masquerade, Program, Program::UplinkBackstop, Program::UplinkEgress,
    Program::UplinkIngress, monotonic_ns,
};
use dataplane_common::{
    checksum::sum_bytes,
    masquerade::{
        Config, Ipv4, NODES_MAX, Pool, TCP_CLOSED_RECLAIM_NS, TCP_TRANSITORY_TIMEOUT_NS, UDP_TIMEOUT_NS,
        memory::Memory,
    },
};
use support::*;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;

const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
const POD: Ipv4Addr = Ipv4Addr::new(10, 254, 0, 5);
const OTHER_POD: Ipv4Addr = Ipv4Addr::new(10, 254, 0, 6);
const REMOTE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const OTHER_REMOTE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 3);

fn masquerade() -> Masquerade {
    masquerade_to(NODE)
}

fn alone(test: &str, body: impl FnOnce(&Pins, &mut Bpf) + Send) {
    alone_with(test, &BpfOptions::default(), body);
}

fn alone_with(test: &str, options: &BpfOptions, body: impl FnOnce(&Pins, &mut Bpf) + Send) {
    support::alone(test, |pins| {
        let mut bpf = pins.open_with(options);
        bpf.set_masquerade(Some(&masquerade())).unwrap();
        body(pins, &mut bpf);
    });
}

fn out(bpf: &mut Bpf, frame: &[u8]) -> (i32, Vec<u8>) {
    run(bpf, UplinkEgress, frame)
}

fn back(bpf: &mut Bpf, frame: &[u8]) -> (i32, Vec<u8>) {
    run(bpf, UplinkIngress, frame)
}

fn source_port(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[34], frame[35]])
}

/// Sends one packet of a flow and expects it translated.
fn open_flow(
    bpf: &mut Bpf,
    protocol: u8,
    from: (Ipv4Addr, u16),
    to: (Ipv4Addr, u16),
    rest: Transport,
) -> Vec<u8> {
    let (verdict, frame) = out(bpf, &ipv4(protocol, from, to, rest));
    assert_eq!(verdict, NEXT);
    assert_eq!(frame[26..30], NODE.octets());
    frame
}

#[test]
fn each_protocol_leaves_with_the_nodes_address_and_its_reply_comes_back() {
    alone("masq-protocols", |pins, bpf| {
        let to = (REMOTE, 80);
        let (port, id) = (home(5, 1), home(5, 2));
        for (protocol, request, reply, ports) in [
            (TCP, Transport::Tcp(SYN), Transport::Tcp(SYN_ACK), (port, 80)),
            (UDP, Transport::Udp, Transport::Udp, (port, 80)),
            (ICMP, Transport::Icmp(8, id), Transport::Icmp(0, id), (0, 0)),
        ] {
            let sent = ipv4(protocol, (POD, ports.0), to, request.clone());
            let translated = ipv4(protocol, (NODE, ports.0), to, request);
            assert_eq!(out(bpf, &sent), (NEXT, translated), "{protocol} out: {:?}", pins.counters());
            let answer = ipv4(protocol, to, (NODE, ports.0), reply.clone());
            let delivered = ipv4(protocol, to, (POD, ports.0), reply);
            assert_eq!(back(bpf, &answer), (NEXT, delivered), "{protocol} in: {:?}", pins.counters());
        }
        assert_eq!(pins.count("masquerade_egress", "new_flow"), 3);
        assert_eq!(pins.count("masquerade_egress", "translated"), 3);
        assert_eq!(pins.count("masquerade_ingress", "translated"), 3);
    });
}

#[test]
fn udp_without_a_checksum_stays_without() {
    alone("masq-nosum", |_, bpf| {
        let port = home(5, 1);
        let mut sent = ipv4(UDP, (POD, port), (REMOTE, 7), Transport::Udp);
        sent[40..42].fill(0);
        let (_, frame) = out(bpf, &sent);
        assert_eq!((&frame[26..30], &frame[40..42]), (&NODE.octets()[..], &[0, 0][..]));
        let mut answer = ipv4(UDP, (REMOTE, 7), (NODE, port), Transport::Udp);
        answer[40..42].fill(0);
        let (_, frame) = back(bpf, &answer);
        assert_eq!((&frame[30..34], &frame[40..42]), (&POD.octets()[..], &[0, 0][..]));
    });
}

#[test]
fn ip_options_are_stepped_over() {
    alone("masq-options", |_, bpf| {
        let port = home(5, 1);
        let plain = ipv4(TCP, (POD, port), (REMOTE, 80), Transport::Tcp(SYN));
        let mut sent = [&plain[..34], &[1, 1, 1, 0], &plain[34..]].concat();
        sent[14] = 0x46;
        sent[17] += 4;
        sent[24..26].fill(0);
        let sum = sum_bytes(&sent[14..38]).checksum();
        sent[24..26].copy_from_slice(&sum.to_ne_bytes());
        let (verdict, frame) = out(bpf, &sent);
        assert_eq!((verdict, &frame[26..30]), (NEXT, &NODE.octets()[..]));
        assert!(sum_bytes(&frame[14..38]).is_valid());
        let bare = ipv4(TCP, (NODE, port), (REMOTE, 80), Transport::Tcp(SYN));
        assert_eq!(frame[38..], bare[34..], "ports, checksum and data as without options");
    });
}

#[test]
fn what_is_not_of_a_pod_is_left_alone() {
    alone("masq-pass", |pins, bpf| {
        let host = ipv4(TCP, (NODE, 40_000), (REMOTE, 80), Transport::Tcp(SYN));
        assert_eq!(out(bpf, &host), (NEXT, host.clone()));
        let beside = ipv4(UDP, ([10, 254, 16, 0].into(), 1), (REMOTE, 80), Transport::Udp);
        assert_eq!(out(bpf, &beside), (NEXT, beside.clone()));
        let six =
            ipv6(([2; 6], [4; 6]), "fd00::1".parse().unwrap(), "fd00::2".parse().unwrap(), 6, 64, &[0; 20]);
        assert_eq!(out(bpf, &six), (NEXT, six.clone()));
        assert_eq!(back(bpf, &six), (NEXT, six.clone()));
        let elsewhere = ipv4(TCP, (REMOTE, 80), ([192, 0, 2, 99].into(), 40_000), Transport::Tcp(ACK));
        assert_eq!(back(bpf, &elsewhere), (NEXT, elsewhere.clone()));
        let service = ipv4(TCP, (REMOTE, 80), (NODE, 22), Transport::Tcp(SYN));
        assert_eq!(back(bpf, &service), (NEXT, service.clone()));
        assert_eq!(pins.count("masquerade_egress", "pass"), 3);
        assert_eq!(pins.count("masquerade_ingress", "pass"), 2);
        assert_eq!(pins.count("ndp_proxy", "pass"), 1, "IPv6 is not the masquerade's");
    });
}

#[test]
fn no_private_source_leaves_untranslated() {
    alone("masq-drop", |pins, bpf| {
        let to = (REMOTE, 80);
        let mut cut = ipv4(TCP, (POD, 1), to, Transport::Raw(vec![0; 20]));
        cut[17] = 200;
        let mut later = ipv4(UDP, (POD, 1), to, Transport::Udp);
        later[21] = 1;
        for (counter, frame) in [
            ("drop_protocol", ipv4(132, (POD, 0), to, Transport::Raw(vec![0; 20]))),
            ("drop_protocol", ipv4(ICMP, (POD, 0), to, Transport::Icmp(0, 1))),
            (
                "drop_icmp_error",
                ipv4(ICMP, (POD, 0), to, Transport::Raw(quote(&ipv4(UDP, to, (POD, 9), Transport::Udp)))),
            ),
            ("drop_header", ipv4(TCP, (POD, 0), to, Transport::Raw(vec![0; 17]))),
            ("drop_header", ipv4(UDP, (POD, 0), to, Transport::Raw(vec![0; 7]))),
            ("drop_header", cut),
            ("drop_reset", ipv4(TCP, (POD, 1), to, Transport::Tcp(RST))),
            ("kept_fragment", later),
        ] {
            let mut frame = frame;
            frame.resize(frame.len().max(FRAME_BYTES_MIN), 0);
            let before = pins.count("masquerade_egress", counter);
            assert_eq!(out(bpf, &frame).0, DROP, "{counter}: {:?}", pins.counters());
            assert_eq!(pins.count("masquerade_egress", counter), before + 1, "{:?}", pins.counters());
        }
    });
}

#[test]
fn switched_off_it_passes_everything() {
    alone("masq-off", |_, bpf| {
        assert_eq!(bpf.masquerade().unwrap(), Some(masquerade()));
        bpf.set_masquerade(None).unwrap();
        assert_eq!(bpf.masquerade().unwrap(), None);
        let frame = ipv4(TCP, (POD, 40_000), (REMOTE, 80), Transport::Tcp(SYN));
        assert_eq!(out(bpf, &frame), (NEXT, frame.clone()));
    });
}

#[test]
fn only_the_address_that_was_written_to_comes_in() {
    alone("masq-filter", |pins, bpf| {
        let port = source_port(&open_flow(bpf, UDP, (POD, 4000), (REMOTE, 7), Transport::Udp));
        let other_port = ipv4(UDP, (REMOTE, 8), (NODE, port), Transport::Udp);
        let delivered = ipv4(UDP, (REMOTE, 8), (POD, 4000), Transport::Udp);
        assert_eq!(back(bpf, &other_port), (NEXT, delivered));
        let stranger = ipv4(UDP, (OTHER_REMOTE, 7), (NODE, port), Transport::Udp);
        assert_eq!(back(bpf, &stranger).0, DROP, "without a word");
        assert_eq!(pins.count("masquerade_ingress", "drop_filtered"), 1);
        let open = Masquerade { filtering: Filtering::EndpointIndependent, ..masquerade() };
        bpf.set_masquerade(Some(&open)).unwrap();
        assert_eq!(bpf.masquerade().unwrap(), Some(open));
        assert_eq!(back(bpf, &stranger).1[30..34], POD.octets());
    });
}

#[test]
fn the_backstop_drops_what_nobody_has_translated() {
    alone("masq-backstop", |pins, bpf| {
        let private = ipv4(TCP, (POD, 40_000), (REMOTE, 80), Transport::Tcp(SYN));
        let translated = open_flow(bpf, TCP, (POD, 40_000), (REMOTE, 80), Transport::Tcp(SYN));
        assert_eq!(run(bpf, UplinkBackstop, &private).0, DROP);
        assert_eq!(run(bpf, UplinkBackstop, &translated), (NEXT, translated.clone()));
        assert_eq!(pins.count("backstop", "drop_private"), 1);
        assert_eq!(pins.count("backstop", "pass"), 1);
        bpf.set_masquerade(None).unwrap();
        assert_eq!(run(bpf, UplinkBackstop, &private).0, NEXT, "somebody else translates");
    });
}

/// An ICMP error, port unreachable, about a frame.
fn quote(frame: &[u8]) -> Vec<u8> {
    [&[3, 3, 0, 0, 0, 0, 0, 0][..], &frame[14..42]].concat()
}

/// RFC 4787 REQ-1, RFC 5382 REQ-1.
#[test]
fn one_inside_port_has_one_outside_port_for_all_remotes() {
    alone("masq-eim", |_, bpf| {
        for protocol in [TCP, UDP] {
            let kind = if protocol == TCP { Transport::Tcp(SYN) } else { Transport::Udp };
            let other = open_flow(bpf, protocol, (OTHER_POD, 5000), (REMOTE, 7), kind.clone());
            let first = open_flow(bpf, protocol, (POD, 5000), (REMOTE, 7), kind.clone());
            let second = open_flow(bpf, protocol, (POD, 5000), (OTHER_REMOTE, 9), kind);
            assert_eq!(source_port(&first), source_port(&second));
            assert_ne!(source_port(&first), source_port(&other));
        }
    });
}

#[test]
fn a_port_that_is_not_of_the_pods_block_is_replaced_by_one_that_is() {
    alone("masq-taken", |_, bpf| {
        for (protocol, kind) in [(TCP, Transport::Tcp(SYN)), (UDP, Transport::Udp)] {
            open_flow(bpf, protocol, (OTHER_POD, 40_000), (REMOTE, 80), kind.clone());
            let frame = open_flow(bpf, protocol, (POD, 40_000), (REMOTE, 80), kind);
            let port = source_port(&frame);
            assert!((home(5, 0)..home(5, 0) + 128).contains(&port), "{port}");
            assert!(transport_sum(&frame).is_valid() && sum_bytes(&frame[14..34]).is_valid());
            // And the reply to that port is the second pod's.
            let answer = match protocol {
                TCP => ipv4(TCP, (REMOTE, 80), (NODE, port), Transport::Tcp(SYN_ACK)),
                _ => ipv4(UDP, (REMOTE, 80), (NODE, port), Transport::Udp),
            };
            let delivered = match protocol {
                TCP => ipv4(TCP, (REMOTE, 80), (POD, 40_000), Transport::Tcp(SYN_ACK)),
                _ => ipv4(UDP, (REMOTE, 80), (POD, 40_000), Transport::Udp),
            };
            assert_eq!(back(bpf, &answer), (NEXT, delivered));
        }
        let first = open_flow(bpf, ICMP, (OTHER_POD, 0), (REMOTE, 0), Transport::Icmp(8, 9));
        let second = open_flow(bpf, ICMP, (POD, 0), (REMOTE, 0), Transport::Icmp(8, 9));
        assert_ne!(first[38..40], second[38..40], "echo identifiers");
        assert!(transport_sum(&second).is_valid());
    });
}

#[test]
fn a_port_of_the_hosts_own_socket_is_not_taken() {
    alone("masq-host", |_, bpf| {
        up("lo");
        let (at_udp, at_tcp) = (home(5, 1), home(5, 2));
        let socket = UdpSocket::bind(("0.0.0.0", at_udp)).unwrap();
        let listener = std::net::TcpListener::bind(("0.0.0.0", at_tcp)).unwrap();
        let udp = open_flow(bpf, UDP, (POD, at_udp), (REMOTE, 7), Transport::Udp);
        assert_ne!(source_port(&udp), at_udp);
        let tcp = open_flow(bpf, TCP, (POD, at_tcp), (REMOTE, 7), Transport::Tcp(SYN));
        assert_ne!(source_port(&tcp), at_tcp);
        drop((socket, listener));
        bpf.sweep_flows(monotonic_ns() + 2 * UDP_TIMEOUT_NS).unwrap();
        let udp = open_flow(bpf, UDP, (POD, at_udp), (REMOTE, 7), Transport::Udp);
        assert_eq!(source_port(&udp), at_udp, "free again");
    });
}

/// The frame as a fragment.
fn part(mut frame: Vec<u8>, offset: u8, more: bool) -> Vec<u8> {
    frame[20..22].copy_from_slice(&[if more { 0x20 } else { 0 }, offset]);
    frame[24..26].fill(0);
    let sum = sum_bytes(&frame[14..34]).checksum();
    frame[24..26].copy_from_slice(&sum.to_ne_bytes());
    frame
}

/// On the loopback, where test runs come from, what is released is seen by nobody but the counters. The first
/// fragment, whose packet has carried the others meanwhile, is as it was.
#[test]
fn fragments_that_came_before_their_first_are_sent_when_it_comes() {
    alone("masq-kept", |pins, bpf| {
        up("lo");
        let part = |source, offset: u8| part(ipv4(UDP, source, (REMOTE, 7), Transport::Udp), offset, true);
        let first = part((POD, home(5, 1)), 0);
        for (offset, bytes) in [(5, 46), (200, 1_400), (100, 3_000)] {
            let mut later = part((POD, home(5, 1)), offset);
            later.resize(bytes, offset);
            assert_eq!(out(bpf, &later).0, DROP);
        }
        assert_eq!(pins.count("masquerade_egress", "kept_fragment"), 3);
        assert_eq!(out(bpf, &first), (NEXT, part((NODE, home(5, 1)), 0)), "{:?}", pins.counters());
        assert_eq!(pins.count("masquerade_egress", "released_fragment"), 3);
        assert_eq!(out(bpf, &first).0, NEXT);
        assert_eq!(pins.count("masquerade_egress", "released_fragment"), 3, "once");
    });
}

#[test]
fn fragments_follow_their_first() {
    alone("masq-fragments", |pins, bpf| {
        let fragment = |source, destination, offset: u8, more: bool| {
            part(ipv4(UDP, (source, 4000), (destination, 7), Transport::Udp), offset, more)
        };
        let (verdict, first) = out(bpf, &fragment(POD, REMOTE, 0, true));
        assert_eq!((verdict, &first[26..30]), (NEXT, &NODE.octets()[..]));
        // Of a later fragment only the address changes: it has no ports.
        let (verdict, later) = out(bpf, &fragment(POD, REMOTE, 5, false));
        assert_eq!(verdict, NEXT);
        assert!(sum_bytes(&later[14..34]).is_valid());
        assert_eq!(later[34..], fragment(POD, REMOTE, 5, false)[34..]);
        assert_eq!(out(bpf, &fragment(OTHER_POD, REMOTE, 5, false)).0, DROP, "its first was not seen");
        // The reply: ports are swapped by hand, for the helper gives both ends their own.
        let mut reply = ipv4(UDP, (REMOTE, 7), (NODE, source_port(&first)), Transport::Udp);
        reply[20] = 0x20;
        let (_, delivered) = back(bpf, &reply);
        assert_eq!(delivered[30..34], POD.octets());
        reply[20..22].copy_from_slice(&[0, 5]);
        let (_, delivered) = back(bpf, &reply);
        assert_eq!(delivered[30..34], POD.octets());
        assert_eq!(pins.count("masquerade_egress", "translated_fragment"), 1);
        assert_eq!(pins.count("masquerade_ingress", "translated_fragment"), 1);
    });
}

/// RFC 5508 section 4.2: traceroute and path MTU discovery in pods.
#[test]
fn icmp_errors_about_a_flow_reach_its_pod() {
    alone("masq-errors", |pins, bpf| {
        const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
        for (protocol, kind, port) in [
            (UDP, Transport::Udp, 4000),
            (TCP, Transport::Tcp(SYN), 4000),
            (ICMP, Transport::Icmp(8, 4000), 0),
        ] {
            let inside = ipv4(protocol, (POD, port), (REMOTE, if port == 0 { 0 } else { 7 }), kind);
            let (_, sent) = out(bpf, &inside);
            // TCP's quote ends before its checksum, as RFC 792 allows.
            let length = if protocol == TCP { 28 } else { sent.len() - 14 };
            for error in [3, 11, 12] {
                let quote =
                    |frame: &[u8]| [&[error, 4, 0, 0, 0, 0, 5, 0][..], &frame[14..14 + length]].concat();
                let frame = ipv4(ICMP, (ROUTER, 0), (NODE, 0), Transport::Raw(quote(&sent)));
                let want = ipv4(ICMP, (ROUTER, 0), (POD, 0), Transport::Raw(quote(&inside)));
                assert_eq!(back(bpf, &frame), (NEXT, want), "{protocol} type {error}: {:?}", pins.counters());
            }
        }
        let mut stranger = ipv4(UDP, (NODE, 9), (REMOTE, 9), Transport::Udp)[14..].to_vec();
        stranger.splice(0..0, [3, 3, 0, 0, 0, 0, 0, 0]);
        let frame = ipv4(ICMP, (ROUTER, 0), (NODE, 0), Transport::Raw(stranger));
        assert_eq!(back(bpf, &frame), (NEXT, frame.clone()), "about the host's own packet");
    });
}

#[test]
fn the_sweep_frees_what_has_ended_and_nothing_else() {
    alone("masq-sweep", |_, bpf| {
        open_flow(bpf, UDP, (POD, 4000), (REMOTE, 7), Transport::Udp);
        open_flow(bpf, UDP, (POD, 4001), (REMOTE, 7), Transport::Udp);
        open_flow(bpf, UDP, (POD, 4001), (OTHER_REMOTE, 7), Transport::Udp);
        open_flow(bpf, TCP, (POD, 4000), (REMOTE, 7), Transport::Tcp(SYN));
        out(bpf, &ipv4(TCP, (POD, 4000), (REMOTE, 7), Transport::Tcp(RST)));
        open_flow(bpf, TCP, (POD, 4001), (REMOTE, 7), Transport::Tcp(SYN));
        let now = monotonic_ns();
        assert_eq!(bpf.sweep_flows(now).unwrap().freed, 0);
        let late = now + TCP_TRANSITORY_TIMEOUT_NS + 1_000_000_000;
        assert_eq!(bpf.sweep_flows(late).unwrap().freed, 2, "the two that were never established");
        assert_eq!(bpf.sweep_flows(now + UDP_TIMEOUT_NS + 1_000_000_000).unwrap().freed, 3, "all the rest");
        // Their ports are free for others.
        for n in 0..128 {
            let frame = open_flow(bpf, UDP, (POD, home(5, n)), (REMOTE, 7), Transport::Udp);
            assert_eq!(source_port(&frame), home(5, n));
        }
    });
}

/// The agent may be dead: then the program itself takes over the port of a connection that was closed.
#[test]
fn a_new_flow_takes_the_port_of_a_closed_connection_when_all_of_the_pods_are_taken() {
    alone("masq-reclaim", |pins, bpf| {
        bpf.set_guard(77, guard()).unwrap();
        let taken = fill_ports(bpf, POD);
        assert!((8_000..9_200).contains(&taken.len()), "{}: its home and half of the extras", taken.len());
        let frame = |port| ipv4(TCP, (POD, port), (REMOTE, 80), Transport::Tcp(SYN));
        let refused = (1..=u16::MAX).find(|port| out(bpf, &frame(*port)).0 == DROP).unwrap();
        assert!(pins.count("masquerade_egress", "drop_no_port") > 0);
        let swept = bpf.sweep_flows(monotonic_ns()).unwrap();
        assert!(swept.refused[&POD] > 0 && swept.blocks.len() > 60, "{swept:?}");
        assert!(swept.blocks.values().all(|block| block.ipv4 == POD));
        // Another pod's home is not touched by that.
        let other = open_flow(bpf, TCP, (OTHER_POD, 40_000), (REMOTE, 80), Transport::Tcp(SYN));
        assert!((home(6, 0)..home(6, 0) + 128).contains(&source_port(&other)));
        for (inside, _) in taken.iter().step_by(2) {
            out(bpf, &ipv4(TCP, (POD, *inside), (REMOTE, 80), Transport::Tcp(RST)));
        }
        let before = pins.count("masquerade_egress", "reclaimed");
        thread::sleep(Duration::from_nanos(TCP_CLOSED_RECLAIM_NS) + Duration::from_millis(100));
        let (verdict, sent) = out(bpf, &frame(refused));
        assert_eq!(verdict, NEXT, "{:?}", pins.counters());
        assert_eq!(pins.count("masquerade_egress", "reclaimed"), before + 1);
        let answer = ipv4(TCP, (REMOTE, 80), (NODE, source_port(&sent)), Transport::Tcp(SYN_ACK));
        let delivered = ipv4(TCP, (REMOTE, 80), (POD, refused), Transport::Tcp(SYN_ACK));
        assert_eq!(back(bpf, &answer).1, delivered, "the reply is the new flow's");
        // When all has ended, the extras are given back.
        let swept = bpf.sweep_flows(monotonic_ns() + TCP_TRANSITORY_TIMEOUT_NS + 2_000_000_000).unwrap();
        assert_eq!(swept.blocks.keys().collect::<Vec<_>>(), [&home(5, 0)], "its home stays");
    });
}

fn guard() -> GuardEntry {
    GuardEntry {
        ipv6: "fd00::5".parse().unwrap(),
        ipv4: POD,
        pod_ipv4: "10.254.0.0/20".parse().unwrap(),
        pod_mac: [2; 6],
        host_mac: [6; 6],
    }
}

/// Opens as many TCP connections of a pod as it gets ports: inside and outside port of each.
fn fill_ports(bpf: &mut Bpf, pod: Ipv4Addr) -> Vec<(u16, u16)> {
    let mut taken = Vec::new();
    for port in 1..=u16::MAX {
        let (verdict, frame) = out(bpf, &ipv4(TCP, (pod, port), (REMOTE, 80), Transport::Tcp(SYN)));
        if verdict == NEXT {
            taken.push((port, source_port(&frame)));
        }
    }
    taken
}

/// A pod that has gone leaves nothing to the next one with its address.
#[test]
fn a_removed_pod_takes_its_flows_along() {
    alone("masq-forget", |_, bpf| {
        let entry = guard();
        bpf.set_guard(77, entry).unwrap();
        assert_eq!(bpf.guards().unwrap().into_iter().collect::<Vec<_>>(), [(77, entry)]);
        let sent = open_flow(bpf, UDP, (POD, 4000), (REMOTE, 7), Transport::Udp);
        let kept = open_flow(bpf, UDP, (OTHER_POD, 4000), (REMOTE, 7), Transport::Udp);
        bpf.remove_guard(77).unwrap();
        let answer = |port| ipv4(UDP, (REMOTE, 7), (NODE, port), Transport::Udp);
        let late = answer(source_port(&sent));
        assert_eq!(back(bpf, &late), (NEXT, late.clone()), "the host's");
        assert_eq!(back(bpf, &answer(source_port(&kept))).1[30..34], OTHER_POD.octets());
        assert!(bpf.guards().unwrap().is_empty());
    });
}

/// RFC 4787 REQ-2: by the kernel's routes; and what left with an address that has gone ends.
#[test]
fn each_remote_sees_the_address_of_its_route_as_long_as_the_node_has_it() {
    const SECOND: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 12);
    alone("masq-sources", |_, bpf| {
        let sources = BTreeMap::from([("198.51.100.3/32".parse().unwrap(), SECOND)]);
        let both = Masquerade { sources, ..masquerade() };
        bpf.set_masquerade(Some(&both)).unwrap();
        assert_eq!(bpf.masquerade().unwrap(), Some(both));
        let first = open_flow(bpf, UDP, (POD, 4000), (REMOTE, 7), Transport::Udp);
        let (_, second) = out(bpf, &ipv4(UDP, (POD, 4000), (OTHER_REMOTE, 7), Transport::Udp));
        assert_eq!((source_port(&second), &second[26..30]), (source_port(&first), &SECOND.octets()[..]));
        let answer = ipv4(UDP, (OTHER_REMOTE, 7), (SECOND, source_port(&second)), Transport::Udp);
        assert_eq!(back(bpf, &answer).1[30..34], POD.octets());
        bpf.set_masquerade(Some(&masquerade())).unwrap();
        assert_eq!(back(bpf, &answer), (NEXT, answer.clone()), "not the node's any more");
        let anew = open_flow(bpf, UDP, (POD, 4000), (OTHER_REMOTE, 7), Transport::Udp);
        assert_eq!(source_port(&anew), source_port(&first), "new flows use the new address");
    });
}

#[test]
fn a_full_table_drops_new_flows_and_keeps_the_old() {
    let options = BpfOptions { capacities: BTreeMap::from([("NAT_SESSIONS", 4)]), ..BpfOptions::default() };
    alone_with("masq-full", &options, |pins, bpf| {
        let mut opened = Vec::new();
        for port in 0..64 {
            let frame = ipv4(UDP, (POD, 4000 + port), (REMOTE, 7), Transport::Udp);
            match out(bpf, &frame).0 {
                NEXT => opened.push(frame),
                _ => assert_eq!(
                    pins.count("masquerade_egress", "drop_table_full"),
                    u64::from(port) + 1 - opened.len() as u64
                ),
            }
        }
        assert!(opened.len() >= 4 && opened.len() < 64, "{} flows", opened.len());
        for frame in &opened {
            assert_eq!(out(bpf, frame).0, NEXT, "a flow that was there stays");
        }
        assert_eq!(bpf.sweep_flows(monotonic_ns() + 2 * UDP_TIMEOUT_NS).unwrap().freed, opened.len());
        assert_eq!(out(bpf, &ipv4(UDP, (POD, 9000), (REMOTE, 7), Transport::Udp)).0, NEXT);
    });
}

/// The same source compiled for the kernel and for the host must do the same with every frame.
#[test]
fn the_kernels_build_and_the_hosts_agree_on_20_000_mutations() {
    const SEED: u64 = 0x6d61_7371;
    alone("masq-diff", |_, bpf| {
        let mut host = Memory::<Ipv4> { now_ns: monotonic_ns(), ..Memory::default() };
        let mut nodes = [0; NODES_MAX];
        nodes[0] = u32::from_ne_bytes(NODE.octets());
        let config = Config {
            nodes,
            pod_network: u32::from_ne_bytes([10, 254, 0, 0]),
            pod_mask: u32::from_ne_bytes([255, 255, 240, 0]),
            pool: Pool::beside(32_768, 60_999),
            filtering: Config::ADDRESS_DEPENDENT,
            enabled: 1,
            ..Config::OFF
        };
        agree_on_20_000(bpf, &mut host, &config, SEED, mutated);
    });
}

/// One pod only, with few ports: it always gets the port that it has, so there is no randomness in the flows.
fn mutated(random: &mut Random) -> (Program, Vec<u8>) {
    let port = home(5, random.below(8) as u16);
    let remote = [REMOTE, OTHER_REMOTE][random.below(2)];
    let flags = [SYN, ACK, SYN_ACK, RST, 0x11][random.below(5)];
    let outward = random.below(2) == 0;
    let (protocol, kind) = match random.below(4) {
        0 => (UDP, Transport::Udp),
        1 => (ICMP, Transport::Icmp(if outward { 8 } else { 0 }, port)),
        2 => (ICMP, Transport::Raw(quoted(random, port, remote))),
        _ => (TCP, Transport::Tcp(flags)),
    };
    let mut frame = match outward {
        true => ipv4(protocol, (POD, port), (remote, 80), kind),
        false => ipv4(protocol, (remote, 80), (NODE, port), kind),
    };
    if random.below(6) == 0 {
        frame[20..22].copy_from_slice(&[[0x20, 0][random.below(2)], [0, 5][random.below(2)]]);
    }
    fix_ipv4(&mut frame);
    frame.resize(frame.len().max(FRAME_BYTES_MIN), 0);
    // The source of a pod stays: another pod could take a port that a third then wants.
    for _ in 0..random.below(3) {
        let at = random.below(frame.len());
        if !(26..30).contains(&at) && !(34..40).contains(&at) {
            frame[at] = random.next() as u8;
        }
    }
    (if outward { UplinkEgress } else { UplinkIngress }, frame)
}

/// An ICMP error that quotes a packet of the flow.
fn quoted(random: &mut Random, port: u16, remote: Ipv4Addr) -> Vec<u8> {
    let sent = match random.below(3) {
        0 => ipv4(UDP, (NODE, port), (remote, 80), Transport::Udp),
        1 => ipv4(ICMP, (NODE, 0), (remote, 0), Transport::Icmp(8, port)),
        _ => ipv4(TCP, (NODE, port), (remote, 80), Transport::Tcp(SYN)),
    };
    [&[[3, 11, 12, 5][random.below(4)], 0, 0, 0, 0, 0, 5, 0][..], &sent[14..]].concat()
}
