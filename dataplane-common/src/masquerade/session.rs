//! Timers of flows, and how far a TCP connection has come.

use super::{Family, Session, SessionKey};
use crate::ipv4;

const SECOND_NS: u64 = 1_000_000_000;

/// UDP: 5 minutes (RFC 4787 REQ-5, recommended).
pub const UDP_TIMEOUT_NS: u64 = 300 * SECOND_NS;
/// UDP to port 53: 30 seconds. REQ-5a of RFC 4787 allows less for well-known ports; resolvers take a new
/// port for each query, and each would hold its port for 5 minutes.
pub const UDP_DNS_TIMEOUT_NS: u64 = 30 * SECOND_NS;
/// TCP, established: 2 hours 4 minutes (RFC 5382 REQ-5).
pub const TCP_ESTABLISHED_TIMEOUT_NS: u64 = 7_440 * SECOND_NS;
/// TCP, partly open, closing or closed: 4 minutes (RFC 5382 REQ-5, RFC 7857 section 2).
pub const TCP_TRANSITORY_TIMEOUT_NS: u64 = 240 * SECOND_NS;
/// TCP, closed by both sides or reset: after this, a flow that finds no free port in its pod's blocks may take
/// its port. Without such a need it lives on as long as other partly open ones (RFC 7857 section 2.2).
pub const TCP_CLOSED_RECLAIM_NS: u64 = SECOND_NS;
/// ICMP echo: 60 seconds (RFC 5508 REQ-2).
pub const ICMP_TIMEOUT_NS: u64 = 60 * SECOND_NS;
/// `last_seen_ns` is written when it is older than this: not for every packet, which would have the CPUs
/// of both directions fight for the cache line.
pub const SESSION_REFRESH_NS: u64 = SECOND_NS;

/// UDP port of DNS, in wire order.
const DNS: u16 = 53_u16.to_be();

/// The flags of a TCP header that matter here (RFC 9293 section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// No flags: what UDP and ICMP have.
    pub const NONE: TcpFlags = TcpFlags(0);
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 0x10;

    #[inline(always)]
    pub(super) fn has(self, flag: u8) -> bool {
        self.0 & flag != 0
    }
}

/// How far a TCP connection has come: what was seen of it so far. ICMP stays at [`State::NEW`], UDP at this or
/// [`State::DNS`].
///
/// It follows no sequence numbers, so a forged packet can mark a connection as closed; the connection's
/// next packet keeps its session, and a reset from outside is forgotten as soon as the pod sends on.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(pub u8);

impl State {
    /// The pod has sent something.
    pub const NEW: State = State(0);

    /// UDP that has been written to port 53 only.
    pub const DNS: State = State(0x40);
    /// No connection: says that the address of a remote was written to.
    pub const ADMITS: State = State(0x80);

    const REPLIED: u8 = 0x01;
    const ESTABLISHED: u8 = 0x02;
    const FIN_INSIDE: u8 = 0x04;
    const FIN_OUTSIDE: u8 = 0x08;
    const RST_INSIDE: u8 = 0x10;
    const RST_OUTSIDE: u8 = 0x20;

    /// Whether both sides have ended the connection, or one has reset it.
    #[inline(always)]
    pub fn is_closed(self) -> bool {
        const FINS: u8 = State::FIN_INSIDE | State::FIN_OUTSIDE;
        self.0 & (Self::RST_INSIDE | Self::RST_OUTSIDE) != 0 || self.0 & FINS == FINS
    }

    /// Whether both sides have sent, and none has begun to end it.
    #[inline(always)]
    pub fn is_established(self) -> bool {
        self.0 & Self::ESTABLISHED != 0 && !self.is_closing()
    }

    /// Whether one side has ended the connection.
    #[inline(always)]
    pub fn is_closing(self) -> bool {
        self.0 & (Self::FIN_INSIDE | Self::FIN_OUTSIDE) != 0
    }

    /// The state of a flow whose first packet goes to the remote's `port` (wire order).
    #[inline(always)]
    pub(super) fn first(protocol: u8, port: u16) -> State {
        if protocol == ipv4::UDP && port == DNS { State::DNS } else { State::NEW }
    }

