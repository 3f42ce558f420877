//! Probes whether an address is taken, and what others say to that. For the agent: no program uses it.

use super::{
    Asker, NEIGHBOUR_ADVERTISEMENT, NEIGHBOUR_SOLICITATION, OPTIONS, TARGET, TARGET_LINK_LAYER, TYPE, put,
    target, validate,
};
use crate::{
    checksum::sum_bytes,
    ethernet::{self, Mac},
    ipv6::{self, Address},
    packet::Packet as _,
};

/// Option type: nonce (RFC 3971 section 5.3.2), in a probe to know it by (RFC 7527).
const NONCE: u8 = 14;

/// A nonce of the shortest length (RFC 7527 section 4.1).
pub type Nonce = [u8; 6];

/// Length of a probe: Ethernet, IPv6, solicitation, nonce.
pub const PROBE_BYTES: usize = OPTIONS + 8;

/// A probe of another host (RFC 4862 section 5.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The address that is probed.
    pub target: Address,
    /// Who probes.
    pub mac: Mac,
    /// Its nonce, if it has one of the usual length.
    pub nonce: Option<Nonce>,
}

impl Probe {
    /// The frame is a valid solicitation from `::`.
    pub fn read(frame: &[u8]) -> Option<Probe> {
        let target = target(frame)?;
        let Ok(Asker::Unspecified) = validate(frame) else { return None };
        let length = u16::from_be(frame.wire16(ipv6::PAYLOAD_LENGTH)?) as usize;
        let options = frame.get(OPTIONS..ipv6::PAYLOAD + length)?;
        Some(Probe { target, mac: frame.mac(ethernet::SOURCE)?, nonce: option(options, NONCE) })
    }
}

/// The frame that probes for an address.
pub fn probe_frame(target: Address, mac: Mac, nonce: Nonce) -> [u8; PROBE_BYTES] {
    const LENGTH: usize = PROBE_BYTES - ipv6::PAYLOAD;
    let group = target.solicited_node();
    let mut frame = [0; PROBE_BYTES];
    put(&mut frame, ethernet::DESTINATION, &ethernet::multicast(group));
    put(&mut frame, ethernet::SOURCE, &mac);
    put(&mut frame, ethernet::ETHER_TYPE, &ethernet::IPV6.to_ne_bytes());
    frame[ipv6::VERSION] = 0x60;
    frame[ipv6::PAYLOAD_LENGTH + 1] = LENGTH as u8;
    frame[ipv6::NEXT_HEADER] = ipv6::ICMPV6;
    frame[ipv6::HOP_LIMIT] = ipv6::HOP_LIMIT_LINK;
    put(&mut frame, ipv6::DESTINATION, &group.octets());
    frame[TYPE] = NEIGHBOUR_SOLICITATION;
    put(&mut frame, TARGET, &target.octets());
    frame[OPTIONS] = NONCE;
    frame[OPTIONS + 1] = 1;
    put(&mut frame, OPTIONS + 2, &nonce);
    let sum = sum_bytes(&frame[ipv6::SOURCE..]);
    let checksum = sum.add16((LENGTH as u16).to_be()).add16((ipv6::ICMPV6 as u16).to_be()).checksum();
    put(&mut frame, TYPE + 2, &checksum.to_ne_bytes());
    frame
}

/// Target and target link-layer address of an advertisement, given from its ICMPv6 type on. That its hop limit is
/// 255 and its checksum right is for the caller to see to (RFC 4861 section 7.1.2).
pub fn advertised(message: &[u8]) -> Option<(Address, Mac)> {
    if message.byte(0)? != NEIGHBOUR_ADVERTISEMENT || message.byte(1)? != 0 {
        return None;
    }
    let target = message.address(8)?;
    Some((target, option(message.get(24..)?, TARGET_LINK_LAYER)?))
}

/// The six bytes of the first option of this type that has as many.
fn option(mut options: &[u8], wanted: u8) -> Option<[u8; 6]> {
    while let [kind, units, rest @ ..] = options {
        let length = usize::from(*units) * 8;
        if *kind == wanted && length == 8 {
            return rest.get(..6)?.try_into().ok();
        }
        options = options.get(length..).filter(|_| length != 0)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;

    const MAC: Mac = [2, 0, 0, 0, 0, 0x11];

    fn address(text: &str) -> Address {
        Address::new(text.parse::<Ipv6Addr>().unwrap().octets())
    }

    #[test]
    fn a_probe_is_valid_and_read_as_it_was_written() {
        let pod = address("fd12::aaaa:bbbb:cc12:3456");
        let frame = probe_frame(pod, MAC, [1, 2, 3, 4, 5, 6]);
        assert_eq!(frame[..6], [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]);
        assert_eq!(frame[ipv6::DESTINATION..ipv6::PAYLOAD], address("ff02::1:ff12:3456").octets());
        let read = Probe::read(&frame);
        assert_eq!(read, Some(Probe { target: pod, mac: MAC, nonce: Some([1, 2, 3, 4, 5, 6]) }));
    }

    #[test]
    fn what_is_cut_or_changed_is_no_probe() {
        let frame = probe_frame(address("fd12::1"), MAC, [7; 6]);
        for n in 0..frame.len() {
            assert_eq!(Probe::read(&frame[..n]), None, "{n} bytes");
        }
        for i in ipv6::HOP_LIMIT..frame.len() {
            let mut changed = frame;
            changed[i] ^= 1;
            assert_eq!(Probe::read(&changed), None, "byte {i}");
        }
    }

    #[test]
    fn an_advertisement_gives_the_address_of_its_option() {
        let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, 0x20, 0, 0, 0];
        message.extend(address("fd12::1").octets());
        assert_eq!(advertised(&message), None, "none to give");
        message.extend([14, 1, 0, 0, 0, 0, 0, 0, 2, 1, 2, 0, 0, 0, 0, 0x12]);
        assert_eq!(advertised(&message), Some((address("fd12::1"), [2, 0, 0, 0, 0, 0x12])));
        for n in 0..message.len() {
            assert_eq!(advertised(&message[..n]), None, "{n} bytes");
        }
        message[25] = 0;
        assert_eq!(advertised(&message), None, "an option of length 0 does not loop");
    }
}
