//! Writes new addresses and ports into a packet and mends its checksums.

use super::{
    Family, Header,
    segment::{Direction, Segment},
};
use crate::{
    checksum::{Sum, replace16, replace32},
    ethernet,
    ipv4::{self, Address},
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
    /// Writes eight bytes in wire order.
    fn set64(&mut self, offset: usize, wire: u64) -> Option<()>;
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
    /// The same over IPv6, after the sum of an address's words changed by `address`. ICMPv6's checksum is mended
    /// so, too.
    fn mend_transport_by(&mut self, offset: usize, address: u16, port: (u16, u16), udp: bool) -> Option<()>;
    /// The sum of the packet's words has changed by this, and no checksum in it makes up for that.
    fn sum_changed(&mut self, change: u16);
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

    fn set64(&mut self, offset: usize, wire: u64) -> Option<()> {
        self.get_mut(offset..offset.checked_add(8)?)?.copy_from_slice(&wire.to_ne_bytes());
        Some(())
    }

    fn mend_transport(
        &mut self,
        offset: usize,
        address: (Address, Address),
        port: (u16, u16),
        udp: bool,
    ) -> Option<()> {
        mend(self, offset, |old| replace32(old, address.0, address.1), port, udp)
    }

    fn mend_transport_by(&mut self, offset: usize, address: u16, port: (u16, u16), udp: bool) -> Option<()> {
        mend(self, offset, |old| Sum::ZERO.add16(!old).add16(address).checksum(), port, udp)
    }

    fn sum_changed(&mut self, _: u16) {}
}

/// One after the other, as the kernel does it: zero has two forms, and tests compare bytes.
fn mend(
    packet: &mut [u8],
    offset: usize,
    address: impl Fn(u16) -> u16,
    port: (u16, u16),
    udp: bool,
) -> Option<()> {
    let old = packet.wire16(offset)?;
    if udp && old == 0 {
        return Some(());
    }
    let seen = |new: u16| if udp && new == 0 { 0xffff } else { new };
    let mut new = seen(address(old));
    if port.0 != port.1 {
        new = seen(replace16(new, port.0, port.1));
    }
    packet.set16(offset, new)
}

/// Gives the packet a new source (out) or destination (in), address and port.
#[inline(always)]
pub(super) fn translate<F: Family, P: PacketMut + ?Sized>(
    packet: &mut P,
    header: &Header<F>,
    segment: &Segment,
    direction: Direction,
    address: F::Address,
    port: u16,
) -> Option<()> {
    let from = match direction {
        Direction::Out => header.source,
        Direction::In => header.destination,
    };
    if header.protocol == F::ICMP && !F::ICMP_HAS_PSEUDO_HEADER {
        // Never left to the device.
        if port != segment.near_port {
            let checksum = packet.wire16(segment.checksum_offset)?;
            packet.set16(segment.checksum_offset, replace16(checksum, segment.near_port, port))?;
            packet.set16(segment.port_offset, port)?;
        }
    } else {
        F::mend_transport(
            packet,
            segment.checksum_offset,
            (from, address),
            (segment.near_port, port),
            header.protocol == ipv4::UDP,
        )?;
        if port != segment.near_port {
            packet.set16(segment.port_offset, port)?;
        }
    }
    set_address::<F, P>(packet, direction, from, address)
}

/// Gives a fragment that has no transport header a new source (out) or destination (in).
#[inline(always)]
pub(super) fn translate_later<F: Family, P: PacketMut + ?Sized>(
    packet: &mut P,
    direction: Direction,
    from: F::Address,
    to: F::Address,
) -> Option<()> {
    F::sum_changed(packet, from, to);
    set_address::<F, P>(packet, direction, from, to)
}

/// Gives the IP header a new source (out) or destination (in).
#[inline(always)]
pub(super) fn set_address<F: Family, P: PacketMut + ?Sized>(
    packet: &mut P,
    direction: Direction,
    from: F::Address,
    to: F::Address,
) -> Option<()> {
    let offset = match direction {
        Direction::Out => F::SOURCE,
        Direction::In => F::DESTINATION,
    };
    F::mend_header(packet, ethernet::HEADER_BYTES, (from, to), 0)?;
    F::set_address(packet, offset, to)
}
