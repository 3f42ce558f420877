//! The agent's one loop: what the server, the kernel, the pods and root say in, reconciliation out.
//!
//! Everything that is decided is decided in pure modules ([`crate::assignment`], [`crate::roster`],
//! [`crate::pod_state`], [`crate::desired`]); here it is put in order: an assignment is durable before it is acted on, a pod's network
//! is complete before its supervisor starts, and its supervisor is gone before its network goes, but for an
//! address that turns out to be another machine's: that goes at once.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use dataplane::{
    ApplyError, Changes, Dataplane, Op, Pace, Reachability, Reconciled, Swept, Trace, Traces, UplinkInfo,
    announce::{Announcer, Conflict},
    plan, plan_teardown, repairs,
};
use dataplane_core::{Action as Operation, Desired, Mac};
use hextet_api::v1;
use hextet_lifecycle::{Owner, pod::TASKS};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout_at},
};
use tracing::{debug, error, info, warn};

use crate::{
    assignment::{self, Assignment},
    attach::{FromServer, Hello},
    backoff::Backoff,
    behind::Behind,
    config::NodePaths,
    conflict::{Conflicts, Standing},
    desired::{Backends, Underlay, desired},
    events::Events,
    explain,
    farewell::{LEAVE_MAX, TOLD, untold},
    hardware::hardware,
    identity::Identity,
    keeper::News,
    lease::Hold,
    local::{Answer, Call, Request},
    log_sender::LogSender,
    lost_peers::LostPeers,
    pod_state::{Action, Event, Failure, Report},
    pods::{Order, Pods},
    port_log::{PortLog, Reading},
    refusal::{Deleted, Refused, TakenForCopy},
    reports::Reports,
    roster::{Duty, Pending, Roster},
    scripts::ScriptNews,
    store::{Settings, Store},
    teardown,
    view::{NodeView, PodView},
};

/// However quiet the kernel is, it is looked at this often.
const AUDIT_PERIOD: Duration = Duration::from_secs(30);
const SWEEP_PERIOD: Duration = Duration::from_secs(10);
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// How many changes of the kernel are answered at once while it cannot be brought to what is wanted. They may be
/// what was waited for, such as the uplink that comes back, or nothing but the traces of the last attempt.
const HOPES_AT_ONCE: u32 = 8;
/// How often they are answered when they do not end.
const HOPES_INTERVAL: Duration = Duration::from_secs(2);
/// How long a node that boots waits for the server's word, before it starts what it was told last.
const BOOT_HEARING_MAX: Duration = Duration::from_millis(1500);
/// Operations of one reconciliation that are logged one by one.
const OPS_LOGGED_MAX: usize = 30;

/// Which device leads to the other nodes, and under which address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct UplinkChoice {
    pub(crate) device: Option<String>,
    pub(crate) address: Option<Ipv6Addr>,
}

/// What the agent is made of.
pub(crate) struct Agent {
    pub(crate) paths: NodePaths,
    pub(crate) identity: Identity,
    pub(crate) store: Arc<Store>,
    pub(crate) dataplane: Dataplane,
    pub(crate) announcer: Announcer,
    pub(crate) conflicts: Conflicts,
    pub(crate) lost_peers: LostPeers,
    pub(crate) backends: Backends,
    pub(crate) uplink: UplinkChoice,
    pub(crate) roster: Roster,
    pub(crate) behind: Behind,
    /// The origin of the roster's time.
    pub(crate) started: Instant,
    pub(crate) pods: Pods,
    pub(crate) hello: watch::Sender<Hello>,
    pub(crate) lease: Arc<Hold>,
    pub(crate) reports: Reports,
    pub(crate) logs: LogSender,
    pub(crate) schedule: Schedule,
    pub(crate) underlay: Option<Underlay>,
    pub(crate) ports: PortLog,
    /// New flows that were refused so far, by the pod's private address.
    pub(crate) refused: BTreeMap<Ipv4Addr, u32>,
    /// What the kernel held when it last was as it should be.
    pub(crate) settled: Option<Desired>,
    /// Who changed what in the kernel.
    pub(crate) traces: Traces,
    pub(crate) events: Events,
    /// The server serves another machine under this node's name.
    pub(crate) taken_for_copy: Option<Refused>,
    /// Somebody deleted the node.
    pub(crate) deleted: Option<Deleted>,
    /// It said so before anything was started here: nothing is, until it says otherwise.
    pub(crate) is_held: bool,
    /// No pod ran when it started, and the server has said nothing yet of what is to run.
    pub(crate) is_alone: bool,
}

/// What could not be made durable.
struct Lost {
    pending: Pending,
    why: String,
}

/// What the agent listens to.
pub(crate) struct Inbox {
    pub(crate) server: mpsc::Receiver<FromServer>,
    pub(crate) keepers: mpsc::Receiver<(String, News)>,
    pub(crate) calls: mpsc::Receiver<Call>,
    pub(crate) conflicts: mpsc::Receiver<Conflict>,
    pub(crate) changes: Option<Changes>,
}

/// When to look at the kernel next.
#[derive(Debug)]
pub(crate) struct Schedule {
    due: Option<Instant>,
    /// While it fails, the audit does not make it sooner.
    not_before: Option<Instant>,
    backoff: Backoff,
    hopes: Pace,
}

impl Schedule {
    pub(crate) fn new() -> Schedule {
        Schedule {
            due: Some(Instant::now()),
            not_before: None,
            backoff: Backoff::new(RETRY_FIRST, RETRY_MAX),
            hopes: Pace::new(HOPES_AT_ONCE, HOPES_INTERVAL),
        }
    }

