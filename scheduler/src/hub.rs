//! What every part of the server shares: the newest state, the stream of revisions, leases and drains.
//!
//! Readers never wait for the disk: the state is a copy of the writer's, which shares with it and with older ones what
//! they have in common, and leases are renewed in memory, past the writer.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use scheduler_core::{
    change::Revision, cluster::Cluster, deploy::Deploys, drain::Drains, event::Event, lease::Leases,
    state::State, time::Moment, transition::Origin,
};
use tokio::sync::{Notify, broadcast, mpsc, oneshot, watch};

use crate::{
    ahead::Ahead,
    audit,
    clock::Clock,
    founding::Keeper,
    happenings::Happenings,
    lease_stream::LeaseStreams,
    logs::Relays,
    pki::Pki,
    questions::Questions,
    read_only,
    session::Sessions,
    store::{Store, StoreError},
    writer::{Command, Committed, Compact, Request, WriteError},
};

/// Revisions that a slow reader may be behind before it gets the net change instead.
const REVISIONS_KEPT: usize = 1024;

/// What every part of the server shares.
pub(crate) struct Hub {
    pub(crate) clock: Clock,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) pki: Arc<Pki>,
    /// Where the keys of CAs are kept.
    pub(crate) keeper: Keeper,
    /// Held by who replaces the CA.
    pub(crate) rotating: Arc<tokio::sync::Mutex<()>>,
    /// Facts that never change; `None` when they cannot be read.
    pub(crate) cluster: Option<Arc<Cluster>>,
    /// Where nodes and people reach this server and the others, `host:port`.
    pub(crate) servers: watch::Receiver<Vec<String>>,
    /// What the log may take on the disk, about.
    pub(crate) history_bytes: u64,
    pub(crate) sessions: Sessions,
    pub(crate) lease_streams: LeaseStreams,
    /// Nodes that know more than the store.
    pub(crate) ahead: Ahead,
    pub(crate) relays: Relays,
    pub(crate) questions: Questions,
    pub(crate) happenings: Happenings,
    /// When no lease of the server before a restore can run any more, if there was one and this is not settled.
    restore_settles: Option<Moment>,
    /// Told when a drain may have come to its end.
    pub(crate) drains_changed: Notify,
    state: watch::Sender<Arc<State>>,
    revisions: broadcast::Sender<Arc<Revision>>,
    leases: Mutex<Leases>,
    drains: Mutex<Drains>,
    deploys: Mutex<Deploys>,
    writer: mpsc::Sender<Command>,
    writes_fail: watch::Sender<Option<Arc<StoreError>>>,
    closing: watch::Sender<bool>,
}

/// What a [`Hub`] is made of.
pub(crate) struct Parts {
    pub(crate) clock: Clock,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) pki: Arc<Pki>,
    pub(crate) keeper: Keeper,
    pub(crate) cluster: Option<Arc<Cluster>>,
    pub(crate) servers: watch::Receiver<Vec<String>>,
    /// What the log may take on the disk, about.
    pub(crate) history_bytes: u64,
    pub(crate) state: State,
    pub(crate) leases: Leases,
    pub(crate) writer: mpsc::Sender<Command>,
}

impl Hub {
    pub(crate) fn new(parts: Parts) -> Hub {
        let now = parts.clock.now();
        let drains = Drains::resume(&parts.state, now);
        let mark = parts.state.restored();
        let restore_settles = mark.map(|mark| now + mark.wait(parts.leases.length()));
        Hub {
            clock: parts.clock,
            store: parts.store,
            pki: parts.pki,
            keeper: parts.keeper,
            rotating: Arc::default(),
            cluster: parts.cluster,
            servers: parts.servers,
            history_bytes: parts.history_bytes,
            sessions: Sessions::default(),
            lease_streams: LeaseStreams::default(),
            ahead: Ahead::default(),
            relays: Relays::default(),
            questions: Questions::default(),
            happenings: Happenings::default(),
            restore_settles,
            drains_changed: Notify::new(),
            state: watch::Sender::new(Arc::new(parts.state)),
            revisions: broadcast::Sender::new(REVISIONS_KEPT),
            leases: Mutex::new(parts.leases),
            drains: Mutex::new(drains),
            deploys: Mutex::default(),
            writer: parts.writer,
            writes_fail: watch::Sender::new(None),
            closing: watch::Sender::new(false),
        }
    }

