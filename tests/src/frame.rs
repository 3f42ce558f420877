//! Frames made by hand, right and wrong, and sending them as they are.

use std::net::Ipv6Addr;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, sendto, socket};

use crate::command::Run;
use crate::netns::NetNs;

/// A hardware address.
pub type Mac = [u8; 6];

/// Neighbor Solicitation (RFC 4861 section 4.3).
pub const NEIGHBOR_SOLICITATION: u8 = 135;
/// Neighbor Advertisement (RFC 4861 section 4.4).
pub const NEIGHBOR_ADVERTISEMENT: u8 = 136;
/// Router Advertisement (RFC 4861 section 4.2).
pub const ROUTER_ADVERTISEMENT: u8 = 134;
/// Echo Request (RFC 4443 section 4.1).
pub const ECHO_REQUEST: u8 = 128;
const ICMPV6: u8 = 58;

/// An ICMPv6 packet in an Ethernet frame, each part of which can be made wrong.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Destination on the link.
    pub to: Mac,
    /// Source on the link.
    pub from: Mac,
    /// IPv6 source.
    pub source: Ipv6Addr,
    /// IPv6 destination.
    pub destination: Ipv6Addr,
    /// 255 for neighbour discovery.
    pub hop_limit: u8,
    /// The ICMPv6 message: type, code, a zero checksum, body.
    pub message: Vec<u8>,
    /// Added to the right checksum.
    pub checksum_error: u16,
    /// Added to the right payload length.
    pub length_error: i32,
}

impl Frame {
    /// A solicitation for `target` as a host sends it.
    pub fn solicitation(from: Mac, source: Ipv6Addr, target: Ipv6Addr) -> Self {
        let group = solicited_node(target);
        let mut message = vec![NEIGHBOR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        message.extend(target.octets());
        if !source.is_unspecified() {
            // Source link-layer address, 1 unit of 8 bytes.
            message.extend([1, 1]);
            message.extend(from);
        }
        Self::new(multicast_mac(group), from, source, group, message)
    }

    /// An unsolicited advertisement to all nodes that claims `target` for `from`.
    pub fn claim(from: Mac, source: Ipv6Addr, target: Ipv6Addr) -> Self {
        let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        // The override flag.
        let mut message = vec![NEIGHBOR_ADVERTISEMENT, 0, 0, 0, 0x20, 0, 0, 0];
        message.extend(target.octets());
        // Target link-layer address.
        message.extend([2, 1]);
        message.extend(from);
        Self::new(multicast_mac(all_nodes), from, source, all_nodes, message)
    }

    /// An echo request.
    pub fn echo(to: Mac, from: Mac, source: Ipv6Addr, destination: Ipv6Addr) -> Self {
        Self::new(to, from, source, destination, vec![ECHO_REQUEST, 0, 0, 0, 0x12, 0x34, 0, 1])
    }

    /// A frame around an ICMPv6 message, right in all its parts.
    pub fn new(to: Mac, from: Mac, source: Ipv6Addr, destination: Ipv6Addr, message: Vec<u8>) -> Self {
        Self { to, from, source, destination, hop_limit: 255, message, checksum_error: 0, length_error: 0 }
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut message = self.message.clone();
        if message.len() >= 4 {
            let sum = checksum(self.source, self.destination, &message).wrapping_add(self.checksum_error);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let length = (message.len() as i32 + self.length_error).clamp(0, 0xffff) as u16;
        let mut bytes = Vec::with_capacity(54 + message.len());
        bytes.extend(self.to);
        bytes.extend(self.from);
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        bytes.extend(length.to_be_bytes());
        bytes.extend([ICMPV6, self.hop_limit]);
        bytes.extend(self.source.octets());
        bytes.extend(self.destination.octets());
        bytes.extend(message);
        bytes
    }
}

/// Puts frames on an interface as they are.
///
/// # Errors
/// When the interface or the namespace does not exist, or a frame is larger than the interface takes.
pub fn send(place: &NetNs, link: &str, frames: &[Vec<u8>]) -> Result<()> {
    place.run(|| -> Result<()> {
        let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
            .context("cannot open a packet socket")?;
        let index = nix::net::if_::if_nametoindex(link).with_context(|| format!("no interface {link}"))?;
        let to = link_address(index)?;
        for frame in frames {
            sendto(fd.as_raw_fd(), frame, &to, MsgFlags::empty())
                .with_context(|| format!("cannot send {} bytes on {link}", frame.len()))?;
        }
        Ok(())
    })?
}

/// The hardware address of an interface.
///
/// # Errors
/// When the interface does not exist.
pub fn mac_of(place: &NetNs, link: &str) -> Result<Mac> {
    let json = Run::new(&["ip", "-j", "link", "show", "dev", link]).inside(place).success()?;
    let rows: serde_json::Value = serde_json::from_str(&json)?;
    parse_mac(rows[0]["address"].as_str().unwrap_or_default())
        .with_context(|| format!("{link} in {} has no hardware address", place.name()))
}

/// The bytes of `02:00:5e:..`.
///
/// # Errors
/// When it is not six pairs of hex digits.
pub fn parse_mac(text: &str) -> Result<Mac> {
    let bytes: Vec<u8> = text.split(':').filter_map(|pair| u8::from_str_radix(pair, 16).ok()).collect();
    match Mac::try_from(bytes) {
        Ok(mac) => Ok(mac),
        Err(_) => bail!("{text:?} is not a hardware address"),
    }
}

/// The group in which `address` is asked for (RFC 4291 section 2.7.1).
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let s = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (s[6] & 0xff), s[7])
}

