//! Writes new addresses and ports into a packet and mends its checksums.

use super::segment::{Direction, Segment};
use crate::{
    checksum::{replace16, replace32},
    ipv4::{self, Address, Header},
    packet::Packet,
};

/// A packet that can be changed.
///
/// A write returns `None` when the packet does not reach so far.
pub trait PacketMut: Packet {
    /// Writes two bytes in wire order.
    fn set16(&mut self, offset: usize, wire: u16) -> Option<()>;
    /// Writes four bytes in wire order.
    fn set32(&mut self, offset: usize, wire: u32) -> Option<()>;
    /// Mends the TCP or UDP checksum at `offset` after a change of an address of the pseudo header and of a
    /// port. A checksum that is left to the device to finish covers the pseudo header only. `udp`: zero
    /// means none, stays, and is never the result (RFC 768).
    fn mend_transport(
        &mut self,
        offset: usize,
        address: (Address, Address),
        port: (u16, u16),
        udp: bool,
    ) -> Option<()>;
}

impl PacketMut for [u8] {
    fn set16(&mut self, offset: usize, wire: u16) -> Option<()> {
        self.get_mut(offset..offset.checked_add(2)?)?.copy_from_slice(&wire.to_ne_bytes());
        Some(())
    }

    fn set32(&mut self, offset: usize, wire: u32) -> Option<()> {
        self.get_mut(offset..offset.checked_add(4)?)?.copy_from_slice(&wire.to_ne_bytes());
        Some(())
    }

    fn mend_transport(
        &mut self,
        offset: usize,
        address: (Address, Address),
        port: (u16, u16),
        udp: bool,
    ) -> Option<()> {
        let old = self.wire16(offset)?;
        if udp && old == 0 {
            return Some(());
        }
        // One after the other, as the kernel does it: zero has two forms, and tests compare bytes.
        let mut new = replace32(old, address.0, address.1);
        if udp && new == 0 {
            new = 0xffff;
        }
        if port.0 != port.1 {
            new = replace16(new, port.0, port.1);
        }
        if udp && new == 0 {
            new = 0xffff;
        }
        self.set16(offset, new)
    }
}

/// Gives the packet a new source (out) or destination (in), address and port.
#[inline(always)]
pub(super) fn translate<P: PacketMut + ?Sized>(
    packet: &mut P,
    header: &Header,
    segment: &Segment,
    direction: Direction,
    address: Address,
    port: u16,
) -> Option<()> {
    let from = match direction {
        Direction::Out => header.source,
        Direction::In => header.destination,
    };
    if header.protocol == ipv4::ICMP {
        // No pseudo header, and never left to the device.
        if port != segment.near_port {
            let checksum = packet.wire16(segment.checksum_offset)?;
            packet.set16(segment.checksum_offset, replace16(checksum, segment.near_port, port))?;
            packet.set16(segment.port_offset, port)?;
        }
    } else {
        packet.mend_transport(
            segment.checksum_offset,
            (from, address),
            (segment.near_port, port),
            header.protocol == ipv4::UDP,
        )?;
        if port != segment.near_port {
            packet.set16(segment.port_offset, port)?;
        }
    }
    set_address(packet, direction, from, address)
}

/// Gives the IPv4 header a new source (out) or destination (in).
#[inline(always)]
pub(super) fn set_address<P: PacketMut + ?Sized>(
    packet: &mut P,
    direction: Direction,
    from: Address,
    to: Address,
) -> Option<()> {
    let offset = match direction {
        Direction::Out => ipv4::SOURCE,
        Direction::In => ipv4::DESTINATION,
    };
    let checksum = packet.wire16(ipv4::CHECKSUM)?;
    packet.set16(ipv4::CHECKSUM, replace32(checksum, from, to))?;
    packet.set32(offset, to)
}
