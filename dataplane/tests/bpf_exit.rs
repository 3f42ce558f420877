//! The way to the IPv6 internet in `uplink_egress`, `uplink_ingress` and `uplink_backstop`, run by the kernel on
//! crafted frames, and against the host's build of the same logic.

#[path = "bpf/support.rs"]
mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use dataplane::Exit;
use dataplane::bpf::{
    Bpf, GuardEntry, Masquerade, Program, Program::UplinkBackstop, Program::UplinkEgress,
    Program::UplinkIngress, monotonic_ns,
};
use dataplane_common::{
    checksum::sum_bytes,
    ipv6::Address,
    masquerade::{Config, Ipv6, NODES_MAX, Pool, UDP_TIMEOUT_NS, memory::Memory},
};
use support::*;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const SYN: u8 = 2;

const NODE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
const POD_V4: Ipv4Addr = Ipv4Addr::new(10, 254, 0, 5);
const NODE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x11);
const POD: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 2, 0xa, 5, 0, 0, 1);
const REMOTE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 2);
const OTHER_REMOTE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 3);
const NEIGHBOUR: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x100);

fn masquerade() -> Masquerade {
    let exit = Exit {
        node: Some(NODE),
        pods: "fd00:1:2:a::/64".parse().unwrap(),
        direct: BTreeSet::from(["2001:db8:1::/64".parse().unwrap()]),
    };
    Masquerade { exit: Some(exit), ..masquerade_to(NODE_V4) }
}

fn guard() -> GuardEntry {
    GuardEntry {
        ipv6: POD,
        ipv4: POD_V4,
        pod_ipv4: "10.254.0.0/20".parse().unwrap(),
        pod_mac: [2, 0, 0, 0, 0, 5],
        host_mac: [2, 0, 0, 0, 1, 5],
    }
}

fn alone(test: &str, body: impl FnOnce(&Pins, &mut Bpf) + Send) {
    support::alone(test, |pins| {
        let mut bpf = pins.open();
        bpf.set_guard(1, guard()).unwrap();
        bpf.set_masquerade(Some(&masquerade())).unwrap();
        body(pins, &mut bpf);
    });
}

/// A frame with a right transport checksum.
fn packet(next_header: u8, from: Ipv6Addr, to: Ipv6Addr, transport: &[u8]) -> Vec<u8> {
    let mut frame = ipv6(([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]), from, to, next_header, 64, transport);
    seal(&mut frame);
    frame
}

fn seal(frame: &mut [u8]) {
    let at = 54
        + match frame[20] {
            TCP => 16,
            UDP => 6,
            ICMPV6 => 2,
            _ => return,
        };
    if frame.len() < at + 2 {
        return;
    }
    frame[at..at + 2].fill(0);
    let sum =
        sum_bytes(&frame[22..]).add16(u16::from(frame[20]).to_be()).add32((frame.len() as u32 - 54).to_be());
    frame[at..at + 2].copy_from_slice(&sum.checksum().to_ne_bytes());
}

fn ports(from: u16, to: u16, rest: &[u8]) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), rest].concat()
}

fn tcp(from: (Ipv6Addr, u16), to: (Ipv6Addr, u16), flags: u8) -> Vec<u8> {
    let rest = [0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0, 1, 2, 3, 4];
    packet(TCP, from.0, to.0, &ports(from.1, to.1, &rest))
}

fn udp(from: (Ipv6Addr, u16), to: (Ipv6Addr, u16)) -> Vec<u8> {
    packet(UDP, from.0, to.0, &ports(from.1, to.1, &[0, 12, 0, 0, 1, 2, 3, 4]))
}

fn echo(from: Ipv6Addr, to: Ipv6Addr, kind: u8, identifier: u16) -> Vec<u8> {
    let [a, b] = identifier.to_be_bytes();
    packet(ICMPV6, from, to, &[kind, 0, 0, 0, a, b, 0, 1, 1, 2, 3, 4])
}

/// An error that quotes 16 bytes of the frame's transport.
fn error(from: Ipv6Addr, to: Ipv6Addr, kind: u8, quoted: &[u8]) -> Vec<u8> {
    packet(ICMPV6, from, to, &[&[kind, 0, 0, 0, 0, 0, 5, 0], &quoted[14..quoted.len().min(70)]].concat())
}

#[test]
fn each_protocol_leaves_with_the_nodes_address_and_its_reply_comes_back() {
    alone("exit-protocols", |pins, bpf| {
        let port = home(5, 3);
        let there = |from| {
            [
                tcp((from, port), (REMOTE, 80), SYN),
                udp((from, port), (REMOTE, 80)),
                echo(from, REMOTE, 128, port),
            ]
        };
        let back = |to| {
            [tcp((REMOTE, 80), (to, port), SYN), udp((REMOTE, 80), (to, port)), echo(REMOTE, to, 129, port)]
        };
        for (sent, translated) in there(POD).into_iter().zip(there(NODE)) {
            assert_eq!(run(bpf, UplinkEgress, &sent), (NEXT, translated.clone()), "{:?}", pins.counters());
            assert_eq!(run(bpf, UplinkBackstop, &translated).0, NEXT);
        }
        for (reply, delivered) in back(NODE).into_iter().zip(back(POD)) {
            assert_eq!(run(bpf, UplinkIngress, &reply), (NEXT, delivered), "{:?}", pins.counters());
        }
        assert_eq!(pins.count("masquerade_egress", "new_flow"), 3);
        let flows = Bpf::flows(pins.path()).unwrap();
        assert_eq!(flows.len(), 3);
        for flow in flows {
            assert_eq!(
                (flow.pod, flow.inside, flow.outside),
                (POD_V4, IpAddr::from(POD), IpAddr::from(NODE))
            );
        }
        let holder = Bpf::port_holder(pins.path(), port).unwrap();
        assert_eq!(holder.map(|(pod, _)| pod), Some(POD_V4));
    });
}

