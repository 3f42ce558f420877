//! Solicitations and what becomes of them, as a table.

use std::net::Ipv6Addr;

use super::*;
use crate::checksum::sum_bytes;

const POD_MAC: Mac = [2, 0, 0, 0, 0, 0x11];
const HOST: Mac = [2, 0, 0, 0, 0, 0x64];
const POD: &str = "fd12::aaaa:bbbb:cc12:3456";

fn address(text: &str) -> Address {
    Address::new(text.parse::<Ipv6Addr>().unwrap().octets())
}

/// A valid solicitation for the pod, with these options.
fn solicitation(source: &str, destination: &str, options: &[u8]) -> Vec<u8> {
    let mut f = [&[0x33, 0x33, 0xff, 0x12, 0x34, 0x56][..], &HOST, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    f.extend((24 + options.len() as u16).to_be_bytes());
    f.extend([58, 255]);
    f.extend(address(source).octets());
    f.extend(address(destination).octets());
    f.extend([135, 0, 0, 0, 0, 0, 0, 0]);
    f.extend(address(POD).octets());
    f.extend(options);
    mend(&mut f);
    f
}

fn message_sum(f: &[u8]) -> Sum {
    sum_bytes(&f[ipv6::SOURCE..]).add32((f.len() as u32 - 54).to_be()).add16(58_u16.to_be())
}

fn mend(f: &mut [u8]) {
    f[56..58].fill(0);
    let checksum = message_sum(f).checksum();
    f[56..58].copy_from_slice(&checksum.to_ne_bytes());
}

fn ask(f: &[u8]) -> Verdict {
    proxy(f, |target| (*target == address(POD)).then_some(POD_MAC))
}

const GROUP: &str = "ff02::1:ff12:3456";
const SLLA: [u8; 8] = [1, 1, 2, 0, 0, 0, 0, 0x64];
const NONCE: [u8; 8] = [14, 1, 9, 9, 9, 9, 9, 9];

#[test]
fn a_host_is_answered_with_the_pods_mac_as_a_router_and_without_override() {
    let Verdict::Answer(answer, _) = ask(&solicitation("fe80::64", GROUP, &SLLA)) else {
        panic!("no answer")
    };
    assert_eq!((answer.to, answer.to_mac), (address("fe80::64"), HOST));
    let frame = answer.frame();
    assert!(message_sum(&frame).is_valid());
    assert_eq!(frame[ipv6::HOP_LIMIT], 255);
    assert_eq!(frame[54..62], [136, 0, frame[56], frame[57], 0xc0, 0, 0, 0]);
    assert_eq!(frame[62..78], address(POD).octets());
    assert_eq!(frame[78..86], [2, 1, 2, 0, 0, 0, 0, 0x11]);
}

#[test]
fn a_dad_probe_is_answered_to_all_nodes_unsolicited() {
    for options in [&[][..], &NONCE] {
        let Verdict::Answer(answer, _) = ask(&solicitation("::", GROUP, options)) else {
            panic!("no answer")
        };
        assert_eq!((answer.to, answer.to_mac), (Address::ALL_NODES, ethernet::ALL_NODES));
        assert_eq!(answer.frame()[58], 0x80);
        assert!(message_sum(&answer.frame()).is_valid());
    }
}

#[test]
fn options_may_stand_in_any_order_and_be_absent() {
    for options in [vec![], NONCE.to_vec(), [NONCE, SLLA].concat(), [SLLA, NONCE].concat()] {
        let verdict = ask(&solicitation("fd12::64", POD, &options));
        assert!(matches!(verdict, Verdict::Answer(a, _) if a.to_mac == HOST), "{options:?}: {verdict:?}");
    }
}

#[test]
fn the_option_units_looked_at_are_bounded() {
    let fill = |units: u8| [vec![14, units], vec![7; units as usize * 8 - 2]].concat();
    let most = solicitation("fd12::64", POD, &fill(OPTION_UNITS_MAX as u8));
    assert!(matches!(ask(&most), Verdict::Answer(..)));
    let more = solicitation("fd12::64", POD, &fill(OPTION_UNITS_MAX as u8 + 1));
    assert_eq!(ask(&more), Verdict::Drop(Counter::NdpDropTooLong));
}

#[test]
fn each_rule_of_7_1_1_has_its_reason() {
    type Change = fn(&mut Vec<u8>);
    let cases: [(&str, Change, Counter); 6] = [
        ("hop limit", |f| f[21] = 254, Counter::NdpDropHopLimit),
        ("code", |f| f[55] = 1, Counter::NdpDropCode),
        ("zero option", |f| f[79] = 0, Counter::NdpDropOption),
        ("option past the end", |f| f[79] = 9, Counter::NdpDropOption),
        ("multicast source", |f| f[22] = 0xff, Counter::NdpDropSource),
        ("length", |f| f[19] = 20, Counter::NdpDropLength),
    ];
    for (name, change, reason) in cases {
        let mut f = solicitation("fd12::64", GROUP, &SLLA);
        change(&mut f);
        mend(&mut f);
        assert_eq!(ask(&f), Verdict::Drop(reason), "{name}");
    }
    let mut f = solicitation("fd12::64", GROUP, &SLLA);
    f[60] ^= 1;
    assert_eq!(ask(&f), Verdict::Drop(Counter::NdpDropChecksum));
    assert_eq!(ask(&solicitation("::", GROUP, &SLLA)), Verdict::Drop(Counter::NdpDropSource));
    assert_eq!(ask(&solicitation("::", POD, &[])), Verdict::Drop(Counter::NdpDropDestination));
}

#[test]
fn what_is_not_for_us_passes() {
    let mut flooded = solicitation("fd12::64", POD, &SLLA);
    flooded[..6].copy_from_slice(&[2, 7, 7, 7, 7, 7]);
    assert_eq!(ask(&flooded), Verdict::Pass);
    let mut foreign = solicitation("fd12::64", GROUP, &SLLA);
    foreign[70] ^= 1;
    assert_eq!(ask(&foreign), Verdict::Pass);
}

#[test]
fn every_truncation_passes_or_drops() {
    let whole = solicitation("fd12::64", GROUP, &[NONCE, SLLA].concat());
    for n in 0..whole.len() {
        let expected = if n < TARGET + 16 { Verdict::Pass } else { Verdict::Drop(Counter::NdpDropLength) };
        assert_eq!(ask(&whole[..n]), expected, "{n} bytes");
        assert_eq!(gateway(&whole[..n], HOST), None);
    }
    assert!(matches!(ask(&whole), Verdict::Answer(..)));
}
