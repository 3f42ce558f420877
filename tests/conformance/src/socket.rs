//! Sockets in a place: made there, used anywhere.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
};

use hextet_tests::{netns::NetNs, scaled};
use nix::{
    libc::IPPROTO_RAW,
    sys::{
        socket::{
            AddressFamily, Backlog, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, bind, connect,
            listen, sendto, setsockopt, socket, sockopt,
        },
        time::TimeVal,
    },
};

use crate::world::patience;

/// An address and a port.
pub type Endpoint = (Ipv4Addr, u16);

/// A UDP socket that waits with patience.
///
/// # Panics
/// When the endpoint is taken or not of that place.
pub fn udp(place: &NetNs, at: Endpoint) -> UdpSocket {
    let socket = inside(place, || UdpSocket::bind(at));
    let socket = socket.unwrap_or_else(|e| panic!("UDP {at:?} in {}: {e}", place.name()));
    socket.set_read_timeout(Some(scaled(patience()))).expect("a time");
    socket
}

/// Sends a datagram and gives what the receiver sees of it: its source.
///
/// # Panics
/// When another datagram or none arrives.
pub fn crosses(from: &UdpSocket, to: Endpoint, receiver: &UdpSocket, text: &str) -> SocketAddrV4 {
    from.send_to(text.as_bytes(), to).unwrap_or_else(|e| panic!("{text} to {to:?}: {e}"));
    let (got, source) = receive(receiver);
    assert_eq!(got, text, "to {to:?}");
    source
}

/// The next datagram and its source.
///
/// # Panics
/// When none arrives.
pub fn receive(socket: &UdpSocket) -> (String, SocketAddrV4) {
    let (bytes, source) = receive_bytes(socket);
    (String::from_utf8_lossy(&bytes).into_owned(), source)
}

/// The next datagram and its source.
///
/// # Panics
/// When none arrives.
pub fn receive_bytes(socket: &UdpSocket) -> (Vec<u8>, SocketAddrV4) {
    let mut buffer = vec![0; 65_536];
    let (len, source) = socket.recv_from(&mut buffer).unwrap_or_else(|e| panic!("no datagram: {e}"));
    buffer.truncate(len);
    match source {
        std::net::SocketAddr::V4(source) => (buffer, source),
        other => panic!("IPv6 at an IPv4 socket: {other}"),
    }
}

/// Both ways between a pod and a remote; gives the pod's endpoint as the remote sees it.
///
/// # Panics
/// When the datagram or its answer does not arrive.
pub fn exchange(pod: &UdpSocket, remote: &UdpSocket) -> SocketAddrV4 {
    let to = endpoint(remote);
    let outside = crosses(pod, to, remote, "to the remote");
    let source = crosses(remote, (*outside.ip(), outside.port()), pod, "to the pod");
    assert_eq!((*source.ip(), source.port()), to, "who answers");
    outside
}

/// Where a socket is.
///
/// # Panics
/// When it is not IPv4.
pub fn endpoint(socket: &UdpSocket) -> Endpoint {
    match socket.local_addr().expect("it is bound") {
        std::net::SocketAddr::V4(at) => (*at.ip(), at.port()),
        other => panic!("IPv6: {other}"),
    }
}

/// A TCP connection from an endpoint, whose port others may use towards other remotes.
///
/// # Errors
/// Those of the connection.
pub fn tcp_from(place: &NetNs, from: Endpoint, to: Endpoint) -> io::Result<TcpStream> {
    let socket = tcp_socket(place, from);
    connect(socket.as_raw_fd(), &address(to))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(scaled(patience())))?;
    Ok(stream)
}

/// Begins to connect and does not wait.
///
/// # Panics
/// When it fails at once.
pub fn tcp_begin(place: &NetNs, from: Endpoint, to: Endpoint) -> TcpStream {
    let stream = TcpStream::from(tcp_socket(place, from));
    stream.set_nonblocking(true).expect("a flag");
    match connect(stream.as_raw_fd(), &address(to)) {
        Ok(()) | Err(nix::Error::EINPROGRESS) => {}
        Err(e) => panic!("{from:?} to {to:?}: {e}"),
    }
    stream.set_nonblocking(false).expect("a flag");
    stream.set_read_timeout(Some(scaled(patience()))).expect("a time");
    stream
}

/// A listener whose port connections may start from, too.
///
/// # Panics
/// When the endpoint is taken or not of that place.
pub fn tcp_listen(place: &NetNs, at: Endpoint) -> TcpListener {
    let socket = tcp_socket(place, at);
    listen(&socket, Backlog::new(16).expect("a small number")).unwrap_or_else(|e| panic!("{at:?}: {e}"));
    TcpListener::from(socket)
}

/// Both ways over a connection.
///
/// # Panics
/// When it does not carry.
pub fn carries(a: &mut TcpStream, b: &mut TcpStream) {
    carries_one_way(a, b);
    carries_one_way(b, a);
}

fn carries_one_way(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"carried").expect("it can be written to");
    let mut got = [0; 7];
    to.set_read_timeout(Some(scaled(patience()))).expect("a time");
    to.read_exact(&mut got).unwrap_or_else(|e| panic!("nothing arrives: {e}"));
    assert_eq!(&got, b"carried");
}

fn tcp_socket(place: &NetNs, from: Endpoint) -> OwnedFd {
    let make = || socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    let socket = inside(place, make).expect("a TCP socket");
    setsockopt(&socket, sockopt::ReuseAddr, &true).expect("an option");
    setsockopt(&socket, sockopt::ReusePort, &true).expect("an option");
    // It bounds connect, too.
    let limit = TimeVal::new(scaled(patience()).as_secs().cast_signed(), 0);
    setsockopt(&socket, sockopt::SendTimeout, &limit).expect("an option");
    bind(socket.as_raw_fd(), &address(from))
        .unwrap_or_else(|e| panic!("TCP {from:?} in {}: {e}", place.name()));
    socket
}

/// Sends an IPv4 packet, whatever it says, by the place's routes.
///
/// # Panics
/// When the kernel refuses it.
pub fn raw(place: &NetNs, packet: &[u8]) {
    raw_all(place, std::slice::from_ref(&packet));
}

/// Sends many.
///
/// # Panics
/// When the kernel refuses one.
pub fn raw_all<P: AsRef<[u8]> + Sync>(place: &NetNs, packets: &[P]) {
    let protocol = SockProtocol::Raw;
    debug_assert_eq!(protocol as i32, IPPROTO_RAW);
    let send = || -> nix::Result<()> {
        let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        for packet in packets.iter().map(AsRef::as_ref) {
            let to = Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]);
            sendto(socket.as_raw_fd(), packet, &address((to, 0)), MsgFlags::empty())?;
        }
        Ok(())
    };
    inside(place, send).unwrap_or_else(|e| panic!("raw packets in {}: {e}", place.name()));
}

fn address((ip, port): Endpoint) -> SockaddrIn {
    SockaddrIn::from(SocketAddrV4::new(ip, port))
}

fn inside<T: Send>(place: &NetNs, make: impl FnOnce() -> T + Send) -> T {
    place.run(make).unwrap_or_else(|e| panic!("{e:#}"))
}
