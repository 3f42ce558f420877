//! What else an IPv4 packet can hold.

use hextet_conformance::{
    Backend, World, each_backend, packet,
    socket::{exchange, raw, receive_bytes, udp},
    world::{NODE, REMOTE, patience},
};

each_backend! { udp_without_a_checksum_stays_without, other_protocols_are_dropped_and_counted }

//= RFC 768 checksum/zero
fn udp_without_a_checksum_stays_without(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let rival = udp(&world.pod(2), (World::pod_ipv4(2), 5000));
    exchange(&rival, &remote);
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    let port = exchange(&pod, &remote).port();
    let without = |packet: Vec<u8>| packet::changed(&packet, |packet| packet[26..28].fill(0));
    let bare = |capture: &hextet_tests::capture::Capture, text: &[u8]| {
        let is_it =
            |frame: &hextet_tests::capture::Packet| packet::of(frame).is_some_and(|p| p.ends_with(text));
        let seen = capture.wait_packets(patience(), 1, is_it).expect("it arrives");
        assert_eq!(packet::of(&seen[0]).expect("IPv4")[26..28], [0, 0], "{}", String::from_utf8_lossy(text));
    };
    let outside = world.capture(&world.net(), "udp");
    raw(&world.pod(1), &without(packet::udp((World::pod_ipv4(1), 5000), (REMOTE, 7), 0, b"out without")));
    assert_eq!(receive_bytes(&remote).0, b"out without");
    bare(&outside, b"out without");
    let inside = world.capture(&world.pod(1), "udp");
    raw(&world.net(), &without(packet::udp((REMOTE, 7), (NODE, port), 0, b"in without")));
    assert_eq!(receive_bytes(&pod).0, b"in without");
    bare(&inside, b"in without");
}

/// They have no ports to tell one pod from another.
//= RFC 6888 REQ-1
fn other_protocols_are_dropped_and_counted(world: &World) {
    const SCTP: u8 = 132;
    const GRE: u8 = 47;
    let outside = world.capture(&world.net(), "proto 132 or proto 47 or udp");
    for protocol in [SCTP, GRE] {
        raw(&world.pod(1), &packet::ipv4(protocol, World::pod_ipv4(1), REMOTE, 0, &[0; 24]));
    }
    exchange(&udp(&world.pod(1), (World::pod_ipv4(1), 5000)), &udp(&world.net(), (REMOTE, 7)));
    let is_udp =
        |frame: &hextet_tests::capture::Packet| packet::of(frame).is_some_and(|p| p[9] == packet::UDP);
    outside.wait_packets(patience(), 1, is_udp).expect("UDP is seen");
    let others =
        outside.packets().expect("a capture of an Ethernet").iter().filter(|frame| !is_udp(frame)).count();
    assert_eq!(others, 0, "they leave");
    if world.backend() == Backend::Ebpf {
        assert_eq!(world.count("masquerade_egress", "drop_protocol"), 2);
    }
}
