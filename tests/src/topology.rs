//! What the small internet looks like: namespaces, cables, addresses, routes, settings. Pure data.
//!
//! ```text
//!  n1 ─┐
//!  n2 ─┤ sw (bridge br0, the LAN) ── client
//!  n3 ─┘   └─ router ── wan
//! ```
//! The LAN is 192.0.2.0/24 and 2001:db8:1::/64, the internet beyond the router 198.51.100.0/24 and
//! 2001:db8:ffff::/64. The router forwards and never translates, and knows no route to the pods' IPv4: a
//! packet that leaves a node with a pod's IPv4 as its source gets no answer.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Result, bail};

use crate::netns::NetNs;

/// The most nodes of a testbed: their addresses are below the client's.
pub const NODES_MAX: u8 = 64;
/// The longest prefix: `<prefix>-client` and what we derive from it stay short.
pub const PREFIX_LEN_MAX: usize = 12;

/// The name that all namespaces of a testbed start with.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefix(String);

impl Prefix {
    /// Takes `text` if it is a letter followed by letters and digits, all lower case, and short.
    ///
    /// # Errors
    /// Says what a prefix looks like.
    pub fn new(text: &str) -> Result<Self> {
        let first = text.chars().next().is_some_and(|c| c.is_ascii_lowercase());
        let rest = text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if !(first && rest && text.len() <= PREFIX_LEN_MAX) {
            bail!(
                "the prefix {text:?} cannot be used: it must start with a letter a-z, go on with a-z and \
                 0-9, and have at most {PREFIX_LEN_MAX} characters"
            );
        }
        Ok(Self(text.to_owned()))
    }

    /// The prefix.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The namespace of a place (`n1`, `client`) of this testbed.
    pub fn netns(&self, place: &str) -> NetNs {
        NetNs::named(format!("{}-{place}", self.0))
    }

    /// Whether a namespace with this name is one of this testbed's places.
    pub fn owns(&self, netns: &str) -> bool {
        netns
            .strip_prefix(&self.0)
            .and_then(|rest| rest.strip_prefix('-'))
            .is_some_and(|place| Place::parse(place).is_some())
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One machine of the small internet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A machine that runs the agent.
    Node(u8),
    /// The switch.
    Switch,
    /// A LAN host that runs nothing of ours.
    Client,
    /// The gateway between LAN and internet.
    Router,
    /// A host on the internet.
    Wan,
}

/// Addresses of one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4, in a /24.
    pub v4: Ipv4Addr,
    /// IPv6, in a /64.
    pub v6: Ipv6Addr,
}

const LAN: [u16; 4] = [0x2001, 0xdb8, 1, 0];
const INTERNET: [u16; 4] = [0x2001, 0xdb8, 0xffff, 0];

impl Place {
    /// The place called `n1`, `sw`, `client`, `router` or `wan`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "sw" => Some(Self::Switch),
            "client" => Some(Self::Client),
            "router" => Some(Self::Router),
            "wan" => Some(Self::Wan),
            node => {
                let number = node.strip_prefix('n')?.parse().ok()?;
                let place = Self::Node(number);
                (1..=NODES_MAX).contains(&number).then_some(place).filter(|p| p.to_string() == node)
            }
        }
    }

    /// The addresses of its `eth0`; the switch has none.
    pub fn addresses(self) -> Option<Addresses> {
        let lan = |host: u8| {
            let host_v6 = u16::from_str_radix(&host.to_string(), 16).expect("decimal digits are hex digits");
            address(Ipv4Addr::new(192, 0, 2, host), LAN, host_v6)
        };
        match self {
            Self::Node(number) => Some(lan(10 + number)),
            Self::Client => Some(lan(100)),
            Self::Router => Some(lan(1)),
            Self::Wan => Some(address(Ipv4Addr::new(198, 51, 100, 2), INTERNET, 2)),
            Self::Switch => None,
        }
    }

    fn is_lan_host(self) -> bool {
        matches!(self, Self::Node(_) | Self::Client | Self::Router)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(number) => write!(f, "n{number}"),
            Self::Switch => f.write_str("sw"),
            Self::Client => f.write_str("client"),
            Self::Router => f.write_str("router"),
            Self::Wan => f.write_str("wan"),
        }
    }
}

