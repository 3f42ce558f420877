//! The kernel objects that Hextet makes, as far as it sets them, and their text in the manner of `ip`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

/// A network device, as far as Hextet sets it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its MTU.
    pub mtu_bytes: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether the kernel gives it no link-local address of its own.
    pub addrgen_none: bool,
    /// The alias: on a host side the ID of its pod.
    pub alias: Option<String>,
}

/// An address on a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The device.
    pub dev: String,
    /// The address and the length of its prefix. A multicast address is a join that the kernel holds.
    pub network: IpNetwork,
}

impl Address {
    /// Whether it stands for membership in a multicast group.
    pub fn is_join(&self) -> bool {
        self.network.ip().is_multicast()
    }
}

/// A route of protocol `hextet` in the main table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Where to.
    pub destination: IpNetwork,
    /// Its metric. The kernel tells routes apart by destination and metric.
    pub metric: u32,
    /// How.
    pub hop: Hop,
}

impl Route {
    /// What the kernel tells routes apart by: only one of a kind can exist.
    pub fn key(&self) -> (IpNetwork, u32) {
        (self.destination, self.metric)
    }

    /// The device that it leads to.
    pub fn dev(&self) -> Option<&str> {
        match &self.hop {
            Hop::Unreachable => None,
            Hop::Dev(dev) | Hop::Via { dev, .. } => Some(dev),
        }
    }
}

/// What a route leads to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hop {
    /// An ICMP error, at once.
    Unreachable,
    /// Straight out of a device.
    Dev(String),
    /// A router on a device.
    Via {
        /// The router.
        gateway: IpAddr,
        /// The device.
        dev: String,
    },
}

/// A permanent neighbour entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    /// The device.
    pub dev: String,
    /// The neighbour.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// A BPF program of Hextet's object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Program {
    /// Uplink ingress: answers neighbour solicitations for pods, undoes the translation of replies to them.
    UplinkIngress,
    /// Uplink egress: translates what pods send.
    UplinkEgress,
    /// Uplink egress, behind the others: drops what pods sent and nobody has translated.
    UplinkBackstop,
    /// On no interface: `UplinkEgress` hands fragments over to it.
    FragmentEgress,
    /// On no interface: `UplinkIngress` hands fragments over to it.
    FragmentIngress,
    /// On no interface: `PodGuard` hands over what a pod sends to the node's IPv4 address.
    HairpinIpv4,
    /// On no interface: `PodGuard` hands over what a pod sends to the node's address for the IPv6 internet.
    HairpinIpv6,
    /// Host side of a pod's link, ingress: checks what the pod sends.
    PodGuard,
}

impl Program {
    /// Every program, in the order in which they are loaded.
    pub const ALL: [Program; 8] = [
        Self::FragmentEgress,
        Self::FragmentIngress,
        Self::HairpinIpv4,
        Self::HairpinIpv6,
        Self::UplinkIngress,
        Self::UplinkEgress,
        Self::UplinkBackstop,
        Self::PodGuard,
    ];

    /// Those that go on interfaces.
    pub const ON_INTERFACES: [Program; 4] =
        [Self::UplinkIngress, Self::UplinkEgress, Self::UplinkBackstop, Self::PodGuard];

    /// The name in the object, in pins and in filters.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UplinkIngress => "uplink_ingress",
            Self::UplinkEgress => "uplink_egress",
            Self::UplinkBackstop => "uplink_backstop",
            Self::FragmentEgress => "fragment_egress",
            Self::FragmentIngress => "fragment_ingress",
            Self::HairpinIpv4 => "hairpin_ipv4",
            Self::HairpinIpv6 => "hairpin_ipv6",
            Self::PodGuard => "pod_guard",
        }
    }

    /// The program of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|program| program.as_str() == name)
    }
}

