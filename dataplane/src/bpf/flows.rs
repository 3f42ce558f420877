//! Masquerade flows as the agent sees them: the sweep that frees those that have ended, and the list for people.
//!
//! The sweep runs beside the programs without a lock. What keeps that sound: a mapping goes before its sessions, so
//! that no new session joins it; a session that came back to life in between keeps its mapping; a port or a block
//! is freed by compare-and-exchange with the owner that was read before, so that one that was claimed anew
//! stays claimed.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    path::Path,
};

use aya::{
    Ebpf,
    maps::{Array, Map, MapData, MapError},
};
use dataplane_common::{
    ipv4,
    masquerade::{
        BLOCKS_MAX, Config, Family, Ipv4, Ipv6, Mapping, MappingKey, OWNER_FREE, PORTS_MAX, Session,
        SessionKey, State,
        block::{BLOCK_FREE, BLOCK_PORTS, Block, block_owner_inside},
        expired, is_owned_by, owner_inside, port_index, timeout_ns,
    },
    pod_link::PodLink,
};

use super::{
    BpfError, batch,
    settings::{config, entries, failed, hash_mut, is_absent, map, pods, to_address, to_ipv6},
    words::Words,
};

pub(super) const PORTS: &str = "NAT_PORTS";
const BLOCKS: &str = "NAT_BLOCKS";

type KeyedSession<F> = (SessionKey<F>, Session<F>);

/// A family whose flows are in maps of its own. The sizes of their keys and values are the layout's, by the pins'
/// folder.
pub(super) trait Maps: Family {
    const SESSIONS: &str;
    const MAPPINGS: &str;

    /// The address, for people.
    fn ip(address: Self::Address) -> IpAddr;

    fn sessions(object: &Ebpf) -> Result<Vec<KeyedSession<Self>>, BpfError>;
    fn mappings(object: &Ebpf) -> Result<Vec<(MappingKey, Mapping<Self>)>, BpfError>;
    fn pinned(data: &MapData) -> io::Result<Vec<KeyedSession<Self>>>;
    /// The session, if it is there.
    fn session(object: &mut Ebpf, key: &SessionKey<Self>) -> Result<Option<Session<Self>>, BpfError>;
    /// Whether it was there.
    fn remove_session(object: &mut Ebpf, key: &SessionKey<Self>) -> Result<bool, BpfError>;
    fn remove_mapping(object: &mut Ebpf, key: &MappingKey) -> Result<(), BpfError>;
    /// Inserts a mapping, never over another.
    fn restore_mapping(object: &mut Ebpf, key: &MappingKey, mapping: Mapping<Self>) -> Result<(), BpfError>;
}

macro_rules! maps {
    ($family:ty, $sessions:literal, $mappings:literal, $ip:expr) => {
        impl Maps for $family {
            const SESSIONS: &str = $sessions;
            const MAPPINGS: &str = $mappings;

            fn ip(address: Self::Address) -> IpAddr {
                $ip(address).into()
            }

            fn sessions(object: &Ebpf) -> Result<Vec<KeyedSession<Self>>, BpfError> {
                entries(object, Self::SESSIONS)
            }

            fn mappings(object: &Ebpf) -> Result<Vec<(MappingKey, Mapping<Self>)>, BpfError> {
                entries(object, Self::MAPPINGS)
            }

            fn pinned(data: &MapData) -> io::Result<Vec<KeyedSession<Self>>> {
                batch::entries(data.fd().as_fd())
            }

            fn session(object: &mut Ebpf, key: &SessionKey<Self>) -> Result<Option<Session<Self>>, BpfError> {
                let map = hash_mut::<SessionKey<Self>, Session<Self>>(object, Self::SESSIONS)?;
                match map.get(key, 0) {
                    Ok(value) => Ok(Some(value)),
                    Err(e) if is_absent(&e) => Ok(None),
                    Err(e) => Err(failed("read", Self::SESSIONS)(e)),
                }
            }

            fn remove_session(object: &mut Ebpf, key: &SessionKey<Self>) -> Result<bool, BpfError> {
                let mut map = hash_mut::<SessionKey<Self>, Session<Self>>(object, Self::SESSIONS)?;
                was_there(map.remove(key), Self::SESSIONS)
            }

            fn remove_mapping(object: &mut Ebpf, key: &MappingKey) -> Result<(), BpfError> {
                let mut map = hash_mut::<MappingKey, Mapping<Self>>(object, Self::MAPPINGS)?;
                was_there(map.remove(key), Self::MAPPINGS).map(drop)
            }

            fn restore_mapping(
                object: &mut Ebpf,
                key: &MappingKey,
                mapping: Mapping<Self>,
            ) -> Result<(), BpfError> {
                const BPF_NOEXIST: u64 = 1;
                let mut map = hash_mut::<MappingKey, Mapping<Self>>(object, Self::MAPPINGS)?;
                match map.insert(key, mapping, BPF_NOEXIST) {
                    Err(MapError::SyscallError(call))
                        if call.io_error.raw_os_error() == Some(libc::EEXIST) =>
                    {
                        Ok(())
                    }
                    other => other.map_err(failed("write", Self::MAPPINGS)),
                }
            }
        }
    };
}

