//! The way out to the IPv6 internet: the same engine over IPv6. What is common to both families is shown over IPv4;
//! here is what differs, and that no pod's own source gets out.

mod frame;

use std::net::Ipv6Addr;

use super::super::{
    Config, Counter, Hairpin, Ipv6, UDP_TIMEOUT_NS, fragment::Sent, hairpin, memory::Memory as AnyMemory,
};
use super::{
    frame::{ACK, FIN_ACK, RST, SYN, SYN_ACK},
    home, pod,
};
use crate::{ipv4, ipv6::Address};
use frame::*;

type Memory = AnyMemory<Ipv6>;

const NODE: &str = "2001:db8:1::11";
const REMOTE: &str = "2001:db8:ffff::2";
const OTHER: &str = "2001:db8:ffff::3";
const ROUTER: &str = "2001:db8:eeee::1";
const PODS: [&str; 2] = ["fd00:1:2:a:5::1", "fd00:1:2:a:6::1"];

fn address(text: &str) -> Address {
    Address::new(text.parse::<Ipv6Addr>().unwrap().octets())
}

fn config() -> Config {
    Config { node6: address(NODE), pods6: address(PODS[0]).0[0], exit: 1, ..super::config() }
}

fn world() -> Memory {
    let pods = [5, 6].map(|n| ipv4::address(pod(n))).into_iter().zip(PODS.map(address));
    Memory { pods: pods.collect(), ..Memory::default() }
}

fn send(world: &mut Memory, frame: &[u8]) -> (Sent<Ipv6>, Vec<u8>) {
    send_with(world, frame, &config())
}

fn send_with(world: &mut Memory, frame: &[u8], config: &Config) -> (Sent<Ipv6>, Vec<u8>) {
    let mut frame = frame.to_vec();
    let verdict = world.egress(&mut frame, config);
    (verdict, frame)
}

fn receive(world: &mut Memory, frame: &[u8]) -> (Sent<Ipv6>, Vec<u8>) {
    let mut frame = frame.to_vec();
    let verdict = world.ingress(&mut frame, &config());
    (verdict, frame)
}

/// Sends what must leave, and says with which outside port.
fn port_out(world: &mut Memory, frame: &[u8]) -> u16 {
    let (verdict, sent) = send(world, frame);
    assert_eq!((verdict, source(&sent).0), (Sent::Next, NODE.parse().unwrap()));
    assert!(is_sealed(&sent));
    source(&sent).1
}

#[test]
fn there_and_back() {
    let mut world = world();
    for make in [udp as fn(End, End) -> Vec<u8>, |from, to| tcp(from, to, SYN), |from, to| tcp(from, to, ACK)]
    {
        let port = home(5, 9);
        let (verdict, sent) = send(&mut world, &make((PODS[0], port), (REMOTE, 80)));
        assert_eq!((verdict, sent), (Sent::Next, make((NODE, port), (REMOTE, 80))));
        let (verdict, back) = receive(&mut world, &make((REMOTE, 80), (NODE, port)));
        assert_eq!((verdict, back), (Sent::Next, make((REMOTE, 80), (PODS[0], port))));
    }
}

/// RFC 4787 REQ-1 and REQ-8.
#[test]
fn mapping_is_endpoint_independent_and_filtering_goes_by_the_address() {
    let mut world = world();
    let ports =
        [(REMOTE, 80), (REMOTE, 81), (OTHER, 80)].map(|to| port_out(&mut world, &udp((PODS[0], 40_000), to)));
    assert_eq!(ports, [ports[0]; 3]);
    let (verdict, got) = receive(&mut world, &udp((REMOTE, 9), (NODE, ports[0])));
    assert_eq!((verdict, got), (Sent::Next, udp((REMOTE, 9), (PODS[0], 40_000))));
    assert_eq!(receive(&mut world, &udp((ROUTER, 9), (NODE, ports[0]))).0, Sent::Drop);
    assert_eq!(world.count_of(Counter::IngressDropFiltered), 1);
    let other_pod = port_out(&mut world, &udp((PODS[1], 40_000), (REMOTE, 80)));
    assert_ne!(other_pod, ports[0]);
}

#[test]
fn a_flow_ends_at_its_time_for_the_remote() {
    let mut world = world();
    let port = port_out(&mut world, &udp((PODS[0], 40_000), (REMOTE, 7)));
    let reply = udp((REMOTE, 7), (NODE, port));
    world.now_ns += UDP_TIMEOUT_NS;
    assert_eq!(receive(&mut world, &reply).0, Sent::Next);
    world.now_ns += 1;
    assert_eq!(receive(&mut world, &reply).0, Sent::Drop);
}