#[test]
fn errors_reach_the_pod_with_what_they_quote() {
    alone("exit-errors", |pins, bpf| {
        let port = home(5, 3);
        let sent = udp((POD, port), (REMOTE, 80));
        let (_, translated) = run(bpf, UplinkEgress, &sent);
        for kind in 1..=4 {
            let got = run(bpf, UplinkIngress, &error(OTHER_REMOTE, NODE, kind, &translated));
            assert_eq!(got, (NEXT, error(OTHER_REMOTE, POD, kind, &sent)), "{:?}", pins.counters());
        }
    });
}

#[test]
fn what_stays_near_is_left_alone_and_what_cannot_be_translated_is_dropped() {
    alone("exit-near", |pins, bpf| {
        let peer = Ipv6Addr::new(0xfd00, 1, 2, 0xb, 0, 0, 0, 1);
        for to in [NEIGHBOUR, peer, "ff02::1".parse().unwrap(), "fe80::1".parse().unwrap()] {
            for frame in [tcp((POD, 1), (to, 80), SYN), packet(0, POD, to, &[58, 0, 5, 2, 0, 0, 1, 0])] {
                for program in [UplinkEgress, UplinkBackstop] {
                    assert_eq!(run(bpf, program, &frame), (NEXT, frame.clone()), "{program} {to}");
                }
            }
        }
        assert_eq!(pins.count("masquerade_egress", "direct"), 2);
        for frame in [
            packet(0, POD, REMOTE, &[58, 0, 5, 2, 0, 0, 1, 0]),
            packet(132, POD, REMOTE, &[0; 16]),
            echo(POD, REMOTE, 129, 1),
        ] {
            for program in [UplinkEgress, UplinkBackstop] {
                assert_eq!(run(bpf, program, &frame).0, DROP, "{program}");
            }
        }
        let of_the_node = tcp((NODE, 5), (REMOTE, 80), SYN);
        assert_eq!(run(bpf, UplinkEgress, &of_the_node), (NEXT, of_the_node.clone()));
        assert_eq!(run(bpf, UplinkBackstop, &of_the_node), (NEXT, of_the_node));
    });
}

#[test]
fn without_an_address_nothing_leaves_and_switched_off_everything_does() {
    alone("exit-none", |pins, bpf| {
        let frame = tcp((POD, home(5, 1)), (REMOTE, 80), SYN);
        let mut config = masquerade();
        if let Some(exit) = &mut config.exit {
            exit.node = None;
        }
        bpf.set_masquerade(Some(&config)).unwrap();
        assert_eq!(bpf.masquerade().unwrap().as_ref(), Some(&config));
        assert_eq!(run(bpf, UplinkEgress, &frame).0, DROP);
        assert_eq!(pins.count("masquerade_egress", "drop_no_address"), 1);
        config.exit = None;
        bpf.set_masquerade(Some(&config)).unwrap();
        assert_eq!(bpf.masquerade().unwrap().as_ref(), Some(&config));
        for program in [UplinkEgress, UplinkBackstop] {
            assert_eq!(run(bpf, program, &frame), (NEXT, frame.clone()));
        }
        // IPv6 alone.
        let alone = Masquerade { node_ipv4: None, ..masquerade() };
        bpf.set_masquerade(Some(&alone)).unwrap();
        assert_eq!(bpf.masquerade().unwrap(), Some(alone));
        assert_eq!(run(bpf, UplinkEgress, &frame).1, tcp((NODE, home(5, 1)), (REMOTE, 80), SYN));
    });
}

#[test]
fn flows_end_with_their_time_their_pod_and_their_address() {
    alone("exit-ends", |pins, bpf| {
        let flows = |pins: &Pins| Bpf::flows(pins.path()).unwrap().len();
        let frame = udp((POD, home(5, 1)), (REMOTE, 80));
        run(bpf, UplinkEgress, &frame);
        assert_eq!((bpf.sweep_flows(monotonic_ns()).unwrap().freed, flows(pins)), (0, 1));
        assert_eq!(bpf.sweep_flows(monotonic_ns() + 2 * UDP_TIMEOUT_NS).unwrap().freed, 1);
        run(bpf, UplinkEgress, &frame);
        let mut moved = masquerade();
        if let Some(exit) = &mut moved.exit {
            exit.node = Some(NEIGHBOUR);
        }
        bpf.set_masquerade(Some(&moved)).unwrap();
        assert_eq!(flows(pins), 0);
        assert_eq!(run(bpf, UplinkEgress, &frame), (NEXT, udp((NEIGHBOUR, home(5, 1)), (REMOTE, 80))));
        assert_eq!(bpf.guards().unwrap(), BTreeMap::from([(1, guard())]));
        bpf.remove_guard(1).unwrap();
        assert_eq!((flows(pins), bpf.guards().unwrap().len()), (0, 0));
        assert_eq!(run(bpf, UplinkEgress, &frame).0, DROP);
        assert_eq!(pins.count("masquerade_egress", "drop_no_pod"), 1);
    });
}

