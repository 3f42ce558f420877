//! The masquerade over tables in memory. Each test that shows a clause of an RFC names it.

mod exit;
mod frame;
mod model;

use super::{
    block::{BLOCK_FREE, BLOCK_PORTS, block_of, block_owner_inside},
    fragment::Sent,
    memory::Memory,
    *,
};
use crate::ipv4;
use frame::*;

const SECOND_NS: u64 = 1_000_000_000;
const NODE: [u8; 4] = [192, 0, 2, 11];
const SECOND_NODE: [u8; 4] = [192, 0, 2, 12];
const REMOTE: [u8; 4] = [198, 51, 100, 2];
const OTHER: [u8; 4] = [198, 51, 100, 3];

fn config() -> Config {
    Config {
        nodes: [ipv4::address(NODE), ipv4::address(SECOND_NODE), 0, 0],
        pod_network: ipv4::address([10, 254, 0, 0]),
        pod_mask: ipv4::address([255, 255, 240, 0]),
        pool: Pool::beside(32_768, 60_999),
        filtering: Config::ADDRESS_DEPENDENT,
        enabled: 1,
        ..Config::OFF
    }
}

fn pod(n: u8) -> [u8; 4] {
    [10, 254, 0, n]
}

/// The n-th port of a pod's home.
fn home(pod: u8, n: u16) -> u16 {
    (config().pool.home(pod as u32).unwrap() * BLOCK_PORTS) as u16 + n
}

fn send(world: &mut Memory, frame: &[u8]) -> Passed {
    let mut frame = frame.to_vec();
    let verdict = world.egress(&mut frame, &config());
    (verdict, frame)
}

fn receive(world: &mut Memory, frame: &[u8]) -> Passed {
    receive_with(world, frame, &config())
}

fn receive_with(world: &mut Memory, frame: &[u8], config: &Config) -> Passed {
    let mut frame = frame.to_vec();
    let verdict = world.ingress(&mut frame, config);
    (verdict, frame)
}

/// Sends what must leave, and says with which outside port.
fn port_out(world: &mut Memory, frame: &[u8]) -> u16 {
    let (verdict, sent) = send(world, frame);
    assert_eq!((verdict, source(&sent).0), (Sent::Next, NODE));
    assert!(is_sealed(&sent));
    source(&sent).1
}

fn is_delivered(world: &mut Memory, frame: &[u8], to: End) -> bool {
    let (verdict, got) = receive(world, frame);
    assert!(is_sealed(&got));
    verdict == Sent::Next && destination(&got) == to
}

#[test]
fn nobody_outside_reaches_a_private_address_by_itself() {
    let mut world = Memory::default();
    let (verdict, _) = receive(&mut world, &tcp((REMOTE, 80), (pod(5), 4000), SYN));
    assert_eq!(verdict, Sent::Drop);
    assert_eq!(world.count_of(Counter::IngressDropPrivate), 1);
}

#[test]
fn there_and_back() {
    let mut world = Memory::default();
    let port = home(5, 9);
    let (verdict, sent) = send(&mut world, &tcp((pod(5), port), (REMOTE, 80), SYN));
    assert_eq!((verdict, sent), (Sent::Next, tcp((NODE, port), (REMOTE, 80), SYN)));
    let (verdict, back) = receive(&mut world, &tcp((REMOTE, 80), (NODE, port), SYN_ACK));
    assert_eq!((verdict, back), (Sent::Next, tcp((REMOTE, 80), (pod(5), port), SYN_ACK)));
}

/// RFC 4787 REQ-1, RFC 5382 REQ-1.
#[test]
fn mapping_is_endpoint_independent() {
    let mut world = Memory::default();
    for make in [udp as fn(End, End) -> Vec<u8>, |from, to| tcp(from, to, SYN)] {
        let ports = [(REMOTE, 80), (REMOTE, 81), (OTHER, 80)]
            .map(|to| port_out(&mut world, &make((pod(5), 40_000), to)));
        assert_eq!(ports, [ports[0]; 3]);
    }
}

/// RFC 4787 REQ-3, RFC 5382 REQ-7.
#[test]
fn two_inside_ends_never_share_an_outside_port() {
    let mut world = Memory::default();
    let first = port_out(&mut world, &udp((pod(5), 40_000), (REMOTE, 7)));
    let second = port_out(&mut world, &udp((pod(5), 40_001), (OTHER, 7)));
    let third = port_out(&mut world, &udp((pod(6), 40_000), (REMOTE, 7)));
    assert!(first != second && second != third && first != third);
}

/// RFC 4787 REQ-4.
#[test]
fn udp_ports_keep_their_parity() {
    let mut world = Memory::default();
    for inside in 40_000..40_040 {
        assert_eq!(port_out(&mut world, &udp((pod(5), inside), (REMOTE, 7))) % 2, inside % 2);
    }
}

