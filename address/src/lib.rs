//! Cluster prefixes, node subnets and pod addresses: how 128 bits name one pod for ever.
//!
//! ```text
//!  8 bits   40 bits       16 bits     40 bits       24 bits
//! +----+---------------+-----------+--------------+---------+
//! | fd | cluster       | subnet ID | pod          | group   |
//! +----+---------------+-----------+--------------+---------+
//! |<------ /48 ------->|           |<---- interface ID ---->|
//! |<------------- /64 ------------>|
//! ```
//! Everything is drawn at random and nothing is allocated: the 48 bits once per cluster (RFC 4193), the subnet ID
//! once per node, the 40 bits once per pod. The group is one value per node, so that all its pods share one
//! solicited-node multicast address. In LAN mode the first 64 bits are the LAN's own and several nodes share them;
//! the rest is the same. The crate does no I/O and keeps no record of what was drawn.

#![forbid(unsafe_code)]

mod hex;
mod pod;
mod prefix;

pub use pod::{GroupId, PodLink, pod_address, solicited_node_multicast};
pub use prefix::{ClusterPrefix, NodePrefix, SubnetId};

/// Why a text or a number is not an address part.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not a prefix at all.
    #[error("{0:?} is not an IPv6 prefix such as fd12:3456:789a::/48")]
    NotAPrefix(String),
    /// A prefix of the wrong length.
    #[error("{prefix} must be a /{expected}")]
    WrongLength {
        /// What was given.
        prefix: ipnetwork::Ipv6Network,
        /// The length that the part has.
        expected: u8,
    },
    /// Bits set behind the prefix.
    #[error("{0} has bits set behind its length; did you mean {network}/{length}?", network = .0.network(), length = .0.prefix())]
    HostBits(ipnetwork::Ipv6Network),
    /// Multicast, link-local, reserved.
    #[error(
        "{0} is neither global unicast (2000::/3) nor unique local (fc00::/7): pods cannot have addresses in it"
    )]
    NotUnicast(ipnetwork::Ipv6Network),
    /// Not a hexadecimal number of the part's size.
    #[error("{text:?} is not a hexadecimal number of at most {digits} digits")]
    NotHex {
        /// What was given.
        text: String,
        /// How many digits the part has.
        digits: usize,
    },
    /// A group that would make reserved interface IDs.
    #[error("group {0:06x} is reserved: choose one from 000001 to ffff7f")]
    ReservedGroup(u32),
}