    /// Something that the node wants has changed.
    fn now(&mut self) {
        self.due = Some(Instant::now());
    }

    /// Something in the kernel has changed: while it fails, that may be what it waits for.
    fn changed(&mut self) {
        let is_failing = self.not_before.is_some();
        if is_failing && !self.hopes.take(Instant::now()) { self.soon() } else { self.now() }
    }

    /// Something in the kernel may have changed.
    fn soon(&mut self) {
        let earliest = self.not_before.unwrap_or_else(Instant::now);
        self.due = Some(self.due.map_or(earliest, |due| due.min(earliest)));
    }

    fn begin(&mut self) {
        self.due = None;
    }

    fn succeeded(&mut self) {
        self.not_before = None;
        self.backoff.reset();
    }

    fn failed(&mut self) -> Duration {
        let wait = self.backoff.next(&mut rand::rng());
        self.not_before = Some(Instant::now() + wait);
        self.soon();
        wait
    }

    async fn wait(due: Option<Instant>) {
        match due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
    }
}

impl Agent {
    /// Takes over what the store says is to run here, and ends what it does not know.
    pub(crate) async fn boot(&mut self, inbox: &mut Inbox) {
        self.pods.clean_up(self.roster.assignment()).await;
        self.lease.follow(self.roster.assignment().term_of_singletons());
        self.is_alone = !self.pods.is_any_up(self.roster.assignment());
        // Without an uplink there is nobody to hear.
        if self.pods.is_any_down(self.roster.assignment()) && self.refresh_underlay().await.is_ok() {
            self.hear_what_was_replaced(inbox).await;
        }
        if self.is_held {
            warn!("no pod is started: the server serves another machine under this node's name");
            return;
        }
        self.begin().await;
    }

    /// Starts what is to run here.
    async fn begin(&mut self) {
        self.is_held = false;
        self.follow_lost_peers();
        let pods = &self.pods;
        let duties = self.roster.boot(|pod| pods.is_supervised(pod), |pod, hook| pods.was_hooked(pod, hook));
        self.fulfil(duties).await;
        self.reconcile().await;
    }

    /// Pods that were replaced while the node was away are not started again: the server's first word is waited for.
    async fn hear_what_was_replaced(&mut self, inbox: &mut Inbox) {
        let end = Instant::now() + BOOT_HEARING_MAX;
        while let Ok(Some(message)) = timeout_at(end, inbox.server.recv()).await {
            let FromServer::Assignment(message) = message else {
                self.hear_server(message).await;
                self.is_held = self.taken_for_copy.is_some();
                if self.is_held || self.deleted.is_some() {
                    return;
                }
                continue;
            };
            (self.taken_for_copy, self.deleted, self.is_alone) = (None, None, false);
            self.take_over(message).await;
            return;
        }
    }

    /// Runs until `shutdown`, or until root takes the node down.
    pub(crate) async fn run(mut self, mut inbox: Inbox, shutdown: impl Future) -> Result<()> {
        let mut audit = ticks(AUDIT_PERIOD);
        let mut sweep = ticks(SWEEP_PERIOD);
        tokio::pin!(shutdown);
        loop {
            if self.must_give_up() {
                return self.give_up(&mut inbox).await;
            }
            let due = self.schedule.due;
            let ask_due = self.conflicts.next();
            let lost_due = self.lost_peers.next();
            let step_due = self.roster.due().map(|due| self.started + due);
            let held_until = self.taken_for_copy.as_ref().filter(|_| self.is_held).and_then(Refused::goes_on);
            let room = self.reports.room(!self.roster.news().is_empty());
            tokio::select! {
                _ = &mut shutdown => {
                    info!("the agent ends; pods, routes and BPF programs stay and carry traffic");
                    return Ok(());
                }
                Some(message) = inbox.server.recv() => self.hear_server(message).await,
                Some((pod, news)) = inbox.keepers.recv() => self.hear_keeper(&pod, news).await,
                Some((request, answer)) = inbox.calls.recv() => {
                    if self.hear_root(request, answer, &mut inbox).await {
                        return Ok(());
                    }
                }
                Some(conflict) = inbox.conflicts.recv() => self.hear_conflict(conflict).await,
                () = Schedule::wait(held_until) => self.go_on_without_the_server().await,
                () = Schedule::wait(step_due) => self.advance().await,
                () = Schedule::wait(ask_due) => self.ask_for_addresses(),
                () = Schedule::wait(lost_due) => self.look_after_lost_peers().await,
                () = Schedule::wait(self.behind.next()) => self.ask_for_everything(),
                () = changed(&mut inbox.changes) => self.schedule.changed(),
                () = Schedule::wait(due) => self.reconcile().await,
                permit = room => drop(permit.send(self.roster.take_news())),
                _ = audit.tick() => self.schedule.soon(),
                _ = sweep.tick() => self.sweep(),
            }
        }
    }

    /// Who is lost by the server's word. What ends or begins with it changes routes.
    fn follow_lost_peers(&mut self) {
        let before = self.lost_peers.silent();
        for name in self.lost_peers.follow(&self.roster.assignment().peers, Instant::now()) {
            info!(name, "a peer is lost: asking whether it is there");
        }
        let now = self.lost_peers.silent();
        for name in before.difference(&now).filter(|name| self.roster.assignment().peers.contains_key(*name))
        {
            self.events.happened(format!("node {name} reports again: its route is back"), None);
        }
        if now != before {
            self.schedule.now();
        }
        self.doubt_pods_of_the_dead();
    }

