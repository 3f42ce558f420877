//! What the kernel holds that is Hextet's, and the few facts about the machine that a plan depends on.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
};

use crate::{Address, Guard, Link, Mac, Masquerade, Neighbour, NftExit, NftTable, Program, Route};

/// What the kernel holds that is Hextet's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Whether the protocol number has its name in the machine's `rt_protos.d`.
    pub protocol_name: ProtocolName,
    /// The kernel can forward IPv6 per interface (`force_forwarding`, Linux 6.17).
    pub force_forwarding: bool,
    /// The uplink, when it exists.
    pub uplink: Option<ObservedUplink>,
    /// Host sides of pods' links, by name.
    pub links: BTreeMap<String, Link>,
    /// What the node's own network namespace holds.
    pub host: Stack,
    /// Addresses that the kernel's `proxy_ndp` answers for, with the device.
    pub proxies: BTreeSet<(String, Ipv6Addr)>,
    /// The network namespaces that this node made, by pod ID.
    pub pods: BTreeMap<String, ObservedPod>,
    /// What sysctls were before Hextet changed them, by key.
    pub journal: BTreeMap<String, String>,
    /// nftables can be used.
    pub has_nft: bool,
    /// Table `ip hextet`.
    pub nft: Option<NftTable>,
    /// Table `ip6 hextet`.
    pub nft_exit: Option<NftExit>,
    /// The BPF side; `None` when this machine or process cannot use it.
    pub bpf: Option<ObservedBpf>,
}

/// Who named the protocol number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProtocolName {
    /// Nobody has.
    #[default]
    Missing,
    /// A node, which takes the name away again.
    Ours,
    /// Somebody else, in words of their own.
    Foreign,
}

/// What is read of the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObservedUplink {
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its MTU, which pods' links have too.
    pub mtu_bytes: u32,
}

/// What a network namespace holds that is Hextet's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stack {
    /// Addresses of protocol `hextet`.
    pub addresses: BTreeSet<Address>,
    /// Routes of protocol `hextet`.
    pub routes: BTreeSet<Route>,
    /// Permanent neighbours on Hextet's links.
    pub neighbours: BTreeSet<Neighbour>,
    /// Current values of the sysctls that a plan may set, by key such as `net/ipv4/conf/eth0/forwarding`.
    pub sysctls: BTreeMap<String, String>,
}

/// A pod's network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedPod {
    /// `lo` is up.
    pub lo_up: bool,
    /// The pod's side of its link, when the other side is the pod's host side.
    pub eth0: Option<Link>,
    /// What else it holds.
    pub stack: Stack,
}

/// What the BPF side holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedBpf {
    /// Something is pinned.
    pub pinned: bool,
    /// Programs of this build, with the device that they are attached to.
    pub attachments: BTreeSet<(Program, String)>,
    /// Addresses that the NDP proxy answers for, with what it answers.
    pub ndp: BTreeMap<Ipv6Addr, Mac>,
    /// Guards by device. A device that has gone is written `if` and its index.
    pub guards: BTreeMap<String, Guard>,
    /// What is translated.
    pub masquerade: Option<Masquerade>,
}

impl Observed {
    /// Forgets a link and all that the kernel removes with it.
    pub(crate) fn remove_link(&mut self, dev: &str) {
        let pod = self.links.remove(dev).and_then(|link| link.alias);
        self.host.remove_dev(dev);
        self.proxies.retain(|(on, _)| on != dev);
        if let Some(bpf) = &mut self.bpf {
            bpf.attachments.retain(|(_, on)| on != dev);
        }
        if let Some(pod) = pod.and_then(|id| self.pods.get_mut(&id)) {
            pod.eth0 = None;
            pod.stack.remove_dev(crate::POD_IF);
        }
    }
}

impl Stack {
    fn remove_dev(&mut self, dev: &str) {
        self.addresses.retain(|address| address.dev != dev);
        self.routes.retain(|route| route.dev() != Some(dev));
        self.neighbours.retain(|neighbour| neighbour.dev != dev);
        let part = format!("/{dev}/");
        self.sysctls.retain(|key, _| !key.contains(&part));
    }
}
