//! The device to the other nodes and the world: found by the default route, or by name.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use dataplane_core::Mac;
use hextet_address::NodePrefix;
use ipnetwork::{Ipv4Network, Ipv6Network};
use netlink_packet_route::{AddressFamily, address::AddressFlags};
use thiserror::Error;

use crate::{
    Dataplane,
    netlink::{Device, DeviceAddress, NetlinkError},
    source::sources,
};

/// What a node needs to know of its uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkInfo {
    /// Its name.
    pub name: String,
    /// The address at which other nodes reach this one: global or ULA, neither tentative nor deprecated.
    pub ipv6: Option<Ipv6Addr>,
    /// The global address that pods can leave with: stable before temporary, never deprecated.
    pub global: Option<Ipv6Addr>,
    /// Prefixes of global addresses that are on its link.
    pub on_link: BTreeSet<Ipv6Network>,
    /// The address that pods leave with: the one that the default route would choose.
    pub ipv4: Option<Ipv4Addr>,
    /// Prefixes whose routes would choose another of its addresses.
    pub sources: BTreeMap<Ipv4Network, Ipv4Addr>,
    /// The /64s in which it has addresses.
    pub prefixes: BTreeSet<NodePrefix>,
    /// Its Ethernet address; zero when it has none.
    pub mac: Mac,
    /// Its MTU.
    pub mtu_bytes: u32,
}

/// Why there is no uplink.
#[derive(Debug, Error)]
pub enum UplinkError {
    /// No default route of either family.
    #[error("there is no default route to find the uplink by: name it with --uplink")]
    NoDefaultRoute,
    /// The named device is not there.
    #[error("there is no device {0}: name one that `ip link` shows with --uplink")]
    NoDevice(String),
    /// The kernel did not answer.
    #[error("cannot look for the uplink")]
    Netlink(#[from] NetlinkError),
}

impl Dataplane {
    /// The device of the default route, IPv6 before IPv4.
    ///
    /// # Errors
    /// [`UplinkError`] when there is none.
    pub async fn default_uplink(&self) -> Result<UplinkInfo, UplinkError> {
        let mut routes = self.netlink.default_routes(AddressFamily::Inet6).await?;
        routes.extend(self.netlink.default_routes(AddressFamily::Inet).await?);
        let (_, index) = *routes.first().ok_or(UplinkError::NoDefaultRoute)?;
        let devices = self.netlink.devices().await?;
        let device = devices.into_iter().find(|device| device.index == index);
        self.describe(device.ok_or(UplinkError::NoDefaultRoute)?).await
    }

    /// The device called `name`.
    ///
    /// # Errors
    /// [`UplinkError`] when it is not there.
    pub async fn uplink(&self, name: &str) -> Result<UplinkInfo, UplinkError> {
        let devices = self.netlink.devices().await?;
        let device = devices.into_iter().find(|device| device.name == name);
        self.describe(device.ok_or_else(|| UplinkError::NoDevice(name.to_owned()))?).await
    }

    async fn describe(&self, device: Device) -> Result<UplinkInfo, UplinkError> {
        let mut addresses = self.netlink.addresses().await?;
        addresses.retain(|address| address.index == device.index);
        let (ipv4, sources) = sources(&self.netlink.ipv4_routes(device.index).await?, &addresses);
        addresses.retain(is_usable);
        addresses.sort_by_key(preference);
        let mut on_link = self.netlink.on_link(device.index).await?;
        on_link.retain(is_link);
        let ipv6 = || {
            let ips = addresses.iter().map(|address| address.network.ip());
            ips.filter_map(|ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None })
        };
        Ok(UplinkInfo {
            name: device.name,
            ipv6: ipv6().next(),
            prefixes: ipv6().filter_map(|ip| NodePrefix::around(ip).ok()).collect(),
            global: ipv6().find(|ip| is_global(*ip)),
            on_link,
            ipv4,
            sources,
            mac: device.link.mac,
            mtu_bytes: device.link.mtu_bytes,
        })
    }
}

pub(crate) fn is_usable(address: &DeviceAddress) -> bool {
    let unusable = AddressFlags::Tentative | AddressFlags::Deprecated | AddressFlags::Dadfailed;
    let wide = match address.network.ip() {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_unicast_link_local() && !ip.is_multicast() && !ip.is_loopback(),
    };
    wide && !address.ours && !address.flags.intersects(unusable)
}

/// Whether the address is one of the internet (`2000::/3`, RFC 4291 section 2.5.4).
fn is_global(ip: Ipv6Addr) -> bool {
    ip.octets()[0] & 0xe0 == 0x20
}

/// Whether a route without a gateway is one to a link: of a point-to-point device even the default route has none.
fn is_link(prefix: &Ipv6Network) -> bool {
    const LINK_BITS_MIN: u8 = 32;
    is_global(prefix.ip()) && prefix.prefix() >= LINK_BITS_MIN
}

/// Static before learned, primary before temporary or secondary, then by number, so that the choice is stable.
pub(crate) fn preference(address: &DeviceAddress) -> (bool, Reverse<bool>, IpAddr) {
    let flags = address.flags;
    (
        flags.contains(AddressFlags::Secondary),
        Reverse(flags.contains(AddressFlags::Permanent)),
        address.network.ip(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(network: &str, flags: AddressFlags) -> DeviceAddress {
        DeviceAddress { index: 2, network: network.parse().unwrap(), ours: false, flags }
    }

    #[test]
    fn link_local_tentative_deprecated_and_own_addresses_are_no_underlay() {
        assert!(is_usable(&address("2001:db8::1/64", AddressFlags::Permanent)));
        assert!(is_usable(&address("fd00::1/64", AddressFlags::empty())));
        assert!(!is_usable(&address("fe80::1/64", AddressFlags::Permanent)));
        assert!(!is_usable(&address("ff02::1:ff00:1/128", AddressFlags::Permanent)));
        assert!(!is_usable(&address("2001:db8::1/64", AddressFlags::Tentative)));
        assert!(!is_usable(&address("2001:db8::1/64", AddressFlags::Deprecated)));
        let own = DeviceAddress { ours: true, ..address("2001:db8::1/64", AddressFlags::Permanent) };
        assert!(!is_usable(&own));
    }

    #[test]
    fn only_prefixes_of_the_internet_are_links_of_it() {
        let is = |prefix: &str| is_link(&prefix.parse().unwrap());
        assert!(is("2001:db8:1::/64") && is("2001:db8:1::11/128"));
        assert!(!is("::/0") && !is("2000::/3") && !is("fe80::/64") && !is("fd00::/64") && !is("ff00::/8"));
        assert!(is_global("3fff::1".parse().unwrap()) && !is_global("64:ff9b::1".parse().unwrap()));
    }

    #[test]
    fn static_address_wins_over_learned_and_temporary_ones() {
        let mut addresses = [
            address("2001:db8::a/64", AddressFlags::Secondary),
            address("2001:db8::b/64", AddressFlags::empty()),
            address("2001:db8::c/64", AddressFlags::Permanent),
        ];
        addresses.sort_by_key(preference);
        let order: Vec<_> = addresses.iter().map(|address| address.network.ip().to_string()).collect();
        assert_eq!(order, ["2001:db8::c", "2001:db8::b", "2001:db8::a"]);
    }
}
