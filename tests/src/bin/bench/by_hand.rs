//! What Hextet is compared with: the same pods, routes, masquerade and NDP proxy, made with `ip`, `nft` and
//! sysctls as a network engineer would type them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use anyhow::Result;
use hextet_tests::{Testbed, command::Run, command::ip_batch, netns::NetNs, topology::Place};

/// How many nodes there are, each with a pod.
pub(crate) const NODES: u8 = 4;
/// The node that does not masquerade.
pub(crate) const ROUTED: u8 = 2;

const HOST_MAC: &str = "06:00:00:00:00:01";
const POD_MAC: &str = "02:00:00:00:00:01";

/// A testbed without a cluster, with a pod on each node.
pub(crate) struct ByHand {
    pub(crate) testbed: Testbed,
}

impl ByHand {
    /// Makes the pods and the paths between them. All nodes masquerade but [`ROUTED`], and the router has a
    /// route back to its pod.
    pub(crate) fn make(testbed: Testbed) -> Result<Self> {
        let made = Self { testbed };
        for number in 1..=NODES {
            made.make_pod(number)?;
            if number != ROUTED {
                made.masquerade_on(number)?;
            }
        }
        let back = format!("route replace {}/32 via {}", pod_ipv4(ROUTED), lan(ROUTED).0);
        ip_batch(Some(&made.testbed.netns("router")), &[back])?;
        Ok(made)
    }

    /// The namespace of a node.
    pub(crate) fn node(&self, number: u8) -> NetNs {
        self.testbed.netns(&format!("n{number}"))
    }

    /// The namespace of a node's pod.
    pub(crate) fn pod(&self, number: u8) -> NetNs {
        NetNs::named(format!("{}-bench-pod{number}", self.testbed.prefix()))
    }

    /// The address of a node's pod, from a /64 for each node.
    pub(crate) fn pod_address(&self, number: u8) -> IpAddr {
        pod_ipv6(number).into()
    }

    fn make_pod(&self, number: u8) -> Result<()> {
        let (node, pod) = (self.node(number), self.pod(number));
        let (name, address, ipv4) = (pod.name(), pod_ipv6(number), pod_ipv4(number));
        ip_batch(None, &[format!("netns add {name}")])?;
        let to_others = (1..=NODES).filter(|other| *other != number).map(|other| {
            format!("route replace {}/64 via {} dev eth0", network(pod_ipv6(other)), lan(other).1)
        });
        let link = [
            format!(
                "link add pod0 address {HOST_MAC} type veth peer name eth0 address {POD_MAC} netns {name}"
            ),
            // The testbed's `down` finds a pod by the alias of its link.
            format!("link set pod0 addrgenmode none alias {name}"),
            "link set pod0 up".to_owned(),
            "addr add fe80::1/64 dev pod0 nodad".to_owned(),
            format!("neigh replace {address} lladdr {POD_MAC} dev pod0 nud permanent"),
            format!("neigh replace {ipv4} lladdr {POD_MAC} dev pod0 nud permanent"),
            format!("route replace {address}/128 dev pod0"),
            format!("route replace {ipv4}/32 dev pod0"),
        ];
        ip_batch(Some(&node), &link.into_iter().chain(to_others).collect::<Vec<_>>())?;
        node.set_sysctls(&forwarding(&node)?)?;
        ip_batch(
            Some(&pod),
            &[
                "link set lo up".to_owned(),
                "link set eth0 addrgenmode none".to_owned(),
                "link set eth0 up".to_owned(),
                format!("addr add {address}/128 dev eth0 nodad"),
                format!("addr add {ipv4}/32 dev eth0"),
                format!("neigh replace fe80::1 lladdr {HOST_MAC} dev eth0 nud permanent"),
                "route add default via fe80::1 dev eth0".to_owned(),
                "route add 0.0.0.0/0 via inet6 fe80::1 dev eth0".to_owned(),
            ],
        )
    }

    fn masquerade_on(&self, number: u8) -> Result<()> {
        let ruleset = "table ip bench {\n  chain post {\n    \
                       type nat hook postrouting priority srcnat\n    \
                       ip saddr 10.254.0.0/20 oifname \"eth0\" masquerade\n  }\n}\n";
        Run::new(&["nft", "-f", "-"]).stdin(ruleset).inside(&self.node(number)).success()?;
        Ok(())
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        for number in 1..=NODES {
            // The testbed's own end, which comes next, reports what is left.
            self.pod(number).remove().ok();
        }
    }
}

/// As Hextet forwards, for it is no other path: by interface where the kernel can (6.17), else everywhere. The
/// lookup of a route takes longer by interface.
fn forwarding(node: &NetNs) -> Result<Vec<(String, &'static str)>> {
    let by_interface = node.run(|| Path::new("/proc/sys/net/ipv6/conf/eth0/force_forwarding").exists())?;
    let ipv6: &[&str] = if by_interface {
        &["net/ipv6/conf/eth0/force_forwarding", "net/ipv6/conf/pod0/force_forwarding"]
    } else {
        &["net/ipv6/conf/all/forwarding"]
    };
    let both = ipv6.iter().copied().chain(["net/ipv4/ip_forward"]);
    Ok(both.map(|key| (key.to_owned(), "1")).collect())
}

/// The addresses of a node on the LAN.
fn lan(number: u8) -> (Ipv4Addr, Ipv6Addr) {
    let at = Place::Node(number).addresses().expect("a node has addresses");
    (at.v4, at.v6)
}

fn pod_ipv6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfdbe, 0, 0, number.into(), 0, 0, 0, 0x10)
}

fn pod_ipv4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 254, 0, 1 + number)
}

/// The /64 of an address.
fn network(address: Ipv6Addr) -> Ipv6Addr {
    let s = address.segments();
    Ipv6Addr::new(s[0], s[1], s[2], s[3], 0, 0, 0, 0)
}