/// RFC 4787 REQ-8: address-dependent filtering; RFC 5382 REQ-3.
#[test]
fn another_port_of_a_remote_gets_in_and_another_address_does_not() {
    let mut world = Memory::default();
    let port = port_out(&mut world, &udp((pod(5), 40_000), (REMOTE, 7)));
    assert!(is_delivered(&mut world, &udp((REMOTE, 9), (NODE, port)), (pod(5), 40_000)));
    assert_eq!(receive(&mut world, &udp((OTHER, 7), (NODE, port))).0, Sent::Drop);
    let port = port_out(&mut world, &tcp((pod(5), 40_000), (REMOTE, 7), SYN));
    port_out(&mut world, &tcp((pod(5), 40_000), ([198, 51, 100, 9], 7), SYN));
    for remote in [REMOTE, [198, 51, 100, 9]] {
        assert!(is_delivered(&mut world, &tcp((remote, 9), (NODE, port), SYN), (pod(5), 40_000)));
    }
    assert_eq!(receive(&mut world, &tcp((OTHER, 7), (NODE, port), SYN)).0, Sent::Drop);
    assert_eq!(world.count_of(Counter::IngressDropFiltered), 2);
}

/// RFC 4787 REQ-8: endpoint-independent filtering, when it is asked for.
#[test]
fn endpoint_independent_filtering_lets_everybody_in() {
    let mut world = Memory::default();
    let open = Config { filtering: Config::ENDPOINT_INDEPENDENT, ..config() };
    let port = port_out(&mut world, &udp((pod(5), 40_000), (REMOTE, 7)));
    let (verdict, got) = receive_with(&mut world, &udp((OTHER, 9), (NODE, port)), &open);
    assert_eq!((verdict, destination(&got)), (Sent::Next, (pod(5), 40_000)));
    // And the pod's answer leaves from the same port.
    assert_eq!(port_out(&mut world, &udp((pod(5), 40_000), (OTHER, 9))), port);
}

/// RFC 5382 REQ-2: two hosts that open a connection at once.
#[test]
fn a_simultaneous_open_gets_through() {
    let mut world = Memory::default();
    let port = port_out(&mut world, &tcp((pod(5), 40_000), (REMOTE, 9), SYN));
    assert!(is_delivered(&mut world, &tcp((REMOTE, 9), (NODE, port), SYN), (pod(5), 40_000)));
    assert_eq!(port_out(&mut world, &tcp((pod(5), 40_000), (REMOTE, 9), SYN_ACK)), port);
    assert!(is_delivered(&mut world, &tcp((REMOTE, 9), (NODE, port), ACK), (pod(5), 40_000)));
}

/// RFC 4787 REQ-6, RFC 7857 section 6.
#[test]
fn inbound_packets_do_not_keep_a_udp_mapping_alive() {
    let mut world = Memory::default();
    let port = port_out(&mut world, &udp((pod(5), 40_000), (REMOTE, 7)));
    let reply = udp((REMOTE, 7), (NODE, port));
    for _ in 0..4 {
        world.now_ns += UDP_TIMEOUT_NS / 4;
        assert!(is_delivered(&mut world, &reply, (pod(5), 40_000)));
    }
    world.now_ns += 1;
    assert_eq!(receive(&mut world, &reply).0, Sent::Drop);
    port_out(&mut world, &udp((pod(5), 40_000), (REMOTE, 7)));
    assert!(is_delivered(&mut world, &reply, (pod(5), 40_000)), "refreshed from inside");
}

/// RFC 4787 REQ-5: five minutes, and less only for well-known ports.
#[test]
fn udp_lives_five_minutes_and_dns_half_a_minute() {
    for (remote_port, timeout_ns) in [(7, UDP_TIMEOUT_NS), (53, UDP_DNS_TIMEOUT_NS)] {
        let mut world = Memory::default();
        let port = port_out(&mut world, &udp((pod(5), 40_000), (REMOTE, remote_port)));
        world.now_ns += timeout_ns;
        let reply = udp((REMOTE, remote_port), (NODE, port));
        assert!(is_delivered(&mut world, &reply, (pod(5), 40_000)));
        world.now_ns += 1;
        assert_eq!(receive(&mut world, &reply).0, Sent::Drop);
    }
}

