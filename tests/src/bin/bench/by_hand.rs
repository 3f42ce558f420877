//! What Hextet is compared with: the same pods, routes, masquerade and NDP proxy, made with `ip`, `nft` and
//! sysctls as a network engineer would type them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use anyhow::Result;
use hextet_tests::{Testbed, command::Run, command::ip_batch, netns::NetNs, topology::Place};

/// The address of the pod on `n1` and `n2`, from a /64 for each node.
const POD_ADDRESSES: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0xfdbe, 0, 0, 1, 0, 0, 0, 0x10), Ipv6Addr::new(0xfdbe, 0, 0, 2, 0, 0, 0, 0x10)];
const POD_IPV4: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 254, 0, 2), Ipv4Addr::new(10, 254, 0, 3)];
const HOST_MAC: &str = "06:00:00:00:00:01";
const POD_MAC: &str = "02:00:00:00:00:01";

/// A testbed without a cluster, with a pod on `n1` and one on `n2`.
pub(crate) struct ByHand {
    pub(crate) testbed: Testbed,
    pods: [NetNs; 2],
}

impl ByHand {
    /// Makes the pods and the paths between them. `n1` masquerades; `n2` does not, and the router has a route
    /// back to its pod.
    pub(crate) fn make(testbed: Testbed) -> Result<Self> {
        let pods = [1, 2].map(|number| NetNs::named(format!("{}-bench-pod{number}", testbed.prefix())));
        let made = Self { testbed, pods };
        for index in 0..2 {
            made.make_pod(index)?;
        }
        made.masquerade_on_n1()?;
        let back = format!("route replace {}/32 via {}", POD_IPV4[1], lan(1).0);
        ip_batch(Some(&made.testbed.netns("router")), &[back])?;
        Ok(made)
    }

    /// The namespace of the pod on `n1` (0) or `n2` (1).
    pub(crate) fn pod(&self, index: usize) -> NetNs {
        self.pods[index].clone()
    }

    /// Its address.
    pub(crate) fn pod_address(&self, index: usize) -> IpAddr {
        POD_ADDRESSES[index].into()
    }

    fn make_pod(&self, index: usize) -> Result<()> {
        let node = self.testbed.netns(&format!("n{}", index + 1));
        let (pod, name) = (&self.pods[index], self.pods[index].name());
        let (address, ipv4) = (POD_ADDRESSES[index], POD_IPV4[index]);
        let other = 1 - index;
        ip_batch(None, &[format!("netns add {name}")])?;
        ip_batch(
            Some(&node),
            &[
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
                format!("route replace {}/64 via {} dev eth0", network(POD_ADDRESSES[other]), lan(other).1),
            ],
        )?;
        node.set_sysctls(&forwarding(&node)?)?;
        ip_batch(
            Some(pod),
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

    fn masquerade_on_n1(&self) -> Result<()> {
        let ruleset = "table ip bench {\n  chain post {\n    \
                       type nat hook postrouting priority srcnat\n    \
                       ip saddr 10.254.0.0/20 oifname \"eth0\" masquerade\n  }\n}\n";
        Run::new(&["nft", "-f", "-"]).stdin(ruleset).inside(&self.testbed.netns("n1")).success()?;
        Ok(())
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        for pod in &self.pods {
            // The testbed's own end, which comes next, reports what is left.
            pod.remove().ok();
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

/// The addresses of `n1` (0) or `n2` (1) on the LAN.
fn lan(index: usize) -> (Ipv4Addr, Ipv6Addr) {
    let number = u8::try_from(index + 1).expect("there are two");
    let at = Place::Node(number).addresses().expect("a node has addresses");
    (at.v4, at.v6)
}

/// The /64 of an address.
fn network(address: Ipv6Addr) -> Ipv6Addr {
    let s = address.segments();
    Ipv6Addr::new(s[0], s[1], s[2], s[3], 0, 0, 0, 0)
}