    async fn hear_server(&mut self, message: FromServer) {
        match message {
            FromServer::Attached { reports, channel } => {
                self.reports.attached(reports, channel);
                self.roster.attached();
                // The server may not have heard of these.
                let now = Instant::now();
                let taken =
                    self.roster.assignment().pods.iter().filter(|(_, record)| record.taken_by.is_some());
                let pods = taken.map(|(pod, _)| pod.clone()).filter(|pod| self.conflicts.may_ask(pod, now));
                pods.collect::<Vec<_>>().iter().for_each(|pod| self.roster.ask_for_address(pod));
            }
            FromServer::Renewed { channel } => self.reports.use_channel(channel),
            FromServer::Detached { .. } => {
                self.reports.detached();
                self.roster.detached();
            }
            FromServer::Assignment(assignment) => {
                (self.taken_for_copy, self.deleted, self.is_alone) = (None, None, false);
                self.assign(assignment).await;
            }
            FromServer::Refused(copy) => self.hear_refusal(copy),
            FromServer::Deleted(deleted) => self.hear_deleted(deleted).await,
            FromServer::DescribePod(request) => self.describe(request).await,
            FromServer::ReadLogs(request) => {
                if let Some(channel) = self.reports.channel() {
                    self.logs.start(channel, &self.paths, self.roster.assignment(), request);
                }
            }
        }
    }

    fn hear_refusal(&mut self, copy: TakenForCopy) {
        if self.taken_for_copy.is_none() {
            self.events.happened(format!("the server refuses this machine: {}", copy.why), None);
        }
        self.taken_for_copy = Some(Refused::again(self.taken_for_copy.take(), copy, Instant::now()));
    }

    /// Somebody deleted this node: others run its pods by now. To it that is an assignment of nothing, which it keeps, so
    /// that it starts nothing either when it boots where it reaches no server.
    async fn hear_deleted(&mut self, deleted: Deleted) {
        if self.deleted.is_none() {
            let pods = self.roster.assignment().pods.len();
            warn!(pods, "{}", deleted.advice());
            self.events.happened(deleted.advice(), None);
        }
        (self.deleted, self.taken_for_copy) = (Some(deleted), None);
        let Assignment { head, peers, pods } = self.roster.assignment();
        let is_empty = peers.is_empty() && pods.values().all(|pod| pod.removing);
        let nothing = v1::Assignment {
            epoch: head.epoch.clone(),
            revision: head.revision,
            term: head.term,
            full: true,
            ..v1::Assignment::default()
        };
        if !is_empty || self.is_held {
            self.assign(nothing).await;
        }
    }

    /// Whether what runs here was started by this agent without the server's word, and the server says that the node's
    /// pods run elsewhere.
    fn must_give_up(&self) -> bool {
        self.is_alone && !self.is_held && self.taken_for_copy.as_ref().is_some_and(Refused::is_sure)
    }

    /// Ends the pods of a copy that has booted where it heard of no server.
    async fn give_up(&mut self, inbox: &mut Inbox) -> Result<()> {
        for line in self.take_down(inbox).await? {
            info!("{line}");
        }
        let why = self.taken_for_copy.as_ref().map_or("", |refused| refused.why.as_str());
        bail!("what was started here without a server is ended: {why}")
    }

    /// The server refused this machine for the time of a lease at most, and is not there any more.
    async fn go_on_without_the_server(&mut self) {
        warn!("the server says nothing any more: what it said last is started");
        self.taken_for_copy = None;
        self.begin().await;
    }

    /// Makes the server's word durable, then acts on it.
    async fn assign(&mut self, message: v1::Assignment) {
        if self.is_held {
            if self.take_over(message).await.is_some() {
                self.begin().await;
            }
            return;
        }
        let Some(duties) = self.take_over(message).await else { return };
        self.follow_lost_peers();
        self.fulfil(duties).await;
    }

    /// Makes the server's word durable; what there is to do then.
    async fn take_over(&mut self, message: v1::Assignment) -> Option<Vec<Duty>> {
        if !self.behind.can_follow(message.full) {
            debug!(revision = message.revision, "it goes on from an assignment that is lost");
            if !message.removed_pods.is_empty() {
                self.behind.hurry(Instant::now());
            }
            return None;
        }
        let epoch = &self.roster.assignment().head.epoch;
        if !epoch.is_empty() && message.epoch != *epoch {
            warn!(epoch = message.epoch, "the server has another store than before; its word is followed");
        }
        self.advance().await;
        let (pending, complaints) = self.roster.told(message);
        for complaint in &complaints {
            warn!(complaint, "a part of the assignment is not followed");
        }
        match self.keep(pending).await {
            Ok(duties) => {
                self.behind.kept();
                Some(duties)
            }
            Err(lost) => {
                self.behind.lost(Instant::now(), &mut rand::rng());
                self.follow_ends(lost).await
            }
        }
    }

    /// The first assignment of a stream is whole.
    fn ask_for_everything(&mut self) {
        self.behind.asked();
        self.hello.send_modify(|hello| hello.resets += 1);
    }

    /// Peers whose lease has ended are asked whether they are there. One that does not answer is dead, as far as this
    /// node can tell, and its route ends: what is sent to it is unreachable at once.
    async fn look_after_lost_peers(&mut self) {
        let due = self.lost_peers.due(Instant::now(), &mut rand::rng());
        let Some(underlay) = &self.underlay else { return };
        for (name, address) in &due.ask {
            if let Err(error) = self.dataplane.probe_neighbour(&underlay.device, *address).await {
                debug!(name, error = chain(&error), "cannot ask");
            }
        }
        let addresses: Vec<_> = due.look.iter().map(|(_, address)| *address).collect();
        if addresses.is_empty() {
            return;
        }
        let known = match self.dataplane.reachability(&underlay.device, &addresses).await {
            Ok(Some(known)) => known,
            Ok(None) => return self.lost_peers.without_link(Instant::now()),
            Err(error) => {
                return debug!(error = chain(&error), "cannot look whether lost peers have answered");
            }
        };
        for ((name, address), reachability) in due.look.iter().zip(known) {
            if self.lost_peers.heard(name, reachability, Instant::now()) {
                self.tell_of_lost(name, *address, reachability);
                self.schedule.now();
            }
        }
        self.doubt_pods_of_the_dead();
    }

