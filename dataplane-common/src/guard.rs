//! What a pod may send: IPv6 and IPv4 unicast from its own addresses, and solicitations for its gateway.
//!
//! Neighbour discovery, router discovery, multicast groups and DHCP are the node's business: a pod that speaks them as
//! a router, a server or another's neighbour is dropped (RFC 6105), also behind extension headers (RFC 7113, RFC 7610).
//! It is not a firewall between pods.

use crate::{
    counter::Counter,
    ethernet::{self, Mac},
    ipv4,
    ipv6::{self, Address},
    ndp::{self, Advertisement},
    packet::Packet,
};

/// UDP port of a DHCP server (RFC 2131 section 4.1), in wire order.
const DHCP_SERVER: u16 = 67_u16.to_be();
/// UDP port of a DHCP client, to which only servers send.
const DHCP_CLIENT: u16 = 68_u16.to_be();
/// UDP port of a DHCPv6 server (RFC 8415 section 7.2), in wire order.
const DHCPV6_SERVER: u16 = 547_u16.to_be();
/// UDP port of a DHCPv6 client, to which only servers send.
const DHCPV6_CLIENT: u16 = 546_u16.to_be();

/// ICMPv6 types of multicast listener discovery: query, report, done (RFC 2710), report of version 2 (RFC 3810).
const MLD: [u8; 4] = [130, 131, 132, 143];
/// ICMP type: redirect (RFC 792).
const ICMP_REDIRECT: u8 = 5;
/// ICMP type: router advertisement (RFC 1256).
const ICMP_ROUTER_ADVERTISEMENT: u8 = 9;

/// Extension headers that are looked behind. Packets with more are dropped.
const EXTENSIONS_MAX: usize = 4;
/// Beginnings of packets that are looked at; what the checks need lies within or the packet is dropped.
pub const HEADERS_BYTES: usize = ipv6::PAYLOAD + 256;

/// Capacity of the map `GUARD`: the pods of one node.
///
/// Hash of the interface's index (`u32`) to [`Entry`], allocated in full: 16,384 x 96 bytes = 1.6 MB.
/// Written by the agent, read by `pod_guard`. When full, a further pod is refused with an error; an
/// interface without an entry passes nothing.
pub const GUARD_MAX: u32 = 16_384;

/// Value of the map `GUARD`: what the pod behind an interface may send.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The pod's only IPv6 source.
    pub ipv6: Address,
    /// The pod's only IPv4 source.
    pub ipv4: ipv4::Address,
    /// The range of all pods.
    pub pod_network: ipv4::Address,
    /// The mask of that range.
    pub pod_mask: ipv4::Address,
    /// The pod's only source MAC address.
    pub pod_mac: Mac,
    /// The MAC address of the veth's host side.
    pub host_mac: Mac,
}

const _: () = assert!(size_of::<Entry>() == 40);

/// What the guard does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The pod may send it.
    Pass,
    /// Dropped, and why.
    Drop(Counter),
    /// Sent back to the pod.
    Answer(Advertisement),
}

/// Decides over a packet from the pod.
#[inline(always)]
pub fn check<P: Packet + ?Sized>(packet: &P, entry: &Entry) -> Verdict {
    let decided = match packet.wire16(ethernet::ETHER_TYPE) {
        Some(ethernet::IPV6) => check_ipv6(packet, entry),
        Some(ethernet::IPV4) => check_ipv4(packet, entry),
        Some(ethernet::ARP) => Err(Counter::GuardDropArp),
        Some(ethernet::VLAN | ethernet::SERVICE_VLAN | ethernet::QINQ) => Err(Counter::GuardDropVlan),
        _ => Err(Counter::GuardDropEtherType),
    };
    match decided {
        Ok(verdict) => verdict,
        Err(reason) => Verdict::Drop(reason),
    }
}

#[inline(always)]
fn check_mac<P: Packet + ?Sized>(packet: &P, entry: &Entry) -> Result<(), Counter> {
    match packet.mac(ethernet::SOURCE) {
        Some(mac) if ethernet::same(&mac, &entry.pod_mac) => Ok(()),
        _ => Err(Counter::GuardDropMac),
    }
}

