//! The server: its disk, and the process that runs on it until it is killed.
//!
//! What it decides is decided by `scheduler-core`; here its queue, its disk's pace and its streams are played.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand::{SeedableRng as _, rngs::StdRng};
use scheduler_core::{
    batch::{self, Outcome, Surroundings},
    change::Revision,
    cluster::Cluster,
    deploy::{Deploys, Order},
    drain::Drains,
    event::Event,
    lease::Leases,
    pod::{PodId, PodPhase},
    session::unheard,
    state::State,
    transition::{Context, Origin},
};

use crate::{
    Broken,
    clock::{Clock, Time, ms},
    network::{End, Packet, StreamId},
    shared::{ServerDue, Shared, What},
    store::{Disk, DiskError},
};

mod deploys;
mod lease;
mod reader;
mod restore;
mod session;

use lease::Holder;
use reader::ReaderSession;
use session::Session;

/// Long enough for a message that was lost twice.
pub(crate) const LEASE: Duration = Duration::from_secs(4);
const BATCH_MAX: usize = 64;
const RETRY: Duration = Duration::from_secs(1);
/// Revisions that a reader may be behind: few, so that some are.
const REVISIONS_KEPT: usize = 12;

pub(crate) struct Server {
    pub(crate) disk: Disk,
    pub(crate) clock: Clock,
    pub(crate) life: u64,
    pub(crate) process: Option<Process>,
    pub(crate) frozen_until: Time,
    /// What an operator has copied of the disk.
    pub(crate) backup: Option<Disk>,
    /// How often a backup was restored: the store's name.
    pub(crate) epoch: u64,
    /// Revisions that were acknowledged, with the operator's number.
    pub(crate) acknowledged: Vec<(u64, u64)>,
}

/// What dies with the process.
pub(crate) struct Process {
    /// The writer's.
    state: State,
    /// Everybody else's.
    pub(crate) shown: Arc<State>,
    leases: Leases,
    drains: Drains,
    deploys: Deploys,
    /// Moves of deploys that the writer is told one after the other.
    moves: VecDeque<Event>,
    queue: VecDeque<Request>,
    writing: Option<Writing>,
    failed: bool,
    sessions: BTreeMap<StreamId, Session>,
    /// The stream that speaks for a node.
    places: BTreeMap<String, StreamId>,
    readers: BTreeMap<StreamId, ReaderSession>,
    holders: BTreeMap<StreamId, Holder>,
    /// The stream that holds a node's lease.
    leases_held: BTreeMap<String, StreamId>,
    /// Findings that the writer is being told.
    telling_leases: usize,
    telling_drains: bool,
    drains_look: Option<Time>,
    rng: StdRng,
}

struct Request {
    event: Event,
    origin: Origin,
    then: Then,
}

/// Who waits for an answer.
enum Then {
    Greeted(StreamId),
    WrittenDown(StreamId, session::Writing),
    LeasesTold,
    Returned(StreamId),
    Left(StreamId),
    DrainsTold,
    DeployMoved,
    RestoreSettled,
    Operator(u64),
}

struct Writing {
    batch: Vec<Request>,
    outcomes: Vec<Outcome>,
    revisions: Vec<Revision>,
    is_durable: bool,
}

/// What came of a request: its revision, or why there is none.
enum Answer {
    Done(u64, bool),
    Refused(String),
    Store,
}

impl Server {
    pub(crate) fn new(cluster: Cluster, shared: &mut Shared) -> Server {
        let clock = Clock::new(&mut shared.rng);
        let disk = Disk::default();
        let mut server = Server {
            disk,
            clock,
            life: 0,
            process: None,
            frozen_until: Time::default(),
            backup: None,
            epoch: 0,
            acknowledged: vec![],
        };
        server.found(Event::ClusterCreated(cluster), shared);
        server
    }

