//! ICMP errors about translated flows (RFC 5508 sections 4.2 and 4.3), in both directions: the packet that an
//! error quotes is given the address and port that it had where the error goes, so that path MTU discovery,
//! traceroute and "port unreachable" work through the translation. An error never ends a flow and never
//! keeps one alive.
//!
//! ```text
//! | IP | ICMP type, code, checksum, 4 bytes | quoted IP | 8 bytes or more of quoted transport |
//! ```
//! A quote with an IPv6 extension header other than the fragment header is left to the host.

use super::{
    Family, Header, Session, SessionKey, Tables, owner_inside, port_index,
    segment::{Direction, session_key},
    session::expired,
    translate::{PacketMut, set_address},
};
use crate::{
    checksum::replace16,
    counter::Counter,
    ipv4::{self, Address},
    packet::Packet,
};

/// What is sure to be quoted of a transport header.
const QUOTED_BYTES: usize = 8;

/// What an error quotes: a packet of a pod's flow, as it was on the side that the error comes from.
struct Quote<F: Family> {
    protocol: u8,
    /// The end that is translated: the source in an error that comes in, for it quotes what the pod has sent; the
    /// destination in one that goes out.
    near: (F::Address, u16),
    /// The remote end.
    far: (F::Address, u16),
    /// Where the quoted IP header starts.
    offset: usize,
    address_offset: usize,
    port_offset: usize,
    /// Where the quoted transport checksum lies; TCP's is beyond the 8 bytes that are sure to be there.
    checksum_offset: Option<usize>,
}

impl<F: Family> Quote<F> {
    #[inline(always)]
    fn read<P: Packet + ?Sized>(packet: &P, header: &Header<F>, direction: Direction) -> Option<Quote<F>> {
        if !F::is_error(packet.byte(header.payload)?) {
            return None;
        }
        let offset = header.payload + 8;
        let quoted = F::quoted(packet, offset)?;
        let (protocol, transport) = (quoted.protocol, quoted.transport);
        if transport + QUOTED_BYTES > header.end {
            return None;
        }
        let (first, second) = (packet.wire16(transport)?, packet.wire16(transport + 2)?);
        let (near, far, address_offset) = match direction {
            Direction::In => {
                ((quoted.source, first), (quoted.destination, second), offset + F::SOURCE_IN_HEADER)
            }
            Direction::Out => {
                ((quoted.destination, second), (quoted.source, first), offset + F::DESTINATION_IN_HEADER)
            }
        };
        let quote = |near_port, far_port, port_offset, checksum_offset| Quote {
            protocol,
            near: (near.0, near_port),
            far: (far.0, far_port),
            offset,
            address_offset,
            port_offset,
            checksum_offset,
        };
        let port_offset = if direction == Direction::In { transport } else { transport + 2 };
        match protocol {
            ipv4::TCP => Some(quote(near.1, far.1, port_offset, None)),
            ipv4::UDP => Some(quote(near.1, far.1, port_offset, Some(transport + 6))),
            // A pod's error about an echo reply helps nobody.
            icmp if icmp == F::ICMP
                && first == u16::from_ne_bytes([F::ECHO_REQUEST, 0])
                && direction == Direction::In =>
            {
                Some(quote(packet.wire16(transport + 4)?, 0, transport + 4, Some(transport + 2)))
            }
            _ => None,
        }
    }

    /// The key of the flow whose inside end is `inside`.
    #[inline(always)]
    fn session_key(&self, inside: (Address, u16)) -> SessionKey<F> {
        session_key(self.protocol, inside, self.far)
    }
}

/// Hands an error to the pod whose packet it quotes.
#[inline(always)]
pub(super) fn translate_error_in<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    header: &Header<F>,
) -> Counter {
    let Some(quote) = Quote::read(packet, header, Direction::In) else { return Counter::IngressPass };
    let inside = owner_inside(tables.port(port_index::<F>(quote.protocol, quote.near.1)));
    // An error goes to where the packet came from.
    if inside.0 == 0 || quote.near.0 != header.destination {
        return Counter::IngressPass;
    }
    match live(tables, &quote.session_key(inside)) {
        Some(session) if (session.outside, session.outside_port) == quote.near => {}
        _ => return Counter::IngressPassHost,
    }
    let Some(pod) = tables.pod(inside.0) else { return Counter::IngressDropError };
    match rewrite(packet, header, &quote, Direction::In, (pod, inside.1)) {
        Some(()) => Counter::IngressError,
        None => Counter::IngressDropError,
    }
}

/// Lets a pod's error about a packet that was handed to it go out, to who sent that packet or, like a reply,
/// to nobody.
#[inline(always)]
pub(super) fn translate_error_out<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    header: &Header<F>,
) -> Result<Counter, Counter> {
    let quote = Quote::read(packet, header, Direction::Out).ok_or(Counter::EgressDropProtocol)?;
    if quote.near.0 != header.source || quote.far.0 != header.destination {
        return Err(Counter::EgressDropIcmpError);
    }
    let inside = tables.inside(quote.near.0).ok_or(Counter::EgressDropPod)?;
    let key = quote.session_key((inside, quote.near.1));
    let session = live(tables, &key).ok_or(Counter::EgressDropIcmpError)?;
    rewrite(packet, header, &quote, Direction::Out, (session.outside, session.outside_port))
        .ok_or(Counter::EgressDropError)?;
    Ok(Counter::EgressTranslatedError)
}

#[inline(always)]
fn live<F: Family, T: Tables<F>>(tables: &mut T, key: &SessionKey<F>) -> Option<Session<F>> {
    let now_ns = tables.now_ns();
    tables.session(key).copied().filter(|session| !expired(now_ns, key, session))
}

/// Gives the quoted packet's near end, and the error's own, another address and port.
#[inline(always)]
fn rewrite<F: Family, P: PacketMut + ?Sized>(
    packet: &mut P,
    header: &Header<F>,
    quote: &Quote<F>,
    direction: Direction,
    to: (F::Address, u16),
) -> Option<()> {
    let (near, near_port) = quote.near;
    let mut outer = packet.wire16(header.payload + 2)?;
    outer = F::mend_header(packet, quote.offset, (near, to.0), outer)?;
    F::set_address(packet, quote.address_offset, to.0)?;
    if let Some(offset) = quote.checksum_offset {
        let old = packet.wire16(offset)?;
        let is_udp = quote.protocol == ipv4::UDP;
        if !(is_udp && old == 0) {
            let mut new = replace16(old, near_port, to.1);
            if is_udp || F::ICMP_HAS_PSEUDO_HEADER {
                new = F::replace(new, near, to.0);
            }
            packet.set16(offset, new)?;
            outer = replace16(outer, old, new);
        }
    }
    packet.set16(quote.port_offset, to.1)?;
    outer = replace16(outer, near_port, to.1);
    if F::ICMP_HAS_PSEUDO_HEADER {
        // The error's own near end is the one that it quotes.
        outer = F::replace(outer, near, to.0);
    }
    packet.set16(header.payload + 2, outer)?;
    set_address::<F, P>(packet, direction, near, to.0)
}