    fn tell_of_lost(&mut self, name: &str, address: Ipv6Addr, reachability: Reachability) {
        let what = match reachability {
            Reachability::Unreachable => {
                format!("node {name} does not report and does not answer at {address}: no route leads to it")
            }
            _ => format!("node {name} answers at {address} again: its route is back"),
        };
        self.events.happened(what, None);
    }

    /// Hosts of the link that have a dead node's MAC address for its pods would trust it for half a minute.
    fn doubt_pods_of_the_dead(&mut self) {
        let addresses = self.lost_peers.doubts(&self.roster.assignment().peers);
        if !addresses.is_empty() {
            self.announcer.doubt(&addresses);
        }
    }

    /// Makes an assignment durable and follows it: what there is to do then, or none when the store cannot be
    /// written and nothing has happened.
    async fn commit(&mut self, pending: Pending) -> Option<Vec<Duty>> {
        match self.keep(pending).await {
            Ok(duties) => Some(duties),
            Err(lost) => {
                self.tell_lost(&lost);
                None
            }
        }
    }

    /// Of an assignment that cannot be kept follows what ends: that may be what fills the disk.
    async fn follow_ends(&mut self, lost: Lost) -> Option<Vec<Duty>> {
        let duties = match self.roster.ends_alone(&lost.pending) {
            Some(ends) => self.keep(ends).await,
            None => Ok(Vec::new()),
        };
        if let Err(ends) = &duties {
            error!(error = ends.why, "pods that are to end go on: that cannot be kept either");
        }
        self.tell_lost(&lost);
        duties.ok()
    }

    fn tell_lost(&mut self, lost: &Lost) {
        error!(error = lost.why, "the assignment is not followed: it cannot be kept");
        self.roster.not_kept(&lost.pending, &lost.why);
        self.tell_notes();
    }

    async fn keep(&mut self, pending: Pending) -> Result<Vec<Duty>, Lost> {
        let (store, old) = (self.store.clone(), self.roster.assignment().clone());
        let pending = Arc::new(pending);
        let next = pending.clone();
        let written = tokio::task::spawn_blocking(move || store.commit(&old, &next.next));
        let written = written.await.context("the store's thread failed").and_then(|result| Ok(result?));
        let pending = Arc::into_inner(pending).expect("the thread that wrote it has let go of it");
        if let Err(error) = written {
            return Err(Lost { pending, why: format!("{error:#}") });
        }
        let head = pending.next.head.clone();
        self.hello.send_modify(|hello| {
            (hello.rest.epoch, hello.rest.revision) = (head.epoch, head.revision);
        });
        let duties = self.roster.durable(pending, |pod, before, now| self.pods.is_changed(pod, before, now));
        self.lease.follow(self.roster.assignment().term_of_singletons());
        Ok(duties)
    }

    async fn hear_keeper(&mut self, pod: &str, news: News) {
        if let News::Script(news) = news {
            return self.hear_script(pod, news);
        }
        if self.roster.assignment().pods.contains_key(pod) {
            let event = self.pods.heard(pod, news);
            self.happen(event.map(|event| (pod.to_owned(), event)).into_iter().collect()).await;
        }
    }

    /// A script has ended: also when its pod has gone meanwhile, its failure is told.
    fn hear_script(&mut self, pod: &str, news: ScriptNews) {
        let Some(what) = self.pods.heard_script(pod, news) else { return };
        self.roster.script_failed(pod, what);
        if !self.roster.assignment().pods.contains_key(pod) {
            self.pods.forget(pod);
        }
        self.tell_notes();
    }

    /// Another machine claims an address. Anybody on a LAN can do that with one frame, so it is believed only when
    /// it answers a probe. In a /64 of this node's own it has no business: the node goes on answering.
    async fn hear_conflict(&mut self, Conflict { address, mac, probed }: Conflict) {
        if self.identity.cluster.has_subnet(self.identity.prefix) {
            let what = format!("{address}, a pod's address, is claimed by another host");
            self.events.happened(what, Some(mac.to_string()));
        } else if probed {
            self.lose_address(address, mac).await;
        } else {
            warn!(%address, %mac, "another host claims a pod's address: it is asked whether it has it");
            self.announcer.probe(address);
        }
    }

    /// The pod with this address stops using it, durably, and asks for another.
    async fn lose_address(&mut self, address: Ipv6Addr, mac: Mac) {
        let mut pods = self.roster.assignment().pods.iter();
        let found = pods.find(|(_, record)| record.address == address && record.taken_by.is_none());
        let Some(pod) = found.filter(|(_, record)| !record.removing).map(|(pod, _)| pod.clone()) else {
            return;
        };
        let standing = self.conflicts.heard(&pod, Instant::now());
        let why = conflict_words(address, mac, standing);
        debug!(pod, in_a_row = standing.in_a_row, wait = ?standing.wait, "address lost");
        self.events.happened(format!("pod {pod}: {why}"), Some(mac.to_string()));
        if let Some(duties) = self.commit(self.roster.displaced(&pod, mac.0, why)).await {
            self.fulfil(duties).await;
        }
    }