    /// Brings something about before the simulation begins.
    pub(crate) fn found(&mut self, event: Event, shared: &mut Shared) {
        let mut state = self.disk.state().clone();
        let context =
            Context { wall: self.clock.wall(shared.now), rng: &mut shared.rng, is_watched: &|_| false };
        let mut surroundings = Surroundings { context, lease_runs: &|_| true };
        let origin = Origin { changer: "user:root".to_owned(), message: String::new() };
        let written = batch::write(&mut state, &[(&event, &origin)], &mut surroundings, |revisions| {
            self.disk.append(revisions);
            Ok::<(), DiskError>(())
        });
        written.expect("the disk takes it")[0].as_ref().expect("it is not refused");
    }

    pub(crate) fn start(&mut self, shared: &mut Shared) {
        if self.process.is_some() {
            return;
        }
        self.life += 1;
        self.clock.restart(shared.now);
        let now = self.clock.moment(shared.now);
        let state = State::load(self.disk.revision(), self.disk.state().values());
        let seed =
            if shared.is_broken(Broken::ForgetsAddresses) { 7 } else { rand::Rng::random(&mut shared.rng) };
        self.process = Some(Process {
            leases: Leases::resume(&state, LEASE, now),
            drains: Drains::resume(&state, now),
            deploys: Deploys::default(),
            moves: VecDeque::new(),
            shown: Arc::new(state.clone()),
            state,
            queue: VecDeque::new(),
            writing: None,
            failed: false,
            sessions: BTreeMap::new(),
            places: BTreeMap::new(),
            readers: BTreeMap::new(),
            holders: BTreeMap::new(),
            leases_held: BTreeMap::new(),
            telling_leases: 0,
            telling_drains: false,
            drains_look: None,
            rng: StdRng::seed_from_u64(seed),
        });
        shared.note(format!("server starts at revision {}", self.disk.revision()));
        self.plan(shared, ms(0), ServerDue::LookAtLeases);
        self.plan(shared, ms(0), ServerDue::LookAtDeploys);
        self.look_at_drains(shared);
        self.wait_for_leases(shared);
    }

    /// The process is killed, or the power fails. What was not on the disk is lost.
    pub(crate) fn crash(&mut self, power: bool, shared: &mut Shared) {
        let Some(process) = self.process.take() else { return };
        shared.note(format!("server {}", if power { "loses its power" } else { "is killed" }));
        for stream in process.sessions.keys().chain(process.readers.keys()).chain(process.holders.keys()) {
            if power {
                shared.vanish(*stream, End::Server)
            } else {
                shared.drop_stream(*stream, End::Server, false)
            }
        }
        let wait = shared.between(50, 8_000);
        shared.plan(wait, What::StartServer);
    }

    fn plan(&self, shared: &mut Shared, wait: Duration, due: ServerDue) {
        let wait = self.clock.real(wait);
        shared.plan(wait, What::Server(self.life, due));
    }

    pub(crate) fn due(&mut self, due: ServerDue, shared: &mut Shared) {
        if self.process.is_none() {
            return;
        }
        match due {
            ServerDue::Committed => self.committed(shared),
            ServerDue::Recover => self.recover(shared),
            ServerDue::LookAtLeases => self.look_at_leases(shared),
            ServerDue::LookAtDrains => {
                self.process_mut().drains_look = None;
                self.look_at_drains(shared);
            }
            ServerDue::LookAtDeploys => self.look_at_deploys(shared),
            ServerDue::SettleRestore => self.settle_restore(shared),
            ServerDue::TellDeploysOn => self.tell_deploys(shared),
            ServerDue::TellLeasesAgain => self.process_mut().telling_leases -= 1,
            ServerDue::TellDrainsAgain => {
                self.process_mut().telling_drains = false;
                self.look_at_drains(shared);
            }
            ServerDue::Tell(stream) => self.tell(stream, shared),
            ServerDue::WriteDown(stream) => self.write_down(stream, shared),
            ServerDue::TellReader(stream) => self.tell_reader(stream, shared),
            ServerDue::Bookmark(stream) => self.bookmark(stream, shared),
        }
    }

    fn process_mut(&mut self) -> &mut Process {
        self.process.as_mut().expect("the server runs")
    }

