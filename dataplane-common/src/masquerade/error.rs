//! ICMP errors about translated flows (RFC 5508 section 4.2): the packet that an error quotes is given
//! back its inside address and port, so that path MTU discovery and traceroute work in pods.
//!
//! ```text
//! | IPv4 | ICMP type, code, checksum, 4 bytes | quoted IPv4 | 8 bytes or more of quoted transport |
//! ```
//! A quote with IPv4 options is left to the host.

use super::{
    Config, SessionKey, Tables, owner_inside, port_index,
    segment::Direction,
    session::expired,
    translate::{PacketMut, set_address},
};
use crate::{
    checksum::{replace16, replace32},
    counter::Counter,
    ipv4::{self, Header},
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

/// What an error quotes of a packet that was translated on its way out.
struct Quote {
    protocol: u8,
    remote: ipv4::Address,
    /// The outside port, wire order.
    near_port: u16,
    far_port: u16,
    /// Where the quoted IPv4 header starts.
    offset: usize,
    port_offset: usize,
    /// Where the quoted transport checksum lies; TCP's is beyond the 8 bytes that are sure to be there.
    checksum_offset: Option<usize>,
}

impl Quote {
    #[inline(always)]
    fn read<P: Packet + ?Sized>(packet: &P, header: &Header, config: &Config) -> Option<Quote> {
        let kind = packet.byte(header.payload)?;
        if kind != UNREACHABLE && kind != TIME_EXCEEDED && kind != PARAMETER_PROBLEM {
            return None;
        }
        let offset = header.payload + 8;
        let later = packet.wire16(offset + 6)? & ipv4::FRAGMENT_OFFSET != 0;
        if packet.byte(offset)? != 0x45 || later || packet.wire32(offset + 12)? != config.node {
            return None;
        }
        let protocol = packet.byte(offset + 9)?;
        let remote = packet.wire32(offset + 16)?;
        let transport = offset + 20;
        if transport + QUOTED_BYTES > header.end {
            return None;
        }
        let quote = |near_port, far_port, port_offset, checksum_offset| Quote {
            protocol,
            remote,
            near_port,
            far_port,
            offset,
            port_offset,
            checksum_offset,
        };
        let (first, second) = (packet.wire16(transport)?, packet.wire16(transport + 2)?);
        match protocol {
            ipv4::TCP => Some(quote(first, second, transport, None)),
            ipv4::UDP => Some(quote(first, second, transport, Some(transport + 6))),
            ipv4::ICMP if first == ECHO_REQUEST => {
                Some(quote(packet.wire16(transport + 4)?, 0, transport + 4, Some(transport + 2)))
            }
            _ => None,
        }
    }
}

/// Hands an error to the pod whose packet it quotes. An error does not keep a flow alive.
#[inline(always)]
pub(super) fn translate_error<P: PacketMut + ?Sized, T: Tables>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
    header: &Header,
) -> Counter {
    let Some(quote) = Quote::read(packet, header, config) else { return Counter::IngressPass };
    let (inside, inside_port) = owner_inside(tables.port(port_index(quote.protocol, quote.near_port)));
    if inside == 0 {
        return Counter::IngressPass;
    }
    let key = SessionKey {
        inside,
        remote: quote.remote,
        inside_port,
        remote_port: quote.far_port,
        protocol: quote.protocol,
        zero: [0; 3],
    };
    let now_ns = tables.now_ns();
    match tables.session(&key) {
        Some(session) if session.outside_port == quote.near_port && !expired(now_ns, &key, session) => {}
        _ => return Counter::IngressPassNoSession,
    }
    match restore(packet, header, &quote, config.node, inside, inside_port) {
        Some(()) => Counter::IngressError,
        None => Counter::IngressDropError,
    }
}

/// The quoted header's own checksum balances its address, so the error's checksum sees only what changes
/// in the quoted transport.
#[inline(always)]
fn restore<P: PacketMut + ?Sized>(
    packet: &mut P,
    header: &Header,
    quote: &Quote,
    node: ipv4::Address,
    inside: ipv4::Address,
    inside_port: u16,
) -> Option<()> {
    let mut outer = packet.wire16(header.payload + 2)?;
    let quoted = packet.wire16(quote.offset + 10)?;
    let mended = replace32(quoted, node, inside);
    packet.set16(quote.offset + 10, mended)?;
    packet.set32(quote.offset + 12, inside)?;
    outer = replace32(replace16(outer, quoted, mended), node, inside);
    if let Some(offset) = quote.checksum_offset {
        let old = packet.wire16(offset)?;
        if !(quote.protocol == ipv4::UDP && old == 0) {
            let mut new = replace16(old, quote.near_port, inside_port);
            if quote.protocol == ipv4::UDP {
                new = replace32(new, node, inside);
            }
            packet.set16(offset, new)?;
            outer = replace16(outer, old, new);
        }
    }
    packet.set16(quote.port_offset, inside_port)?;
    outer = replace16(outer, quote.near_port, inside_port);
    packet.set16(header.payload + 2, outer)?;
    set_address(packet, Direction::In, node, inside)
}
