//! Neighbour discovery: which solicitations are valid (RFC 4861 section 7.1.1) and what answers them
//! (sections 7.2.4 and 7.2.8; RFC 4862 section 5.4.3 for DAD probes).
//!
//! A solicitation is looked at only as far as its target until the target turns out to be ours; then it
//! is answered or dropped. It does not learn neighbours and does not delay (the proxies of one address
//! are one node, so there is nothing to spread, section 7.2.8).
//!
//! ```text
//! |     Type      |     Code      |          Checksum             |
//! |R|S|O|                     Reserved                            |
//! |                       Target Address, 16 bytes                |
//! |   Options ...
//! ```

pub mod claim;

use crate::{
    checksum::Sum,
    counter::Counter,
    ethernet::{self, Mac},
    ipv6::{self, Address},
    packet::Packet,
};

/// ICMPv6 type: router advertisement (RFC 4861 section 4.2).
pub const ROUTER_ADVERTISEMENT: u8 = 134;
/// ICMPv6 type: router solicitation (RFC 4861 section 4.1).
pub const ROUTER_SOLICITATION: u8 = 133;
/// ICMPv6 type: neighbour solicitation (RFC 4861 section 4.3).
pub const NEIGHBOUR_SOLICITATION: u8 = 135;
/// ICMPv6 type: neighbour advertisement (RFC 4861 section 4.4).
pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// ICMPv6 type: redirect (RFC 4861 section 4.5).
pub const REDIRECT: u8 = 137;

/// Option type: source link-layer address (RFC 4861 section 4.6.1).
const SOURCE_LINK_LAYER: u8 = 1;
/// Option type: target link-layer address.
const TARGET_LINK_LAYER: u8 = 2;

/// Offset of the ICMPv6 type.
const TYPE: usize = ipv6::PAYLOAD;
/// Offset of the ICMPv6 code.
const CODE: usize = ipv6::PAYLOAD + 1;
/// Offset of the target address.
const TARGET: usize = ipv6::PAYLOAD + 8;
/// Offset of the first option.
const OPTIONS: usize = ipv6::PAYLOAD + 24;
/// ICMP length of a solicitation without options.
const LENGTH_MIN: usize = 24;

/// Units of 8 bytes of options that are looked at. A solicitation with a link-layer address, a nonce and
/// a timestamp has 4; one with more units than this is dropped.
pub const OPTION_UNITS_MAX: usize = 16;

/// The longest solicitation that is looked at, with its Ethernet header.
pub const SOLICITATION_BYTES_MAX: usize = OPTIONS + OPTION_UNITS_MAX * 8;

/// Extension headers that are skipped on the way to a solicitation, within [`SOLICITATION_BYTES_MAX`].
pub const EXTENSION_HEADERS_MAX: usize = 4;

/// Length of every advertisement: Ethernet, IPv6, the message, one link-layer option.
pub const ADVERTISEMENT_BYTES: usize = OPTIONS + 8;

/// R, S and O of an advertisement (RFC 4861 section 4.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(u8);

impl Flags {
    /// The sender is a router.
    pub const ROUTER: Flags = Flags(0x80);
    /// Sent in answer to a solicitation, to who asked.
    pub const SOLICITED: Flags = Flags(0x40);
    /// Overrides what the neighbour has cached.
    pub const OVERRIDE: Flags = Flags(0x20);

    /// Both.
    #[inline(always)]
    pub const fn and(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}

/// What a program does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not for us.
    Pass,
    /// Dropped, and why.
    Drop(Counter),
    /// Answered out of the interface it came from, and what to count once that is done.
    Answer(Advertisement, Counter),
}

/// An advertisement, before it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advertisement {
    /// Whom it goes to, on the link.
    pub to_mac: Mac,
    /// Whom it goes to.
    pub to: Address,
    /// The address that it is about: its source and its target.
    pub target: Address,
    /// The link-layer address to give, and the frame's source.
    pub mac: Mac,
    /// R, S and O.
    pub flags: Flags,
}

