//! Links, addresses, routes and neighbours of one network namespace, over one netlink socket.
//!
//! It translates between the kernel's messages and the objects of `dataplane-core`, and filters out what is not
//! Hextet's. It plans nothing.

mod messages;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::Ipv6Addr,
    os::fd::{AsFd, AsRawFd},
};

use dataplane_core::{Address, Link, Mac, Neighbour, PROTOCOL, Route};
use futures_util::TryStreamExt;
use ipnetwork::{IpNetwork, Ipv6Network};
use netlink_packet_route::{
    AddressFamily,
    address::AddressFlags,
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoVeth, LinkAttribute, LinkFlags},
    neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{RouteMessage, RouteProtocol, RouteType},
};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};
use thiserror::Error;
use tokio::task::JoinHandle;

use crate::source::Ipv4Route;

use messages::{
    address, address_message, device, family, ipv4_route, is_main_table, metric, neighbour,
    neighbour_address, on_link, out_index, proxy, proxy_message, reachability, route, route_message,
};

/// What the kernel knows of a neighbour that it was made to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reachability {
    /// It has answered.
    Reachable,
    /// It has not, and the kernel has given up; or there is no such entry.
    Unreachable,
    /// Nobody knows yet.
    Unknown,
}

/// Why the kernel did not answer or refused.
#[derive(Debug, Error)]
pub enum NetlinkError {
    /// The kernel's own error.
    #[error("the kernel refuses")]
    Refused(#[source] io::Error),
    /// A named device is not there.
    #[error("there is no device {0}")]
    NoDevice(String),
    /// The socket broke or an answer made no sense.
    #[error("netlink conversation broke: {0}")]
    Broken(String),
}

impl NetlinkError {
    /// The kernel's error number, when it was the kernel that refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused(error) => error.raw_os_error(),
            _ => None,
        }
    }
}

impl From<rtnetlink::Error> for NetlinkError {
    fn from(error: rtnetlink::Error) -> Self {
        match error {
            rtnetlink::Error::NetlinkError(message) => Self::Refused(message.to_io()),
            other => Self::Broken(other.to_string()),
        }
    }
}

/// A device as the kernel reports it.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// Index of the other side of a veth, in the other side's namespace.
    pub(crate) peer_index: Option<u32>,
    pub(crate) link: Link,
}

/// An address as the kernel reports it, of whatever owner.
#[derive(Clone, Debug)]
pub(crate) struct DeviceAddress {
    pub(crate) index: u32,
    pub(crate) network: IpNetwork,
    pub(crate) ours: bool,
    pub(crate) flags: AddressFlags,
}

/// A conversation with the kernel about the network namespace of the thread that opened it.
pub(crate) struct Netlink {
    handle: Handle,
    driver: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Netlink {
    /// Opens a socket in the calling thread's namespace; any thread of the runtime may drive it.
    ///
    /// Strict checking makes the kernel honour the filters of dumps.
    pub(crate) fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection_with_strict_check()?;
        Ok(Self { handle, driver: tokio::spawn(connection) })
    }

    pub(crate) async fn devices(&self) -> Result<Vec<Device>, NetlinkError> {
        let messages: Vec<_> = self.handle.link().get().execute().try_collect().await?;
        Ok(messages.into_iter().filter_map(device).collect())
    }

    pub(crate) async fn addresses(&self) -> Result<Vec<DeviceAddress>, NetlinkError> {
        let messages: Vec<_> = self.handle.address().get().execute().try_collect().await?;
        Ok(messages.into_iter().filter_map(address).collect())
    }

