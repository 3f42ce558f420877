//! Tells when something that a plan depends on has changed in the kernel, so that nobody needs to poll.
//!
//! It says that something changed, not what: whoever waits observes again. Lost messages are a change too.

use std::{io, sync::Arc, time::Duration};

use futures_util::StreamExt;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourFlags, NeighbourMessage, NeighbourState},
};
use netlink_sys::{
    AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use rtnetlink::MulticastGroup;
use thiserror::Error;
use tokio::{
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

use crate::Dataplane;

/// Changes come in bursts: a device that goes down takes all its routes along.
const SETTLE: Duration = Duration::from_millis(20);

/// However much others change, looking again costs no more than a few per cent of a CPU.
const INTERVAL_MIN: Duration = Duration::from_millis(200);

/// Receive buffer of the socket; what does not fit is reported as an overrun, not lost unseen.
const RECEIVE_BUFFER_BYTES: usize = 1 << 20;

/// `NFNLGRP_NFTABLES` as a bit: every change of the rule set.
const NFTABLES_GROUP_BIT: u32 = 1 << 6;

/// The largest message that is read; only its arrival matters.
const NETFILTER_MESSAGE_BYTES: usize = 4096;

/// Why changes cannot be watched.
#[derive(Debug, Error)]
pub enum ChangesError {
    /// A socket cannot be opened.
    #[error("cannot listen for changes of the network")]
    Open(#[source] io::Error),
}

/// A stream of "something changed".
pub struct Changes {
    changed: Arc<Notify>,
    earliest: Instant,
    listeners: [JoinHandle<()>; 3],
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.listeners.iter().for_each(JoinHandle::abort);
    }
}

impl Changes {
    /// Waits until something has changed since the last call returned, and then for the burst to settle.
    ///
    /// Cancelling loses nothing, except that the wait for settling begins anew.
    pub async fn changed(&mut self) {
        self.changed.notified().await;
        // Kept for the next call if this one is cancelled while it settles.
        self.changed.notify_one();
        sleep(SETTLE).await;
        sleep_until(self.earliest).await;
        self.changed.notified().await;
        self.earliest = Instant::now() + INTERVAL_MIN;
    }
}

impl Dataplane {
    /// Begins to listen for changes: links, addresses, routes, permanent neighbours, rules and nftables of the
    /// node's namespace and of the pods' namespaces.
    ///
    /// # Errors
    /// [`ChangesError`] when a socket cannot be opened.
    pub fn changes(&self) -> Result<Changes, ChangesError> {
        let changed = Arc::new(Notify::new());
        let [driver, routes] = listen_to_routes(&changed).map_err(ChangesError::Open)?;
        let nftables = listen_to_nftables(&changed).map_err(ChangesError::Open)?;
        Ok(Changes { changed, earliest: Instant::now(), listeners: [driver, routes, nftables] })
    }
}

fn listen_to_routes(changed: &Arc<Notify>) -> io::Result<[JoinHandle<()>; 2]> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    socket.socket_mut().set_rx_buf_sz(RECEIVE_BUFFER_BYTES)?;
    // Pods' namespaces have an ID here because a link leads into them: their changes come over the same socket.
    socket.socket_mut().set_listen_all_namespaces(true)?;
    socket.socket_mut().bind(&SocketAddr::new(0, group_bits()))?;
    let (connection, handle, mut messages) = rtnetlink::from_socket(socket);
    let changed = changed.clone();
    let listener = tokio::spawn(async move {
        // The connection ends when nobody holds its handle.
        let _handle = handle;
        while let Some((message, _)) = messages.next().await {
            if matters(&message) {
                changed.notify_one();
            }
        }
    });
    Ok([tokio::spawn(connection), listener])
}

fn group_bits() -> u32 {
    use MulticastGroup::*;
    let groups = [Link, Neigh, Ipv4Ifaddr, Ipv4Route, Ipv4Rule, Ipv6Ifaddr, Ipv6Route, Ipv6Rule];
    groups.iter().fold(0, |bits, group| bits | 1 << (*group as u32 - 1))
}

fn listen_to_nftables(changed: &Arc<Notify>) -> io::Result<JoinHandle<()>> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind(&SocketAddr::new(0, NFTABLES_GROUP_BIT))?;
    let changed = changed.clone();
    Ok(tokio::spawn(async move {
        let mut message = Vec::with_capacity(NETFILTER_MESSAGE_BYTES);
        loop {
            message.clear();
            // An overrun is an error here, and says as much as a message.
            let received = socket.recv_from(&mut message).await;
            changed.notify_one();
            if received.is_err_and(|error| error.raw_os_error() != Some(libc::ENOBUFS)) {
                return;
            }
        }
    }))
}

/// Neighbours come and go with traffic: only permanent ones, proxied ones and removals are looked at.
fn matters(message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    match &message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(neighbour)) => is_kept(neighbour),
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(neighbour)) => is_ip(neighbour),
        _ => true,
    }
}

fn is_kept(neighbour: &NeighbourMessage) -> bool {
    let proxied = neighbour.header.flags.contains(NeighbourFlags::Proxy);
    is_ip(neighbour) && (proxied || neighbour.header.state == NeighbourState::Permanent)
}

/// Not an entry of a bridge.
fn is_ip(neighbour: &NeighbourMessage) -> bool {
    matches!(neighbour.header.family, AddressFamily::Inet | AddressFamily::Inet6)
}