/// The same source compiled for the kernel and for the host must do the same with every frame.
#[test]
fn the_kernels_build_and_the_hosts_agree_on_20_000_mutations() {
    const SEED: u64 = 0x6578_6974;
    alone("exit-diff", |_, bpf| {
        // Prefixes are the kernel's alone.
        let mut config = masquerade();
        if let Some(exit) = &mut config.exit {
            exit.direct.clear();
        }
        bpf.set_masquerade(Some(&config)).unwrap();
        let inside = u32::from_ne_bytes(POD_V4.octets());
        let pods = BTreeMap::from([(inside, Address::new(POD.octets()))]);
        let mut host = Memory::<Ipv6> { now_ns: monotonic_ns(), pods, ..Memory::default() };
        let config = Config {
            nodes: [u32::from_ne_bytes(NODE_V4.octets()); NODES_MAX],
            pod_network: u32::from_ne_bytes([10, 254, 0, 0]),
            pod_mask: u32::from_ne_bytes([255, 255, 240, 0]),
            pool: Pool::beside(32_768, 60_999),
            enabled: 1,
            node6: Address::new(NODE.octets()),
            pods6: Address::new(POD.octets()).0[0],
            exit: 1,
            ..Config::OFF
        };
        agree_on_20_000(bpf, &mut host, &config, SEED, mutated);
    });
}

/// The frame behind a fragment header with this offset and M flag.
fn part(mut frame: Vec<u8>, [high, low]: [u8; 2], identification: u8) -> Vec<u8> {
    frame.splice(54..54, [frame[20], 0, high, low, 0, 0, 0, identification]);
    frame[20] = 44;
    let length = frame.len() as u16 - 54;
    frame[18..20].copy_from_slice(&length.to_be_bytes());
    frame
}

#[test]
fn fragments_that_came_before_their_first_are_sent_when_it_comes() {
    alone("exit-kept", |pins, bpf| {
        up("lo");
        let whole = |source| udp((source, home(5, 1)), (REMOTE, 7));
        for offset in [0x18, 0x20] {
            assert_eq!(run(bpf, UplinkEgress, &part(whole(POD), [0, offset], 9)).0, DROP);
        }
        let (first, left) = (part(whole(POD), [0, 1], 9), part(whole(NODE), [0, 1], 9));
        assert_eq!(run(bpf, UplinkEgress, &first), (NEXT, left), "{:?}", pins.counters());
        assert_eq!(pins.count("masquerade_egress", "released_fragment"), 2);
    });
}

/// One pod only, with few ports: it always gets the port that it has, so there is no randomness in the flows.
fn mutated(random: &mut Random) -> (Program, Vec<u8>) {
    let port = home(5, random.below(8) as u16);
    let remote = [REMOTE, OTHER_REMOTE][random.below(2)];
    let flags = [SYN, 0x10, 0x12, 4, 0x11][random.below(5)];
    let outward = random.below(2) == 0;
    let (pod, far) = ((if outward { POD } else { NODE }, port), (remote, 80));
    let (from, to) = if outward { (pod, far) } else { (far, pod) };
    let mut frame = match random.below(4) {
        0 => udp(from, to),
        1 => echo(from.0, to.0, if outward { 128 } else { 129 }, port),
        2 => {
            let near = (if outward { POD } else { NODE }, port);
            let quoted = match (outward, random.below(3)) {
                (true, 0) => udp(far, near),
                (true, _) => tcp(far, near, SYN),
                (false, 0) => udp(near, far),
                (false, 1) => echo(near.0, far.0, 128, port),
                (false, _) => tcp(near, far, SYN),
            };
            error(from.0, to.0, random.below(6) as u8, &quoted)
        }
        _ => tcp(from, to, flags),
    };
    if random.below(6) == 0 {
        let offset = [[0, 0], [0, 1], [0, 0x18]][random.below(3)];
        frame = part(frame, offset, random.below(4) as u8);
    }
    if random.below(8) == 0 {
        frame[20] = [0, 43, 50, 59, 60][random.below(5)];
    }
    // Addresses and ports stay: nobody else has an address here, and another port could be any port outside.
    for _ in 0..random.below(3) {
        let at = random.below(frame.len());
        if ![12, 13, 20].contains(&at) && !(22..68).contains(&at) {
            frame[at] = random.next() as u8;
        }
    }
    (if outward { UplinkEgress } else { UplinkIngress }, frame)
}