/// Decides over a packet on the uplink. `lookup` gives the MAC address to answer with for a target, if
/// it is a local pod's.
#[inline(always)]
pub fn proxy<P: Packet + ?Sized>(packet: &P, lookup: impl FnOnce(&Address) -> Option<Mac>) -> Verdict {
    let Some(target) = target(packet) else { return Verdict::Pass };
    if target.is_multicast() && is_for_us(packet, None) {
        return Verdict::Drop(Counter::NdpDropTarget);
    }
    let Some(mac) = lookup(&target) else { return Verdict::Pass };
    if !is_for_us(packet, Some(&mac)) {
        return Verdict::Pass;
    }
    let asker = match validate(packet) {
        Ok(asker) => asker,
        Err(reason) => return Verdict::Drop(reason),
    };
    // O is 0: should the address ever be probed by its rightful owner, that one wins (section 7.2.8).
    match asker {
        Asker::Unspecified => {
            let (to_mac, to) = (ethernet::ALL_NODES, Address::ALL_NODES);
            let answer = Advertisement { to_mac, to, target, mac, flags: Flags::ROUTER };
            Verdict::Answer(answer, Counter::NdpAnsweredDad)
        }
        Asker::Host { address: to, mac: to_mac } => {
            let flags = Flags::ROUTER.and(Flags::SOLICITED);
            Verdict::Answer(Advertisement { to_mac, to, target, mac, flags }, Counter::NdpAnswered)
        }
    }
}

/// Whether the frame goes to a group or to `mac`. A switch floods frames for MAC addresses that it has not learnt:
/// those are somebody else's.
#[inline(always)]
fn is_for_us<P: Packet + ?Sized>(packet: &P, mac: Option<&Mac>) -> bool {
    packet
        .mac(ethernet::DESTINATION)
        .is_some_and(|to| ethernet::is_group(&to) || mac.is_some_and(|mac| ethernet::same(&to, mac)))
}

/// Whether there are extension headers, behind which [`hidden`] could find a solicitation.
#[inline(always)]
pub fn may_hide<P: Packet + ?Sized>(packet: &P) -> bool {
    packet.wire16(ethernet::ETHER_TYPE) == Some(ethernet::IPV6)
        && packet.byte(ipv6::NEXT_HEADER).is_some_and(ipv6::is_extension)
}

/// Decides over a packet with extension headers: a solicitation for a local pod is dropped. One in fragments must be
/// (RFC 6980 section 5), and nobody sends it behind other headers.
///
/// A first fragment without the whole target, later fragments and longer chains pass: the kernel drops solicitations
/// in fragments too, once it has put them together.
#[inline(always)]
pub fn hidden<P: Packet + ?Sized>(packet: &P, lookup: impl FnOnce(&Address) -> Option<Mac>) -> Verdict {
    let Some((target, fragmented)) = hidden_target(packet) else { return Verdict::Pass };
    match lookup(&target) {
        Some(mac) if is_for_us(packet, Some(&mac)) => {
            Verdict::Drop(if fragmented { Counter::NdpDropFragment } else { Counter::NdpDropExtension })
        }
        _ => Verdict::Pass,
    }
}

/// The target of a solicitation behind extension headers, and whether one of them is a fragment header.
#[inline(always)]
fn hidden_target<P: Packet + ?Sized>(packet: &P) -> Option<(Address, bool)> {
    let mut kind = packet.byte(ipv6::NEXT_HEADER)?;
    let mut offset = ipv6::PAYLOAD;
    let mut fragmented = false;
    for _ in 0..EXTENSION_HEADERS_MAX {
        if !ipv6::is_extension(kind) {
            break;
        }
        let [next, length] = packet.wire16(offset)?.to_ne_bytes();
        if kind == ipv6::FRAGMENT {
            if packet.wire16(offset + 2)? & ipv6::FRAGMENT_OFFSET != 0 {
                return None;
            }
            fragmented = true;
            offset += 8;
        } else {
            offset += (length as usize + 1) * 8;
        }
        kind = next;
    }
    let is_solicitation = kind == ipv6::ICMPV6 && packet.byte(offset)? == NEIGHBOUR_SOLICITATION;
    if is_solicitation { Some((packet.address(offset + 8)?, fragmented)) } else { None }
}

/// The answer to a pod's solicitation for its gateway: the gateway itself speaks, so O is 1.
#[inline(always)]
pub fn gateway<P: Packet + ?Sized>(packet: &P, host_mac: Mac) -> Option<Advertisement> {
    if target(packet)? != Address::GATEWAY {
        return None;
    }
    match validate(packet) {
        Ok(Asker::Host { address, mac }) => Some(Advertisement {
            to_mac: mac,
            to: address,
            target: Address::GATEWAY,
            mac: host_mac,
            flags: Flags::ROUTER.and(Flags::SOLICITED).and(Flags::OVERRIDE),
        }),
        _ => None,
    }
}