maps!(Ipv4, "NAT_SESSIONS", "NAT_MAPPINGS", to_address);
maps!(Ipv6, "NAT6_SESSIONS", "NAT6_MAPPINGS", to_ipv6);

fn was_there(removed: Result<(), MapError>, name: &'static str) -> Result<bool, BpfError> {
    match removed {
        Ok(()) => Ok(true),
        Err(e) if is_absent(&e) => Ok(false),
        Err(e) => Err(failed("write", name)(e)),
    }
}

/// A mapping without a session is one that is being made, unless it is older than this.
const MAKING_NS: u64 = 1_000_000_000;
/// A block is given back when it has been somebody's for longer than this, and is empty.
const BLOCK_MIN_S: u32 = 10;
/// Words of a [`Block`]: its owner is the first.
const BLOCK_WORDS: u32 = 2;

const _: () = assert!(size_of::<Block>() == BLOCK_WORDS as usize * size_of::<u64>());

/// What a sweep did and saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Sessions that were freed.
    pub freed: usize,
    /// Blocks of ports by their first port.
    pub blocks: BTreeMap<u16, PortBlock>,
    /// New flows that found no port, by pod, since the maps were made. Counts from 2^32 on start anew.
    pub refused: BTreeMap<Ipv4Addr, u32>,
}

/// Whose a block of ports is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortBlock {
    /// The pod's private address.
    pub ipv4: Ipv4Addr,
    /// Of an extra: the second of CLOCK_MONOTONIC since which it has it.
    pub since_s: Option<u32>,
}

/// A flow, for people.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// `tcp`, `udp` or `icmp`.
    pub protocol: &'static str,
    /// The pod's private address, of IPv6 flows too.
    pub pod: Ipv4Addr,
    /// The pod's address in this flow.
    pub inside: IpAddr,
    /// Its port, or the identifier of its echo.
    pub inside_port: u16,
    /// The node's address.
    pub outside: IpAddr,
    /// The port there.
    pub outside_port: u16,
    /// The remote's address.
    pub remote: IpAddr,
    /// The remote's port; none for UDP, where a flow is for all ports of a remote, and for ICMP.
    pub remote_port: Option<u16>,
    /// `new`, `established`, `closing` or `closed`; none for UDP and ICMP.
    pub state: Option<&'static str>,
    /// Without a packet it ends after so many seconds.
    pub expires_s: u64,
}

/// What a sweep remembers for the next.
#[derive(Debug, Default)]
pub(super) struct Sweeper {
    /// Ports that have an owner and no mapping, with the owner. Most are being claimed at that moment; those that
    /// still are there the next time were left by an agent that was killed while it freed them.
    suspects: HashSet<(u32, u64)>,
}

impl Sweeper {
    pub(super) fn sweep(&mut self, object: &mut Ebpf, now_ns: u64) -> Result<Swept, BpfError> {
        let ports = words(object, PORTS, PORTS_MAX)?;
        let freed = free_ended::<Ipv4>(object, &ports, now_ns)? + free_ended::<Ipv6>(object, &ports, now_ns)?;
        self.free_left_behind(object, &ports)?;
        let mut swept = sweep_blocks(object, &ports, now_ns)?;
        swept.freed = freed;
        Ok(swept)
    }

    fn free_left_behind(&mut self, object: &Ebpf, ports: &Words) -> Result<(), BpfError> {
        let mut mapped = mapped_ports::<Ipv4>(object)?;
        mapped.extend(mapped_ports::<Ipv6>(object)?);
        let unmapped = (0..PORTS_MAX).map(|index| (index, ports.get(index)));
        let unmapped = unmapped.filter(|(index, owner)| *owner != OWNER_FREE && !mapped.contains(index));
        let suspects: HashSet<(u32, u64)> = unmapped.collect();
        for (index, owner) in suspects.intersection(&self.suspects) {
            ports.replace(*index, *owner, OWNER_FREE);
        }
        self.suspects = suspects;
        Ok(())
    }
}