/// The router's addresses on the internet, on its `eth1`.
pub fn router_wan() -> Addresses {
    address(Ipv4Addr::new(198, 51, 100, 1), INTERNET, 1)
}

/// A cable: an interface in one place and one in another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cable {
    /// One end: place and interface.
    pub a: (Place, String),
    /// The other end.
    pub b: (Place, String),
}

impl Cable {
    /// The `ip` line that makes it.
    pub fn line(&self, prefix: &Prefix) -> String {
        let ns = |place: Place| prefix.netns(&place.to_string()).name().to_owned();
        let ((a, a_link), (b, b_link)) = (&self.a, &self.b);
        format!("link add {a_link} netns {} type veth peer name {b_link} netns {}", ns(*a), ns(*b))
    }
}

/// All places of a testbed with `nodes` nodes, in the order in which they are made.
pub fn places(nodes: u8) -> Vec<Place> {
    let mut places = vec![Place::Switch];
    places.extend((1..=nodes).map(Place::Node));
    places.extend([Place::Client, Place::Router, Place::Wan]);
    places
}

/// All cables: each LAN host to a port of the switch that has its name, and the router to the internet.
pub fn cables(nodes: u8) -> Vec<Cable> {
    let eth = |place: Place, number: u8| (place, format!("eth{number}"));
    let to_switch = |place: Place| Cable { a: eth(place, 0), b: (Place::Switch, place.to_string()) };
    let mut cables: Vec<Cable> =
        places(nodes).into_iter().filter(|place| place.is_lan_host()).map(to_switch).collect();
    cables.push(Cable { a: eth(Place::Router, 1), b: eth(Place::Wan, 0) });
    cables
}

/// Kernel settings of a place, in the order in which they are written: those of a machine as it comes out
/// of the box, whatever the machine under the testbed is set to. Only the router forwards.
pub fn sysctls(place: Place) -> Vec<(String, &'static str)> {
    let router = place == Place::Router;
    let forwarding = if router { "1" } else { "0" };
    let mut settings = vec![
        ("net/ipv4/ip_forward".to_owned(), forwarding),
        ("net/ipv6/conf/all/forwarding".to_owned(), forwarding),
    ];
    // Debian's default (loose), through systemd's sysctl.d. The router has no route to the pods' IPv4 and is to
    // forward what comes from there all the same, for a leak to be seen as far as it goes.
    let source_check = if router { "0" } else { "2" };
    for name in ["all", "default", "eth0", "eth1"] {
        let value = if name == "all" { "0" } else { source_check };
        settings.push((format!("net/ipv4/conf/{name}/rp_filter"), value));
    }
    for name in ["eth0", "eth1"] {
        // A router asks for neighbours from its link-local address, and so can only when that is no longer
        // being probed. Interfaces that the agent makes keep the kernel's default.
        settings.push((format!("net/ipv6/conf/{name}/accept_dad"), "0"));
    }
    if place == Place::Switch {
        // Its ports are no hosts; the bridge itself asks for groups from its link-local address.
        settings.push(("net/ipv6/conf/default/disable_ipv6".to_owned(), "1"));
        settings.push(("net/ipv6/conf/br0/accept_dad".to_owned(), "0"));
    }
    settings
}

/// A second prefix of the LAN, unique local, which only LAN mode's router advertises.
pub const LAN_ULA: &str = "fd0b:5e7:1a::/64";

