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
        // The first byte of the payload decides: what lies behind it is the receiver's.
        let headers = if whole[12] == 8 { 36 } else { 55 };
        for n in 0..headers.min(whole.len()) {
            let verdict = check(&whole[..n], &entry());
            assert!(matches!(verdict, Verdict::Drop(_)), "{n} bytes: {verdict:?}");
        }
    }
}
