//! What the cluster has been from its first moment, and the counters that only grow.

use hextet_address::{ClusterPrefix, NodePrefix};
use ipnetwork::Ipv4Network;
use serde::{Deserialize, Serialize};

use crate::time::WallTime;

/// Facts that never change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Of this each node has a /64 of its own, unless its pods have addresses of its LAN.
    pub prefix: ClusterPrefix,
    /// The /64 of a LAN: a node on it that does not choose otherwise gives its pods addresses of the LAN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_prefix: Option<NodePrefix>,
    /// The private range that every node hands out to its own pods.
    pub pod_ipv4: Ipv4Network,
    /// Mixes serial numbers into pod ids that do not look like numbers.
    pub id_key: u64,
    /// When the server first started.
    pub created: WallTime,
}

impl Cluster {
    /// How many pods one node can hold: the addresses of `pod_ipv4` without network, gateway and broadcast.
    #[must_use]
    pub fn pods_per_node_max(&self) -> u32 {
        self.pod_ipv4.size().saturating_sub(3).max(1)
    }
}

/// Numbers that only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Pods that were ever made; the next one's serial number.
    pub pods_made: u64,
    /// Pods with smaller serial numbers were made before the last restore from a backup: after them others may have been
    /// made that nobody here knows of.
    #[serde(default, skip_serializing_if = "crate::job::is_default")]
    pub restored_from: u64,
}
