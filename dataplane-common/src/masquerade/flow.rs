//! The two ways through: out, where flows are made, and in, where they are found.

use super::{
    Config, FragmentKey, Inserted, Mapping, MappingKey, OWNER_FREE, PROBES_MAX, SESSION_REFRESH_NS, Session,
    SessionKey, State, Tables, TcpFlags, Verdict,
    error::translate_error,
    is_owned_by, owner, owner_inside, pool_port, port_index,
    segment::{Direction, NoSegment, Segment},
    session::{expired, reclaimable},
    translate::{PacketMut, set_address, translate},
};
use crate::{
    counter::Counter,
    ethernet,
    ipv4::{self, Header},
    packet::Packet,
};

/// A mapping without a session is one that is being made, unless it is older than this.
const MAKING_NS: u64 = 1_000_000_000;

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
    if config.enabled == 0
        || packet.wire16(ethernet::ETHER_TYPE) != Some(ethernet::IPV4)
        || !is_pods(packet.wire32(ipv4::SOURCE), config)
    {
        tables.count(Counter::EgressPass);
        return Verdict::Next;
    }
    match out(packet, tables, config) {
        Ok(counter) => {
            tables.count(counter);
            Verdict::Next
        }
        Err(counter) => {
            tables.count(counter);
            Verdict::Drop
        }
    }
}

/// An IPv4 header that is cut short before its source is dropped too, further on.
#[inline(always)]
fn is_pods(source: Option<ipv4::Address>, config: &Config) -> bool {
    source.is_none_or(|source| source & config.pod_mask == config.pod_network)
}

#[inline(always)]
fn out<P: PacketMut + ?Sized, T: Tables>(
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
    let segment = Segment::read(packet, &header, Direction::Out).map_err(|e| match e {
        NoSegment::Short => Counter::EgressDropHeader,
        NoSegment::Protocol => Counter::EgressDropProtocol,
    })?;
    let key = segment.session_key(&header);
    let port = outside_port(tables, config, &key, segment.flags)?;
    if header.is_first_fragment() {
        tables.insert_fragment(&fragment_key(&header), config.node);
    }
    translate(packet, &header, &segment, Direction::Out, config.node, port)
        .ok_or(Counter::EgressDropError)?;
    Ok(Counter::EgressTranslated)
}

#[inline(always)]
fn fragment_key(header: &Header) -> FragmentKey {
    FragmentKey {
        source: header.source,
        destination: header.destination,
        identification: header.identification,
        protocol: header.protocol,
        zero: 0,
    }
}

/// The outside port of the packet's flow, which is made if there is none.
#[inline(always)]
fn outside_port<T: Tables>(
    tables: &mut T,
    config: &Config,
    key: &SessionKey,
    flags: TcpFlags,
) -> Result<u16, Counter> {
    let now_ns = tables.now_ns();
    if let Some(session) = tables.session(key) {
        let state = match key.protocol {
            ipv4::TCP => session.state.after_inside(flags),
            _ => session.state,
        };
        touch(session, state, now_ns);
        return Ok(session.outside_port);
    }
    new_flow(tables, config, key, flags, now_ns)
}

/// Writes only what has changed.
#[inline(always)]
fn touch(session: &mut Session, state: State, now_ns: u64) {
    if session.state != state {
        session.state = state;
        session.last_seen_ns = now_ns;
    } else if now_ns.saturating_sub(session.last_seen_ns) > SESSION_REFRESH_NS {
        session.last_seen_ns = now_ns;
    }
}

#[inline(always)]
fn new_flow<T: Tables>(
    tables: &mut T,
    config: &Config,
    key: &SessionKey,
    flags: TcpFlags,
    now_ns: u64,
) -> Result<u16, Counter> {
    if flags.has(TcpFlags::RST) {
        return Err(Counter::EgressDropReset);
    }
    let outside_port = match shared_port(tables, &key.mapping()) {
        Some(port) => port,
        None => map_port(tables, config, key, now_ns)?,
    };
    let session = Session { last_seen_ns: now_ns, outside_port, state: State::NEW, zero: [0; 5] };
    match tables.insert_session(key, &session) {
        // Another CPU was first with a packet of the same flow: it found the same mapping.
        Inserted::Done | Inserted::Exists => {
            tables.count(Counter::EgressNewFlow);
            Ok(outside_port)
        }
        Inserted::Full => Err(Counter::EgressDropTable),
    }
}

/// The outside port that the inside port has already, for another remote.
#[inline(always)]
fn shared_port<T: Tables>(tables: &mut T, key: &MappingKey) -> Option<u16> {
    let mapping = tables.mapping(key)?;
    mapping.shared = 1;
    Some(mapping.outside_port)
}

/// Claims an outside port and maps the inside port to it.
#[inline(always)]
fn map_port<T: Tables>(
    tables: &mut T,
    config: &Config,
    key: &SessionKey,
    now_ns: u64,
) -> Result<u16, Counter> {
    let me = owner(key.inside, key.inside_port, tables.random() as u16);
    let outside_port = claim(tables, config, key, me, now_ns)?;
    let mapping = Mapping {
        created_ns: now_ns,
        remote: key.remote,
        remote_port: key.remote_port,
        outside_port,
        shared: 0,
        zero: 0,
    };
    match tables.insert_mapping(&key.mapping(), &mapping) {
        Inserted::Done => Ok(outside_port),
        // Another CPU was first with another remote of the same inside port: its port is the one.
        Inserted::Exists | Inserted::Full => {
            tables.claim_port(port_index(key.protocol, outside_port), me, OWNER_FREE);
            shared_port(tables, &key.mapping()).ok_or(Counter::EgressDropTable)
        }
    }
}

