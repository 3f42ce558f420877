//! Which of the uplink's IPv4 addresses the kernel's own routes would choose for which remote (`fib_info_update_nhc_saddr`,
//! `inet_select_addr`), so that what pods send leaves with the address that the node itself would use.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use ipnetwork::Ipv4Network;
use netlink_packet_route::address::AddressFlags;

use crate::{netlink::DeviceAddress, uplink::is_usable};

/// Prefixes with another source than the default route's that are looked at; the rest see that one.
const SOURCES_MAX: usize = dataplane_common::masquerade::SOURCES_MAX as usize;

/// An IPv4 route out of the uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ipv4Route {
    pub(crate) destination: Ipv4Network,
    pub(crate) metric: u32,
    pub(crate) gateway: Option<Ipv4Addr>,
    /// `src` of `ip route`.
    pub(crate) preferred: Option<Ipv4Addr>,
}

/// The address for remotes without a word of their own, and the prefixes that have one.
///
/// `addresses` are the uplink's, as the kernel lists them.
pub(crate) fn sources(
    routes: &[Ipv4Route],
    addresses: &[DeviceAddress],
) -> (Option<Ipv4Addr>, BTreeMap<Ipv4Network, Ipv4Addr>) {
    let own: Vec<(Ipv4Network, &DeviceAddress)> = addresses
        .iter()
        .filter_map(|address| match address.network {
            ipnetwork::IpNetwork::V4(network) => Some((network, address)),
            ipnetwork::IpNetwork::V6(_) => None,
        })
        .collect();
    let mut best: BTreeMap<Ipv4Network, (u32, Option<Ipv4Addr>)> = BTreeMap::new();
    for route in routes {
        let chosen = (route.metric, source(route, &own));
        let known = best.entry(route.destination).or_insert(chosen);
        if chosen.0 < known.0 {
            *known = chosen;
        }
    }
    let default = best.iter().find(|(prefix, _)| prefix.prefix() == 0).and_then(|(_, (_, source))| *source);
    let default = default.or_else(|| first_usable(&own));
    let others = best.into_iter().filter(|(prefix, _)| prefix.prefix() != 0);
    let others = others.filter_map(|(prefix, (_, source))| Some((prefix, source?)));
    let others = others.filter(|(_, source)| Some(*source) != default).take(SOURCES_MAX);
    (default, others.collect())
}

/// The source of packets by a route. One that is deprecated or not usable otherwise is replaced.
fn source(route: &Ipv4Route, own: &[(Ipv4Network, &DeviceAddress)]) -> Option<Ipv4Addr> {
    let primary =
        |(_, address): &&(Ipv4Network, &DeviceAddress)| !address.flags.contains(AddressFlags::Secondary);
    let near_gateway = || {
        let gateway = route.gateway?;
        own.iter().filter(primary).find(|(network, _)| network.contains(gateway))
    };
    let chosen = match route.preferred {
        Some(preferred) => own.iter().find(|(network, _)| network.ip() == preferred),
        None => near_gateway().or_else(|| own.iter().find(primary)),
    };
    match chosen {
        Some((network, address)) if is_usable(address) => Some(network.ip()),
        // Another of the same network is more likely to be known there than one of elsewhere.
        Some((network, _)) => own
            .iter()
            .find(|(other, address)| other.network() == network.network() && is_usable(address))
            .map(|(other, _)| other.ip())
            .or_else(|| first_usable(own)),
        // `src` is an address of another device, such as the loopback.
        None => route.preferred.or_else(|| first_usable(own)),
    }
}

