//! What `netctl node show` tells: who the node is, what it runs, what its kernel offers.

use std::{collections::BTreeMap, fmt, net::Ipv4Addr, net::Ipv6Addr};

use dataplane::Flow;
use hextet_address::{ClusterPrefix, NodePrefix};
use serde::{Deserialize, Serialize};

/// A node as it sees itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its name in the cluster.
    pub name: String,
    /// The agent's process id; none when it does not run.
    pub agent_pid: Option<u32>,
    /// The cluster's /48.
    pub cluster: ClusterPrefix,
    /// Its own /64.
    pub prefix: NodePrefix,
    /// The device to the other nodes, when it is there.
    pub uplink: Option<String>,
    /// Where peers send packets for this node.
    pub underlay: Option<Ipv6Addr>,
    /// What pods leave the node with over IPv4.
    pub underlay_ipv4: Option<Ipv4Addr>,
    /// Who answers neighbour solicitations.
    pub ndp: String,
    /// Who translates the pods' IPv4.
    pub masquerade: String,
    /// Where the server is.
    pub servers: Vec<String>,
    /// Whether a stream to the server is up.
    pub attached: bool,
    /// Why the server does not serve it, when it serves another machine under its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// The revision of the last assignment.
    pub revision: u64,
    /// Other nodes: their /64 and the next hop to it.
    pub peers: BTreeMap<String, (NodePrefix, Ipv6Addr)>,
    /// Pods by id.
    pub pods: BTreeMap<String, PodView>,
    /// What the kernel offers, a line each.
    pub features: Vec<String>,
}

/// A pod as its node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodView {
    /// Its address.
    pub address: Ipv6Addr,
    /// Its private IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// What it does.
    pub state: String,
    /// Why.
    pub message: String,
    /// How often its tasks were started again.
    pub restarts: u32,
}

/// A flow of a pod through the masquerade.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowView {
    /// The pod.
    pub pod: String,
    /// The flow.
    pub flow: Flow,
}

impl fmt::Display for NodeView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let agent = self.agent_pid.map_or_else(|| "not running".to_owned(), |pid| format!("process {pid}"));
        let server = if self.attached { "attached" } else { "not attached" };
        writeln!(f, "node        {}", self.name)?;
        writeln!(f, "agent       {agent}")?;
        writeln!(f, "cluster     {}", self.cluster)?;
        writeln!(f, "prefix      {}", self.prefix)?;
        writeln!(f, "uplink      {}", self.uplink_line())?;
        writeln!(f, "ndp         {}", self.ndp)?;
        writeln!(f, "masquerade  {}", self.masquerade)?;
        writeln!(f, "server      {} ({server}, revision {})", self.servers.join(", "), self.revision)?;
        if let Some(refused) = &self.refused {
            writeln!(f, "refused     {refused}")?;
        }
        for feature in &self.features {
            writeln!(f, "kernel      {feature}")?;
        }
        for (name, (prefix, via)) in &self.peers {
            writeln!(f, "peer        {name} {prefix} via {via}")?;
        }
        for (id, pod) in &self.pods {
            writeln!(f, "pod         {id} {pod}")?;
        }
        Ok(())
    }
}

impl NodeView {
    fn uplink_line(&self) -> String {
        let Some(device) = &self.uplink else { return "not there".to_owned() };
        let mut line = device.clone();
        for address in [self.underlay.map(|a| a.to_string()), self.underlay_ipv4.map(|a| a.to_string())] {
            line.extend(address.map(|address| format!(" {address}")));
        }
        line
    }
}

impl fmt::Display for PodView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ipv4 = self.ipv4.map_or_else(|| "-".to_owned(), |address| address.to_string());
        write!(f, "{} {ipv4} {}", self.address, self.state)?;
        if self.restarts > 0 {
            write!(f, " ({} restarts)", self.restarts)?;
        }
        if self.message.is_empty() { Ok(()) } else { write!(f, ": {}", self.message) }
    }
}
