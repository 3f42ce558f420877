//! The one thread that changes the state: event in, revision to the disk, then to everybody.
//!
//! Events that wait are committed together, each as its own revision, with one sync of the disk. When that
//! fails, the state in memory is taken back to what it was, the callers are told, and the store is opened
//! anew before the next commit.

use std::{
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rand::{SeedableRng as _, rngs::StdRng};
use scheduler_core::{
    batch::{self, CommitError, Outcome, Surroundings},
    change::{Key, Revision, Value},
    event::{Event, Refusal},
    state::State,
    transition::{Context, Origin},
};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, error, info, warn};

use crate::{hub::Hub, store::StoreError};

/// Events that may wait for the writer; a caller beyond them waits before it is let in.
pub(crate) const QUEUE_MAX: usize = 1024;
/// Events that share one sync of the disk.
const BATCH_MAX: usize = 64;
/// How long a failed store is left alone.
pub(crate) const RECOVER_INTERVAL: Duration = Duration::from_secs(1);
/// Revisions read at a time while catching up.
const CATCH_UP_CHUNK: usize = 256;

/// An event, and where to tell what came of it.
pub(crate) struct Request {
    pub(crate) event: Event,
    pub(crate) origin: Origin,
    pub(crate) reply: oneshot::Sender<Result<Committed, WriteError>>,
}

/// At most `max` of the oldest revisions, and none from `before` on, are to be forgotten.
pub(crate) struct Compact {
    pub(crate) before: u64,
    pub(crate) max: usize,
    pub(crate) reply: oneshot::Sender<Result<(), WriteError>>,
}

/// What the writer is told.
pub(crate) enum Command {
    Write(Box<Request>),
    /// A part of the log is to be forgotten.
    Compact(Compact),
    /// Everything before it is written, and nothing after it.
    Stop,
}

/// What came of an event.
#[derive(Clone, Debug)]
pub(crate) struct Committed {
    /// The number of its revision, or of the last one when there was nothing to change.
    pub(crate) revision: u64,
    /// `None` when there was nothing to change.
    pub(crate) made: Option<Arc<Revision>>,
}

impl Committed {
    /// Whether there was something to change.
    pub(crate) fn changed(&self) -> bool {
        self.made.is_some()
    }

    /// The version of this job that it made.
    pub(crate) fn version_of(&self, job: &str) -> Option<u32> {
        let changes = &self.made.as_ref()?.changes;
        let key = Key::Job(job.to_owned());
        changes.iter().find(|change| change.key == key).and_then(|change| match &change.new {
            Some(Value::Job(record)) => Some(record.version),
            _ => None,
        })
    }
}

/// Why an event was not brought about.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Store(Arc<StoreError>),
    #[error("the server is stopping")]
    Closed,
}

/// Starts the thread. `_ends` is dropped when it ends, also when it panics.
pub(crate) fn start(
    hub: Arc<Hub>,
    state: State,
    queue: mpsc::Receiver<Command>,
    _ends: oneshot::Sender<()>,
) -> std::io::Result<JoinHandle<()>> {
    let rng = StdRng::from_rng(&mut rand::rng());
    let mut writer = Writer { hub, state, rng, failed: None };
    thread::Builder::new().name("writer".to_owned()).spawn(move || {
        let _ends = _ends;
        writer.run(queue);
    })
}

struct Writer {
    hub: Arc<Hub>,
    state: State,
    rng: StdRng,
    /// Why the store takes nothing, and when that was last looked at.
    failed: Option<(Arc<StoreError>, Instant)>,
}

impl CommitError for StoreError {
    fn is_address_used(&self) -> bool {
        matches!(self, StoreError::AddressUsed(_))
    }
}

impl Writer {
    fn run(&mut self, mut queue: mpsc::Receiver<Command>) {
        while let Some(first) = queue.blocking_recv() {
            let (mut batch, mut next) = (Vec::new(), Some(first));
            while let Some(Command::Write(request)) = next {
                batch.push(*request);
                next = if batch.len() < BATCH_MAX { queue.try_recv().ok() } else { None };
            }
            if !batch.is_empty() {
                self.write(batch);
            }
            match next {
                Some(Command::Stop) => return,
                Some(Command::Compact(compact)) => self.compact(compact),
                Some(Command::Write(_)) | None => {}
            }
            self.hub.say_writes_fail(self.failed.as_ref().map(|(error, _)| error.clone()));
        }
    }

