//! Frames as the RFCs draw them, read and mended without the code under test.

/// Offset of what follows the Ethernet header.
const NETWORK: usize = 14;
/// Offset of what follows an IPv6 header.
const IPV6_PAYLOAD: usize = 54;

/// The frame itself, and the same with right checksums: a fuzzer rarely finds one.
pub fn variants(frame: &[u8]) -> [Vec<u8>; 2] {
    [frame.to_vec(), mended(frame)]
}

/// The frame with right checksums, as far as it has any.
pub fn mended(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if let Some(packet) = Ipv4::read(&frame) {
        let (payload, end) = (packet.payload, packet.end);
        let field = packet.checksum_field();
        let sum = checksum(&[&frame[NETWORK..24], &frame[26..payload]]);
        set(&mut frame, 24, sum);
        if let Some(field) = field {
            let is_udp = frame[23] == 17;
            // A UDP checksum of zero is none, and stays.
            if !is_udp || frame[field..field + 2] != [0, 0] {
                frame[field..field + 2].fill(0);
                let pseudo = Ipv4::read(&frame).expect("the header is the same").pseudo_header();
                let sum = checksum(&[&pseudo, &frame[payload..end]]);
                set(&mut frame, field, if is_udp && sum == 0 { 0xffff } else { sum });
            }
        }
    } else if let Some(end) = icmpv6_end(&frame) {
        frame[56..58].fill(0);
        let sum = icmpv6_checksum(&frame[..end]);
        set(&mut frame, 56, sum);
    }
    frame
}

/// Whether a frame is ICMPv6 right behind the IPv6 header, and its checksum is right.
pub fn is_icmpv6_intact(frame: &[u8]) -> bool {
    icmpv6_end(frame).is_some_and(|end| icmpv6_checksum(&frame[..end]) == 0)
}

/// Where an ICMPv6 message ends by the IPv6 header's account.
fn icmpv6_end(frame: &[u8]) -> Option<usize> {
    let is_icmpv6 = frame.get(12..14)? == [0x86, 0xdd] && *frame.get(20)? == 58;
    let end = IPV6_PAYLOAD + usize::from(u16::from_be_bytes([*frame.get(18)?, *frame.get(19)?]));
    (is_icmpv6 && end >= IPV6_PAYLOAD + 4 && frame.len() >= end).then_some(end)
}

/// Zero for a message with its right checksum; else what belongs where there is a zero.
fn icmpv6_checksum(frame: &[u8]) -> u16 {
    let length = (frame.len() - IPV6_PAYLOAD) as u32;
    checksum(&[&frame[22..54], &length.to_be_bytes(), &[0, 0, 0, 58], &frame[IPV6_PAYLOAD..]])
}

/// An IPv4 packet whose header is in order.
pub struct Ipv4<'a> {
    frame: &'a [u8],
    payload: usize,
    end: usize,
}

impl<'a> Ipv4<'a> {
    /// Reads it; none when the header is cut short or contradicts itself.
    pub fn read(frame: &'a [u8]) -> Option<Self> {
        if frame.get(12..14)? != [8, 0] || frame.len() < NETWORK + 20 || frame[14] >> 4 != 4 {
            return None;
        }
        let payload = NETWORK + usize::from(frame[14] & 15) * 4;
        let end = NETWORK + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        (payload >= NETWORK + 20 && end >= payload && frame.len() >= end).then_some(Self {
            frame,
            payload,
            end,
        })
    }

    /// Source address.
    pub fn source(&self) -> [u8; 4] {
        self.frame[26..30].try_into().expect("four bytes")
    }

    /// Destination address.
    pub fn destination(&self) -> [u8; 4] {
        self.frame[30..34].try_into().expect("four bytes")
    }

    /// The protocol.
    pub fn protocol(&self) -> u8 {
        self.frame[23]
    }

    /// What follows the header.
    pub fn payload(&self) -> &'a [u8] {
        &self.frame[self.payload..self.end]
    }

    /// Whether the header's checksum is right.
    pub fn is_header_intact(&self) -> bool {
        checksum(&[&self.frame[NETWORK..self.payload]]) == 0
    }

    /// Whether the transport's checksum is right, or is none. A fragment has none of its own.
    pub fn is_transport_intact(&self) -> bool {
        match self.checksum_field() {
            Some(field) if self.protocol() == 17 && self.frame[field..field + 2] == [0, 0] => true,
            Some(_) => checksum(&[&self.pseudo_header(), self.payload()]) == 0,
            None => true,
        }
    }

    /// Whether it is a fragment, the first or a later one.
    pub fn is_fragment(&self) -> bool {
        u16::from_be_bytes([self.frame[20], self.frame[21]]) & 0x3fff != 0
    }

    /// Whether it is a fragment without the transport header.
    pub fn is_later_fragment(&self) -> bool {
        u16::from_be_bytes([self.frame[20], self.frame[21]]) & 0x1fff != 0
    }

    /// Offset of the transport's checksum, where there is one that covers this packet alone.
    fn checksum_field(&self) -> Option<usize> {
        let field = self.payload
            + match self.protocol() {
                1 => 2,
                6 => 16,
                17 => 6,
                _ => return None,
            };
        (!self.is_fragment() && field + 2 <= self.end).then_some(field)
    }

    /// Empty for ICMP.
    fn pseudo_header(&self) -> Vec<u8> {
        if self.protocol() == 1 {
            return Vec::new();
        }
        let mut pseudo = self.frame[26..34].to_vec();
        pseudo.extend([0, self.protocol()]);
        pseudo.extend(((self.end - self.payload) as u16).to_be_bytes());
        pseudo
    }
}

/// RFC 1071, as it is written. Every part but the last has an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = 0;
    for word in words {
        sum += u32::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn set(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// TCP or UDP of four bytes of data, or an echo, with right checksums.
pub fn ipv4(protocol: u8, from: ([u8; 4], u16), to: ([u8; 4], u16), flags: u8) -> Vec<u8> {
    let transport = match protocol {
        1 => [&[flags, 0, 0, 0][..], &from.1.to_be_bytes(), &[0, 1], b"data"].concat(),
        6 => {
            let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
            [&ports[..], &[0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0], b"data"].concat()
        }
        _ => {
            let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
            [&ports[..], &[0, 12, 0xff, 0xff], b"data"].concat()
        }
    };
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0];
    frame.extend((20 + transport.len() as u16).to_be_bytes());
    frame.extend([0x12, 0x34, 0, 0, 64, protocol, 0, 0]);
    frame.extend(from.0);
    frame.extend(to.0);
    frame.extend(transport);
    mended(&frame)
}