/// The prefix of the LAN.
pub fn lan_prefix() -> String {
    let [a, b, c, d] = LAN;
    format!("{}/64", Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
}

/// The `ip` lines that set a place up. Each may run any number of times. In LAN mode the client gets nothing of
/// IPv6: it learns that from the router.
pub fn setup_lines(place: Place, nodes: u8, lan: bool) -> Vec<String> {
    let mut lines = vec!["link set lo up".to_owned()];
    if place == Place::Switch {
        lines.push("link set br0 up".to_owned());
        let ports = places(nodes).into_iter().filter(|place| place.is_lan_host());
        lines.extend(ports.map(|port| format!("link set {port} master br0 up")));
        return lines;
    }
    let learns = lan && place == Place::Client;
    lines.push("link set eth0 up".to_owned());
    lines.extend(place.addresses().into_iter().flat_map(|at| address_lines(at, "eth0")));
    let gateway = match place {
        Place::Router => {
            lines.push("link set eth1 up".to_owned());
            lines.extend(address_lines(router_wan(), "eth1"));
            return lines;
        }
        Place::Wan => router_wan(),
        _ => Place::Router.addresses().expect("the router has addresses"),
    };
    lines.push(format!("route replace default via {} dev eth0", gateway.v4));
    lines.push(format!("route replace default via {} dev eth0", gateway.v6));
    if learns {
        lines.retain(|line| !line.contains("::"));
    }
    lines
}

/// The `ip` line that makes the bridge. It asks who listens to which group, as a switch with MLD snooping
/// does: a node that has not joined its pods' solicited-node group is not asked for them.
pub const BRIDGE_LINE: &str = "link add br0 type bridge stp_state 0 mcast_snooping 1 mcast_querier 1 \
     mcast_query_response_interval 100";

fn address(v4: Ipv4Addr, net: [u16; 4], host: u16) -> Addresses {
    Addresses { v4, v6: Ipv6Addr::new(net[0], net[1], net[2], net[3], 0, 0, 0, host) }
}

fn address_lines(at: Addresses, link: &str) -> Vec<String> {
    vec![
        format!("addr replace {}/24 dev {link}", at.v4),
        format!("addr replace {}/64 dev {link} nodad", at.v6),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_the_same_in_both_families() {
        let n3 = Place::Node(3).addresses().unwrap();
        assert_eq!((n3.v4.to_string(), n3.v6.to_string()), ("192.0.2.13".into(), "2001:db8:1::13".into()));
        let client = Place::Client.addresses().unwrap();
        assert_eq!(client.v6.to_string(), "2001:db8:1::100");
    }

    #[test]
    fn a_prefix_owns_its_places_and_nothing_that_looks_alike() {
        let hx = Prefix::new("hx").unwrap();
        for name in ["hx-n1", "hx-n64", "hx-sw", "hx-client", "hx-router", "hx-wan"] {
            assert!(hx.owns(name), "{name}");
        }
        for name in ["hxt1-n1", "hx-n0", "hx-n01", "hx-n65", "hx-", "hx", "hx-web-x1", "h-n1", "hx-nn"] {
            assert!(!hx.owns(name), "{name}");
        }
    }

    #[test]
    fn a_prefix_that_is_not_one_is_refused() {
        for text in ["", "1a", "a-b", "A", "a/b", "abcdefghijklm"] {
            assert!(Prefix::new(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn every_lan_host_has_one_port_and_no_address_is_given_twice() {
        let cables = cables(NODES_MAX);
        assert_eq!(cables.len(), usize::from(NODES_MAX) + 3);
        let mut seen: Vec<_> = places(NODES_MAX).iter().filter_map(|p| p.addresses()).collect();
        let all = seen.len();
        seen.sort_by_key(|at| at.v6);
        seen.dedup();
        assert_eq!(seen.len(), all);
    }

    #[test]
    fn in_lan_mode_the_client_is_left_to_learn_ipv6() {
        let lines = |lan| setup_lines(Place::Client, 3, lan).join("\n");
        assert!(lines(false).contains("2001:db8:1::100/64") && lines(false).contains("via 2001:db8:1::1 "));
        assert!(!lines(true).contains("2001:") && lines(true).contains("192.0.2.100/24"));
        let node = |lan| setup_lines(Place::Node(1), 3, lan);
        assert_eq!(node(true), node(false));
        assert_eq!(lan_prefix(), "2001:db8:1::/64");
    }

    #[test]
    fn only_the_router_forwards() {
        let forwards =
            |place| sysctls(place).iter().any(|(key, value)| key.ends_with("forwarding") && *value == "1");
        let forwarding: Vec<_> = places(3).into_iter().filter(|place| forwards(*place)).collect();
        assert_eq!(forwarding, [Place::Router]);
    }
}