    /// What fails here fails the store, as a commit does: the next one finds out.
    fn compact(&mut self, compact: Compact) {
        let Compact { before, max, reply } = compact;
        self.recover();
        let result = match &self.failed {
            Some((error, _)) => Err(error.clone()),
            None => self.hub.store.compact(before, max).map_err(|error| {
                let error = Arc::new(error);
                error!(error = %chain(&error), "forgetting a part of the log failed");
                self.failed = Some((error.clone(), Instant::now()));
                error
            }),
        };
        // A caller that has gone needs no answer.
        let _ = reply.send(result.map_err(WriteError::Store));
    }

    fn write(&mut self, batch: Vec<Request>) {
        self.recover();
        // What the store holds is not known: what seems to change nothing may be what puts the last word right.
        let outcomes = match &self.failed {
            Some((error, _)) => Err(error.clone()),
            None => self.bring_about(&batch),
        };
        match outcomes {
            Ok(outcomes) => self.tell(batch, outcomes),
            Err(error) => {
                for request in batch {
                    // A caller that has gone needs no answer.
                    let _ = request.reply.send(Err(WriteError::Store(error.clone())));
                }
            }
        }
    }

    fn bring_about(&mut self, batch: &[Request]) -> Result<Vec<Outcome>, Arc<StoreError>> {
        let Writer { hub, state, rng, failed } = self;
        let events: Vec<_> = batch.iter().map(|request| (&request.event, &request.origin)).collect();
        let is_watched = |pod: &_| hub.drains().is_watched(pod, hub.clock.now());
        let lease_runs = |node: &str| hub.leases().runs(node, hub.clock.now());
        let context = Context { wall: hub.clock.wall(), rng, is_watched: &is_watched };
        let mut surroundings = Surroundings { context, lease_runs: &lease_runs };
        batch::write(state, &events, &mut surroundings, |revisions| commit(hub, failed, revisions))
    }

    fn tell(&self, batch: Vec<Request>, outcomes: Vec<Outcome>) {
        let mut last = self.hub.state().revision();
        let (mut answers, mut revisions) = (Vec::new(), Vec::new());
        for (request, outcome) in batch.into_iter().zip(outcomes) {
            let answer = outcome.map(|revision| {
                let made = revision.map(Arc::new);
                if let Some(revision) = &made {
                    log(&request.event, revision);
                    last = revision.revision;
                    revisions.push(revision.clone());
                }
                Committed { revision: last, made }
            });
            answers.push((request.reply, answer.map_err(WriteError::from)));
        }
        if !revisions.is_empty() {
            self.hub.publish(revisions, self.state.clone());
        }
        for (reply, answer) in answers {
            // A caller that has gone needs no answer.
            let _ = reply.send(answer);
        }
    }

    /// After a failed commit: finds out what the store holds. A revision that reached it although the
    /// commit failed is taken over; one that was acknowledged and is missing is never passed over.
    fn recover(&mut self) {
        let Some((_, looked)) = &self.failed else { return };
        if looked.elapsed() < RECOVER_INTERVAL {
            return;
        }
        match self.hub.store.recover().and_then(|()| self.catch_up()) {
            Ok(()) => {
                warn!("the store takes commits again");
                self.failed = None;
            }
            Err(error) => self.failed = Some((Arc::new(error), Instant::now())),
        }
    }

    fn catch_up(&mut self) -> Result<(), StoreError> {
        let stored = self.hub.store.load()?.0;
        if stored < self.state.revision() {
            return Err(StoreError::GoneBack { stored, acknowledged: self.state.revision() });
        }
        while self.state.revision() < stored {
            for revision in self.hub.store.log_after(self.state.revision(), CATCH_UP_CHUNK)? {
                self.state.advance(&revision);
                self.hub.publish(vec![Arc::new(revision)], self.state.clone());
            }
        }
        Ok(())
    }
}

fn commit(
    hub: &Hub,
    failed: &mut Option<(Arc<StoreError>, Instant)>,
    revisions: &[Revision],
) -> Result<(), Arc<StoreError>> {
    if let Some((error, _)) = failed {
        return Err(error.clone());
    }
    hub.store.commit(revisions).map_err(|error| {
        let error = Arc::new(error);
        if !error.is_address_used() {
            error!(error = %chain(&error), "a commit failed");
            *failed = Some((error.clone(), Instant::now()));
        }
        error
    })
}

/// What an operator did or would notice, and apart from it what pods do all day.
fn log(event: &Event, revision: &Revision) {
    let (number, changer, message) = (revision.revision, &revision.changer, &revision.message);
    match event {
        Event::PodReports(..) | Event::Drained(_) => debug!(revision = number, %changer, "{message}"),
        _ => info!(revision = number, %changer, "{message}"),
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
pub(crate) mod tests;
