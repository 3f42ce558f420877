//! The transport header of a packet that may be translated.

use super::{Family, Header, SessionKey, TcpFlags};
use crate::{
    ipv4::{self, Address},
    packet::Packet,
};

/// The TCP header without options (RFC 9293 section 3.1).
const TCP_BYTES: usize = 20;
/// The UDP header (RFC 768), and that of an ICMP echo.
const UDP_BYTES: usize = 8;

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Out,
    In,
}

/// Why a packet has no [`Segment`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoSegment {
    /// The header is cut short.
    Short,
    /// Neither TCP, UDP nor an echo of this direction.
    Protocol,
}

/// TCP, UDP or an ICMP echo, with what translation needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// The port that is translated, wire order: the source's on the way out, the destination's on the way in.
    pub(super) near_port: u16,
    /// The remote's port, wire order; 0 for ICMP.
    pub(super) far_port: u16,
    /// Where `near_port` lies.
    pub(super) port_offset: usize,
    /// Where the transport checksum lies.
    pub(super) checksum_offset: usize,
    /// TCP's flags.
    pub(super) flags: TcpFlags,
}

impl Segment {
    #[inline(always)]
    pub(super) fn read<F: Family, P: Packet + ?Sized>(
        packet: &P,
        header: &Header<F>,
        direction: Direction,
    ) -> Result<Segment, NoSegment> {
        let header_bytes = if header.protocol == ipv4::TCP { TCP_BYTES } else { UDP_BYTES };
        let is_known = matches!(header.protocol, ipv4::TCP | ipv4::UDP) || header.protocol == F::ICMP;
        if is_known && header.payload + header_bytes > header.end {
            return Err(NoSegment::Short);
        }
        match header.protocol {
            ipv4::TCP => Self::with_ports(packet, header.payload, direction, 16, true),
            ipv4::UDP => Self::with_ports(packet, header.payload, direction, 6, false),
            protocol if protocol == F::ICMP => Self::echo::<F, P>(packet, header.payload, direction),
            _ => Err(NoSegment::Protocol),
        }
    }

    #[inline(always)]
    fn with_ports<P: Packet + ?Sized>(
        packet: &P,
        payload: usize,
        direction: Direction,
        checksum: usize,
        tcp: bool,
    ) -> Result<Segment, NoSegment> {
        let short = NoSegment::Short;
        packet.wire16(payload + checksum).ok_or(short)?;
        let source = packet.wire16(payload).ok_or(short)?;
        let destination = packet.wire16(payload + 2).ok_or(short)?;
        let flags = if tcp { TcpFlags(packet.byte(payload + 13).ok_or(short)?) } else { TcpFlags::NONE };
        let (near_port, far_port, port_offset) = match direction {
            Direction::Out => (source, destination, payload),
            Direction::In => (destination, source, payload + 2),
        };
        Ok(Segment { near_port, far_port, port_offset, checksum_offset: payload + checksum, flags })
    }

    #[inline(always)]
    fn echo<F: Family, P: Packet + ?Sized>(
        packet: &P,
        payload: usize,
        direction: Direction,
    ) -> Result<Segment, NoSegment> {
        let short = NoSegment::Short;
        let kind = if direction == Direction::Out { F::ECHO_REQUEST } else { F::ECHO_REPLY };
        let near_port = packet.wire16(payload + 4).ok_or(short)?;
        if packet.wire16(payload).ok_or(short)? != u16::from_ne_bytes([kind, 0]) {
            return Err(NoSegment::Protocol);
        }
        Ok(Segment {
            near_port,
            far_port: 0,
            port_offset: payload + 4,
            checksum_offset: payload + 2,
            flags: TcpFlags::NONE,
        })
    }
}

/// The key of the session of an inside and a remote port: UDP's is the same for all ports of a remote.
#[inline(always)]
pub(super) fn session_key<F: Family>(
    protocol: u8,
    inside: (Address, u16),
    remote: (F::Address, u16),
) -> SessionKey<F> {
    SessionKey {
        remote: remote.0,
        inside: inside.0,
        inside_port: inside.1,
        remote_port: if protocol == ipv4::TCP { remote.1 } else { 0 },
        protocol,
        zero: [0; 3],
        pad: F::PAD,
    }
}
