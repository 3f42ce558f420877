//! IPv6 as a [`Family`].
//!
//! The fragment header (RFC 8200 section 4.5) is understood. A packet with another extension header has no
//! transport header to translate here.

use super::{Family, Header, Ipv6, Part, Quoted};
use crate::{
    checksum::Sum,
    ethernet, ipv4,
    ipv6::{self, Address},
    masquerade::{Config, PacketMut},
    ndp,
    packet::Packet,
};

/// Length of the IPv6 header.
const HEADER_BYTES: usize = 40;
/// Length of the fragment header.
const FRAGMENT_BYTES: usize = 8;
/// Offset of the next header in the IPv6 header.
const NEXT_HEADER: usize = ipv6::NEXT_HEADER - ethernet::HEADER_BYTES;
/// The bits of the fragment offset, in wire order.
const FRAGMENT_OFFSET: u16 = 0xfff8_u16.to_be();
/// More fragments follow, in wire order.
const MORE_FRAGMENTS: u16 = 1_u16.to_be();

/// The change of a sum of 16-bit words when `from` becomes `to`.
#[inline(always)]
fn change(from: Address, to: Address) -> u16 {
    Sum::ZERO.add64(!from.0[0]).add64(!from.0[1]).add64(to.0[0]).add64(to.0[1]).fold()
}

impl Family for Ipv6 {
    type Address = Address;
    type Pad = [u8; 4];

    const PAD: [u8; 4] = [0; 4];
    const NOBODY: Address = Address::UNSPECIFIED;
    const ETHER_TYPE: u16 = ethernet::IPV6;
    const ICMP: u8 = ipv6::ICMPV6;
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    const ICMP_HAS_PSEUDO_HEADER: bool = true;
    const PORT_TABLE: u32 = 3;
    const IS_PRIVATE: bool = false;
    const SOURCE: usize = ipv6::SOURCE;
    const DESTINATION: usize = ipv6::DESTINATION;
    const SOURCE_IN_HEADER: usize = ipv6::SOURCE - ethernet::HEADER_BYTES;
    const DESTINATION_IN_HEADER: usize = ipv6::DESTINATION - ethernet::HEADER_BYTES;

    #[inline(always)]
    fn is_on(config: &Config) -> bool {
        config.exit != 0
    }

    #[inline(always)]
    fn is_node(config: &Config, address: Address) -> bool {
        config.node6.0[1] == address.0[1] && config.node6.0[0] == address.0[0] && !address.is_unspecified()
    }

    #[inline(always)]
    fn is_pod(config: &Config, address: Address) -> bool {
        address.0[0] == config.pods6
    }

    /// Unique local (RFC 4193), link-local and multicast addresses. Neighbour discovery goes to nowhere else, or
    /// to hosts on the link.
    #[inline(always)]
    fn is_near(address: Address) -> bool {
        let [a, b, ..] = address.0[0].to_ne_bytes();
        a & 0xfe == 0xfc || a == 0xff || a == 0xfe && b & 0xc0 == 0x80
    }

    #[inline(always)]
    fn is_discovery<P: Packet + ?Sized>(packet: &P) -> bool {
        /// Router solicitation (RFC 4861 section 4.1), the first of the five.
        const FIRST: u8 = 133;
        packet.byte(ipv6::NEXT_HEADER) == Some(ipv6::ICMPV6)
            && packet.byte(ipv6::HOP_LIMIT) == Some(ipv6::HOP_LIMIT_LINK)
            && packet.byte(ipv6::PAYLOAD).is_some_and(|kind| (FIRST..=ndp::REDIRECT).contains(&kind))
    }

    #[inline(always)]
    fn private(_: Address) -> Option<ipv4::Address> {
        None
    }

    #[inline(always)]
    fn of_private(_: ipv4::Address) -> Option<Address> {
        None
    }

    #[inline(always)]
    fn outside(config: &Config) -> Address {
        config.node6
    }

    #[inline(always)]
    fn address<P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<Address> {
        packet.address(offset)
    }

    #[inline(always)]
    fn set_address<P: PacketMut + ?Sized>(packet: &mut P, offset: usize, to: Address) -> Option<()> {
        packet.set64(offset, to.0[0])?;
        packet.set64(offset + 8, to.0[1])
    }

    #[inline(always)]
    fn linear_bytes<P: Packet + ?Sized>(packet: &P) -> usize {
        /// Up to the TCP checksum.
        const PLAIN: usize = ipv6::PAYLOAD + 18;
        /// A fragment header, an ICMP error, and what it quotes: the same.
        const LONGEST: usize = ipv6::PAYLOAD + FRAGMENT_BYTES + 8 + HEADER_BYTES + FRAGMENT_BYTES + 8;
        match packet.byte(ipv6::NEXT_HEADER) {
            Some(ipv4::TCP | ipv4::UDP) => PLAIN,
            _ => LONGEST,
        }
    }

