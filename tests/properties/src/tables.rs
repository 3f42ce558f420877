//! The masquerade's tables on the host: what the maps are in the kernel.

use std::collections::BTreeMap;

use dataplane_common::{
    counter::Counter,
    ipv4::Address,
    masquerade::{
        Config, FragmentKey, Inserted, Mapping, MappingKey, OWNER_FREE, PacketMut, Session, SessionKey,
        Tables, Verdict,
    },
};

use crate::masquerade::{NODE, POD_MASK, POD_NETWORK};

/// Tables without bounds and without sockets, in which time stands still.
#[derive(Default)]
pub struct HostTables {
    sessions: BTreeMap<SessionKey, Session>,
    mappings: BTreeMap<MappingKey, Mapping>,
    ports: BTreeMap<u32, u64>,
    fragments: BTreeMap<FragmentKey, Address>,
}

impl HostTables {
    /// Sends a packet out by the uplink.
    pub fn egress(&mut self, frame: &mut [u8]) -> Verdict {
        dataplane_common::masquerade::egress(as_packet(frame), self, &config())
    }

    /// Lets a packet in by the uplink.
    pub fn ingress(&mut self, frame: &mut [u8]) -> Verdict {
        dataplane_common::masquerade::ingress(as_packet(frame), self, &config())
    }

    /// Forgets all flows, as the agent's sweep does long after the last packet. Fragments stay.
    pub fn sweep(&mut self) {
        *self = Self { fragments: std::mem::take(&mut self.fragments), ..Self::default() };
    }
}

fn as_packet(frame: &mut [u8]) -> &mut (impl PacketMut + ?Sized) {
    frame
}

fn config() -> Config {
    Config {
        node: u32::from_ne_bytes(NODE),
        pod_network: u32::from_ne_bytes(POD_NETWORK),
        pod_mask: u32::from_ne_bytes(POD_MASK),
        host_ports_min: 32_768,
        host_ports_max: 60_999,
        enabled: 1,
    }
}

fn insert<K: Ord + Copy, V: Copy>(map: &mut BTreeMap<K, V>, key: &K, value: &V) -> Inserted {
    if map.contains_key(key) {
        return Inserted::Exists;
    }
    map.insert(*key, *value);
    Inserted::Done
}

impl Tables for HostTables {
    fn now_ns(&mut self) -> u64 {
        1_000_000_000
    }

    fn random(&mut self) -> u32 {
        4
    }

    fn count(&mut self, _: Counter) {}

    fn session(&mut self, key: &SessionKey) -> Option<&mut Session> {
        self.sessions.get_mut(key)
    }

    fn insert_session(&mut self, key: &SessionKey, session: &Session) -> Inserted {
        insert(&mut self.sessions, key, session)
    }

    fn remove_session(&mut self, key: &SessionKey) {
        self.sessions.remove(key);
    }

    fn mapping(&mut self, key: &MappingKey) -> Option<&mut Mapping> {
        self.mappings.get_mut(key)
    }

    fn insert_mapping(&mut self, key: &MappingKey, mapping: &Mapping) -> Inserted {
        insert(&mut self.mappings, key, mapping)
    }

    fn remove_mapping(&mut self, key: &MappingKey) {
        self.mappings.remove(key);
    }

    fn port(&mut self, index: u32) -> u64 {
        self.ports.get(&index).copied().unwrap_or(OWNER_FREE)
    }

    fn claim_port(&mut self, index: u32, from: u64, to: u64) -> bool {
        let free = self.port(index) == from;
        if free {
            self.ports.insert(index, to);
        }
        free
    }

    fn host_has_port(&mut self, _: Address, _: &SessionKey, _: u16) -> bool {
        false
    }

    fn fragment(&mut self, key: &FragmentKey) -> Option<Address> {
        self.fragments.get(key).copied()
    }

    fn insert_fragment(&mut self, key: &FragmentKey, address: Address) {
        self.fragments.insert(*key, address);
    }
}