/// RFC 5382 REQ-5.
#[test]
fn an_established_connection_lives_two_hours_and_four_minutes() {
    let mut world = Memory::default();
    let (inside, remote) = ((pod(5), 40_000), (REMOTE, 80));
    let port = port_out(&mut world, &tcp(inside, remote, SYN));
    assert!(is_delivered(&mut world, &tcp(remote, (NODE, port), SYN_ACK), inside));
    port_out(&mut world, &tcp(inside, remote, ACK));
    world.now_ns += 7_440 * SECOND_NS;
    assert!(
        is_delivered(&mut world, &tcp(remote, (NODE, port), ACK), inside),
        "kept alive from outside, too"
    );
    world.now_ns += 7_440 * SECOND_NS + 1;
    assert_eq!(receive(&mut world, &tcp(remote, (NODE, port), ACK)).0, Sent::Drop);
}

/// RFC 5382 REQ-5, RFC 7857 section 2.2.
#[test]
fn a_connection_that_has_ended_lives_four_minutes() {
    for ends in [vec![RST], vec![FIN_ACK]] {
        let mut world = Memory::default();
        let (inside, remote) = ((pod(5), 40_000), (REMOTE, 80));
        let port = port_out(&mut world, &tcp(inside, remote, SYN));
        is_delivered(&mut world, &tcp(remote, (NODE, port), SYN_ACK), inside);
        port_out(&mut world, &tcp(inside, remote, ACK));
        for flags in ends {
            port_out(&mut world, &tcp(inside, remote, flags));
            is_delivered(&mut world, &tcp(remote, (NODE, port), flags), inside);
        }
        world.now_ns += 240 * SECOND_NS;
        let late = tcp(remote, (NODE, port), FIN_ACK);
        assert!(is_delivered(&mut world, &late, inside));
    }
}

