//! The maps that the agent writes and the programs read: pods, guards, masquerade.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    path::Path,
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use dataplane_common::{
    guard::{Entry, GUARD_MAX},
    ipv6::Address,
    masquerade::Config,
    ndp::{NDP_PODS_MAX, PodMac},
};
use ipnetwork::Ipv4Network;

use super::{BpfError, GuardEntry, MasqueradeConfig, batch};

const NDP_PODS: &str = "NDP_PODS";
const GUARD: &str = "GUARD";
const MASQUERADE: &str = "MASQUERADE";

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
    let guards = entries::<u32, Entry>(object, GUARD)?;
    Ok(guards.into_iter().map(|(ifindex, entry)| (ifindex, from_entry(entry))).collect())
}

pub(super) fn set_guard(object: &mut Ebpf, ifindex: u32, entry: GuardEntry) -> Result<(), BpfError> {
    insert(object, GUARD, GUARD_MAX, ifindex, to_entry(entry))
}

pub(super) fn remove_guard(object: &mut Ebpf, ifindex: u32) -> Result<(), BpfError> {
    remove::<_, Entry>(object, GUARD, ifindex)
}

fn wire(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

fn address(wire: u32) -> Ipv4Addr {
    Ipv4Addr::from(wire.to_ne_bytes())
}

/// A mask in wire order that the agent wrote: ones, then zeros.
fn network(network: u32, mask: u32) -> Ipv4Network {
    let prefix = u32::from_be(mask).leading_ones() as u8;
    Ipv4Network::new(address(network), prefix).expect("a prefix of 0 to 32 bits is valid")
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
        ipv4: address(entry.ipv4),
        pod_ipv4: network(entry.pod_network, entry.pod_mask),
        pod_mac: entry.pod_mac,
        host_mac: entry.host_mac,
    }
}

fn config_array(object: &Ebpf) -> Result<Array<&MapData, Config>, BpfError> {
    Array::try_from(map(object, MASQUERADE)?).map_err(failed("open", MASQUERADE))
}

pub(super) fn masquerade_config(object: &Ebpf) -> Result<Option<MasqueradeConfig>, BpfError> {
    let config = config_array(object)?.get(&0, 0).map_err(failed("read", MASQUERADE))?;
    Ok((config.enabled != 0).then(|| MasqueradeConfig {
        node_ipv4: address(config.node),
        pod_ipv4: network(config.pod_network, config.pod_mask),
    }))
}

pub(super) fn set_masquerade_config(
    object: &mut Ebpf,
    config: Option<MasqueradeConfig>,
) -> Result<(), BpfError> {
    let config = match config {
        Some(config) => enabled(config)?,
        None => {
            Config { node: 0, pod_network: 0, pod_mask: 0, host_ports_min: 0, host_ports_max: 0, enabled: 0 }
        }
    };
    let mut array: Array<_, Config> =
        Array::try_from(map_mut(object, MASQUERADE)?).map_err(failed("open", MASQUERADE))?;
    array.set(0, config, 0).map_err(failed("write", MASQUERADE))
}

fn enabled(config: MasqueradeConfig) -> Result<Config, BpfError> {
    let (host_ports_min, host_ports_max) = host_ports()?;
    Ok(Config {
        node: wire(config.node_ipv4),
        pod_network: wire(config.pod_ipv4.network()),
        pod_mask: wire(config.pod_ipv4.mask()),
        host_ports_min,
        host_ports_max,
        enabled: 1,
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