    #[inline(always)]
    fn header<P: Packet + ?Sized>(packet: &P) -> Option<Header<Ipv6>> {
        if packet.byte(ipv6::VERSION)? >> 4 != 6 {
            return None;
        }
        let end = ipv6::PAYLOAD + u16::from_be(packet.wire16(ipv6::PAYLOAD_LENGTH)?) as usize;
        if end > packet.length() {
            return None;
        }
        let whole = Header {
            source: packet.address(ipv6::SOURCE)?,
            destination: packet.address(ipv6::DESTINATION)?,
            identification: 0,
            part: Part::Whole,
            protocol: packet.byte(ipv6::NEXT_HEADER)?,
            payload: ipv6::PAYLOAD,
            end,
        };
        if whole.protocol == ipv6::FRAGMENT { fragment(packet, whole) } else { Some(whole) }
    }

    #[inline(always)]
    fn quoted<P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<Quoted<Ipv6>> {
        if packet.byte(offset)? >> 4 != 6 {
            return None;
        }
        let mut protocol = packet.byte(offset + NEXT_HEADER)?;
        let mut transport = offset + HEADER_BYTES;
        if protocol == ipv6::FRAGMENT {
            if packet.wire16(transport + 2)? & FRAGMENT_OFFSET != 0 {
                return None;
            }
            protocol = packet.byte(transport)?;
            transport += FRAGMENT_BYTES;
        }
        Some(Quoted {
            source: packet.address(offset + Self::SOURCE_IN_HEADER)?,
            destination: packet.address(offset + Self::DESTINATION_IN_HEADER)?,
            protocol,
            transport,
        })
    }

    /// Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443 section 3).
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        kind != 0 && kind <= 4
    }

    #[inline(always)]
    fn replace(checksum: u16, from: Address, to: Address) -> u16 {
        Sum::ZERO.add16(!checksum).add16(change(from, to)).checksum()
    }

    /// There is no checksum in the header.
    #[inline(always)]
    fn mend_header<P: PacketMut + ?Sized>(
        _: &mut P,
        _: usize,
        (from, to): (Address, Address),
        outer: u16,
    ) -> Option<u16> {
        Some(Self::replace(outer, from, to))
    }

    #[inline(always)]
    fn identification(random: u32) -> u32 {
        random
    }

    #[inline(always)]
    fn set_identification<P: PacketMut + ?Sized>(_: &mut P, _: u32, _: u32) -> Option<()> {
        Some(())
    }

    #[inline(always)]
    fn sum_changed<P: PacketMut + ?Sized>(packet: &mut P, from: Address, to: Address) {
        packet.sum_changed(change(from, to));
    }

    #[inline(always)]
    fn mend_transport<P: PacketMut + ?Sized>(
        packet: &mut P,
        offset: usize,
        (from, to): (Address, Address),
        port: (u16, u16),
        udp: bool,
    ) -> Option<()> {
        packet.mend_transport_by(offset, change(from, to), port, udp)
    }
}

/// The header with what its fragment header says.
#[inline(always)]
fn fragment<P: Packet + ?Sized>(packet: &P, header: Header<Ipv6>) -> Option<Header<Ipv6>> {
    let payload = ipv6::PAYLOAD + FRAGMENT_BYTES;
    if payload > header.end {
        return None;
    }
    let field = packet.wire16(ipv6::PAYLOAD + 2)?;
    let part = match () {
        () if field & FRAGMENT_OFFSET != 0 => Part::Later,
        () if field & MORE_FRAGMENTS != 0 => Part::First,
        // An atomic fragment (RFC 6946).
        () => Part::Whole,
    };
    let identification = packet.wire32(ipv6::PAYLOAD + 4)?;
    Some(Header { identification, part, protocol: packet.byte(ipv6::PAYLOAD)?, payload, ..header })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;

    fn address(text: &str) -> Address {
        Address::new(text.parse::<Ipv6Addr>().unwrap().octets())
    }

    #[test]
    fn only_addresses_of_the_internet_are_far() {
        for near in ["fc00::1", "fdff::1", "fe80::1", "febf::1", "ff02::1", "ff0e::1"] {
            assert!(Ipv6::is_near(address(near)), "{near}");
        }
        for far in ["2001:db8::1", "64:ff9b::c000:201", "fec0::1", "2606::1", "fbff::1"] {
            assert!(!Ipv6::is_near(address(far)), "{far}");
        }
    }

    #[test]
    fn a_replaced_address_leaves_the_checksum_that_is_computed_anew() {
        let (from, to) = (address("fd12:3456:789a:1::ff00:8"), address("2001:db8::11"));
        let sum = |a: Address| crate::checksum::sum_bytes(&a.octets()).add16(0x1234).checksum();
        assert_eq!(Ipv6::replace(sum(from), from, to), sum(to));
        assert_eq!(Ipv6::replace(sum(to), to, from), sum(from));
    }
}
