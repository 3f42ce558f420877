//! Which private IPv4 address a pod has on its node, and which user id follows from it.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnetwork::Ipv4Network;

/// User ids of pods are this plus the index of the pod's IPv4 address in the range: above every user that
/// Debian makes and every range that systemd hands out (systemd's `UIDS-GIDS.md`).
pub(crate) const UID_BASE: u32 = 0x7000_0000;

/// The lowest address of `range` that is neither the network's, nor the broadcast address, nor in `used`.
///
/// A range of one or two addresses has neither (RFC 3021).
pub(crate) fn lowest_free(range: Ipv4Network, used: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Addr> {
    let (first, last) = (range.network().to_bits(), range.broadcast().to_bits());
    let (first, last) = if range.prefix() >= 31 { (first, last) } else { (first + 1, last - 1) };
    (first..=last).map(Ipv4Addr::from_bits).find(|address| !used.contains(address))
}

/// The user and group id of the pod with the address `ipv4` of `range`.
pub(crate) fn uid(range: Ipv4Network, ipv4: Ipv4Addr) -> u32 {
    UID_BASE + (ipv4.to_bits() - range.network().to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(range: &str, used: &[&str]) -> Option<String> {
        let used = used.iter().map(|text| text.parse().unwrap()).collect();
        lowest_free(range.parse().unwrap(), &used).map(|address| address.to_string())
    }

    #[test]
    fn the_lowest_host_address_is_first() {
        assert_eq!(free("10.254.0.0/20", &[]).as_deref(), Some("10.254.0.1"));
        assert_eq!(free("10.254.0.0/20", &["10.254.0.1", "10.254.0.3"]).as_deref(), Some("10.254.0.2"));
    }

    #[test]
    fn a_freed_address_is_used_again() {
        assert_eq!(free("10.254.0.0/20", &["10.254.0.2"]).as_deref(), Some("10.254.0.1"));
    }

    #[test]
    fn the_broadcast_address_is_never_given() {
        assert_eq!(free("10.0.0.0/30", &["10.0.0.1"]).as_deref(), Some("10.0.0.2"));
        assert_eq!(free("10.0.0.0/30", &["10.0.0.1", "10.0.0.2"]), None);
    }

    #[test]
    fn tiny_ranges_are_all_hosts() {
        assert_eq!(free("10.0.0.0/31", &["10.0.0.0"]).as_deref(), Some("10.0.0.1"));
        assert_eq!(free("10.0.0.9/32", &[]).as_deref(), Some("10.0.0.9"));
        assert_eq!(free("255.255.255.255/32", &["255.255.255.255"]), None);
    }

    #[test]
    fn user_ids_follow_the_address() {
        let range = "10.254.0.0/20".parse().unwrap();
        assert_eq!(uid(range, "10.254.0.1".parse().unwrap()), 1_879_048_193);
        assert_eq!(uid(range, "10.254.1.0".parse().unwrap()), 1_879_048_448);
    }
}
