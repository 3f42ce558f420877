//! Reads from the kernel what is Hextet's, into the core's [`Observed`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    path::PathBuf,
};

use dataplane_core::{
    Address, Desired, Guard, Mac, Observed, ObservedBpf, ObservedPod, ObservedUplink, POD_IF, PROTOCOL,
    PROTOCOL_NAME, ProtocolName, Stack, node_sysctl_keys, pod_sysctl_keys, veth_sysctl_keys,
};
use hextet_address::PodLink;
use thiserror::Error;

use crate::{
    BpfError, Dataplane, NftError, StateError,
    bpf::Bpf,
    multicast,
    netlink::{Device, Netlink, NetlinkError, name_of},
    netns, nft, sysctl,
};

/// Why the kernel cannot be read.
#[derive(Debug, Error)]
pub enum ObserveError {
    /// Links, addresses, routes or neighbours.
    #[error("cannot read the node's network")]
    Netlink(#[from] NetlinkError),
    /// A pod's namespace.
    #[error("cannot look into the pods' namespaces")]
    Netns(#[source] io::Error),
    /// The inside of a pod's namespace.
    #[error("cannot read the network of pod {id}")]
    Pod {
        /// The pod.
        id: String,
        /// Why.
        #[source]
        source: NetlinkError,
    },
    /// The multicast groups.
    #[error("cannot read the multicast groups")]
    Groups(#[source] io::Error),
    /// The nftables table.
    #[error("cannot read table ip hextet")]
    Nft(#[from] NftError),
    /// The BPF side.
    #[error("cannot read the state of the BPF programs")]
    Bpf(#[from] BpfError),
    /// What is remembered.
    #[error(transparent)]
    State(#[from] StateError),
}

/// The inside of a pod's namespace, with the index of the host side that its `eth0` is paired with.
struct Inside {
    pod: ObservedPod,
    peer_index: Option<u32>,
}

impl Dataplane {
    /// What the kernel holds that is Hextet's, as far as a plan for `desired` needs it.
    ///
    /// # Errors
    /// [`ObserveError`] for the first thing that cannot be read.
    pub async fn observe(&mut self, desired: &Desired) -> Result<Observed, ObserveError> {
        let force_forwarding = self.features.force_forwarding;
        let mut observed = self.observe_kernel(Some(&desired.uplink.name)).await?;
        let keys = node_sysctl_keys(desired, force_forwarding);
        observed.host.sysctls.extend(read_sysctls(&keys));
        observed.host.addresses.extend(held_join(desired)?);
        observed.nft = self.observe_nft().await?;
        observed.nft_exit = self.observe_nft_exit().await?;
        Ok(observed)
    }

    /// What the kernel holds that is Hextet's, for taking all of it away.
    pub(crate) async fn observe_all(&mut self) -> Result<Observed, ObserveError> {
        let mut observed = self.observe_kernel(None).await?;
        observed.nft = self.observe_nft().await?;
        observed.nft_exit = self.observe_nft_exit().await?;
        // An earlier version's pins may be there although this version could not open its own.
        let pinned = fs::read_dir(&self.config.bpf_dir).is_ok_and(|mut pins| pins.next().is_some());
        if pinned {
            observed.bpf.get_or_insert_default().pinned = true;
        }
        Ok(observed)
    }

    async fn observe_kernel(&mut self, uplink: Option<&str>) -> Result<Observed, ObserveError> {
        let devices = self.netlink.devices().await?;
        let names: BTreeMap<u32, String> = devices.iter().map(|d| (d.index, d.name.clone())).collect();
        let insides = self.visit_pods(&devices).await?;
        let links = own_links(&devices, &insides);
        let mut observed = Observed {
            protocol_name: self.protocol_name(),
            force_forwarding: self.features.force_forwarding,
            uplink: devices.iter().find(|device| Some(device.name.as_str()) == uplink).map(observed_uplink),
            host: self.host_stack(&names, &links).await?,
            proxies: self.netlink.proxies(&names).await?,
            pods: self.own_pods(insides, &links),
            journal: self.state.facts.sysctls.clone(),
            has_nft: self.features.nft,
            nft: None,
            nft_exit: None,
            bpf: self.bpf.as_ref().map(|bpf| observed_bpf(bpf, &names)).transpose()?,
            links: BTreeMap::new(),
        };
        if let Some(bpf) = &observed.bpf {
            self.watched.set(bpf.attachments.iter().cloned());
        }
        observed.links = links.into_iter().map(|device| (device.name.clone(), device.link)).collect();
        Ok(observed)
    }

    async fn host_stack(
        &self,
        names: &BTreeMap<u32, String>,
        links: &[Device],
    ) -> Result<Stack, ObserveError> {
        let own: BTreeMap<u32, String> = links.iter().map(|d| (d.index, d.name.clone())).collect();
        let mut sysctls = BTreeMap::new();
        for link in links {
            sysctls.extend(read_sysctls(&veth_sysctl_keys(&link.name, self.features.force_forwarding)));
        }
        let addresses = self.netlink.addresses().await?;
        Ok(Stack {
            addresses: addresses
                .into_iter()
                .filter(|address| address.ours)
                .map(|address| Address { dev: name_of(names, address.index), network: address.network })
                .collect(),
            routes: self.netlink.routes(names).await?,
            neighbours: self.netlink.neighbours(&own).await?,
            sysctls,
        })
    }

    /// Looks into every namespace that may be one of this node's.
    async fn visit_pods(&self, devices: &[Device]) -> Result<BTreeMap<String, Inside>, ObserveError> {
        let aliases =
            devices.iter().filter(|d| is_pod_link_name(&d.name)).filter_map(|d| d.link.alias.clone());
        let ids: BTreeSet<String> = self.state.facts.namespaces.iter().cloned().chain(aliases).collect();
        let existing: Vec<(String, PathBuf)> = ids
            .into_iter()
            .filter_map(|id| netns::path(&self.config.netns_dir, &id).ok().map(|path| (id, path)))
            .filter(|(_, path)| netns::exists(path))
            .collect();
        if existing.is_empty() {
            return Ok(BTreeMap::new());
        }
        let (ids, paths): (Vec<_>, Vec<_>) = existing.into_iter().unzip();
        let visits = netns::visit(paths, async |_| read_inside().await).await.map_err(ObserveError::Netns)?;
        let mut insides = BTreeMap::new();
        for (id, visit) in ids.into_iter().zip(visits) {
            let inside = visit.map_err(ObserveError::Netns)?;
            let inside = inside.map_err(|source| ObserveError::Pod { id: id.clone(), source })?;
            insides.insert(id, inside);
        }
        Ok(insides)
    }

    /// A namespace is this node's when it made it, or when one of its links leads into it.
    fn own_pods(
        &mut self,
        insides: BTreeMap<String, Inside>,
        links: &[Device],
    ) -> BTreeMap<String, ObservedPod> {
        // What somebody else removed is no longer ours, whoever makes it anew.
        let dir = &self.config.netns_dir;
        self.state.facts.namespaces.retain(|id| netns::path(dir, id).is_ok_and(|path| path.exists()));
        let mut pods = BTreeMap::new();
        for (id, mut inside) in insides {
            let paired = links.iter().any(|device| Some(device.index) == inside.peer_index);
            if !paired {
                inside.pod.eth0 = None;
            }
            if paired || self.state.facts.namespaces.contains(&id) {
                self.state.facts.namespaces.insert(id.clone());
                pods.insert(id, inside.pod);
            }
        }
        self.state.save_later();
        pods
    }

    async fn observe_nft(&mut self) -> Result<Option<dataplane_core::NftTable>, ObserveError> {
        let table = if self.features.nft { nft::read().await? } else { None };
        Ok(table)
    }

    async fn observe_nft_exit(&mut self) -> Result<Option<dataplane_core::NftExit>, ObserveError> {
        let table = if self.features.nft { nft::exit::read().await? } else { None };
        Ok(table)
    }

    fn protocol_name(&self) -> ProtocolName {
        let ours = protocol_file_content();
        match fs::read_to_string(self.protocol_file()) {
            Ok(text) if text == ours => ProtocolName::Ours,
            Ok(text) if text.lines().any(|line| line == ours.trim_end()) => ProtocolName::Foreign,
            _ => ProtocolName::Missing,
        }
    }

    pub(crate) fn protocol_file(&self) -> PathBuf {
        self.config.rt_protos_dir.join(format!("{PROTOCOL_NAME}.conf"))
    }
}

/// The line by which `ip` knows the protocol's name.
pub(crate) fn protocol_file_content() -> String {
    format!("{PROTOCOL} {PROTOCOL_NAME}\n")
}

/// The join of the pods' group, when the kernel holds it, with or without its address.
fn held_join(desired: &Desired) -> Result<Option<Address>, ObserveError> {
    let group = desired.group.multicast();
    let held = multicast::is_member(&desired.uplink.name, group).map_err(ObserveError::Groups)?;
    let join = Address { dev: desired.uplink.name.clone(), network: IpAddr::from(group).into() };
    Ok(held.then_some(join))
}

fn is_pod_link_name(name: &str) -> bool {
    name.parse::<PodLink>().is_ok()
}

/// Host sides of pods' links. One without an alias is ours when it leads into a namespace of ours: an agent was
/// killed after it made the pair and before it could say so.
fn own_links(devices: &[Device], insides: &BTreeMap<String, Inside>) -> Vec<Device> {
    let leads_inside =
        |device: &Device| insides.values().any(|inside| inside.peer_index == Some(device.index));
    devices
        .iter()
        .filter(|device| is_pod_link_name(&device.name))
        .filter(|device| device.link.alias.is_some() || leads_inside(device))
        .cloned()
        .collect()
}

fn observed_uplink(device: &Device) -> ObservedUplink {
    ObservedUplink { mac: device.link.mac, mtu_bytes: device.link.mtu_bytes }
}

/// Reads the namespace that the calling thread is in.
async fn read_inside() -> Result<Inside, NetlinkError> {
    let netlink = Netlink::open().map_err(|error| NetlinkError::Broken(error.to_string()))?;
    let devices = netlink.devices().await?;
    let names: BTreeMap<u32, String> = devices.iter().map(|d| (d.index, d.name.clone())).collect();
    let eth0 = devices.iter().find(|device| device.name == POD_IF);
    let own: BTreeMap<u32, String> = eth0.iter().map(|d| (d.index, d.name.clone())).collect();
    let addresses = netlink.addresses().await?;
    let stack = Stack {
        addresses: addresses
            .into_iter()
            .filter(|address| address.ours)
            .map(|address| Address { dev: name_of(&names, address.index), network: address.network })
            .collect(),
        routes: netlink.routes(&names).await?,
        neighbours: netlink.neighbours(&own).await?,
        sysctls: read_sysctls(&pod_sysctl_keys()),
    };
    let pod = ObservedPod {
        lo_up: devices.iter().any(|device| device.name == "lo" && device.link.up),
        eth0: eth0.map(|device| device.link.clone()),
        stack,
    };
    Ok(Inside { pod, peer_index: eth0.and_then(|device| device.peer_index) })
}

fn read_sysctls(keys: &[String]) -> BTreeMap<String, String> {
    keys.iter().filter_map(|key| Some((key.clone(), sysctl::read(key)?))).collect()
}

fn observed_bpf(bpf: &Bpf, names: &BTreeMap<u32, String>) -> Result<ObservedBpf, BpfError> {
    let attachments = bpf.attached()?.into_iter().map(|a| (a.program, a.ifname)).collect();
    let ndp = bpf.local_pods()?.into_iter().map(|(address, mac)| (address, Mac(mac))).collect();
    let guards =
        bpf.guards()?.into_iter().map(|(index, entry)| (name_of(names, index), guard(entry))).collect();
    Ok(ObservedBpf { pinned: true, attachments, ndp, guards, masquerade: bpf.masquerade()? })
}

fn guard(entry: crate::bpf::GuardEntry) -> Guard {
    Guard {
        ipv6: entry.ipv6,
        ipv4: entry.ipv4,
        pod_ipv4: entry.pod_ipv4,
        pod_mac: Mac(entry.pod_mac),
        host_mac: Mac(entry.host_mac),
    }
}