#[inline(always)]
fn check_ipv6<P: Packet + ?Sized>(packet: &P, entry: &Entry) -> Result<Verdict, Counter> {
    let cut = Counter::GuardDropHeader;
    check_mac(packet, entry)?;
    if packet.byte(ipv6::VERSION).ok_or(cut)? >> 4 != 6 {
        return Err(cut);
    }
    if packet.address(ipv6::SOURCE).ok_or(cut)? != entry.ipv6 {
        // A kernel without an address joins its groups from `::`: that is no spoofing.
        return Err(if is_mld(packet) { Counter::GuardDropMld } else { Counter::GuardDropSource });
    }
    let destination = packet.address(ipv6::DESTINATION).ok_or(cut)?;
    match packet.byte(ipv6::NEXT_HEADER).ok_or(cut)? {
        ipv6::ICMPV6 => check_icmpv6(packet, entry, destination),
        ipv6::HOP_BY_HOP | ipv6::ROUTING | ipv6::FRAGMENT | ipv6::DESTINATION_OPTIONS => {
            check_extended(packet, destination)
        }
        protocol => check_upper(packet, protocol, ipv6::PAYLOAD, destination),
    }
}

/// What lies behind extension headers.
#[inline(always)]
fn check_extended<P: Packet + ?Sized>(packet: &P, destination: Address) -> Result<Verdict, Counter> {
    let Some((protocol, offset)) = behind_extensions(packet)? else {
        // A later fragment: what it is a part of is judged by the first.
        return check_destination(destination);
    };
    if protocol == ipv6::ICMPV6 {
        return match packet.byte(offset).ok_or(Counter::GuardDropHeader)? {
            kind if MLD.contains(&kind) => Err(Counter::GuardDropMld),
            ndp::ROUTER_SOLICITATION..=ndp::REDIRECT => Err(Counter::GuardDropExtension),
            _ => check_destination(destination),
        };
    }
    check_upper(packet, protocol, offset, destination)
}

#[inline(always)]
fn check_upper<P: Packet + ?Sized>(
    packet: &P,
    protocol: u8,
    offset: usize,
    destination: Address,
) -> Result<Verdict, Counter> {
    if protocol == ipv6::UDP {
        let cut = Counter::GuardDropHeader;
        let (from, to) = (packet.wire16(offset).ok_or(cut)?, packet.wire16(offset + 2).ok_or(cut)?);
        if from == DHCPV6_SERVER || to == DHCPV6_CLIENT {
            return Err(Counter::GuardDropDhcp);
        }
    }
    check_destination(destination)
}

#[inline(always)]
fn check_destination(destination: Address) -> Result<Verdict, Counter> {
    if destination.is_multicast() {
        return Err(Counter::GuardDropMulticast);
    }
    if destination.is_link_local() && destination != Address::GATEWAY {
        return Err(Counter::GuardDropLinkLocal);
    }
    Ok(Verdict::Pass)
}

/// The protocol behind the extension headers and where it begins; none in a fragment that is not the first.
///
/// At the hop limit of neighbour discovery nothing is looked at: only the node itself would believe such a packet,
/// for forwarding lowers the hop limit, and nobody else has a reason to send it.
#[inline(always)]
fn behind_extensions<P: Packet + ?Sized>(packet: &P) -> Result<Option<(u8, usize)>, Counter> {
    let cut = Counter::GuardDropHeader;
    if packet.byte(ipv6::HOP_LIMIT).ok_or(cut)? == ipv6::HOP_LIMIT_LINK {
        return Err(Counter::GuardDropExtension);
    }
    let mut header = packet.byte(ipv6::NEXT_HEADER).ok_or(cut)?;
    let mut offset = ipv6::PAYLOAD;
    for _ in 0..=EXTENSIONS_MAX {
        let bytes = match header {
            ipv6::HOP_BY_HOP | ipv6::ROUTING | ipv6::DESTINATION_OPTIONS => {
                (packet.byte(offset + 1).ok_or(cut)? as usize + 1) << 3
            }
            ipv6::FRAGMENT => {
                if packet.wire16(offset + 2).ok_or(cut)? & ipv6::FRAGMENT_OFFSET != 0 {
                    return Ok(None);
                }
                8
            }
            protocol => return Ok(Some((protocol, offset))),
        };
        header = packet.byte(offset).ok_or(cut)?;
        offset += bytes;
    }
    Err(Counter::GuardDropExtension)
}

