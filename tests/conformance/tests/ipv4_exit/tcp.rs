//! How connections begin and end.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, TcpListener},
};

use hextet_conformance::{
    World, each_backend, packet,
    socket::{carries, exchange, raw, tcp_begin, tcp_from, tcp_listen, udp},
    world::{NODE, OTHER_REMOTE, REMOTE, patience},
};
use hextet_tests::{
    capture::{Capture, Packet},
    wait::wait_for,
};
use nix::sys::socket::{setsockopt, sockopt};

each_backend! {
    a_connection_carries_both_ways_and_closes,
    both_ends_may_open_at_once,
    a_late_packet_after_the_close_is_translated,
    a_late_packet_after_a_reset_is_translated,
    a_reset_gives_no_port_to_another_at_once,
}

//= RFC 5382 REQ-2
fn a_connection_carries_both_ways_and_closes(world: &World) {
    let listener = tcp_listen(&world.net(), (REMOTE, 80));
    let mut pod =
        tcp_from(&world.pod(1), (World::pod_ipv4(1), 5000), (REMOTE, 80)).expect("the pod connects");
    let (mut remote, outside) = listener.accept().expect("the pod's connection");
    assert_eq!(outside.ip(), NODE);
    carries(&mut pod, &mut remote);
    // Half of it closes, and the other half still carries.
    remote.shutdown(Shutdown::Write).expect("it can be closed");
    pod.write_all(b"the rest").expect("it can be written to");
    pod.shutdown(Shutdown::Write).expect("it can be closed");
    let mut rest = String::new();
    remote.read_to_string(&mut rest).expect("all arrives");
    assert_eq!(rest, "the rest");
}

/// RFC 9293 section 3.5: both have sent a SYN before either has seen the other's.
//= RFC 5382 REQ-2a
fn both_ends_may_open_at_once(world: &World) {
    let inside = (World::pod_ipv4(1), 5000);
    let listener = tcp_listen(&world.net(), (OTHER_REMOTE, 80));
    let known = tcp_from(&world.pod(1), inside, (OTHER_REMOTE, 80)).expect("the pod connects");
    let (_accepted, outside) = listener.accept().expect("the pod's connection");
    // The pod's SYN is lost outside.
    let rule = "ip saddr 192.0.2.11 tcp dport 81 tcp flags & (syn | ack) == syn";
    world.shell(
        &world.net(),
        &format!("nft add table ip t; nft 'add chain ip t c {{ type filter hook prerouting priority 0; }}'; nft 'add rule ip t c {rule} counter drop'"),
    );
    let mut pod = tcp_begin(&world.pod(1), inside, (REMOTE, 81));
    let lost = || {
        let text = hextet_tests::command::Run::new(&["nft", "list", "table", "ip", "t"])
            .inside(&world.net())
            .success();
        text.is_ok_and(|text| !text.contains("packets 0 "))
    };
    hextet_tests::wait_until(patience(), "the pod's SYN is lost", lost).unwrap_or_else(|e| panic!("{e:#}"));
    let mut remote =
        tcp_from(&world.net(), (REMOTE, 81), (NODE, outside.port())).expect("the remote connects");
    let connected = || pod.peer_addr().map_err(|e| e.to_string());
    wait_for(patience(), "the pod is connected", connected).unwrap_or_else(|e| panic!("{e:#}"));
    carries(&mut pod, &mut remote);
    drop(known);
}

/// What the remote sends of a connection, so that its last segment can be sent again.
fn segments_of_the_remote(world: &World) -> Capture {
    world.capture(&world.net(), &format!("tcp and src host {REMOTE} and src port 80"))
}

/// Sends the remote's last segment again, when the connection is over; it arrives in the pod.
fn late_packet_arrives(world: &World, segments: Capture) {
    let seen = segments.wait_packets(patience(), 2, |_| true).expect("segments of the remote");
    // Its checksum was left to a device to finish.
    let late = packet::changed(&seen.last().and_then(packet::of).expect("IPv4"), |_| {});
    let is_late =
        |frame: &Packet| packet::of(frame).is_some_and(|p| p[22..28] == [&PORT[..], &late[24..28]].concat());
    const PORT: [u8; 2] = 5000_u16.to_be_bytes();
    let inside = world.capture(&world.pod(1), &format!("tcp and src host {REMOTE}"));
    raw(&world.net(), &late);
    inside.wait_packets(patience(), 1, is_late).expect("the late packet arrives in the pod");
}

//= RFC 7857 2/states
fn a_late_packet_after_the_close_is_translated(world: &World) {
    let segments = segments_of_the_remote(world);
    let listener = tcp_listen(&world.net(), (REMOTE, 80));
    let mut pod =
        tcp_from(&world.pod(1), (World::pod_ipv4(1), 5000), (REMOTE, 80)).expect("the pod connects");
    let (mut remote, _) = listener.accept().expect("the pod's connection");
    carries(&mut pod, &mut remote);
    remote.shutdown(Shutdown::Write).expect("it can be closed");
    pod.read_to_end(&mut Vec::new()).expect("the end arrives");
    drop(pod);
    remote.read_to_end(&mut Vec::new()).expect("the end arrives");
    late_packet_arrives(world, segments);
}

/// Connects and resets; gives the outside port.
fn reset(world: &World, listener: &TcpListener) -> u16 {
    let mut pod =
        tcp_from(&world.pod(1), (World::pod_ipv4(1), 5000), (REMOTE, 80)).expect("the pod connects");
    let (mut remote, outside) = listener.accept().expect("the pod's connection");
    carries(&mut pod, &mut remote);
    let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&pod, sockopt::Linger, &at_once).expect("an option");
    drop(pod);
    let told = remote.read(&mut [0; 8]).expect_err("the connection is reset");
    assert_eq!(told.kind(), ErrorKind::ConnectionReset);
    outside.port()
}

//= RFC 7857 2.2/translate, RFC 7857 2.2/wait
fn a_late_packet_after_a_reset_is_translated(world: &World) {
    let segments = segments_of_the_remote(world);
    reset(world, &tcp_listen(&world.net(), (REMOTE, 80)));
    late_packet_arrives(world, segments);
}

//= RFC 6888 REQ-8, RFC 7857 2.2/wait
fn a_reset_gives_no_port_to_another_at_once(world: &World) {
    let listener = tcp_listen(&world.net(), (REMOTE, 80));
    let port = reset(world, &listener);
    let _other =
        tcp_from(&world.pod(2), (World::pod_ipv4(2), 5000), (REMOTE, 80)).expect("the other pod connects");
    assert_ne!(listener.accept().expect("its connection").1.port(), port);
    // UDP has ports of its own.
    exchange(&udp(&world.pod(2), (World::pod_ipv4(2), 5000)), &udp(&world.net(), (REMOTE, 7)));
}
