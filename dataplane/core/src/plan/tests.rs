//! Plans as snapshots, and a model kernel that every plan must satisfy.

use std::collections::{BTreeMap, BTreeSet};

use expect_test::{Expect, expect};

use super::*;
use crate::{
    Filtering, Ipv6Exit, Link, Mac, MasqueradeBackend, NdpBackend, NftExit, NftTable, ObservedUplink, Place,
    Pod, Uplink,
};

mod model;

use model::Model;

const MAC: Mac = Mac([0x02, 0, 0, 0, 0, 0x11]);

fn desired(pods: usize) -> Desired {
    Desired {
        cluster: "fd00:1:2::/48".parse().unwrap(),
        node: "fd00:1:2:a::/64".parse().unwrap(),
        group: "abcdef".parse().unwrap(),
        pod_ipv4: "10.254.0.0/20".parse().unwrap(),
        uplink: Uplink {
            name: "eth0".to_owned(),
            ipv4: Some("192.0.2.11".parse().unwrap()),
            sources: BTreeMap::new(),
            global: None,
            on_link: BTreeSet::new(),
        },
        peers: [("fd00:1:2:b::/64".parse().unwrap(), "2001:db8:1::12".parse().unwrap())].into(),
        pods: (1..=pods).map(|n| (format!("web-{n}"), pod(n))).collect(),
        ndp: NdpBackend::Ebpf,
        masquerade: MasqueradeBackend::Ebpf,
        filtering: Filtering::default(),
        ipv6_exit: Ipv6Exit::None,
    }
}

fn pod(n: usize) -> Pod {
    Pod {
        address: format!("fd00:1:2:a:{n:x}:0:ab:cdef").parse().unwrap(),
        ipv4: format!("10.254.0.{n}").parse().unwrap(),
    }
}

/// A machine as it is found.
fn machine() -> Observed {
    let sysctl = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    Observed {
        force_forwarding: true,
        uplink: Some(ObservedUplink { mac: MAC, mtu_bytes: 1500 }),
        host: Stack {
            sysctls: [
                sysctl("net/ipv4/conf/eth0/forwarding", "0"),
                sysctl("net/ipv6/conf/eth0/accept_ra", "1"),
                sysctl("net/ipv6/conf/eth0/force_forwarding", "0"),
                sysctl("net/ipv6/conf/eth0/forwarding", "0"),
                sysctl("net/ipv6/conf/all/forwarding", "0"),
                sysctl("net/ipv6/conf/all/proxy_ndp", "0"),
                sysctl("net/ipv6/conf/eth0/proxy_ndp", "0"),
                sysctl("net/ipv6/neigh/eth0/proxy_delay", "80"),
            ]
            .into(),
            ..Stack::default()
        },
        has_nft: true,
        bpf: Some(ObservedBpf::default()),
        ..Observed::default()
    }
}

fn kernel_backends(desired: Desired) -> Desired {
    Desired { ndp: NdpBackend::Kernel, masquerade: MasqueradeBackend::Nftables, ..desired }
}

/// Checks the plan's text, and that a machine to which it was applied needs nothing more.
#[track_caller]
fn check(desired: &Desired, observed: &Observed, expected: Expect) -> Observed {
    let ops = plan(desired, observed);
    expected.assert_eq(&text(&ops));
    let after = Model::apply(observed, &ops);
    assert_eq!(text(&plan(desired, &after)), "", "a second plan must be empty");
    after
}

fn text(ops: &[Op]) -> String {
    ops.iter().map(|op| format!("{op}\n")).collect()
}

fn settled(desired: &Desired, machine: Observed) -> Observed {
    let after = Model::apply(&machine, &plan(desired, &machine));
    assert_eq!(text(&plan(desired, &after)), "");
    after
}

