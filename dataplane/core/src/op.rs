//! One change to the kernel, as data and as a line of text.

use std::{fmt, net::Ipv6Addr};

use crate::{Address, Guard, Link, Mac, Masquerade, Neighbour, NftExit, NftTable, POD_IF, Program, Route};

/// One change to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// The pod that it is a part of. When one operation of a pod fails, its later ones are skipped, so that no
    /// half-made pod becomes reachable.
    pub pod: Option<String>,
    /// The network namespace in which it is done.
    pub place: Place,
    /// What is done.
    pub action: Action,
}

/// A network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The node's.
    Host,
    /// That of the operation's pod.
    Pod,
}

/// What an [`Op`] does.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is the command that its Display writes")]
pub enum Action {
    ProtocolRegister,
    ProtocolUnregister,
    SysctlSet { key: String, value: String },
    SysctlRestore { key: String, value: String },
    NetnsAdd,
    NetnsDelete,
    LinkAdd { dev: String, host_mac: Mac, pod_mac: Mac, mtu_bytes: u32 },
    LinkSet { dev: String, link: Link },
    LinkDelete { dev: String },
    LoopbackUp,
    AddressAdd(Address),
    AddressDelete(Address),
    RouteAdd(Route),
    RouteReplace(Route),
    RouteDelete(Route),
    NeighbourSet(Neighbour),
    NeighbourDelete(Neighbour),
    ProxyAdd { dev: String, address: Ipv6Addr },
    ProxyDelete { dev: String, address: Ipv6Addr },
    NftSet(NftTable),
    NftDelete,
    NftExitSet(NftExit),
    NftExitDelete,
    Attach { program: Program, dev: String },
    Detach { program: Program, dev: String },
    NdpSet { address: Ipv6Addr, mac: Mac },
    NdpDelete { address: Ipv6Addr },
    GuardSet { dev: String, guard: Guard },
    GuardDelete { dev: String },
    MasqueradeSet(Masquerade),
    MasqueradeDelete,
    Unpin,
}

impl Op {
    pub(crate) fn node(action: Action) -> Self {
        Self { pod: None, place: Place::Host, action }
    }

    pub(crate) fn host(pod: Option<&str>, action: Action) -> Self {
        Self { pod: pod.map(str::to_owned), place: Place::Host, action }
    }

    pub(crate) fn inside(pod: &str, action: Action) -> Self {
        Self { pod: Some(pod.to_owned()), place: Place::Pod, action }
    }

    /// Whether it takes something away. Such an operation is done even when others of its pod failed.
    pub fn removes(&self) -> bool {
        use Action::*;
        matches!(
            self.action,
            ProtocolUnregister
                | SysctlRestore { .. }
                | NetnsDelete
                | LinkDelete { .. }
                | AddressDelete(_)
                | RouteDelete(_)
                | NeighbourDelete(_)
                | ProxyDelete { .. }
                | NftDelete
                | NftExitDelete
                | Detach { .. }
                | NdpDelete { .. }
                | GuardDelete { .. }
                | MasqueradeDelete
                | Unpin
        )
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Action::*;
        let pod = self.pod.as_deref().unwrap_or_default();
        if self.place == Place::Pod {
            write!(f, "-n {pod} ")?;
        }
        match &self.action {
            ProtocolRegister => write!(f, "protocol add {} {}", crate::PROTOCOL, crate::PROTOCOL_NAME),
            ProtocolUnregister => write!(f, "protocol del {} {}", crate::PROTOCOL, crate::PROTOCOL_NAME),
            SysctlSet { key, value } => write!(f, "sysctl {key}={}", quoted(value)),
            SysctlRestore { key, value } => write!(f, "sysctl {key}={} (as it was)", quoted(value)),
            NetnsAdd => write!(f, "netns add {pod}"),
            NetnsDelete => write!(f, "netns del {pod}"),
            LinkAdd { dev, host_mac, pod_mac, mtu_bytes } => write!(
                f,
                "link add {dev} address {host_mac} mtu {mtu_bytes} type veth peer name {POD_IF} address {pod_mac} netns {pod}"
            ),
            LinkSet { dev, link } => write!(f, "link set {dev} {link}"),
            LinkDelete { dev } => write!(f, "link del {dev}"),
            LoopbackUp => f.write_str("link set lo up"),
            AddressAdd(address) => write!(f, "addr replace {address} proto {}", crate::PROTOCOL),
            AddressDelete(address) => write!(f, "addr del {} dev {}", address.network, address.dev),
            RouteAdd(route) => write!(f, "route add {route}"),
            RouteReplace(route) => write!(f, "route replace {route}"),
            RouteDelete(route) => write!(f, "route del {route}"),
            NeighbourSet(neighbour) => write!(f, "neigh replace {neighbour}"),
            NeighbourDelete(neighbour) => write!(f, "neigh del {} dev {}", neighbour.address, neighbour.dev),
            ProxyAdd { dev, address } => write!(f, "neigh add proxy {address} dev {dev} router proto hextet"),
            ProxyDelete { dev, address } => write!(f, "neigh del proxy {address} dev {dev}"),
            NftSet(table) => write!(f, "nft table ip hextet {table}"),
            NftDelete => f.write_str("nft delete table ip hextet"),
            NftExitSet(table) => write!(f, "nft table ip6 hextet {table}"),
            NftExitDelete => f.write_str("nft delete table ip6 hextet"),
            Attach { program, dev } => write!(f, "bpf attach {program} dev {dev}"),
            Detach { program, dev } => write!(f, "bpf detach {program} dev {dev}"),
            NdpSet { address, mac } => write!(f, "bpf ndp set {address} lladdr {mac}"),
            NdpDelete { address } => write!(f, "bpf ndp del {address}"),
            GuardSet { dev, guard } => write!(f, "bpf guard set {dev} {guard}"),
            GuardDelete { dev } => write!(f, "bpf guard del {dev}"),
            MasqueradeSet(masquerade) => write!(f, "bpf masquerade set {masquerade}"),
            MasqueradeDelete => f.write_str("bpf masquerade del"),
            Unpin => f.write_str("bpf unpin all"),
        }
    }
}

/// Quotes what a shell would split.
fn quoted(value: &str) -> String {
    if value.contains(' ') { format!("\"{value}\"") } else { value.to_owned() }
}