    /// Tells the server, if it is there, which pods need another address. It is told again by each new stream.
    fn ask_for_addresses(&mut self) {
        let due = self.conflicts.due(Instant::now());
        due.iter().for_each(|pod| self.roster.ask_for_address(pod));
    }

    /// Tells the roster the time, and does what that makes due.
    async fn advance(&mut self) {
        let duties = self.roster.advance(self.started.elapsed());
        self.fulfil(duties).await;
    }

    async fn happen(&mut self, events: Vec<(String, Event)>) {
        let mut duties = self.roster.advance(self.started.elapsed());
        for (pod, event) in events {
            let before = self.roster.report(&pod);
            duties.extend(self.roster.happen(&pod, event));
            log_change(&pod, before.as_ref(), self.roster.report(&pod).as_ref());
        }
        self.fulfil(duties).await;
    }

    async fn fulfil(&mut self, duties: Vec<Duty>) {
        let mut finished = Vec::new();
        let mut duties = VecDeque::from(duties);
        while let Some(duty) = duties.pop_front() {
            match duty {
                Duty::Reconcile => self.schedule.now(),
                Duty::Act(pod, action) => duties.extend(self.act(&pod, action)),
                Duty::Finish(pod) => finished.push(pod),
            }
        }
        self.tell_notes();
        self.finish(finished).await;
    }

    /// Does something for a pod; what follows from what is done at once.
    fn act(&mut self, pod: &str, action: Action) -> Vec<Duty> {
        let Some(record) = self.roster.assignment().pods.get(pod) else { return Vec::new() };
        let order = |name| {
            let (hook, owner) = self.roster.hook(pod, name)?;
            Some(Order { name, hook, owner })
        };
        let folders = match &action {
            Action::MakeFolders => self.pods.make_folders(pod),
            Action::RemoveFolders => self.pods.remove_folders(pod).map_err(|error| error.to_string()),
            Action::RunHook(name) => {
                match (self.roster.hooks_problem(pod), order(name)) {
                    (None, Some(order)) => self.pods.run_hook(pod, record, order),
                    (why, _) => {
                        self.pods.hook_failed(
                            pod,
                            name,
                            why.unwrap_or_else(|| "there is no such hook".to_owned()),
                        );
                    }
                }
                return Vec::new();
            }
            Action::UndoHook(name) => {
                let gone = hextet_lifecycle::Hook::default();
                let order = order(name).unwrap_or(Order { name, hook: &gone, owner: Owner::Operator });
                self.pods.undo_hook(pod, record, order);
                return Vec::new();
            }
            Action::AbortHook(name) => {
                self.pods.abort_hook(pod, name);
                return Vec::new();
            }
            _ => {
                self.pods.act(pod, record, action);
                return Vec::new();
            }
        };
        self.roster.happen(pod, Event::Folders(folders))
    }

    /// Tells the server, the log and the programs that follow events what has happened to pods.
    fn tell_notes(&mut self) {
        for note in self.roster.take_notes() {
            debug!(pod = note.pod, kind = note.kind, "{}", note.what);
            self.roster.event(&note, unix_ms());
            let now = self.roster.assignment().pods.get(&note.pod);
            let Some(record) = now.or(note.last.as_ref()) else { continue };
            for (name, hook, owner) in self.roster.following(&note.pod, note.kind) {
                let order = Order { name: &name, hook: &hook, owner };
                self.pods.run_script(&note.pod, record, order, (note.kind, &note.what));
            }
        }
    }

    /// Tries again what of a pod has failed; the names of those steps.
    async fn retry(&mut self, pod: &str) -> Vec<String> {
        self.advance().await;
        let (steps, duties) = self.roster.retry(pod);
        info!(pod, ?steps, "somebody asked that what has failed is tried again");
        self.fulfil(duties).await;
        steps
    }

    /// Answers the server's question why a pod is as it is.
    async fn describe(&mut self, request: v1::DescribePod) {
        let Some(channel) = self.reports.channel() else { return };
        let retried = if request.retry { self.retry(&request.pod).await } else { Vec::new() };
        let mut answer = v1::SendDescriptionRequest {
            request_id: request.request_id,
            retried,
            ..v1::SendDescriptionRequest::default()
        };
        match self.roster.steps_now(&request.pod, self.started.elapsed()) {
            None => answer.error = format!("pod {} is not on this node", request.pod),
            Some(steps) => {
                let output = |step: &str| self.step_output(&request.pod, step);
                answer.steps =
                    steps.into_iter().map(|step| explain::message(output(&step.name), step)).collect();
                let scripts = self.pods.scripts(&request.pod).into_iter();
                answer.steps.extend(scripts.map(|step| explain::message(step.output.clone(), step)));
            }
        }
        explain::send(channel, answer);
    }

    /// The last lines that a hook wrote, or a task before it ended last.
    fn step_output(&self, pod: &str, step: &str) -> String {
        if self.roster.hook(pod, step).is_some() {
            return self.pods.hook_output(pod, step);
        }
        let ending = self.roster.report(pod).and_then(|report| report.ending).filter(|_| step == TASKS);
        let of_task = ending.filter(|ending| ending.what.starts_with("task "));
        of_task.map(|ending| ending.output.clone()).unwrap_or_default()
    }

    /// Nothing of these pods runs, nothing is in the kernel and nothing on the disk: their records go, and they are
    /// reported gone. What fails is tried again with the next look at the kernel.
    async fn finish(&mut self, mut pods: Vec<String>) {
        if pods.is_empty() {
            return;
        }
        pods.sort();
        pods.dedup();
        pods.iter().for_each(|pod| self.pods.forget(pod));
        let (duties, pending) = self.roster.finished(pods.clone());
        Box::pin(self.fulfil(duties)).await;
        let Some(pending) = pending else { return };
        let Some(duties) = self.commit(pending).await else { return };
        // What they had on the disk is free.
        self.behind.hurry(Instant::now());
        if !duties.is_empty() {
            self.schedule.now();
        }
        for pod in pods.iter().filter(|pod| !self.roster.assignment().pods.contains_key(*pod)) {
            info!(pod, "pod removed");
            self.conflicts.forget(pod);
        }
        self.tell_notes();
    }

