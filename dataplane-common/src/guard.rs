//! What a pod may send: IPv6 and IPv4 unicast from its own addresses, and solicitations for its gateway.
//!
//! Neighbour discovery, router discovery and DHCP are the node's business: a pod that speaks them as a
//! router, a server or another's neighbour is dropped (RFC 6105). It is not a firewall between pods.

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
/// UDP port of a DHCPv6 server (RFC 8415 section 7.2), in wire order.
const DHCPV6_SERVER: u16 = 547_u16.to_be();

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
        return Err(Counter::GuardDropSource);
    }
    let destination = packet.address(ipv6::DESTINATION).ok_or(cut)?;
    let next_header = packet.byte(ipv6::NEXT_HEADER).ok_or(cut)?;
    match next_header {
        ipv6::ICMPV6 => return check_icmpv6(packet, entry, destination),
        ipv6::UDP if packet.wire16(ipv6::PAYLOAD).ok_or(cut)? == DHCPV6_SERVER => {
            return Err(Counter::GuardDropDhcp);
        }
        // Behind these could be neighbour discovery. Only the node itself would believe it, and only
        // with this hop limit, for forwarding lowers it.
        ipv6::HOP_BY_HOP | ipv6::ROUTING | ipv6::FRAGMENT | ipv6::DESTINATION_OPTIONS
            if packet.byte(ipv6::HOP_LIMIT) == Some(ipv6::HOP_LIMIT_LINK) =>
        {
            return Err(Counter::GuardDropExtension);
        }
        _ => {}
    }
    if destination.is_multicast() {
        return Err(Counter::GuardDropMulticast);
    }
    Ok(Verdict::Pass)
}

#[inline(always)]
fn check_icmpv6<P: Packet + ?Sized>(
    packet: &P,
    entry: &Entry,
    destination: Address,
) -> Result<Verdict, Counter> {
    match packet.byte(ipv6::PAYLOAD).ok_or(Counter::GuardDropHeader)? {
        ndp::ROUTER_ADVERTISEMENT => Err(Counter::GuardDropRouterAdvertisement),
        ndp::NEIGHBOUR_ADVERTISEMENT => Err(Counter::GuardDropNeighbourAdvertisement),
        ndp::REDIRECT => Err(Counter::GuardDropRedirect),
        ndp::NEIGHBOUR_SOLICITATION => match ndp::gateway(packet, entry.host_mac) {
            Some(answer) => Ok(Verdict::Answer(answer)),
            None => Err(Counter::GuardDropSolicitation),
        },
        _ if destination.is_multicast() => Err(Counter::GuardDropMulticast),
        _ => Ok(Verdict::Pass),
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
        return Err(Counter::GuardDropSource);
    }
    if ipv4::is_group(destination) {
        return Err(Counter::GuardDropMulticast);
    }
    if destination & entry.pod_mask == entry.pod_network {
        return Err(Counter::GuardDropPodIpv4);
    }
    if packet.byte(ipv4::PROTOCOL).ok_or(cut)? == ipv4::UDP {
        let payload = ethernet::HEADER_BYTES + (((version_ihl & 0x0f) as usize) << 2);
        let first = packet.wire16(ipv4::FRAGMENT).ok_or(cut)? & ipv4::FRAGMENT_OFFSET == 0;
        if first && packet.wire16(payload).ok_or(cut)? == DHCP_SERVER {
            return Err(Counter::GuardDropDhcp);
        }
    }
    Ok(Verdict::Pass)
}

#[cfg(test)]
mod tests;
