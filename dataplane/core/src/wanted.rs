//! Every object that follows from a [`Desired`]: the complete list of what Hextet puts into a kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use hextet_address::PodLink;
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::{
    Address, Desired, Exit, GATEWAY, Guard, Hop, Ipv6Exit, Link, Mac, Masquerade, MasqueradeBackend,
    NdpBackend, Neighbour, NftExit, NftTable, Observed, POD_IF, Pod, Program, Route, Stack,
    UNREACHABLE_METRIC,
};

/// What the kernel gives an IPv6 route without a metric. Written out, so that what is read back is equal.
const IPV6_METRIC: u32 = 1024;

/// MTU of pods' links while there is no uplink to take it from.
const MTU_BYTES_WITHOUT_UPLINK: u32 = 1500;

/// The least that a link of IPv6 carries (RFC 8200 section 5): the kernel takes IPv6 off a device with less.
const MTU_BYTES_MIN: u32 = 1280;

pub(crate) struct Wanted {
    /// In the order in which they must be set.
    pub(crate) sysctls: Vec<(String, String)>,
    pub(crate) routes: BTreeSet<Route>,
    pub(crate) addresses: BTreeSet<Address>,
    pub(crate) nft: Option<NftTable>,
    pub(crate) nft_exit: Option<NftExit>,
    pub(crate) attachments: BTreeSet<(Program, String)>,
    pub(crate) masquerade: Option<Masquerade>,
    pub(crate) pods: BTreeMap<String, WantedPod>,
}

pub(crate) struct WantedPod {
    pub(crate) dev: String,
    pub(crate) link: Link,
    pub(crate) host: Stack,
    pub(crate) eth0: Link,
    pub(crate) inside: Stack,
    pub(crate) guard: Option<Guard>,
    pub(crate) ndp: Option<(Ipv6Addr, Mac)>,
    pub(crate) proxy: Option<(String, Ipv6Addr)>,
}

impl Wanted {
    pub(crate) fn of(desired: &Desired, observed: &Observed) -> Self {
        let pods = desired
            .pods
            .iter()
            .map(|(id, pod)| (id.clone(), WantedPod::of(desired, observed, id, pod)))
            .collect();
        Self {
            sysctls: node_sysctls(desired, observed),
            routes: node_routes(desired),
            addresses: BTreeSet::from([join(desired)]),
            nft: nft(desired, observed),
            nft_exit: nft_exit(desired),
            attachments: uplink_programs(desired),
            masquerade: masquerade(desired),
            pods,
        }
    }

    /// What a node wants that is to leave nothing.
    pub(crate) fn nothing() -> Self {
        Self {
            sysctls: Vec::new(),
            routes: BTreeSet::new(),
            addresses: BTreeSet::new(),
            nft: None,
            nft_exit: None,
            attachments: BTreeSet::new(),
            masquerade: None,
            pods: BTreeMap::new(),
        }
    }

    /// Whether some pod has `dev`.
    pub(crate) fn has_link(&self, dev: &str) -> bool {
        self.pods.values().any(|pod| pod.dev == dev)
    }

    /// The node's routes and all pods' routes.
    pub(crate) fn all_routes(&self) -> BTreeSet<Route> {
        self.routes.iter().chain(self.pods.values().flat_map(|pod| &pod.host.routes)).cloned().collect()
    }

    /// The node's addresses and those of all pods' host sides.
    pub(crate) fn all_addresses(&self) -> BTreeSet<Address> {
        self.addresses.iter().chain(self.pods.values().flat_map(|pod| &pod.host.addresses)).cloned().collect()
    }

    /// All pods as the node's neighbours.
    pub(crate) fn all_neighbours(&self) -> BTreeSet<Neighbour> {
        self.pods.values().flat_map(|pod| &pod.host.neighbours).cloned().collect()
    }