    /// The state after a packet from the pod to the remote's `port` (wire order).
    #[inline(always)]
    #[must_use]
    pub(super) fn after_packet_out(self, protocol: u8, port: u16, flags: TcpFlags) -> State {
        match protocol {
            ipv4::TCP => self.after_inside(flags),
            ipv4::UDP if port != DNS => State::NEW,
            _ => self,
        }
    }

    /// The state after a segment from the pod.
    #[inline(always)]
    #[must_use]
    pub fn after_inside(self, flags: TcpFlags) -> State {
        if flags.has(TcpFlags::RST) {
            return State(self.0 | Self::RST_INSIDE);
        }
        if flags.has(TcpFlags::SYN) {
            // The port is used again (RFC 6191), or the first SYN is sent once more.
            return if self.is_closed() { State::NEW } else { self };
        }
        let mut bits = self.0 & !Self::RST_OUTSIDE;
        if flags.has(TcpFlags::FIN) {
            bits |= Self::FIN_INSIDE;
        }
        if bits & Self::REPLIED != 0 {
            bits |= Self::ESTABLISHED;
        }
        State(bits)
    }

    /// The state after a segment from the remote.
    #[inline(always)]
    #[must_use]
    pub fn after_outside(self, flags: TcpFlags) -> State {
        if flags.has(TcpFlags::RST) {
            return State(self.0 | Self::RST_OUTSIDE);
        }
        if flags.has(TcpFlags::FIN) {
            return State(self.0 | Self::REPLIED | Self::FIN_OUTSIDE);
        }
        State(self.0 | Self::REPLIED)
    }
}

/// How long the session lives without a packet.
#[inline(always)]
pub fn timeout_ns<F: Family>(key: &SessionKey<F>, state: State) -> u64 {
    match key.protocol {
        ipv4::TCP if state.is_established() && !state.is_closed() => TCP_ESTABLISHED_TIMEOUT_NS,
        ipv4::TCP => TCP_TRANSITORY_TIMEOUT_NS,
        ipv4::UDP if state == State::DNS => UDP_DNS_TIMEOUT_NS,
        ipv4::UDP => UDP_TIMEOUT_NS,
        _ => ICMP_TIMEOUT_NS,
    }
}

/// Whether the session has ended at `now_ns`: the programs and the agent's sweep ask the same function.
#[inline(always)]
pub fn expired<F: Family>(now_ns: u64, key: &SessionKey<F>, session: &Session<F>) -> bool {
    now_ns.saturating_sub(session.last_seen_ns) > timeout_ns(key, session.state)
}

