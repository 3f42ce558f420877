//! Echoes, and errors in both directions.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _},
};

use hextet_conformance::{
    World, each_backend,
    packet::{self, Error, PARAMETER_PROBLEM, PORT, TIME_EXCEEDED, UNREACHABLE},
    socket::{crosses, exchange, raw, receive, udp},
    world::{FAR, FAR_MTU, NODE, OTHER_REMOTE, REMOTE, ROUTER, patience},
};
use hextet_tests::{capture::Capture, netns::NetNs, scaled, wait::wait_until};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, bind, socket};

each_backend! {
    two_pods_may_use_one_echo_identifier,
    one_outside_identifier_for_all_remotes,
    port_unreachable_reaches_the_pod,
    time_exceeded_reaches_the_pod,
    an_error_about_a_packet_with_options_reaches_the_pod,
    an_error_with_a_wrong_checksum_does_no_harm,
    fragmentation_needed_reaches_the_pod,
    a_pods_own_port_unreachable_reaches_the_remote,
    an_icmp_error_ends_no_mapping,
}

/// A socket whose "port" is the identifier of its echoes.
fn ping(place: &NetNs, at: Ipv4Addr, identifier: u16) -> UdpSocket {
    let make = || {
        let socket =
            socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?;
        let address = SockaddrIn::from(std::net::SocketAddrV4::new(at, identifier));
        bind(socket.as_raw_fd(), &address).map(|()| socket)
    };
    let socket = place.run(make).expect("the namespace is there").expect("pods may ping");
    let socket = into_udp(socket);
    socket.set_read_timeout(Some(scaled(patience()))).expect("a time");
    socket
}

#[expect(unsafe_code, reason = "std has no type for a ping socket; its calls are a UDP socket's")]
fn into_udp(socket: std::os::fd::OwnedFd) -> UdpSocket {
    // SAFETY: the descriptor is open and owned by nobody else, for `into_raw_fd` gave it up.
    unsafe { UdpSocket::from_raw_fd(socket.into_raw_fd()) }
}

/// Pings and waits for the reply.
fn echoes(socket: &UdpSocket, to: Ipv4Addr, text: &str) {
    let request = [&[8, 0, 0, 0, 0, 0, 0, 1], text.as_bytes()].concat();
    socket.send_to(&request, (to, 0)).expect("the request is sent");
    let mut reply = [0; 64];
    let (len, from) = socket.recv_from(&mut reply).unwrap_or_else(|e| panic!("no reply from {to}: {e}"));
    assert_eq!((from.ip(), reply[0], &reply[8..len]), (to.into(), 0, text.as_bytes()));
}

//= RFC 5508 REQ-1
fn two_pods_may_use_one_echo_identifier(world: &World) {
    let pods = [1, 2].map(|n| ping(&world.pod(n), World::pod_ipv4(n), 77));
    for (pod, text) in pods.iter().zip(["first", "second"]) {
        echoes(pod, REMOTE, text);
    }
    for (pod, text) in pods.iter().zip(["first again", "second again"]) {
        echoes(pod, REMOTE, text);
    }
}

//= RFC 5508 REQ-1a
fn one_outside_identifier_for_all_remotes(world: &World) {
    let [rival, pod] = [2, 1].map(|n| ping(&world.pod(n), World::pod_ipv4(n), 77));
    echoes(&rival, REMOTE, "rival");
    let requests = world.capture(&world.net(), &format!("src host {NODE} and icmp[icmptype] == icmp-echo"));
    // The rival's remote comes last: towards the other its identifier was free.
    echoes(&pod, OTHER_REMOTE, "one");
    echoes(&pod, REMOTE, "other");
    let seen = requests.wait_packets(patience(), 2, |_| true).expect("both are seen");
    let identifiers: Vec<_> =
        seen.iter().filter_map(packet::of).map(|packet| packet[24..26].to_vec()).collect();
    assert_eq!(identifiers[0], identifiers[1]);
}

/// The first ICMP error that arrives in a place.
fn first_error(capture: &Capture) -> Error {
    let seen =
        capture.wait_packets(patience(), 1, |frame| Error::read(frame).is_some()).expect("an error arrives");
    Error::read(&seen[0]).expect("it was read")
}

//= RFC 4787 REQ-12b, RFC 5382 REQ-9, RFC 5508 REQ-4, RFC 5508 REQ-10a
fn port_unreachable_reaches_the_pod(world: &World) {
    let errors = world.capture(&world.pod(1), "icmp");
    // Another pod has the port, so that this one's is translated.
    let remote = udp(&world.net(), (REMOTE, 7));
    exchange(&udp(&world.pod(2), (World::pod_ipv4(2), 5000)), &remote);
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    pod.connect((REMOTE, 9)).expect("an address");
    pod.send(b"?").expect("it is sent");
    let told = pod.recv(&mut [0; 8]).expect_err("nobody answers");
    assert_eq!(told.kind(), ErrorKind::ConnectionRefused);
    let error = first_error(&errors);
    assert!(error.intact, "{error:?}");
    assert_eq!((error.source, error.kind), (REMOTE, (UNREACHABLE, PORT)));
    assert_eq!(error.endpoints(), ((World::pod_ipv4(1), 5000), (REMOTE, 9)));
}

/// As traceroute does.
//= RFC 5508 REQ-4, RFC 5508 REQ-10a
fn time_exceeded_reaches_the_pod(world: &World) {
    let errors = world.capture(&world.pod(1), "icmp");
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    // The node is the first hop, the router the second.
    pod.set_ttl(2).expect("an option");
    pod.send_to(b"how far?", (FAR, 33_434)).expect("it is sent");
    let error = first_error(&errors);
    assert!(error.intact, "{error:?}");
    assert_eq!((error.source, error.kind), (ROUTER, (TIME_EXCEEDED, 0)));
    assert_eq!(error.endpoints(), ((World::pod_ipv4(1), 5000), (FAR, 33_434)));
}

