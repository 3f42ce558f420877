//! The maps that the agent writes and the programs read: pods, guards, masquerade.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    path::Path,
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key},
};
use dataplane_common::{
    guard::{Entry, GUARD_MAX},
    ipv6::Address,
    masquerade::{Config, DIRECT_MAX, Direct, NODES_MAX, PODS6_MAX, Pool, SOURCES_MAX, Source},
    ndp::{NDP_PODS_MAX, PodMac},
    pod_link::{PODS_MAX, PodLink},
};
use dataplane_core::{Exit, Filtering, Masquerade};
use ipnetwork::{Ipv4Network, Ipv6Network};

use super::{BpfError, GuardEntry, batch, flows};

const NDP_PODS: &str = "NDP_PODS";
const GUARD: &str = "GUARD";
const PODS: &str = "PODS";
const MASQUERADE: &str = "MASQUERADE";
const SOURCES: &str = "NAT_SOURCES";
const PODS6: &str = "PODS6";
const DIRECT: &str = "NAT6_DIRECT";

pub(super) fn map<'a>(object: &'a Ebpf, name: &'static str) -> Result<&'a Map, BpfError> {
    object.map(name).ok_or(BpfError::NoMap(name))
}

pub(super) fn map_mut<'a>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Map, BpfError> {
    object.map_mut(name).ok_or(BpfError::NoMap(name))
}

/// Names map and action in an error.
pub(super) fn failed(action: &'static str, map: &'static str) -> impl Fn(MapError) -> BpfError {
    move |source| BpfError::Map { action, map, source: Box::new(source) }
}

pub(super) fn hash_mut<'a, K: Pod, V: Pod>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<HashMap<&'a mut MapData, K, V>, BpfError> {
    HashMap::try_from(map_mut(object, name)?).map_err(failed("open", name))
}

/// All entries of a hash map.
pub(super) fn entries<K: Pod, V: Pod>(object: &Ebpf, name: &'static str) -> Result<Vec<(K, V)>, BpfError> {
    let found = map(object, name)?;
    // The sizes of keys and values are the map's.
    HashMap::<_, K, V>::try_from(found).map_err(failed("open", name))?;
    let Map::HashMap(data) = found else { return Err(BpfError::NoMap(name)) };
    batch::entries(data.fd().as_fd()).map_err(|e| failed("read", name)(MapError::IoError(e)))
}

fn insert<K: Pod, V: Pod>(
    object: &mut Ebpf,
    name: &'static str,
    capacity: u32,
    key: K,
    value: V,
) -> Result<(), BpfError> {
    hash_mut::<K, V>(object, name)?.insert(key, value, 0).map_err(|e| match &e {
        MapError::SyscallError(call) if call.io_error.raw_os_error() == Some(libc::E2BIG) => {
            BpfError::MapFull { map: name, capacity }
        }
        _ => failed("write", name)(e),
    })
}

fn remove<K: Pod, V: Pod>(object: &mut Ebpf, name: &'static str, key: K) -> Result<(), BpfError> {
    match hash_mut::<K, V>(object, name)?.remove(&key) {
        Err(e) if !is_absent(&e) => Err(failed("write", name)(e)),
        _ => Ok(()),
    }
}

/// Whether the error says that there is no such key.
pub(super) fn is_absent(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(call) => call.io_error.raw_os_error() == Some(libc::ENOENT),
        _ => false,
    }
}

pub(super) fn local_pods(object: &Ebpf) -> Result<BTreeMap<Ipv6Addr, [u8; 6]>, BpfError> {
    let pods = entries::<Address, PodMac>(object, NDP_PODS)?;
    Ok(pods.into_iter().map(|(pod, mac)| (Ipv6Addr::from(pod.octets()), mac.mac)).collect())
}

pub(super) fn set_local_pod(object: &mut Ebpf, pod: Ipv6Addr, mac: [u8; 6]) -> Result<(), BpfError> {
    let key = Address::new(pod.octets());
    insert(object, NDP_PODS, NDP_PODS_MAX, key, PodMac { mac, zero: [0; 2] })
}

pub(super) fn remove_local_pod(object: &mut Ebpf, pod: Ipv6Addr) -> Result<(), BpfError> {
    remove::<_, PodMac>(object, NDP_PODS, Address::new(pod.octets()))
}

