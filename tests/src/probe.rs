//! What scenarios ask of the network, from any place or pod: HTTP, UDP, ping, and which interface is whose.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::cluster::Pod;
use crate::command::Run;
use crate::netns::NetNs;
use crate::testbed::Testbed;
use crate::wait::{scaled, wait_for};

/// The port of the pods in `examples/hello.yaml`.
pub const HELLO_PORT: u16 = 8080;

/// How long one request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(3);

/// What `ping` counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pings {
    /// Requests.
    pub sent: u32,
    /// Replies.
    pub received: u32,
}

/// A URL that any client understands.
pub fn url(address: IpAddr, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(address, port))
}

/// What `curl` gets from a URL.
///
/// # Errors
/// With what curl said.
pub fn http_get(place: &NetNs, url: &str) -> Result<String> {
    let seconds = format!("{:.0}", scaled(REQUEST_LIMIT).as_secs_f64().ceil());
    Run::new(&["curl", "-sS", "-g", "-f", "-m", &seconds, url]).inside(place).success()
}

/// Asks a hello pod and checks that it is that pod which answers.
///
/// # Errors
/// When nobody or another pod answers.
pub fn greet(place: &NetNs, pod: &Pod) -> Result<()> {
    let answer = http_get(place, &url(pod.address().into(), HELLO_PORT))?;
    let wanted = format!("hello from {} on {} at {}", pod.id, pod.node, pod.address());
    if answer.trim() != wanted {
        bail!("{:?} was expected, not {:?}", wanted, answer.trim());
    }
    Ok(())
}

/// Waits until every pod answers for itself. A pod runs before its server listens.
///
/// # Errors
/// Names the pod that does not answer in time.
pub fn all_greet(place: &NetNs, pods: &[Pod], limit: Duration) -> Result<()> {
    for pod in pods {
        let what = format!("{} answers in {}", pod.id, place.name());
        wait_for(limit, &what, || greet(place, pod).map_err(|e| format!("{e:#}")))?;
    }
    Ok(())
}

/// One HTTP request from the namespace of the calling thread (see [`NetNs::run`]), without a program for
/// each: for many of them. Gives the body.
///
/// # Errors
/// When there is no connection, no answer in time, or another status than 200.
pub fn request(to: SocketAddr, limit: Duration) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(format!("GET / HTTP/1.0\r\nHost: {to}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(ErrorKind::UnexpectedEof)?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.trim().to_owned()),
        _ => Err(std::io::Error::other(head.lines().next().unwrap_or_default().to_owned())),
    }
}

/// Sends a datagram to `to` and gives the answer; it is asked a few times, as UDP may lose.
///
/// # Errors
/// When there is no answer.
pub fn udp_ask(place: &NetNs, to: SocketAddr) -> Result<String> {
    place.run(|| -> Result<String> {
        let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(scaled(Duration::from_millis(500))))?;
        let mut answer = [0; 512];
        for _ in 0..5 {
            socket.send(b"who am I?\n")?;
            match socket.recv(&mut answer) {
                Ok(len) => return Ok(String::from_utf8_lossy(&answer[..len]).into_owned()),
                Err(e) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&e.kind()) => {}
                Err(e) => return Err(e).with_context(|| format!("no answer from {to}")),
            }
        }
        bail!("no answer from UDP {to}")
    })?
}

/// Pings `to`, `count` times, `interval` apart, and counts.
///
/// # Errors
/// When ping cannot be run or its summary is not understood.
pub fn ping(place: &NetNs, to: IpAddr, count: u32, interval: Duration) -> Result<Pings> {
    let args =
        ["ping", "-n", "-q", "-c", &count.to_string(), "-i", &interval.as_secs_f64().to_string(), "-W", "2"];
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).chain([to.to_string()]).collect();
    let limit = interval * count * 2 + Duration::from_secs(10);
    let output = Run::new(&args).inside(place).limit(limit).output()?;
    parse_pings(&output.stdout).with_context(|| output.to_string())
}

/// Pings once and gives all that ping said, replies and errors alike.
///
/// # Errors
/// When ping cannot be run.
pub fn ping_words(place: &NetNs, to: IpAddr) -> Result<String> {
    let to = to.to_string();
    let output = Run::new(&["ping", "-n", "-c", "1", "-W", "3", &to]).inside(place).output()?;
    Ok(output.stdout + &output.stderr)
}

/// The node's end of a pod's cable: the interface whose alias is the pod's id.
///
/// # Errors
/// When the node has none.
pub fn host_link(testbed: &Testbed, pod: &Pod) -> Result<String> {
    #[derive(Deserialize)]
    struct Link {
        ifname: String,
        #[serde(default)]
        ifalias: String,
    }
    let json = testbed.run_in(&pod.node, &["ip", "-j", "link", "show"]).success()?;
    let links: Vec<Link> = serde_json::from_str(&json)?;
    let found = links.into_iter().find(|link| link.ifalias == pod.id).map(|link| link.ifname);
    found.with_context(|| format!("{} has no interface with the alias {}", pod.node, pod.id))
}

/// `N packets transmitted, M received, ...`
fn parse_pings(stdout: &str) -> Option<Pings> {
    let summary = stdout.lines().find(|line| line.contains("packets transmitted"))?;
    let number_before = |word: &str| -> Option<u32> {
        let part = summary.split(',').find(|part| part.contains(word))?;
        part.split_whitespace().next()?.parse().ok()
    };
    Some(Pings { sent: number_before("transmitted")?, received: number_before("received")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_are_counted_with_and_without_errors() {
        let fine = "--- x ping statistics ---\n600 packets transmitted, 599 received, 0.16% packet loss\n";
        assert_eq!(parse_pings(fine), Some(Pings { sent: 600, received: 599 }));
        let errors = "1 packets transmitted, 0 received, +1 errors, 100% packet loss, time 0ms\n";
        assert_eq!(parse_pings(errors), Some(Pings { sent: 1, received: 0 }));
        assert_eq!(parse_pings("ping: unknown host"), None);
    }
}