/// RFC 2464 section 7.
fn multicast_mac(group: Ipv6Addr) -> Mac {
    let o = group.octets();
    [0x33, 0x33, o[12], o[13], o[14], o[15]]
}

/// RFC 8200 section 8.1, over a message whose checksum is zero.
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let mut covered = Vec::with_capacity(40 + message.len());
    covered.extend(source.octets());
    covered.extend(destination.octets());
    covered.extend((message.len() as u32).to_be_bytes());
    covered.extend([0, 0, 0, ICMPV6]);
    covered.extend(message);
    let words = covered.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[expect(unsafe_code, reason = "nix has no constructor for a packet socket's address")]
fn link_address(index: u32) -> Result<LinkAddr> {
    let raw = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `raw` is a whole sockaddr_ll that lives through the call, `len` is its size, and its family
    // says what it is; from_raw copies it.
    let address = unsafe { LinkAddr::from_raw((&raw const raw).cast(), Some(len)) };
    address.context("nix refused a packet socket's address")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_solicitation_is_what_a_kernel_sends() {
        // RFC 4861 section 4.3 with one option, RFC 2464 section 7.
        let frame = Frame::solicitation(
            [2, 0, 0, 0, 0, 1],
            "2001:db8:1::100".parse().unwrap(),
            "2001:db8:1::11".parse().unwrap(),
        );
        let bytes = frame.bytes();
        assert_eq!(bytes.len(), 14 + 40 + 32);
        assert_eq!(bytes[..6], [0x33, 0x33, 0xff, 0, 0, 0x11]);
        assert_eq!(bytes[18..20], [0, 32]);
        // The checksum of a message with its checksum is zero.
        assert_eq!(checksum(frame.source, frame.destination, &bytes[54..]), 0);
    }

    #[test]
    fn a_wrong_checksum_is_wrong() {
        let (a, b) = ("fe80::1".parse().unwrap(), "fe80::2".parse().unwrap());
        let frame = Frame { checksum_error: 1, ..Frame::echo([0; 6], [0; 6], a, b) };
        assert_ne!(checksum(a, b, &frame.bytes()[54..]), 0);
    }

    #[test]
    fn a_hardware_address_has_six_bytes() {
        assert_eq!(parse_mac("02:00:5e:00:00:ff").unwrap(), [2, 0, 0x5e, 0, 0, 255]);
        assert!(parse_mac("02:00").is_err());
        assert!(parse_mac("").is_err());
    }
}