#[test]
fn an_idle_flow_ends_for_the_remote_and_lives_on_for_the_pod() {
    let mut world = Memory::default();
    let port = port_out(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    world.now_ns += TCP_TRANSITORY_TIMEOUT_NS + 1;
    let answer = tcp((REMOTE, 80), (NODE, port), SYN_ACK);
    assert_eq!(receive(&mut world, &answer).0, Sent::Drop);
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    assert!(is_delivered(&mut world, &answer, (pod(5), 4000)));
}

#[test]
fn the_time_is_written_once_a_second_and_the_state_at_once() {
    let mut world = Memory::default();
    let key_time = |world: &Memory| world.sessions.values().next().unwrap().last_seen_ns;
    let port = port_out(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    let start = key_time(&world);
    world.now_ns += SESSION_REFRESH_NS / 2;
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    assert_eq!(key_time(&world), start);
    receive(&mut world, &tcp((REMOTE, 80), (NODE, port), SYN_ACK));
    assert_eq!(key_time(&world), world.now_ns, "the state changed");
    world.now_ns += SESSION_REFRESH_NS + 1;
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    assert_eq!(key_time(&world), world.now_ns);
}

#[test]
fn ports_of_the_host_are_never_given_away() {
    let mut world = Memory::default();
    let taken = home(5, 4);
    world.listening.insert((ipv4::TCP, taken.to_be()));
    assert_ne!(port_out(&mut world, &tcp((pod(5), taken), (REMOTE, 80), SYN)), taken);
    for inside in 32_768..33_000 {
        let port = port_out(&mut world, &tcp((pod(5), inside), (REMOTE, 80), SYN));
        assert!(port >= 1024 && !(32_768..=60_999).contains(&port), "{port}");
    }
}

#[test]
fn a_host_that_listens_later_at_a_flows_port_gets_its_strangers() {
    let mut world = Memory::default();
    let port = port_out(&mut world, &tcp((pod(5), 40_000), (REMOTE, 80), SYN));
    world.listening.insert((ipv4::TCP, port.to_be()));
    let stranger = tcp((REMOTE, 4444), (NODE, port), SYN);
    assert_eq!(receive(&mut world, &stranger), (Sent::Next, stranger));
    assert!(is_delivered(&mut world, &tcp((REMOTE, 80), (NODE, port), SYN_ACK), (pod(5), 40_000)));
}

/// While nobody translates replies back, the host's kernel resets what it does not know.
#[test]
fn the_hosts_resets_do_not_end_a_pods_connection() {
    let mut world = Memory::default();
    let port = port_out(&mut world, &tcp((pod(5), 40_000), (REMOTE, 80), SYN));
    assert_eq!(send(&mut world, &tcp((NODE, port), (REMOTE, 80), RST)).0, Sent::Drop);
    assert_eq!(world.count_of(Counter::EgressDropHostReset), 1);
    assert!(is_delivered(&mut world, &tcp((REMOTE, 80), (NODE, port), SYN_ACK), (pod(5), 40_000)));
    let own = tcp((NODE, port), (OTHER, 80), RST);
    assert_eq!(send(&mut world, &own), (Sent::Next, own), "about nobody's flow");
}

#[test]
fn a_host_that_writes_from_a_flows_port_to_its_remote_takes_the_remote_over() {
    let mut world = Memory::default();
    let port = port_out(&mut world, &udp((pod(5), 40_000), (REMOTE, 7)));
    let host = udp((NODE, port), (REMOTE, 7));
    assert_eq!(send(&mut world, &host), (Sent::Next, host.clone()), "never touched");
    assert_eq!(world.count_of(Counter::EgressHost), 1);
    let socket = HostSocket {
        protocol: ipv4::UDP,
        address: ipv4::address(NODE),
        port: port.to_be(),
        remote: ipv4::address(REMOTE),
        remote_port: 7_u16.to_be(),
    };
    world.connected.push(socket);
    let reply = udp((REMOTE, 7), (NODE, port));
    assert_eq!(receive(&mut world, &reply), (Sent::Next, reply.clone()), "the host's");
    assert_eq!(send(&mut world, &udp((pod(5), 40_000), (REMOTE, 7))).0, Sent::Drop);
    assert_eq!(world.count_of(Counter::EgressDropHost), 1);
    // Other traffic of the host's ends nothing.
    port_out(&mut world, &udp((pod(5), 40_000), (OTHER, 7)));
    send(&mut world, &udp((NODE, 40_000), (OTHER, 7)));
    send(&mut world, &udp((NODE, port), ([203, 0, 113, 9], 7)));
    assert!(is_delivered(&mut world, &udp((OTHER, 7), (NODE, port)), (pod(5), 40_000)));
}

/// RFC 6888 REQ-3: what one pod takes is not another's.
#[test]
fn a_flood_of_one_pod_leaves_the_others_their_homes() {
    let mut world = Memory::default();
    let mut taken = 0;
    for inside in 1..=u16::MAX {
        taken += usize::from(send(&mut world, &udp((pod(5), inside), (REMOTE, 7))).0 == Sent::Next);
    }
    assert!((8_000..9_200).contains(&taken), "{taken}: its home and half of the extras");
    assert!(world.count_of(Counter::EgressDropPorts) > 0);
    let block = config().pool.home(5).unwrap();
    assert!(world.blocks[block as usize].refused > 0, "and is counted as the one that was refused");
    for n in 0..64 {
        let port = port_out(&mut world, &udp((pod(6), 40_000 + n), (REMOTE, 7)));
        let block = block_of(port.to_be());
        let extra = block_owner_inside(world.blocks[block as usize].owner).0;
        assert!(Some(block) == config().pool.home(6) || extra == ipv4::address(pod(6)), "{port}");
    }
}

#[test]
fn extras_are_taken_when_the_home_fills_and_have_one_owner() {
    let mut world = Memory::default();
    for n in 0..300 {
        for p in [5, 6] {
            port_out(&mut world, &udp((pod(p), 40_000 + n), (REMOTE, 7)));
        }
    }
    let mut owners = std::collections::BTreeSet::new();
    for (index, value) in &world.ports {
        let block = (index & 0xffff) / BLOCK_PORTS;
        let (inside, _) = owner_inside(*value);
        let home = config().pool.number(block).unwrap() == config().pod_number(inside);
        assert!(home || block_owner_inside(world.blocks[block as usize].owner).0 == inside);
        owners.insert((block, inside));
    }
    let blocks: std::collections::BTreeSet<_> = owners.iter().map(|(block, _)| block).collect();
    assert_eq!(blocks.len(), owners.len(), "no block has two owners");
    assert!(world.blocks.iter().filter(|block| block.owner != BLOCK_FREE).count() >= 2);
}

#[test]
fn a_pod_beyond_the_homes_lives_on_extras() {
    let mut world = Memory::default();
    let port = port_out(&mut world, &udp(([10, 254, 1, 0], 40_000), (REMOTE, 7)));
    let owner = world.blocks[block_of(port.to_be()) as usize].owner;
    assert_eq!(block_owner_inside(owner).0, ipv4::address([10, 254, 1, 0]));
}

#[test]
fn an_ended_flow_gives_its_port_to_a_new_one_without_the_agent() {
    let mut world = Memory::default();
    let port = home(5, 7);
    send(&mut world, &tcp((pod(5), port), (REMOTE, 80), SYN));
    let owned = world.ports.clone();
    // The whole home is taken, so that the next one needs what has ended.
    for n in 0..BLOCK_PORTS as u16 {
        send(&mut world, &tcp((pod(5), home(5, n)), (REMOTE, 80), SYN));
    }
    assert!(world.ports.len() > owned.len());
    world.now_ns += TCP_TRANSITORY_TIMEOUT_NS + 1;
    let sent = port_out(&mut world, &tcp((pod(5), 40_000), (REMOTE, 80), SYN));
    assert_eq!(Some(block_of(sent.to_be())), config().pool.home(5));
    assert_eq!(world.count_of(Counter::EgressReclaimed), 1);
    assert!(is_delivered(&mut world, &tcp((REMOTE, 80), (NODE, sent), SYN_ACK), (pod(5), 40_000)));
    assert_eq!(world.sessions.len(), BLOCK_PORTS as usize, "the ended session has gone");
}

#[test]
fn no_room_drops_the_new_flow_and_keeps_the_old() {
    let mut world = Memory::default();
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    world.sessions_max = 1;
    assert_eq!(send(&mut world, &tcp((pod(5), 4001), (REMOTE, 80), SYN)).0, Sent::Drop);
    assert_eq!(world.count_of(Counter::EgressDropTable), 1);
    assert_eq!(send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN)).0, Sent::Next);
}

