//! A pod reaches another by the node's address and the other's outside port, and seems to come from outside.

use std::{io::Read as _, net::TcpStream, time::Duration};

use hextet_conformance::{
    World, each_backend,
    socket::{exchange, tcp_begin, tcp_from, tcp_listen, udp},
    world::{NODE, REMOTE, patience},
};
use hextet_tests::wait::wait_for;

each_backend! { udp_between_pods_by_their_outside_ports, tcp_between_pods_by_their_outside_ports }

//= RFC 4787 REQ-9, RFC 4787 REQ-9a
fn udp_between_pods_by_their_outside_ports(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let pods = [1, 2].map(|n| udp(&world.pod(n), (World::pod_ipv4(n), 5000)));
    let [first, second] = pods.each_ref().map(|pod| exchange(pod, &remote));
    pods.iter().for_each(|pod| pod.set_read_timeout(Some(Duration::from_millis(300))).expect("a time"));
    // Each writes to the other before it listens, as programs do that are both behind a translator.
    let arrives = |from: usize, to: usize, address| {
        wait_for(patience(), "a datagram by the other's outside port", || {
            pods[to].send_to(b"punch", if to == 0 { second } else { first }).map_err(|e| e.to_string())?;
            pods[from].send_to(b"hairpin", address).map_err(|e| e.to_string())?;
            let mut buffer = [0; 16];
            let (len, source) = pods[to].recv_from(&mut buffer).map_err(|e| e.to_string())?;
            if &buffer[..len] == b"hairpin" { Ok(source) } else { Err("an older one".to_owned()) }
        })
    };
    let (_, seen) = arrives(0, 1, second).unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(seen, first.into(), "the source that the second sees");
    let (_, seen) = arrives(1, 0, first).unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(seen, second.into(), "the source that the first sees");
}

//= RFC 5382 REQ-8, RFC 5382 REQ-8a
fn tcp_between_pods_by_their_outside_ports(world: &World) {
    let outside_listener = tcp_listen(&world.net(), (REMOTE, 80));
    let at = [1, 2].map(|n| (World::pod_ipv4(n), 5000));
    let known = [1, 2].map(|n: u8| {
        let stream = tcp_from(&world.pod(n), at[usize::from(n) - 1], (REMOTE, 80)).expect("the pod connects");
        let (remote, outside) = outside_listener.accept().expect("the pod's connection");
        (stream, remote, outside.port())
    });
    let listener = tcp_listen(&world.pod(2), at[1]);
    listener.set_nonblocking(true).expect("a flag");
    let (_, (mut second, mut first)) =
        wait_for(patience(), "a connection by the other's outside port", || {
            // The second writes to the first, so that the first may come in.
            let punch = tcp_begin(&world.pod(2), at[1], (NODE, known[0].2));
            let first = tcp_begin(&world.pod(1), at[0], (NODE, known[1].2));
            joined(first, punch, &listener)
        })
        .unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(second.peer_addr().expect("a peer").to_string(), format!("{NODE}:{}", known[0].2));
    hextet_conformance::socket::carries(&mut first, &mut second);
}

/// Both ends, when the first has connected: to the listener or to the one that wrote to it.
fn joined(
    first: TcpStream,
    punch: TcpStream,
    listener: &std::net::TcpListener,
) -> Result<(TcpStream, TcpStream), String> {
    let is_up = || wait_for(Duration::from_secs(2), "up", || first.peer_addr().map_err(|e| e.to_string()));
    is_up().map_err(|e| format!("{e:#}"))?;
    if let Ok((accepted, _)) = listener.accept() {
        accepted.set_nonblocking(false).map_err(|e| e.to_string())?;
        return Ok((accepted, first));
    }
    // A half-open one would say so when it is read.
    punch.set_nonblocking(true).map_err(|e| e.to_string())?;
    let mut byte = [0];
    match (&punch).read(&mut byte) {
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock && punch.peer_addr().is_ok() => {
            punch.set_nonblocking(false).map_err(|e| e.to_string())?;
            Ok((punch, first))
        }
        other => Err(format!("the second's end: {other:?}")),
    }
}