#[test]
fn fresh_node_with_one_pod() {
    check(
        &desired(1),
        &machine(),
        expect![[r#"
        protocol add 118 hextet
        route add unreachable 10.254.0.0/20 proto hextet metric 4294967295
        route add unreachable fd00:1:2::/48 proto hextet metric 4294967295
        route add unreachable fd00:1:2:a::/64 proto hextet metric 4294967295
        sysctl net/ipv4/conf/eth0/forwarding=1
        sysctl net/ipv6/conf/eth0/force_forwarding=1
        route add fd00:1:2:b::/64 via 2001:db8:1::12 dev eth0 proto hextet metric 1024
        addr replace ff02::1:ffab:cdef/128 dev eth0 autojoin proto 118
        bpf masquerade set src 10.254.0.0/20 to 192.0.2.11
        bpf attach uplink_ingress dev eth0
        bpf attach uplink_egress dev eth0
        bpf attach uplink_backstop dev eth0
        nft table ip hextet oifname != hx* oifname != eth0 ip saddr 10.254.0.0/20 drop
        netns add web-1
        link add hx0001000000 address 06:00:01:00:00:00 mtu 1500 type veth peer name eth0 address 02:00:01:00:00:00 netns web-1
        link set hx0001000000 up address 06:00:01:00:00:00 mtu 1500 addrgenmode none alias web-1
        -n web-1 link set eth0 up address 02:00:01:00:00:00 mtu 1500 addrgenmode none
        -n web-1 link set lo up
        -n web-1 sysctl net/ipv4/ip_unprivileged_port_start=0
        -n web-1 sysctl net/ipv4/ping_group_range="0 2147483647"
        -n web-1 sysctl net/ipv6/conf/eth0/accept_ra=0
        -n web-1 addr replace 10.254.0.1/32 dev eth0 proto 118
        -n web-1 addr replace fd00:1:2:a:1:0:ab:cdef/128 dev eth0 nodad proto 118
        -n web-1 neigh replace fe80::1 lladdr 06:00:01:00:00:00 dev eth0 nud permanent
        -n web-1 route add default via inet6 fe80::1 dev eth0 proto hextet
        -n web-1 route add default via fe80::1 dev eth0 proto hextet metric 1024
        bpf guard set hx0001000000 src fd00:1:2:a:1:0:ab:cdef src 10.254.0.1 lladdr 02:00:01:00:00:00
        bpf attach pod_guard dev hx0001000000
        sysctl net/ipv4/conf/hx0001000000/forwarding=1
        sysctl net/ipv6/conf/hx0001000000/accept_ra=0
        sysctl net/ipv6/conf/hx0001000000/accept_redirects=0
        sysctl net/ipv6/conf/hx0001000000/force_forwarding=1
        addr replace fe80::1/64 dev hx0001000000 nodad proto 118
        neigh replace 10.254.0.1 lladdr 02:00:01:00:00:00 dev hx0001000000 nud permanent
        neigh replace fd00:1:2:a:1:0:ab:cdef lladdr 02:00:01:00:00:00 dev hx0001000000 nud permanent
        route add 10.254.0.1/32 dev hx0001000000 proto hextet
        route add fd00:1:2:a:1:0:ab:cdef/128 dev hx0001000000 proto hextet metric 1024
        bpf ndp set fd00:1:2:a:1:0:ab:cdef lladdr 02:00:00:00:00:11
    "#]],
    );
}

/// All that differs from a node with a /64 of its own: no unreachable route for the LAN's, and no route to who
/// shares it or is on another LAN.
#[test]
fn a_node_whose_pods_have_addresses_of_the_lan_routes_only_what_is_a_nodes_own() {
    let own = desired(1);
    let pod = Pod { address: "2001:db8:1:0:1:0:ab:cdef".parse().unwrap(), ..own.pods["web-1"] };
    let mut lan = Desired {
        node: "2001:db8:1::/64".parse().unwrap(),
        pods: [("web-1".to_owned(), pod)].into(),
        ..own.clone()
    };
    for prefix in ["2001:db8:1::/64", "2001:db8:2::/64"] {
        lan.peers.insert(prefix.parse().unwrap(), "2001:db8:1::13".parse().unwrap());
    }
    let plans = [plan(&own, &machine()), plan(&lan, &machine())].map(|ops| {
        text(&ops).replace("2001:db8:1:0:1:0:ab:cdef", "POD").replace("fd00:1:2:a:1:0:ab:cdef", "POD")
    });
    let only = |one: &str, other: &str| {
        one.lines().filter(|line| !other.lines().any(|it| it == *line)).map(str::to_owned).collect::<Vec<_>>()
    };
    let unreachable = "route add unreachable fd00:1:2:a::/64 proto hextet metric 4294967295";
    assert_eq!(only(&plans[0], &plans[1]), [unreachable]);
    assert_eq!(only(&plans[1], &plans[0]), Vec::<String>::new());
    settled(&lan, machine());
}

#[test]
fn kernel_backends_need_no_bpf() {
    let machine = Observed { bpf: None, ..machine() };
    check(
        &kernel_backends(desired(1)),
        &machine,
        expect![[r#"
        protocol add 118 hextet
        route add unreachable 10.254.0.0/20 proto hextet metric 4294967295
        route add unreachable fd00:1:2::/48 proto hextet metric 4294967295
        route add unreachable fd00:1:2:a::/64 proto hextet metric 4294967295
        sysctl net/ipv6/conf/eth0/accept_ra=2
        sysctl net/ipv4/conf/eth0/forwarding=1
        sysctl net/ipv6/conf/eth0/force_forwarding=1
        sysctl net/ipv6/conf/eth0/forwarding=1
        sysctl net/ipv6/conf/all/proxy_ndp=1
        sysctl net/ipv6/conf/eth0/proxy_ndp=1
        sysctl net/ipv6/neigh/eth0/proxy_delay=0
        route add fd00:1:2:b::/64 via 2001:db8:1::12 dev eth0 proto hextet metric 1024
        addr replace ff02::1:ffab:cdef/128 dev eth0 autojoin proto 118
        nft table ip hextet oifname eth0 ip saddr 10.254.0.0/20 masquerade, oifname != hx* ip saddr 10.254.0.0/20 drop
        netns add web-1
        link add hx0001000000 address 06:00:01:00:00:00 mtu 1500 type veth peer name eth0 address 02:00:01:00:00:00 netns web-1
        link set hx0001000000 up address 06:00:01:00:00:00 mtu 1500 addrgenmode none alias web-1
        -n web-1 link set eth0 up address 02:00:01:00:00:00 mtu 1500 addrgenmode none
        -n web-1 link set lo up
        -n web-1 sysctl net/ipv4/ip_unprivileged_port_start=0
        -n web-1 sysctl net/ipv4/ping_group_range="0 2147483647"
        -n web-1 sysctl net/ipv6/conf/eth0/accept_ra=0
        -n web-1 addr replace 10.254.0.1/32 dev eth0 proto 118
        -n web-1 addr replace fd00:1:2:a:1:0:ab:cdef/128 dev eth0 nodad proto 118
        -n web-1 neigh replace fe80::1 lladdr 06:00:01:00:00:00 dev eth0 nud permanent
        -n web-1 route add default via inet6 fe80::1 dev eth0 proto hextet
        -n web-1 route add default via fe80::1 dev eth0 proto hextet metric 1024
        sysctl net/ipv4/conf/hx0001000000/forwarding=1
        sysctl net/ipv6/conf/hx0001000000/accept_ra=0
        sysctl net/ipv6/conf/hx0001000000/accept_redirects=0
        sysctl net/ipv6/conf/hx0001000000/force_forwarding=1
        addr replace fe80::1/64 dev hx0001000000 nodad proto 118
        neigh replace 10.254.0.1 lladdr 02:00:01:00:00:00 dev hx0001000000 nud permanent
        neigh replace fd00:1:2:a:1:0:ab:cdef lladdr 02:00:01:00:00:00 dev hx0001000000 nud permanent
        route add 10.254.0.1/32 dev hx0001000000 proto hextet
        route add fd00:1:2:a:1:0:ab:cdef/128 dev hx0001000000 proto hextet metric 1024
        neigh add proxy fd00:1:2:a:1:0:ab:cdef dev eth0 router proto hextet
    "#]],
    );
}

#[test]
fn without_force_forwarding_all_interfaces_forward_and_advertisements_stay_accepted() {
    let machine = Observed { force_forwarding: false, ..machine() };
    check(
        &desired(0),
        &machine,
        expect![[r#"
        protocol add 118 hextet
        route add unreachable 10.254.0.0/20 proto hextet metric 4294967295
        route add unreachable fd00:1:2::/48 proto hextet metric 4294967295
        route add unreachable fd00:1:2:a::/64 proto hextet metric 4294967295
        sysctl net/ipv6/conf/eth0/accept_ra=2
        sysctl net/ipv4/conf/eth0/forwarding=1
        sysctl net/ipv6/conf/all/forwarding=1
        sysctl net/ipv6/conf/eth0/forwarding=1
        route add fd00:1:2:b::/64 via 2001:db8:1::12 dev eth0 proto hextet metric 1024
        addr replace ff02::1:ffab:cdef/128 dev eth0 autojoin proto 118
        bpf masquerade set src 10.254.0.0/20 to 192.0.2.11
        bpf attach uplink_ingress dev eth0
        bpf attach uplink_egress dev eth0
        bpf attach uplink_backstop dev eth0
        nft table ip hextet oifname != hx* oifname != eth0 ip saddr 10.254.0.0/20 drop
    "#]],
    );
}

#[test]
fn accept_ra_that_is_off_stays_off() {
    let mut machine = machine();
    machine.host.sysctls.insert("net/ipv6/conf/eth0/accept_ra".to_owned(), "0".to_owned());
    let ops = text(&plan(&kernel_backends(desired(0)), &machine));
    assert!(!ops.contains("accept_ra"), "{ops}");
}

#[test]
fn second_pod_is_made_beside_the_first() {
    let observed = settled(&desired(1), machine());
    let ops = plan(&desired(2), &observed);
    assert!(ops.iter().all(|op| op.pod.as_deref() == Some("web-2")), "{}", text(&ops));
}

#[test]
fn removed_pod_goes_from_the_outside_in() {
    let observed = settled(&desired(2), machine());
    check(
        &desired(1),
        &observed,
        expect![[r#"
        bpf ndp del fd00:1:2:a:2:0:ab:cdef
        route del 10.254.0.2/32 dev hx0002000000 proto hextet
        route del fd00:1:2:a:2:0:ab:cdef/128 dev hx0002000000 proto hextet metric 1024
        bpf guard del hx0002000000
        link del hx0002000000
        bpf detach pod_guard dev hx0002000000
        netns del web-2
    "#]],
    );
}

#[test]
fn peer_that_moved_is_replaced_in_place() {
    let observed = settled(&desired(0), machine());
    let mut desired = desired(0);
    desired.peers.values_mut().for_each(|hop| *hop = "2001:db8:1::99".parse().unwrap());
    check(
        &desired,
        &observed,
        expect![[r#"
        route replace fd00:1:2:b::/64 via 2001:db8:1::99 dev eth0 proto hextet metric 1024
    "#]],
    );
}

#[test]
fn peer_that_left_loses_its_route() {
    let observed = settled(&desired(0), machine());
    let desired = Desired { peers: [].into(), ..desired(0) };
    check(
        &desired,
        &observed,
        expect![[r#"
        route del fd00:1:2:b::/64 via 2001:db8:1::12 dev eth0 proto hextet metric 1024
    "#]],
    );
}

#[test]
fn own_prefix_among_the_peers_is_not_routed_away() {
    let mut desired = desired(0);
    desired.peers.insert(desired.node, "2001:db8:1::11".parse().unwrap());
    let ops = text(&plan(&desired, &machine()));
    assert!(!ops.contains("via 2001:db8:1::11"), "{ops}");
}

#[test]
fn deleted_route_neighbour_and_address_come_back_and_nothing_else_is_touched() {
    let mut observed = settled(&desired(2), machine());
    let lost = |dev: &str| dev == "hx0001000000";
    observed.host.routes.retain(|route| !(route.dev().is_some_and(lost) && route.destination.is_ipv6()));
    observed.host.neighbours.retain(|n| !(lost(&n.dev) && n.address.is_ipv6()));
    let inside = &mut observed.pods.get_mut("web-2").unwrap().stack;
    inside.addresses.retain(|address| address.network.is_ipv4());
    inside.routes.clear();
    check(
        &desired(2),
        &observed,
        expect![[r#"
        neigh replace fd00:1:2:a:1:0:ab:cdef lladdr 02:00:01:00:00:00 dev hx0001000000 nud permanent
        route add fd00:1:2:a:1:0:ab:cdef/128 dev hx0001000000 proto hextet metric 1024
        -n web-2 addr replace fd00:1:2:a:2:0:ab:cdef/128 dev eth0 nodad proto 118
        -n web-2 route add default via inet6 fe80::1 dev eth0 proto hextet
        -n web-2 route add default via fe80::1 dev eth0 proto hextet metric 1024
    "#]],
    );
}

#[test]
fn wrong_neighbour_is_overwritten() {
    let mut observed = settled(&desired(1), machine());
    let mut neighbour = observed.host.neighbours.pop_first().unwrap();
    neighbour.mac = Mac([2; 6]);
    observed.host.neighbours.insert(neighbour);
    check(
        &desired(1),
        &observed,
        expect![[r#"
        neigh replace 10.254.0.1 lladdr 02:00:01:00:00:00 dev hx0001000000 nud permanent
    "#]],
    );
}

#[test]
fn link_that_went_down_is_set_up_again() {
    let mut observed = settled(&desired(1), machine());
    observed.links.values_mut().for_each(|link| link.up = false);
    check(
        &desired(1),
        &observed,
        expect![[r#"
        link set hx0001000000 up address 06:00:01:00:00:00 mtu 1500 addrgenmode none alias web-1
    "#]],
    );
}

#[test]
fn link_whose_pod_side_is_gone_is_made_anew() {
    let mut observed = settled(&desired(1), machine());
    let pod = observed.pods.get_mut("web-1").unwrap();
    pod.eth0 = None;
    pod.stack = Stack::default();
    check(
        &desired(1),
        &observed,
        expect![[r#"
        bpf guard del hx0001000000
        link del hx0001000000
        bpf detach pod_guard dev hx0001000000
        link add hx0001000000 address 06:00:01:00:00:00 mtu 1500 type veth peer name eth0 address 02:00:01:00:00:00 netns web-1
        link set hx0001000000 up address 06:00:01:00:00:00 mtu 1500 addrgenmode none alias web-1
        -n web-1 link set eth0 up address 02:00:01:00:00:00 mtu 1500 addrgenmode none
        -n web-1 sysctl net/ipv4/ip_unprivileged_port_start=0
        -n web-1 sysctl net/ipv4/ping_group_range="0 2147483647"
        -n web-1 sysctl net/ipv6/conf/eth0/accept_ra=0
        -n web-1 addr replace 10.254.0.1/32 dev eth0 proto 118
        -n web-1 addr replace fd00:1:2:a:1:0:ab:cdef/128 dev eth0 nodad proto 118
        -n web-1 neigh replace fe80::1 lladdr 06:00:01:00:00:00 dev eth0 nud permanent
        -n web-1 route add default via inet6 fe80::1 dev eth0 proto hextet
        -n web-1 route add default via fe80::1 dev eth0 proto hextet metric 1024
        bpf guard set hx0001000000 src fd00:1:2:a:1:0:ab:cdef src 10.254.0.1 lladdr 02:00:01:00:00:00
        bpf attach pod_guard dev hx0001000000
        sysctl net/ipv4/conf/hx0001000000/forwarding=1
        sysctl net/ipv6/conf/hx0001000000/accept_ra=0
        sysctl net/ipv6/conf/hx0001000000/accept_redirects=0
        sysctl net/ipv6/conf/hx0001000000/force_forwarding=1
        addr replace fe80::1/64 dev hx0001000000 nodad proto 118
        neigh replace 10.254.0.1 lladdr 02:00:01:00:00:00 dev hx0001000000 nud permanent
        neigh replace fd00:1:2:a:1:0:ab:cdef lladdr 02:00:01:00:00:00 dev hx0001000000 nud permanent
        route add 10.254.0.1/32 dev hx0001000000 proto hextet
        route add fd00:1:2:a:1:0:ab:cdef/128 dev hx0001000000 proto hextet metric 1024
    "#]],
    );
}

#[test]
fn crash_between_namespace_and_link_is_continued() {
    let mut observed = settled(&desired(0), machine());
    observed.pods.insert("web-1".to_owned(), ObservedPod::default());
    let ops = text(&plan(&desired(1), &observed));
    assert!(!ops.contains("netns add"), "{ops}");
    assert!(ops.starts_with("link add hx0001000000"), "{ops}");
}

#[test]
fn mtu_of_the_uplink_is_followed() {
    let mut observed = settled(&desired(1), machine());
    observed.uplink = Some(ObservedUplink { mac: MAC, mtu_bytes: 9000 });
    check(
        &desired(1),
        &observed,
        expect![[r#"
        link set hx0001000000 up address 06:00:01:00:00:00 mtu 9000 addrgenmode none alias web-1
        -n web-1 link set eth0 up address 02:00:01:00:00:00 mtu 9000 addrgenmode none
    "#]],
    );
}

#[test]
fn new_mac_of_the_uplink_is_answered_with() {
    let mut observed = settled(&desired(1), machine());
    observed.uplink = Some(ObservedUplink { mac: Mac([2, 0, 0, 0, 0, 9]), mtu_bytes: 1500 });
    check(
        &desired(1),
        &observed,
        expect![[r#"
        bpf ndp set fd00:1:2:a:1:0:ab:cdef lladdr 02:00:00:00:00:09
    "#]],
    );
}

#[test]
fn switching_backends_leaves_nothing_of_the_old_ones() {
    let observed = settled(&desired(1), machine());
    let observed = check(
        &kernel_backends(desired(1)),
        &observed,
        expect![[r#"
        bpf ndp del fd00:1:2:a:1:0:ab:cdef
        sysctl net/ipv6/conf/eth0/accept_ra=2
        sysctl net/ipv6/conf/eth0/forwarding=1
        sysctl net/ipv6/conf/all/proxy_ndp=1
        sysctl net/ipv6/conf/eth0/proxy_ndp=1
        sysctl net/ipv6/neigh/eth0/proxy_delay=0
        nft table ip hextet oifname eth0 ip saddr 10.254.0.0/20 masquerade, oifname != hx* ip saddr 10.254.0.0/20 drop
        bpf detach uplink_ingress dev eth0
        bpf detach uplink_egress dev eth0
        bpf detach uplink_backstop dev eth0
        bpf masquerade del
        neigh add proxy fd00:1:2:a:1:0:ab:cdef dev eth0 router proto hextet
    "#]],
    );
    let back = check(
        &desired(1),
        &observed,
        expect![[r#"
        neigh del proxy fd00:1:2:a:1:0:ab:cdef dev eth0
        sysctl net/ipv6/conf/eth0/forwarding=0 (as it was)
        sysctl net/ipv6/conf/all/proxy_ndp=0 (as it was)
        sysctl net/ipv6/conf/eth0/accept_ra=1 (as it was)
        sysctl net/ipv6/conf/eth0/proxy_ndp=0 (as it was)
        sysctl net/ipv6/neigh/eth0/proxy_delay=80 (as it was)
        bpf masquerade set src 10.254.0.0/20 to 192.0.2.11
        bpf attach uplink_ingress dev eth0
        bpf attach uplink_egress dev eth0
        bpf attach uplink_backstop dev eth0
        nft table ip hextet oifname != hx* oifname != eth0 ip saddr 10.254.0.0/20 drop
        bpf ndp set fd00:1:2:a:1:0:ab:cdef lladdr 02:00:00:00:00:11
    "#]],
    );
    assert_eq!(back, settled(&desired(1), machine()));
}

#[test]
fn flushed_nft_table_and_foreign_content_are_written_anew() {
    let desired = kernel_backends(desired(0));
    let settled = settled(&desired, machine());
    for nft in [None, Some(NftTable::Other)] {
        let observed = Observed { nft, ..settled.clone() };
        let ops = text(&plan(&desired, &observed));
        assert_eq!(
            ops,
            "nft table ip hextet oifname eth0 ip saddr 10.254.0.0/20 masquerade, oifname != hx* ip saddr 10.254.0.0/20 drop\n"
        );
    }
}

#[test]
fn unique_local_pods_leave_for_the_ipv6_internet_with_the_global_address() {
    let observed = settled(&desired(0), machine());
    let mut desired = Desired { ipv6_exit: Ipv6Exit::Auto, ..desired(0) };
    let masquerade = |desired: &Desired| text(&plan(desired, &observed));
    let ipv4 = "bpf masquerade set src 10.254.0.0/20 to 192.0.2.11";
    assert_eq!(masquerade(&desired), format!("{ipv4} src fd00:1:2:a::/64 to nowhere\n"));
    desired.uplink.global = Some("2001:db8:1::11".parse().unwrap());
    desired.uplink.on_link = ["2001:db8:1::/64".parse().unwrap()].into();
    let exit = "to 2001:db8:1::11 dst 2001:db8:1::/64 direct\n";
    assert_eq!(masquerade(&desired), format!("{ipv4} src fd00:1:2:a::/64 {exit}"));
    desired.uplink.ipv4 = None;
    let alone = format!("bpf masquerade set src 10.254.0.0/20 to nothing src fd00:1:2:a::/64 {exit}");
    assert!(masquerade(&desired).contains(&alone), "{}", masquerade(&desired));
    desired.uplink.ipv4 = observed_ipv4();
    desired.node = "2001:db8:2:a::/64".parse().unwrap();
    assert!(!masquerade(&desired).contains("masquerade"), "global ones are good as they are");
    desired.ipv6_exit = Ipv6Exit::Masquerade;
    assert!(masquerade(&desired).contains("src 2001:db8:2:a::/64 to 2001:db8:1::11"));
}

#[test]
fn nftables_has_a_table_of_its_own_for_the_ipv6_internet() {
    let none = kernel_backends(desired(0));
    let mut desired = Desired { ipv6_exit: Ipv6Exit::Auto, ..none.clone() };
    let before = settled(&none, machine());
    let table = "nft table ip6 hextet oifname eth0 ip6 saddr fd00:1:2:a::/64";
    assert_eq!(text(&plan(&desired, &before)), format!("{table} drop\n"));
    desired.uplink.global = Some("2001:db8:1::11".parse().unwrap());
    desired.uplink.on_link = ["2001:db8:1::/64".parse().unwrap()].into();
    let direct = "ip6 daddr != 2001:db8:1::/64";
    assert_eq!(text(&plan(&desired, &before)), format!("{table} {direct} masquerade\n"));
    let after = settled(&desired, before);
    assert_eq!(text(&plan(&none, &after)), "nft delete table ip6 hextet\n");
    let foreign = Observed { nft_exit: Some(NftExit::Other), ..after };
    assert_eq!(text(&plan(&desired, &foreign)), format!("{table} {direct} masquerade\n"));
}

fn observed_ipv4() -> Option<std::net::Ipv4Addr> {
    desired(0).uplink.ipv4
}

#[test]
fn a_way_out_is_named_by_its_word() {
    for exit in [Ipv6Exit::Auto, Ipv6Exit::Masquerade, Ipv6Exit::None] {
        assert_eq!(exit.to_string().parse(), Ok(exit));
    }
    let error = "nat".parse::<Ipv6Exit>().unwrap_err().to_string();
    assert_eq!(error, "\"nat\" is not one of auto, masquerade, none");
}

#[test]
fn uplink_without_ipv4_has_no_masquerade() {
    let observed = settled(&desired(0), machine());
    let mut desired = desired(0);
    desired.uplink.ipv4 = None;
    check(
        &desired,
        &observed,
        expect![[r#"
        nft table ip hextet oifname != hx* ip saddr 10.254.0.0/20 drop
        bpf detach uplink_egress dev eth0
        bpf detach uplink_backstop dev eth0
        bpf masquerade del
    "#]],
    );
}

#[test]
fn guard_of_a_device_that_has_gone_is_removed() {
    let mut observed = settled(&desired(1), machine());
    let bpf = observed.bpf.as_mut().unwrap();
    let guard = *bpf.guards.values().next().unwrap();
    bpf.guards.insert("if42".to_owned(), guard);
    check(
        &desired(1),
        &observed,
        expect![[r#"
        bpf guard del if42
    "#]],
    );
}

#[test]
fn teardown_is_the_way_back() {
    let observed = settled(&desired(1), machine());
    let ops = plan_teardown(&observed);
    expect![[r#"
        bpf ndp del fd00:1:2:a:1:0:ab:cdef
        route del 10.254.0.1/32 dev hx0001000000 proto hextet
        route del fd00:1:2:a:1:0:ab:cdef/128 dev hx0001000000 proto hextet metric 1024
        route del fd00:1:2:b::/64 via 2001:db8:1::12 dev eth0 proto hextet metric 1024
        addr del ff02::1:ffab:cdef/128 dev eth0
        bpf guard del hx0001000000
        link del hx0001000000
        bpf detach pod_guard dev hx0001000000
        netns del web-1
        sysctl net/ipv4/conf/eth0/forwarding=0 (as it was)
        sysctl net/ipv6/conf/eth0/force_forwarding=0 (as it was)
        bpf detach uplink_ingress dev eth0
        bpf detach uplink_egress dev eth0
        bpf detach uplink_backstop dev eth0
        nft delete table ip hextet
        bpf masquerade del
        route del unreachable 10.254.0.0/20 proto hextet metric 4294967295
        route del unreachable fd00:1:2::/48 proto hextet metric 4294967295
        route del unreachable fd00:1:2:a::/64 proto hextet metric 4294967295
        bpf unpin all
        protocol del 118 hextet
    "#]]
    .assert_eq(&text(&ops));
}

#[test]
fn teardown_leaves_the_machine_as_it_was_found() {
    for force_forwarding in [true, false] {
        for desired in [desired(3), kernel_backends(desired(3))] {
            let found = Observed { force_forwarding, ..machine() };
            let observed = settled(&desired, found.clone());
            let after = Model::apply(&observed, &plan_teardown(&observed));
            assert_eq!(after, found);
            assert_eq!(text(&plan_teardown(&after)), "");
        }
    }
}

#[test]
fn pod_is_announced_last_and_unreachable_routes_come_first() {
    for desired in [desired(3), kernel_backends(desired(3))] {
        let ops = plan(&desired, &machine());
        let lines: Vec<_> = ops.iter().map(Op::to_string).collect();
        let first_link = lines.iter().position(|line| line.starts_with("link add")).unwrap();
        let last_unreachable = lines.iter().rposition(|line| line.contains("unreachable")).unwrap();
        assert!(last_unreachable < first_link);
        for id in desired.pods.keys() {
            let own: Vec<_> = ops.iter().filter(|op| op.pod.as_ref() == Some(id)).collect();
            let first_route = own.iter().position(|op| is_way_in(op)).unwrap();
            assert!(own[first_route..].iter().all(|op| is_way_in(op)), "{id}: {lines:#?}");
        }
    }
}

/// Whether after `op` packets from elsewhere find the pod.
fn is_way_in(op: &Op) -> bool {
    op.place == Place::Host
        && matches!(op.action, Action::RouteAdd(_) | Action::NdpSet { .. } | Action::ProxyAdd { .. })
}

/// Damages a settled machine at random places: one plan repairs it, whatever is missing.
#[test]
fn every_damage_is_repaired_by_one_plan() {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut chance = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random.is_multiple_of(3)
    };
    for round in 0..500 {
        let desired = if round % 2 == 0 { desired(3) } else { kernel_backends(desired(3)) };
        let whole = settled(&desired, machine());
        let mut damaged = whole.clone();
        damage(&mut damaged, &mut chance);
        let after = Model::apply(&damaged, &plan(&desired, &damaged));
        assert_eq!(text(&plan(&desired, &after)), "", "round {round}");
        assert_eq!(after, whole, "round {round}");
    }
}

fn damage(observed: &mut Observed, chance: &mut impl FnMut() -> bool) {
    observed.host.routes.retain(|_| !chance());
    observed.host.neighbours.retain(|_| !chance());
    observed.host.addresses.retain(|_| !chance());
    observed.proxies.retain(|_| !chance());
    let links: Vec<_> = observed.links.keys().cloned().collect();
    for dev in links {
        if chance() {
            observed.remove_link(&dev);
        }
    }
    for pod in observed.pods.values_mut() {
        pod.lo_up &= !chance();
        pod.stack.routes.retain(|_| !chance());
        pod.stack.addresses.retain(|_| !chance());
        pod.stack.neighbours.retain(|_| !chance());
        pod.stack.sysctls.retain(|_, _| !chance());
    }
    if let Some(bpf) = &mut observed.bpf {
        bpf.attachments.retain(|_| !chance());
        bpf.ndp.retain(|_, _| !chance());
        bpf.guards.retain(|_, _| !chance());
        bpf.masquerade = bpf.masquerade.take().filter(|_| !chance());
    }
    if chance() {
        observed.nft = None;
    }
}

#[test]
fn what_others_undid_is_told_from_what_is_newly_wanted() {
    let before = desired(1);
    let mut kernel = settled(&before, machine());
    kernel.host.routes.retain(|route| route.hop == Hop::Unreachable);
    kernel.host.sysctls.insert("net/ipv4/conf/eth0/forwarding".to_owned(), "0".to_owned());
    kernel.bpf.as_mut().unwrap().attachments.remove(&(Program::UplinkIngress, "eth0".to_owned()));
    let mut now = desired(2);
    now.peers.insert("fd00:1:2:c::/64".parse().unwrap(), "2001:db8:1::13".parse().unwrap());

    let ops = plan(&now, &kernel);
    let repairs = crate::repairs(&before, &kernel, &ops);
    let found: String = repairs.iter().map(|op| op.found() + "\n").collect();
    expect![[r#"
        sysctl net/ipv4/conf/eth0/forwarding was no longer 1
        route fd00:1:2:b::/64 via 2001:db8:1::12 dev eth0 proto hextet metric 1024 was removed
        bpf uplink_ingress was taken off eth0
        route 10.254.0.1/32 dev hx0001000000 proto hextet was removed
        route fd00:1:2:a:1:0:ab:cdef/128 dev hx0001000000 proto hextet metric 1024 was removed
    "#]]
    .assert_eq(&found);
    assert!(ops.len() > repairs.len() + 5, "the second pod and the new peer are no repairs: {}", text(&ops));
    assert_eq!(crate::repairs(&before, &settled(&before, machine()), &[]), []);
}

//= RFC 8200 5/minimum
#[test]
fn links_of_pods_are_as_wide_as_the_uplink_and_wide_enough_for_ipv6() {
    for (uplink, link) in [(9000, 9000), (1400, 1400), (1280, 1280), (576, 1280)] {
        let mut machine = machine();
        machine.uplink = Some(ObservedUplink { mac: MAC, mtu_bytes: uplink });
        let after = settled(&desired(1), machine);
        let widths: Vec<u32> = after.links.values().map(|link| link.mtu_bytes).collect();
        assert_eq!(widths, [link], "the uplink has {uplink}");
    }
}