#[test]
fn what_stays_near_is_never_touched() {
    let mut world = world();
    world.direct.insert(address("2001:db8:1::100"));
    for to in ["fd00:1:2:b::7", "fc00::1", "fe80::1", "ff02::1:ff00:1", "2001:db8:1::100"] {
        for frame in [
            tcp((PODS[0], 40_000), (to, 80), SYN),
            echo(PODS[0], to, 129, 7),
            extended(0, PODS[0], to, &[58, 0, 5, 2, 0, 0, 1, 0]),
            fragment(&udp((PODS[0], 1), (to, 2)), 9, 3, false),
        ] {
            assert_eq!(send(&mut world, &frame), (Sent::Next, frame), "{to}");
        }
    }
    assert!(world.sessions.is_empty() && world.ports.is_empty());
    assert_eq!(world.count_of(Counter::EgressDirect), 4);
}

/// A host on the link may have an address of a prefix that the node has not: the answer to its question has the pod's
/// source, too.
#[test]
fn what_the_node_says_of_its_pods_on_the_link_is_not_held_back() {
    let mut advertisement = extended(58, PODS[0], REMOTE, &[136; 32]);
    advertisement[21] = 255;
    assert_eq!(send(&mut world(), &advertisement), (Sent::Next, advertisement.clone()));
    advertisement[21] = 254;
    assert_eq!(send(&mut world(), &advertisement).0, Sent::Drop, "it comes from a pod");
}

#[test]
fn a_flow_that_was_translated_stays_so_when_its_remote_comes_onto_the_link() {
    let mut world = world();
    let port = port_out(&mut world, &tcp((PODS[0], 40_000), (REMOTE, 80), SYN));
    world.direct.insert(address(REMOTE));
    assert_eq!(port_out(&mut world, &tcp((PODS[0], 40_000), (REMOTE, 80), ACK)), port);
}

#[test]
fn the_nodes_own_packets_and_others_are_not_touched() {
    let mut world = world();
    for from in [NODE, "2001:db8:1::99", "fd00:1:2:b::1"] {
        let frame = tcp((from, 40_000), (REMOTE, 80), SYN);
        assert_eq!(send(&mut world, &frame), (Sent::Next, frame));
    }
    let to_a_pod = tcp((REMOTE, 80), (PODS[0], 40_000), SYN);
    assert_eq!(receive(&mut world, &to_a_pod), (Sent::Next, to_a_pod));
}

#[test]
fn a_host_that_writes_from_a_flows_port_to_its_remote_takes_the_remote_over() {
    let mut world = world();
    let port = port_out(&mut world, &udp((PODS[0], 40_000), (REMOTE, 7)));
    send(&mut world, &udp((NODE, port), (REMOTE, 7)));
    assert_eq!((world.count_of(Counter::EgressHost), world.sessions.len()), (1, 0));
}

#[test]
fn switched_off_nothing_is_touched() {
    let mut world = world();
    let off = Config { exit: 0, ..config() };
    let frame = tcp((PODS[0], 40_000), (REMOTE, 80), SYN);
    assert_eq!(send_with(&mut world, &frame, &off), (Sent::Next, frame));
}

/// RFC 4193 section 4.3: unique local addresses do not leave the site.
#[test]
fn without_an_address_of_the_node_nothing_leaves() {
    let mut world = world();
    let none = Config { node6: Address::UNSPECIFIED, ..config() };
    assert_eq!(send_with(&mut world, &tcp((PODS[0], 1), (REMOTE, 80), SYN), &none).0, Sent::Drop);
    assert_eq!(world.count_of(Counter::EgressDropAddress), 1);
    world.direct.insert(address(OTHER));
    assert_eq!(send_with(&mut world, &tcp((PODS[0], 1), (OTHER, 80), SYN), &none).0, Sent::Next);
}

#[test]
fn echo_identifiers_are_mapped() {
    let mut world = world();
    for pod in PODS {
        let (verdict, sent) = send(&mut world, &echo(pod, REMOTE, 128, 77));
        assert!(verdict == Sent::Next && is_sealed(&sent));
        let identifier = u16::from_be_bytes([sent[58], sent[59]]);
        assert_eq!(sent, echo(NODE, REMOTE, 128, identifier));
        let back = receive(&mut world, &echo(REMOTE, NODE, 129, identifier));
        assert_eq!(back, (Sent::Next, echo(REMOTE, pod, 129, 77)));
    }
    let request = echo(REMOTE, NODE, 128, 77);
    assert_eq!(receive(&mut world, &request), (Sent::Next, request), "the host answers pings itself");
}

