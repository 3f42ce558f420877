//! The way out, where flows are made.

use super::{
    Config, Family, Header, Inserted, Part, SESSION_REFRESH_NS, Session, SessionKey, State, Tables, TcpFlags,
    Verdict,
    claim::{NewFlow, map_port, shared_port},
    error::translate_error_out,
    fragment::note_first,
    owner_inside, port_index,
    segment::{Direction, NoSegment, Segment, session_key},
    translate::{PacketMut, translate},
};
use crate::{
    counter::Counter,
    ethernet,
    ipv4::{self, Address},
    packet::Packet,
};

/// Translates a packet that leaves by the uplink. What is of the pods' range leaves translated or not at
/// all, unless it stays near.
#[inline(always)]
pub fn egress<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
) -> Verdict {
    if !F::is_on(config)
        || packet.wire16(ethernet::ETHER_TYPE) != Some(F::ETHER_TYPE)
        || is_near::<F, P>(packet)
    {
        tables.count(Counter::EgressPass);
        return Verdict::Next;
    }
    // A header that is cut short before its source is dropped too, further on.
    if let Some(source) = F::address(packet, F::SOURCE)
        && !F::is_pod(config, source)
    {
        let counter = of_the_host(packet, tables, config, source);
        tables.count(counter);
        return if counter == Counter::EgressDropHostReset { Verdict::Drop } else { Verdict::Next };
    }
    let (counter, verdict) = match out(packet, tables, config) {
        Ok((_, Part::Later)) => return Verdict::Fragment,
        Ok((counter, Part::First)) => (counter, Verdict::Fragment),
        Ok((counter, Part::Whole)) => (counter, Verdict::Next),
        Err(Counter::EgressDirect) => (Counter::EgressDirect, Verdict::Next),
        Err(_) if is_direct(packet, tables) => (Counter::EgressDirect, Verdict::Next),
        Err(counter) => (counter, Verdict::Drop),
    };
    tables.count(counter);
    verdict
}

#[inline(always)]
fn is_near<F: Family, P: Packet + ?Sized>(packet: &P) -> bool {
    F::address(packet, F::DESTINATION).is_some_and(F::is_near)
}

/// Whether the packet is for a remote that pods reach with their own addresses, or is the node's word about them.
#[inline(always)]
pub fn is_direct<F: Family, P: Packet + ?Sized, T: Tables<F>>(packet: &P, tables: &mut T) -> bool {
    F::is_discovery(packet)
        || F::address(packet, F::DESTINATION).is_some_and(|to| F::is_near(to) || tables.is_direct(to))
}

/// The node's own packets are not touched. One that leaves from the very port of a pod's flow and to the
/// same remote ends that flow: the replies are the host's from now on. But a reset is the kernel's answer to a
/// packet of that flow which it got because nobody had translated it back: it would end the pod's connection.
#[inline(always)]
fn of_the_host<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
    source: F::Address,
) -> Counter {
    if !F::is_node(config, source) {
        return Counter::EgressPass;
    }
    end_flow(packet, tables, config).unwrap_or(Counter::EgressPass)
}

/// `None`: it is about no flow of a pod. One function, for the stack of a program has no room for a second key.
#[inline(always)]
fn end_flow<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
) -> Option<Counter> {
    let header = F::header(packet)?;
    if header.part == Part::Later || header.protocol == F::ICMP {
        return None;
    }
    let segment = Segment::read(packet, &header, Direction::Out).ok()?;
    if !config.pool.has(segment.near_port) {
        return None;
    }
    let inside = owner_inside(tables.port(port_index::<F>(header.protocol, segment.near_port)));
    if inside.0 == 0 {
        return None;
    }
    let key = session_key(header.protocol, inside, (header.destination, segment.far_port));
    let session = tables.session(&key)?;
    if session.outside_port != segment.near_port || session.outside != header.source {
        return None;
    }
    if segment.flags.has(TcpFlags::RST) {
        return Some(Counter::EgressDropHostReset);
    }
    tables.remove_session(&key);
    Some(Counter::EgressHost)
}