fn first_usable(own: &[(Ipv4Network, &DeviceAddress)]) -> Option<Ipv4Addr> {
    let mut usable: Vec<_> = own.iter().filter(|(_, address)| is_usable(address)).collect();
    usable.sort_by_key(|(_, address)| crate::uplink::preference(address));
    usable.first().and_then(|(_, address)| match address.network.ip() {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(network: &str, flags: AddressFlags) -> DeviceAddress {
        DeviceAddress { index: 2, network: network.parse().unwrap(), ours: false, flags }
    }

    fn route(destination: &str, gateway: Option<&str>, preferred: Option<&str>, metric: u32) -> Ipv4Route {
        Ipv4Route {
            destination: destination.parse().unwrap(),
            metric,
            gateway: gateway.map(|text| text.parse().unwrap()),
            preferred: preferred.map(|text| text.parse().unwrap()),
        }
    }

    fn check(routes: &[Ipv4Route], addresses: &[DeviceAddress], default: &str, others: &[(&str, &str)]) {
        let others = others.iter().map(|(p, a)| (p.parse().unwrap(), a.parse().unwrap())).collect();
        assert_eq!(sources(routes, addresses), (Some(default.parse().unwrap()), others));
    }

    const PERMANENT: AddressFlags = AddressFlags::Permanent;

    #[test]
    fn one_address_is_for_everybody() {
        let routes = [
            route("0.0.0.0/0", Some("192.0.2.1"), None, 0),
            route("192.0.2.0/24", None, Some("192.0.2.11"), 0),
        ];
        check(&routes, &[address("192.0.2.11/24", PERMANENT)], "192.0.2.11", &[]);
    }

    #[test]
    fn the_gateways_network_and_src_decide() {
        let addresses = [address("198.51.100.5/24", PERMANENT), address("192.0.2.11/24", PERMANENT)];
        let routes = [
            route("0.0.0.0/0", Some("192.0.2.1"), None, 0),
            route("198.51.100.0/24", None, Some("198.51.100.5"), 0),
            route("203.0.113.0/24", Some("192.0.2.1"), Some("198.51.100.5"), 0),
            route("10.0.0.0/8", Some("198.51.100.1"), None, 0),
        ];
        let others = [
            ("198.51.100.0/24", "198.51.100.5"),
            ("203.0.113.0/24", "198.51.100.5"),
            ("10.0.0.0/8", "198.51.100.5"),
        ];
        check(&routes, &addresses, "192.0.2.11", &others);
    }

    #[test]
    fn the_better_of_two_routes_decides() {
        let addresses = [address("198.51.100.5/24", PERMANENT), address("192.0.2.11/24", PERMANENT)];
        let routes = [
            route("0.0.0.0/0", Some("198.51.100.1"), None, 200),
            route("0.0.0.0/0", Some("192.0.2.1"), None, 100),
        ];
        check(&routes, &addresses, "192.0.2.11", &[]);
    }

    #[test]
    fn a_deprecated_address_is_never_the_source() {
        let addresses = [
            address("192.0.2.11/24", PERMANENT | AddressFlags::Deprecated),
            address("198.51.100.5/24", PERMANENT),
            address("192.0.2.12/24", AddressFlags::Secondary),
        ];
        let routes = [
            route("0.0.0.0/0", Some("192.0.2.1"), None, 0),
            route("192.0.2.0/24", None, Some("192.0.2.11"), 0),
        ];
        check(&routes, &addresses, "192.0.2.12", &[]);
        check(&routes, &addresses[..2], "198.51.100.5", &[]);
    }

    #[test]
    fn without_a_default_route_the_steadiest_address_is_the_default() {
        let addresses =
            [address("192.0.2.99/24", AddressFlags::empty()), address("192.0.2.11/24", PERMANENT)];
        check(&[], &addresses, "192.0.2.11", &[]);
        assert_eq!(sources(&[], &[]), (None, BTreeMap::new()));
    }

    #[test]
    fn src_may_be_an_address_of_another_device() {
        let routes = [route("0.0.0.0/0", Some("192.0.2.1"), Some("203.0.113.77"), 0)];
        check(&routes, &[address("192.0.2.11/24", PERMANENT)], "203.0.113.77", &[]);
    }
}
