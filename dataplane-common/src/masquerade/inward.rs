//! The way in, where flows are found.

use super::{
    Config, Family, Header, HostSocket, Part, SessionKey, Tables, Verdict,
    error::translate_error_in,
    flow::touch,
    fragment::note_first,
    owner_inside, port_index,
    segment::{Direction, NoSegment, Segment, session_key},
    session::expired,
    translate::{PacketMut, translate},
};
use crate::{counter::Counter, ethernet, ipv4};

/// Undoes the translation of a packet that comes in by the uplink. What belongs to no flow is the host's.
#[inline(always)]
pub fn ingress<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
) -> Verdict {
    if !F::is_on(config) || packet.wire16(ethernet::ETHER_TYPE) != Some(F::ETHER_TYPE) {
        tables.count(Counter::IngressPass);
        return Verdict::Next;
    }
    let (counter, part) = match F::address(packet, F::DESTINATION) {
        Some(to) if F::is_node(config, to) => inward(packet, tables, config),
        Some(to) if F::IS_PRIVATE && F::is_pod(config, to) => (Counter::IngressDropPrivate, Part::Whole),
        _ => (Counter::IngressPass, Part::Whole),
    };
    if part == Part::Later {
        return Verdict::Fragment;
    }
    tables.count(counter);
    match counter {
        Counter::IngressDropPrivate | Counter::IngressDropError | Counter::IngressDropFiltered => {
            Verdict::Drop
        }
        _ if part == Part::First => Verdict::Fragment,
        _ => Verdict::Next,
    }
}

/// Hands a packet for the node to the pod whose flow it belongs to. A later fragment is not
/// changed here.
#[inline(always)]
pub(super) fn inward<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
) -> (Counter, Part) {
    let Some(header) = F::header(packet) else { return (Counter::IngressPass, Part::Whole) };
    if header.part == Part::Later {
        return (Counter::IngressFragment, Part::Later);
    }
    (to_flow(packet, tables, config, &header), header.part)
}

/// Hands a packet with a transport header to the pod whose flow it belongs to.
#[inline(always)]
fn to_flow<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
    header: &Header<F>,
) -> Counter {
    let segment = match Segment::read(packet, header, Direction::In) {
        Ok(segment) => segment,
        Err(NoSegment::Protocol) if header.protocol == F::ICMP => {
            return translate_error_in(packet, tables, header);
        }
        Err(_) => return Counter::IngressPass,
    };
    let (inside, inside_port) =
        owner_inside(tables.port(port_index::<F>(header.protocol, segment.near_port)));
    if inside == 0 {
        return Counter::IngressPass;
    }
    let key = session_key(header.protocol, (inside, inside_port), (header.source, segment.far_port));
    if !reply(tables, &key, header, &segment)
        && let Err(refused) = stranger(tables, config, &key, header, &segment)
    {
        return refused;
    }
    let Some(pod) = tables.pod(inside) else { return Counter::IngressDropError };
    if header.part == Part::First {
        note_first(tables, header, pod);
    }
    match translate(packet, header, &segment, Direction::In, pod, inside_port) {
        Some(()) => Counter::IngressTranslated,
        None => Counter::IngressDropError,
    }
}

/// Notes the reply in its session. False if there is none that lives, or not at this address and port.
///
/// Only TCP is kept alive from outside: there both sides must agree to talk (RFC 4787 REQ-6, RFC 7857
/// section 6).
#[inline(always)]
fn reply<F: Family, T: Tables<F>>(
    tables: &mut T,
    key: &SessionKey<F>,
    header: &Header<F>,
    segment: &Segment,
) -> bool {
    let now_ns = tables.now_ns();
    let Some(session) = tables.session(key) else { return false };
    let is_here = session.outside_port == segment.near_port && session.outside == header.destination;
    if !is_here || expired(now_ns, key, session) {
        return false;
    }
    if key.protocol == ipv4::TCP {
        touch(session, session.state.after_outside(segment.flags), now_ns);
    }
    true
}

/// Whether a packet of no session gets in. A socket of the host's comes first; what nobody wants is dropped
/// without a word, as an answer would end the attempt of two hosts to open a connection at once
/// (RFC 5382 REQ-4).
#[inline(always)]
fn stranger<F: Family, T: Tables<F>>(
    tables: &mut T,
    config: &Config,
    key: &SessionKey<F>,
    header: &Header<F>,
    segment: &Segment,
) -> Result<(), Counter> {
    // The answer to an echo of the host's own.
    if key.protocol == F::ICMP {
        return Err(Counter::IngressPassHost);
    }
    let socket = HostSocket {
        protocol: key.protocol,
        address: header.destination,
        port: segment.near_port,
        remote: header.source,
        remote_port: segment.far_port,
    };
    if tables.host_has(&socket) {
        return Err(Counter::IngressPassHost);
    }
    match admitted_at(tables, config, key) {
        Some(port) if port == segment.near_port => Ok(()),
        _ => Err(Counter::IngressDropFiltered),
    }
}

/// The outside port at which the remote of `key` gets in without a connection of its own.
///
/// UDP has none to find here: its sessions are of addresses.
#[inline(always)]
fn admitted_at<F: Family, T: Tables<F>>(tables: &mut T, config: &Config, key: &SessionKey<F>) -> Option<u16> {
    let mapping = *tables.mapping(&key.mapping())?;
    if config.filtering == Config::ENDPOINT_INDEPENDENT {
        return Some(mapping.outside_port);
    }
    if key.protocol != ipv4::TCP {
        return None;
    }
    let now_ns = tables.now_ns();
    let first = SessionKey { remote_port: mapping.remote_port, ..*key };
    let lives = mapping.remote == key.remote && is_alive(tables, &first, now_ns);
    let lives = lives || is_alive(tables, &SessionKey { remote_port: 0, ..*key }, now_ns);
    lives.then_some(mapping.outside_port)
}

#[inline(always)]
fn is_alive<F: Family, T: Tables<F>>(tables: &mut T, key: &SessionKey<F>, now_ns: u64) -> bool {
    tables.session(key).is_some_and(|session| !expired(now_ns, key, session))
}