    /// Brings the kernel to what is wanted, and the pods on from there.
    async fn reconcile(&mut self) {
        self.schedule.begin();
        if let Err(error) = self.refresh_underlay().await {
            let wait = self.schedule.failed();
            warn!(error = format!("{error:#}"), ?wait, "the uplink is not there yet");
        }
        let Some(desired) = self.desired().filter(|_| !self.is_held) else { return };
        let traces = self.traces.take();
        let reconciled = match self.dataplane.reconcile(&desired).await {
            Ok(reconciled) => reconciled,
            Err(error) => {
                let wait = self.schedule.failed();
                warn!(error = format!("{:#}", anyhow::Error::new(error)), ?wait, "cannot read the kernel");
                return;
            }
        };
        log_ops(&reconciled.ops, &reconciled.failures);
        let announced = self.announcer.reconciled(&desired, &reconciled, probes(&desired));
        let unannounced = announced.err().map(|error| chain(&error));
        if let Some(error) = &unannounced {
            warn!(error, "pods are not announced");
        }
        self.tell_repairs(&reconciled, &traces);
        if reconciled.failures.is_empty() {
            self.settled = Some(desired.clone());
            self.schedule.succeeded();
        } else {
            let wait = self.schedule.failed();
            warn!(
                failed = reconciled.failures.len(),
                ?wait,
                "the kernel is not as it should be, trying again"
            );
        }
        if reconciled.ops.iter().any(is_guard) {
            self.sweep();
        }
        let failures = failures_by_pod(&reconciled.failures);
        let is_desired = |pod: &str| desired.pods.contains_key(pod);
        let mut events =
            self.roster.network_events(is_desired, |pod| failures.get(pod).cloned(), unannounced.as_deref());
        events.extend(replaced(&reconciled.ops).map(|pod| (pod, Event::NetworkReplaced)));
        self.happen(events).await;
    }

    /// Tells what others had undone and is mended.
    fn tell_repairs(&mut self, reconciled: &Reconciled, traces: &[Trace]) {
        if reconciled.ops.is_empty() {
            return;
        }
        if let Some(settled) = &self.settled {
            let failed = |op: &Op| reconciled.failures.iter().any(|(other, _)| other == op);
            let mut repairs = repairs(settled, &reconciled.observed, &reconciled.ops);
            repairs.retain(|op| !failed(op));
            self.events.repaired(&repairs, traces);
        }
        // What was heard until now is the reconciliation itself.
        self.traces.take();
    }

    fn desired(&self) -> Option<Desired> {
        let underlay = self.underlay.as_ref()?;
        let absent = |pod: &str| self.roster.is_absent(pod);
        let silent = self.lost_peers.silent();
        Some(desired(&self.identity, self.roster.assignment(), underlay, self.backends, absent, &silent))
    }

    /// Looks for the uplink and its addresses; the server is told when they are others than before.
    pub(crate) async fn refresh_underlay(&mut self) -> Result<()> {
        let now = underlay(&self.dataplane, &self.uplink).await?;
        if self.underlay.as_ref() != Some(&now) {
            info!(device = now.device, address = %now.address, ipv4 = ?now.ipv4, "uplink");
            self.hello.send_modify(|hello| {
                (hello.underlay, hello.underlay_v4) = (Some(now.address), now.ipv4);
                hello.device = Some(now.device.clone());
                hello.rest.hardware = hardware(now.mac);
            });
            self.check_lan(&now);
            self.underlay = Some(now);
        }
        Ok(())
    }

    /// Pods with addresses of a LAN can be reached only on that LAN.
    fn check_lan(&self, underlay: &Underlay) {
        let prefix = self.identity.prefix;
        if !self.identity.cluster.has_subnet(prefix) && !underlay.prefixes.contains(&prefix) {
            warn!(
                device = underlay.device,
                %prefix,
                "the uplink has no address in the /64 that pods have their addresses in: is it another LAN than \
                 before? To join with the present one, run `netctl node down` and remove the state folder"
            );
        }
    }

    fn sweep(&mut self) {
        match self.dataplane.sweep_flows() {
            Ok(swept) => {
                debug!(freed = swept.freed, "masquerade flows that have expired");
                self.note_ports(&swept);
            }
            Err(error) => {
                warn!(error = format!("{:#}", anyhow::Error::new(error)), "cannot sweep masquerade flows")
            }
        }
    }

    /// Writes down who has which outside ports, and says who was refused one.
    fn note_ports(&mut self, swept: &Swept) {
        let named =
            self.roster.assignment().pods.iter().filter_map(|(id, record)| Some((record.ipv4?, id.clone())));
        let pods = named.collect();
        let now = (unix_s(), dataplane::monotonic_ns() / 1_000_000_000);
        if let Err(error) = self.ports.note(&Reading { blocks: &swept.blocks, pods: &pods, now }) {
            warn!(%error, "cannot write down who has which outside ports, trying again");
        }
        for (ipv4, count) in &swept.refused {
            let before = self.refused.insert(*ipv4, *count).unwrap_or(0);
            if *count != before {
                let pod = pods.get(ipv4).map_or("?", String::as_str);
                let flows = count.wrapping_sub(before);
                let what =
                    format!("pod {pod} was refused {flows} new IPv4 flows: its outside ports are taken");
                self.events.happened(what, None);
            }
        }
    }

