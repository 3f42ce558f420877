//! IPv4 packets made by hand, and read.

use std::net::Ipv4Addr;

use hextet_properties::frame;
use hextet_tests::capture::Packet;

use crate::socket::Endpoint;

/// Protocol: ICMP.
pub const ICMP: u8 = 1;
/// Protocol: TCP.
pub const TCP: u8 = 6;
/// Protocol: UDP.
pub const UDP: u8 = 17;

/// TCP flag.
pub const SYN: u8 = 2;
/// TCP flag.
pub const ACK: u8 = 0x10;

/// ICMP type: destination unreachable.
pub const UNREACHABLE: u8 = 3;
/// Its code: nobody has the port.
pub const PORT: u8 = 3;
/// ICMP type: time exceeded.
pub const TIME_EXCEEDED: u8 = 11;
/// ICMP type: parameter problem.
pub const PARAMETER_PROBLEM: u8 = 12;

/// Where a frame's packet begins.
const ETHERNET: usize = 14;
/// Length of an IPv4 header without options.
const HEADER: usize = 20;

/// UDP with its right checksum.
pub fn udp(from: Endpoint, to: Endpoint, identification: u16, data: &[u8]) -> Vec<u8> {
    let mut body = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    body.extend((8 + data.len() as u16).to_be_bytes());
    body.extend([0xff, 0xff]);
    body.extend(data);
    ipv4(UDP, from.0, to.0, identification, &body)
}

/// TCP without data.
pub fn tcp(from: Endpoint, to: Endpoint, flags: u8) -> Vec<u8> {
    let mut body = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    body.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    ipv4(TCP, from.0, to.0, 1, &body)
}

/// An ICMP error about a packet.
pub fn icmp_error(from: Ipv4Addr, to: Ipv4Addr, kind: u8, code: u8, about: &[u8]) -> Vec<u8> {
    let body = [&[kind, code, 0, 0, 0, 0, 0, 0], about].concat();
    ipv4(ICMP, from, to, 1, &body)
}

/// Any protocol; checksums of TCP, UDP and ICMP are made right, but a UDP checksum of zero stays.
pub fn ipv4(protocol: u8, from: Ipv4Addr, to: Ipv4Addr, identification: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((HEADER as u16 + body.len() as u16).to_be_bytes());
    frame.extend(identification.to_be_bytes());
    frame.extend([0, 0, 64, protocol, 0, 0]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(body);
    frame::mended(&frame)[ETHERNET..].to_vec()
}

/// The same packet with a change, its checksums mended.
pub fn changed(packet: &[u8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut frame = [&[0; 12][..], &[8, 0], packet].concat();
    change(&mut frame[ETHERNET..]);
    frame::mended(&frame)[ETHERNET..].to_vec()
}

/// The same packet with four bytes of options that do nothing.
pub fn with_options(packet: &[u8]) -> Vec<u8> {
    let longer = [&packet[..HEADER], &[1, 1, 1, 0], &packet[HEADER..]].concat();
    changed(&longer, |packet| {
        packet[0] = 0x46;
        let total = (packet.len() as u16).to_be_bytes();
        packet[2..4].copy_from_slice(&total);
    })
}

/// The packet in two fragments, the first with `first` bytes behind its header.
///
/// # Panics
/// When `first` is not a multiple of 8.
pub fn fragments(packet: &[u8], first: usize) -> [Vec<u8>; 2] {
    assert!(first.is_multiple_of(8) && HEADER + first < packet.len(), "{first}");
    let part = |range: std::ops::Range<usize>, offset: u16| {
        let mut part = [&packet[..HEADER], &packet[range]].concat();
        let total = (part.len() as u16).to_be_bytes();
        part[2..4].copy_from_slice(&total);
        part[6..8].copy_from_slice(&offset.to_be_bytes());
        changed(&part, |_| {})
    };
    const MORE: u16 = 0x2000;
    [part(HEADER..HEADER + first, MORE), part(HEADER + first..packet.len(), (first / 8) as u16)]
}

/// The packet of a captured frame, if it is IPv4, without padding.
pub fn of(frame: &Packet) -> Option<Vec<u8>> {
    frame.ipv4()?;
    let total = usize::from(u16::from_be_bytes([frame.bytes[16], frame.bytes[17]]));
    frame.bytes.get(ETHERNET..ETHERNET + total).map(<[u8]>::to_vec)
}

/// An ICMP error that was captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Who sent it.
    pub source: Ipv4Addr,
    /// Type and code.
    pub kind: (u8, u8),
    /// The packet that it is about, as far as it is quoted.
    pub about: Vec<u8>,
    /// Whether the header, the message and the quoted header have right checksums.
    pub intact: bool,
}

impl Error {
    /// Reads a captured frame.
    pub fn read(frame: &Packet) -> Option<Self> {
        let packet = frame::Ipv4::read(&frame.bytes)?;
        let payload = packet.payload();
        if packet.protocol() != ICMP
            || ![UNREACHABLE, TIME_EXCEEDED, PARAMETER_PROBLEM].contains(payload.first()?)
        {
            return None;
        }
        let about = payload.get(8..)?.to_vec();
        // The header alone: what is quoted may end behind it.
        let header = usize::from(about.first()? & 15) * 4;
        let quoted =
            about.get(..header)?.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum = quoted.sum::<u32>();
        let is_quote_intact = (sum & 0xffff) + (sum >> 16) == 0xffff;
        Some(Self {
            source: packet.source().into(),
            kind: (payload[0], payload[1]),
            intact: packet.is_header_intact() && packet.is_transport_intact() && is_quote_intact,
            about,
        })
    }

    /// Source and destination of the packet that it is about.
    ///
    /// # Panics
    /// When the quote ends before the ports.
    pub fn endpoints(&self) -> (Endpoint, Endpoint) {
        let header = usize::from(self.about[0] & 15) * 4;
        let ip = |at: usize| {
            Ipv4Addr::new(self.about[at], self.about[at + 1], self.about[at + 2], self.about[at + 3])
        };
        let port = |at: usize| u16::from_be_bytes([self.about[at], self.about[at + 1]]);
        ((ip(12), port(header)), (ip(16), port(header + 2)))
    }
}
