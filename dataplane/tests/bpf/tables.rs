//! The masquerade's tables on the host: what the maps are in the kernel.

use std::collections::BTreeMap;

use dataplane::bpf::monotonic_ns;
use dataplane_common::{
    counter::Counter,
    ipv4::Address,
    masquerade::{FragmentKey, Inserted, Mapping, MappingKey, OWNER_FREE, Session, SessionKey, Tables},
};

/// Tables without bounds and without sockets.
#[derive(Default)]
pub(crate) struct HostTables {
    sessions: BTreeMap<SessionKey, Session>,
    mappings: BTreeMap<MappingKey, Mapping>,
    ports: BTreeMap<u32, u64>,
    fragments: BTreeMap<FragmentKey, Address>,
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
        monotonic_ns()
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
