//! The sweep: frees masquerade flows that have ended.
//!
//! It runs beside the programs without a lock. What keeps that sound: a mapping goes before its sessions, so
//! that no new session joins it; a session that came back to life in between keeps its mapping; a port is
//! freed by compare-and-exchange with the owner that was read before, so that a port that was claimed anew
//! stays claimed.

use std::collections::{BTreeMap, HashSet};

use aya::{
    Ebpf,
    maps::{HashMap, MapData, MapError},
};
use dataplane_common::masquerade::{
    Mapping, MappingKey, Session, SessionKey, expired, is_owned_by, port_index,
};

use super::{
    BpfError,
    port_table::PortTable,
    settings::{entries, failed, hash_mut, is_absent, map},
};

const SESSIONS: &str = "NAT_SESSIONS";
const MAPPINGS: &str = "NAT_MAPPINGS";
const PORTS: &str = "NAT_PORTS";

/// A mapping without a session is one that is being made, unless it is older than this.
const MAKING_NS: u64 = 1_000_000_000;

pub(super) fn sweep(object: &mut Ebpf, now_ns: u64) -> Result<usize, BpfError> {
    let ports = open_ports(object)?;
    let found = Found::read(object, &ports, now_ns)?;
    let mappings = found.ended_mappings(object, now_ns)?;
    let mut freed = 0;
    for key in found.orphans.iter().chain(found.ended_outside_of(&mappings)) {
        freed += usize::from(remove(&mut hash_mut::<SessionKey, Session>(object, SESSIONS)?, SESSIONS, key)?);
    }
    for (key, mapping) in mappings {
        let sessions = found.ended.get(&key).map(Vec::as_slice).unwrap_or_default();
        freed += free_mapping(object, &ports, now_ns, &key, &mapping, sessions)?;
    }
    Ok(freed)
}

fn open_ports(object: &Ebpf) -> Result<PortTable, BpfError> {
    let data = match map(object, PORTS)? {
        aya::maps::Map::Array(data) => data,
        _ => return Err(BpfError::NoMap(PORTS)),
    };
    PortTable::new(data.fd()).map_err(|e| failed("map", PORTS)(MapError::IoError(e.into())))
}

/// What the sessions say of their mappings.
#[derive(Default)]
struct Found {
    /// Mappings with a session that lives.
    live: HashSet<MappingKey>,
    /// Sessions that have ended, by mapping.
    ended: BTreeMap<MappingKey, Vec<SessionKey>>,
    /// Sessions whose port is another's: no reply finds them, and their next packet makes a better one.
    orphans: Vec<SessionKey>,
}

impl Found {
    fn read(object: &Ebpf, ports: &PortTable, now_ns: u64) -> Result<Found, BpfError> {
        let mut found = Found::default();
        for (key, session) in entries::<SessionKey, Session>(object, SESSIONS)? {
            let owner = ports.owner(port_index(key.protocol, session.outside_port));
            if !is_owned_by(owner, key.inside, key.inside_port) {
                found.orphans.push(key);
            } else if expired(now_ns, &key, &session) {
                found.ended.entry(key.mapping()).or_default().push(key);
            } else {
                found.live.insert(key.mapping());
            }
        }
        Ok(found)
    }

    /// Sessions that have ended while their mapping stays, or has gone before.
    fn ended_outside_of<'a>(
        &'a self,
        mappings: &'a BTreeMap<MappingKey, Mapping>,
    ) -> impl Iterator<Item = &'a SessionKey> {
        self.ended.iter().filter(|(key, _)| !mappings.contains_key(key)).flat_map(|(_, keys)| keys)
    }

    /// Mappings of which no session lives.
    fn ended_mappings(&self, object: &Ebpf, now_ns: u64) -> Result<BTreeMap<MappingKey, Mapping>, BpfError> {
        let mut mappings = entries::<MappingKey, Mapping>(object, MAPPINGS)?;
        mappings.retain(|(key, mapping)| {
            !self.live.contains(key) && now_ns.saturating_sub(mapping.created_ns) > MAKING_NS
        });
        Ok(mappings.into_iter().collect())
    }
}

/// Removes the mapping, its sessions, and frees its port.
fn free_mapping(
    object: &mut Ebpf,
    ports: &PortTable,
    now_ns: u64,
    key: &MappingKey,
    mapping: &Mapping,
    ended: &[SessionKey],
) -> Result<usize, BpfError> {
    let index = port_index(key.protocol, mapping.outside_port);
    let owner = ports.owner(index);
    remove(&mut hash_mut::<MappingKey, Mapping>(object, MAPPINGS)?, MAPPINGS, key)?;
    let mut sessions = hash_mut::<SessionKey, Session>(object, SESSIONS)?;
    let (mut freed, mut revived) = (0, false);
    for session_key in ended {
        match get(&sessions, SESSIONS, session_key)? {
            Some(session) if !expired(now_ns, session_key, &session) => revived = true,
            Some(_) => freed += usize::from(remove(&mut sessions, SESSIONS, session_key)?),
            None => {}
        }
    }
    if revived {
        return restore(object, key, mapping).map(|()| freed);
    }
    if is_owned_by(owner, key.inside, key.inside_port) {
        ports.free(index, owner);
    }
    Ok(freed)
}

/// A packet revived a session of the mapping: both stay.
fn restore(object: &mut Ebpf, key: &MappingKey, mapping: &Mapping) -> Result<(), BpfError> {
    const BPF_NOEXIST: u64 = 1;
    let shared = Mapping { shared: 1, ..*mapping };
    let mut mappings = hash_mut::<MappingKey, Mapping>(object, MAPPINGS)?;
    match mappings.insert(key, shared, BPF_NOEXIST) {
        Err(MapError::SyscallError(call)) if call.io_error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other.map_err(failed("write", MAPPINGS)),
    }
}

fn get<T, K: aya::Pod, V: aya::Pod>(
    map: &HashMap<T, K, V>,
    name: &'static str,
    key: &K,
) -> Result<Option<V>, BpfError>
where
    T: std::borrow::Borrow<MapData>,
{
    match map.get(key, 0) {
        Ok(value) => Ok(Some(value)),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(failed("read", name)(e)),
    }
}

/// Whether it was there.
fn remove<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<&mut MapData, K, V>,
    name: &'static str,
    key: &K,
) -> Result<bool, BpfError> {
    match map.remove(key) {
        Ok(()) => Ok(true),
        Err(e) if is_absent(&e) => Ok(false),
        Err(e) => Err(failed("write", name)(e)),
    }
}
