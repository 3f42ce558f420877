//! The way out, where flows are made.

use super::{
    Config, FragmentKey, Inserted, SESSION_REFRESH_NS, Session, SessionKey, State, Tables, TcpFlags, Verdict,
    claim::{NewFlow, map_port, shared_port},
    error::translate_error_out,
    owner_inside, port_index,
    segment::{Direction, NoSegment, Segment},
    translate::{PacketMut, set_address, translate},
};
use crate::{
    counter::Counter,
    ethernet,
    ipv4::{self, Address, Header},
    packet::Packet,
};

/// How much of the packet must lie in one piece for the logic to see all that it wants to see. Drivers
/// and splice may leave less there, of a packet that is whole.
#[inline(always)]
pub fn linear_bytes<P: Packet + ?Sized>(packet: &P) -> usize {
    /// Up to the TCP checksum, behind an IPv4 header without options.
    const PLAIN: usize = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES_MIN + 18;
    /// The longest IPv4 header, an ICMP error, and what it quotes.
    const LONGEST: usize = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES_MAX + 8 + ipv4::HEADER_BYTES_MIN + 8;
    const NO_OPTIONS: u8 = 0x45;
    if packet.wire16(ethernet::ETHER_TYPE) != Some(ethernet::IPV4) {
        return 0;
    }
    // One after the other: of several optional values in one match, the verifier sees some that were never
    // written.
    if packet.byte(ipv4::VERSION_IHL) != Some(NO_OPTIONS) {
        return LONGEST;
    }
    match packet.byte(ipv4::PROTOCOL) {
        Some(ipv4::TCP | ipv4::UDP) => PLAIN,
        _ => LONGEST,
    }
}

/// Translates a packet that leaves by the uplink. What is of the pods' range leaves translated or not at
/// all.
#[inline(always)]
pub fn egress<P: PacketMut + ?Sized, T: Tables>(packet: &mut P, tables: &mut T, config: &Config) -> Verdict {
    if config.enabled == 0 || packet.wire16(ethernet::ETHER_TYPE) != Some(ethernet::IPV4) {
        tables.count(Counter::EgressPass);
        return Verdict::Next;
    }
    // An IPv4 header that is cut short before its source is dropped too, further on.
    if let Some(source) = packet.wire32(ipv4::SOURCE)
        && !config.is_pod(source)
    {
        let counter = of_the_host(packet, tables, config, source);
        tables.count(counter);
        return Verdict::Next;
    }
    let (counter, verdict) = match out(packet, tables, config) {
        Ok(counter) => (counter, Verdict::Next),
        Err(counter) => (counter, Verdict::Drop),
    };
    tables.count(counter);
    verdict
}

/// The node's own packets are not touched. One that leaves from the very port of a pod's flow and to the
/// same remote ends that flow: the replies are the host's from now on.
#[inline(always)]
fn of_the_host<P: PacketMut + ?Sized, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
    source: Address,
) -> Counter {
    if !config.is_node(source) {
        return Counter::EgressPass;
    }
    match flow_of_a_pod(packet, tables, config) {
        Some(key) => {
            tables.remove_session(&key);
            Counter::EgressHost
        }
        None => Counter::EgressPass,
    }
}

#[inline(always)]
fn flow_of_a_pod<P: PacketMut + ?Sized, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
) -> Option<SessionKey> {
    let header = Header::read(packet)?;
    if header.is_later_fragment() || header.protocol == ipv4::ICMP {
        return None;
    }
    let segment = Segment::read(packet, &header, Direction::Out).ok()?;
    if !config.pool.has(segment.near_port) {
        return None;
    }
    let (inside, inside_port) = owner_inside(tables.port(port_index(header.protocol, segment.near_port)));
    if inside == 0 {
        return None;
    }
    let key = Segment { near_port: inside_port, ..segment }.session_key(&Header { source: inside, ..header });
    let session = tables.session(&key)?;
    (session.outside_port == segment.near_port && session.outside == header.source).then_some(key)
}

