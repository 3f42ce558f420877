//! Between the kernel's messages and the objects of `dataplane-core`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use dataplane_core::{Address, Hop, Link, Mac, Neighbour, PROTOCOL, Route};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use netlink_packet_route::{
    AddressFamily,
    address::{
        AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope,
    },
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
        RouteVia,
    },
};
use rtnetlink::RouteMessageBuilder;

use crate::source::Ipv4Route;

use super::{Device, DeviceAddress, LOOPBACK_INDEX, NetlinkError, Reachability, index_of, name_of};

pub(super) fn device(message: LinkMessage) -> Option<Device> {
    let mut name = None;
    let mut peer_index = None;
    let up = message.header.flags.contains(LinkFlags::Up);
    let mut link = Link { mac: Mac([0; 6]), mtu_bytes: 0, up, addrgen_none: false, alias: None };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::Mtu(mtu_bytes) => link.mtu_bytes = mtu_bytes,
            LinkAttribute::Link(index) => peer_index = Some(index),
            LinkAttribute::Address(bytes) => link.mac = Mac(bytes.try_into().unwrap_or_default()),
            LinkAttribute::AfSpecUnspec(specs) => link.addrgen_none = specs.iter().any(is_addrgen_none),
            _ => {}
        }
    }
    Some(Device { index: message.header.index, name: name?, peer_index, link })
}

fn is_addrgen_none(spec: &AfSpecUnspec) -> bool {
    let AfSpecUnspec::Inet6(inet6) = spec else { return false };
    inet6.contains(&AfSpecInet6::AddrGenMode(In6AddrGenMode::None))
}

pub(super) fn address(message: AddressMessage) -> Option<DeviceAddress> {
    let mut ip = None;
    let mut local = None;
    let mut ours = false;
    let mut flags = AddressFlags::empty();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(address) => ip = Some(*address),
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Protocol(protocol) => ours = *protocol == AddressProtocol::Other(PROTOCOL),
            AddressAttribute::Flags(attribute) => flags = *attribute,
            _ => {}
        }
    }
    let network = IpNetwork::new(local.or(ip)?, message.header.prefix_len).ok()?;
    Some(DeviceAddress { index: message.header.index, network, ours, flags })
}

pub(super) fn address_message(index: u32, address: &Address) -> AddressMessage {
    let ip = address.network.ip();
    let mut flags = AddressFlags::Nodad;
    if address.is_join() {
        flags |= AddressFlags::Mcautojoin | AddressFlags::Noprefixroute;
    }
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.prefix_len = address.network.prefix();
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    // Older readers look at the header, newer ones at the attribute.
    message.header.flags = AddressHeaderFlags::Nodad;
    message.attributes = vec![
        AddressAttribute::Local(ip),
        AddressAttribute::Address(ip),
        AddressAttribute::Flags(flags),
        AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)),
    ];
    message
}

pub(super) fn is_main_table(message: &RouteMessage) -> bool {
    let attribute = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    attribute.unwrap_or(message.header.table.into()) == u32::from(RouteHeader::RT_TABLE_MAIN)
}

pub(super) fn metric(message: &RouteMessage) -> u32 {
    let priority = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Priority(priority) => Some(*priority),
        _ => None,
    };
    message.attributes.iter().find_map(priority).unwrap_or(0)
}

/// The device of a route, or of its first next hop.
pub(super) fn out_index(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
        _ => None,
    })
}

pub(super) fn ipv4_route(message: &RouteMessage) -> Option<Ipv4Route> {
    let (mut destination, mut gateway, mut preferred) = (Ipv4Addr::UNSPECIFIED, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = *address,
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => gateway = Some(*address),
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => preferred = Some(*address),
            _ => {}
        }
    }
    let destination = Ipv4Network::new(destination, message.header.destination_prefix_length).ok()?;
    Some(Ipv4Route { destination, metric: metric(message), gateway, preferred })
}

/// Where an IPv6 route without a gateway leads to.
pub(super) fn on_link(message: &RouteMessage) -> Option<Ipv6Network> {
    let has_gateway = |attribute: &RouteAttribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        )
    };
    if message.attributes.iter().any(has_gateway) {
        return None;
    }
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(*address),
        _ => None,
    })?;
    Ipv6Network::new(destination, message.header.destination_prefix_length).ok()
}

pub(super) fn route(message: &RouteMessage, names: &BTreeMap<u32, String>) -> Option<Route> {
    let mut destination = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut gateway = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip_of(address)?,
            RouteAttribute::Gateway(address) => gateway = ip_of(address),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            _ => {}
        }
    }
    let dev = || name_of(names, out_index(message).unwrap_or(0));
    let hop = match (message.header.kind, gateway) {
        (RouteType::Unreachable, _) => Hop::Unreachable,
        (_, Some(gateway)) => Hop::Via { gateway, dev: dev() },
        (_, None) => Hop::Dev(dev()),
    };
    let destination = IpNetwork::new(destination, message.header.destination_prefix_length).ok()?;
    Some(Route { destination, metric: metric(message), hop })
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

