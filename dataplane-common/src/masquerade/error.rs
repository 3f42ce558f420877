//! ICMP errors about translated flows (RFC 5508 sections 4.2 and 4.3), in both directions: the packet that an
//! error quotes is given the address and port that it had where the error goes, so that path MTU discovery,
//! traceroute and "port unreachable" work through the translation. An error never ends a flow and never
//! keeps one alive.
//!
//! ```text
//! | IPv4 | ICMP type, code, checksum, 4 bytes | quoted IPv4 | 8 bytes or more of quoted transport |
//! ```
//! A quote with IPv4 options is left to the host.

use super::{
    Session, SessionKey, Tables, owner_inside, port_index,
    segment::{Direction, session_key},
    session::expired,
    translate::{PacketMut, set_address},
};
use crate::{
    checksum::{replace16, replace32},
    counter::Counter,
    ipv4::{self, Address, Header},
    packet::Packet,
};

/// ICMP type: destination unreachable (RFC 792), with the path's MTU in code 4 (RFC 1191).
const UNREACHABLE: u8 = 3;
/// ICMP type: time exceeded (RFC 792).
const TIME_EXCEEDED: u8 = 11;
/// ICMP type: parameter problem (RFC 792).
const PARAMETER_PROBLEM: u8 = 12;
/// What is sure to be quoted of a transport header.
const QUOTED_BYTES: usize = 8;
/// First two bytes of an echo request.
const ECHO_REQUEST: u16 = u16::from_ne_bytes([8, 0]);

/// What an error quotes: a packet of a pod's flow, as it was on the side that the error comes from.
struct Quote {
    protocol: u8,
    /// The end that is translated: the source in an error that comes in, for it quotes what the pod has sent; the
    /// destination in one that goes out.
    near: (Address, u16),
    /// The remote end.
    far: (Address, u16),
    /// Where the quoted IPv4 header starts.
    offset: usize,
    address_offset: usize,
    port_offset: usize,
    /// Where the quoted transport checksum lies; TCP's is beyond the 8 bytes that are sure to be there.
    checksum_offset: Option<usize>,
}

impl Quote {
    #[inline(always)]
    fn read<P: Packet + ?Sized>(packet: &P, header: &Header, direction: Direction) -> Option<Quote> {
        let kind = packet.byte(header.payload)?;
        if kind != UNREACHABLE && kind != TIME_EXCEEDED && kind != PARAMETER_PROBLEM {
            return None;
        }
        let offset = header.payload + 8;
        let later = packet.wire16(offset + 6)? & ipv4::FRAGMENT_OFFSET != 0;
        let transport = offset + 20;
        if packet.byte(offset)? != 0x45 || later || transport + QUOTED_BYTES > header.end {
            return None;
        }
        let protocol = packet.byte(offset + 9)?;
        let source = packet.wire32(offset + 12)?;
        let destination = packet.wire32(offset + 16)?;
        let (first, second) = (packet.wire16(transport)?, packet.wire16(transport + 2)?);
        let (near, far, address_offset) = match direction {
            Direction::In => ((source, first), (destination, second), offset + 12),
            Direction::Out => ((destination, second), (source, first), offset + 16),
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
            ipv4::ICMP if first == ECHO_REQUEST && direction == Direction::In => {
                Some(quote(packet.wire16(transport + 4)?, 0, transport + 4, Some(transport + 2)))
            }
            _ => None,
        }
    }

    /// The key of the flow whose inside end is `inside`.
    #[inline(always)]
    fn session_key(&self, inside: (Address, u16)) -> SessionKey {
        session_key(self.protocol, inside, self.far)
    }
}

/// Hands an error to the pod whose packet it quotes.
#[inline(always)]
pub(super) fn translate_error_in<P: PacketMut + ?Sized, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    header: &Header,
) -> Counter {
    let Some(quote) = Quote::read(packet, header, Direction::In) else { return Counter::IngressPass };
    let inside = owner_inside(tables.port(port_index(quote.protocol, quote.near.1)));
    // An error goes to where the packet came from.
    if inside.0 == 0 || quote.near.0 != header.destination {
        return Counter::IngressPass;
    }
    match live(tables, &quote.session_key(inside)) {
        Some(session) if (session.outside, session.outside_port) == quote.near => {}
        _ => return Counter::IngressPassHost,
    }
    match rewrite(packet, header, &quote, Direction::In, inside) {
        Some(()) => Counter::IngressError,
        None => Counter::IngressDropError,
    }
}

/// Lets a pod's error about a packet that was handed to it go out, to who sent that packet or, like a reply,
/// to nobody.
#[inline(always)]
pub(super) fn translate_error_out<P: PacketMut + ?Sized, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    header: &Header,
) -> Result<Counter, Counter> {
    let quote = Quote::read(packet, header, Direction::Out).ok_or(Counter::EgressDropProtocol)?;
    if quote.near.0 != header.source || quote.far.0 != header.destination {
        return Err(Counter::EgressDropIcmpError);
    }
    let session = live(tables, &quote.session_key(quote.near)).ok_or(Counter::EgressDropIcmpError)?;
    rewrite(packet, header, &quote, Direction::Out, (session.outside, session.outside_port))
        .ok_or(Counter::EgressDropError)?;
    Ok(Counter::EgressTranslatedError)
}

#[inline(always)]
fn live<T: Tables>(tables: &mut T, key: &SessionKey) -> Option<Session> {
    let now_ns = tables.now_ns();
    tables.session(key).copied().filter(|session| !expired(now_ns, key, session))
}

/// Gives the quoted packet's near end, and the error's own, another address and port.
///
/// The quoted header's own checksum balances its address, so the error's checksum sees only what changes
/// in the quoted transport.
#[inline(always)]
fn rewrite<P: PacketMut + ?Sized>(
    packet: &mut P,
    header: &Header,
    quote: &Quote,
    direction: Direction,
    to: (Address, u16),
) -> Option<()> {
    let (near, near_port) = quote.near;
    let mut outer = packet.wire16(header.payload + 2)?;
    let quoted = packet.wire16(quote.offset + 10)?;
    let mended = replace32(quoted, near, to.0);
    packet.set16(quote.offset + 10, mended)?;
    packet.set32(quote.address_offset, to.0)?;
    outer = replace32(replace16(outer, quoted, mended), near, to.0);
    if let Some(offset) = quote.checksum_offset {
        let old = packet.wire16(offset)?;
        if !(quote.protocol == ipv4::UDP && old == 0) {
            let mut new = replace16(old, near_port, to.1);
            if quote.protocol == ipv4::UDP {
                new = replace32(new, near, to.0);
            }
            packet.set16(offset, new)?;
            outer = replace16(outer, old, new);
        }
    }
    packet.set16(quote.port_offset, to.1)?;
    outer = replace16(outer, near_port, to.1);
    packet.set16(header.payload + 2, outer)?;
    set_address(packet, direction, near, to.0)
}
