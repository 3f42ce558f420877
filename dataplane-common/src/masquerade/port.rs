//! Outside ports: who owns them, and which are tried.

use super::{Config, PORTS_MAX};
use crate::ipv4::{self, Address};

/// The value in `NAT_PORTS` of a port that nobody owns.
pub const OWNER_FREE: u64 = 0;

const INSIDE_BITS: u64 = !0xffff;

/// The value in `NAT_PORTS` of a port that `inside` and `inside_port` own. The stamp makes every claim
/// different, so that the sweep's compare-and-exchange cannot free a port that was claimed anew.
#[inline(always)]
pub const fn owner(inside: Address, inside_port: u16, stamp: u16) -> u64 {
    (inside as u64) << 32 | (inside_port as u64) << 16 | stamp as u64
}

/// The address and port that own it.
#[inline(always)]
pub const fn owner_inside(owner: u64) -> (Address, u16) {
    ((owner >> 32) as u32, (owner >> 16) as u16)
}

/// Whether `inside` and `inside_port` own it.
#[inline(always)]
pub const fn is_owned_by(value: u64, inside: Address, inside_port: u16) -> bool {
    value & INSIDE_BITS == owner(inside, inside_port, 0)
}

/// The index in `NAT_PORTS` of a port in wire order.
#[inline(always)]
pub fn port_index(protocol: u8, port: u16) -> u32 {
    let table = match protocol {
        ipv4::TCP => 0,
        ipv4::UDP => 1,
        _ => 2,
    };
    let index = table << 16 | u16::from_be(port) as u32;
    debug_assert!(index < PORTS_MAX);
    index
}

/// A port (wire order) for a flow whose own is taken: from 1024 up, outside of what the host gives to its
/// own sockets, unless that leaves none.
#[inline(always)]
pub fn pool_port(random: u32, config: &Config) -> u16 {
    const FIRST: u32 = 1024;
    const END: u32 = 65_536;
    let min = (config.host_ports_min as u32).max(FIRST);
    let max = config.host_ports_max as u32;
    let reserved = if min <= max { max - min + 1 } else { 0 };
    let size = END - FIRST - reserved;
    // Scales a 32-bit random number down without a division.
    let port = |size: u32| FIRST + ((random as u64 * size as u64) >> 32) as u32;
    let port = match size {
        0 => port(END - FIRST),
        size if port(size) >= min && reserved != 0 => port(size) + reserved,
        size => port(size),
    };
    (port as u16).to_be()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(min: u16, max: u16) -> Config {
        Config { node: 0, pod_network: 0, pod_mask: 0, host_ports_min: min, host_ports_max: max, enabled: 1 }
    }

    fn ports(min: u16, max: u16) -> impl Iterator<Item = u16> {
        let config = config(min, max);
        (0..=u16::MAX).map(move |i| u16::from_be(pool_port((i as u32) << 16 | 0xffff, &config)))
    }

    #[test]
    fn the_pool_spares_the_hosts_range_and_the_privileged_ports() {
        let all: std::collections::BTreeSet<u16> = ports(32_768, 60_999).collect();
        assert!(all.iter().all(|p| *p >= 1024 && !(32_768..=60_999).contains(p)));
        assert_eq!(all.len(), 65_536 - 1024 - 28_232);
        assert!(
            all.contains(&1024) && all.contains(&32_767) && all.contains(&61_000) && all.contains(&65_535)
        );
    }

    #[test]
    fn a_host_range_that_takes_all_is_ignored() {
        assert!(ports(1024, 65_535).all(|p| p >= 1024));
        assert!(ports(0, 65_535).all(|p| p >= 1024));
    }

    #[test]
    fn an_empty_host_range_spares_nothing() {
        let all: std::collections::BTreeSet<u16> = ports(5000, 4000).collect();
        assert_eq!(all.len(), 65_536 - 1024);
    }

    #[test]
    fn an_owner_is_told_from_others_whatever_the_stamp() {
        let value = owner(0x0100_000a, 77, 0xbeef);
        assert_eq!(owner_inside(value), (0x0100_000a, 77));
        assert!(is_owned_by(value, 0x0100_000a, 77));
        assert!(!is_owned_by(value, 0x0200_000a, 77) && !is_owned_by(value, 0x0100_000a, 78));
        assert!(!is_owned_by(OWNER_FREE, 0x0100_000a, 77));
    }

    #[test]
    fn each_protocol_has_its_own_ports() {
        let port = 65_535_u16.to_be();
        assert_eq!(port_index(ipv4::TCP, port), 65_535);
        assert_eq!(port_index(ipv4::UDP, 0), 65_536);
        assert_eq!(port_index(ipv4::ICMP, port), PORTS_MAX - 1);
    }
}