/// Frees the flows of a family that have ended.
fn free_ended<F: Maps>(object: &mut Ebpf, ports: &Words, now_ns: u64) -> Result<usize, BpfError> {
    let found = Found::<F>::read(object, ports, now_ns)?;
    let mappings = found.ended_mappings(object, now_ns)?;
    let mut freed = 0;
    for key in found.orphans.iter().chain(found.ended_outside_of(&mappings)) {
        freed += usize::from(F::remove_session(object, key)?);
    }
    for (key, mapping) in mappings {
        let sessions = found.ended.get(&key).map(Vec::as_slice).unwrap_or_default();
        freed += free_mapping(object, ports, now_ns, &key, &mapping, sessions)?;
    }
    Ok(freed)
}

/// The ports that mappings lead to.
fn mapped_ports<F: Maps>(object: &Ebpf) -> Result<HashSet<u32>, BpfError> {
    let mappings = F::mappings(object)?;
    Ok(mappings.iter().map(|(key, mapping)| port_index::<F>(key.protocol, mapping.outside_port)).collect())
}

pub(super) fn words(object: &Ebpf, name: &'static str, length: u32) -> Result<Words, BpfError> {
    let data = match map(object, name)? {
        Map::Array(data) => data,
        _ => return Err(BpfError::NoMap(name)),
    };
    Words::map(data.fd(), length).map_err(|e| failed("map", name)(MapError::IoError(e.into())))
}

/// Gives empty extras back; says who has the other blocks, and who was refused a flow.
fn sweep_blocks(object: &Ebpf, ports: &Words, now_ns: u64) -> Result<Swept, BpfError> {
    let blocks = words(object, BLOCKS, BLOCKS_MAX * BLOCK_WORDS)?;
    let config = config(object)?;
    let local: HashSet<Ipv4Addr> = pods(object)?.into_iter().map(to_address).collect();
    let now_s = (now_ns / 1_000_000_000) as u32;
    let mut swept = Swept::default();
    let mut extras: BTreeMap<Ipv4Addr, u16> = BTreeMap::new();
    for block in 0..BLOCKS_MAX {
        let first = (block * BLOCK_PORTS) as u16;
        let owner = blocks.get(block * BLOCK_WORDS);
        let (inside, since_s) = block_owner_inside(owner);
        let is_old = now_s.wrapping_sub(since_s) > BLOCK_MIN_S;
        let given_back = owner != BLOCK_FREE
            && is_old
            && is_empty(ports, block)
            && blocks.replace(block * BLOCK_WORDS, owner, BLOCK_FREE);
        if owner != BLOCK_FREE && !given_back {
            swept.blocks.insert(first, PortBlock { ipv4: to_address(inside), since_s: Some(since_s) });
            *extras.entry(to_address(inside)).or_default() += 1;
        }
        if let Some(ipv4) = pod_at_home(&config, block).filter(|pod| local.contains(pod)) {
            swept.blocks.insert(first, PortBlock { ipv4, since_s: None });
            // `latest`, `extras`, `refused`.
            let count = (blocks.get(block * BLOCK_WORDS + 1) >> 32) as u32;
            swept.refused.extend((count != 0).then_some((ipv4, count)));
        }
    }
    for home in 0..BLOCKS_MAX {
        if let Some(pod) = pod_at_home(&config, home) {
            set_extras(&blocks, home, extras.get(&pod).copied().unwrap_or(0));
        }
    }
    Ok(swept)
}

/// Corrects the number of extras in a home. The programs may change the entry meanwhile; then the next sweep does it.
fn set_extras(blocks: &Words, home: u32, extras: u16) {
    const EXTRAS: u64 = 0xffff_0000;
    let index = home * BLOCK_WORDS + 1;
    let word = blocks.get(index);
    let right = word & !EXTRAS | u64::from(extras) << 16;
    if right != word {
        blocks.replace(index, word, right);
    }
}

fn is_empty(ports: &Words, block: u32) -> bool {
    let all = (0..PORTS_MAX / 65_536).flat_map(|protocol| {
        let first = protocol * 65_536 + block * BLOCK_PORTS;
        first..first + BLOCK_PORTS
    });
    all.map(|index| ports.get(index)).all(|owner| owner == OWNER_FREE)
}

/// The pod whose home a block is.
fn pod_at_home(config: &Config, block: u32) -> Option<Ipv4Addr> {
    let number = config.pool.number(block).filter(|n| *n < u32::from(config.pool.homes))?;
    Some(to_address(config.pod_network | number.to_be()))
}

