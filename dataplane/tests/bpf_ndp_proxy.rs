//! The NDP proxy in `uplink_ingress`, run by the kernel on crafted frames, and against the host's build of the same
//! logic.

#[path = "bpf/support.rs"]
mod support;

use std::{collections::BTreeMap, net::Ipv6Addr};

use dataplane::bpf::{Bpf, Program::UplinkIngress};
use dataplane_common::{
    ipv6::Address,
    ndp::{self, Verdict},
};
use support::*;

const UPLINK: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
const HOST: [u8; 6] = [2, 0, 0, 0, 0, 0x64];
const GROUP: [u8; 6] = [0x33, 0x33, 0xff, 0x12, 0x34, 0x56];
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

fn addr(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

fn pod() -> Ipv6Addr {
    addr("fd12:3456:789a:1:aaaa:bbbb:cc12:3456")
}

fn group() -> Ipv6Addr {
    addr("ff02::1:ff12:3456")
}

fn host() -> Ipv6Addr {
    addr("fd12:3456:789a:2::64")
}

fn open(pins: &Pins) -> Bpf {
    let mut bpf = pins.open();
    bpf.set_local_pod(pod(), UPLINK).unwrap();
    bpf
}

/// The advertisement as RFC 4861 section 4.4 draws it, made here by other means than the program's.
fn answer(to_mac: [u8; 6], to: Ipv6Addr, flags: u8) -> Vec<u8> {
    let mut message = vec![136, 0, 0, 0, flags, 0, 0, 0];
    message.extend(pod().octets());
    message.extend(link_layer(2, UPLINK));
    icmpv6((to_mac, UPLINK), pod(), to, 255, &message)
}

struct Case {
    name: &'static str,
    packet: Vec<u8>,
    verdict: i32,
    counter: &'static str,
    answer: Option<Vec<u8>>,
}

fn answered(name: &'static str, packet: Vec<u8>, answer: Vec<u8>) -> Case {
    Case { name, packet, verdict: REDIRECT, counter: "answered", answer: Some(answer) }
}

fn dropped(name: &'static str, counter: &'static str, packet: Vec<u8>) -> Case {
    Case { name, packet, verdict: DROP, counter, answer: None }
}

fn passed(name: &'static str, packet: Vec<u8>) -> Case {
    Case { name, packet, verdict: NEXT, counter: "pass", answer: None }
}

fn ns(options: &[u8]) -> Vec<u8> {
    icmpv6((GROUP, HOST), host(), group(), 255, &solicitation(pod(), options))
}

/// A solicitation that is right but for one change, its checksum mended.
fn but(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = ns(&link_layer(1, HOST));
    change(&mut frame);
    fix_icmpv6(&mut frame);
    frame
}

/// A frame with an extension header of 8 bytes in front of what follows the IPv6 header.
fn behind(kind: u8, body: &[u8; 6], frame: &[u8]) -> Vec<u8> {
    let mut out = frame[..54].to_vec();
    out.extend([frame[20], 0]);
    out.extend(body);
    out.extend(&frame[54..]);
    out[20] = kind;
    let length = (out.len() - 54) as u16;
    out[18..20].copy_from_slice(&length.to_be_bytes());
    out
}

/// A good solicitation behind a fragment header with this offset and M flag.
fn fragment(offset_and_more: u8) -> Vec<u8> {
    behind(44, &[0, offset_and_more, 1, 2, 3, 4], &ns(&link_layer(1, HOST)))
}

fn answers() -> Vec<Case> {
    let slla = link_layer(1, HOST);
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    let solicited = answer(HOST, host(), 0xc0);
    let link_local = addr("fe80::64");
    let other = [2, 9, 9, 9, 9, 9];
    let long = [slla.clone(), [vec![14, 15], vec![7; 118]].concat()].concat();
    let dad = |options: &[u8]| {
        icmpv6((GROUP, HOST), Ipv6Addr::UNSPECIFIED, group(), 255, &solicitation(pod(), options))
    };
    let to_all = answer(ALL_NODES, addr("ff02::1"), 0x80);
    let mut cases = vec![
        answered("multicast from a global source", ns(&slla), solicited.clone()),
        answered(
            "multicast from a link-local source",
            icmpv6((GROUP, HOST), link_local, group(), 255, &solicitation(pod(), &slla)),
            answer(HOST, link_local, 0xc0),
        ),
        answered(
            "unicast",
            icmpv6((UPLINK, HOST), host(), pod(), 255, &solicitation(pod(), &slla)),
            solicited.clone(),
        ),
        answered(
            "unicast without option: the frame grows",
            icmpv6((UPLINK, HOST), host(), pod(), 255, &solicitation(pod(), &[])),
            solicited.clone(),
        ),
        answered(
            "nonce before the link-layer address: the frame shrinks",
            ns(&[&nonce[..], &slla].concat()),
            solicited.clone(),
        ),
        answered("nonce after the link-layer address", ns(&[&slla[..], &nonce].concat()), solicited.clone()),
        answered("as many options as are looked at", ns(&long), solicited.clone()),
        answered(
            "the option wins over the frame's source",
            ns(&link_layer(1, other)),
            answer(other, host(), 0xc0),
        ),
        answered(
            "bytes behind the message are not looked at",
            [ns(&slla), vec![0xee; 7]].concat(),
            solicited,
        ),
        answered("DAD probe", dad(&[]), to_all.clone()),
        answered("DAD probe with a nonce (RFC 7527)", dad(&nonce), to_all),
    ];
    for case in cases.iter_mut().filter(|c| c.name.starts_with("DAD")) {
        case.counter = "answered_dad";
    }
    cases
}

fn drops() -> Vec<Case> {
    let slla = link_layer(1, HOST);
    let dad = |to: Ipv6Addr, options: &[u8]| {
        icmpv6((GROUP, HOST), Ipv6Addr::UNSPECIFIED, to, 255, &solicitation(pod(), options))
    };
    let too_many = [slla.clone(), [vec![14, 16], vec![7; 126]].concat()].concat();
    let mut checksum = ns(&slla);
    checksum[57] ^= 1;
    let mut cut = ns(&slla);
    cut.truncate(cut.len() - 1);
    let mut short = ns(&[]);
    short[19] = 16;
    vec![
        dropped("hop limit 254", "drop_hop_limit", but(|f| f[21] = 254)),
        dropped("code 1", "drop_code", but(|f| f[55] = 1)),
        dropped("checksum", "drop_checksum", checksum),
        dropped("frame cut in the option", "drop_length", cut),
        dropped("ICMP length below 24", "drop_length", short),
        dropped(
            "length not in units of 8",
            "drop_length",
            icmpv6((GROUP, HOST), host(), group(), 255, &[solicitation(pod(), &slla), vec![0; 4]].concat()),
        ),
        dropped("option of length 0", "drop_option", but(|f| f[79] = 0)),
        dropped("option past the end", "drop_option", but(|f| f[79] = 2)),
        dropped("link-layer option of 16 bytes", "drop_option", ns(&[vec![1, 2], vec![2; 14]].concat())),
        dropped("link-layer address is a group", "drop_option", ns(&link_layer(1, [0x33, 0x33, 0, 0, 0, 1]))),
        dropped("more options than are looked at", "drop_too_long", ns(&too_many)),
        dropped(
            "multicast source",
            "drop_source",
            icmpv6((GROUP, HOST), addr("ff02::1"), group(), 255, &solicitation(pod(), &slla)),
        ),
        dropped("DAD probe with a link-layer option", "drop_source", dad(group(), &slla)),
        dropped("multicast target", "drop_target", but(|f| f[62] = 0xff)),
        dropped("in a first fragment", "drop_fragment", fragment(1)),
        dropped("in an atomic fragment", "drop_fragment", fragment(0)),
        dropped(
            "in a fragment behind options",
            "drop_fragment",
            behind(60, &[1, 4, 0, 0, 0, 0], &fragment(0)),
        ),
        dropped(
            "behind hop-by-hop options",
            "drop_extension_header",
            behind(0, &[1, 4, 0, 0, 0, 0], &ns(&slla)),
        ),
        dropped("DAD probe to the pod itself", "drop_destination", dad(pod(), &[])),
        dropped("DAD probe to all nodes", "drop_destination", dad(addr("ff02::1"), &[])),
    ]
}

fn passes() -> Vec<Case> {
    let slla = link_layer(1, HOST);
    let foreign = addr("fd12:3456:789a:1:aaaa:bbbb:cd12:3456");
    vec![
        passed(
            "another's address",
            icmpv6((GROUP, HOST), host(), group(), 255, &solicitation(foreign, &slla)),
        ),
        passed(
            "the node's own link-local",
            icmpv6((GROUP, HOST), host(), group(), 255, &solicitation(addr("fe80::11"), &slla)),
        ),
        passed("malformed, for another's address", {
            let mut f = icmpv6((GROUP, HOST), host(), group(), 1, &solicitation(foreign, &slla));
            f[57] ^= 1;
            f
        }),
        passed(
            "flooded frame for another MAC address",
            icmpv6(([2, 7, 7, 7, 7, 7], HOST), host(), pod(), 255, &solicitation(pod(), &slla)),
        ),
        passed("advertisement", but(|f| f[54] = 136)),
        passed(
            "echo request to the pod",
            icmpv6((UPLINK, HOST), host(), pod(), 64, &[128, 0, 0, 0, 0, 1, 0, 1]),
        ),
        passed("a hop-by-hop header of nonsense", but(|f| f[20] = 0)),
        passed("later fragment", fragment(8)),
        passed("echo request to the pod in a fragment", {
            let echo = icmpv6((UPLINK, HOST), host(), pod(), 64, &[128, 0, 0, 0, 0, 1, 0, 1]);
            behind(44, &[0, 1, 1, 2, 3, 4], &echo)
        }),
        passed("TCP to the pod", ipv6((UPLINK, HOST), host(), pod(), 6, 64, &[0; 20])),
        passed("version 4 with the EtherType of IPv6", but(|f| f[14] = 0x40)),
        passed("ARP", [&[0xff; 6][..], &HOST, &[8, 6], &[0; 28]].concat()),
        passed("nothing behind the IPv6 header", ipv6((GROUP, HOST), host(), group(), 58, 255, &[])),
    ]
}

//= RFC 4861 7.1.1/hop-limit, RFC 4861 7.1.1/checksum, RFC 4861 7.1.1/code, RFC 4861 7.1.1/length
//= RFC 4861 7.1.1/options, RFC 4861 7.1.1/unspecified-destination, RFC 4861 7.1.1/unspecified-option
//= RFC 4861 7.2.4/unicast, RFC 4861 7.2.4/target-option, RFC 4861 7.2.4/router, RFC 4861 7.2.4/solicited
//= RFC 4861 7.2.4/all-nodes, RFC 4861 7.2.8/override, RFC 7527 4.2/accept
#[test]
fn the_table_holds() {
    if !may_run("ndp_proxy table") {
        return;
    }
    let pins = Pins::new("ndp-table");
    let mut bpf = open(&pins);
    for Case { name, packet, verdict, counter, answer } in [answers(), drops(), passes()].concat_cases() {
        let before = pins.count("ndp_proxy", counter);
        let (got, out) = run(&mut bpf, UplinkIngress, &packet);
        assert_eq!(got, verdict, "{name}: verdict; counters {:?}", pins.counters());
        assert_eq!(pins.count("ndp_proxy", counter), before + 1, "{name}: counter {counter}");
        match answer {
            Some(answer) => assert_eq!(out, answer, "{name}: the frame sent back"),
            None => assert_eq!(out, packet, "{name}: the frame is left as it is"),
        }
    }
}

trait Concat {
    fn concat_cases(self) -> Vec<Case>;
}

impl<const N: usize> Concat for [Vec<Case>; N] {
    fn concat_cases(self) -> Vec<Case> {
        self.into_iter().flatten().collect()
    }
}

#[test]
fn every_truncation_of_a_solicitation_is_survived() {
    if !may_run("ndp_proxy truncations") {
        return;
    }
    let pins = Pins::new("ndp-cut");
    let mut bpf = open(&pins);
    let whole = ns(&link_layer(1, HOST));
    for n in FRAME_BYTES_MIN..whole.len() {
        let (verdict, _) = run(&mut bpf, UplinkIngress, &whole[..n]);
        assert_eq!(verdict, if n < 78 { NEXT } else { DROP }, "{n} bytes");
    }
}

#[test]
fn pods_are_answered_for_only_while_they_are_set() {
    if !may_run("ndp_proxy pods") {
        return;
    }
    let pins = Pins::new("ndp-pods");
    let mut bpf = pins.open();
    let packet = ns(&link_layer(1, HOST));
    assert_eq!(run(&mut bpf, UplinkIngress, &packet).0, NEXT);
    bpf.set_local_pod(pod(), UPLINK).unwrap();
    assert_eq!(run(&mut bpf, UplinkIngress, &packet).0, REDIRECT);
    assert_eq!(bpf.local_pods().unwrap().into_iter().collect::<Vec<_>>(), [(pod(), UPLINK)]);
    bpf.remove_local_pod(pod()).unwrap();
    bpf.remove_local_pod(pod()).unwrap();
    assert_eq!(run(&mut bpf, UplinkIngress, &packet).0, NEXT);
}

/// More than one call of the kernel gives.
#[test]
fn a_large_map_is_read_whole() {
    if !may_run("ndp_proxy large map") {
        return;
    }
    let pins = Pins::new("ndp-large");
    let mut bpf = pins.open();
    let pods: BTreeMap<Ipv6Addr, [u8; 6]> =
        (0..10_000).map(|i| (Ipv6Addr::from(u128::from(pod()) + i), UPLINK)).collect();
    for (pod, mac) in &pods {
        bpf.set_local_pod(*pod, *mac).unwrap();
    }
    assert!(bpf.local_pods().unwrap().into_iter().eq(pods));
}

/// The same source compiled for the kernel and for the host must do the same with every frame.
#[test]
fn the_kernels_build_and_the_hosts_agree_on_20_000_mutations() {
    if !may_run("ndp_proxy differential") {
        return;
    }
    const SEED: u64 = 0x6e64_7000;
    let pins = Pins::new("ndp-diff");
    let mut bpf = open(&pins);
    let seeds: Vec<Vec<u8>> =
        [answers(), drops(), passes()].concat_cases().into_iter().map(|c| c.packet).collect();
    let mut random = Random(SEED);
    let (mut answers, mut drops) = (0, 0);
    for i in 0..20_000 {
        let frame = mutate(&mut random, &seeds);
        let (verdict, out) = run(&mut bpf, UplinkIngress, &frame);
        let lookup = |target: &Address| (target.octets() == pod().octets()).then_some(UPLINK);
        let judge = if ndp::may_hide(&frame[..]) { ndp::hidden } else { ndp::proxy };
        let (want, want_out) = match judge(&frame[..], lookup) {
            Verdict::Pass => (NEXT, frame.clone()),
            Verdict::Drop(_) => (DROP, frame.clone()),
            Verdict::Answer(answer, _) => (REDIRECT, answer.frame().to_vec()),
        };
        assert_eq!((verdict, &out), (want, &want_out), "seed {SEED:#x}, mutation {i}: {frame:02x?}");
        answers += u32::from(want == REDIRECT);
        drops += u32::from(want == DROP);
    }
    // Mutations that never reach the interesting branches would prove nothing.
    assert!(answers > 1_000 && drops > 1_000, "{answers} answers, {drops} drops");
}

fn mutate(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut frame = seeds[random.below(seeds.len())].clone();
    frame.resize(frame.len().max(FRAME_BYTES_MIN), 0);
    for _ in 0..random.below(3) {
        let at = random.below(frame.len());
        frame[at] = random.next() as u8;
    }
    if random.below(8) == 0 {
        frame.truncate(FRAME_BYTES_MIN + random.below(frame.len() - FRAME_BYTES_MIN + 1));
    }
    // A wrong checksum hides all that comes after it.
    if random.below(4) != 0 && frame.len() >= 58 {
        let end = (54 + usize::from(u16::from_be_bytes([frame[18], frame[19]]))).clamp(58, frame.len());
        fix_icmpv6(&mut frame[..end]);
    }
    frame
}
