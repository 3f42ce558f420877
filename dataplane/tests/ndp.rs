//! Neighbour discovery for pods between real kernels, with the BPF programs and with the kernel's own proxy. Where
//! the two differ, the test says so, and docs/ndp.md does.

#[path = "ndp/rig.rs"]
mod rig;
#[path = "bpf/support.rs"]
mod support;
#[path = "ndp/tap.rs"]
mod tap;

use std::{net::Ipv6Addr, time::Duration};

use dataplane::NdpBackend;
use dataplane_core::Action;
use rig::*;
use support::{icmpv6, link_layer, solicitation};
use tap::{Advertised, Tap};

/// Each test once per backend.
macro_rules! both {
    ($($name:ident,)*) => {$(
        mod $name {
            #[test]
            fn ebpf() {
                if super::support::may_run(concat!("ndp ", stringify!($name))) {
                    super::suite::$name(dataplane::NdpBackend::Ebpf);
                }
            }

            #[test]
            fn kernel() {
                if super::support::may_run(concat!("ndp ", stringify!($name))) {
                    super::suite::$name(dataplane::NdpBackend::Kernel);
                }
            }
        }
    )*};
}

both! {
    every_kind_of_solicitation_is_answered,
    a_new_address_is_announced,
}

const GROUP_MAC: [u8; 6] = [0x33, 0x33, 0xff, 0xab, 0xcd, 0xef];
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_ROUTERS_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 2];

const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

fn all_nodes() -> Ipv6Addr {
    "ff02::1".parse().unwrap()
}

fn all_routers() -> Ipv6Addr {
    "ff02::2".parse().unwrap()
}

/// A solicitation for a pod to its group, from the host.
fn ask(target: Ipv6Addr) -> Vec<u8> {
    icmpv6((GROUP_MAC, HOST_MAC), host(), group(), 255, &solicitation(target, &link_layer(1, HOST_MAC)))
}

mod suite {
    use super::*;

    pub(super) fn every_kind_of_solicitation_is_answered(backend: NdpBackend) {
        let lan = Lan::new();
        let node = Node::start(&lan, Role { announces: false, ..Role::new("a", backend) });
        node.reconcile(&[pod(1)]);
        let tap = Tap::open(&lan, "host");
        let slla = link_layer(1, HOST_MAC);
        let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
        let link_local: Ipv6Addr = "fe80::ff:fe00:64".parse().unwrap();
        let unspecified = Ipv6Addr::UNSPECIFIED;
        let cases: [(&str, [u8; 6], Ipv6Addr, Ipv6Addr, Vec<u8>); 7] = [
            ("multicast, global source", GROUP_MAC, host(), group(), slla.clone()),
            ("multicast, link-local source", GROUP_MAC, link_local, group(), slla.clone()),
            ("unicast, global source", MAC_A, host(), pod(1), slla.clone()),
            ("unicast, link-local source", MAC_A, link_local, pod(1), slla.clone()),
            ("multicast, nonce", GROUP_MAC, host(), group(), [&nonce[..], &slla].concat()),
            ("DAD probe", GROUP_MAC, unspecified, group(), vec![]),
            ("DAD probe with a nonce", GROUP_MAC, unspecified, group(), nonce.to_vec()),
        ];
        for (name, to_mac, source, to, options) in cases {
            tap.send(&icmpv6((to_mac, HOST_MAC), source, to, 255, &solicitation(pod(1), &options)));
            let answer = tap.find(name, |heard| heard.advertisement());
            let dad = source.is_unspecified();
            let expected = Advertised {
                to_mac: if dad { ALL_NODES_MAC } else { HOST_MAC },
                from_mac: MAC_A,
                source: answer.source,
                to: if dad { all_nodes() } else { source },
                flags: if dad { ROUTER } else { ROUTER | SOLICITED },
                target: pod(1),
                mac: Some(MAC_A),
            };
            assert_eq!(answer, expected, "{name}");
            // The kernel answers with an address of its own, of either scope.
            if backend == NdpBackend::Ebpf {
                assert_eq!(answer.source, pod(1), "{name}");
            }
        }
    }

    pub(super) fn a_new_address_is_announced(backend: NdpBackend) {
        let lan = Lan::new();
        let mut node = Node::start(&lan, Role::new("a", backend));
        let tap = Tap::open(&lan, "host");
        let ops = node.reconcile(&[pod(1)]);
        assert!(ops.iter().any(|op| matches!(op.action, Action::NdpSet { .. } | Action::ProxyAdd { .. })));
        let to_nodes = (ALL_NODES_MAC, all_nodes(), ROUTER | OVERRIDE);
        let to_routers = (ALL_ROUTERS_MAC, all_routers(), ROUTER);
        for (to_mac, to, flags) in [to_nodes, to_routers, to_nodes, to_nodes] {
            let (from_mac, target) = (MAC_A, pod(1));
            let expected =
                Advertised { to_mac, from_mac, source: target, to, flags, target, mac: Some(MAC_A) };
            assert_eq!(tap.find("an announcement", |heard| heard.advertisement()), expected);
        }
        node.restart();
        node.reconcile(&[pod(1)]);
        let more = tap.all(Duration::from_millis(1500), |heard| heard.advertisement());
        assert_eq!(more, [], "a fourth one, or a restart that found everything as it was");
    }
}