/// RFC 5508 REQ-1 and REQ-2.
#[test]
fn echo_identifiers_are_mapped() {
    let mut world = Memory::default();
    let identifiers = [5, 6].map(|p| {
        let (verdict, sent) = send(&mut world, &echo(pod(p), REMOTE, 8, 77));
        assert!(verdict == Sent::Next && is_sealed(&sent));
        u16::from_be_bytes([sent[38], sent[39]])
    });
    assert_ne!(identifiers[0], identifiers[1]);
    for (p, identifier) in [5, 6].into_iter().zip(identifiers) {
        let (verdict, got) = receive(&mut world, &echo(REMOTE, NODE, 0, identifier));
        assert_eq!((verdict, got), (Sent::Next, echo(REMOTE, pod(p), 0, 77)));
    }
}

/// RFC 5508 REQ-4 and REQ-5.
#[test]
fn errors_come_in_with_what_they_quote() {
    const ROUTER: [u8; 4] = [203, 0, 113, 1];
    let mut world = Memory::default();
    for inside in [tcp((pod(5), 40_000), (REMOTE, 80), SYN), udp((pod(5), 40_000), (REMOTE, 7))] {
        let (_, sent) = send(&mut world, &inside);
        for (kind, code) in [(3, 3), (3, 4), (11, 0), (12, 0)] {
            let sessions = world.sessions.clone();
            let (verdict, got) = receive(&mut world, &error(ROUTER, NODE, kind, code, &sent));
            assert_eq!((verdict, got), (Sent::Next, error(ROUTER, pod(5), kind, code, &inside)));
            assert_eq!(world.sessions, sessions, "an error ends nothing and keeps nothing alive");
        }
    }
}

/// RFC 5508 REQ-3 and REQ-4: a pod's own error about what was handed to it.
#[test]
fn errors_go_out_with_what_they_quote() {
    let mut world = Memory::default();
    for (inside, reply) in [
        (udp((pod(5), 40_000), (REMOTE, 7)), udp as fn(End, End) -> Vec<u8>),
        (tcp((pod(5), 40_000), (REMOTE, 7), SYN), |from, to| tcp(from, to, SYN_ACK)),
    ] {
        let port = port_out(&mut world, &inside);
        let outside = reply((REMOTE, 7), (NODE, port));
        let (_, delivered) = receive(&mut world, &outside);
        let (verdict, sent) = send(&mut world, &error(pod(5), REMOTE, 3, 3, &delivered));
        assert_eq!((verdict, &sent), (Sent::Next, &error(NODE, REMOTE, 3, 3, &outside)));
    }
    assert_eq!(world.count_of(Counter::EgressTranslatedError), 2);
    let unknown = error(pod(5), REMOTE, 3, 3, &udp((REMOTE, 7), (pod(5), 4)));
    assert_eq!(send(&mut world, &unknown).0, Sent::Drop);
    let of_another = error(pod(6), REMOTE, 3, 3, &udp((REMOTE, 7), (pod(5), 40_000)));
    assert_eq!(send(&mut world, &of_another).0, Sent::Drop);
    assert_eq!(world.count_of(Counter::EgressDropIcmpError), 2);
}

fn hairpinned(world: &mut Memory, frame: &[u8]) -> (Hairpin, Vec<u8>) {
    let mut frame = frame.to_vec();
    let decided = hairpin::<Ipv4, _, _>(&mut frame[..], world, &config());
    (decided, frame)
}

