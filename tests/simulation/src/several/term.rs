//! What the server that leads has, from when it takes the lead until it loses it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use scheduler::{
    etcd::{Kv as _, pb},
    store::{Copy, EtcdStore, Store as _, StoreError},
};
use scheduler_core::{
    batch::{self, Outcome, Surroundings},
    change::Revision,
    endpoint::Selector,
    state::State,
    tenure::Tenure,
    time::{Moment, WallTime},
    transition::{Context, Origin},
    watch::{self, Begin, Message, Reader, Resume},
};

use super::{
    Ask,
    etcd::{LEADER, Link, Seat},
};
use crate::{Broken, shared::Shared};

/// Revisions that a watcher may be behind: few, so that some are.
const REVISIONS_KEPT: usize = 12;
const LOG_MAX: usize = 100_000;
/// The most revisions that a compaction leaves.
const LOG_KEPT_MAX: u64 = 20;

pub(super) struct Term {
    store: EtcdStore,
    pub(super) state: State,
    pub(super) fence: i64,
    lease: i64,
    tenure: Tenure,
    /// When it keeps its lease alive next.
    next: Moment,
    failed: bool,
    pub(super) compacts: bool,
    sessions: BTreeMap<usize, Session>,
    rng: StdRng,
}

/// One watcher.
struct Session {
    reader: Reader,
    /// Said at the beginning.
    waiting: Vec<Message>,
    backlog: VecDeque<Arc<Revision>>,
    has_lagged: bool,
}

impl Term {
    /// Takes the store over; none when it cannot.
    pub(super) fn begin(
        link: &Link,
        fence: i64,
        lease: i64,
        tenure: Tenure,
        copy: Option<Copy>,
        shared: &mut Shared,
    ) -> Option<Term> {
        let store = EtcdStore::open(link.clone(), "/p", "e", Seat { fence }).ok()?;
        let kept = match copy {
            Some(copy) => store.go_on_from(copy).ok()?,
            None => None,
        };
        shared.figures.copies += u64::from(kept.is_some());
        let state = match kept {
            Some(state) => state,
            None => {
                let (revision, values) = store.load().ok()?;
                State::load(revision, values)
            }
        };
        let state = if shared.is_broken(Broken::BeginsAnew) { State::default() } else { state };
        let durable = link.etcd().states.last().cloned().unwrap_or_default();
        if state != durable && shared.options.broken.is_none() {
            shared.wrong(format!("at {fence} a server leads with another state than etcd's"));
        }
        let rng = StdRng::seed_from_u64(shared.rng.random());
        let (next, sessions) = (Moment::default(), BTreeMap::new());
        Some(Term { store, state, fence, lease, tenure, next, failed: false, compacts: false, sessions, rng })
    }

    pub(super) fn has(&self, watcher: usize) -> bool {
        self.sessions.contains_key(&watcher)
    }

    /// Brings about what is asked for, as the writer does.
    pub(super) fn write(&mut self, asks: Vec<Ask>, link: &Link, wall: WallTime, shared: &mut Shared) {
        if self.failed {
            self.recover(link, shared);
        }
        if !asks.is_empty() && !self.failed {
            self.write_batch(asks, link, wall, shared);
        }
        if std::mem::take(&mut self.compacts) && !self.failed {
            let before = self.state.revision().saturating_sub(shared.rng.random_range(0..=LOG_KEPT_MAX));
            self.failed = self.store.compact(before, LOG_MAX).is_err();
        }
    }

    fn write_batch(&mut self, asks: Vec<Ask>, link: &Link, wall: WallTime, shared: &mut Shared) {
        let origin = |ask: &Ask| Origin {
            changer: ask.changer.clone(),
            message: ask.number.map(|number| format!("op {number}")).unwrap_or_default(),
        };
        let origins: Vec<Origin> = asks.iter().map(origin).collect();
        let events: Vec<_> = asks.iter().map(|ask| &ask.event).zip(&origins).collect();
        let Term { store, state, rng, .. } = self;
        let context = Context { wall, rng, is_watched: &|_| true };
        let mut surroundings = Surroundings { context, lease_runs: &|_| false };
        let answers_always = shared.is_broken(Broken::AnswersBeforeDurable);
        let mut kept: Vec<Outcome> = Vec::new();
        let written = batch::write(state, &events, &mut surroundings, |revisions| {
            link.etcd().attempts.insert(link.server, revisions.to_vec());
            kept = revisions.iter().cloned().map(|revision| Ok(Some(revision))).collect();
            let result = store.commit(revisions);
            link.etcd().attempts.remove(&link.server);
            result
        });
        match written {
            Ok(outcomes) => self.tell(&asks, &outcomes, link, shared),
            Err(error) => {
                shared.note(format!("server {} cannot commit: {error}", link.server));
                self.failed = true;
                if answers_always {
                    self.tell(&asks, &kept, link, shared);
                }
            }
        }
    }