/// Gives a packet of a pod the node's address, or says why it cannot leave.
#[inline(always)]
pub(super) fn out<P: PacketMut + ?Sized, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
) -> Result<Counter, Counter> {
    let header = Header::read(packet).ok_or(Counter::EgressDropHeader)?;
    if header.is_later_fragment() {
        let to = tables.fragment(&fragment_key(&header)).ok_or(Counter::EgressDropFragment)?;
        set_address(packet, Direction::Out, header.source, to).ok_or(Counter::EgressDropError)?;
        return Ok(Counter::EgressFragment);
    }
    let segment = match Segment::read(packet, &header, Direction::Out) {
        Ok(segment) => segment,
        Err(NoSegment::Protocol) if header.protocol == ipv4::ICMP => {
            return translate_error_out(packet, tables, &header);
        }
        Err(NoSegment::Protocol) => return Err(Counter::EgressDropProtocol),
        Err(NoSegment::Short) => return Err(Counter::EgressDropHeader),
    };
    let (address, port) = outside(tables, config, &header, &segment)?;
    if header.is_first_fragment() {
        tables.insert_fragment(&fragment_key(&header), address);
    }
    translate(packet, &header, &segment, Direction::Out, address, port).ok_or(Counter::EgressDropError)?;
    Ok(Counter::EgressTranslated)
}

#[inline(always)]
pub(super) fn fragment_key(header: &Header) -> FragmentKey {
    FragmentKey {
        source: header.source,
        destination: header.destination,
        identification: header.identification,
        protocol: header.protocol,
        zero: 0,
    }
}

/// The outside address and port of the packet's flow, which is made if there is none.
#[inline(always)]
fn outside<T: Tables>(
    tables: &mut T,
    config: &Config,
    header: &Header,
    segment: &Segment,
) -> Result<(Address, u16), Counter> {
    let key = segment.session_key(header);
    let now_ns = tables.now_ns();
    if let Some(session) = tables.session(&key) {
        touch(session, session.state.after_packet_out(key.protocol, segment.far_port, segment.flags), now_ns);
        return Ok((session.outside, session.outside_port));
    }
    let outside = tables.source(key.remote).unwrap_or(config.nodes[0]);
    let flow = NewFlow { key: &key, remote_port: segment.far_port, outside, now_ns };
    let made = new_flow(tables, config, &flow, segment.flags);
    made.map(|port| (outside, port))
}

/// Writes only what has changed.
#[inline(always)]
pub(super) fn touch(session: &mut Session, state: State, now_ns: u64) {
    if session.state != state {
        session.state = state;
        session.last_seen_ns = now_ns;
    } else if now_ns.saturating_sub(session.last_seen_ns) > SESSION_REFRESH_NS {
        session.last_seen_ns = now_ns;
    }
}

/// Makes a session, and a mapping if the inside port has none. A reset makes neither, and leaves by the mapping
/// that there is: the answer of a pod to a connection that it does not want.
#[inline(always)]
fn new_flow<T: Tables>(
    tables: &mut T,
    config: &Config,
    flow: &NewFlow<'_>,
    flags: TcpFlags,
) -> Result<u16, Counter> {
    let shared = shared_port(tables, flow);
    if flags.has(TcpFlags::RST) {
        return shared.unwrap_or(Err(Counter::EgressDropReset));
    }
    let port = match shared {
        Some(port) => port?,
        None => map_port(tables, config, flow)?,
    };
    let state = State::first(flow.key.protocol, flow.remote_port);
    if shared.is_some() && flow.key.protocol == ipv4::TCP {
        admit(tables, flow, port);
    }
    match insert(tables, flow, flow.key, port, state) {
        // Another CPU was first with a packet of the same flow: it found the same mapping.
        Inserted::Done | Inserted::Exists => {
            tables.count(Counter::EgressNewFlow);
            Ok(port)
        }
        Inserted::Full => Err(Counter::EgressDropTable),
    }
}

#[inline(always)]
fn insert<T: Tables>(
    tables: &mut T,
    flow: &NewFlow<'_>,
    key: &SessionKey,
    outside_port: u16,
    state: State,
) -> Inserted {
    let session = Session { last_seen_ns: flow.now_ns, outside: flow.outside, outside_port, state, zero: 0 };
    tables.insert_session(key, &session)
}

/// Notes that the inside port has written to the remote's address, beside the connection itself. Not for the
/// first remote: the mapping names it.
#[inline(always)]
fn admit<T: Tables>(tables: &mut T, flow: &NewFlow<'_>, port: u16) {
    let key = SessionKey { remote_port: 0, ..*flow.key };
    match tables.session(&key) {
        Some(session) => touch(session, State::ADMITS, flow.now_ns),
        // Without room the remote gets in by its connections alone.
        None => drop(insert(tables, flow, &key, port, State::ADMITS)),
    }
}