/// Gives a packet of a pod the node's address, or says why it cannot leave. A later fragment is
/// not changed here.
#[inline(always)]
pub(super) fn out<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
) -> Result<(Counter, Part), Counter> {
    let header = F::header(packet).ok_or(Counter::EgressDropHeader)?;
    if header.part == Part::Later {
        return Ok((Counter::EgressFragment, Part::Later));
    }
    let segment = match Segment::read(packet, &header, Direction::Out) {
        Ok(segment) => segment,
        Err(NoSegment::Protocol) if header.protocol == F::ICMP => {
            return Ok((translate_error_out(packet, tables, &header)?, header.part));
        }
        Err(NoSegment::Protocol) => return Err(Counter::EgressDropProtocol),
        Err(NoSegment::Short) => return Err(Counter::EgressDropHeader),
    };
    let inside = tables.inside(header.source).ok_or(Counter::EgressDropPod)?;
    let (address, port) = outside(tables, config, inside, &header, &segment)?;
    if header.part == Part::First {
        note_first(tables, &header, address);
    }
    translate(packet, &header, &segment, Direction::Out, address, port).ok_or(Counter::EgressDropError)?;
    Ok((Counter::EgressTranslated, header.part))
}

/// The outside address and port of the packet's flow, which is made if there is none.
#[inline(always)]
fn outside<F: Family, T: Tables<F>>(
    tables: &mut T,
    config: &Config,
    inside: Address,
    header: &Header<F>,
    segment: &Segment,
) -> Result<(F::Address, u16), Counter> {
    let remote = (header.destination, segment.far_port);
    let key = session_key(header.protocol, (inside, segment.near_port), remote);
    let now_ns = tables.now_ns();
    if let Some(session) = tables.session(&key) {
        touch(session, session.state.after_packet_out(key.protocol, segment.far_port, segment.flags), now_ns);
        return Ok((session.outside, session.outside_port));
    }
    // The node's own address is on a link of its own, but not for a pod that looks for another pod there.
    if !F::is_node(config, key.remote) && tables.is_direct(key.remote) {
        return Err(Counter::EgressDirect);
    }
    let outside = tables.source(key.remote).unwrap_or(F::outside(config));
    if outside == F::NOBODY {
        return Err(Counter::EgressDropAddress);
    }
    let flow = NewFlow { key: &key, remote_port: segment.far_port, outside, now_ns };
    let made = new_flow(tables, config, &flow, segment.flags);
    made.map(|port| (outside, port))
}

/// Writes only what has changed.
#[inline(always)]
pub(super) fn touch<F: Family>(session: &mut Session<F>, state: State, now_ns: u64) {
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
fn new_flow<F: Family, T: Tables<F>>(
    tables: &mut T,
    config: &Config,
    flow: &NewFlow<'_, F>,
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
fn insert<F: Family, T: Tables<F>>(
    tables: &mut T,
    flow: &NewFlow<'_, F>,
    key: &SessionKey<F>,
    outside_port: u16,
    state: State,
) -> Inserted {
    let last_seen_ns = flow.now_ns;
    let session = Session { last_seen_ns, outside: flow.outside, outside_port, state, zero: 0, pad: F::PAD };
    tables.insert_session(key, &session)
}

/// Notes that the inside port has written to the remote's address, beside the connection itself. Not for the
/// first remote: the mapping names it.
#[inline(always)]
fn admit<F: Family, T: Tables<F>>(tables: &mut T, flow: &NewFlow<'_, F>, port: u16) {
    let key = SessionKey { remote_port: 0, ..*flow.key };
    match tables.session(&key) {
        Some(session) => touch(session, State::ADMITS, flow.now_ns),
        // Without room the remote gets in by its connections alone.
        None => drop(insert(tables, flow, &key, port, State::ADMITS)),
    }
}