pub(super) fn guards(object: &Ebpf) -> Result<BTreeMap<u32, GuardEntry>, BpfError> {
    let links: BTreeMap<u32, PodLink> = entries(object, PODS)?.into_iter().collect();
    let numbers: BTreeMap<Address, u32> = entries(object, PODS6)?.into_iter().collect();
    let mut guards = entries::<u32, Entry>(object, GUARD)?;
    // One that others cannot find is as good as none: it is set anew.
    guards.retain(|(ifindex, entry)| {
        links.get(&entry.ipv4) == Some(&link(*ifindex, entry))
            && numbers.get(&entry.ipv6) == Some(&entry.ipv4)
    });
    Ok(guards.into_iter().map(|(ifindex, entry)| (ifindex, from_entry(entry))).collect())
}

/// The private addresses of the pods that are here.
pub(super) fn pods(object: &Ebpf) -> Result<Vec<u32>, BpfError> {
    Ok(entries::<u32, PodLink>(object, PODS)?.into_iter().map(|(address, _)| address).collect())
}

fn link(ifindex: u32, entry: &Entry) -> PodLink {
    PodLink { ipv6: entry.ipv6, ifindex, pod_mac: entry.pod_mac, host_mac: entry.host_mac }
}

pub(super) fn set_guard(object: &mut Ebpf, ifindex: u32, entry: GuardEntry) -> Result<(), BpfError> {
    let entry = to_entry(entry);
    insert(object, PODS, PODS_MAX, entry.ipv4, link(ifindex, &entry))?;
    insert(object, PODS6, PODS6_MAX, entry.ipv6, entry.ipv4)?;
    insert(object, GUARD, GUARD_MAX, ifindex, entry)
}

/// With its guard a pod loses its flows: its address may be another's at once.
pub(super) fn remove_guard(object: &mut Ebpf, ifindex: u32) -> Result<(), BpfError> {
    let guards = entries::<u32, Entry>(object, GUARD)?;
    let entry = guards.into_iter().find(|(index, _)| *index == ifindex).map(|(_, entry)| entry);
    remove::<_, Entry>(object, GUARD, ifindex)?;
    let Some(Entry { ipv4, ipv6, .. }) = entry else { return Ok(()) };
    let links = entries::<u32, PodLink>(object, PODS)?;
    if links.into_iter().any(|(address, link)| address == ipv4 && link.ifindex == ifindex) {
        remove::<_, PodLink>(object, PODS, ipv4)?;
        if entries::<Address, u32>(object, PODS6)?.contains(&(ipv6, ipv4)) {
            remove::<_, u32>(object, PODS6, ipv6)?;
        }
        flows::forget(object, ipv4)?;
    }
    Ok(())
}