/// RFC 4787 REQ-9, RFC 5382 REQ-8: with the outside source.
#[test]
fn two_pods_of_a_node_meet_at_their_outside_ports() {
    let mut world = Memory::default();
    for make in [udp as fn(End, End) -> Vec<u8>, |from, to| tcp(from, to, SYN)] {
        let (a, b) = ((pod(5), 40_000), (pod(6), 50_000));
        let (at_a, at_b) = [a, b].map(|end| port_out(&mut world, &make(end, (REMOTE, 7)))).into();
        // Filtering holds here, too: the second must have written to the node's address.
        let (decided, _) = hairpinned(&mut world, &make(a, (NODE, at_b)));
        assert_eq!(decided, Hairpin::Drop(Counter::HairpinDropIn));
        let (decided, frame) = hairpinned(&mut world, &make(b, (NODE, at_a)));
        assert_eq!((decided, frame), (Hairpin::Deliver(ipv4::address(pod(5))), make((NODE, at_b), a)));
        let (decided, frame) = hairpinned(&mut world, &make(a, (NODE, at_b)));
        assert_eq!((decided, frame), (Hairpin::Deliver(ipv4::address(pod(6))), make((NODE, at_a), b)));
    }
}

//= RFC 5508 REQ-7
#[test]
fn errors_about_hairpinned_packets_come_back() {
    let mut world = Memory::default();
    let (a, b) = ((pod(5), 40_000), (pod(6), 50_000));
    let (at_a, at_b) = [a, b].map(|end| port_out(&mut world, &udp(end, (REMOTE, 7)))).into();
    hairpinned(&mut world, &udp(b, (NODE, at_a)));
    let sent = udp(a, (NODE, at_b));
    let (_, delivered) = hairpinned(&mut world, &sent);
    let (decided, got) = hairpinned(&mut world, &error(pod(6), NODE, 3, 3, &delivered));
    assert_eq!((decided, got), (Hairpin::Deliver(ipv4::address(pod(5))), error(NODE, pod(5), 3, 3, &sent)));
}

#[test]
fn what_a_pod_sends_to_the_node_itself_is_the_nodes() {
    let mut world = Memory::default();
    let port = port_out(&mut world, &tcp((pod(6), 40_000), (REMOTE, 7), SYN));
    for frame in [
        tcp((pod(5), 40_000), (NODE, 22), SYN),
        echo(pod(5), NODE, 8, 1),
        ip(132, pod(5), NODE, &[0; 20]),
        error(pod(5), NODE, 3, 3, &udp((REMOTE, 7), (pod(5), 9))),
    ] {
        assert_eq!(hairpinned(&mut world, &frame), (Hairpin::Host, frame));
    }
    world.listening.insert((ipv4::TCP, port.to_be()));
    let frame = tcp((pod(5), 40_000), (NODE, port), SYN);
    assert_eq!(hairpinned(&mut world, &frame), (Hairpin::Host, frame), "the host's socket comes first");
}

/// RFC 4787 REQ-13 and REQ-14.
#[test]
fn fragments_follow_their_first() {
    let mut world = Memory::default();
    let (first, later) = (udp((pod(5), 40_000), (REMOTE, 7)), ip(17, pod(5), REMOTE, &[7; 16]));
    let port = port_out(&mut world, &first);
    assert!(matches!(send(&mut world, &fragment(first, 9, 0, true)).0, Sent::Release(_)));
    let (verdict, sent) = send(&mut world, &fragment(later, 9, 3, false));
    assert_eq!((verdict, sent), (Sent::Next, fragment(ip(17, NODE, REMOTE, &[7; 16]), 9, 3, false)));
    receive(&mut world, &fragment(udp((REMOTE, 7), (NODE, port)), 4, 0, true));
    let later = ip(17, REMOTE, NODE, &[7; 16]);
    let (_, got) = receive(&mut world, &fragment(later, 4, 3, false));
    assert_eq!(got, fragment(ip(17, REMOTE, pod(5), &[7; 16]), 4, 3, false));
}

/// The parts of a datagram with this identification, the first first.
fn parts(from: End, to: End, identification: u16) -> Vec<Vec<u8>> {
    let mut parts = vec![fragment(udp(from, to), identification, 0, true)];
    parts.extend(
        [3, 5, 7].map(|at| fragment(ip(17, from.0, to.0, &[at as u8; 16]), identification, at, true)),
    );
    parts
}

/// What becomes of a frame, and how it looks then.
type Passed = (Sent<Ipv4>, Vec<u8>);

/// What becomes of the fragments that a first one releases.
fn released(world: &mut Memory, sent: Sent<Ipv4>, pass: fn(&mut Memory, &[u8]) -> Passed) -> Vec<Passed> {
    let Sent::Release(key) = sent else { panic!("{sent:?}") };
    world.release(key).iter().map(|frame| pass(world, frame)).collect()
}

