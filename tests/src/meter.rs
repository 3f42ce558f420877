//! Continuous traffic of which every packet is accounted for: what was lost, and for how long.
//!
//! Each flow sends a numbered message every [`INTERVAL`] and gets it back from an echo. Sockets are made inside of the
//! namespaces and belong to them wherever their threads run.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::netns::NetNs;
use crate::progress::write_now;
use crate::wait::{scaled, wait_for};

/// Between two messages of a flow (scaled).
pub const INTERVAL: Duration = Duration::from_millis(5);
/// What takes longer to come back counts as lost, on a machine that has other things to do.
const LATE: Duration = Duration::from_secs(2);
/// How long all flows must have run without a loss to count as through again (scaled), and what is late.
const THROUGH: Duration = Duration::from_millis(300);
/// How long a socket waits before its thread looks whether it is to end.
const WAKE: Duration = Duration::from_millis(100);
const NUMBER_BYTES: usize = 8;
const NO_PANIC: &str = "no thread panics while it holds this lock";

/// What a flow is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Datagrams.
    Udp,
    /// One connection. Its messages cannot be lost, but late, or cut off.
    Tcp,
    /// Echo requests.
    Ping,
}

/// From where to where.
#[derive(Clone, Debug)]
pub struct Route {
    /// How it is called.
    pub name: &'static str,
    /// Who asks.
    pub from: NetNs,
    /// Who answers.
    pub to: NetNs,
    /// Under which address.
    pub address: IpAddr,
}

/// Flows that run until this is dropped.
pub struct Meter {
    flows: Vec<Flow>,
    ends: Arc<AtomicBool>,
}

struct Flow {
    name: String,
    kind: Kind,
    messages: Messages,
}

/// By number: when it was sent, and when it came back.
type Messages = Arc<Mutex<BTreeMap<u64, (Instant, Option<Instant>)>>>;

/// What became of a flow's messages in a span of time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The flow.
    pub flow: String,
    /// Messages that were sent.
    pub sent: usize,
    /// Of these, how many did not come back in time.
    pub lost: usize,
    /// From the beginning of the span to the first message after the last that was lost.
    pub blind: Duration,
    /// The longest that a message took that did come back.
    pub slowest: Duration,
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { flow, sent, lost, blind, slowest } = self;
        write!(f, "{flow}: {lost} of {sent} lost, through after {blind:.0?}, slowest {slowest:.0?}")
    }
}

impl Meter {
    /// Starts a flow of each kind on each route, and waits until all run.
    ///
    /// # Errors
    /// When a socket cannot be made, or a flow does not get through.
    pub fn start(routes: &[Route], kinds: &[Kind]) -> Result<Meter> {
        let ends = Arc::new(AtomicBool::new(false));
        let mut meter = Meter { flows: Vec::new(), ends: ends.clone() };
        for route in routes {
            for kind in kinds {
                let flow = Flow::start(route, *kind, &ends);
                meter.flows.push(flow.with_context(|| format!("{kind:?} {}", route.name))?);
            }
        }
        meter.wait_through(Instant::now(), Duration::from_secs(20))?;
        Ok(meter)
    }

    /// Does something while the flows run, waits until all are through again, and gives the account of what was sent
    /// since it began. `work` must not give up when it fails, but say so in its result.
    ///
    /// # Errors
    /// Those of `work`, and when a flow does not get through within `limit`.
    pub fn during(&self, limit: Duration, work: impl FnOnce() -> Result<()>) -> Result<Vec<Account>> {
        let start = Instant::now();
        work()?;
        self.wait_through(Instant::now(), limit)?;
        let end = Instant::now();
        let accounts: Vec<Account> = self.flows.iter().map(|flow| flow.account(start, end)).collect();
        let worst = accounts.iter().max_by_key(|account| (account.blind, account.slowest));
        worst.iter().for_each(|account| write_now(&format!("       {account}\n")));
        Ok(accounts)
    }

    /// Asks no longer for what becomes of a flow.
    pub fn forget(&mut self, name: &str) {
        self.flows.retain(|flow| flow.name != name);
    }

    /// Waits until nothing that was sent in the last moment is missing.
    fn wait_through(&self, since: Instant, limit: Duration) -> Result<()> {
        wait_for(limit, "every flow is through", || {
            let now = Instant::now();
            let missing: Vec<&str> = self
                .flows
                .iter()
                .filter(|flow| !flow.is_through(since, now))
                .map(|flow| &*flow.name)
                .collect();
            if missing.is_empty() { Ok(()) } else { Err(missing.join(", ")) }
        })?;
        Ok(())
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
    }
}

/// Fails when a message of any flow was lost.
///
/// # Errors
/// Names the flows.
pub fn no_loss(accounts: &[Account]) -> Result<()> {
    let lossy: Vec<String> = accounts.iter().filter(|a| a.lost > 0).map(ToString::to_string).collect();
    ensure!(lossy.is_empty(), "{}", lossy.join("; "));
    ensure!(accounts.iter().all(|account| account.sent > 0), "a flow sent nothing: {accounts:?}");
    Ok(())
}

