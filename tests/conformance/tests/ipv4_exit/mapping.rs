//! Which outside port an inside port has.
//!
//! A backend that keeps every port looks right as long as nobody else wants it: so another pod takes it first.

use std::{collections::BTreeSet, net::SocketAddrV4};

use hextet_conformance::{
    World, each_backend, packet,
    socket::{carries, crosses, exchange, raw_all, tcp_from, tcp_listen, udp},
    world::{NODE, OTHER_REMOTE, REMOTE},
};

/// Outside ports come in blocks of so many, aligned.
const BLOCK_PORTS: u32 = 128;

each_backend! {
    one_outside_port_for_all_udp_remotes,
    one_outside_port_for_all_tcp_remotes,
    one_inside_udp_port_of_two_pods_has_two_outside_ports,
    one_inside_tcp_port_of_two_pods_has_two_outside_ports,
    a_port_keeps_its_parity,
    an_unprivileged_port_stays_unprivileged,
    a_port_of_the_pods_own_block_is_kept,
    no_block_has_ports_of_two_pods,
    a_flood_of_one_pod_takes_nothing_of_another,
}

/// The pod's inside port has another outside port: another pod had it first, towards the same remote.
fn with_a_rival(world: &World, port: u16) -> (std::net::UdpSocket, std::net::UdpSocket) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let rival = udp(&world.pod(2), (World::pod_ipv4(2), port));
    exchange(&rival, &remote);
    (udp(&world.pod(1), (World::pod_ipv4(1), port)), remote)
}

//= RFC 4787 REQ-1, RFC 4787 REQ-11
fn one_outside_port_for_all_udp_remotes(world: &World) {
    let (pod, rivals) = with_a_rival(world, 5000);
    let others = [(REMOTE, 8), (OTHER_REMOTE, 7), (OTHER_REMOTE, 9)].map(|at| udp(&world.net(), at));
    let outside = exchange(&pod, &others[0]);
    assert_eq!(*outside.ip(), NODE);
    // The rival's remote comes last: towards the others its port was free.
    for remote in others.iter().chain([&rivals]) {
        assert_eq!(exchange(&pod, remote), outside, "towards {remote:?}");
    }
}

//= RFC 5382 REQ-1
fn one_outside_port_for_all_tcp_remotes(world: &World) {
    let remotes = [(REMOTE, 80), (REMOTE, 81), (OTHER_REMOTE, 80)];
    let listeners = remotes.map(|remote| tcp_listen(&world.net(), remote));
    let rival = tcp_from(&world.pod(2), (World::pod_ipv4(2), 5000), remotes[0]).expect("the rival connects");
    let from_rival = listeners[0].accept().expect("the rival's connection");
    let connect = |i: usize| {
        let stream =
            tcp_from(&world.pod(1), (World::pod_ipv4(1), 5000), remotes[i]).expect("the pod connects");
        (stream, listeners[i].accept().expect("the pod's connection").1)
    };
    // The rival's remote comes last: towards the others its port was free.
    let connections = [1, 2, 0].map(connect);
    for (_, outside) in &connections {
        assert_eq!(*outside, connections[0].1);
    }
    drop((rival, from_rival));
}

//= RFC 4787 REQ-3
fn one_inside_udp_port_of_two_pods_has_two_outside_ports(world: &World) {
    let (pod, remote) = with_a_rival(world, 5000);
    let rival = udp(&world.pod(3), (World::pod_ipv4(3), 5000));
    let (a, b) = (exchange(&pod, &remote), exchange(&rival, &remote));
    assert_ne!(a, b);
    // And each answer finds its own.
    crosses(&remote, (NODE, a.port()), &pod, "for the first");
    crosses(&remote, (NODE, b.port()), &rival, "for the second");
}