/// Forgets every flow of a pod that has gone: its address may be another's at once.
pub(super) fn forget(object: &mut Ebpf, inside: u32) -> Result<(), BpfError> {
    let ports = words(object, PORTS, PORTS_MAX)?;
    forget_of::<Ipv4>(object, inside)?;
    forget_of::<Ipv6>(object, inside)?;
    for index in 0..PORTS_MAX {
        let owner = ports.get(index);
        if owner != OWNER_FREE && owner_inside(owner).0 == inside {
            ports.replace(index, owner, OWNER_FREE);
        }
    }
    let blocks = words(object, BLOCKS, BLOCKS_MAX * BLOCK_WORDS)?;
    for index in (0..BLOCKS_MAX).map(|block| block * BLOCK_WORDS) {
        let owner = blocks.get(index);
        if owner != BLOCK_FREE && block_owner_inside(owner).0 == inside {
            blocks.replace(index, owner, BLOCK_FREE);
        }
    }
    Ok(())
}

fn forget_of<F: Maps>(object: &mut Ebpf, inside: u32) -> Result<(), BpfError> {
    for (key, _) in F::mappings(object)?.into_iter().filter(|(key, _)| key.inside == inside) {
        F::remove_mapping(object, &key)?;
    }
    for (key, _) in F::sessions(object)?.into_iter().filter(|(key, _)| key.inside == inside) {
        F::remove_session(object, &key)?;
    }
    Ok(())
}

/// Forgets the sessions that leave with an address that is not the node's any more.
pub(super) fn forget_outside(object: &mut Ebpf, config: &Config) -> Result<usize, BpfError> {
    Ok(forget_outside_of::<Ipv4>(object, config)? + forget_outside_of::<Ipv6>(object, config)?)
}

fn forget_outside_of<F: Maps>(object: &mut Ebpf, config: &Config) -> Result<usize, BpfError> {
    let sessions = F::sessions(object)?;
    let gone = sessions.into_iter().filter(|(_, session)| !F::is_node(config, session.outside));
    let gone: Vec<SessionKey<F>> = gone.map(|(key, _)| key).collect();
    for key in &gone {
        F::remove_session(object, key)?;
    }
    Ok(gone.len())
}

/// Every flow that has not ended, from the pinned maps: needs no agent.
pub(super) fn list(pins: &Path, now_ns: u64) -> Result<Vec<Flow>, BpfError> {
    let mut flows = list_of::<Ipv4>(pins, now_ns, &|inside| Some(to_address(inside).into()))?;
    let pods: Pods6 = pinned_pods(pins)?;
    flows.extend(list_of::<Ipv6>(pins, now_ns, &|inside| pods.get(&inside).map(|pod| (*pod).into()))?);
    flows.sort();
    Ok(flows)
}

/// The addresses of pods by their private ones.
type Pods6 = BTreeMap<u32, Ipv6Addr>;

fn pinned_pods(pins: &Path) -> Result<Pods6, BpfError> {
    let Some(data) = pinned_map(pins, "PODS")? else { return Ok(Pods6::new()) };
    let pods = batch::entries::<u32, PodLink>(data.fd().as_fd());
    let pods = pods.map_err(|e| failed("read", "PODS")(MapError::IoError(e)))?;
    Ok(pods.into_iter().map(|(inside, link)| (inside, to_ipv6(link.ipv6))).collect())
}

fn pinned_map(pins: &Path, name: &'static str) -> Result<Option<MapData>, BpfError> {
    let pin = pins.join(name);
    if !pin.exists() {
        return Ok(None);
    }
    MapData::from_pin(&pin).map(Some).map_err(failed("open", name))
}

/// Flows of pods that have gone are left out.
fn list_of<F: Maps>(
    pins: &Path,
    now_ns: u64,
    address: &impl Fn(u32) -> Option<IpAddr>,
) -> Result<Vec<Flow>, BpfError> {
    let Some(data) = pinned_map(pins, F::SESSIONS)? else { return Ok(Vec::new()) };
    let sessions = F::pinned(&data).map_err(|e| failed("read", F::SESSIONS)(MapError::IoError(e)))?;
    let live = sessions
        .iter()
        .filter(|(key, session)| !expired(now_ns, key, session) && session.state != State::ADMITS);
    let flows = live.filter_map(|(key, session)| Some(flow(key, session, now_ns, address(key.inside)?)));
    Ok(flows.collect())
}