fn wire(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

pub(super) fn to_address(wire: u32) -> Ipv4Addr {
    Ipv4Addr::from(wire.to_ne_bytes())
}

/// A mask in wire order that the agent wrote: ones, then zeros.
fn network(network: u32, mask: u32) -> Ipv4Network {
    let prefix = u32::from_be(mask).leading_ones() as u8;
    Ipv4Network::new(to_address(network), prefix).expect("a prefix of 0 to 32 bits is valid")
}

fn to_entry(entry: GuardEntry) -> Entry {
    Entry {
        ipv6: Address::new(entry.ipv6.octets()),
        ipv4: wire(entry.ipv4),
        pod_network: wire(entry.pod_ipv4.network()),
        pod_mask: wire(entry.pod_ipv4.mask()),
        pod_mac: entry.pod_mac,
        host_mac: entry.host_mac,
    }
}

fn from_entry(entry: Entry) -> GuardEntry {
    GuardEntry {
        ipv6: Ipv6Addr::from(entry.ipv6.octets()),
        ipv4: to_address(entry.ipv4),
        pod_ipv4: network(entry.pod_network, entry.pod_mask),
        pod_mac: entry.pod_mac,
        host_mac: entry.host_mac,
    }
}

fn config_array(object: &Ebpf) -> Result<Array<&MapData, Config>, BpfError> {
    Array::try_from(map(object, MASQUERADE)?).map_err(failed("open", MASQUERADE))
}

/// What the programs go by, as it lies in the map.
pub(super) fn config(object: &Ebpf) -> Result<Config, BpfError> {
    config_array(object)?.get(&0, 0).map_err(failed("read", MASQUERADE))
}

pub(super) fn masquerade(object: &Ebpf) -> Result<Option<Masquerade>, BpfError> {
    let config = config(object)?;
    if config.enabled == 0 && config.exit == 0 {
        return Ok(None);
    }
    let sources = sources(object)?.into_iter().map(|(key, source)| {
        let prefix = Ipv4Network::new(to_address(key.data()), key.prefix_len() as u8);
        (prefix.expect("the agent wrote it"), to_address(source.address))
    });
    Ok(Some(Masquerade {
        node_ipv4: (config.enabled != 0).then(|| to_address(config.nodes[0])),
        sources: sources.collect(),
        pod_ipv4: network(config.pod_network, config.pod_mask),
        filtering: match config.filtering {
            Config::ENDPOINT_INDEPENDENT => Filtering::EndpointIndependent,
            _ => Filtering::AddressDependent,
        },
        exit: if config.exit == 0 { None } else { Some(exit(object, &config)?) },
    }))
}

fn exit(object: &Ebpf, config: &Config) -> Result<Exit, BpfError> {
    let pods = Address([config.pods6, 0]);
    let direct = direct(object)?.into_iter().map(|key| {
        let prefix = Ipv6Network::new(to_ipv6(key.data()), key.prefix_len() as u8);
        prefix.expect("the agent wrote it")
    });
    Ok(Exit {
        node: (!config.node6.is_unspecified()).then(|| to_ipv6(config.node6)),
        pods: Ipv6Network::new(to_ipv6(pods), 64).expect("64 is at most 128"),
        direct: direct.collect(),
    })
}

pub(super) fn to_ipv6(address: Address) -> Ipv6Addr {
    Ipv6Addr::from(address.octets())
}

fn direct(object: &Ebpf) -> Result<Vec<Key<Address>>, BpfError> {
    let trie: LpmTrie<_, Address, Direct> =
        LpmTrie::try_from(map(object, DIRECT)?).map_err(failed("open", DIRECT))?;
    trie.keys().collect::<Result<_, _>>().map_err(failed("read", DIRECT))
}

/// Further prefixes than there is room for are reached translated.
fn set_direct(object: &mut Ebpf, wanted: &BTreeSet<Ipv6Network>) -> Result<(), BpfError> {
    let keys: Vec<Key<Address>> = wanted
        .iter()
        .take(DIRECT_MAX as usize)
        .map(|prefix| Key::new(u32::from(prefix.prefix()), Address::new(prefix.network().octets())))
        .collect();
    let old = direct(object)?;
    let mut trie: LpmTrie<_, Address, Direct> =
        LpmTrie::try_from(map_mut(object, DIRECT)?).map_err(failed("open", DIRECT))?;
    let same = |a: &Key<Address>, b: &Key<Address>| (a.prefix_len(), a.data()) == (b.prefix_len(), b.data());
    for key in old.iter().filter(|key| !keys.iter().any(|new| same(new, key))) {
        trie.remove(key).map_err(failed("write", DIRECT))?;
    }
    keys.iter().try_for_each(|key| trie.insert(key, Direct { zero: 0 }, 0).map_err(failed("write", DIRECT)))
}

fn sources(object: &Ebpf) -> Result<Vec<(Key<u32>, Source)>, BpfError> {
    let trie: LpmTrie<_, u32, Source> =
        LpmTrie::try_from(map(object, SOURCES)?).map_err(failed("open", SOURCES))?;
    trie.iter().collect::<Result<_, _>>().map_err(failed("read", SOURCES))
}

/// Addresses that are no longer the node's lose their flows.
pub(super) fn set_masquerade(object: &mut Ebpf, masquerade: Option<&Masquerade>) -> Result<(), BpfError> {
    let config = masquerade.map_or(Ok(Config::OFF), enabled)?;
    let wanted: BTreeMap<Ipv4Network, Ipv4Addr> =
        masquerade.map(|masquerade| masquerade.sources.clone()).unwrap_or_default();
    set_sources(object, &config, &wanted)?;
    let exit = masquerade.and_then(|masquerade| masquerade.exit.as_ref());
    // Before packets are held to it.
    set_direct(object, &exit.map(|exit| exit.direct.clone()).unwrap_or_default())?;
    let mut array: Array<_, Config> =
        Array::try_from(map_mut(object, MASQUERADE)?).map_err(failed("open", MASQUERADE))?;
    array.set(0, config, 0).map_err(failed("write", MASQUERADE))?;
    if masquerade.is_some() {
        let ended = flows::forget_outside(object, &config)?;
        if ended > 0 {
            tracing::info!(ended, "masquerade flows have ended with the address that they left with");
        }
    }
    Ok(())
}

/// A prefix whose address has no place in the configuration sees the first address.
fn set_sources(
    object: &mut Ebpf,
    config: &Config,
    wanted: &BTreeMap<Ipv4Network, Ipv4Addr>,
) -> Result<(), BpfError> {
    let known = wanted.iter().filter(|(_, address)| config.is_node(wire(**address)));
    let entries: Vec<(Key<u32>, Source)> = known
        .take(SOURCES_MAX as usize)
        .map(|(prefix, address)| {
            let key = Key::new(u32::from(prefix.prefix()), wire(prefix.network()));
            (key, Source { address: wire(*address) })
        })
        .collect();
    let old = sources(object)?;
    let mut trie: LpmTrie<_, u32, Source> =
        LpmTrie::try_from(map_mut(object, SOURCES)?).map_err(failed("open", SOURCES))?;
    let same = |a: &Key<u32>, b: &Key<u32>| (a.prefix_len(), a.data()) == (b.prefix_len(), b.data());
    for (key, _) in old.iter().filter(|(key, _)| !entries.iter().any(|(new, _)| same(new, key))) {
        trie.remove(key).map_err(failed("write", SOURCES))?;
    }
    entries.iter().try_for_each(|(key, source)| trie.insert(key, source, 0).map_err(failed("write", SOURCES)))
}

fn enabled(masquerade: &Masquerade) -> Result<Config, BpfError> {
    let (min, max) = host_ports()?;
    let exit = masquerade.exit.as_ref();
    let mut nodes = [0; NODES_MAX];
    let mut all: Vec<u32> = masquerade.node_ipv4.map(wire).into_iter().collect();
    for address in masquerade.sources.values().map(|address| wire(*address)) {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    for (place, address) in nodes.iter_mut().zip(all) {
        *place = address;
    }
    Ok(Config {
        nodes,
        pod_network: wire(masquerade.pod_ipv4.network()),
        pod_mask: wire(masquerade.pod_ipv4.mask()),
        pool: Pool::beside(min, max),
        filtering: match masquerade.filtering {
            Filtering::AddressDependent => Config::ADDRESS_DEPENDENT,
            Filtering::EndpointIndependent => Config::ENDPOINT_INDEPENDENT,
        },
        enabled: masquerade.node_ipv4.is_some().into(),
        node6: exit.and_then(|exit| exit.node).map_or(Address::UNSPECIFIED, |ip| Address::new(ip.octets())),
        pods6: exit.map_or(0, |exit| Address::new(exit.pods.network().octets()).0[0]),
        exit: exit.is_some().into(),
        zero: 0,
    })
}

/// The ports that the host gives to its own sockets, in the network namespace of this thread.
fn host_ports() -> Result<(u16, u16), BpfError> {
    let path = Path::new("/proc/sys/net/ipv4/ip_local_port_range");
    let text = fs::read_to_string(path).map_err(|source| BpfError::Path {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    let mut numbers = text.split_whitespace().filter_map(|n| n.parse().ok());
    Ok((numbers.next().unwrap_or(32_768), numbers.next().unwrap_or(60_999)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_entry_comes_back_as_it_went() {
        let entry = GuardEntry {
            ipv6: "fd00::1:2".parse().unwrap(),
            ipv4: Ipv4Addr::new(10, 254, 0, 9),
            pod_ipv4: "10.254.0.0/20".parse().unwrap(),
            pod_mac: [2, 1, 2, 3, 4, 5],
            host_mac: [6, 1, 2, 3, 4, 5],
        };
        assert_eq!(from_entry(to_entry(entry)), entry);
    }

    #[test]
    fn networks_of_every_length_come_back() {
        for prefix in 0..=32 {
            let net = Ipv4Network::new(Ipv4Addr::new(10, 254, 129, 77), prefix).unwrap();
            let back = network(wire(net.network()), wire(net.mask()));
            assert_eq!((back.network(), back.prefix()), (net.network(), prefix));
        }
    }
}
