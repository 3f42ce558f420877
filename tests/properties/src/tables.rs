//! The masquerade on the host, for one node in whose world time stands still.

use dataplane_common::masquerade::{Config, Ipv4, NODES_MAX, Pool, fragment::Sent, memory::Memory};

use crate::masquerade::{NODE, POD_MASK, POD_NETWORK};

/// A node's tables, without bounds and without sockets.
#[derive(Default)]
pub struct HostTables(Memory);

impl HostTables {
    /// Sends a packet out by the uplink.
    pub fn egress(&mut self, frame: &mut [u8]) -> Sent<Ipv4> {
        self.0.egress(frame, &config())
    }

    /// Lets a packet in by the uplink.
    pub fn ingress(&mut self, frame: &mut [u8]) -> Sent<Ipv4> {
        self.0.ingress(frame, &config())
    }

    /// Forgets all flows, as the agent's sweep does long after the last packet. Fragments stay.
    pub fn sweep(&mut self) {
        let fragments = std::mem::take(&mut self.0.fragments);
        self.0 = Memory { fragments, ..Memory::default() };
    }
}

fn config() -> Config {
    let mut nodes = [0; NODES_MAX];
    nodes[0] = u32::from_ne_bytes(NODE);
    Config {
        nodes,
        pod_network: u32::from_ne_bytes(POD_NETWORK),
        pod_mask: u32::from_ne_bytes(POD_MASK),
        pool: Pool::beside(32_768, 60_999),
        filtering: Config::ADDRESS_DEPENDENT,
        enabled: 1,
        ..Config::OFF
    }
}