//= RFC 5508 REQ-3b
fn an_error_about_a_packet_with_options_reaches_the_pod(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    let outside = exchange(&pod, &remote);
    let errors = world.capture(&world.pod(1), "icmp");
    let about = packet::with_options(&packet::udp((NODE, outside.port()), (REMOTE, 7), 0, b"optional"));
    raw(&world.net(), &packet::icmp_error(ROUTER, NODE, PARAMETER_PROBLEM, 0, &about));
    let error = first_error(&errors);
    assert!(error.intact, "{error:?}");
    assert_eq!(error.kind, (PARAMETER_PROBLEM, 0));
    assert_eq!(error.endpoints(), ((World::pod_ipv4(1), 5000), (REMOTE, 7)));
}

//= RFC 5508 REQ-3
fn an_error_with_a_wrong_checksum_does_no_harm(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    let outside = exchange(&pod, &remote);
    pod.connect((REMOTE, 7)).expect("an address");
    let about = packet::udp((NODE, outside.port()), (REMOTE, 7), 0, b"to the remote");
    let mut error = packet::icmp_error(ROUTER, NODE, UNREACHABLE, PORT, &about);
    error[22] ^= 1;
    raw(&world.net(), &error);
    remote.send_to(b"still there", outside).expect("it is sent");
    assert_eq!(receive(&pod).0, "still there");
}

//= RFC 1191 4/next-hop-mtu, RFC 1191 3/host, RFC 5508 REQ-4
fn fragmentation_needed_reaches_the_pod(world: &World) {
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    pod.connect((FAR, 7)).expect("an address");
    set_option(&pod, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO);
    let _ = pod.send(&[0; 1400]);
    let learnt = || option(&pod, libc::IP_MTU) == i32::from(FAR_MTU);
    wait_until(patience(), "the pod has learnt the path's MTU", learnt).unwrap_or_else(|e| panic!("{e:#}"));
    let far = udp(&world.far(), (FAR, 7));
    // What the error itself left on the socket is told first.
    let _ = pod.take_error();
    pod.send(&[b'x'; 1200]).expect("what fits is sent");
    assert_eq!(receive(&far).0.len(), 1200);
}

#[expect(unsafe_code, reason = "nix has no such option")]
fn set_option(socket: &UdpSocket, name: libc::c_int, value: libc::c_int) {
    // SAFETY: `value` is an int that lives through the call, and its size is given.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as u32,
        )
    };
    assert_eq!(done, 0, "option {name}");
}

#[expect(unsafe_code, reason = "nix has no such option")]
fn option(socket: &UdpSocket, name: libc::c_int) -> libc::c_int {
    let (mut value, mut len): (libc::c_int, u32) = (0, 4);
    // SAFETY: `value` has the four bytes that `len` says, and both live through the call.
    let done = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, name, (&raw mut value).cast(), &raw mut len)
    };
    assert_eq!(done, 0, "option {name}");
    value
}

//= RFC 5508 REQ-5, RFC 5508 REQ-10a
fn a_pods_own_port_unreachable_reaches_the_remote(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let rival = udp(&world.pod(2), (World::pod_ipv4(2), 5000));
    exchange(&rival, &remote);
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    let outside = exchange(&pod, &remote);
    drop(pod);
    let errors = world.capture(&world.net(), &format!("icmp and src host {NODE}"));
    remote.connect(outside).expect("an address");
    remote.send(b"too late").expect("it is sent");
    let error = first_error(&errors);
    assert!(error.intact, "{error:?}");
    assert_eq!((error.source, error.kind), (NODE, (UNREACHABLE, PORT)));
    assert_eq!(error.endpoints(), ((REMOTE, 7), (NODE, outside.port())));
    let told = remote.recv(&mut [0; 8]).expect_err("nobody answers");
    assert_eq!(told.kind(), ErrorKind::ConnectionRefused);
}

//= RFC 4787 REQ-12, RFC 4787 REQ-12a, RFC 5382 REQ-10, RFC 5508 REQ-6
fn an_icmp_error_ends_no_mapping(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    let outside = exchange(&pod, &remote);
    let listener = hextet_conformance::socket::tcp_listen(&world.net(), (REMOTE, 80));
    let mut stream =
        hextet_conformance::socket::tcp_from(&world.pod(1), (World::pod_ipv4(1), 5001), (REMOTE, 80))
            .expect("the pod connects");
    let (mut accepted, tcp_outside) = listener.accept().expect("the pod's connection");
    let errors = world.capture(&world.pod(1), "icmp");
    let about_udp = packet::udp((NODE, outside.port()), (REMOTE, 7), 0, b"to the remote");
    let about_tcp = packet::tcp((NODE, tcp_outside.port()), (REMOTE, 80), packet::ACK);
    for about in [about_udp, about_tcp] {
        for (kind, code) in [(UNREACHABLE, PORT), (UNREACHABLE, 1), (TIME_EXCEEDED, 0)] {
            // Whoever sends it: a router on the way has any address.
            raw(&world.net(), &packet::icmp_error(FAR, NODE, kind, code, &about));
        }
    }
    errors.wait_packets(patience(), 6, |frame| Error::read(frame).is_some()).expect("all errors arrive");
    crosses(&remote, (NODE, outside.port()), &pod, "as before");
    assert_eq!(exchange(&pod, &remote), outside);
    hextet_conformance::socket::carries(&mut stream, &mut accepted);
}