/// What a pod's guard lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Guard {
    /// The pod's only IPv6 source.
    pub ipv6: Ipv6Addr,
    /// The pod's only IPv4 source.
    pub ipv4: Ipv4Addr,
    /// The range of all pods, to which no pod may send IPv4.
    pub pod_ipv4: Ipv4Network,
    /// The pod's only source MAC address.
    pub pod_mac: Mac,
    /// What the guard answers when the pod asks for its gateway.
    pub host_mac: Mac,
}

/// What the BPF masquerade translates, and to what.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Masquerade {
    /// The address that IPv4 packets leave with; none: they are not translated here.
    pub node_ipv4: Option<Ipv4Addr>,
    /// Prefixes of remotes that see another address.
    pub sources: BTreeMap<Ipv4Network, Ipv4Addr>,
    /// The range whose packets are translated.
    pub pod_ipv4: Ipv4Network,
    /// Who gets in besides those that were written to.
    pub filtering: Filtering,
    /// How IPv6 packets leave for the internet; none: as they are.
    pub exit: Option<Exit>,
}

/// The pods' way to the IPv6 internet, whose addresses are no good there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Exit {
    /// The address that packets leave with; none: they do not leave.
    pub node: Option<Ipv6Addr>,
    /// The pods' prefix.
    pub pods: Ipv6Network,
    /// Prefixes of global addresses that pods reach with their own.
    pub direct: BTreeSet<Ipv6Network>,
}

/// What becomes of pods' packets to the IPv6 internet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ipv6Exit {
    /// They are translated to the node's global address if the pods' own are unique local.
    #[default]
    Auto,
    /// They are translated, whatever the pods' addresses are.
    Masquerade,
    /// They leave as they are.
    None,
}

/// Who gets in at the outside port of a pod (RFC 4787 section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filtering {
    /// Addresses that the pod has written to from there, with any port.
    #[default]
    AddressDependent,
    /// Everybody.
    EndpointIndependent,
}

/// The content of table `ip hextet`. Each form ends with the backstop: what has a source of the pods' range where
/// it must not is dropped and counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NftTable {
    /// What leaves the uplink from the pods' range is masqueraded. The backstop is behind that, for every device
    /// that is not a pod's.
    Masquerade {
        /// The uplink.
        uplink: String,
        /// The pods' range.
        pod_ipv4: Ipv4Network,
    },
    /// The backstop alone, for every device that is neither a pod's nor the one where BPF programs translate
    /// behind nftables' back.
    Backstop {
        /// The uplink, if programs translate there.
        uplink: Option<String>,
        /// The pods' range.
        pod_ipv4: Ipv4Network,
    },
    /// Something that this version would not have written.
    Other,
}

/// The content of table `ip6 hextet`: the way to the IPv6 internet where nftables masquerades.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NftExit {
    /// What leaves the uplink with a pod's source for anything but unique local, link-local and multicast
    /// addresses and the direct prefixes is masqueraded, and behind that dropped and counted.
    Rules {
        /// The uplink.
        uplink: String,
        /// The pods' prefix.
        pods: Ipv6Network,
        /// Prefixes that pods reach with their own addresses.
        direct: BTreeSet<Ipv6Network>,
        /// Whether there is an address to masquerade with.
        masquerade: bool,
    },
    /// Something that this version would not have written.
    Other,
}