pub(super) fn route_message(route: &Route) -> Result<RouteMessage, NetlinkError> {
    let index = match &route.hop {
        // The kernel shows IPv6 unreachable routes on lo and wants them there.
        Hop::Unreachable => route.destination.is_ipv6().then_some(LOOPBACK_INDEX),
        Hop::Dev(dev) | Hop::Via { dev, .. } => Some(index_of(dev)?),
    };
    let mut message = match route.destination {
        IpNetwork::V4(net) => {
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(net.network(), net.prefix()).build()
        }
        IpNetwork::V6(net) => {
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(net.network(), net.prefix()).build()
        }
    };
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.attributes.extend(index.map(RouteAttribute::Oif));
    match &route.hop {
        Hop::Unreachable => message.header.kind = RouteType::Unreachable,
        Hop::Dev(_) if route.destination.is_ipv4() => message.header.scope = RouteScope::Link,
        Hop::Dev(_) => {}
        Hop::Via { gateway, .. } => message.attributes.push(gateway_attribute(route, *gateway)),
    }
    if route.metric > 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    Ok(message)
}

fn gateway_attribute(route: &Route, gateway: IpAddr) -> RouteAttribute {
    match gateway {
        // RFC 5549: an IPv4 route through an IPv6 router.
        IpAddr::V6(address) if route.destination.is_ipv4() => RouteAttribute::Via(RouteVia::Inet6(address)),
        gateway => RouteAttribute::Gateway(gateway.into()),
    }
}

pub(super) fn neighbour(message: &NeighbourMessage, names: &BTreeMap<u32, String>) -> Option<Neighbour> {
    let dev = names.get(&message.header.ifindex)?.clone();
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let address = destination(message)?;
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.clone().try_into().ok().map(Mac),
        _ => None,
    });
    Some(Neighbour { dev, address, mac: mac? })
}

pub(super) fn reachability(message: &NeighbourMessage) -> Option<(Ipv6Addr, Reachability)> {
    let IpAddr::V6(address) = destination(message)? else { return None };
    let known = match message.header.state {
        NeighbourState::Reachable | NeighbourState::Permanent | NeighbourState::Noarp => {
            Reachability::Reachable
        }
        NeighbourState::Failed => Reachability::Unreachable,
        _ => Reachability::Unknown,
    };
    Some((address, known))
}

pub(super) fn proxy(message: &NeighbourMessage, names: &BTreeMap<u32, String>) -> Option<(String, Ipv6Addr)> {
    let ours = NeighbourAttribute::Protocol(RouteProtocol::Other(PROTOCOL));
    match destination(message)? {
        IpAddr::V6(address) if message.attributes.contains(&ours) => {
            Some((name_of(names, message.header.ifindex), address))
        }
        _ => None,
    }
}

/// The answers say R=1: without the flag, whoever had the node as its router takes it off its list (RFC 4861
/// section 7.2.5).
pub(super) fn proxy_message(index: u32, address: Ipv6Addr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Proxy | NeighbourFlags::Router;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)),
        NeighbourAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ];
    message
}

fn destination(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some((*address).into()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some((*address).into()),
        _ => None,
    })
}

pub(super) fn neighbour_address(address: IpAddr) -> NeighbourAddress {
    match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    }
}

pub(super) fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> BTreeMap<u32, String> {
        [(LOOPBACK_INDEX, "lo".to_owned())].into()
    }

    fn dev() -> String {
        "lo".to_owned()
    }

    #[track_caller]
    fn check_route(destination: &str, metric: u32, hop: Hop) {
        let route = Route { destination: destination.parse().unwrap(), metric, hop };
        let message = route_message(&route).unwrap();
        assert_eq!(message.header.protocol, RouteProtocol::Other(118));
        assert!(is_main_table(&message));
        assert_eq!(super::route(&message, &names()), Some(route));
    }

    #[test]
    fn routes_are_read_back_as_written() {
        let via = |gateway: &str| Hop::Via { gateway: gateway.parse().unwrap(), dev: dev() };
        check_route("fd00::/48", u32::MAX, Hop::Unreachable);
        check_route("10.254.0.0/20", u32::MAX, Hop::Unreachable);
        check_route("fd00::1/128", 1024, Hop::Dev(dev()));
        check_route("10.254.0.1/32", 0, Hop::Dev(dev()));
        check_route("::/0", 1024, via("fe80::1"));
        check_route("0.0.0.0/0", 0, via("fe80::1"));
        check_route("0.0.0.0/0", 7, via("192.0.2.1"));
    }

    #[test]
    fn addresses_are_read_back_as_ours() {
        for (network, join) in
            [("fd00::1/128", false), ("10.254.0.1/32", false), ("ff02::1:ff00:1/128", true)]
        {
            let written = Address { dev: dev(), network: network.parse().unwrap() };
            let read = address(address_message(LOOPBACK_INDEX, &written)).unwrap();
            assert!(read.ours);
            assert_eq!((read.index, read.network), (LOOPBACK_INDEX, written.network));
            assert_eq!(read.flags.contains(AddressFlags::Mcautojoin), join);
        }
    }

    #[test]
    fn proxies_of_others_are_not_read_as_ours() {
        let address: Ipv6Addr = "fd00::1".parse().unwrap();
        let mut message = proxy_message(LOOPBACK_INDEX, address);
        assert_eq!(proxy(&message, &names()), Some((dev(), address)));
        message.attributes.pop();
        assert_eq!(proxy(&message, &names()), None);
    }

    #[test]
    fn only_permanent_neighbours_on_own_links_count() {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = LOOPBACK_INDEX;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(Ipv6Addr::LOCALHOST)),
            NeighbourAttribute::LinkLayerAddress(vec![2; 6]),
        ];
        let expected = Neighbour { dev: dev(), address: Ipv6Addr::LOCALHOST.into(), mac: Mac([2; 6]) };
        assert_eq!(neighbour(&message, &names()), Some(expected));
        assert_eq!(neighbour(&message, &BTreeMap::new()), None);
        message.header.state = NeighbourState::Stale;
        assert_eq!(neighbour(&message, &names()), None);
    }
}