    /// Every program with its device.
    pub(crate) fn all_attachments(&self) -> BTreeSet<(Program, String)> {
        let guards = self
            .pods
            .values()
            .filter(|pod| pod.guard.is_some())
            .map(|pod| (Program::PodGuard, pod.dev.clone()));
        self.attachments.iter().cloned().chain(guards).collect()
    }
}

impl WantedPod {
    fn of(desired: &Desired, observed: &Observed, id: &str, pod: &Pod) -> Self {
        let names = PodLink::of(pod.address);
        let dev = names.host_if();
        let (host_mac, pod_mac) = (Mac(names.host_mac()), Mac(names.pod_mac()));
        let uplink_mtu_bytes = observed.uplink.map_or(MTU_BYTES_WITHOUT_UPLINK, |uplink| uplink.mtu_bytes);
        let mtu_bytes = uplink_mtu_bytes.max(MTU_BYTES_MIN);
        let link =
            Link { mac: host_mac, mtu_bytes, up: true, addrgen_none: true, alias: Some(id.to_owned()) };
        let guard = observed.bpf.is_some().then_some(Guard {
            ipv6: pod.address,
            ipv4: pod.ipv4,
            pod_ipv4: desired.pod_ipv4,
            pod_mac,
            host_mac,
        });
        let uplink_mac = observed.uplink.map(|uplink| uplink.mac);
        Self {
            host: host_stack(&dev, pod, pod_mac, observed.force_forwarding),
            eth0: Link { mac: pod_mac, alias: None, ..link.clone() },
            link,
            inside: inside_stack(pod, host_mac),
            guard,
            ndp: uplink_mac.filter(|_| desired.ndp == NdpBackend::Ebpf).map(|mac| (pod.address, mac)),
            proxy: (desired.ndp == NdpBackend::Kernel).then(|| (desired.uplink.name.clone(), pod.address)),
            dev,
        }
    }
}

fn host_stack(dev: &str, pod: &Pod, pod_mac: Mac, force_forwarding: bool) -> Stack {
    let direct = |address: IpAddr| Route {
        destination: address.into(),
        metric: if address.is_ipv6() { IPV6_METRIC } else { 0 },
        hop: Hop::Dev(dev.to_owned()),
    };
    let neighbour = |address: IpAddr| Neighbour { dev: dev.to_owned(), address, mac: pod_mac };
    let both = [IpAddr::from(pod.ipv4), IpAddr::from(pod.address)];
    Stack {
        addresses: BTreeSet::from([Address {
            dev: dev.to_owned(),
            network: Ipv6Network::new(GATEWAY, 64).expect("64 is at most 128").into(),
        }]),
        routes: both.map(direct).into(),
        neighbours: both.map(neighbour).into(),
        sysctls: veth_sysctls(dev, force_forwarding),
    }
}

fn inside_stack(pod: &Pod, host_mac: Mac) -> Stack {
    let default = |destination: IpNetwork, metric| Route {
        destination,
        metric,
        hop: Hop::Via { gateway: GATEWAY.into(), dev: POD_IF.to_owned() },
    };
    let own = |address: IpAddr| Address { dev: POD_IF.to_owned(), network: IpNetwork::from(address) };
    Stack {
        addresses: BTreeSet::from([own(pod.address.into()), own(pod.ipv4.into())]),
        routes: BTreeSet::from([default(any_ipv6(), IPV6_METRIC), default(any_ipv4(), 0)]),
        neighbours: BTreeSet::from([Neighbour {
            dev: POD_IF.to_owned(),
            address: GATEWAY.into(),
            mac: host_mac,
        }]),
        sysctls: pod_sysctls(),
    }
}

fn any_ipv6() -> IpNetwork {
    Ipv6Network::new(Ipv6Addr::UNSPECIFIED, 0).expect("0 is a length").into()
}

fn any_ipv4() -> IpNetwork {
    Ipv4Network::new(Ipv4Addr::UNSPECIFIED, 0).expect("0 is a length").into()
}

