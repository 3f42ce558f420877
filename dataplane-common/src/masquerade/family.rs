//! What differs between the two families: addresses, headers, what a checksum covers. Everything else of the
//! masquerade is the same for IPv4 and IPv6.
//!
//! In both families the inside end of a flow is named by the pod's private IPv4 address: it is the pod's
//! number on its node, and whose block a port is of goes by it.

mod v4;
mod v6;

use core::{fmt::Debug, hash::Hash};

use super::{Config, translate::PacketMut};
use crate::{ipv4, packet::Packet};

/// IPv4: pods leave with one of the node's addresses (NAPT44).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ipv4;

/// IPv6: pods with addresses that are no good on the internet leave with the node's (NAPT66).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ipv6;

/// A family of addresses, as the masquerade sees it.
pub trait Family: Copy + Debug + Ord + Hash + 'static {
    /// An address, in wire order.
    type Address: Copy + Debug + Ord + Hash;
    /// What fills up a key or a value that holds one address.
    type Pad: Copy + Debug + Ord + Hash;

    /// Zeros.
    const PAD: Self::Pad;
    /// The address of nobody: zeros.
    const NOBODY: Self::Address;
    /// Its EtherType, in wire order.
    const ETHER_TYPE: u16;
    /// The protocol number of its ICMP.
    const ICMP: u8;
    /// The type of an echo request.
    const ECHO_REQUEST: u8;
    /// The type of an echo reply.
    const ECHO_REPLY: u8;
    /// Whether ICMP's checksum covers addresses, too (RFC 4443 section 2.3).
    const ICMP_HAS_PSEUDO_HEADER: bool;
    /// Which of the tables of ports in `NAT_PORTS` is its first.
    const PORT_TABLE: u32;
    /// Whether nobody outside of its node knows a pod's address.
    const IS_PRIVATE: bool;
    /// Offset of the source address in the frame.
    const SOURCE: usize;
    /// Offset of the destination address in the frame.
    const DESTINATION: usize;
    /// Offset of the source address in the IP header.
    const SOURCE_IN_HEADER: usize;
    /// Offset of the destination address in the IP header.
    const DESTINATION_IN_HEADER: usize;

    /// Whether packets of this family are translated.
    fn is_on(config: &Config) -> bool;
    /// Whether packets of pods leave with `address`.
    fn is_node(config: &Config, address: Self::Address) -> bool;
    /// Whether `address` is of the range that is translated.
    fn is_pod(config: &Config, address: Self::Address) -> bool;
    /// Whether packets to `address` are never translated, whoever sends them.
    fn is_near(address: Self::Address) -> bool;
    /// Whether it is neighbour discovery, which never leaves its link: what the node says of its pods' addresses has
    /// them for a source.
    fn is_discovery<P: Packet + ?Sized>(packet: &P) -> bool;
    /// The private address of the pod with this address, if that needs no table.
    fn private(address: Self::Address) -> Option<ipv4::Address>;
    /// The address of the pod with this private address, if that needs no table.
    fn of_private(inside: ipv4::Address) -> Option<Self::Address>;
    /// What packets leave with, unless the tables know better; [`Family::NOBODY`]: they do not leave.
    fn outside(config: &Config) -> Self::Address;

    /// The address at `offset`.
    fn address<P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<Self::Address>;
    /// Writes the address at `offset`.
    fn set_address<P: PacketMut + ?Sized>(packet: &mut P, offset: usize, to: Self::Address) -> Option<()>;
    /// How much of the packet must lie in one piece for the logic to see all that it wants to see.
    fn linear_bytes<P: Packet + ?Sized>(packet: &P) -> usize;
    /// The packet's header.
    fn header<P: Packet + ?Sized>(packet: &P) -> Option<Header<Self>>;
    /// The header at `offset` that an ICMP error quotes; none of a later fragment.
    fn quoted<P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<Quoted<Self>>;
    /// Whether an ICMP message of this type quotes a packet.
    fn is_error(kind: u8) -> bool;

    /// The checksum after an address that it covers changed.
    fn replace(checksum: u16, from: Self::Address, to: Self::Address) -> u16;
    /// Mends the checksum of the IP header at `offset`, if it has one, after an address of it changed. `outer`, a
    /// checksum that covers the whole header, comes back mended, too.
    fn mend_header<P: PacketMut + ?Sized>(
        packet: &mut P,
        offset: usize,
        change: (Self::Address, Self::Address),
        outer: u16,
    ) -> Option<u16>;
    /// An identification out of a random number, in wire order.
    fn identification(random: u32) -> u32;
    /// Gives a fragment another identification. IPv6's has 32 random bits, and stays.
    fn set_identification<P: PacketMut + ?Sized>(packet: &mut P, from: u32, to: u32) -> Option<()>;
    /// Says that an address of a packet without a transport header changes, if nothing in it makes up for that.
    fn sum_changed<P: PacketMut + ?Sized>(packet: &mut P, from: Self::Address, to: Self::Address);
    /// Mends a transport checksum that covers an address and a port: [`PacketMut::mend_transport`].
    fn mend_transport<P: PacketMut + ?Sized>(
        packet: &mut P,
        offset: usize,
        address: (Self::Address, Self::Address),
        port: (u16, u16),
        udp: bool,
    ) -> Option<()>;
}

/// What part of a datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first fragment, which has the ports.
    First,
    /// Another fragment.
    Later,
}

/// What the masquerade needs to know of an IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header<F: Family> {
    /// Source address.
    pub source: F::Address,
    /// Destination address.
    pub destination: F::Address,
    /// What fragments of one datagram have in common, in wire order; 0 of an IPv6 datagram in one piece.
    pub identification: u32,
    /// What part of the datagram it is.
    pub part: Part,
    /// The protocol of what follows. Of IPv6 an extension header, if there is another than the fragment
    /// header.
    pub protocol: u8,
    /// Offset of what follows, from the start of the Ethernet header.
    pub payload: usize,
    /// Where the packet ends by its own account; padding may follow.
    pub end: usize,
}

/// What the masquerade needs to know of a quoted IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quoted<F: Family> {
    /// Source address.
    pub source: F::Address,
    /// Destination address.
    pub destination: F::Address,
    /// The protocol of what follows.
    pub protocol: u8,
    /// Offset of what follows, from the start of the Ethernet header.
    pub transport: usize,
}

/// The index in `NAT_PORTS` of a port in wire order.
#[inline(always)]
pub fn port_index<F: Family>(protocol: u8, port: u16) -> u32 {
    let table = match protocol {
        ipv4::TCP => 0,
        ipv4::UDP => 1,
        _ => 2,
    };
    let index = (F::PORT_TABLE + table) << 16 | u16::from_be(port) as u32;
    debug_assert!(index < super::PORTS_MAX);
    index
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::masquerade::PORTS_MAX;

    #[test]
    fn each_protocol_of_each_family_has_its_own_ports() {
        let port = 65_535_u16.to_be();
        assert_eq!(port_index::<Ipv4>(ipv4::TCP, port), 65_535);
        assert_eq!(port_index::<Ipv4>(ipv4::UDP, 0), 65_536);
        assert_eq!(port_index::<Ipv4>(Ipv4::ICMP, port), 3 * 65_536 - 1);
        assert_eq!(port_index::<Ipv6>(ipv4::TCP, 0), 3 * 65_536);
        assert_eq!(port_index::<Ipv6>(Ipv6::ICMP, port), PORTS_MAX - 1);
    }
}
