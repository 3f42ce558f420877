//! What a node wants its kernel to hold: a few lines of data from which everything else follows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use hextet_address::GroupId;
use ipnetwork::{Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};

use crate::{Filtering, Ipv6Exit};

/// All that a node wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// The cluster's /48.
    pub cluster: Ipv6Network,
    /// Where the node's pods have their addresses: its own /64 of it, or that of its LAN.
    pub node: Ipv6Network,
    /// The low 24 bits of every pod's address on this node.
    pub group: GroupId,
    /// The private range that every node hands out to its own pods.
    pub pod_ipv4: Ipv4Network,
    /// The device to the other nodes and the world.
    pub uplink: Uplink,
    /// The other nodes: where their pods have their addresses, and the next hop to them on the uplink.
    pub peers: BTreeMap<Ipv6Network, Ipv6Addr>,
    /// The node's pods by ID. An ID is the name of the pod's network namespace.
    pub pods: BTreeMap<String, Pod>,
    /// Who answers neighbour solicitations for pods.
    pub ndp: NdpBackend,
    /// Who translates the pods' IPv4.
    pub masquerade: MasqueradeBackend,
    /// Who gets in at the outside ports of pods; the BPF programs alone can do otherwise than the default.
    #[serde(default)]
    pub filtering: Filtering,
    /// What becomes of the pods' IPv6 to the internet.
    #[serde(default)]
    pub ipv6_exit: Ipv6Exit,
}

impl Desired {
    /// Whether a /64 is one node's alone, so that there is a route to it. Any other is a LAN's: who is on the
    /// LAN has its connected route and finds pods by neighbour discovery, and who is not has a router.
    pub fn is_routed(&self, prefix: Ipv6Network) -> bool {
        self.cluster.contains(prefix.network())
    }
}

/// The device to the other nodes and the world.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// The address that pods leave with. Without one pods have no IPv4 outside of the node.
    pub ipv4: Option<Ipv4Addr>,
    /// Prefixes to which the kernel's routes would choose another of its addresses.
    #[serde(default)]
    pub sources: BTreeMap<Ipv4Network, Ipv4Addr>,
    /// Its global IPv6 address, that pods can leave with.
    #[serde(default)]
    pub global: Option<Ipv6Addr>,
    /// Prefixes of global addresses that are on its link.
    #[serde(default)]
    pub on_link: BTreeSet<Ipv6Network>,
}

/// A pod's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Its address, in the node's /64.
    pub address: Ipv6Addr,
    /// Its private address between pod and node.
    pub ipv4: Ipv4Addr,
}

/// Who answers neighbour solicitations for pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NdpBackend {
    /// The BPF program at the uplink.
    Ebpf,
    /// The kernel's `proxy_ndp`.
    Kernel,
}

/// Who translates the pods' IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MasqueradeBackend {
    /// The BPF programs at the uplink.
    Ebpf,
    /// The kernel's connection tracking, by a rule in table `ip hextet`.
    Nftables,
}

impl fmt::Display for NdpBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Kernel => "kernel",
        })
    }
}

impl fmt::Display for MasqueradeBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
        })
    }
}