impl fmt::Display for NftExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Rules { uplink, pods, direct, masquerade } = self else {
            return f.write_str("with rules that are not Hextet's");
        };
        write!(f, "oifname {uplink} ip6 saddr {pods}")?;
        direct.iter().try_for_each(|prefix| write!(f, " ip6 daddr != {prefix}"))?;
        f.write_str(if *masquerade { " masquerade" } else { " drop" })
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.up { "up" } else { "down" };
        let addrgenmode = if self.addrgen_none { "none" } else { "eui64" };
        write!(f, "{state} address {} mtu {} addrgenmode {addrgenmode}", self.mac, self.mtu_bytes)?;
        self.alias.iter().try_for_each(|alias| write!(f, " alias {alias}"))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dev {}", self.network, self.dev)?;
        if self.is_join() {
            return f.write_str(" autojoin");
        }
        if self.network.is_ipv6() { f.write_str(" nodad") } else { Ok(()) }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.hop == Hop::Unreachable {
            f.write_str("unreachable ")?;
        }
        match self.destination.prefix() {
            0 => f.write_str("default")?,
            _ => self.destination.fmt(f)?,
        }
        match &self.hop {
            Hop::Unreachable => {}
            Hop::Dev(dev) => write!(f, " dev {dev}")?,
            Hop::Via { gateway, dev } if gateway.is_ipv6() && self.destination.is_ipv4() => {
                write!(f, " via inet6 {gateway} dev {dev}")?;
            }
            Hop::Via { gateway, dev } => write!(f, " via {gateway} dev {dev}")?,
        }
        f.write_str(" proto hextet")?;
        if self.metric > 0 { write!(f, " metric {}", self.metric) } else { Ok(()) }
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lladdr {} dev {} nud permanent", self.address, self.mac, self.dev)
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "src {} src {} lladdr {}", self.ipv6, self.ipv4, self.pod_mac)
    }
}

impl fmt::Display for Masquerade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "src {} to ", self.pod_ipv4)?;
        match self.node_ipv4 {
            Some(node) => write!(f, "{node}")?,
            None => f.write_str("nothing")?,
        }
        self.sources.iter().try_for_each(|(prefix, address)| write!(f, " dst {prefix} to {address}"))?;
        if self.filtering != Filtering::default() {
            write!(f, " filtering {}", self.filtering)?;
        }
        self.exit.iter().try_for_each(|exit| write!(f, " {exit}"))
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "src {} to ", self.pods)?;
        match self.node {
            Some(node) => write!(f, "{node}")?,
            None => f.write_str("nowhere")?,
        }
        self.direct.iter().try_for_each(|prefix| write!(f, " dst {prefix} direct"))
    }
}

/// A word that names no way to the IPv6 internet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownExit(String);

impl fmt::Display for UnknownExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not one of auto, masquerade, none", self.0)
    }
}

impl std::error::Error for UnknownExit {}

impl FromStr for Ipv6Exit {
    type Err = UnknownExit;

    fn from_str(word: &str) -> Result<Self, UnknownExit> {
        let all = [Self::Auto, Self::Masquerade, Self::None];
        all.into_iter().find(|one| one.to_string() == word).ok_or_else(|| UnknownExit(word.to_owned()))
    }
}

impl fmt::Display for Ipv6Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Masquerade => "masquerade",
            Self::None => "none",
        })
    }
}

/// A word that names no filtering.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownFiltering(String);

impl fmt::Display for UnknownFiltering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not one of address-dependent, endpoint-independent", self.0)
    }
}

impl std::error::Error for UnknownFiltering {}

impl FromStr for Filtering {
    type Err = UnknownFiltering;

    fn from_str(word: &str) -> Result<Self, UnknownFiltering> {
        let all = [Self::AddressDependent, Self::EndpointIndependent];
        all.into_iter().find(|one| one.to_string() == word).ok_or_else(|| UnknownFiltering(word.to_owned()))
    }
}

impl fmt::Display for Filtering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AddressDependent => "address-dependent",
            Self::EndpointIndependent => "endpoint-independent",
        })
    }
}

impl fmt::Display for NftTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Masquerade { uplink, pod_ipv4 } => {
                write!(
                    f,
                    "oifname {uplink} ip saddr {pod_ipv4} masquerade, oifname != hx* ip saddr {pod_ipv4} drop"
                )
            }
            Self::Backstop { uplink, pod_ipv4 } => {
                f.write_str("oifname != hx* ")?;
                uplink.iter().try_for_each(|uplink| write!(f, "oifname != {uplink} "))?;
                write!(f, "ip saddr {pod_ipv4} drop")
            }
            Self::Other => f.write_str("with rules that are not Hextet's"),
        }
    }
}