/// Whether a new flow may take the session's port. `pressed`: it has found no free one so far.
#[inline(always)]
pub(super) fn reclaimable<F: Family>(
    now_ns: u64,
    key: &SessionKey<F>,
    session: &Session<F>,
    pressed: bool,
) -> bool {
    let idle_ns = now_ns.saturating_sub(session.last_seen_ns);
    expired(now_ns, key, session)
        || pressed
            && key.protocol == ipv4::TCP
            && session.state.is_closed()
            && idle_ns > TCP_CLOSED_RECLAIM_NS
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYN: TcpFlags = TcpFlags(TcpFlags::SYN);
    const SYN_ACK: TcpFlags = TcpFlags(TcpFlags::SYN | TcpFlags::ACK);
    const ACK: TcpFlags = TcpFlags(TcpFlags::ACK);
    const FIN: TcpFlags = TcpFlags(TcpFlags::FIN | TcpFlags::ACK);
    const RST: TcpFlags = TcpFlags(TcpFlags::RST);

    fn key(protocol: u8, remote_port: u16) -> SessionKey {
        SessionKey {
            inside: 1,
            remote: 2,
            inside_port: 3,
            remote_port: remote_port.to_be(),
            protocol,
            zero: [0; 3],
            pad: [],
        }
    }

    fn session(last_seen_ns: u64, state: State) -> Session {
        Session { last_seen_ns, outside: 0, outside_port: 0, state, zero: 0, pad: [] }
    }

    fn established() -> State {
        State::NEW.after_inside(SYN).after_outside(SYN_ACK).after_inside(ACK)
    }

    #[test]
    fn a_handshake_establishes() {
        let state = State::NEW.after_inside(SYN).after_outside(SYN_ACK);
        assert!(!state.is_established());
        assert!(state.after_inside(ACK).is_established());
    }

    #[test]
    fn a_stream_from_the_pod_alone_stays_transitory() {
        let state = State::NEW.after_inside(ACK).after_inside(ACK);
        assert_eq!(timeout_ns(&key(ipv4::TCP, 80), state), TCP_TRANSITORY_TIMEOUT_NS);
    }

    #[test]
    fn one_fin_is_transitory_and_two_are_closed() {
        let half = established().after_inside(FIN);
        assert_eq!(timeout_ns(&key(ipv4::TCP, 80), half), TCP_TRANSITORY_TIMEOUT_NS);
        assert!(half.after_outside(FIN).is_closed());
        assert!(established().after_outside(FIN).after_inside(FIN).is_closed());
    }

    #[test]
    fn a_reset_closes_and_the_pods_next_data_reopens_what_the_outside_reset() {
        assert!(established().after_inside(RST).is_closed());
        let reset = established().after_outside(RST);
        assert!(reset.is_closed());
        assert!(reset.after_inside(ACK).is_established());
        assert!(established().after_inside(RST).after_inside(ACK).is_closed());
    }

    #[test]
    fn a_syn_on_a_closed_connection_starts_anew_and_on_a_live_one_changes_nothing() {
        assert_eq!(established().after_inside(RST).after_inside(SYN), State::NEW);
        assert_eq!(established().after_inside(SYN), established());
    }

    #[test]
    fn each_kind_expires_after_its_own_time() {
        let closed = established().after_inside(RST);
        for (protocol, port, state, timeout) in [
            (ipv4::UDP, 4000, State::NEW, UDP_TIMEOUT_NS),
            (ipv4::UDP, 0, State::DNS, UDP_DNS_TIMEOUT_NS),
            (ipv4::ICMP, 0, State::NEW, ICMP_TIMEOUT_NS),
            (ipv4::TCP, 53, State::NEW, TCP_TRANSITORY_TIMEOUT_NS),
            (ipv4::TCP, 80, established(), TCP_ESTABLISHED_TIMEOUT_NS),
            (ipv4::TCP, 80, closed, TCP_TRANSITORY_TIMEOUT_NS),
            (ipv4::TCP, 0, State::ADMITS, TCP_TRANSITORY_TIMEOUT_NS),
        ] {
            let session = session(1_000, state);
            assert!(!expired(1_000 + timeout, &key(protocol, port), &session), "{protocol} {port}");
            assert!(expired(1_001 + timeout, &key(protocol, port), &session), "{protocol} {port}");
        }
    }

    /// REQ-5a of RFC 4787 is for well-known ports alone.
    #[test]
    fn one_packet_to_another_port_than_dns_makes_it_an_ordinary_flow() {
        let dns = State::first(ipv4::UDP, DNS);
        assert_eq!(dns.after_packet_out(ipv4::UDP, DNS, TcpFlags::NONE), State::DNS);
        let other = dns.after_packet_out(ipv4::UDP, 5353_u16.to_be(), TcpFlags::NONE);
        assert_eq!(timeout_ns(&key(ipv4::UDP, 0), other), UDP_TIMEOUT_NS);
        assert_eq!(other.after_packet_out(ipv4::UDP, DNS, TcpFlags::NONE), State::NEW);
    }

    #[test]
    fn a_clock_that_lags_expires_nothing() {
        let session = session(5, State::NEW);
        assert!(!expired(0, &key(ipv4::UDP, 1), &session));
    }

    #[test]
    fn a_closed_connection_gives_its_port_up_early_only_under_pressure() {
        let state = established().after_inside(RST);
        let session = session(0, state);
        let now = 2 * SECOND_NS;
        assert!(!reclaimable(now, &key(ipv4::TCP, 80), &session, false));
        assert!(reclaimable(now, &key(ipv4::TCP, 80), &session, true));
        let live = Session { state: established(), ..session };
        assert!(!reclaimable(now, &key(ipv4::TCP, 80), &live, true));
    }
}
