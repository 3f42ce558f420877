//! Tells when something that a plan depends on has changed in the kernel, so that nobody needs to poll.
//!
//! It says that something changed and not what: whoever waits observes again. Lost messages are a change too. Beside
//! that it keeps [`Trace`]s of who changed what, as far as the kernel says so, for the words about a repair.
//!
//! # What is heard
//! Links, addresses, routes, permanent neighbours, qdiscs and filters, the settings of devices that the kernel
//! announces (forwarding and proxying among them), table `ip hextet`, and pins that are removed, of the node and of
//! its pods. The kernel announces nothing when a TCX link loses its interface; the uplink's hooks are looked at
//! instead ([`hooks`]). Other settings, entries of the kernel's own proxy and the content of BPF maps are found only by
//! who looks without being told.
//!
//! # Bounds
//! A change is answered after [`SETTLE`]. However much others change, it is [`LOOKS_AT_ONCE`] times in a row at most,
//! and once every [`LOOKS_INTERVAL`] from then on.

mod author;
mod hooks;
mod message;
mod pace;
mod pins;

use std::{
    collections::VecDeque,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant as Moment},
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
    time::{Instant, sleep_until},
};

pub use author::Author;
pub(crate) use hooks::Watched;
pub use message::{Subject, Trace};
pub use pace::Pace;

use crate::Dataplane;

/// Changes come in bursts: a device that goes down takes all its routes along.
const SETTLE: Duration = Duration::from_millis(10);

/// How many changes, none of them in the same burst, are answered at once.
const LOOKS_AT_ONCE: u32 = 8;

/// How often changes are answered when they do not end.
const LOOKS_INTERVAL: Duration = Duration::from_millis(200);

/// Receive buffer of a socket; what does not fit is reported as an overrun, not lost unseen.
const RECEIVE_BUFFER_BYTES: usize = 1 << 20;

/// `NFNLGRP_NFTABLES` as a bit: every change of the rule set.
const NFTABLES_GROUP_BIT: u32 = 1 << 6;

/// `RTNLGRP_TC`, which rtnetlink calls by no name.
const TC_GROUP: u32 = libc::RTNLGRP_TC;

/// The largest datagram that is read. What is cut off is a change all the same.
const DATAGRAM_BYTES: usize = 32 << 10;

/// The newest traces that are kept.
const TRACES_MAX: usize = 64;

/// Why changes cannot be watched.
#[derive(Debug, Error)]
pub enum ChangesError {
    /// A socket cannot be opened.
    #[error("cannot listen for changes of the network")]
    Open(#[source] io::Error),
    /// The folder of the pins cannot be watched.
    #[error("cannot watch the pins in {}", path.display())]
    Pins {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A stream of "something changed".
pub struct Changes {
    heard: Heard,
    /// When the burst that is going on is over.
    settled: Option<Instant>,
    pace: Pace,
    listeners: Vec<JoinHandle<()>>,
}

/// Who changed what of late.
#[derive(Clone, Debug, Default)]
pub struct Traces(Arc<Mutex<VecDeque<Trace>>>);

/// Where listeners say that they heard something.
#[derive(Clone, Debug, Default)]
struct Heard {
    changed: Arc<Notify>,
    traces: Traces,
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.listeners.iter().for_each(JoinHandle::abort);
    }
}

impl Changes {
    /// Waits until something has changed since the last call returned, and then for the burst to settle.
    ///
    /// Cancelling loses nothing.
    pub async fn changed(&mut self) {
        let settled = match self.settled {
            Some(settled) => settled,
            None => {
                self.heard.changed.notified().await;
                let now = Instant::now();
                *self.settled.insert((now + SETTLE).max(self.pace.next(now)))
            }
        };
        sleep_until(settled).await;
        self.settled = None;
        self.pace.take(Instant::now());
        // What came meanwhile is seen by who looks now.
        let _ = futures_util::FutureExt::now_or_never(self.heard.changed.notified());
    }

    /// Who changed what of late, also after this is gone.
    pub fn traces(&self) -> Traces {
        self.heard.traces.clone()
    }
}

impl Traces {
    /// All that were kept since the last call, the oldest first.
    pub fn take(&self) -> Vec<Trace> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).into()
    }

    fn push(&self, subject: Subject, author: Option<Author>) {
        let mut traces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = |trace: &Trace| trace.subject == subject && trace.author == author;
        if !traces.iter().any(is_known) {
            if traces.len() == TRACES_MAX {
                traces.pop_front();
            }
            traces.push_back(Trace { subject, author, at: Moment::now() });
        }
    }
}