    pub(crate) fn receive(&mut self, stream: StreamId, packet: Packet, shared: &mut Shared) {
        if self.process.is_none() {
            return shared.drop_stream(stream, End::Server, false);
        }
        match packet {
            Packet::Hello(name, hello) => self.hear_hello(stream, name, hello, shared),
            Packet::Report(report) => self.hear_report(stream, report, shared),
            Packet::Subscribe { selector, epoch, from } => {
                self.subscribe(stream, selector, &epoch, from, shared)
            }
            Packet::Hold(node) => self.hold(stream, node),
            Packet::Renewal(renewal) => self.hear_renewal(stream, renewal, shared),
            Packet::Acknowledge(revision) => self.acknowledge(stream, revision, shared),
            Packet::Closed => self.hang_up(stream, true, shared),
            other => shared.wrong(format!("the server was sent {other:?}")),
        }
    }

    /// Ends a stream at the server's side.
    pub(crate) fn hang_up(&mut self, stream: StreamId, orderly: bool, shared: &mut Shared) {
        shared.drop_stream(stream, End::Server, orderly);
        let Some(process) = &mut self.process else { return };
        if let Some(session) = process.sessions.remove(&stream)
            && process.places.get(&session.node) == Some(&stream)
        {
            process.places.remove(&session.node);
        }
        self.let_go(stream, shared);
        let Some(process) = &mut self.process else { return };
        if let Some(reader) = process.readers.remove(&stream) {
            process.drains.unsubscribe(reader.subscriber);
            self.look_at_drains(shared);
        }
    }

    pub(crate) fn operate(&mut self, number: u64, event: Event, shared: &mut Shared) {
        let origin = Origin { changer: "user:op".to_owned(), message: format!("op {number}") };
        if let Event::DeployOrder(id, Order::Acknowledge) = &event {
            shared.acknowledged.insert(number, id.clone());
        }
        self.ask(Request { event, origin, then: Then::Operator(number) }, shared);
    }

    fn ask(&mut self, request: Request, shared: &mut Shared) {
        let Some(process) = &mut self.process else { return };
        process.queue.push_back(request);
        self.write(shared);
    }

    /// Begins the next batch, unless one is on its way to the disk.
    fn write(&mut self, shared: &mut Shared) {
        let Server { disk, clock, process, .. } = self;
        let Some(process) = process.as_mut().filter(|process| process.writing.is_none()) else { return };
        let waiting = process.queue.len().min(BATCH_MAX);
        if waiting == 0 {
            return;
        }
        let batch: Vec<Request> = process.queue.drain(..waiting).collect();
        let (now, wall) = (clock.moment(shared.now), clock.wall(shared.now));
        let Process { state, leases, drains, rng, failed, .. } = process;
        let is_watched = |pod: &_| drains.is_watched(pod, now);
        let lease_runs = |node: &str| leases.runs(node, now);
        let mut surroundings =
            Surroundings { context: Context { wall, rng, is_watched: &is_watched }, lease_runs: &lease_runs };
        if *failed {
            // What is on the disk is not known yet.
            batch.into_iter().for_each(|request| self.answer(request.then, Answer::Store, shared));
            return self.write(shared);
        }
        let events: Vec<_> = batch.iter().map(|request| (&request.event, &request.origin)).collect();
        let unwell = unwell(&events);
        let mut revisions = Vec::new();
        let outcomes = batch::write(state, &events, &mut surroundings, |new| {
            revisions = new.iter().map(|revision| deploys::damaged(revision, shared)).collect();
            shared.unwell.extend(new.iter().map(|revision| (revision.revision, unwell.clone())));
            commit(disk, failed, &revisions, shared)
        });
        match outcomes {
            Ok(outcomes) => self.written(Writing { batch, outcomes, revisions, is_durable: false }, shared),
            Err(_) => {
                self.plan(shared, RETRY, ServerDue::Recover);
                batch.into_iter().for_each(|request| self.answer(request.then, Answer::Store, shared));
                self.write(shared);
            }
        }
    }