fn node_routes(desired: &Desired) -> BTreeSet<Route> {
    let own = desired.is_routed(desired.node).then_some(desired.node);
    let ranges = own.into_iter().chain([desired.cluster]).map(IpNetwork::from);
    let unreachable = ranges.chain([desired.pod_ipv4.into()]).map(|destination| Route {
        destination,
        metric: UNREACHABLE_METRIC,
        hop: Hop::Unreachable,
    });
    let peers = desired.peers.iter().filter(|(prefix, _)| desired.is_routed(**prefix));
    let peers = peers.filter(|(prefix, _)| **prefix != desired.node);
    let peers = peers.map(|(prefix, gateway)| Route {
        destination: (*prefix).into(),
        metric: IPV6_METRIC,
        hop: Hop::Via { gateway: (*gateway).into(), dev: desired.uplink.name.clone() },
    });
    unreachable.chain(peers).collect()
}

/// A join that outlives the agent: the kernel holds it with the address.
fn join(desired: &Desired) -> Address {
    Address {
        dev: desired.uplink.name.clone(),
        network: IpNetwork::from(IpAddr::from(desired.group.multicast())),
    }
}

/// A machine without nftables has no backstop; one that is to masquerade with it fails and says so.
fn nft(desired: &Desired, observed: &Observed) -> Option<NftTable> {
    let (uplink, pod_ipv4) = (desired.uplink.name.clone(), desired.pod_ipv4);
    match desired.masquerade {
        MasqueradeBackend::Nftables => Some(NftTable::Masquerade { uplink, pod_ipv4 }),
        MasqueradeBackend::Ebpf => observed.has_nft.then(|| NftTable::Backstop {
            uplink: masquerade(desired).is_some_and(|it| it.node_ipv4.is_some()).then_some(uplink),
            pod_ipv4,
        }),
    }
}

fn nft_exit(desired: &Desired) -> Option<NftExit> {
    let exit = exit(desired).filter(|_| desired.masquerade == MasqueradeBackend::Nftables)?;
    Some(NftExit::Rules {
        uplink: desired.uplink.name.clone(),
        pods: exit.pods,
        direct: exit.direct,
        masquerade: exit.node.is_some(),
    })
}

fn masquerade(desired: &Desired) -> Option<Masquerade> {
    if desired.masquerade != MasqueradeBackend::Ebpf {
        return None;
    }
    let (node_ipv4, exit) = (desired.uplink.ipv4, exit(desired));
    (node_ipv4.is_some() || exit.is_some()).then(|| Masquerade {
        node_ipv4,
        sources: desired.uplink.sources.clone(),
        pod_ipv4: desired.pod_ipv4,
        filtering: desired.filtering,
        exit,
    })
}

/// With unique local addresses pods get nowhere on the IPv6 internet; global ones are good as they are.
fn exit(desired: &Desired) -> Option<Exit> {
    let is_on = match desired.ipv6_exit {
        Ipv6Exit::Auto => desired.node.ip().is_unique_local(),
        Ipv6Exit::Masquerade => true,
        Ipv6Exit::None => false,
    };
    is_on.then(|| Exit {
        node: desired.uplink.global,
        pods: desired.node,
        direct: desired.uplink.on_link.clone(),
    })
}

fn uplink_programs(desired: &Desired) -> BTreeSet<(Program, String)> {
    let translates = masquerade(desired).is_some();
    let ingress = (translates || desired.ndp == NdpBackend::Ebpf).then_some(Program::UplinkIngress);
    let egress = [Program::UplinkEgress, Program::UplinkBackstop].into_iter().filter(|_| translates);
    ingress.into_iter().chain(egress).map(|program| (program, desired.uplink.name.clone())).collect()
}