/// Fails when a flow was blind for longer than `limit` (scaled).
///
/// # Errors
/// Names the flows.
pub fn through_within(accounts: &[Account], limit: Duration) -> Result<()> {
    let late: Vec<String> =
        accounts.iter().filter(|a| a.blind > scaled(limit)).map(ToString::to_string).collect();
    ensure!(late.is_empty(), "not within {limit:?}: {}", late.join("; "));
    Ok(())
}

impl Flow {
    fn start(route: &Route, kind: Kind, ends: &Arc<AtomicBool>) -> Result<Flow> {
        let messages = Messages::default();
        match kind {
            Kind::Udp => {
                let to = SocketAddr::new(route.address, udp_echo(&route.to, ends)?);
                let socket = route.from.run(|| connected(to))??;
                datagrams(socket, Vec::new(), &messages, ends)?;
            }
            Kind::Ping => {
                let socket = route.from.run(|| ping_socket(route.address))??;
                // An echo request (RFC 792, RFC 4443 section 4.1): type, code, checksum, identifier, sequence number.
                let request = if route.address.is_ipv4() { 8 } else { 128 };
                datagrams(socket, vec![request, 0, 0, 0, 0, 0, 0, 0], &messages, ends)?;
            }
            Kind::Tcp => {
                let to = SocketAddr::new(route.address, tcp_echo(&route.to, ends)?);
                let stream =
                    route.from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(10)))??;
                connection(&stream, &messages, ends)?;
            }
        }
        Ok(Flow { name: format!("{kind:?} {}", route.name).to_lowercase(), kind, messages })
    }

    /// Whether a while has passed since then of which nothing is missing, but for what is under way.
    fn is_through(&self, since: Instant, now: Instant) -> bool {
        let messages = self.messages.lock().expect(NO_PANIC);
        let through = scaled(THROUGH);
        let is_recent = |sent: &Instant| *sent >= since && *sent + through >= now;
        let recent = || messages.values().rev().take_while(|(sent, _)| is_recent(sent));
        let is_back =
            |(sent, back): &(Instant, Option<Instant>)| back.is_some() || *sent + through / 2 >= now;
        now >= since + through && recent().all(is_back) && recent().any(|(_, back)| back.is_some())
    }

    fn account(&self, start: Instant, end: Instant) -> Account {
        let messages = self.messages.lock().expect(NO_PANIC);
        let (limit, through) = (scaled(LATE), scaled(THROUGH));
        let sent: Vec<_> =
            messages.values().filter(|(sent, _)| (start..end - through / 2).contains(sent)).collect();
        let took = |(sent, back): &&(Instant, Option<Instant>)| back.map(|back| back - *sent);
        // A connection carries everything in the end, late as it may be.
        let is_lost = |message: &&&(Instant, Option<Instant>)| match took(message) {
            Some(took) => self.kind != Kind::Tcp && took > limit,
            None => true,
        };
        let late = sent.iter().filter(|message| took(message).is_none_or(|took| took > through));
        let last_late = late.map(|(sent, _)| *sent).max();
        Account {
            flow: self.name.clone(),
            sent: sent.len(),
            lost: sent.iter().filter(is_lost).count(),
            blind: last_late.map_or(Duration::ZERO, |last| last + scaled(INTERVAL) - start),
            slowest: sent.iter().filter_map(took).max().unwrap_or_default(),
        }
    }
}

/// Sends numbered datagrams and notes those that come back, each with `head` in front.
fn datagrams(socket: UdpSocket, head: Vec<u8>, messages: &Messages, ends: &Arc<AtomicBool>) -> Result<()> {
    socket.set_read_timeout(Some(WAKE))?;
    let receiver = socket.try_clone()?;
    let (sent, back, ended) = (messages.clone(), messages.clone(), ends.clone());
    let head_bytes = head.len();
    send_all(messages_sender(sent, ends.clone(), move |number| {
        // An error here is an ICMP error about an earlier message.
        socket.send(&[&head[..], &number.to_be_bytes()].concat()).ok();
        true
    }));
    std::thread::spawn(move || {
        let mut datagram = [0; 64];
        while !ended.load(Ordering::SeqCst) {
            if let Ok(len) = receiver.recv(&mut datagram)
                && let Some(number) = datagram[..len].get(head_bytes..)
            {
                note(&back, number);
            }
        }
    });
    Ok(())
}

fn connection(stream: &TcpStream, messages: &Messages, ends: &Arc<AtomicBool>) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(WAKE))?;
    let (mut sender, mut receiver) = (stream.try_clone()?, stream.try_clone()?);
    let (back, ended) = (messages.clone(), ends.clone());
    send_all(messages_sender(messages.clone(), ends.clone(), move |number| {
        sender.write_all(&number.to_be_bytes()).is_ok()
    }));
    std::thread::spawn(move || {
        let (mut buffer, mut filled) = ([0; NUMBER_BYTES], 0);
        while !ended.load(Ordering::SeqCst) {
            match receiver.read(&mut buffer[filled..]) {
                Ok(0) => return,
                Ok(len) => filled += len,
                Err(_) => continue,
            }
            if filled == NUMBER_BYTES {
                note(&back, &buffer);
                filled = 0;
            }
        }
    });
    Ok(())
}