    /// It reaches the disk at some time between now and when the disk says so.
    fn written(&mut self, mut writing: Writing, shared: &mut Shared) {
        let answers_now = shared.is_broken(Broken::AnswersBeforeDurable);
        if !answers_now && (writing.revisions.is_empty() || shared.chance(0.5)) {
            self.append(&writing.revisions, shared);
            writing.is_durable = true;
        }
        let slow = !writing.revisions.is_empty() && shared.fault(0.01);
        let wait = if slow { shared.between(300, 6_000) } else { shared.between(0, 6) };
        self.process_mut().writing = Some(writing);
        if answers_now {
            self.tell_all(shared);
        }
        shared.plan(wait, What::Server(self.life, ServerDue::Committed));
    }

    fn append(&mut self, revisions: &[Revision], shared: &mut Shared) {
        for revision in revisions {
            let what: String = revision.message.chars().take(60).collect();
            shared.note(format!("revision {} by {}: {what}", revision.revision, revision.changer));
        }
        shared.figures.revisions += revisions.len() as u64;
        if let Some(address) = self.disk.append(revisions) {
            shared.wrong(format!("{address} was given a second time"));
        }
    }

    fn committed(&mut self, shared: &mut Shared) {
        let Some(mut writing) = self.process_mut().writing.take() else { return };
        if !writing.is_durable {
            self.append(&writing.revisions, shared);
        }
        if !writing.batch.is_empty() {
            writing.is_durable = true;
            self.process_mut().writing = Some(writing);
            self.tell_all(shared);
            self.process_mut().writing = None;
            self.follows_from_the_log(shared);
        }
        self.write(shared);
    }

    /// The state is what the revisions alone make: what was refused, or had nothing to change, has changed nothing.
    fn follows_from_the_log(&self, shared: &mut Shared) {
        let Some(process) = self.process.as_ref().filter(|process| !process.failed) else { return };
        if process.state != *self.disk.state() && shared.options.broken.is_none() {
            shared.wrong("the server's state is not what is on its disk".to_owned());
        }
    }

    /// Shows what is durable and answers who asked for it.
    fn tell_all(&mut self, shared: &mut Shared) {
        let Some(writing) = &mut self.process_mut().writing else { return };
        let batch = std::mem::take(&mut writing.batch);
        let outcomes = std::mem::take(&mut writing.outcomes);
        let mut last = self.process_mut().shown.revision();
        for (request, outcome) in batch.into_iter().zip(outcomes) {
            let answer = match outcome {
                Ok(Some(revision)) => {
                    last = revision.revision;
                    self.publish(Arc::new(revision), shared);
                    Answer::Done(last, true)
                }
                Ok(None) => Answer::Done(last, false),
                Err(refusal) => Answer::Refused(refusal.to_string()),
            };
            self.answer(request.then, answer, shared);
        }
    }

    fn publish(&mut self, revision: Arc<Revision>, shared: &mut Shared) {
        let now = self.clock.moment(shared.now);
        let process = self.process_mut();
        process.leases.committed(&revision, now);
        process.drains.committed(&revision, now);
        Arc::make_mut(&mut process.shown).advance(&revision);
        let ended = unheard(&revision).filter_map(|node| process.places.get(node).copied());
        let ended: BTreeSet<_> = ended.collect();
        let ended = ended.into_iter().filter(|_| !shared.is_broken(Broken::KeepsStreamsOfTheLost));
        ended.collect::<Vec<_>>().into_iter().for_each(|stream| self.hang_up(stream, false, shared));
        let process = self.process_mut();
        let streams: Vec<_> = process.sessions.keys().copied().collect();
        let readers: Vec<_> = process.readers.keys().copied().collect();
        streams.into_iter().for_each(|stream| self.is_news(stream, &revision, shared));
        readers.into_iter().for_each(|stream| self.is_news_to_reader(stream, &revision, shared));
        self.look_at_drains(shared);
    }

