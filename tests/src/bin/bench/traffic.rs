//! The four ways to load a path: one TCP stream, small UDP packets, new TCP connections, pings.

use std::{
    io::{ErrorKind, Read},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hextet_tests::{command::Run, netns::NetNs, wait::wait_for};
use nix::sys::{
    socket::{Backlog, setsockopt, sockopt},
    time::{TimeVal, TimeValLike},
};

use crate::batch::{Receiver, Sender};

/// Bytes of a small UDP packet after its header.
const UDP_PAYLOAD: usize = 64;
/// Where UDP and connections go to; iperf3 has its own port.
const PORT: u16 = 9999;
const IPERF_PORT: &str = "5201";
/// Connections that are being opened at the same time.
const CLIENTS: usize = 4;
const ACCEPTORS: usize = 2;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;
/// Time in which nothing is counted, for caches and tables to fill.
const WARM_UP: Duration = Duration::from_millis(200);
/// How often waiting threads look whether it is over.
const LOOK: Duration = Duration::from_millis(100);

/// From where to where, and to which address.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    pub(crate) from: NetNs,
    pub(crate) to: NetNs,
    pub(crate) address: IpAddr,
}

/// A server that ends with this value.
pub(crate) struct Server(pub(crate) Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended when it cannot be killed.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// What one TCP stream carries, in Gbit/s, as its receiver counts it.
pub(crate) fn tcp_gbits(path: &Path, span: Duration) -> Result<f64> {
    let mut command = Command::new("iperf3");
    command.args(["-s", "-p", IPERF_PORT]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Server(path.to.spawn(&mut command)?);
    let (address, seconds) = (path.address.to_string(), span.as_secs().to_string());
    let client = ["iperf3", "-J", "-c", &address, "-p", IPERF_PORT, "-t", &seconds];
    let limit = span + Duration::from_secs(20);
    // The server needs a moment before it listens; with -J some failures end with status 0.
    let (_, gbits) = wait_for(Duration::from_secs(5), "iperf3 reaches its server", || {
        let output =
            Run::new(&client).inside(&path.from).limit(limit).output().map_err(|e| format!("{e:#}"))?;
        received_gbits(&output.stdout).ok_or_else(|| output.to_string())
    })?;
    Ok(gbits)
}

fn received_gbits(json: &str) -> Option<f64> {
    let result: serde_json::Value = serde_json::from_str(json).ok()?;
    Some(result["end"]["sum_received"]["bits_per_second"].as_f64()? / 1e9)
}

/// How many UDP packets of 64 bytes arrive in a second when one thread sends as fast as it can.
pub(crate) fn udp_packets(path: &Path, span: Duration) -> Result<f64> {
    let done = AtomicBool::new(false);
    let socket = path.to.run(|| receiving_socket(path.address))??;
    let target = SocketAddr::new(path.address, PORT);
    thread::scope(|scope| {
        let counted = scope.spawn(|| count_packets(&socket, span, &done));
        let sent = path.from.run(|| send_until(target, &done));
        done.store(true, Ordering::SeqCst);
        let rate = counted.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))?;
        sent??;
        rate
    })
}

fn receiving_socket(address: IpAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::new(address, PORT)).context("cannot bind the receiver")?;
    socket.set_read_timeout(Some(LOOK))?;
    // Room for what arrives while the receiver does not run.
    setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).context("cannot enlarge the receive buffer")?;
    Ok(socket)
}

/// Counts for `span` after a warm-up, and then ends the sender.
fn count_packets(socket: &UdpSocket, span: Duration, done: &AtomicBool) -> Result<f64> {
    let mut receiver = Receiver::new();
    let mut count = |until: Instant| -> Result<u64> {
        let mut packets = 0;
        while Instant::now() < until {
            match receiver.receive(socket.as_fd()) {
                Ok(batch) => packets += batch.count() as u64,
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error).context("cannot receive"),
            }
        }
        Ok(packets)
    };
    count(Instant::now() + WARM_UP)?;
    let start = Instant::now();
    let packets = count(start + span)?;
    let rate = packets as f64 / start.elapsed().as_secs_f64();
    done.store(true, Ordering::SeqCst);
    if packets == 0 {
        bail!("not one UDP packet arrived");
    }
    Ok(rate)
}

fn send_until(target: SocketAddr, done: &AtomicBool) -> Result<()> {
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).context("cannot bind the sender")?;
    socket.connect(target).context("cannot reach the receiver")?;
    let mut sender = Sender::new(vec![vec![0x55; UDP_PAYLOAD]; crate::batch::BATCH]);
    while !done.load(Ordering::Relaxed) {
        // A full queue, or an ICMP error about an earlier packet: what arrives is what counts.
        sender.send(socket.as_fd()).ok();
    }
    Ok(())
}

