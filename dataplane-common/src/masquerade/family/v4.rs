//! IPv4 as a [`Family`].

use super::{Family, Header, Ipv4, Part, Quoted};
use crate::{
    checksum::{replace16, replace32},
    ethernet,
    ipv4::{self, Address},
    masquerade::{Config, PacketMut},
    packet::Packet,
};

/// Offset of the checksum in the header.
const CHECKSUM: usize = ipv4::CHECKSUM - ethernet::HEADER_BYTES;
/// Version 4, no options.
const NO_OPTIONS: u8 = 0x45;

impl Family for Ipv4 {
    type Address = Address;
    type Pad = [u8; 0];

    const PAD: [u8; 0] = [];
    const NOBODY: Address = 0;
    const ETHER_TYPE: u16 = ethernet::IPV4;
    const ICMP: u8 = ipv4::ICMP;
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    const ICMP_HAS_PSEUDO_HEADER: bool = false;
    const PORT_TABLE: u32 = 0;
    const IS_PRIVATE: bool = true;
    const SOURCE: usize = ipv4::SOURCE;
    const DESTINATION: usize = ipv4::DESTINATION;
    const SOURCE_IN_HEADER: usize = ipv4::SOURCE - ethernet::HEADER_BYTES;
    const DESTINATION_IN_HEADER: usize = ipv4::DESTINATION - ethernet::HEADER_BYTES;

    #[inline(always)]
    fn is_on(config: &Config) -> bool {
        config.enabled != 0
    }

    #[inline(always)]
    fn is_node(config: &Config, address: Address) -> bool {
        config.is_node(address)
    }

    #[inline(always)]
    fn is_pod(config: &Config, address: Address) -> bool {
        config.is_pod(address)
    }

    #[inline(always)]
    fn is_near(_: Address) -> bool {
        false
    }

    #[inline(always)]
    fn is_discovery<P: Packet + ?Sized>(_: &P) -> bool {
        false
    }

    #[inline(always)]
    fn private(address: Address) -> Option<ipv4::Address> {
        Some(address)
    }

    #[inline(always)]
    fn of_private(inside: ipv4::Address) -> Option<Address> {
        Some(inside)
    }

    #[inline(always)]
    fn outside(config: &Config) -> Address {
        config.nodes[0]
    }

    #[inline(always)]
    fn address<P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<Address> {
        packet.wire32(offset)
    }

    #[inline(always)]
    fn set_address<P: PacketMut + ?Sized>(packet: &mut P, offset: usize, to: Address) -> Option<()> {
        packet.set32(offset, to)
    }

    #[inline(always)]
    fn linear_bytes<P: Packet + ?Sized>(packet: &P) -> usize {
        /// Up to the TCP checksum, behind an IPv4 header without options.
        const PLAIN: usize = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES_MIN + 18;
        /// The longest IPv4 header, an ICMP error, and what it quotes.
        const LONGEST: usize =
            ethernet::HEADER_BYTES + ipv4::HEADER_BYTES_MAX + 8 + ipv4::HEADER_BYTES_MAX + 8;
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

    #[inline(always)]
    fn header<P: Packet + ?Sized>(packet: &P) -> Option<Header<Ipv4>> {
        let header = ipv4::Header::read(packet)?;
        let part = match () {
            () if header.is_later_fragment() => Part::Later,
            () if header.is_first_fragment() => Part::First,
            () => Part::Whole,
        };
        Some(Header {
            source: header.source,
            destination: header.destination,
            identification: header.identification as u32,
            part,
            protocol: header.protocol,
            payload: header.payload,
            end: header.end,
        })
    }

    #[inline(always)]
    fn quoted<P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<Quoted<Ipv4>> {
        let later = packet.wire16(offset + 6)? & ipv4::FRAGMENT_OFFSET != 0;
        let header_bytes = ipv4::header_bytes(packet.byte(offset)?)?;
        if later {
            return None;
        }
        Some(Quoted {
            source: packet.wire32(offset + Self::SOURCE_IN_HEADER)?,
            destination: packet.wire32(offset + Self::DESTINATION_IN_HEADER)?,
            protocol: packet.byte(offset + 9)?,
            transport: offset + header_bytes,
        })
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        /// Destination unreachable (RFC 792), with the path's MTU in code 4 (RFC 1191).
        const UNREACHABLE: u8 = 3;
        /// Time exceeded (RFC 792).
        const TIME_EXCEEDED: u8 = 11;
        /// Parameter problem (RFC 792).
        const PARAMETER_PROBLEM: u8 = 12;
        kind == UNREACHABLE || kind == TIME_EXCEEDED || kind == PARAMETER_PROBLEM
    }

    #[inline(always)]
    fn replace(checksum: u16, from: Address, to: Address) -> u16 {
        replace32(checksum, from, to)
    }

    /// The header's own checksum balances its address, so `outer` sees both changes.
    #[inline(always)]
    fn mend_header<P: PacketMut + ?Sized>(
        packet: &mut P,
        offset: usize,
        (from, to): (Address, Address),
        outer: u16,
    ) -> Option<u16> {
        let old = packet.wire16(offset + CHECKSUM)?;
        let mended = replace32(old, from, to);
        packet.set16(offset + CHECKSUM, mended)?;
        Some(replace32(replace16(outer, old, mended), from, to))
    }

    #[inline(always)]
    fn identification(random: u32) -> u32 {
        random & 0xffff
    }

    #[inline(always)]
    fn set_identification<P: PacketMut + ?Sized>(packet: &mut P, from: u32, to: u32) -> Option<()> {
        let checksum = packet.wire16(ipv4::CHECKSUM)?;
        packet.set16(ipv4::CHECKSUM, replace16(checksum, from as u16, to as u16))?;
        packet.set16(ipv4::IDENTIFICATION, to as u16)
    }

    /// The header's checksum makes up for it.
    #[inline(always)]
    fn sum_changed<P: PacketMut + ?Sized>(_: &mut P, _: Address, _: Address) {}

    #[inline(always)]
    fn mend_transport<P: PacketMut + ?Sized>(
        packet: &mut P,
        offset: usize,
        address: (Address, Address),
        port: (u16, u16),
        udp: bool,
    ) -> Option<()> {
        packet.mend_transport(offset, address, port, udp)
    }
}
