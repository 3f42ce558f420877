//! The IPv4 header (RFC 791 section 3.1).
//!
//! ```text
//! |Version|  IHL  |Type of Service|          Total Length         |
//! |         Identification        |Flags|      Fragment Offset    |
//! |  Time to Live |    Protocol   |         Header Checksum       |
//! |                       Source Address                          |
//! |                    Destination Address                        |
//! ```
//! Offsets are from the start of the Ethernet header.

use crate::{ethernet, packet::Packet};

/// Offset of the version and the header's length.
pub const VERSION_IHL: usize = ethernet::HEADER_BYTES;
/// Offset of the total length.
pub const TOTAL_LENGTH: usize = ethernet::HEADER_BYTES + 2;
/// Offset of the identification.
pub const IDENTIFICATION: usize = ethernet::HEADER_BYTES + 4;
/// Offset of flags and fragment offset.
pub const FRAGMENT: usize = ethernet::HEADER_BYTES + 6;
/// Offset of the protocol.
pub const PROTOCOL: usize = ethernet::HEADER_BYTES + 9;
/// Offset of the header checksum.
pub const CHECKSUM: usize = ethernet::HEADER_BYTES + 10;
/// Offset of the source address.
pub const SOURCE: usize = ethernet::HEADER_BYTES + 12;
/// Offset of the destination address.
pub const DESTINATION: usize = ethernet::HEADER_BYTES + 16;
/// Length of the header without options.
pub const HEADER_BYTES_MIN: usize = 20;
/// Length of the longest header.
pub const HEADER_BYTES_MAX: usize = 60;

/// Protocol: ICMP (RFC 792).
pub const ICMP: u8 = 1;
/// Protocol: TCP (RFC 9293).
pub const TCP: u8 = 6;
/// Protocol: UDP (RFC 768).
pub const UDP: u8 = 17;

/// More fragments follow, in wire order.
pub const MORE_FRAGMENTS: u16 = 0x2000_u16.to_be();
/// The bits of the fragment offset, in wire order.
pub const FRAGMENT_OFFSET: u16 = 0x1fff_u16.to_be();

/// An IPv4 address in wire order.
pub type Address = u32;

/// The address of four octets.
#[inline(always)]
pub const fn address(octets: [u8; 4]) -> Address {
    u32::from_ne_bytes(octets)
}

/// Whether it is of `224.0.0.0/4` or is `255.255.255.255`.
#[inline(always)]
pub const fn is_group(address: Address) -> bool {
    address.to_ne_bytes()[0] >= 224 && (address.to_ne_bytes()[0] < 240 || address == u32::MAX)
}

/// What a program needs to know of an IPv4 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Source address, wire order.
    pub source: Address,
    /// Destination address, wire order.
    pub destination: Address,
    /// Identification, wire order.
    pub identification: u16,
    /// Flags and fragment offset, wire order.
    pub fragment: u16,
    /// The protocol of what follows.
    pub protocol: u8,
    /// Offset of what follows, from the start of the Ethernet header: 34 to 74.
    pub payload: usize,
    /// Where the packet ends by its own account; padding may follow.
    pub end: usize,
}

impl Header {
    /// Reads the header; `None` if it is cut short, is not of version 4 or contradicts itself.
    #[inline(always)]
    pub fn read<P: Packet + ?Sized>(packet: &P) -> Option<Header> {
        let header_bytes = header_bytes(packet.byte(VERSION_IHL)?)?;
        let total = u16::from_be(packet.wire16(TOTAL_LENGTH)?) as usize;
        if total < header_bytes || ethernet::HEADER_BYTES + total > packet.length() {
            return None;
        }
        Some(Header {
            source: packet.wire32(SOURCE)?,
            destination: packet.wire32(DESTINATION)?,
            identification: packet.wire16(IDENTIFICATION)?,
            fragment: packet.wire16(FRAGMENT)?,
            protocol: packet.byte(PROTOCOL)?,
            payload: ethernet::HEADER_BYTES + header_bytes,
            end: ethernet::HEADER_BYTES + total,
        })
    }

    /// Whether the packet is a fragment other than the first, which has no ports.
    #[inline(always)]
    pub fn is_later_fragment(&self) -> bool {
        self.fragment & FRAGMENT_OFFSET != 0
    }

    /// Whether the packet is the first of several fragments.
    #[inline(always)]
    pub fn is_first_fragment(&self) -> bool {
        self.fragment & (FRAGMENT_OFFSET | MORE_FRAGMENTS) == MORE_FRAGMENTS
    }
}

/// The length of the header that begins with this byte.
#[inline(always)]
pub fn header_bytes(version_ihl: u8) -> Option<usize> {
    let bytes = ((version_ihl & 0x0f) as usize) << 2;
    (version_ihl >> 4 == 4 && bytes >= HEADER_BYTES_MIN).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Vec<u8> {
        let mut f = vec![0; ethernet::HEADER_BYTES];
        f.extend([0x45, 0, 0, 28, 0xab, 0xcd, 0x20, 0, 64, UDP, 0, 0, 10, 0, 0, 1, 192, 0, 2, 9]);
        f.extend([0; 8]);
        f
    }

    #[test]
    fn fields_are_where_the_rfc_draws_them() {
        let h = Header::read(&frame()[..]).unwrap();
        assert_eq!(h.source, address([10, 0, 0, 1]));
        assert_eq!(h.destination, address([192, 0, 2, 9]));
        assert_eq!(u16::from_be(h.identification), 0xabcd);
        assert_eq!((h.protocol, h.payload, h.end), (UDP, 34, 42));
        assert!(h.is_first_fragment() && !h.is_later_fragment());
    }

    #[test]
    fn a_header_that_contradicts_itself_is_none() {
        for (offset, value) in
            [(VERSION_IHL, 0x65), (VERSION_IHL, 0x44), (TOTAL_LENGTH + 1, 19), (TOTAL_LENGTH, 1)]
        {
            let mut f = frame();
            f[offset] = value;
            assert_eq!(Header::read(&f[..]), None, "{value:#x} at {offset}");
        }
    }

    #[test]
    fn every_truncation_is_none() {
        let f = frame();
        for n in 0..f.len() {
            assert_eq!(Header::read(&f[..n]), None, "{n} bytes");
        }
    }

    #[test]
    fn groups_are_multicast_and_the_limited_broadcast() {
        assert!(is_group(address([224, 0, 0, 251])) && is_group(address([239, 255, 255, 255])));
        assert!(is_group(address([255, 255, 255, 255])));
        assert!(!is_group(address([240, 0, 0, 1])) && !is_group(address([223, 255, 255, 255])));
    }
}