    fn tell(&mut self, asks: &[Ask], outcomes: &[Outcome], link: &Link, shared: &mut Shared) {
        for (ask, outcome) in asks.iter().zip(outcomes) {
            let Ok(Some(revision)) = outcome else { continue };
            shared.note(format!("revision {} by {} at {}", revision.revision, revision.changer, self.fence));
            self.publish(&Arc::new(revision.clone()));
            if let Some(number) = ask.number {
                shared.figures.acknowledged += 1;
                if let Err(what) = link.etcd().holds(revision.revision, number) {
                    shared.wrong(what);
                }
            }
        }
    }

    fn publish(&mut self, revision: &Arc<Revision>) {
        for session in self.sessions.values_mut() {
            session.backlog.push_back(revision.clone());
            if session.backlog.len() > REVISIONS_KEPT {
                session.backlog.pop_front();
                session.has_lagged = true;
            }
        }
    }

    /// After a failed commit: takes over what etcd holds.
    fn recover(&mut self, link: &Link, shared: &mut Shared) {
        let missed = self.store.recover().and_then(|()| {
            let (stored, acknowledged) = (self.store.load()?.0, self.state.revision());
            if stored < acknowledged {
                return Err(StoreError::GoneBack { stored, acknowledged });
            }
            self.store.log_after(acknowledged, LOG_MAX)
        });
        match missed {
            Ok(missed) => {
                self.failed = false;
                for revision in missed {
                    self.state.advance(&revision);
                    self.publish(&Arc::new(revision));
                }
            }
            Err(error @ StoreError::GoneBack { .. }) => shared.wrong(error.to_string()),
            Err(error) => shared.note(format!("server {} cannot recover: {error}", link.server)),
        }
    }

    /// Keeps the lease alive; false when the lead is lost, as far as this server can tell.
    pub(super) fn keep(&mut self, link: &Link, now: Moment, shared: &mut Shared) -> bool {
        if self.tenure.left(now).is_none() {
            return false;
        }
        if now >= self.next && link.etcd().reaches(link.server) {
            let length = link.etcd().keep_alive(self.lease);
            if length.is_zero() {
                return false;
            }
            self.tenure.kept(now, length, now);
            self.next = now + Tenure::pause(length);
        }
        // Its watch of the leader's key says so, sooner or later.
        !shared.rng.random_bool(0.2) || !self.is_replaced(link)
    }

    fn is_replaced(&self, link: &Link) -> bool {
        let is_other = |found: &Option<pb::KeyValue>| {
            found.as_ref().is_none_or(|found| found.create_revision != self.fence)
        };
        link.get(LEADER).as_ref().is_ok_and(is_other)
    }

    pub(super) fn subscribe(
        &mut self,
        watcher: usize,
        selector: Selector,
        from: Option<u64>,
        shared: &mut Shared,
    ) -> Option<i64> {
        let mut reader = Reader::new(selector);
        let resume = from.map(|from| Resume { same_store: true, from });
        let oldest = self.store.oldest().ok()?;
        let waiting = match watch::begin(resume, oldest, self.state.revision()) {
            Begin::Snapshot | Begin::Compacted => vec![reader.snapshot(&self.state)],
            Begin::Replay(from) => {
                let late = u64::from(shared.is_broken(Broken::ResumesTooLate));
                reader.skip_to(&self.state);
                let log = self.store.log_after(from + late, LOG_MAX).ok()?;
                let told = log.iter().filter_map(|entry| reader.replay(entry));
                told.chain([reader.bookmark()]).collect()
            }
        };
        let session = Session { reader, waiting, backlog: VecDeque::new(), has_lagged: false };
        self.sessions.insert(watcher, session);
        Some(self.fence)
    }

    /// What a watcher is told next: all that was said at the beginning, or some of what came since.
    pub(super) fn take(&mut self, watcher: usize, shared: &mut Shared) -> Vec<Message> {
        let Term { sessions, state, failed, .. } = self;
        let Some(session) = sessions.get_mut(&watcher).filter(|_| !*failed) else { return Vec::new() };
        let mut messages = std::mem::take(&mut session.waiting);
        if std::mem::take(&mut session.has_lagged) {
            session.backlog.clear();
            shared.figures.lagged += 1;
            messages.extend(session.reader.lagged(state));
            return messages;
        }
        for _ in 0..shared.rng.random_range(0..8) {
            let Some(revision) = session.backlog.pop_front() else { break };
            messages.extend(session.reader.committed(&revision, || Arc::new(state.clone())));
        }
        messages
    }
}