    /// Answers root; true when the node is down and the agent ends.
    async fn hear_root(
        &mut self,
        request: Request,
        answer: oneshot::Sender<Answer>,
        inbox: &mut Inbox,
    ) -> bool {
        let result = match request {
            Request::Plan => self.plan().await.map(Answer::Lines),
            Request::Show => Ok(Answer::View(Box::new(self.view()))),
            Request::Events => Ok(Answer::Events(self.events.list())),
            Request::Down => self.down(inbox).await.map(Answer::Lines),
        };
        let down = request == Request::Down && result.is_ok();
        let said = result.unwrap_or_else(|error| Answer::Error(format!("{error:#}")));
        // Who asked may have gone.
        let _ = answer.send(said);
        if down {
            // The answer is written by another task.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        down
    }

    async fn plan(&mut self) -> Result<Vec<String>> {
        let desired = self.desired().context("the uplink is not there: nothing can be planned")?;
        let observed = self.dataplane.observe(&desired).await?;
        Ok(plan(&desired, &observed).iter().map(Op::to_string).collect())
    }

    async fn down(&mut self, inbox: &mut Inbox) -> Result<Vec<String>> {
        info!("taking the node down");
        let mut lines = vec![self.leave(inbox).await];
        lines.extend(self.take_down(inbox).await?);
        Ok(lines)
    }

    /// Ends the pods and takes everything out of the kernel.
    async fn take_down(&mut self, inbox: &mut Inbox) -> Result<Vec<String>> {
        // Keepers that end have something to say that nobody needs to hear.
        inbox.keepers.close();
        while inbox.keepers.try_recv().is_ok() {}
        self.pods.release().await;
        let planned = match self.desired() {
            Some(desired) => planned_teardown(&mut self.dataplane, &desired).await,
            None => Vec::new(),
        };
        teardown::all(&self.paths, &mut self.dataplane, planned).await
    }

    /// Gives the lease back, so that others take the pods over now and not when it ends. Says how it went.
    async fn leave(&mut self, inbox: &mut Inbox) -> String {
        // The server lets another node start them as soon as it knows.
        let told = match self.end_singletons().await {
            false => Err("a pod of which there may only be one has not ended".to_owned()),
            true => match tokio::time::timeout(LEAVE_MAX, self.tell_server(inbox)).await {
                Ok(told) => told.map_err(str::to_owned),
                Err(_) => Err(format!("no answer in {} s", LEAVE_MAX.as_secs())),
            },
        };
        // Without an address there is no new stream, which would bring the node back.
        self.hello.send_modify(|hello| hello.underlay = None);
        told.map_or_else(|why| untold(&self.identity.name, &why), |()| TOLD.to_owned())
    }

    /// It ends the stream, in order, when it has written that down.
    async fn tell_server(&self, inbox: &mut Inbox) -> Result<(), &'static str> {
        let leaving = self.hello.borrow().leaving();
        if !self.reports.leave(leaving).await {
            return Err("this node is not attached to it");
        }
        loop {
            match inbox.server.recv().await {
                Some(FromServer::Detached { orderly: true }) => return Ok(()),
                Some(FromServer::Detached { orderly: false }) | None => return Err("the stream to it broke"),
                Some(_) => {}
            }
        }
    }

    /// Ends what may run on one node only, then gives the lease back. False when something of it may still run.
    async fn end_singletons(&mut self) -> bool {
        let pods = self.roster.assignment().pods.iter();
        let singles: Vec<_> =
            pods.filter(|(_, record)| record.singleton.is_some()).map(|(id, _)| id.clone()).collect();
        let are_there = !singles.is_empty();
        let is_over = self.pods.end(singles).await;
        self.lease.give_back();
        if are_there {
            // Their hooks end with the lease.
            tokio::time::sleep(2 * crate::supervisor::LEASE_LOOK).await;
        }
        is_over
    }

    fn view(&self) -> NodeView {
        let pods =
            self.roster.assignment().pods.iter().map(|(id, record)| (id.clone(), self.pod_view(id, record)));
        NodeView {
            agent_pid: Some(std::process::id()),
            attached: self.reports.channel().is_some(),
            refused: self.refusal(),
            pods: pods.collect(),
            ..view(
                &self.identity,
                self.roster.assignment(),
                self.backends,
                self.underlay.as_ref(),
                &self.dataplane,
            )
        }
    }

    /// Why the server does not serve this machine.
    fn refusal(&self) -> Option<String> {
        let copy = || self.taken_for_copy.as_ref().map(|refused| refused.why.clone());
        self.deleted.as_ref().map(Deleted::advice).or_else(copy)
    }

    fn pod_view(&self, id: &str, record: &assignment::PodRecord) -> PodView {
        let report = self.roster.report(id);
        let state = match &report {
            _ if self.roster.is_ending(id) => "ending".to_owned(),
            Some(report) => format!("{:?}", report.phase).to_lowercase(),
            None => "unknown".to_owned(),
        };
        let (message, restarts) = report.map(|report| (report.message, report.restarts)).unwrap_or_default();
        PodView { address: record.address, ipv4: record.ipv4, state, message, restarts }
    }
}