/// The sysctls of the node, in the order in which they must be set.
///
/// `accept_ra` comes first: a device that forwards ignores router advertisements and drops the routes learned
/// from them unless it says 2. One that is 0 was meant so and stays.
///
/// `rp_filter` is not touched: what a pod sends has its route back over the link that it came from, and replies
/// have the default route back, so that even strict filtering passes both.
fn node_sysctls(desired: &Desired, observed: &Observed) -> Vec<(String, String)> {
    let uplink = &desired.uplink.name;
    let set = |key: String| (key, "1".to_owned());
    let mut sysctls = Vec::new();
    if uplink_forwards(desired, observed.force_forwarding) {
        let key = ipv6_conf(uplink, "accept_ra");
        let accepts = observed.host.sysctls.get(&key).is_some_and(|value| value == "1" || value == "2");
        sysctls.extend(accepts.then(|| (key, "2".to_owned())));
    }
    let ones = node_sysctl_keys(desired, observed.force_forwarding);
    sysctls.extend(ones.into_iter().filter(|key| !is_not_a_switch(key)).map(set));
    if desired.ndp == NdpBackend::Kernel {
        sysctls.push((proxy_delay(uplink), "0".to_owned()));
    }
    sysctls
}

/// Keys whose wanted value is not simply 1.
fn is_not_a_switch(key: &str) -> bool {
    key.ends_with("/accept_ra") || key.ends_with("/proxy_delay")
}

/// Whether the uplink's own `forwarding` is set, which makes it a router in the eyes of neighbour discovery.
fn uplink_forwards(desired: &Desired, force_forwarding: bool) -> bool {
    !force_forwarding || desired.ndp == NdpBackend::Kernel
}

/// The node's sysctls whose values a plan needs to know.
pub fn node_sysctl_keys(desired: &Desired, force_forwarding: bool) -> Vec<String> {
    let uplink = &desired.uplink.name;
    let mut keys = vec![ipv6_conf(uplink, "accept_ra"), ipv4_conf(uplink, "forwarding")];
    if force_forwarding {
        keys.push(ipv6_conf(uplink, "force_forwarding"));
    } else {
        keys.push(ipv6_conf("all", "forwarding"));
    }
    if uplink_forwards(desired, force_forwarding) {
        keys.push(ipv6_conf(uplink, "forwarding"));
    }
    if desired.ndp == NdpBackend::Kernel {
        keys.extend([ipv6_conf("all", "proxy_ndp"), ipv6_conf(uplink, "proxy_ndp"), proxy_delay(uplink)]);
    }
    keys
}

/// The sysctls of a pod's host side whose values a plan needs to know.
pub fn veth_sysctl_keys(dev: &str, force_forwarding: bool) -> Vec<String> {
    veth_sysctls(dev, force_forwarding).into_keys().collect()
}

/// The sysctls inside of a pod whose values a plan needs to know.
pub fn pod_sysctl_keys() -> Vec<String> {
    pod_sysctls().into_keys().collect()
}

/// The host side forwards what the pod sends and believes nothing that it says about routing.
fn veth_sysctls(dev: &str, force_forwarding: bool) -> BTreeMap<String, String> {
    let forwarding = if force_forwarding { "force_forwarding" } else { "forwarding" };
    [
        (ipv4_conf(dev, "forwarding"), "1"),
        (ipv6_conf(dev, forwarding), "1"),
        (ipv6_conf(dev, "accept_ra"), "0"),
        (ipv6_conf(dev, "accept_redirects"), "0"),
    ]
    .map(|(key, value)| (key, value.to_owned()))
    .into()
}

/// A pod's processes run unprivileged: they may open any port and use ping.
fn pod_sysctls() -> BTreeMap<String, String> {
    [
        (ipv6_conf(POD_IF, "accept_ra"), "0"),
        ("net/ipv4/ip_unprivileged_port_start".to_owned(), "0"),
        ("net/ipv4/ping_group_range".to_owned(), "0 2147483647"),
    ]
    .map(|(key, value)| (key, value.to_owned()))
    .into()
}

fn ipv6_conf(dev: &str, name: &str) -> String {
    format!("net/ipv6/conf/{dev}/{name}")
}

fn ipv4_conf(dev: &str, name: &str) -> String {
    format!("net/ipv4/conf/{dev}/{name}")
}

fn proxy_delay(dev: &str) -> String {
    format!("net/ipv6/neigh/{dev}/proxy_delay")
}