/// RFC 4787 REQ-14.
#[test]
fn fragments_that_come_before_their_first_wait_for_it() {
    let mut world = Memory::default();
    let (inside, remote) = ((pod(5), 40_000), (REMOTE, 7));
    let outside = (NODE, port_out(&mut world, &udp(inside, remote)));
    let (sent, left) = (parts(inside, remote, 9), parts(outside, remote, 9));
    for part in sent[1..].iter().rev() {
        assert_eq!(send(&mut world, part), (Sent::Drop, part.clone()));
    }
    assert_eq!(world.count_of(Counter::EgressKept), 3);
    let (verdict, first) = send(&mut world, &sent[0]);
    assert_eq!(first, left[0]);
    let next = |n: usize| (Sent::Next, left[n].clone());
    assert_eq!(released(&mut world, verdict, send), [next(3), next(2), next(1)]);

    // On the way in, the host gets its part, for it may be its own.
    let (came, got) = (parts(remote, outside, 4), parts(remote, inside, 4));
    assert_eq!(receive(&mut world, &came[1]), (Sent::Next, came[1].clone()));
    let (verdict, first) = receive(&mut world, &came[0]);
    assert_eq!(first, got[0]);
    assert_eq!(released(&mut world, verdict, receive), [(Sent::Next, got[1].clone())]);
    assert_eq!(receive(&mut world, &came[2]), (Sent::Next, got[2].clone()), "behind it");
    assert!(world.kept.is_empty());
}

/// Else each of the one's first fragments would have the other's sent again.
#[test]
fn a_first_fragment_releases_nothing_of_another_pod() {
    let mut world = Memory::default();
    let sent = [5, 6].map(|n| parts((pod(n), 40_000), (REMOTE, 7), 9));
    for parts in &sent {
        assert_eq!(send(&mut world, &parts[1]).0, Sent::Drop);
    }
    for parts in sent.iter().rev() {
        let (verdict, _) = send(&mut world, &parts[0]);
        let released = released(&mut world, verdict, send);
        assert!(released.len() == 1 && released[0].0 == Sent::Next);
    }
    assert!(world.kept.is_empty());
}

/// An identification comes back, at the latest after 65,536 datagrams.
#[test]
fn what_is_known_of_a_datagram_is_not_said_of_a_later_one() {
    let mut world = Memory::default();
    let remote = (REMOTE, 7);
    let outside = [5, 6].map(|n| (NODE, port_out(&mut world, &udp((pod(n), 40_000), remote))));
    for part in parts(remote, outside[0], 4) {
        receive(&mut world, &part);
    }
    world.now_ns += fragment::KEPT_TIMEOUT_NS + 2 * (1 << 20);
    let (came, got) = (parts(remote, outside[1], 4), parts(remote, (pod(6), 40_000), 4));
    assert_eq!(receive(&mut world, &came[1]), (Sent::Next, came[1].clone()), "it waits");
    let (verdict, first) = receive(&mut world, &came[0]);
    assert_eq!(first, got[0]);
    assert_eq!(released(&mut world, verdict, receive), [(Sent::Next, got[1].clone())]);
}

fn identification(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[18], frame[19]])
}

/// RFC 6864 section 5.3.1: the remote would put them together.
#[test]
fn datagrams_of_two_pods_have_different_identifications_at_one_remote() {
    let mut world = Memory::default();
    let sent = [5, 6].map(|n| parts((pod(n), 40_000), (REMOTE, 7), 9));
    assert_eq!(send(&mut world, &sent[1][3]).0, Sent::Drop, "it waits");
    let left = [0, 1].map(|n| {
        let (verdict, first) = send(&mut world, &sent[n][0]);
        let mut left = vec![first];
        left.extend(sent[n][1..3].iter().map(|part| send(&mut world, part).1));
        left.extend(released(&mut world, verdict, send).into_iter().map(|(_, frame)| frame));
        left
    });
    assert_eq!((left[0].len(), left[1].len()), (3, 4));
    let numbers = left.each_ref().map(|left| identification(&left[0]));
    assert!(numbers[0] == 9 && numbers[1] != 9, "the first keeps its own: {numbers:?}");
    for (left, number) in left.iter().zip(numbers) {
        assert!(left.iter().all(|part| identification(part) == number));
        assert!(left.iter().all(|part| crate::checksum::sum_bytes(&part[14..34]).is_valid()));
    }
    let twice = send(&mut world, &sent[1][0]).1;
    assert_eq!(identification(&twice), numbers[1], "a duplicate is of the same datagram");
    let again = send(&mut world, &parts((pod(5), 40_000), (OTHER, 7), 9)[0]).1;
    assert_eq!(identification(&again), 9, "another remote has its own numbers");
}

