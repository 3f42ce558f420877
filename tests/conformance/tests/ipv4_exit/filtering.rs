//! Who gets in. That something does not arrive is shown by what was sent after it and does.

use hextet_conformance::{
    World, each_backend, packet,
    socket::{carries, crosses, exchange, raw, receive, tcp_from, tcp_listen, udp},
    world::{NODE, OTHER_REMOTE, REMOTE, patience},
};
use hextet_tests::capture::Packet;

each_backend! {
    another_port_of_a_known_remote_gets_in,
    another_address_is_dropped_in_silence,
    an_unsolicited_syn_is_dropped_in_silence,
}

//= RFC 4787 REQ-8, RFC 6888 REQ-7
fn another_port_of_a_known_remote_gets_in(world: &World) {
    let (remote, beside) = (udp(&world.net(), (REMOTE, 7)), udp(&world.net(), (REMOTE, 9)));
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    let outside = exchange(&pod, &remote);
    beside.send_to(b"from beside", outside).expect("it is sent");
    let first = remote_after(&pod, &remote, outside);
    assert_eq!((first.0.as_str(), first.1.port()), ("from beside", 9));
}

/// What comes to the pod first, when the remote sends something now.
fn remote_after(
    pod: &std::net::UdpSocket,
    remote: &std::net::UdpSocket,
    outside: std::net::SocketAddrV4,
) -> (String, std::net::SocketAddrV4) {
    remote.send_to(b"from the remote", outside).expect("it is sent");
    receive(pod)
}

//= RFC 4787 REQ-8
fn another_address_is_dropped_in_silence(world: &World) {
    let (remote, stranger) = (udp(&world.net(), (REMOTE, 7)), udp(&world.net(), (OTHER_REMOTE, 7)));
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    let outside = exchange(&pod, &remote);
    // Connected, so that an ICMP error would be told.
    stranger.connect(outside).expect("an address");
    stranger.send(b"from a stranger").expect("it is sent");
    assert_eq!(remote_after(&pod, &remote, outside).0, "from the remote");
    let told = stranger.take_error().expect("an option");
    assert!(told.is_none(), "the stranger is told: {told:?}");
    exchange(&pod, &remote);
}

//= RFC 5382 REQ-3, RFC 5382 REQ-4, RFC 5382 REQ-4a
fn an_unsolicited_syn_is_dropped_in_silence(world: &World) {
    let listener = tcp_listen(&world.net(), (REMOTE, 80));
    let mut pod =
        tcp_from(&world.pod(1), (World::pod_ipv4(1), 5000), (REMOTE, 80)).expect("the pod connects");
    let (mut remote, outside) = listener.accept().expect("the pod's connection");
    let to_stranger = world.capture(&world.net(), &format!("src host {NODE} and dst host {OTHER_REMOTE}"));
    raw(&world.net(), &packet::tcp((OTHER_REMOTE, 80), (NODE, outside.port()), packet::SYN));
    carries(&mut pod, &mut remote);
    // What tcpdump has seen by now it shows with the next packet.
    let known = udp(&world.net(), (OTHER_REMOTE, 7));
    crosses(&udp(&world.pod(2), (World::pod_ipv4(2), 6000)), (OTHER_REMOTE, 7), &known, "the end");
    let is_udp = |frame: &Packet| packet::of(frame).is_some_and(|p| p[9] == packet::UDP);
    to_stranger.wait_packets(patience(), 1, is_udp).expect("the end is seen");
    let seen = to_stranger.packets().expect("a capture of an Ethernet");
    let answers: Vec<_> = seen.into_iter().filter(|frame| !is_udp(frame)).collect();
    assert_eq!(answers, [], "the stranger is answered");
}