impl Heard {
    fn change(&self, subject: Subject, author: Option<Author>) {
        self.traces.push(subject, author);
        self.changed.notify_one();
    }

    /// Something was lost, or cannot be told.
    fn anything(&self) {
        self.changed.notify_one();
    }
}

impl Dataplane {
    /// Begins to listen for changes of the node's namespace, of the pods' namespaces and of the pins.
    ///
    /// # Errors
    /// [`ChangesError`] when a socket cannot be opened or the pins cannot be watched.
    pub fn changes(&self) -> Result<Changes, ChangesError> {
        let heard = Heard::default();
        let mut listeners = vec![
            listen(NETLINK_ROUTE, routing_groups(), heard.clone(), hear_routing)
                .map_err(ChangesError::Open)?,
            listen(NETLINK_NETFILTER, NFTABLES_GROUP_BIT, heard.clone(), hear_nftables)
                .map_err(ChangesError::Open)?,
        ];
        // The name of a namespace goes without a word from netlink while something lives in it.
        if let Ok(watching) = pins::watch(&self.config.netns_dir, heard.clone()) {
            listeners.push(watching);
        }
        if let Some(bpf) = &self.bpf {
            let path = bpf.pins().to_owned();
            let watching = pins::watch(&path, heard.clone());
            listeners.push(watching.map_err(|source| ChangesError::Pins { path, source })?);
            if bpf.uses_tcx() {
                listeners.push(tokio::spawn(hooks::watch(self.watched.clone(), heard.clone())));
            }
        }
        let pace = Pace::new(LOOKS_AT_ONCE, LOOKS_INTERVAL);
        Ok(Changes { heard, settled: None, pace, listeners })
    }
}

fn routing_groups() -> u32 {
    use MulticastGroup::*;
    let groups = [Link, Neigh, Ipv4Ifaddr, Ipv4Route, Ipv4Netconf, Ipv6Ifaddr, Ipv6Route, Ipv6Netconf];
    let groups = groups.map(|group| group as u32);
    groups.iter().chain([&TC_GROUP]).fold(0, |bits, group| bits | 1 << (group - 1))
}

/// Reads datagrams of multicast groups until the socket breaks.
fn listen(
    protocol: isize,
    groups: u32,
    heard: Heard,
    mut hear: impl FnMut(&[u8], &Heard, &mut bool) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().set_rx_buf_sz(RECEIVE_BUFFER_BYTES)?;
    if protocol == NETLINK_ROUTE {
        // Pods' namespaces have an ID here because a link leads into them: their changes come over the same socket.
        socket.socket_mut().set_listen_all_namespaces(true)?;
    }
    socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
    Ok(tokio::spawn(async move {
        let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
        let mut is_ours = false;
        loop {
            datagram.clear();
            match socket.recv_from(&mut datagram).await {
                Ok(_) => hear(&datagram, &heard, &mut is_ours),
                Err(error) => {
                    heard.anything();
                    // An overrun says as much as a message.
                    if error.raw_os_error() != Some(libc::ENOBUFS) {
                        tracing::warn!(%error, "changes of the network are only found by the audit now");
                        return;
                    }
                }
            }
        }
    }))
}

fn hear_routing(datagram: &[u8], heard: &Heard, _: &mut bool) {
    for message in message::messages(datagram) {
        if let Some(subject) = message.subject() {
            heard.change(subject, message.port().and_then(Author::of_port));
        }
    }
}

/// `is_ours` is whether the transaction that is going on has touched table `hextet`: its last message says who made it.
fn hear_nftables(datagram: &[u8], heard: &Heard, is_ours: &mut bool) {
    for message in message::messages(datagram) {
        *is_ours |= message.is_in_our_table();
        if let Some((pid, name)) = message.transaction()
            && std::mem::take(is_ours)
        {
            heard.change(Subject::Nftables, Some(Author { pid, name: Some(name) }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_are_bounded_and_told_once() {
        let traces = Traces::default();
        for pid in 1..=100 {
            for _ in 0..2 {
                traces.push(Subject::Route, Some(Author { pid, name: None }));
            }
        }
        let taken = traces.take();
        assert_eq!(taken.len(), TRACES_MAX);
        assert_eq!(taken.last().unwrap().author.as_ref().unwrap().pid, 100);
        assert!(traces.take().is_empty());
    }
}