/// Whose port it is now, from the pinned maps: the pod's address and the first port of its block.
pub(super) fn holder(pins: &Path, port: u16) -> Result<Option<(Ipv4Addr, u16)>, BpfError> {
    let (pin, block) = (pins.join(BLOCKS), u32::from(port) / BLOCK_PORTS);
    if !pin.exists() {
        return Ok(None);
    }
    let config = pinned_element::<Config>(pins, "MASQUERADE", 0)?;
    let first = (block * BLOCK_PORTS) as u16;
    if let Some(pod) = pod_at_home(&config, block) {
        return Ok(Some((pod, first)));
    }
    let owner = pinned_element::<Block>(pins, BLOCKS, block)?.owner;
    Ok((owner != BLOCK_FREE).then(|| (to_address(block_owner_inside(owner).0), first)))
}

fn pinned_element<V: aya::Pod>(pins: &Path, name: &'static str, index: u32) -> Result<V, BpfError> {
    let data = MapData::from_pin(pins.join(name)).map_err(failed("open", name))?;
    let array: Array<_, V> = Array::try_from(Map::Array(data)).map_err(failed("open", name))?;
    array.get(&index, 0).map_err(failed("read", name))
}

fn flow<F: Maps>(key: &SessionKey<F>, session: &Session<F>, now_ns: u64, inside: IpAddr) -> Flow {
    let protocol = match key.protocol {
        ipv4::TCP => "tcp",
        ipv4::UDP => "udp",
        _ => "icmp",
    };
    let is_tcp = key.protocol == ipv4::TCP;
    let idle_ns = now_ns.saturating_sub(session.last_seen_ns);
    Flow {
        protocol,
        pod: to_address(key.inside),
        inside,
        inside_port: u16::from_be(key.inside_port),
        outside: F::ip(session.outside),
        outside_port: u16::from_be(session.outside_port),
        remote: F::ip(key.remote),
        remote_port: is_tcp.then(|| u16::from_be(key.remote_port)),
        state: is_tcp.then(|| state(session.state)),
        expires_s: timeout_ns(key, session.state).saturating_sub(idle_ns) / 1_000_000_000,
    }
}

fn state(state: State) -> &'static str {
    match state {
        state if state.is_closed() => "closed",
        state if state.is_established() => "established",
        state if state.is_closing() => "closing",
        _ => "new",
    }
}

/// What the sessions say of their mappings.
struct Found<F: Family> {
    /// Mappings with a session that lives.
    live: HashSet<MappingKey>,
    /// Sessions that have ended, by mapping.
    ended: BTreeMap<MappingKey, Vec<SessionKey<F>>>,
    /// Sessions whose port is another's: no reply finds them, and their next packet makes a better one.
    orphans: Vec<SessionKey<F>>,
}

impl<F: Maps> Found<F> {
    fn read(object: &Ebpf, ports: &Words, now_ns: u64) -> Result<Found<F>, BpfError> {
        let mut found = Found { live: HashSet::new(), ended: BTreeMap::new(), orphans: Vec::new() };
        for (key, session) in F::sessions(object)? {
            let owner = ports.get(port_index::<F>(key.protocol, session.outside_port));
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
        mappings: &'a BTreeMap<MappingKey, Mapping<F>>,
    ) -> impl Iterator<Item = &'a SessionKey<F>> {
        self.ended.iter().filter(|(key, _)| !mappings.contains_key(key)).flat_map(|(_, keys)| keys)
    }

    /// Mappings of which no session lives.
    fn ended_mappings(
        &self,
        object: &Ebpf,
        now_ns: u64,
    ) -> Result<BTreeMap<MappingKey, Mapping<F>>, BpfError> {
        let mut mappings = F::mappings(object)?;
        mappings.retain(|(key, mapping)| {
            !self.live.contains(key) && now_ns.saturating_sub(mapping.created_ns) > MAKING_NS
        });
        Ok(mappings.into_iter().collect())
    }
}

/// Removes the mapping, its sessions, and frees its port.
fn free_mapping<F: Maps>(
    object: &mut Ebpf,
    ports: &Words,
    now_ns: u64,
    key: &MappingKey,
    mapping: &Mapping<F>,
    ended: &[SessionKey<F>],
) -> Result<usize, BpfError> {
    let index = port_index::<F>(key.protocol, mapping.outside_port);
    let owner = ports.get(index);
    F::remove_mapping(object, key)?;
    let (mut freed, mut revived) = (0, false);
    for session_key in ended {
        match F::session(object, session_key)? {
            Some(session) if !expired(now_ns, session_key, &session) => revived = true,
            Some(_) => freed += usize::from(F::remove_session(object, session_key)?),
            None => {}
        }
    }
    if revived {
        // A packet revived a session of the mapping: both stay.
        F::restore_mapping(object, key, Mapping { shared: 1, ..*mapping })?;
        return Ok(freed);
    }
    if is_owned_by(owner, key.inside, key.inside_port) {
        ports.replace(index, owner, OWNER_FREE);
    }
    Ok(freed)
}
