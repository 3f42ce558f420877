//! The servers of `wan`: each answers with one line, `peer ADDRESS PORT`, so that the client learns how it
//! looks from outside. HTTP on TCP port 80 and a bare line on UDP port 7, in both families.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

/// TCP port of the HTTP server.
pub const HTTP_PORT: u16 = 80;
/// UDP port of the echo server (RFC 862's).
pub const UDP_PORT: u16 = 7;
/// The most connections at one time; more are closed at once.
const CONNECTIONS_MAX: usize = 256;
const REQUEST_LEN_MAX: usize = 4096;

/// Serves until the process ends. Each request is one line on stdout.
///
/// # Errors
/// When a port is taken.
pub fn serve() -> Result<()> {
    // Listens to both families: net.ipv6.bindv6only is 0 in a new namespace.
    let tcp =
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, HTTP_PORT)).context("cannot listen on TCP port 80")?;
    let udp = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, UDP_PORT)).context("cannot listen on UDP port 7")?;
    println!("echo serves TCP port {HTTP_PORT} and UDP port {UDP_PORT}");
    std::thread::spawn(move || serve_udp(&udp));
    serve_http(&tcp);
    Ok(())
}

/// The line that a client at `peer` gets.
pub fn peer_line(peer: SocketAddr) -> String {
    format!("peer {} {}\n", plain(peer.ip()), peer.port())
}

fn serve_http(listener: &TcpListener) {
    static OPEN: AtomicUsize = AtomicUsize::new(0);
    for stream in listener.incoming().flatten() {
        if OPEN.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
            OPEN.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        std::thread::spawn(move || {
            // A client that goes away is its own affair.
            answer(stream).ok();
            OPEN.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let peer = stream.peer_addr()?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    read_request(&mut stream)?;
    let line = peer_line(peer);
    println!("http {}", line.trim());
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", line.len());
    stream.write_all(format!("{head}{line}").as_bytes())
}

/// Reads up to the empty line after the header.
fn read_request(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut chunk = [0; 512];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let len = stream.read(&mut chunk)?;
        if len == 0 || request.len() > REQUEST_LEN_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        request.extend_from_slice(&chunk[..len]);
    }
    Ok(())
}

fn serve_udp(socket: &UdpSocket) {
    let mut datagram = [0; 2048];
    loop {
        // An error here is an ICMP error about an earlier answer.
        let Ok((_, peer)) = socket.recv_from(&mut datagram) else { continue };
        let line = peer_line(peer);
        println!("udp {}", line.trim());
        socket.send_to(line.as_bytes(), peer).ok();
    }
}

/// An IPv4 client of a dual-stack socket as what it is.
fn plain(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_peer_is_named_as_ipv4() {
        assert_eq!(peer_line("[::ffff:192.0.2.11]:5000".parse().unwrap()), "peer 192.0.2.11 5000\n");
        assert_eq!(peer_line("[2001:db8::1]:7".parse().unwrap()), "peer 2001:db8::1 7\n");
    }

    #[test]
    fn a_request_gets_the_line_and_nothing_else() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        std::thread::spawn(move || serve_http(&listener));
        let mut client = TcpStream::connect(at).unwrap();
        client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        let mine = client.local_addr().unwrap();
        assert!(answer.ends_with(&format!("\r\n\r\npeer 127.0.0.1 {}\n", mine.port())), "{answer}");
    }
}