/// Tries the inside port itself, then random others; in the second half also those of connections that
/// were closed a moment ago.
#[inline(always)]
fn claim<T: Tables>(
    tables: &mut T,
    config: &Config,
    key: &SessionKey,
    me: u64,
    now_ns: u64,
) -> Result<u16, Counter> {
    for probe in 0..PROBES_MAX {
        let port = if probe == 0 { key.inside_port } else { pool_port(tables.random(), config) };
        if try_claim(tables, config, key, me, now_ns, port, probe >= PROBES_MAX / 2) {
            return Ok(port);
        }
    }
    Err(Counter::EgressDropPorts)
}

#[inline(always)]
fn try_claim<T: Tables>(
    tables: &mut T,
    config: &Config,
    key: &SessionKey,
    me: u64,
    now_ns: u64,
    port: u16,
    pressed: bool,
) -> bool {
    let index = port_index(key.protocol, port);
    let current = tables.port(index);
    if current == OWNER_FREE || is_owned_by(current, key.inside, key.inside_port) {
        return !tables.host_has_port(config.node, key, port) && tables.claim_port(index, current, me);
    }
    let Some(ended) = ended(tables, key.protocol, current, now_ns, pressed) else { return false };
    if tables.host_has_port(config.node, key, port) || !tables.claim_port(index, current, me) {
        return false;
    }
    tables.remove_mapping(&ended.mapping());
    tables.remove_session(&ended);
    tables.count(Counter::EgressReclaimed);
    true
}

/// The only session of the port's owner, if it has ended.
#[inline(always)]
fn ended<T: Tables>(
    tables: &mut T,
    protocol: u8,
    current: u64,
    now_ns: u64,
    pressed: bool,
) -> Option<SessionKey> {
    let (inside, inside_port) = owner_inside(current);
    let mapping = *tables.mapping(&MappingKey { inside, inside_port, protocol, zero: 0 })?;
    if mapping.shared != 0 {
        return None;
    }
    let key = SessionKey {
        inside,
        remote: mapping.remote,
        inside_port,
        remote_port: mapping.remote_port,
        protocol,
        zero: [0; 3],
    };
    let ended = match tables.session(&key) {
        Some(session) => reclaimable(now_ns, &key, session, pressed),
        None => now_ns.saturating_sub(mapping.created_ns) > MAKING_NS,
    };
    ended.then_some(key)
}

/// Undoes the translation of a packet that comes in by the uplink. What belongs to no flow is the host's.
#[inline(always)]
pub fn ingress<P: PacketMut + ?Sized, T: Tables>(packet: &mut P, tables: &mut T, config: &Config) -> Verdict {
    if config.enabled == 0 || packet.wire16(ethernet::ETHER_TYPE) != Some(ethernet::IPV4) {
        tables.count(Counter::IngressPass);
        return Verdict::Next;
    }
    let destination = packet.wire32(ipv4::DESTINATION);
    if destination != Some(config.node) {
        let to_pod = destination.is_some_and(|to| to & config.pod_mask == config.pod_network);
        tables.count(if to_pod { Counter::IngressDropPrivate } else { Counter::IngressPass });
        return if to_pod { Verdict::Drop } else { Verdict::Next };
    }
    let counter = inward(packet, tables, config);
    tables.count(counter);
    if counter == Counter::IngressDropError { Verdict::Drop } else { Verdict::Next }
}

#[inline(always)]
fn inward<P: PacketMut + ?Sized, T: Tables>(packet: &mut P, tables: &mut T, config: &Config) -> Counter {
    let Some(header) = Header::read(packet) else { return Counter::IngressPass };
    if header.is_later_fragment() {
        return later_fragment_in(packet, tables, &header);
    }
    let segment = match Segment::read(packet, &header, Direction::In) {
        Ok(segment) => segment,
        Err(NoSegment::Protocol) if header.protocol == ipv4::ICMP => {
            return translate_error(packet, tables, config, &header);
        }
        Err(_) => return Counter::IngressPass,
    };
    let (inside, inside_port) = owner_inside(tables.port(port_index(header.protocol, segment.near_port)));
    if inside == 0 {
        return Counter::IngressPass;
    }
    let key = SessionKey {
        inside,
        remote: header.source,
        inside_port,
        remote_port: segment.far_port,
        protocol: header.protocol,
        zero: [0; 3],
    };
    if !reply(tables, &key, &segment) {
        return Counter::IngressPassNoSession;
    }
    if header.is_first_fragment() {
        tables.insert_fragment(&fragment_key(&header), inside);
    }
    match translate(packet, &header, &segment, Direction::In, inside, inside_port) {
        Some(()) => Counter::IngressTranslated,
        None => Counter::IngressDropError,
    }
}

/// Notes the reply in its session. False if there is none that lives, or not at this port.
#[inline(always)]
fn reply<T: Tables>(tables: &mut T, key: &SessionKey, segment: &Segment) -> bool {
    let now_ns = tables.now_ns();
    let Some(session) = tables.session(key) else { return false };
    if session.outside_port != segment.near_port || expired(now_ns, key, session) {
        return false;
    }
    let state = match key.protocol {
        ipv4::TCP => session.state.after_outside(segment.flags),
        _ => session.state,
    };
    touch(session, state, now_ns);
    true
}

#[inline(always)]
fn later_fragment_in<P: PacketMut + ?Sized, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    header: &Header,
) -> Counter {
    let Some(inside) = tables.fragment(&fragment_key(header)) else { return Counter::IngressPass };
    match set_address(packet, Direction::In, header.destination, inside) {
        Some(()) => Counter::IngressFragment,
        None => Counter::IngressDropError,
    }
}