#[test]
fn fragments_of_the_hosts_own_datagrams_are_not_kept() {
    let mut world = Memory::default();
    let port = port_out(&mut world, &udp((pod(5), 40_000), (REMOTE, 7)));
    world.connected.push(HostSocket {
        protocol: ipv4::UDP,
        address: ipv4::address(NODE),
        port: port.to_be(),
        remote: ipv4::address(OTHER),
        remote_port: 7_u16.to_be(),
    });
    for to in [111, port] {
        for part in parts((OTHER, 7), (NODE, to), to) {
            assert_eq!(receive(&mut world, &part), (Sent::Next, part));
        }
    }
    assert!(world.kept.is_empty());
}

#[test]
fn what_is_kept_is_bounded_in_number_length_and_time() {
    let mut world = Memory::default();
    let (inside, remote) = ((pod(5), 40_000), (REMOTE, 7));
    let [first, later, ..] = &parts(inside, remote, 9)[..] else { panic!("four parts") };
    for n in 0..fragment::KEPT_OF_DATAGRAM_MAX + 2 {
        assert_eq!(send(&mut world, later).0, Sent::Drop, "{n}");
    }
    assert_eq!(world.count_of(Counter::EgressDropFragment), 2, "too many");
    let mut long = later.clone();
    long.resize(fragment::KEPT_BYTES_MAX + 1, 0);
    assert_eq!(send(&mut world, &frame::fragment(long, 8, 3, false)).0, Sent::Drop);
    assert_eq!(world.count_of(Counter::EgressDropFragment), 3, "too long");

    world.now_ns += fragment::KEPT_TIMEOUT_NS + 1;
    assert_eq!(send(&mut world, later).0, Sent::Drop);
    assert_eq!(world.kept.len(), fragment::KEPT_OF_DATAGRAM_MAX.into(), "it takes the place of an old one");
    let (verdict, _) = send(&mut world, first);
    assert_eq!(released(&mut world, verdict, send).len(), 1, "the old ones are not sent");
    assert!(world.kept.is_empty());
}

/// RFC 4787 REQ-2: a node with several addresses uses the one that its routes name for the remote.
#[test]
fn a_remote_sees_the_address_of_its_route_and_only_that_one_leads_back() {
    let mut world = Memory::default();
    world.sources.insert(ipv4::address(OTHER), ipv4::address(SECOND_NODE));
    let (_, sent) = send(&mut world, &udp((pod(5), 40_000), (OTHER, 7)));
    let (address, port) = source(&sent);
    assert_eq!(address, SECOND_NODE);
    assert_eq!(port_out(&mut world, &udp((pod(5), 40_000), (REMOTE, 7))), port);
    assert!(is_delivered(&mut world, &udp((OTHER, 7), (SECOND_NODE, port)), (pod(5), 40_000)));
    assert_eq!(receive(&mut world, &udp((OTHER, 7), (NODE, port))).0, Sent::Drop);
    let elsewhere = udp((OTHER, 7), ([192, 0, 2, 99], port));
    assert_eq!(receive(&mut world, &elsewhere), (Sent::Next, elsewhere), "forwarded, not the node's");
}

#[test]
fn stray_packets_of_a_pod_leave_translated_or_not_at_all() {
    let mut world = Memory::default();
    for flags in [RST, FIN_ACK, ACK, SYN_ACK, 0] {
        let (verdict, sent) = send(&mut world, &tcp((pod(5), 40_000 + flags as u16), (REMOTE, 80), flags));
        assert!(verdict == Sent::Drop || source(&sent).0 == NODE, "{flags:#x}");
    }
    for frame in [
        echo(pod(5), REMOTE, 0, 1),
        echo(pod(5), REMOTE, 13, 1),
        ip(132, pod(5), REMOTE, &[0; 20]),
        ip(47, pod(5), REMOTE, &[0; 20]),
        error(pod(5), REMOTE, 3, 3, &udp((REMOTE, 7), (pod(5), 9))),
    ] {
        assert_eq!(send(&mut world, &frame).0, Sent::Drop);
    }
}

#[test]
fn no_truncation_leaves_with_a_private_source() {
    let port = home(5, 1);
    let whole = tcp((pod(5), port), (REMOTE, 80), SYN);
    for n in 0..whole.len() {
        let mut world = Memory::default();
        let (verdict, frame) = send(&mut world, &whole[..n]);
        // Before the EtherType is known, it is no IPv4.
        let expected = if n < 14 { Sent::Next } else { Sent::Drop };
        assert_eq!(verdict, expected, "{n} bytes");
        assert_eq!(frame, whole[..n]);
        let (verdict, frame) = receive(&mut world, &tcp((REMOTE, 80), (NODE, port), SYN_ACK)[..n]);
        assert_eq!((verdict, frame.len()), (Sent::Next, n));
    }
}
