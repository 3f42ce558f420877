//! What the programs count: one number per verdict and per reason of a drop.
//!
//! Map `COUNTERS`, a per-CPU array of [`Counter::ALL`]`.len()` `u64`s, 8 bytes each and CPU. Written by
//! every program, read by `netctl node counters`.

macro_rules! counters {
    ($($variant:ident = $part:literal $name:literal: $doc:literal,)*) => {
        /// An index into the map `COUNTERS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Counter { $(#[doc = $doc] $variant,)* }

        impl Counter {
            /// Every counter, in the order of the map.
            pub const ALL: &'static [Counter] = &[$(Counter::$variant,)*];

            /// The part of the programs that counts it.
            pub const fn part(self) -> &'static str {
                match self { $(Counter::$variant => $part,)* }
            }

            /// Its name: the verdict, or `drop_` and the reason.
            pub const fn name(self) -> &'static str {
                match self { $(Counter::$variant => $name,)* }
            }

            /// What it means, in one sentence.
            pub const fn doc(self) -> &'static str {
                match self { $(Counter::$variant => $doc,)* }
            }
        }
    };
}

counters! {
    NdpPass = "ndp_proxy" "pass": "Neither IPv4 nor a solicitation for a local pod; left to the kernel.",
    NdpAnswered = "ndp_proxy" "answered": "A solicitation for a local pod, answered to who asked.",
    NdpAnsweredDad = "ndp_proxy" "answered_dad": "A DAD probe for a local pod's address, answered to all nodes.",
    NdpDropHopLimit = "ndp_proxy" "drop_hop_limit": "The hop limit is not 255: it came from off the link.",
    NdpDropCode = "ndp_proxy" "drop_code": "The ICMP code is not 0.",
    NdpDropLength = "ndp_proxy" "drop_length": "Shorter than 24 bytes, cut short, or not in units of 8.",
    NdpDropTooLong = "ndp_proxy" "drop_too_long": "More options than are looked at.",
    NdpDropOption = "ndp_proxy" "drop_option": "An option of length 0, one past the end, or no usable link-layer address in it.",
    NdpDropChecksum = "ndp_proxy" "drop_checksum": "The ICMP checksum is wrong.",
    NdpDropSource = "ndp_proxy" "drop_source": "The source is a multicast address, or a DAD probe has a link-layer option.",
    NdpDropDestination = "ndp_proxy" "drop_destination": "A DAD probe that was not sent to a solicited-node group.",
    NdpDropTarget = "ndp_proxy" "drop_target": "The target is a multicast address.",
    NdpDropFragment = "ndp_proxy" "drop_fragment": "A solicitation for a local pod behind a fragment header (RFC 6980).",
    NdpDropExtension = "ndp_proxy" "drop_extension_header": "A solicitation for a local pod behind other extension headers, as nobody sends it.",
    NdpDropError = "ndp_proxy" "drop_error": "The kernel refused to resize or write the answer.",

    EgressPass = "masquerade_egress" "pass": "Not of a pod, or not for outside; left as it is.",
    EgressTranslated = "masquerade_egress" "translated": "Left with the node's address.",
    EgressFragment = "masquerade_egress" "translated_fragment": "A later fragment, left with the node's address.",
    EgressKept = "masquerade_egress" "kept_fragment": "A later fragment that came before its first: kept until that comes.",
    EgressReleased = "masquerade_egress" "released_fragment": "One that was kept, sent again because its first came.",
    EgressTranslatedError = "masquerade_egress" "translated_error": "A pod's ICMP error about a flow, left with the node's address.",
    EgressDirect = "masquerade_egress" "direct": "IPv6 of a pod to a host on the node's own link; left as it is.",
    EgressHost = "masquerade_egress" "host_took_over": "The host has sent from the port of a pod's flow to its remote: the flow is ended.",
    EgressDropHostReset = "masquerade_egress" "drop_host_reset": "A reset by the host's kernel of a pod's connection, of which it should have seen nothing.",
    EgressNewFlow = "masquerade_egress" "new_flow": "A new flow was made.",
    EgressReclaimed = "masquerade_egress" "reclaimed": "A new flow took the port of one that had ended.",
    EgressDropHeader = "masquerade_egress" "drop_header": "The IP or transport header is cut short or contradicts itself.",
    EgressDropProtocol = "masquerade_egress" "drop_protocol": "Neither TCP, UDP, an ICMP echo request nor an ICMP error, or behind an IPv6 extension header.",
    EgressDropPod = "masquerade_egress" "drop_no_pod": "IPv6 from an address of the node's /64 that no pod has.",
    EgressDropAddress = "masquerade_egress" "drop_no_address": "IPv6 of a pod to the internet, and the node has no address there.",
    EgressDropFragment = "masquerade_egress" "drop_fragment": "A later fragment that came before its first and could not be kept.",
    EgressDropReset = "masquerade_egress" "drop_reset": "A TCP reset of no known flow.",
    EgressDropIcmpError = "masquerade_egress" "drop_icmp_error": "An ICMP error about no known flow.",
    EgressDropHost = "masquerade_egress" "drop_host_port": "A new flow from a port where the host has a socket for the same remote.",
    EgressDropPorts = "masquerade_egress" "drop_no_port": "No free port was found in the pod's blocks for a new flow.",
    EgressDropTable = "masquerade_egress" "drop_table_full": "The table of flows is full; nothing live is evicted.",
    EgressDropError = "masquerade_egress" "drop_error": "The kernel refused to change the packet.",

    IngressPass = "masquerade_ingress" "pass": "Not for the address that pods leave with, or no flow's port.",
    IngressPassHost = "masquerade_ingress" "pass_host": "For a flow's port, but for a socket or an echo of the host's.",
    IngressTranslated = "masquerade_ingress" "translated": "A reply, handed to its pod.",
    IngressFragment = "masquerade_ingress" "translated_fragment": "A later fragment of a reply, handed to its pod.",
    IngressKept = "masquerade_ingress" "kept_fragment": "A later fragment that came before its first: kept until that comes, and left to the host.",
    IngressReleased = "masquerade_ingress" "released_fragment": "One that was kept, put in again because its first came.",
    IngressError = "masquerade_ingress" "translated_error": "An ICMP error about a flow, handed to its pod.",
    IngressDropPrivate = "masquerade_ingress" "drop_private": "To a pod's private address, which nobody outside of its node knows.",
    IngressDropFiltered = "masquerade_ingress" "drop_filtered": "For a flow's port, from an address that its pod has not written to.",
    IngressDropError = "masquerade_ingress" "drop_error": "The kernel refused to change the packet.",

    HairpinDelivered = "hairpin" "delivered": "To a pod's outside port, handed to it.",
    HairpinDropFragment = "hairpin" "drop_fragment": "A fragment to a pod's outside port.",
    HairpinDropOut = "hairpin" "drop_out": "Could not have left either: no port, no room, a reset of no known flow.",
    HairpinDropIn = "hairpin" "drop_in": "The other pod has not written to the node's address.",
    HairpinDropError = "hairpin" "drop_error": "The pod has no link, or the kernel refused to change the packet.",

    BackstopPass = "backstop" "pass": "Not of a pod's private address, or not for outside.",
    BackstopDropPrivate = "backstop" "drop_private": "A pod's private source that was about to leave untranslated.",

    GuardPass = "pod_guard" "pass": "From the pod's own addresses.",
    GuardAnswered = "pod_guard" "answered": "A solicitation for the gateway, answered.",
    GuardDropNoEntry = "pod_guard" "drop_no_entry": "The interface has no guard entry yet.",
    GuardDropMac = "pod_guard" "drop_source_mac": "The source MAC address is not the pod's.",
    GuardDropSource = "pod_guard" "drop_source_address": "The IPv6 source address is not the pod's.",
    GuardDropHeader = "pod_guard" "drop_header": "The IP header is cut short or contradicts itself.",
    GuardDropMulticast = "pod_guard" "drop_multicast": "To a multicast or broadcast address.",
    GuardDropSolicitation = "pod_guard" "drop_solicitation": "A neighbour solicitation, not a valid one for the gateway.",
    GuardDropRouterAdvertisement = "pod_guard" "drop_router_advertisement": "A router advertisement (RFC 6105).",
    GuardDropRedirect = "pod_guard" "drop_redirect": "An ICMP redirect.",
    GuardDropNeighbourAdvertisement = "pod_guard" "drop_neighbour_advertisement": "A neighbour advertisement.",
    GuardDropExtension = "pod_guard" "drop_extension_header": "Extension headers that hide neighbour discovery, could hide it (RFC 7113), or are too many.",
    GuardDropDhcp = "pod_guard" "drop_dhcp_server": "What a DHCP or DHCPv6 server would send.",
    GuardDropArp = "pod_guard" "drop_arp": "ARP.",
    GuardDropEtherType = "pod_guard" "drop_ether_type": "Neither IPv6 nor IPv4.",
    GuardDropPodIpv4 = "pod_guard" "drop_ipv4_between_pods": "IPv4 to the range of the pods.",
    GuardDropError = "pod_guard" "drop_error": "The kernel refused to resize or write the answer.",
    GuardDropSourceIpv4 = "pod_guard" "drop_source_ipv4": "The IPv4 source address is not the pod's.",
    GuardDropRouterSolicitation = "pod_guard" "drop_router_solicitation": "A router solicitation: the pod has its routes already.",
    GuardDropMld = "pod_guard" "drop_mld": "Multicast listener discovery, of whatever source (RFC 3810).",
    GuardDropVlan = "pod_guard" "drop_vlan": "A frame with a VLAN tag, or two (IEEE 802.1Q).",
    GuardDropIpv4Options = "pod_guard" "drop_ipv4_options": "IPv4 options, source routes among them (RFC 7126).",
    GuardDropLinkLocal = "pod_guard" "drop_link_local": "To a link-local address that is not the gateway's.",
}

/// Entries of the map `COUNTERS`.
pub const COUNTERS_MAX: u32 = Counter::ALL.len() as u32;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_within_a_part() {
        let names: BTreeSet<_> = Counter::ALL.iter().map(|c| (c.part(), c.name())).collect();
        assert_eq!(names.len(), Counter::ALL.len());
    }

    #[test]
    fn the_index_is_the_place_in_all() {
        for (i, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, i);
        }
    }

    #[test]
    fn the_page_of_the_maps_lists_every_counter() {
        let page = include_str!("../../docs/map-layout.md");
        for counter in Counter::ALL {
            let row = format!("| `{}` | `{}` | {} |", counter.part(), counter.name(), counter.doc());
            assert!(page.contains(&row), "docs/map-layout.md lacks: {row}");
        }
    }
}