/// The target of a packet that says it is a solicitation. Says nothing of its validity.
#[inline(always)]
pub fn target<P: Packet + ?Sized>(packet: &P) -> Option<Address> {
    if packet.wire16(ethernet::ETHER_TYPE)? != ethernet::IPV6
        || packet.byte(ipv6::NEXT_HEADER)? != ipv6::ICMPV6
        || packet.byte(TYPE)? != NEIGHBOUR_SOLICITATION
        || packet.byte(ipv6::VERSION)? >> 4 != 6
    {
        return None;
    }
    packet.address(TARGET)
}

/// Who sent a valid solicitation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asker {
    /// A host that probes whether the address is free (RFC 4862 section 5.4.2).
    Unspecified,
    /// A host that wants to reach it. Its link-layer address is that of the option, else the frame's.
    Host { address: Address, mac: Mac },
}

/// The checks of RFC 4861 section 7.1.1, in the order of the headers, but for the target's, which the caller makes.
#[inline(always)]
fn validate<P: Packet + ?Sized>(packet: &P) -> Result<Asker, Counter> {
    let cut = Counter::NdpDropLength;
    if packet.byte(ipv6::HOP_LIMIT).ok_or(cut)? != ipv6::HOP_LIMIT_LINK {
        return Err(Counter::NdpDropHopLimit);
    }
    if packet.byte(CODE).ok_or(cut)? != 0 {
        return Err(Counter::NdpDropCode);
    }
    let wire_length = packet.wire16(ipv6::PAYLOAD_LENGTH).ok_or(cut)?;
    let length = u16::from_be(wire_length) as usize;
    if length < LENGTH_MIN || !length.is_multiple_of(8) || ipv6::PAYLOAD + length > packet.length() {
        return Err(cut);
    }
    if length > LENGTH_MIN + OPTION_UNITS_MAX * 8 {
        return Err(Counter::NdpDropTooLong);
    }
    let source = packet.address(ipv6::SOURCE).ok_or(cut)?;
    let destination = packet.address(ipv6::DESTINATION).ok_or(cut)?;
    let head = Sum::ZERO
        .add64(source.0[0])
        .add64(source.0[1])
        .add64(destination.0[0])
        .add64(destination.0[1])
        .add16(wire_length)
        .add16((ipv6::ICMPV6 as u16).to_be());
    let Options { link_layer, sum } = options(packet, head, (length - LENGTH_MIN) / 8)?;
    if !sum.is_valid() {
        return Err(Counter::NdpDropChecksum);
    }
    asker(packet, source, destination, link_layer)
}

/// The rules that tie the source to destination and options.
#[inline(always)]
fn asker<P: Packet + ?Sized>(
    packet: &P,
    source: Address,
    destination: Address,
    link_layer: Option<Mac>,
) -> Result<Asker, Counter> {
    if source.is_unspecified() {
        if link_layer.is_some() {
            return Err(Counter::NdpDropSource);
        }
        if !destination.is_solicited_node() {
            return Err(Counter::NdpDropDestination);
        }
        return Ok(Asker::Unspecified);
    }
    if source.is_multicast() {
        return Err(Counter::NdpDropSource);
    }
    let mac = match link_layer {
        Some(mac) => mac,
        None => packet.mac(ethernet::SOURCE).ok_or(Counter::NdpDropLength)?,
    };
    // An answer to a group address would be an amplifier.
    if ethernet::is_group(&mac) {
        return Err(Counter::NdpDropOption);
    }
    Ok(Asker::Host { address: source, mac })
}

/// What the options say, and the sum of the whole message.
struct Options {
    link_layer: Option<Mac>,
    sum: Sum,
}

