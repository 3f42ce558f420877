//! Watches one device: its MAC address, and whether anybody can hear it.

use std::{io, pin::Pin};

use dataplane_core::Mac;
use futures_util::{Stream, StreamExt, TryStreamExt};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
};
use netlink_sys::{AsyncSocket, SocketAddr};
use rtnetlink::{Handle, MulticastGroup};
use tokio::task::JoinHandle;

/// The device as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) mac: Mac,
    /// Administratively up, with a carrier.
    pub(super) up: bool,
}

type Messages = Pin<Box<dyn Stream<Item = (NetlinkMessage<RouteNetlinkMessage>, SocketAddr)> + Send>>;

/// The device as it becomes.
pub(super) struct LinkWatch {
    index: u32,
    handle: Handle,
    messages: Messages,
    /// Messages were lost; one of them may have been about this device.
    lost: bool,
    driver: JoinHandle<()>,
}

impl Drop for LinkWatch {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl LinkWatch {
    /// Begins to watch the device with this index in the calling thread's network namespace.
    pub(super) fn open(index: u32) -> io::Result<LinkWatch> {
        let (mut connection, handle, messages) = rtnetlink::new_connection()?;
        let links = 1 << (MulticastGroup::Link as u32 - 1);
        connection.socket_mut().socket_mut().bind(&SocketAddr::new(0, links))?;
        Ok(LinkWatch {
            index,
            handle,
            messages: Box::pin(messages),
            lost: false,
            driver: tokio::spawn(connection),
        })
    }

    /// The device as it is now; `None` when it has gone or is no Ethernet.
    pub(super) async fn now(&mut self) -> Option<Link> {
        let mut links = self.handle.link().get().match_index(self.index).execute();
        link(&links.try_next().await.ok()??)
    }

    /// The device after the next change of it.
    ///
    /// Cancelling loses nothing.
    pub(super) async fn next(&mut self) -> Option<Link> {
        loop {
            if self.lost {
                let link = self.now().await;
                self.lost = false;
                return link;
            }
            let (message, _) = self.messages.next().await?;
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                    if message.header.index == self.index {
                        return link(&message);
                    }
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message)) => {
                    if message.header.index == self.index {
                        return None;
                    }
                }
                _ => self.lost = true,
            }
        }
    }
}

fn link(message: &LinkMessage) -> Option<Link> {
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(address) => <[u8; 6]>::try_from(address.as_slice()).ok(),
        _ => None,
    })?;
    let up = message.header.flags.contains(LinkFlags::Up | LinkFlags::Running);
    Some(Link { mac: Mac(mac), up })
}