/// RFC 5508 REQ-4 and REQ-5, RFC 8201: packet too big is what path MTU discovery lives by.
#[test]
fn errors_come_in_with_what_they_quote() {
    let mut world = world();
    for inside in [
        tcp((PODS[0], 40_000), (REMOTE, 80), SYN),
        udp((PODS[0], 40_000), (REMOTE, 7)),
        echo(PODS[0], REMOTE, 128, 9),
        fragment(&udp((PODS[0], 40_000), (REMOTE, 7)), 77, 0, true),
    ] {
        let (_, sent) = send(&mut world, &inside);
        for kind in 1..=4 {
            let sessions = world.sessions.clone();
            let (verdict, got) = receive(&mut world, &error(ROUTER, NODE, kind, &sent));
            assert_eq!((verdict, got), (Sent::Next, error(ROUTER, PODS[0], kind, &inside)));
            assert_eq!(world.sessions, sessions, "an error ends nothing and keeps nothing alive");
        }
    }
}

#[test]
fn errors_go_out_with_what_they_quote() {
    let mut world = world();
    let port = port_out(&mut world, &udp((PODS[0], 40_000), (REMOTE, 7)));
    let outside = udp((REMOTE, 7), (NODE, port));
    let (_, delivered) = receive(&mut world, &outside);
    for kind in 1..=4 {
        let (verdict, sent) = send(&mut world, &error(PODS[0], REMOTE, kind, &delivered));
        assert_eq!((verdict, sent), (Sent::Next, error(NODE, REMOTE, kind, &outside)));
    }
    let unknown = error(PODS[0], REMOTE, 1, &udp((REMOTE, 7), (PODS[0], 4)));
    assert_eq!(send(&mut world, &unknown).0, Sent::Drop);
    let of_another = error(PODS[1], REMOTE, 1, &delivered);
    assert_eq!(send(&mut world, &of_another).0, Sent::Drop);
}

/// RFC 8200 section 4.5.
#[test]
fn fragments_follow_their_first() {
    let mut world = world();
    let (out, back) = (udp((PODS[0], 40_000), (REMOTE, 7)), |port| udp((REMOTE, 7), (NODE, port)));
    let (_, first) = send(&mut world, &fragment(&out, 0x1_0009, 0, true));
    let port = u16::from_be_bytes([first[62], first[63]]);
    let translated = udp((NODE, port), (REMOTE, 7));
    assert_eq!(first, fragment(&translated, 0x1_0009, 0, true));
    let (verdict, later) = send(&mut world, &later(PODS[0], REMOTE, 0x1_0009));
    assert_eq!((verdict, later), (Sent::Next, frame::later(NODE, REMOTE, 0x1_0009)));
    let other = frame::later(PODS[0], REMOTE, 0x2_0009);
    assert_eq!(send(&mut world, &other).0, Sent::Drop, "the identification has 32 bits");
    let (_, first) = receive(&mut world, &fragment(&back(port), 4, 0, true));
    assert_eq!(first, fragment(&udp((REMOTE, 7), (PODS[0], 40_000)), 4, 0, true));
    let (verdict, later) = receive(&mut world, &frame::later(REMOTE, NODE, 4));
    assert_eq!((verdict, later), (Sent::Next, frame::later(REMOTE, PODS[0], 4)));
}

/// RFC 4787 REQ-14, of IPv6.
#[test]
fn fragments_that_come_before_their_first_wait_for_it() {
    let mut world = world();
    let first = fragment(&udp((PODS[0], home(5, 3)), (REMOTE, 7)), 9, 0, true);
    let later = frame::later(PODS[0], REMOTE, 9);
    assert_eq!(send(&mut world, &later), (Sent::Drop, later.clone()));
    let (verdict, sent) = send(&mut world, &first);
    assert_eq!(sent, fragment(&udp((NODE, home(5, 3)), (REMOTE, 7)), 9, 0, true));
    let Sent::Release(key) = verdict else { panic!("{verdict:?}") };
    assert_eq!(world.release(key), std::slice::from_ref(&later));
    assert_eq!(send(&mut world, &later), (Sent::Next, frame::later(NODE, REMOTE, 9)));
    world.direct.insert(address("2001:db8:1::100"));
    let near = frame::later(PODS[0], "2001:db8:1::100", 9);
    assert_eq!(send(&mut world, &near), (Sent::Next, near), "of what is not translated nothing is kept");
    assert!(world.kept.is_empty());
}