    /// Hextet's routes of the main table; `names` are device names by index.
    pub(crate) async fn routes(
        &self,
        names: &BTreeMap<u32, String>,
    ) -> Result<BTreeSet<Route>, NetlinkError> {
        let mut routes = BTreeSet::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let messages = self.dump_routes(family, RouteProtocol::Other(PROTOCOL)).await?;
            let ours = messages.iter().filter(|message| is_main_table(message));
            routes.extend(ours.filter_map(|message| route(message, names)));
        }
        Ok(routes)
    }

    /// Every default route's metric and device index, the best first.
    pub(crate) async fn default_routes(
        &self,
        family: AddressFamily,
    ) -> Result<Vec<(u32, u32)>, NetlinkError> {
        let messages = self.dump_routes(family, RouteProtocol::Unspec).await?;
        let mut defaults: Vec<_> = messages
            .iter()
            .filter(|m| is_main_table(m) && m.header.destination_prefix_length == 0)
            .filter(|m| m.header.kind == RouteType::Unicast)
            .filter_map(|m| Some((metric(m), out_index(m)?)))
            .collect();
        defaults.sort_unstable();
        Ok(defaults)
    }

    /// The IPv4 routes of the main table out of a device.
    pub(crate) async fn ipv4_routes(&self, index: u32) -> Result<Vec<Ipv4Route>, NetlinkError> {
        let messages = self.dump_routes(AddressFamily::Inet, RouteProtocol::Unspec).await?;
        let out = messages.iter().filter(|m| is_main_table(m) && out_index(m) == Some(index));
        Ok(out.filter(|m| m.header.kind == RouteType::Unicast).filter_map(ipv4_route).collect())
    }

    /// The prefixes that the main table says are on a device's own link, by IPv6 routes without a gateway.
    pub(crate) async fn on_link(&self, index: u32) -> Result<BTreeSet<Ipv6Network>, NetlinkError> {
        let messages = self.dump_routes(AddressFamily::Inet6, RouteProtocol::Unspec).await?;
        let out = messages.iter().filter(|m| is_main_table(m) && out_index(m) == Some(index));
        Ok(out.filter(|m| m.header.kind == RouteType::Unicast).filter_map(on_link).collect())
    }

    async fn dump_routes(
        &self,
        family: AddressFamily,
        protocol: RouteProtocol,
    ) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        filter.header.protocol = protocol;
        Ok(self.handle.route().get(filter).execute().try_collect().await?)
    }

    /// Permanent neighbours on the devices in `names`.
    pub(crate) async fn neighbours(
        &self,
        names: &BTreeMap<u32, String>,
    ) -> Result<BTreeSet<Neighbour>, NetlinkError> {
        let mut neighbours = BTreeSet::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let dump = self.handle.neighbours().get().set_address_family(family).execute();
            let messages: Vec<_> = dump.try_collect().await?;
            neighbours.extend(messages.iter().filter_map(|message| neighbour(message, names)));
        }
        Ok(neighbours)
    }

    /// Hextet's entries for the kernel's `proxy_ndp`.
    pub(crate) async fn proxies(
        &self,
        names: &BTreeMap<u32, String>,
    ) -> Result<BTreeSet<(String, Ipv6Addr)>, NetlinkError> {
        let request = self.handle.neighbours().get().proxies().set_address_family(AddressFamily::Inet6);
        let messages: Vec<_> = request.execute().try_collect().await?;
        Ok(messages.iter().filter_map(|message| proxy(message, names)).collect())
    }

    /// Makes a veth whose other side is born as `eth0` in another namespace.
    pub(crate) async fn add_veth(
        &self,
        dev: &str,
        host_mac: Mac,
        pod_mac: Mac,
        mtu_bytes: u32,
        netns: impl AsFd,
    ) -> Result<(), NetlinkError> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(dataplane_core::POD_IF)
            .address(pod_mac.0.to_vec())
            .mtu(mtu_bytes)
            .setns_by_fd(netns.as_fd().as_raw_fd())
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new(dev, dataplane_core::POD_IF)
            .address(host_mac.0.to_vec())
            .mtu(mtu_bytes)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        Ok(self.handle.link().add(message).execute().await?)
    }

    /// Gives a device all that `link` says. It goes up in a message of its own: within one message the kernel
    /// would bring it up, and make a link-local address, before it reads how to make addresses.
    pub(crate) async fn set_link(&self, dev: &str, link: &Link) -> Result<(), NetlinkError> {
        let index = index_of(dev)?;
        let mode = if link.addrgen_none { In6AddrGenMode::None } else { In6AddrGenMode::Eui64 };
        let spec = vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(mode)])];
        let message = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index)
            .address(link.mac.0.to_vec())
            .mtu(link.mtu_bytes)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(spec));
        let message = match &link.alias {
            Some(alias) => message.alias(alias.as_str()),
            None => message,
        };
        self.handle.link().change(message.build()).execute().await?;
        if link.up { self.set_up(index).await } else { Ok(()) }
    }

    pub(crate) async fn set_loopback_up(&self) -> Result<(), NetlinkError> {
        self.set_up(LOOPBACK_INDEX).await
    }

    async fn set_up(&self, index: u32) -> Result<(), NetlinkError> {
        let message = LinkMessageBuilder::<LinkUnspec>::new().index(index).up().build();
        Ok(self.handle.link().change(message).execute().await?)
    }

    pub(crate) async fn delete_link(&self, dev: &str) -> Result<(), NetlinkError> {
        Ok(self.handle.link().del(index_of(dev)?).execute().await?)
    }

    pub(crate) async fn add_address(&self, address: &Address) -> Result<(), NetlinkError> {
        let index = index_of(&address.dev)?;
        let mut request = self.handle.address().add(index, address.network.ip(), address.network.prefix());
        *request.message_mut() = address_message(index, address);
        Ok(request.replace().execute().await?)
    }

    pub(crate) async fn delete_address(&self, address: &Address) -> Result<(), NetlinkError> {
        let message = address_message(index_of(&address.dev)?, address);
        Ok(self.handle.address().del(message).execute().await?)
    }

    pub(crate) async fn add_route(&self, route: &Route) -> Result<(), NetlinkError> {
        Ok(self.handle.route().add(route_message(route)?).execute().await?)
    }

    pub(crate) async fn replace_route(&self, route: &Route) -> Result<(), NetlinkError> {
        Ok(self.handle.route().add(route_message(route)?).replace().execute().await?)
    }

    pub(crate) async fn delete_route(&self, route: &Route) -> Result<(), NetlinkError> {
        Ok(self.handle.route().del(route_message(route)?).execute().await?)
    }

    pub(crate) async fn set_neighbour(&self, neighbour: &Neighbour) -> Result<(), NetlinkError> {
        let index = index_of(&neighbour.dev)?;
        let request = self.handle.neighbours().add(index, neighbour.address);
        let request = request.state(NeighbourState::Permanent).link_layer_address(&neighbour.mac.0);
        Ok(request.replace().execute().await?)
    }

    pub(crate) async fn probe_neighbour(&self, dev: &str, address: Ipv6Addr) -> Result<(), NetlinkError> {
        let index = index_of(dev)?;
        let known = self.handle.neighbours().add(index, address.into()).state(NeighbourState::Probe);
        if known.replace().execute().await.is_ok() {
            return Ok(());
        }
        // Of whom the kernel has no link-layer address it asks all, as if there were a packet to send.
        let unknown = self.handle.neighbours().add(index, address.into()).state(NeighbourState::None);
        Ok(unknown.flags(NeighbourFlags::Use).replace().execute().await?)
    }

    /// Whether a device is up and has somebody at its other end.
    pub(crate) async fn has_carrier(&self, dev: &str) -> Result<bool, NetlinkError> {
        let request = self.handle.link().get().match_index(index_of(dev)?);
        let messages: Vec<_> = request.execute().try_collect().await?;
        Ok(messages.iter().any(|link| link.header.flags.contains(LinkFlags::LowerUp)))
    }

    /// What the kernel knows of the IPv6 neighbours on a device.
    pub(crate) async fn reachability(
        &self,
        dev: &str,
    ) -> Result<BTreeMap<Ipv6Addr, Reachability>, NetlinkError> {
        let index = index_of(dev)?;
        let dump = self.handle.neighbours().get().set_address_family(AddressFamily::Inet6).execute();
        let messages: Vec<_> = dump.try_collect().await?;
        let here = messages.iter().filter(|message| message.header.ifindex == index);
        Ok(here.filter_map(reachability).collect())
    }

    pub(crate) async fn delete_neighbour(&self, neighbour: &Neighbour) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(neighbour.address);
        message.header.ifindex = index_of(&neighbour.dev)?;
        message.attributes = vec![NeighbourAttribute::Destination(neighbour_address(neighbour.address))];
        Ok(self.handle.neighbours().del(message).execute().await?)
    }

    pub(crate) async fn add_proxy(&self, dev: &str, address: Ipv6Addr) -> Result<(), NetlinkError> {
        let index = index_of(dev)?;
        let mut request = self.handle.neighbours().add(index, address.into());
        *request.message_mut() = proxy_message(index, address);
        Ok(request.replace().execute().await?)
    }

    pub(crate) async fn delete_proxy(&self, dev: &str, address: Ipv6Addr) -> Result<(), NetlinkError> {
        Ok(self.handle.neighbours().del(proxy_message(index_of(dev)?, address)).execute().await?)
    }
}

/// `lo` is the first device of every namespace.
const LOOPBACK_INDEX: u32 = 1;

/// Index of a device in the calling thread's namespace.
pub(crate) fn index_of(dev: &str) -> Result<u32, NetlinkError> {
    nix::net::if_::if_nametoindex(dev).map_err(|_| NetlinkError::NoDevice(dev.to_owned()))
}

/// Name of a device by index, or one that shows that it has gone.
pub(crate) fn name_of(names: &BTreeMap<u32, String>, index: u32) -> String {
    names.get(&index).cloned().unwrap_or_else(|| format!("if{index}"))
}