//= RFC 5382 REQ-7
fn one_inside_tcp_port_of_two_pods_has_two_outside_ports(world: &World) {
    let listener = tcp_listen(&world.net(), (REMOTE, 80));
    let connect = |n| {
        let pod =
            tcp_from(&world.pod(n), (World::pod_ipv4(n), 5000), (REMOTE, 80)).expect("the pod connects");
        let (remote, outside) = listener.accept().expect("the pod's connection");
        (pod, remote, outside)
    };
    let (mut first, mut second) = (connect(1), connect(2));
    assert_ne!(first.2, second.2);
    carries(&mut first.0, &mut first.1);
    carries(&mut second.0, &mut second.1);
}

//= RFC 4787 REQ-4, RFC 7857 8/parity
fn a_port_keeps_its_parity(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    for port in 5000..5012 {
        let of = |n| {
            let pod = udp(&world.pod(n), (World::pod_ipv4(n), port));
            exchange(&pod, &remote).port()
        };
        assert_eq!((of(1) % 2, of(2) % 2), (port % 2, port % 2), "inside port {port}");
    }
}

//= RFC 4787 REQ-3a
fn an_unprivileged_port_stays_unprivileged(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    for port in [1024, 1025, 5000, 40_000, 65_535] {
        for n in 1..=3 {
            let pod = udp(&world.pod(n), (World::pod_ipv4(n), port));
            assert!(exchange(&pod, &remote).port() >= 1024, "inside port {port} of pod {n}");
        }
    }
}

/// Whatever the block is: the outside port of some inside port is of it.
//= RFC 7422 2/preserved
fn a_port_of_the_pods_own_block_is_kept(world: &World) {
    let (pod, remote) = with_a_rival(world, 5000);
    let own = exchange(&pod, &remote).port();
    // The next port of the same parity may be the block's last but one, the one before its first.
    let kept = [own + 2, own - 2].iter().any(|port| {
        let pod = udp(&world.pod(1), (World::pod_ipv4(1), *port));
        exchange(&pod, &remote).port() == *port
    });
    assert!(kept, "neither {} nor {} is kept", own + 2, own - 2);
}

//= RFC 7422 2/range, RFC 6888 REQ-14
fn no_block_has_ports_of_two_pods(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let ports = |n: u8| -> BTreeSet<u16> {
        let outside = |i: u16| {
            let pod = udp(&world.pod(n), (World::pod_ipv4(n), 2000 + 997 * i + u16::from(n)));
            exchange(&pod, &remote).port()
        };
        (0..24).map(outside).collect()
    };
    let blocks = |ports: &BTreeSet<u16>| -> BTreeSet<u32> {
        ports.iter().map(|port| u32::from(*port) / BLOCK_PORTS).collect()
    };
    let (a, b) = (ports(1), ports(2));
    assert!(blocks(&a).is_disjoint(&blocks(&b)), "{a:?} and {b:?} are mixed");
}

//= RFC 6888 REQ-4, RFC 6888 REQ-11a, RFC 6888 REQ-11d
fn a_flood_of_one_pod_takes_nothing_of_another(world: &World) {
    const FLOWS: u16 = 20_000;
    let remote = udp(&world.net(), (REMOTE, 7));
    let old = udp(&world.pod(1), (World::pod_ipv4(1), 2000));
    let outside = exchange(&old, &remote);
    let from: Vec<Vec<u8>> =
        (0..FLOWS).map(|i| packet::udp((World::pod_ipv4(1), 10_000 + i), (REMOTE, 7), 0, b"flood")).collect();
    let mut seen = BTreeSet::new();
    remote.set_nonblocking(true).expect("a flag");
    for batch in from.chunks(100) {
        raw_all(&world.pod(1), batch);
        let mut buffer = [0; 64];
        while let Ok((_, std::net::SocketAddr::V4(source))) = remote.recv_from(&mut buffer) {
            seen.insert(SocketAddrV4::port(&source));
        }
    }
    remote.set_nonblocking(false).expect("a flag");
    assert!(seen.len() < usize::from(FLOWS) / 2, "one pod got {} ports", seen.len());
    let other = udp(&world.pod(2), (World::pod_ipv4(2), 2000));
    exchange(&other, &remote);
    assert_eq!(exchange(&old, &remote), outside, "the flow that was there before");
}