fn send_all(sender: impl FnOnce() + Send + 'static) {
    std::thread::spawn(sender);
}

/// Sends one number after the other, as long as that works.
fn messages_sender(
    messages: Messages,
    ends: Arc<AtomicBool>,
    mut send: impl FnMut(u64) -> bool + Send + 'static,
) -> impl FnOnce() + Send + 'static {
    move || {
        let start = Instant::now();
        for number in 0.. {
            if ends.load(Ordering::SeqCst) {
                return;
            }
            messages.lock().expect(NO_PANIC).insert(number, (Instant::now(), None));
            if !send(number) {
                return;
            }
            // Not from the last one on: a machine that is busy is to catch up.
            let due = start + scaled(INTERVAL) * u32::try_from(number + 1).unwrap_or(u32::MAX);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
}

fn note(messages: &Messages, number: &[u8]) {
    let Ok(number) = <[u8; NUMBER_BYTES]>::try_from(number) else { return };
    if let Some((_, back)) = messages.lock().expect(NO_PANIC).get_mut(&u64::from_be_bytes(number)) {
        back.get_or_insert_with(Instant::now);
    }
}

fn connected(to: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    Ok(socket)
}

/// The kernel fills in identifier and checksum, and gives back only replies to this socket.
fn ping_socket(to: IpAddr) -> Result<UdpSocket> {
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)
        .context("no ping socket: net.ipv4.ping_group_range does not allow it")?;
    // A descriptor is a descriptor: what is sent and received is an ICMP message instead of a datagram's payload.
    let socket = UdpSocket::from(socket);
    socket.connect(SocketAddr::new(to, 0))?;
    Ok(socket)
}

/// Sends back what comes, and says on which port.
fn udp_echo(place: &NetNs, ends: &Arc<AtomicBool>) -> Result<u16> {
    let socket = place.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)))??;
    socket.set_read_timeout(Some(WAKE))?;
    let port = socket.local_addr()?.port();
    let ended = ends.clone();
    std::thread::spawn(move || {
        let mut datagram = [0; 2048];
        while !ended.load(Ordering::SeqCst) {
            if let Ok((len, peer)) = socket.recv_from(&mut datagram) {
                socket.send_to(&datagram[..len], peer).ok();
            }
        }
    });
    Ok(port)
}

/// Sends back what comes over the first connection, and says on which port.
fn tcp_echo(place: &NetNs, ends: &Arc<AtomicBool>) -> Result<u16> {
    let listener = place.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)))??;
    let port = listener.local_addr()?.port();
    let ended = ends.clone();
    std::thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else { return };
        stream.set_nodelay(true).ok();
        stream.set_read_timeout(Some(WAKE)).ok();
        let mut chunk = [0; 2048];
        while !ended.load(Ordering::SeqCst) {
            match stream.read(&mut chunk) {
                Ok(0) => return,
                Ok(len) if stream.write_all(&chunk[..len]).is_err() => return,
                _ => {}
            }
        }
    });
    Ok(port)
}

/// Lets everybody in a namespace open the sockets that [`Kind::Ping`] needs.
///
/// # Errors
/// When the setting cannot be written.
pub fn allow_ping(place: &NetNs) -> Result<()> {
    place.set_sysctls(&[("net/ipv4/ping_group_range".to_owned(), "0 2147483647")])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages 5 ms apart; those in `missing` do not come back.
    fn flow(kind: Kind, count: u64, missing: std::ops::Range<u64>, start: Instant) -> Flow {
        let message = |n: u64| {
            let sent = start + INTERVAL * n as u32;
            (n, (sent, (!missing.contains(&n)).then_some(sent + Duration::from_millis(1))))
        };
        let messages = Arc::new(Mutex::new((0..count).map(message).collect()));
        Flow { name: "udp".to_owned(), kind, messages }
    }

    #[test]
    fn what_was_lost_is_counted_and_how_long_it_lasted() {
        let start = Instant::now();
        let flow = flow(Kind::Udp, 400, 100..120, start);
        let broken = start + INTERVAL * 90;
        let account = flow.account(broken, start + INTERVAL * 400);
        assert_eq!((account.lost, account.blind), (20, INTERVAL * 30), "{account}");
        assert!(no_loss(std::slice::from_ref(&account)).is_err());
        assert!(through_within(&[account], Duration::from_millis(150)).is_ok());
        assert!(flow.is_through(broken, start + INTERVAL * 400));
        assert!(!flow.is_through(broken, start + INTERVAL * 160));
    }

    #[test]
    fn a_flow_that_is_dead_is_not_through() {
        let start = Instant::now();
        let flow = flow(Kind::Tcp, 100, 100..100, start);
        assert!(!flow.is_through(start, start + INTERVAL * 1000));
    }
}
