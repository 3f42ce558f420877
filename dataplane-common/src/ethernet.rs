//! The Ethernet header (IEEE 802.3, as RFC 894 and RFC 2464 use it).
//!
//! ```text
//! | destination, 6 bytes | source, 6 bytes | EtherType, 2 bytes |
//! ```

use crate::ipv6::Address;

/// A MAC address.
pub type Mac = [u8; 6];

/// Offset of the destination address.
pub const DESTINATION: usize = 0;
/// Offset of the source address.
pub const SOURCE: usize = 6;
/// Offset of the EtherType.
pub const ETHER_TYPE: usize = 12;
/// Length of the header.
pub const HEADER_BYTES: usize = 14;

/// EtherType of IPv4 (RFC 894), in wire order.
pub const IPV4: u16 = 0x0800_u16.to_be();
/// EtherType of ARP (RFC 826), in wire order.
pub const ARP: u16 = 0x0806_u16.to_be();
/// EtherType of IPv6 (RFC 2464 section 3), in wire order.
pub const IPV6: u16 = 0x86dd_u16.to_be();

/// EtherType of a VLAN tag (IEEE 802.1Q), in wire order.
pub const VLAN: u16 = 0x8100_u16.to_be();
/// EtherType of a service VLAN tag (IEEE 802.1ad), in wire order.
pub const SERVICE_VLAN: u16 = 0x88a8_u16.to_be();
/// EtherType of the outer of two tags before there was a standard, in wire order.
pub const QINQ: u16 = 0x9100_u16.to_be();

/// Where frames for ff02::1 go (RFC 2464 section 7).
pub const ALL_NODES: Mac = [0x33, 0x33, 0, 0, 0, 1];

/// Where frames for an IPv6 multicast address go (RFC 2464 section 7).
pub const fn multicast(group: Address) -> Mac {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

/// Whether the address is a group's: the lowest bit of its first byte.
#[inline(always)]
pub fn is_group(mac: &Mac) -> bool {
    mac[0] & 1 != 0
}

/// Whether two addresses are equal, in two compares.
#[inline(always)]
pub fn same(a: &Mac, b: &Mac) -> bool {
    u32::from_ne_bytes([a[0], a[1], a[2], a[3]]) == u32::from_ne_bytes([b[0], b[1], b[2], b[3]])
        && u16::from_ne_bytes([a[4], a[5]]) == u16::from_ne_bytes([b[4], b[5]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_counts_in_a_comparison() {
        let mac = [2, 1, 2, 3, 4, 5];
        assert!(same(&mac, &mac));
        for i in 0..6 {
            let mut other = mac;
            other[i] ^= 0x80;
            assert!(!same(&mac, &other), "byte {i}");
        }
    }
}
