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

//= RFC 4429 3/no-override, RFC 6980 5/send
//= RFC 4861 7.2.4/unicast, RFC 4861 7.2.4/target-option, RFC 4861 7.2.4/router, RFC 4861 7.2.4/solicited
//= RFC 4861 7.2.8/override
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

//= RFC 4861 7.2.4/all-nodes, RFC 4862 5.4.3/probe, RFC 7527 4.2/accept
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

//= RFC 4861 7.1.1/other-options
#[test]
fn options_may_stand_in_any_order_and_be_absent() {
    for options in [vec![], NONCE.to_vec(), [NONCE, SLLA].concat(), [SLLA, NONCE].concat()] {
        let verdict = ask(&solicitation("fd12::64", POD, &options));
        assert!(matches!(verdict, Verdict::Answer(a, _) if a.to_mac == HOST), "{options:?}: {verdict:?}");
    }
}

//= RFC 4861 7.1.1/other-options
#[test]
fn the_option_units_looked_at_are_bounded() {
    let fill = |units: u8| [vec![14, units], vec![7; units as usize * 8 - 2]].concat();
    let most = solicitation("fd12::64", POD, &fill(OPTION_UNITS_MAX as u8));
    assert!(matches!(ask(&most), Verdict::Answer(..)));
    let more = solicitation("fd12::64", POD, &fill(OPTION_UNITS_MAX as u8 + 1));
    assert_eq!(ask(&more), Verdict::Drop(Counter::NdpDropTooLong));
}

//= RFC 4861 7.1.1/hop-limit, RFC 4861 7.1.1/checksum, RFC 4861 7.1.1/code, RFC 4861 7.1.1/length
//= RFC 4861 7.1.1/options, RFC 4861 7.1.1/unspecified-destination, RFC 4861 7.1.1/unspecified-option
//= RFC 4862 5.4.3/silent
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

/// A frame with these extension headers, each given with its own type, in front of what follows the IPv6 header.
fn behind(frame: &[u8], headers: &[(u8, &[u8])]) -> Vec<u8> {
    let mut out = frame[..54].to_vec();
    let kinds = headers.iter().map(|(kind, _)| *kind).chain([frame[20]]);
    let mut at = 20;
    for (kind, body) in kinds.zip(headers.iter().map(|(_, body)| Some(*body)).chain([None])) {
        out[at] = kind;
        at = out.len();
        out.extend(body.unwrap_or_default());
    }
    out.extend(&frame[54..]);
    let length = (out.len() - 54) as u16;
    out[18..20].copy_from_slice(&length.to_be_bytes());
    out
}

const FIRST_FRAGMENT: (u8, &[u8]) = (ipv6::FRAGMENT, &[0, 0, 0, 1, 1, 2, 3, 4]);
const ATOMIC_FRAGMENT: (u8, &[u8]) = (ipv6::FRAGMENT, &[0, 0, 0, 0, 1, 2, 3, 4]);
const LATER_FRAGMENT: (u8, &[u8]) = (ipv6::FRAGMENT, &[0, 0, 0, 8, 1, 2, 3, 4]);
const OPTIONS_8: (u8, &[u8]) = (ipv6::DESTINATION_OPTIONS, &[0, 0, 1, 4, 0, 0, 0, 0]);
const OPTIONS_16: (u8, &[u8]) = (ipv6::HOP_BY_HOP, &[0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);

fn ask_hidden(f: &[u8]) -> Verdict {
    assert!(may_hide(f));
    hidden(f, |target| (*target == address(POD)).then_some(POD_MAC))
}

/// RFC 6980 section 5.
#[test]
fn a_solicitation_behind_a_fragment_header_is_dropped() {
    let plain = solicitation("fd12::64", GROUP, &SLLA);
    assert!(!may_hide(&plain[..]));
    let chains: [&[(u8, &[u8])]; 5] = [
        &[FIRST_FRAGMENT],
        &[ATOMIC_FRAGMENT],
        &[OPTIONS_16, FIRST_FRAGMENT],
        &[FIRST_FRAGMENT, OPTIONS_8],
        &[OPTIONS_16, OPTIONS_8, ATOMIC_FRAGMENT, OPTIONS_8],
    ];
    for chain in chains {
        let whole = behind(&plain, chain);
        assert_eq!(ask_hidden(&whole), Verdict::Drop(Counter::NdpDropFragment), "{chain:?}");
        for n in 54..whole.len() - 8 {
            assert_eq!(ask_hidden(&whole[..n]), Verdict::Pass, "{chain:?} cut to {n} bytes: no target");
        }
    }
    assert_eq!(ask_hidden(&behind(&plain, &[OPTIONS_8])), Verdict::Drop(Counter::NdpDropExtension));
}

#[test]
fn other_packets_with_extension_headers_pass() {
    let plain = solicitation("fd12::64", GROUP, &SLLA);
    assert_eq!(ask_hidden(&behind(&plain, &[LATER_FRAGMENT])), Verdict::Pass);
    assert_eq!(ask_hidden(&behind(&plain, &[OPTIONS_8; EXTENSION_HEADERS_MAX + 1])), Verdict::Pass);
    let mut foreign = behind(&plain, &[FIRST_FRAGMENT]);
    foreign[54 + 8 + 8] ^= 1;
    assert_eq!(ask_hidden(&foreign), Verdict::Pass, "another's address");
    let mut flooded = behind(&plain, &[FIRST_FRAGMENT]);
    flooded[..6].copy_from_slice(&[2, 7, 7, 7, 7, 7]);
    assert_eq!(ask_hidden(&flooded), Verdict::Pass, "for another MAC address");
    let mut echo = behind(&plain, &[FIRST_FRAGMENT]);
    echo[54 + 8] = 128;
    assert_eq!(ask_hidden(&echo), Verdict::Pass, "an echo request");
}

//= RFC 4861 7.1.1/target
#[test]
fn a_multicast_target_is_nobodys() {
    let mut f = solicitation("fd12::64", GROUP, &SLLA);
    f[TARGET] = 0xff;
    assert_eq!(ask(&f), Verdict::Drop(Counter::NdpDropTarget));
    f[..6].copy_from_slice(&POD_MAC);
    assert_eq!(ask(&f), Verdict::Pass, "left to whom it is for");
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
