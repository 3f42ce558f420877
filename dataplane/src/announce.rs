//! Announces pods' addresses on the uplink and hears who else claims them: the shell around
//! [`dataplane_core::announce`].
//!
//! The agent calls [`Announcer::reconciled`] after each reconciliation; everything else is done by a task of its own.
//! When the uplink comes back, or has another MAC address, all addresses are announced again. After a start of the
//! agent that found everything as it was, nothing is said.

mod link;
mod socket;

use std::{
    collections::BTreeSet,
    io,
    net::Ipv6Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dataplane_common::{
    ethernet,
    ipv6::Address,
    ndp::{Advertisement, Flags, claim},
};
use dataplane_core::{
    Desired, Mac,
    announce::{Announcements, Audience, Claim, Frame, appeared},
};
use thiserror::Error;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tracing::{debug, info, warn};

pub use dataplane_core::announce::Conflict;

use crate::{Reconciled, netlink::index_of};
use link::{Link, LinkWatch};
use socket::Sockets;

/// Conflicts that nobody has asked for yet. What comes on top is told again when it is claimed again.
const CONFLICTS_MAX: usize = 64;

/// Why nothing can be announced.
#[derive(Debug, Error)]
pub enum AnnounceError {
    /// The device has gone.
    #[error("there is no device {0} to announce pods on")]
    NoDevice(String),
    /// No socket.
    #[error("cannot open a socket on {device} to announce pods")]
    Open {
        /// The device.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Announces and watches the addresses of the node's pods.
pub struct Announcer {
    shared: Arc<Shared>,
    worker: Option<Worker>,
}

impl Announcer {
    /// One that announces nothing yet, and where conflicts come in: a bounded number of them, however much is
    /// claimed.
    pub fn new() -> (Announcer, mpsc::Receiver<Conflict>) {
        let (conflicts, receiver) = mpsc::channel(CONFLICTS_MAX);
        let shared = Shared {
            announcements: Mutex::default(),
            changed: Notify::new(),
            start: Instant::now(),
            conflicts,
        };
        (Announcer { shared: Arc::new(shared), worker: None }, receiver)
    }

    /// Announces what `reconciled` made the node answer for, watches all of `desired`, forgets the rest. With
    /// `probe`, a new address is also probed (RFC 4862 section 5.4), which takes one second in which it is used
    /// already (RFC 4429).
    ///
    /// Must be called on a thread in the node's network namespace, in a runtime.
    ///
    /// # Errors
    /// [`AnnounceError`] when the uplink's sockets cannot be opened. What was to be announced is kept for the next
    /// call.
    pub fn reconciled(
        &mut self,
        desired: &Desired,
        reconciled: &Reconciled,
        probe: bool,
    ) -> Result<(), AnnounceError> {
        self.shared.take(desired, reconciled, probe);
        self.shared.changed.notify_one();
        self.work_on(&desired.uplink.name)
    }

    /// Asks whether another machine has an address that the node answers for. If none says so it is announced
    /// anew, so that those who believed a false claim know better.
    pub fn probe(&self, address: Ipv6Addr) {
        let now = self.shared.now();
        self.shared.announcements().announce(now, address, Some(rand::random()));
        self.shared.changed.notify_one();
    }

    /// Makes hosts of the link that have an entry for these addresses ask again: their node is dead.
    pub fn doubt(&self, addresses: &[Ipv6Addr]) {
        self.shared.announcements().doubt(addresses);
        self.shared.changed.notify_one();
    }

    /// Has a task at work on `device`. Another than before has other neighbours, who are told everything.
    fn work_on(&mut self, device: &str) -> Result<(), AnnounceError> {
        let index = index_of(device).map_err(|_| AnnounceError::NoDevice(device.to_owned()))?;
        if self.worker.as_ref().is_some_and(|worker| worker.is_on(index)) {
            return Ok(());
        }
        let open = |source| AnnounceError::Open { device: device.to_owned(), source };
        let sockets = Sockets::open(device, index).map_err(open)?;
        let links = LinkWatch::open(index).map_err(open)?;
        if self.worker.take().is_some() {
            let now = self.shared.now();
            self.shared.announcements().announce_all(now);
        }
        let task = tokio::spawn(work(self.shared.clone(), sockets, links));
        self.worker = Some(Worker { index, task });
        Ok(())
    }
}

/// The task on one device, ended with it.
struct Worker {
    index: u32,
    task: JoinHandle<()>,
}

impl Worker {
    fn is_on(&self, index: u32) -> bool {
        self.index == index && !self.task.is_finished()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the agent and the task have in common.
struct Shared {
    announcements: Mutex<Announcements>,
    changed: Notify,
    start: Instant,
    conflicts: mpsc::Sender<Conflict>,
}

impl Shared {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn announcements(&self) -> MutexGuard<'_, Announcements> {
        self.announcements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, desired: &Desired, reconciled: &Reconciled, probe: bool) {
        let all: BTreeSet<Ipv6Addr> = desired.pods.values().map(|pod| pod.address).collect();
        let new = appeared(&reconciled.ops, reconciled.failures.iter().map(|(op, _)| op));
        let now = self.now();
        let mut announcements = self.announcements();
        announcements.watch(&all);
        for address in new {
            announcements.announce(now, address, probe.then(rand::random));
        }
    }

    /// Sends what is due; when to come again. A frame that the device does not take is lost: there are others.
    fn send(&self, sockets: &mut Sockets, mac: Mac) -> Option<Instant> {
        let mut announcements = self.announcements();
        if let Err(error) = sockets.hear_probes(announcements.is_probing()) {
            debug!(%error, "others' probes are not heard");
        }
        let now = self.now();
        while let Some(frame) = announcements.next(now) {
            if let Err(error) = sockets.send(&bytes(&frame, mac)) {
                debug!(%error, ?frame, "not sent");
            }
        }
        announcements.wake(now).map(|wake| self.start + wake)
    }

    fn hear(&self, mac: Mac, claim: &Claim) {
        let now = self.now();
        if let Some(conflict) = self.announcements().hear(now, mac, claim) {
            // A full channel has enough to tell.
            let _ = self.conflicts.try_send(conflict);
        }
        self.changed.notify_one();
    }
}

/// Sends and listens until the device has gone.
async fn work(shared: Arc<Shared>, mut sockets: Sockets, mut links: LinkWatch) {
    let mut link = links.now().await;
    while let Some(Link { mac, up }) = link {
        // Nobody hears what is said on a link that is down; it is said when it is up.
        let wake = if up { shared.send(&mut sockets, mac) } else { None };
        tokio::select! {
            () = shared.changed.notified() => {}
            () = sleep(wake) => {}
            claims = sockets.claims() => match claims {
                Ok(claims) => claims.iter().for_each(|claim| shared.hear(mac, claim)),
                // The next reconciliation opens other sockets.
                Err(error) => return warn!(%error, "the uplink cannot be listened to"),
            },
            next = links.next() => {
                if next.is_some_and(|next| next.up && Some(next) != link) {
                    info!("the uplink is back or has another MAC address: pods are announced again");
                    let now = shared.now();
                    shared.announcements().announce_all(now);
                }
                link = next;
            }
        }
    }
}

async fn sleep(until: Option<Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}

fn bytes(frame: &Frame, mac: Mac) -> [u8; claim::PROBE_BYTES] {
    let wire = |address: &Ipv6Addr| Address::new(address.octets());
    match frame {
        Frame::Probe { address, nonce } => claim::probe_frame(wire(address), mac.0, *nonce),
        Frame::Advertisement { address, to, overrides } => {
            let to = match to {
                Audience::Nodes => Address::ALL_NODES,
                Audience::Routers => Address::ALL_ROUTERS,
            };
            let flags = if *overrides { Flags::ROUTER.and(Flags::OVERRIDE) } else { Flags::ROUTER };
            let (to_mac, target) = (ethernet::multicast(to), wire(address));
            Advertisement { to_mac, to, target, mac: mac.0, flags }.frame()
        }
    }
}