/// RFC 6946.
#[test]
fn an_atomic_fragment_is_a_whole_packet() {
    let mut world = world();
    let (verdict, sent) = send(&mut world, &fragment(&udp((PODS[0], home(5, 3)), (REMOTE, 7)), 9, 0, false));
    let translated = fragment(&udp((NODE, home(5, 3)), (REMOTE, 7)), 9, 0, false);
    assert_eq!((verdict, sent), (Sent::Next, translated));
    assert!(world.fragments.is_empty());
}

#[test]
fn stray_packets_of_a_pod_leave_translated_or_not_at_all() {
    let mut world = world();
    for flags in [RST, FIN_ACK, ACK, SYN_ACK, 0] {
        let (verdict, sent) =
            send(&mut world, &tcp((PODS[0], 40_000 + u16::from(flags)), (REMOTE, 80), flags));
        assert!(verdict == Sent::Drop || source(&sent).0 == NODE.parse::<Ipv6Addr>().unwrap(), "{flags:#x}");
    }
    for frame in [
        echo(PODS[0], REMOTE, 129, 1),
        echo(PODS[0], REMOTE, 133, 1),
        echo(PODS[0], REMOTE, 136, 1),
        extended(0, PODS[0], REMOTE, &[17, 0, 5, 2, 0, 0, 1, 0]),
        extended(43, PODS[0], REMOTE, &[17, 0, 4, 0, 0, 0, 0, 0]),
        extended(60, PODS[0], REMOTE, &[17, 0, 1, 4, 0, 0, 0, 0]),
        extended(132, PODS[0], REMOTE, &[0; 16]),
        extended(59, PODS[0], REMOTE, &[]),
        udp(("fd00:1:2:a:7::1", 40_000), (REMOTE, 7)),
    ] {
        assert_eq!(send(&mut world, &frame).0, Sent::Drop, "{frame:02x?}");
    }
    assert_eq!(world.count_of(Counter::EgressDropPod), 1, "nobody's address");
}

#[test]
fn no_truncation_leaves_with_a_pods_source() {
    for whole in [
        tcp((PODS[0], home(5, 1)), (REMOTE, 80), SYN),
        fragment(&udp((PODS[0], 40_000), (REMOTE, 7)), 9, 0, true),
        error(PODS[0], REMOTE, 1, &udp((REMOTE, 7), (PODS[0], 4))),
    ] {
        for n in 0..whole.len() {
            let (verdict, frame) = send(&mut world(), &whole[..n]);
            // Before the EtherType is known, it is no IPv6.
            let expected = if n < 14 { Sent::Next } else { Sent::Drop };
            assert_eq!((verdict, &frame[..]), (expected, &whole[..n]), "{n} bytes");
        }
    }
    let reply = tcp((REMOTE, 80), (NODE, home(5, 1)), SYN_ACK);
    for n in 0..reply.len() {
        let (verdict, frame) = receive(&mut world(), &reply[..n]);
        assert_eq!((verdict, &frame[..]), (Sent::Next, &reply[..n]));
    }
}

/// RFC 4787 REQ-9.
#[test]
fn two_pods_of_a_node_meet_at_their_outside_ports() {
    let mut world = world();
    // The node's own address is on its link, too.
    world.direct.insert(address(NODE));
    let ends = [(PODS[0], 40_000), (PODS[1], 50_000)];
    let [at_a, at_b] = ends.map(|end| port_out(&mut world, &udp(end, (REMOTE, 7))));
    let mut hairpinned = |frame: &[u8]| {
        let mut frame = frame.to_vec();
        let decided = hairpin::<Ipv6, _, _>(&mut frame[..], &mut world, &config());
        (decided, frame)
    };
    let (decided, _) = hairpinned(&udp(ends[0], (NODE, at_b)));
    assert_eq!(decided, Hairpin::Drop(Counter::HairpinDropIn), "it has not written to the node's address");
    let (decided, frame) = hairpinned(&udp(ends[1], (NODE, at_a)));
    let expected = (Hairpin::Deliver(ipv4::address(pod(5))), udp((NODE, at_b), ends[0]));
    assert_eq!((decided, frame), expected);
    let ping = echo(PODS[0], NODE, 128, 1);
    assert_eq!(hairpinned(&ping), (Hairpin::Host, ping));
}