/// Whether it is multicast listener discovery, which always begins with hop-by-hop options of 8 bytes (RFC 3810
/// section 5).
#[inline(always)]
fn is_mld<P: Packet + ?Sized>(packet: &P) -> bool {
    let is_behind_options = packet.byte(ipv6::NEXT_HEADER) == Some(ipv6::HOP_BY_HOP)
        && packet.wire16(ipv6::PAYLOAD) == Some(u16::from_ne_bytes([ipv6::ICMPV6, 0]));
    is_behind_options && packet.byte(ipv6::PAYLOAD + 8).is_some_and(|kind| MLD.contains(&kind))
}

#[inline(always)]
fn check_icmpv6<P: Packet + ?Sized>(
    packet: &P,
    entry: &Entry,
    destination: Address,
) -> Result<Verdict, Counter> {
    match packet.byte(ipv6::PAYLOAD).ok_or(Counter::GuardDropHeader)? {
        ndp::ROUTER_SOLICITATION => Err(Counter::GuardDropRouterSolicitation),
        ndp::ROUTER_ADVERTISEMENT => Err(Counter::GuardDropRouterAdvertisement),
        ndp::NEIGHBOUR_ADVERTISEMENT => Err(Counter::GuardDropNeighbourAdvertisement),
        ndp::REDIRECT => Err(Counter::GuardDropRedirect),
        ndp::NEIGHBOUR_SOLICITATION => match ndp::gateway(packet, entry.host_mac) {
            Some(answer) => Ok(Verdict::Answer(answer)),
            None => Err(Counter::GuardDropSolicitation),
        },
        kind if MLD.contains(&kind) => Err(Counter::GuardDropMld),
        _ => check_destination(destination),
    }
}

#[inline(always)]
fn check_ipv4<P: Packet + ?Sized>(packet: &P, entry: &Entry) -> Result<Verdict, Counter> {
    let cut = Counter::GuardDropHeader;
    check_mac(packet, entry)?;
    let version_ihl = packet.byte(ipv4::VERSION_IHL).ok_or(cut)?;
    let destination = packet.wire32(ipv4::DESTINATION).ok_or(cut)?;
    if version_ihl >> 4 != 4 || version_ihl & 0x0f < 5 {
        return Err(cut);
    }
    if packet.wire32(ipv4::SOURCE).ok_or(cut)? != entry.ipv4 {
        return Err(Counter::GuardDropSourceIpv4);
    }
    if version_ihl & 0x0f > 5 {
        return Err(Counter::GuardDropIpv4Options);
    }
    if ipv4::is_group(destination) {
        return Err(Counter::GuardDropMulticast);
    }
    if destination & entry.pod_mask == entry.pod_network {
        return Err(Counter::GuardDropPodIpv4);
    }
    if packet.wire16(ipv4::FRAGMENT).ok_or(cut)? & ipv4::FRAGMENT_OFFSET != 0 {
        return Ok(Verdict::Pass);
    }
    match packet.byte(ipv4::PROTOCOL).ok_or(cut)? {
        ipv4::UDP => check_udp_ipv4(packet),
        ipv4::ICMP => check_icmp(packet),
        _ => Ok(Verdict::Pass),
    }
}

/// Where the payload of a header without options begins.
const IPV4_PAYLOAD: usize = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES_MIN;

#[inline(always)]
fn check_udp_ipv4<P: Packet + ?Sized>(packet: &P) -> Result<Verdict, Counter> {
    let cut = Counter::GuardDropHeader;
    let from = packet.wire16(IPV4_PAYLOAD).ok_or(cut)?;
    let to = packet.wire16(IPV4_PAYLOAD + 2).ok_or(cut)?;
    let is_server = from == DHCP_SERVER || to == DHCP_CLIENT;
    if is_server { Err(Counter::GuardDropDhcp) } else { Ok(Verdict::Pass) }
}

#[inline(always)]
fn check_icmp<P: Packet + ?Sized>(packet: &P) -> Result<Verdict, Counter> {
    match packet.byte(IPV4_PAYLOAD).ok_or(Counter::GuardDropHeader)? {
        ICMP_REDIRECT => Err(Counter::GuardDropRedirect),
        ICMP_ROUTER_ADVERTISEMENT => Err(Counter::GuardDropRouterAdvertisement),
        _ => Ok(Verdict::Pass),
    }
}

#[cfg(test)]
mod tests;
