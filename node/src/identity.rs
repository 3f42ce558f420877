//! Who this node is in its cluster: what it got when it joined, kept for ever.

use hextet_address::{ClusterPrefix, GroupId, NodePrefix};
use hextet_api::{connect::Credentials, token::Fingerprint};
use ipnetwork::Ipv4Network;
use serde::{Deserialize, Serialize};

/// Who this node is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Its name in the cluster.
    pub(crate) name: String,
    /// The server's store when it joined.
    pub(crate) epoch: String,
    /// The cluster's /48.
    pub(crate) cluster: ClusterPrefix,
    /// Its own /64.
    pub(crate) prefix: NodePrefix,
    /// The low 24 bits of its pods' addresses.
    pub(crate) group: GroupId,
    /// The private range that every node hands out to its own pods.
    pub(crate) pod_ipv4: Ipv4Network,
    /// Its key, its certificate, the CA and the servers.
    pub(crate) credentials: Credentials,
    /// Those before the present ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) previous: Option<Credentials>,
    /// SHA-256, in hex, of CAs of its cluster that were replaced, the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) former_cas: Vec<String>,
}

/// The most CAs that are remembered.
const FORMER_MAX: usize = 16;

impl Identity {
    /// Whether this is or was the CA of the node's cluster.
    pub(crate) fn knows_ca(&self, ca: Fingerprint) -> bool {
        self.credentials.ca_fingerprint() == ca || self.former_cas.contains(&ca.to_string())
    }

    /// Keeps in mind the CA of credentials that were replaced; to be told once the new ones are in their place.
    pub(crate) fn remember_ca(&mut self, ca: Fingerprint) {
        if self.knows_ca(ca) {
            return;
        }
        if self.former_cas.len() == FORMER_MAX {
            self.former_cas.remove(0);
        }
        self.former_cas.push(ca.to_string());
    }

    /// From now on these servers are tried, with whatever certificate.
    pub(crate) fn name_servers(&mut self, servers: &[String]) {
        for credentials in std::iter::once(&mut self.credentials).chain(&mut self.previous) {
            credentials.servers = servers.to_vec();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn identity() -> Identity {
        Identity {
            name: "n1".into(),
            epoch: "e".into(),
            cluster: "fd00:1:2::/48".parse().unwrap(),
            prefix: "fd00:1:2:a::/64".parse().unwrap(),
            group: GroupId::new(0xcc_ddee).unwrap(),
            pod_ipv4: "10.254.0.0/20".parse().unwrap(),
            credentials: Credentials {
                name: "n1".into(),
                servers: vec!["[2001:db8::1]:4679".into()],
                ca_der: vec![1],
                certificate_der: vec![2],
                key_pkcs8_der: vec![3],
            },
            previous: None,
            former_cas: vec![],
        }
    }
}