    /// Why the store took nothing when it was last asked to.
    pub(crate) fn writes_fail(&self) -> Option<Arc<StoreError>> {
        self.writes_fail.borrow().clone()
    }

    /// What the writer says of that.
    pub(crate) fn say_writes_fail(&self, error: Option<Arc<StoreError>>) {
        self.writes_fail.send_replace(error);
    }

    /// Resolves when the store holds less than it had acknowledged.
    pub(crate) async fn store_went_back(&self) {
        let mut fail = self.writes_fail.subscribe();
        let is_back =
            |error: &Option<Arc<StoreError>>| matches!(error.as_deref(), Some(StoreError::GoneBack { .. }));
        // The sender lives as long as `self`.
        let _ = fail.wait_for(is_back).await;
    }

    /// The newest state.
    pub(crate) fn state(&self) -> Arc<State> {
        self.state.borrow().clone()
    }

    /// For how long leases of the server before a restore may still run; none when that is settled.
    pub(crate) fn restore_wait(&self) -> Option<Duration> {
        self.state().restored()?;
        Some(self.restore_settles? - self.clock.now())
    }

    /// Revisions from now on. To miss none, subscribe first and take the state after.
    pub(crate) fn revisions(&self) -> broadcast::Receiver<Arc<Revision>> {
        self.revisions.subscribe()
    }

    pub(crate) fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn drains(&self) -> MutexGuard<'_, Drains> {
        self.drains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn deploys(&self) -> MutexGuard<'_, Deploys> {
        self.deploys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the writer to bring `event` about. When this returns a revision, it is durable.
    pub(crate) async fn write(&self, origin: Origin, event: Event) -> Result<Committed, WriteError> {
        audit::asked(&event);
        let result = self.ask_writer(origin, event).await;
        audit::answered(&result);
        result
    }

    async fn ask_writer(&self, origin: Origin, event: Event) -> Result<Committed, WriteError> {
        self.check_writable()?;
        let (reply, answer) = oneshot::channel();
        let request = Request { event, origin, reply };
        self.writer.send(Command::Write(Box::new(request))).await.map_err(|_| WriteError::Closed)?;
        answer.await.map_err(|_| WriteError::Closed)?
    }

    /// Asks the writer to forget at most `max` of the oldest revisions, and none from `before` on.
    pub(crate) async fn compact(&self, before: u64, max: usize) -> Result<(), WriteError> {
        self.check_writable()?;
        let (reply, answer) = oneshot::channel();
        let compact = Compact { before, max, reply };
        self.writer.send(Command::Compact(compact)).await.map_err(|_| WriteError::Closed)?;
        answer.await.map_err(|_| WriteError::Closed)?
    }

    /// The state of a damaged store is a part of the truth: nothing is decided on it.
    fn check_writable(&self) -> Result<(), WriteError> {
        read_only::check(self.store.as_ref()).map_err(|error| WriteError::Store(Arc::new(error)))
    }

    /// Ends the writer when it has written what waits.
    pub(crate) async fn stop_writer(&self) {
        // A writer that has ended already needs no telling.
        let _ = self.writer.send(Command::Stop).await;
    }

    /// Shows revisions that are durable, and the state that they come to: leases, drains and streams first, so that
    /// nobody who sees it is ahead of them.
    pub(crate) fn publish(&self, revisions: Vec<Arc<Revision>>, state: State) {
        let now = self.clock.now();
        for revision in &revisions {
            self.happenings.committed(revision, now);
            self.leases().committed(revision, now);
            self.drains().committed(revision, now);
            scheduler_core::session::unheard(revision).for_each(|node| self.sessions.end(node));
        }
        self.state.send_replace(Arc::new(state));
        self.drains_changed.notify_one();
        for revision in revisions {
            // Without readers there is nobody to tell.
            let _ = self.revisions.send(revision);
        }
    }

    /// Ends streams: the server stops.
    pub(crate) fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Resolves when the server stops.
    pub(crate) async fn closed(&self) {
        let mut closing = self.closing.subscribe();
        // The sender lives as long as `self`.
        let _ = closing.wait_for(|closing| *closing).await;
    }
}

/// The driver of deploys as the origin of an event.
pub(crate) fn deploy() -> Origin {
    Origin { changer: "deploy".to_owned(), message: String::new() }
}

/// The scheduler itself as the origin of an event.
pub(crate) fn scheduler() -> Origin {
    Origin { changer: "scheduler".to_owned(), message: String::new() }
}