/// The node as its store describes it.
pub(crate) fn view(
    identity: &Identity,
    assignment: &Assignment,
    backends: Backends,
    underlay: Option<&Underlay>,
    dataplane: &Dataplane,
) -> NodeView {
    let stored = |record: &assignment::PodRecord| PodView {
        address: record.address,
        ipv4: record.ipv4,
        state: if record.removing { "ending" } else { "unknown" }.to_owned(),
        message: record.problem.clone().unwrap_or_default(),
        restarts: 0,
    };
    NodeView {
        name: identity.name.clone(),
        agent_pid: None,
        cluster: identity.cluster,
        prefix: identity.prefix,
        uplink: underlay.map(|underlay| underlay.device.clone()),
        underlay: underlay.map(|underlay| underlay.address),
        underlay_ipv4: underlay.and_then(|underlay| underlay.ipv4),
        ndp: backends.ndp.to_string(),
        masquerade: backends.masquerade.to_string(),
        servers: identity.credentials.servers.clone(),
        attached: false,
        refused: None,
        revision: assignment.head.revision,
        peers: assignment
            .peers
            .iter()
            .map(|(name, peer)| (name.clone(), (peer.prefix, peer.underlay)))
            .collect(),
        pods: assignment.pods.iter().map(|(id, record)| (id.clone(), stored(record))).collect(),
        features: dataplane.features().to_string().lines().map(str::to_owned).collect(),
    }
}

/// The uplink that was chosen, as it is now.
pub(crate) async fn underlay(dataplane: &Dataplane, choice: &UplinkChoice) -> Result<Underlay> {
    let info: UplinkInfo = match &choice.device {
        Some(name) => dataplane.uplink(name).await?,
        None => dataplane.default_uplink().await?,
    };
    let address = choice.address.or(info.ipv6).with_context(|| {
        format!("device {} has no global or unique local IPv6 address: give it one, or name another with --underlay", info.name)
    })?;
    Ok(Underlay {
        device: info.name,
        address,
        ipv4: info.ipv4,
        sources: info.sources,
        prefixes: info.prefixes,
        global: info.global,
        on_link: info.on_link,
        mac: info.mac,
    })
}

impl UplinkChoice {
    pub(crate) fn of(settings: &Settings) -> UplinkChoice {
        UplinkChoice { device: settings.uplink.clone(), address: settings.underlay }
    }
}

/// What a teardown will take out of the kernel, a line each; empty when it cannot be told.
pub(crate) async fn planned_teardown(dataplane: &mut Dataplane, desired: &Desired) -> Vec<String> {
    match dataplane.observe(desired).await {
        Ok(observed) => plan_teardown(&observed).iter().map(Op::to_string).collect(),
        Err(_) => Vec::new(),
    }
}

fn ticks(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Whether new addresses are probed: on a LAN, where others make addresses in the same /64.
fn probes(desired: &Desired) -> bool {
    !desired.is_routed(desired.node)
}

fn conflict_words(address: Ipv6Addr, mac: Mac, standing: Standing) -> String {
    let Standing { in_a_row, wait } = standing;
    let what = format!("the host with MAC {mac} has its address {address} too");
    if wait.is_zero() {
        return format!("{what}; another address is asked for");
    }
    let wait_s = wait.as_secs();
    format!(
        "{what}; these are {in_a_row} addresses in a row: look whether that host answers for every address. \
         Another one is asked for in {wait_s} s"
    )
}

async fn changed(changes: &mut Option<Changes>) {
    match changes {
        Some(changes) => changes.changed().await,
        None => std::future::pending().await,
    }
}

/// Whether a pod came to its ports, or lost them.
fn is_guard(op: &Op) -> bool {
    matches!(op.action, Operation::GuardSet { .. } | Operation::GuardDelete { .. })
}

/// Whether it makes a pod's namespace, its veth pair or an address, or takes them away.
fn is_link(op: &Op) -> bool {
    use Operation::*;
    matches!(
        op.action,
        NetnsAdd
            | NetnsDelete
            | LinkAdd { .. }
            | LinkSet { .. }
            | LinkDelete { .. }
            | LoopbackUp
            | AddressAdd(_)
            | AddressDelete(_)
            | SysctlSet { .. }
    )
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Pods whose network namespace was made.
fn replaced(ops: &[Op]) -> impl Iterator<Item = String> {
    ops.iter().filter(|op| op.action == Operation::NetnsAdd).filter_map(|op| op.pod.clone())
}

/// The first failure of each pod.
fn failures_by_pod(failures: &[(Op, ApplyError)]) -> BTreeMap<String, Failure> {
    let mut first = BTreeMap::new();
    for (op, error) in failures {
        if let Some(pod) = &op.pod {
            let why = || format!("{op}: {}", chain(error));
            let failure = first.entry(pod.clone()).or_insert_with(|| Failure { has_link: true, why: why() });
            failure.has_link &= !is_link(op);
        }
    }
    first
}

fn log_change(id: &str, before: Option<&Report>, after: Option<&Report>) {
    let Some(after) = after.filter(|after| Some(*after) != before) else { return };
    let phase = format!("{:?}", after.phase).to_lowercase();
    if before.map(|before| before.phase) == Some(after.phase) {
        debug!(pod = id, phase, restarts = after.restarts, message = after.message, "pod");
    } else {
        info!(pod = id, phase, restarts = after.restarts, message = after.message, "pod");
    }
}

fn log_ops(ops: &[Op], failures: &[(Op, ApplyError)]) {
    if ops.len() > OPS_LOGGED_MAX {
        let pods: BTreeSet<&String> = ops.iter().filter_map(|op| op.pod.as_ref()).collect();
        info!(operations = ops.len(), pods = pods.len(), failed = failures.len(), "kernel changed");
        ops.iter().for_each(|op| debug!("{op}"));
    } else {
        ops.iter().for_each(|op| info!("{op}"));
    }
    for (op, error) in failures.iter().take(OPS_LOGGED_MAX) {
        warn!(error = chain(error), "failed: {op}");
    }
}

/// An error with its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}