    fn answer(&mut self, then: Then, answer: Answer, shared: &mut Shared) {
        match (then, answer) {
            (Then::Greeted(stream), Answer::Done(..)) => self.greeted(stream, shared),
            (Then::Greeted(stream), _) => self.hang_up(stream, false, shared),
            (Then::WrittenDown(stream, writing), answer) => {
                self.written_down(stream, writing, answer, shared)
            }
            (Then::LeasesTold, Answer::Store) => self.plan(shared, RETRY, ServerDue::TellLeasesAgain),
            (Then::LeasesTold, _) => self.process_mut().telling_leases -= 1,
            (Then::Left(stream), answer) => {
                self.hang_up(stream, matches!(answer, Answer::Done(..)), shared);
            }
            (Then::Returned(stream), _) => self.returned(stream),
            (Then::DrainsTold, Answer::Store) => self.plan(shared, RETRY, ServerDue::TellDrainsAgain),
            (Then::DrainsTold, _) => {
                self.process_mut().telling_drains = false;
                self.look_at_drains(shared);
            }
            (Then::DeployMoved, Answer::Store) => self.plan(shared, RETRY, ServerDue::TellDeploysOn),
            (Then::DeployMoved, _) => self.tell_deploys(shared),
            (Then::RestoreSettled, Answer::Store) => self.plan(shared, RETRY, ServerDue::SettleRestore),
            (Then::RestoreSettled, _) => {}
            (Then::Operator(number), Answer::Done(revision, true)) => {
                shared.figures.acknowledged += 1;
                self.acknowledged.push((revision, number));
            }
            (Then::Operator(_), _) => {}
        }
    }

    /// After a failed commit: takes over what reached the disk although it failed.
    fn recover(&mut self, shared: &mut Shared) {
        let Server { disk, process, .. } = self;
        let Some(process) = process.as_mut().filter(|process| process.failed) else { return };
        process.failed = false;
        let missed: Vec<Revision> = disk.log_after(process.state.revision()).cloned().collect();
        for revision in &missed {
            process.state.advance(revision);
        }
        missed.into_iter().for_each(|revision| self.publish(Arc::new(revision), shared));
        self.write(shared);
    }

    fn look_at_drains(&mut self, shared: &mut Shared) {
        let now = self.clock.moment(shared.now);
        let process = self.process_mut();
        if process.telling_drains {
            return;
        }
        let finished = process.drains.finished(now);
        if !finished.is_empty() {
            process.telling_drains = true;
            return self.ask(by_scheduler(Event::Drained(finished), Then::DrainsTold), shared);
        }
        let Some(moment) = process.drains.poll_timeout() else { return };
        let wait = self.clock.real(moment - now) + ms(1);
        let at = shared.now + wait;
        let process = self.process_mut();
        if process.drains_look.is_none_or(|planned| at < planned) {
            process.drains_look = Some(at);
            shared.plan(wait, What::Server(self.life, ServerDue::LookAtDrains));
        }
    }
}

/// Pods that are said not to run.
fn unwell(events: &[(&Event, &Origin)]) -> BTreeSet<PodId> {
    let reports = events.iter().filter_map(|(event, _)| match event {
        Event::PodReports(_, reports) => Some(reports),
        _ => None,
    });
    let unwell = reports.flatten().filter(|report| report.phase != PodPhase::Running);
    unwell.map(|report| report.id.clone()).collect()
}

fn by_scheduler(event: Event, then: Then) -> Request {
    Request { event, origin: Origin { changer: "scheduler".to_owned(), message: String::new() }, then }
}

/// The disk's word. One that fails may have written all the same.
fn commit(
    disk: &mut Disk,
    failed: &mut bool,
    revisions: &[Revision],
    shared: &mut Shared,
) -> Result<(), DiskError> {
    if *failed {
        return Err(DiskError::Full);
    }
    if !shared.is_broken(Broken::ForgetsAddresses) && !disk.takes(revisions) {
        return Err(DiskError::AddressUsed);
    }
    if shared.fault(0.004) {
        *failed = true;
        let reached = shared.chance(0.5);
        shared.note(format!(
            "a commit fails, and {} the disk",
            if reached { "reached" } else { "did not reach" }
        ));
        if reached {
            shared.figures.revisions += revisions.len() as u64;
            disk.append(revisions);
        }
        return Err(DiskError::Full);
    }
    Ok(())
}