/// How many TCP connections are opened, accepted and reset in a second.
pub(crate) fn connections(path: &Path, span: Duration) -> Result<f64> {
    let (done, opened) = (AtomicBool::new(false), AtomicU64::new(0));
    let target = SocketAddr::new(path.address, PORT);
    let listener = path.to.run(|| listening_socket(target))??;
    thread::scope(|scope| -> Result<f64> {
        for _ in 0..ACCEPTORS {
            scope.spawn(|| accept_until(&listener, &done));
        }
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| scope.spawn(|| path.from.run(|| connect_until(target, &opened, &done))?))
            .collect();
        thread::sleep(WARM_UP);
        let (start, before) = (Instant::now(), opened.load(Ordering::SeqCst));
        thread::sleep(span);
        let count = opened.load(Ordering::SeqCst) - before;
        let rate = count as f64 / start.elapsed().as_secs_f64();
        done.store(true, Ordering::SeqCst);
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(rate)
    })
}

fn listening_socket(target: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(target).context("cannot listen")?;
    let backlog = Backlog::new(BACKLOG).context("the backlog is too long")?;
    nix::sys::socket::listen(&listener, backlog).context("cannot lengthen the backlog")?;
    // For accept, too: so that acceptors see the end.
    setsockopt(&listener, sockopt::ReceiveTimeout, &TimeVal::milliseconds(100))?;
    Ok(listener)
}

/// Accepts and resets at once: both ends forget the connection with one packet, and ports are free again.
fn accept_until(listener: &TcpListener, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        // Nothing came for a while, or a client gave up.
        let Ok((stream, _)) = listener.accept() else { continue };
        reset(&stream);
    }
}

fn reset(stream: &TcpStream) {
    let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
    // Without it the connection ends in the ordinary way, only slower.
    setsockopt(stream, sockopt::Linger, &at_once).ok();
}

fn connect_until(target: SocketAddr, opened: &AtomicU64, done: &AtomicBool) -> Result<()> {
    while !done.load(Ordering::Relaxed) {
        match TcpStream::connect(target) {
            Ok(stream) => end(stream)?,
            // Accepted, and reset before this thread ran again.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => return Err(error).context("cannot connect"),
        }
        opened.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Waits for the server's reset, so that a client never runs ahead of it.
fn end(mut stream: TcpStream) -> Result<()> {
    reset(&stream);
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    _ = stream.read(&mut [0]);
    Ok(())
}

/// Round-trip times of pings, in microseconds.
pub(crate) fn pings(path: &Path, count: u32) -> Result<Vec<f64>> {
    let (address, count_text) = (path.address.to_string(), count.to_string());
    let line = ["ping", "-n", "-i", "0.002", "-c", &count_text, "-W", "1", &address];
    let output = Run::new(&line).inside(&path.from).limit(Duration::from_secs(60)).success()?;
    let times: Vec<f64> = output.lines().filter_map(round_trip).collect();
    if times.len() < count as usize / 2 {
        bail!("only {} of {count} pings to {address} were answered", times.len());
    }
    Ok(times)
}

/// `64 bytes from fd00::1: icmp_seq=1 ttl=62 time=0.045 ms`
fn round_trip(line: &str) -> Option<f64> {
    let time = line.split("time=").nth(1)?.split(' ').next()?;
    Some(time.parse::<f64>().ok()? * 1e3)
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Gives a socket the whole of its receive buffer, whatever the machine's limit is.
pub(crate) fn enlarge(socket: &impl AsFd, bytes: usize) -> Result<()> {
    setsockopt(&socket.as_fd(), sockopt::RcvBufForce, &bytes)
        .with_context(|| format!("cannot enlarge the receive buffer of {}", socket.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_iperf3_that_failed_gives_no_number() {
        assert_eq!(received_gbits(r#"{"end": {"sum_received": {"bits_per_second": 31e9}}}"#), Some(31.0));
        assert_eq!(received_gbits(r#"{"end": {}, "error": "unable to connect"}"#), None);
    }

    #[test]
    fn the_time_of_a_ping_is_read_in_microseconds() {
        assert_eq!(round_trip("64 bytes from fd00::1: icmp_seq=1 ttl=62 time=0.045 ms"), Some(45.0));
        assert_eq!(round_trip("PING fd00::1 56 data bytes"), None);
    }
}
