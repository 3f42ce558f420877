//! Packets that are too large, and their parts in any order.

use std::net::UdpSocket;

use hextet_conformance::{
    World, each_backend, packet,
    socket::{endpoint, exchange, raw, receive_bytes, udp},
    world::{FAR_IPV6, FAR_MTU, NODE, REMOTE, patience},
};
use hextet_tests::{command::Run, wait::wait_until};

each_backend! {
    a_datagram_in_fragments_goes_out_and_comes_back,
    fragments_go_out_in_any_order,
    fragments_come_in_in_any_order,
    two_pods_with_one_identification_are_not_mixed,
    a_packet_that_is_too_large_and_may_be_cut_is_cut,
    a_packet_that_is_too_large_and_may_not_be_cut_is_told,
    packet_too_big_reaches_the_pod,
}

fn datagram(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31) >> 3) as u8).collect()
}

fn open(world: &World) -> (UdpSocket, UdpSocket, u16) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    let outside = exchange(&pod, &remote);
    (pod, remote, outside.port())
}

//= RFC 4787 REQ-14, RFC 791 3.2/fragments
fn a_datagram_in_fragments_goes_out_and_comes_back(world: &World) {
    let (pod, remote, port) = open(world);
    let sent = datagram(8_000);
    pod.send_to(&sent, endpoint(&remote)).expect("it is sent");
    let (got, source) = receive_bytes(&remote);
    assert!(got == sent && source.port() == port, "{} bytes from {source}", got.len());
    remote.send_to(&sent, source).expect("it is sent");
    assert!(receive_bytes(&pod).0 == sent);
}

//= RFC 4787 REQ-14
fn fragments_go_out_in_any_order(world: &World) {
    let (_pod, remote, port) = open(world);
    let sent = datagram(1_000);
    let whole = packet::udp((World::pod_ipv4(1), 5000), (REMOTE, 7), 0x4242, &sent);
    let [first, last] = packet::fragments(&whole, 400);
    raw(&world.pod(1), &last);
    raw(&world.pod(1), &first);
    let (got, source) = receive_bytes(&remote);
    assert!(got == sent && source.port() == port, "{} bytes from {source}", got.len());
}

//= RFC 4787 REQ-14
fn fragments_come_in_in_any_order(world: &World) {
    let (pod, _remote, port) = open(world);
    let sent = datagram(1_000);
    let whole = packet::udp((REMOTE, 7), (NODE, port), 0x4242, &sent);
    let [first, last] = packet::fragments(&whole, 400);
    raw(&world.net(), &last);
    raw(&world.net(), &first);
    assert!(receive_bytes(&pod).0 == sent);
}

//= RFC 6864 5.3.1/unique, RFC 7857 10/identification
fn two_pods_with_one_identification_are_not_mixed(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let parts = [1, 2].map(|n| {
        let from = (World::pod_ipv4(n), 5000);
        let whole = packet::udp(from, (REMOTE, 7), 0x4242, &[n; 1_000]);
        (n, packet::fragments(&whole, 400))
    });
    for part in [0, 1] {
        for (n, parts) in &parts {
            raw(&world.pod(*n), &parts[part]);
        }
    }
    let mut got = [receive_bytes(&remote).0, receive_bytes(&remote).0];
    got.sort();
    assert!(got == [vec![1; 1_000], vec![2; 1_000]], "the datagrams are mixed");
}

/// Both ends of the node's link carry less.
fn narrow(world: &World, mtu: u16) {
    world.shell(&world.node(), &format!("ip link set eth0 mtu {mtu}"));
    world.shell(&world.net(), &format!("ip link set eth0 mtu {mtu}"));
}

//= RFC 4787 REQ-13a
fn a_packet_that_is_too_large_and_may_be_cut_is_cut(world: &World) {
    let (_pod, remote, port) = open(world);
    narrow(world, 1400);
    let sent = datagram(1_440);
    raw(&world.pod(1), &packet::udp((World::pod_ipv4(1), 5000), (REMOTE, 7), 0x4242, &sent));
    let (got, source) = receive_bytes(&remote);
    assert!(got == sent && source.port() == port, "{} bytes from {source}", got.len());
}

//= RFC 4787 REQ-13, RFC 1191 4/next-hop-mtu
fn a_packet_that_is_too_large_and_may_not_be_cut_is_told(world: &World) {
    let (_pod, _remote, _) = open(world);
    narrow(world, 1400);
    let errors = world.capture(&world.pod(1), "icmp");
    let whole = packet::udp((World::pod_ipv4(1), 5000), (REMOTE, 7), 0x4242, &datagram(1_440));
    raw(&world.pod(1), &packet::changed(&whole, |packet| packet[6] = 0x40));
    let is_told = |frame: &hextet_tests::capture::Packet| {
        packet::Error::read(frame).is_some_and(|error| error.kind == (packet::UNREACHABLE, 4) && error.intact)
    };
    let seen = errors.wait_packets(patience(), 1, is_told).expect("the pod is told");
    let message = packet::of(&seen[0]).expect("IPv4");
    assert_eq!(message[26..28], 1400_u16.to_be_bytes(), "the next hop's MTU");
}

//= RFC 8201 4/reduce, RFC 8200 4.5/no-router-fragments
fn packet_too_big_reaches_the_pod(world: &World) {
    let at = std::net::SocketAddr::from((World::pod_ipv6(1), 5000));
    let pod =
        world.pod(1).run(|| UdpSocket::bind(at)).expect("the namespace is there").expect("the pod's address");
    let far = || {
        // A route that knows the path's MTU shows it.
        let run =
            Run::new(&["ip", "-6", "route", "get", &FAR_IPV6.to_string()]).inside(&world.pod(1)).success();
        run.is_ok_and(|text| text.contains(&format!("mtu {FAR_MTU}")))
    };
    let told = || {
        let _ = pod.send_to(&[0; 1400], (FAR_IPV6, 7));
        far()
    };
    wait_until(patience(), "the pod has learnt the path's MTU", told).unwrap_or_else(|e| panic!("{e:#}"));
}
