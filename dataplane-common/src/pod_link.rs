//! Where the node's pods are, by their private IPv4 address.

use crate::{ethernet::Mac, ipv4, ipv6};

/// Capacity of the map `PODS`: the pods of one node.
///
/// Hash of the pod's IPv4 address ([`ipv4::Address`]) to [`PodLink`], allocated in full: 16,384 x 88 bytes =
/// 1.4 MB. Written by the agent with the pod's guard, read by `pod_guard` for packets from one pod to another's
/// outside port, and by `uplink_ingress` for IPv6 replies. When full, a further pod is refused with an error.
pub const PODS_MAX: u32 = crate::guard::GUARD_MAX;

/// Value of the map `PODS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodLink {
    /// The pod's IPv6 address.
    pub ipv6: ipv6::Address,
    /// The index of the host side of its veth.
    pub ifindex: u32,
    /// The pod's MAC address.
    pub pod_mac: Mac,
    /// The MAC address of the host side.
    pub host_mac: Mac,
}

const _: () = assert!(size_of::<PodLink>() == 32 && size_of::<ipv4::Address>() == 4);
