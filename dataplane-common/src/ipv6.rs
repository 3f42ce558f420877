//! The IPv6 header (RFC 8200 section 3) and what ICMPv6 (RFC 4443) adds.
//!
//! ```text
//! |Version| Traffic Class |           Flow Label                  |
//! |         Payload Length        |  Next Header  |   Hop Limit   |
//! |                        Source Address, 16 bytes               |
//! |                     Destination Address, 16 bytes             |
//! ```
//! Offsets are from the start of the Ethernet header.

use crate::ethernet;

/// Offset of the version, in the high half of the byte.
pub const VERSION: usize = ethernet::HEADER_BYTES;
/// Offset of the payload length.
pub const PAYLOAD_LENGTH: usize = ethernet::HEADER_BYTES + 4;
/// Offset of the next header.
pub const NEXT_HEADER: usize = ethernet::HEADER_BYTES + 6;
/// Offset of the hop limit.
pub const HOP_LIMIT: usize = ethernet::HEADER_BYTES + 7;
/// Offset of the source address.
pub const SOURCE: usize = ethernet::HEADER_BYTES + 8;
/// Offset of the destination address.
pub const DESTINATION: usize = ethernet::HEADER_BYTES + 24;
/// Offset of what follows the header.
pub const PAYLOAD: usize = ethernet::HEADER_BYTES + 40;

/// Next header: hop-by-hop options (RFC 8200 section 4.3).
pub const HOP_BY_HOP: u8 = 0;
/// Next header: UDP.
pub const UDP: u8 = 17;
/// Next header: routing header (RFC 8200 section 4.4).
pub const ROUTING: u8 = 43;
/// Next header: fragment header (RFC 8200 section 4.5).
pub const FRAGMENT: u8 = 44;
/// Next header: ICMPv6 (RFC 4443 section 2.1).
pub const ICMPV6: u8 = 58;
/// Next header: destination options (RFC 8200 section 4.6).
pub const DESTINATION_OPTIONS: u8 = 60;

/// The offset in a fragment header's third and fourth byte, in wire order.
pub const FRAGMENT_OFFSET: u16 = 0xfff8_u16.to_be();

/// Whether a next header is one of the extension headers above. One comparison and one bit test, for
/// every packet is asked.
#[inline(always)]
pub const fn is_extension(next_header: u8) -> bool {
    const EXTENSIONS: u64 = 1 << HOP_BY_HOP | 1 << ROUTING | 1 << FRAGMENT | 1 << DESTINATION_OPTIONS;
    next_header < u64::BITS as u8 && EXTENSIONS >> next_header & 1 != 0
}

/// The hop limit of neighbour discovery: such a packet was not forwarded (RFC 4861 section 3.1).
pub const HOP_LIMIT_LINK: u8 = 255;

/// An IPv6 address in wire order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub [u64; 2]);

impl Address {
    /// `::`
    pub const UNSPECIFIED: Address = Address::new([0; 16]);
    /// `ff02::1`
    pub const ALL_NODES: Address = Address::new([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    /// `ff02::2`
    pub const ALL_ROUTERS: Address = Address::new([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    /// `fe80::1`: the gateway of every pod.
    pub const GATEWAY: Address = Address::new([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

    /// From the bytes of the address.
    pub const fn new(o: [u8; 16]) -> Address {
        Address([
            u64::from_ne_bytes([o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]]),
            u64::from_ne_bytes([o[8], o[9], o[10], o[11], o[12], o[13], o[14], o[15]]),
        ])
    }

    /// The bytes of the address.
    #[inline(always)]
    pub const fn octets(self) -> [u8; 16] {
        let [a, b, c, d, e, f, g, h] = self.0[0].to_ne_bytes();
        let [i, j, k, l, m, n, o, p] = self.0[1].to_ne_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }

    /// Whether it is `::`.
    #[inline(always)]
    pub const fn is_unspecified(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0
    }

    /// Whether it is of `ff00::/8`.
    #[inline(always)]
    pub const fn is_multicast(self) -> bool {
        self.0[0].to_ne_bytes()[0] == 0xff
    }

    /// The group in which it is asked for (RFC 4291 section 2.7.1).
    pub const fn solicited_node(self) -> Address {
        let [.., d, e, f] = self.octets();
        Address::new([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, d, e, f])
    }

    /// Whether it is of `fe80::/10` (RFC 4291 section 2.5.6).
    #[inline(always)]
    pub const fn is_link_local(self) -> bool {
        let octets = self.0[0].to_ne_bytes();
        octets[0] == 0xfe && octets[1] & 0xc0 == 0x80
    }

    /// Whether it is of `ff02::1:ff00:0/104` (RFC 4291 section 2.7.1).
    #[inline(always)]
    pub const fn is_solicited_node(self) -> bool {
        const PREFIX: [u64; 2] = Address::new([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 0]).0;
        const MASK: u64 = u64::from_ne_bytes([0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0]);
        self.0[0] == PREFIX[0] && self.0[1] & MASK == PREFIX[1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;

    fn address(text: &str) -> Address {
        Address::new(text.parse::<Ipv6Addr>().unwrap().octets())
    }

    #[test]
    fn octets_are_those_given() {
        let a = address("fd12:3456:789a:1::ff00:8");
        assert_eq!(Ipv6Addr::from(a.octets()).to_string(), "fd12:3456:789a:1::ff00:8");
    }

    #[test]
    fn extension_headers_are_those_that_can_be_skipped() {
        let found: Vec<u8> = (0..=255).filter(|n| is_extension(*n)).collect();
        assert_eq!(found, [HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS]);
    }

    #[test]
    fn kinds_of_address_are_told_apart() {
        assert!(address("::").is_unspecified() && !address("::1").is_unspecified());
        assert!(address("ff02::1").is_multicast() && !address("fe80::1").is_multicast());
        assert!(address("fe80::1").is_link_local() && address("febf::1").is_link_local());
        assert!(!address("fec0::1").is_link_local() && !address("fd80::1").is_link_local());
        assert!(address("ff02::1:ff12:3456").is_solicited_node());
        assert!(!address("ff02::1:fe12:3456").is_solicited_node());
        assert!(!address("ff05::1:ff12:3456").is_solicited_node());
        assert!(!address("ff02::2:ff12:3456").is_solicited_node());
    }
}
