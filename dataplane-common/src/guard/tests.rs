//! What the guard lets through, as a table.

use std::net::Ipv6Addr;

use super::*;

const POD: &str = "fd12::aaaa:bbbb:cc12:3456";

fn address(text: &str) -> Address {
    Address::new(text.parse::<Ipv6Addr>().unwrap().octets())
}

fn entry() -> Entry {
    Entry {
        ipv6: address(POD),
        ipv4: ipv4::address([10, 254, 0, 5]),
        pod_network: ipv4::address([10, 254, 0, 0]),
        pod_mask: ipv4::address([255, 255, 240, 0]),
        pod_mac: [2, 0, 0, 0, 0, 5],
        host_mac: [6, 0, 0, 0, 0, 5],
    }
}

fn packet6(source: &str, destination: &str, next_header: u8, payload: &[u8]) -> Vec<u8> {
    let mut f = [&entry().host_mac[..], &entry().pod_mac, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    f.extend((payload.len() as u16).to_be_bytes());
    f.extend([next_header, 64]);
    f.extend(address(source).octets());
    f.extend(address(destination).octets());
    f.extend(payload);
    f
}

fn packet4(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut f = [&entry().host_mac[..], &entry().pod_mac, &[8, 0]].concat();
    f.extend([0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, ipv4::UDP, 0, 0]);
    f.extend(source);
    f.extend(destination);
    f.extend([0x10, 0, 0, 7, 0, 8, 0, 0]);
    f
}

#[test]
fn the_pods_own_unicast_passes() {
    assert_eq!(check(&packet6(POD, "fd12::9", 6, &[0; 20])[..], &entry()), Verdict::Pass);
    assert_eq!(check(&packet4([10, 254, 0, 5], [192, 0, 2, 1])[..], &entry()), Verdict::Pass);
}

#[test]
fn every_bit_of_the_source_counts() {
    let good = packet6(POD, "fd12::9", 6, &[0; 20]);
    for bit in 0..128 {
        let mut f = good.clone();
        f[ipv6::SOURCE + bit / 8] ^= 1 << (bit % 8);
        assert_eq!(check(&f[..], &entry()), Verdict::Drop(Counter::GuardDropSource), "bit {bit}");
    }
    for bit in 0..48 {
        let mut f = good.clone();
        f[ethernet::SOURCE + bit / 8] ^= 1 << (bit % 8);
        assert_eq!(check(&f[..], &entry()), Verdict::Drop(Counter::GuardDropMac), "bit {bit}");
    }
}

#[test]
fn ipv4_between_pods_is_dropped_and_beside_their_range_is_not() {
    let check = |to| check(&packet4([10, 254, 0, 5], to)[..], &entry());
    assert_eq!(check([10, 254, 15, 255]), Verdict::Drop(Counter::GuardDropPodIpv4));
    assert_eq!(check([10, 254, 16, 0]), Verdict::Pass);
    assert_eq!(check([255, 255, 255, 255]), Verdict::Drop(Counter::GuardDropMulticast));
}

#[test]
fn every_truncation_is_dropped() {
    for whole in [
        packet6(POD, "fd12::9", ipv6::UDP, &[0, 1, 0, 1, 0, 8, 0, 0]),
        packet6(POD, "fd12::9", ipv6::ICMPV6, &[128, 0, 0, 0, 0, 0, 0, 0]),
        packet4([10, 254, 0, 5], [192, 0, 2, 1]),
    ] {
        assert_eq!(check(&whole[..], &entry()), Verdict::Pass);
        // Ports and the type of a message decide: what lies behind them is the receiver's.
        let headers = if whole[12] == 8 {
            38
        } else if whole[20] == ipv6::UDP {
            58
        } else {
            55
        };
        for n in 0..headers.min(whole.len()) {
            let verdict = check(&whole[..n], &entry());
            assert!(matches!(verdict, Verdict::Drop(_)), "{n} bytes: {verdict:?}");
        }
    }
}

/// An extension header of 8 bytes.
fn extension(next: u8) -> [u8; 8] {
    [next, 0, 1, 4, 0, 0, 0, 0]
}

#[test]
fn extension_headers_hide_nothing() {
    let dhcp = [0x02, 0x23, 0x02, 0x22, 0, 8, 0, 0];
    let check = |next, payload: &[u8]| check(&packet6(POD, "fd12::9", next, payload)[..], &entry());
    let behind = |headers: usize, last: u8, upper: &[u8]| {
        let chain = (0..headers).map(|n| extension(if n + 1 == headers { last } else { 60 }));
        [chain.flatten().collect::<Vec<u8>>(), upper.to_vec()].concat()
    };
    for headers in 1..=EXTENSIONS_MAX {
        let advertisement = behind(headers, ipv6::ICMPV6, &[134, 0, 0, 0]);
        assert_eq!(check(60, &advertisement), Verdict::Drop(Counter::GuardDropExtension), "{headers}");
        let server = behind(headers, ipv6::UDP, &dhcp);
        assert_eq!(check(60, &server), Verdict::Drop(Counter::GuardDropDhcp), "{headers}");
        assert_eq!(check(60, &behind(headers, 6, &[0; 20])), Verdict::Pass, "{headers}");
    }
    let many = behind(EXTENSIONS_MAX + 1, 6, &[0; 20]);
    assert_eq!(check(60, &many), Verdict::Drop(Counter::GuardDropExtension));
    // First and later fragments.
    let first = [&[58, 0, 0, 1, 0, 0, 0, 7][..], &[134, 0, 0, 0]].concat();
    assert_eq!(check(44, &first), Verdict::Drop(Counter::GuardDropExtension));
    assert_eq!(check(44, &[58, 0, 0, 1, 0, 0, 0, 7]), Verdict::Drop(Counter::GuardDropHeader), "RFC 7112");
    let later = [&[58, 0, 0, 8, 0, 0, 0, 7][..], &[134, 0, 0, 0]].concat();
    assert_eq!(check(44, &later), Verdict::Pass);
}

#[test]
fn a_kernel_that_joins_its_groups_is_no_spoofer() {
    let report = [&extension(ipv6::ICMPV6)[..], &[143, 0, 0, 0]].concat();
    for source in ["::", "fe80::9", POD] {
        let packet = packet6(source, "ff02::16", 0, &report);
        assert_eq!(check(&packet[..], &entry()), Verdict::Drop(Counter::GuardDropMld), "{source}");
    }
}