/// Walks the message in units of 8 bytes: adds each to the sum and reads the options as they begin.
#[inline(always)]
fn options<P: Packet + ?Sized>(packet: &P, head: Sum, units: usize) -> Result<Options, Counter> {
    let cut = Counter::NdpDropLength;
    let mut sum = head
        .add64(packet.wire64(TYPE).ok_or(cut)?)
        .add64(packet.wire64(TARGET).ok_or(cut)?)
        .add64(packet.wire64(TARGET + 8).ok_or(cut)?);
    let mut link_layer = None;
    let mut next = 0;
    for unit in 0..OPTION_UNITS_MAX {
        if unit >= units {
            break;
        }
        let offset = OPTIONS + unit * 8;
        let word = packet.wire64(offset).ok_or(cut)?;
        sum = sum.add64(word);
        if unit == next {
            let [kind, length, a, b, c, d, e, f] = word.to_ne_bytes();
            if length == 0 {
                return Err(Counter::NdpDropOption);
            }
            if kind == SOURCE_LINK_LAYER && link_layer.is_none() {
                if length != 1 {
                    return Err(Counter::NdpDropOption);
                }
                link_layer = Some([a, b, c, d, e, f]);
            }
            next += length as usize;
        }
    }
    // The last option must end where the message ends.
    if next != units {
        return Err(Counter::NdpDropOption);
    }
    Ok(Options { link_layer, sum })
}

impl Advertisement {
    /// The whole frame, checksum included.
    #[inline(always)]
    pub fn frame(&self) -> [u8; ADVERTISEMENT_BYTES] {
        const LENGTH: usize = LENGTH_MIN + 8;
        let mut frame = [0; ADVERTISEMENT_BYTES];
        put(&mut frame, ethernet::DESTINATION, &self.to_mac);
        put(&mut frame, ethernet::SOURCE, &self.mac);
        put(&mut frame, ethernet::ETHER_TYPE, &ethernet::IPV6.to_ne_bytes());
        frame[ipv6::VERSION] = 0x60;
        frame[ipv6::PAYLOAD_LENGTH + 1] = LENGTH as u8;
        frame[ipv6::NEXT_HEADER] = ipv6::ICMPV6;
        frame[ipv6::HOP_LIMIT] = ipv6::HOP_LIMIT_LINK;
        put(&mut frame, ipv6::SOURCE, &self.target.octets());
        put(&mut frame, ipv6::DESTINATION, &self.to.octets());
        frame[TYPE] = NEIGHBOUR_ADVERTISEMENT;
        frame[TYPE + 4] = self.flags.0;
        put(&mut frame, TARGET, &self.target.octets());
        frame[OPTIONS] = TARGET_LINK_LAYER;
        frame[OPTIONS + 1] = 1;
        put(&mut frame, OPTIONS + 2, &self.mac);
        let checksum = self.checksum(LENGTH as u16);
        put(&mut frame, TYPE + 2, &checksum.to_ne_bytes());
        frame
    }

    /// Source and target are one address, so it counts twice.
    #[inline(always)]
    fn checksum(&self, length: u16) -> u16 {
        let [a, b, c, d, e, f] = self.mac;
        Sum::ZERO
            .add64(self.target.0[0])
            .add64(self.target.0[1])
            .add64(self.target.0[0])
            .add64(self.target.0[1])
            .add64(self.to.0[0])
            .add64(self.to.0[1])
            .add16(length.to_be())
            .add16((ipv6::ICMPV6 as u16).to_be())
            .add16(u16::from_ne_bytes([NEIGHBOUR_ADVERTISEMENT, 0]))
            .add16(u16::from_ne_bytes([self.flags.0, 0]))
            .add64(u64::from_ne_bytes([TARGET_LINK_LAYER, 1, a, b, c, d, e, f]))
            .checksum()
    }
}

#[inline(always)]
fn put<const N: usize>(frame: &mut [u8; ADVERTISEMENT_BYTES], offset: usize, bytes: &[u8; N]) {
    let mut i = 0;
    while i < N {
        frame[offset + i] = bytes[i];
        i += 1;
    }
}

/// Capacity of the map `NDP_PODS`: the pods of one node.
///
/// Hash of [`Address`] to [`PodMac`], allocated in full: 131,072 x 72 bytes = 9.4 MB. Written by the agent,
/// read by `uplink_ingress`. When full, a further pod is refused with an error and is not answered for.
pub const NDP_PODS_MAX: u32 = 131_072;

/// Value of the map `NDP_PODS`: the MAC address to answer with.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodMac {
    /// The uplink's MAC address.
    pub mac: Mac,
    /// Zero.
    pub zero: [u8; 2],
}

const _: () = assert!(size_of::<PodMac>() == 8 && size_of::<Address>() == 16);

#[cfg(test)]
mod tests;
