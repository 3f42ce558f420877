//! Which solicitations are answered, and how.

use std::{net::Ipv6Addr, time::Duration};

use dataplane::NdpBackend;

use crate::{
    ALL_NODES_MAC, GROUP_MAC, ROUTER, SOLICITED, all_nodes, ask,
    rig::*,
    support::{fix_icmpv6, icmpv6, link_layer, solicitation},
    tap::{Advertised, Heard, Tap},
};

/// A node that answers for [`pod`] 1 and says nothing of its own accord.
fn quiet_node(lan: &Lan, backend: NdpBackend) -> Node {
    let node = Node::start(lan, Role { announces: false, ..Role::new("a", backend) });
    node.reconcile(&[pod(1)]);
    node
}

fn advertisement(heard: &Heard) -> Option<Advertised> {
    heard.advertisement()
}

/// Name, MAC address and IPv6 addresses from and to, options.
type Question = (&'static str, [u8; 6], Ipv6Addr, Ipv6Addr, Vec<u8>);

pub(crate) fn every_kind_of_solicitation_is_answered(backend: NdpBackend) {
    let lan = Lan::new();
    let _node = quiet_node(&lan, backend);
    let tap = Tap::open(&lan, "host");
    let slla = link_layer(1, HOST_MAC);
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    let link_local: Ipv6Addr = "fe80::ff:fe00:64".parse().unwrap();
    let unspecified = Ipv6Addr::UNSPECIFIED;
    let cases: [Question; 8] = [
        ("multicast, global source", GROUP_MAC, host(), group(), slla.clone()),
        ("multicast, link-local source", GROUP_MAC, link_local, group(), slla.clone()),
        ("unicast, global source", MAC_A, host(), pod(1), slla.clone()),
        ("unicast, link-local source", MAC_A, link_local, pod(1), slla.clone()),
        ("unicast, no option", MAC_A, host(), pod(1), vec![]),
        ("multicast, nonce", GROUP_MAC, host(), group(), [&nonce[..], &slla].concat()),
        ("DAD probe", GROUP_MAC, unspecified, group(), vec![]),
        ("DAD probe with a nonce", GROUP_MAC, unspecified, group(), nonce.to_vec()),
    ];
    for (name, to_mac, source, to, options) in cases {
        tap.send(&icmpv6((to_mac, HOST_MAC), source, to, 255, &solicitation(pod(1), &options)));
        let answer = tap.find(name, advertisement);
        let dad = source.is_unspecified();
        let (kernel, unicast) = (backend == NdpBackend::Kernel, to == pod(1));
        let expected = Advertised {
            to_mac: if dad { ALL_NODES_MAC } else { HOST_MAC },
            from_mac: MAC_A,
            // The kernel answers with an address of its own.
            source: if kernel { answer.source } else { pod(1) },
            to: if dad { all_nodes() } else { source },
            flags: if dad { ROUTER } else { ROUTER | SOLICITED },
            target: pod(1),
            // Who asks the very MAC address need not be told it (RFC 4861 section 4.4); the kernel does not.
            mac: (!kernel || !unicast).then_some(MAC_A),
        };
        assert_eq!(answer, expected, "{name}");
    }
}

/// What is wrong, the counter, the frame, and whether the kernel's proxy answers it all the same.
type Wrong = (&'static str, &'static str, Vec<u8>, bool);

fn but(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = ask(pod(1));
    change(&mut frame);
    fix_icmpv6(&mut frame);
    frame
}

/// With an extension header of 8 bytes in front of what follows the IPv6 header.
fn behind(kind: u8, body: [u8; 6]) -> Vec<u8> {
    let frame = ask(pod(1));
    let mut out = [&frame[..54], &[58, 0], &body, &frame[54..]].concat();
    out[19] += 8;
    out[20] = kind;
    out
}

fn wrong() -> Vec<Wrong> {
    let probe = |to: Ipv6Addr, to_mac, options: &[u8]| {
        icmpv6((to_mac, HOST_MAC), Ipv6Addr::UNSPECIFIED, to, 255, &solicitation(pod(1), options))
    };
    let group_mac = but(|f| f[80] |= 1);
    let long = [link_layer(1, HOST_MAC), [vec![14, 16], vec![7; 126]].concat()].concat();
    let long = icmpv6((GROUP_MAC, HOST_MAC), host(), group(), 255, &solicitation(pod(1), &long));
    let mut checksum = ask(pod(1));
    checksum[57] ^= 1;
    vec![
        ("hop limit 254", "drop_hop_limit", but(|f| f[21] = 254), false),
        ("code 1", "drop_code", but(|f| f[55] = 1), false),
        ("a wrong checksum", "drop_checksum", checksum, false),
        ("a message of 28 bytes", "drop_length", but(|f| f[19] = 28), false),
        ("an option of length 0", "drop_option", but(|f| f[79] = 0), false),
        ("an option past the end", "drop_option", but(|f| f[79] = 2), false),
        ("a multicast target", "drop_target", but(|f| f[62] = 0xff), false),
        (
            "a probe with a link-layer option",
            "drop_source",
            probe(group(), GROUP_MAC, &link_layer(1, HOST_MAC)),
            false,
        ),
        ("a probe to all nodes", "drop_destination", probe(all_nodes(), ALL_NODES_MAC, &[]), false),
        ("a first fragment", "drop_fragment", behind(44, [0, 1, 1, 2, 3, 4]), false),
        ("an atomic fragment", "drop_fragment", behind(44, [0, 0, 1, 2, 3, 4]), false),
        ("hop-by-hop options", "drop_extension_header", behind(0, [1, 4, 0, 0, 0, 0]), true),
        ("a group's MAC address to answer to", "drop_option", group_mac, true),
        ("more options than are looked at", "drop_too_long", long, true),
    ]
}

pub(crate) fn what_rfc_4861_forbids_is_not_answered(backend: NdpBackend) {
    let lan = Lan::new();
    let node = quiet_node(&lan, backend);
    let tap = Tap::open(&lan, "host");
    for (name, counter, frame, kernel_answers) in wrong() {
        let before = node.count(counter);
        tap.send(&frame);
        // Whatever is answered to the bad one comes before the answer to the good one, whose asker is another.
        let end: Ipv6Addr = "2001:db8:1::e0d".parse().unwrap();
        let message = solicitation(pod(1), &link_layer(1, HOST_MAC));
        tap.send(&icmpv6((GROUP_MAC, HOST_MAC), end, group(), 255, &message));
        let mut answered = false;
        tap.find(name, |heard| {
            let to_end = heard.advertisement()?.to == end;
            answered |= !to_end;
            to_end.then_some(())
        });
        match backend {
            NdpBackend::Ebpf => {
                assert!(!answered, "{name}: answered");
                assert_eq!(node.count(counter), before + 1, "{name}: {:?}", node.counters());
            }
            NdpBackend::Kernel => assert_eq!(answered, kernel_answers, "{name}: answered"),
        }
    }
}

pub(crate) fn a_tagged_solicitation_is_answered_with_its_tag(backend: NdpBackend) {
    const PRIORITY_5: u16 = 5 << 13;
    let lan = Lan::new();
    let _node = quiet_node(&lan, backend);
    let tap = Tap::open(&lan, "host");
    let answer = |heard: &Heard| heard.advertisement().map(|advertised| (advertised.target, heard.tag));
    for tag in [PRIORITY_5, 7, PRIORITY_5 | 4094] {
        tap.send_tagged(&ask(pod(1)), tag);
        match backend {
            NdpBackend::Ebpf => assert_eq!(tap.find("an answer", answer), (pod(1), Some(tag))),
            // A priority tag is taken off; a VLAN that the node has no device for is another link.
            NdpBackend::Kernel if tag == PRIORITY_5 => {
                assert_eq!(tap.find("an answer", answer), (pod(1), None));
            }
            NdpBackend::Kernel => {
                tap.send(&ask(pod(1)));
                tap.find("an answer to the untagged one", answer);
                assert_eq!(tap.all(Duration::from_millis(300), answer), [], "one more");
            }
        }
    }
    tap.send(&ask(pod(1)));
    assert_eq!(tap.find("an answer", answer), (pod(1), None), "without a tag to one without");
}

pub(crate) fn the_nodes_own_addresses_are_left_to_the_kernel(backend: NdpBackend) {
    let lan = Lan::new();
    let _node = quiet_node(&lan, backend);
    for (address, scope) in [("fe80::ff:fe00:11", "%eth0"), ("2001:db8:1::11", "")] {
        lan.run_ip("host", "neigh flush all");
        let target = format!("{address}{scope}");
        until("the node answers to its own address", || lan.pings("host", &target).then_some(()));
        let neighbour = lan.neighbour("host", address.parse().unwrap()).expect("the host has asked");
        assert_eq!(neighbour.0, text(MAC_A));
    }
    // By hand, multicast and unicast, one answer each: not one of the kernel and one of a program.
    let tap = Tap::open(&lan, "host");
    let own: Ipv6Addr = "fe80::ff:fe00:11".parse().unwrap();
    let own_group = "ff02::1:ff00:11".parse().unwrap();
    let message = solicitation(own, &link_layer(1, HOST_MAC));
    for (to_mac, to) in [([0x33, 0x33, 0xff, 0, 0, 0x11], own_group), (MAC_A, own)] {
        tap.send(&icmpv6((to_mac, HOST_MAC), "fe80::ff:fe00:64".parse().unwrap(), to, 255, &message));
        let answer = |heard: &Heard| heard.advertisement().filter(|advertised| advertised.target == own);
        let answer_flags = tap.find("the kernel's answer", answer).flags;
        assert_eq!(answer_flags & SOLICITED, SOLICITED);
        assert_eq!(tap.all(Duration::from_millis(300), answer), [], "a second answer");
    }
}

pub(crate) fn a_snooping_switch_delivers_because_the_node_has_joined(backend: NdpBackend) {
    let lan = Lan::new();
    lan.snoop();
    let (host_tap, node_tap) = (Tap::open(&lan, "host"), Tap::open(&lan, "a"));
    let asked = |heard: &Heard| heard.solicitation().filter(|(target, _)| *target == pod(1));
    // Until the switch has asked around it does not know who listens, and floods.
    until("the switch keeps what nobody has asked for", || {
        node_tap.clear();
        host_tap.send(&ask(pod(1)));
        node_tap.all(Duration::from_millis(300), asked).is_empty().then_some(())
    });
    let node = quiet_node(&lan, backend);
    until("the switch has learnt that the node listens", || lan.snooped(group()).then_some(()));
    host_tap.clear();
    host_tap.send(&ask(pod(1)));
    let answer = host_tap.find("an answer through the switch", advertisement);
    assert_eq!((answer.target, answer.from_mac), (pod(1), MAC_A));
    // The program stays; without the membership it is not asked.
    if backend == NdpBackend::Ebpf {
        lan.run_ip("a", &format!("addr del {}/128 dev eth0", group()));
        until("the switch has learnt that the node has left", || (!lan.snooped(group())).then_some(()));
        let answered = node.count("answered");
        host_tap.clear();
        host_tap.send(&ask(pod(1)));
        assert_eq!(host_tap.all(Duration::from_millis(500), advertisement), []);
        assert_eq!(node.count("answered"), answered);
    }
}
