//! Several servers over one etcd: one leads, the others follow, and whoever watches or asks goes from one to the other.
//!
//! The store is the one that is shipped, over an etcd that is played; so are batches, tenures, claims and watches.
//! Crashes, pauses, cuts, requests that are late and answers that are lost come from the seed.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hextet_address::ClusterPrefix;
use rand::Rng as _;
use scheduler_core::{
    cluster::Cluster,
    endpoint::{self, Selection, Selector},
    event::{Event, PodReport},
    pod::PodPhase,
    time::WallTime,
    watch::Message,
};

use self::{etcd::Etcd, member::Member};
use crate::{
    Broken, Options,
    clock::{Time, ms},
    deploy, join,
    operator::Operators,
    shared::Shared,
};

mod etcd;
mod member;
mod term;

const SERVERS: usize = 3;
/// How long there are faults, and how long everything has to converge after them.
const FAULTS: Duration = Duration::from_secs(100);
const CALM: Duration = Duration::from_secs(20);
const TICK_MAX_MS: u64 = 80;

/// What is to happen.
#[derive(Clone, Copy, Debug)]
enum Due {
    Tick(usize),
    Start(usize),
    Reach(usize),
    Operate,
    Report,
    Watch(usize),
    Fault,
}

/// What somebody asks for.
pub(super) struct Ask {
    /// Of an operator, who is told.
    number: Option<u64>,
    changer: String,
    event: Event,
}

/// Follows the addresses of one selector, whoever leads.
pub(super) struct Watcher {
    selector: Selector,
    revision: u64,
    known: Selection,
    /// It has read something, and can go on from there.
    has_begun: bool,
    /// The server that it reads, and the term of that.
    at: Option<(usize, i64)>,
    busy_until: Time,
}

pub(crate) struct Several {
    pub(crate) shared: Shared,
    agenda: BTreeMap<(Time, u64), Due>,
    planned: u64,
    etcd: Arc<Mutex<Etcd>>,
    members: Vec<Member>,
    watchers: Vec<Watcher>,
    operators: Operators,
}

impl Several {
    pub(crate) fn new(seed: u64, options: Options) -> Several {
        let mut shared = Shared::new(seed, options);
        let mut etcd = Etcd::new(etcd::seeded(shared.rng.random()));
        etcd.ignores_conditions = shared.is_broken(Broken::StoreTakesAll);
        let etcd = Arc::new(Mutex::new(etcd));
        let members = (0..SERVERS).map(|number| Member::new(number, &etcd, &mut shared)).collect();
        let selectors = ["j0", "j1/g0", "j0/g1"].map(|text| text.parse().expect("a selector"));
        let watcher = |selector| Watcher {
            selector,
            revision: 0,
            known: Selection::new(),
            has_begun: false,
            at: None,
            busy_until: Time::default(),
        };
        let watchers = selectors.into_iter().map(watcher).collect();
        let (agenda, operators) = (BTreeMap::new(), Operators::default());
        Several { shared, agenda, planned: 0, etcd, members, watchers, operators }
    }

    /// Plays with faults, then in peace, and says what did not hold.
    pub(crate) fn play(&mut self) -> Result<(), String> {
        (0..SERVERS).for_each(|number| self.plan(ms(0), Due::Tick(number)));
        (0..self.watchers.len()).for_each(|number| self.plan(ms(10), Due::Watch(number)));
        self.found()?;
        self.plan(ms(100), Due::Operate);
        self.plan(ms(100), Due::Report);
        self.plan(ms(1_000), Due::Fault);
        self.play_for(FAULTS)?;
        self.make_peace();
        self.play_for(CALM)?;
        let acknowledged = self.shared.figures.acknowledged;
        self.play_for(CALM)?;
        if self.shared.figures.acknowledged == acknowledged {
            return Err("nothing is acknowledged although nothing goes wrong".to_owned());
        }
        self.shared.faulty = false;
        self.play_for(CALM)?;
        self.has_converged()
    }

    /// The cluster is made and its nodes join, before anything goes wrong.
    fn found(&mut self) -> Result<(), String> {
        self.etcd(|etcd| etcd.is_faulty = false);
        self.play_for(ms(1_000))?;
        let leader = self.leader().ok_or("nobody leads although nothing goes wrong")?;
        let cluster = Cluster {
            prefix: ClusterPrefix::generate(&mut self.shared.rng),
            pod_prefix: Some(join::LAN.parse().expect("a prefix")),
            pod_ipv4: "10.254.0.0/20".parse().expect("a network"),
            id_key: 1,
            created: WallTime(0),
        };
        let mut events = vec![("user:root".to_owned(), Event::ClusterCreated(cluster))];
        for number in 0..self.shared.options.nodes {
            let joined = join::all_events(number, &mut self.shared);
            events.extend(joined.into_iter().map(|event| ("user:root".to_owned(), event)));
        }
        let asks = events.into_iter().map(|(changer, event)| Ask { number: None, changer, event });
        self.members[leader].queue.extend(asks);
        self.play_for(ms(1_000))?;
        self.etcd(|etcd| etcd.is_faulty = true);
        let nodes = self.etcd(|etcd| etcd.states.last().map_or(0, |state| state.nodes().len()));
        if nodes == self.shared.options.nodes { Ok(()) } else { Err(format!("{nodes} nodes have joined")) }
    }

    fn etcd<T>(&self, look: impl FnOnce(&mut Etcd) -> T) -> T {
        look(&mut self.etcd.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn plan(&mut self, wait: Duration, due: Due) {
        self.planned += 1;
        self.agenda.insert((self.shared.now + wait, self.planned), due);
    }

    fn leader(&self) -> Option<usize> {
        self.members.iter().position(|member| member.term().is_some())
    }

    fn play_for(&mut self, time: Duration) -> Result<(), String> {
        let end = self.shared.now + time;
        while self.shared.now < end {
            let ((time, _), due) = self.agenda.pop_first().expect("servers tick for ever");
            self.shared.now = time;
            self.shared.figures.steps += 1;
            self.etcd(|etcd| etcd.advance(time));
            self.happen(due);
            self.etcd(|etcd| etcd.wrong.take()).map_or(Ok(()), Err)?;
            self.shared.broken.take().map_or(Ok(()), Err)?;
        }
        let (revisions, faults) = self.etcd(|etcd| (etcd.log.len() as u64, std::mem::take(&mut etcd.faults)));
        self.shared.figures.revisions = revisions;
        self.shared.figures.faults += faults;
        Ok(())
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Tick(number) => self.tick(number),
            Due::Start(number) => self.members[number].start(&mut self.shared),
            Due::Reach(number) => {
                self.shared.note(format!("server {number} reaches etcd again"));
                self.etcd(|etcd| etcd.cut.remove(&number));
            }
            Due::Operate => self.operate(),
            Due::Report => self.report(),
            Due::Watch(number) => self.watch(number),
            Due::Fault => self.fail(),
        }
    }

    fn tick(&mut self, number: usize) {
        let frozen_until = self.members[number].frozen_until;
        if frozen_until > self.shared.now {
            let wait = Duration::from_micros(frozen_until.0 - self.shared.now.0);
            return self.plan(wait, Due::Tick(number));
        }
        let is_down = self.members.iter().map(Member::is_down).collect::<Vec<_>>();
        self.members[number].tick(&is_down, &mut self.shared);
        self.deliver(number);
        let wait = self.shared.between(10, TICK_MAX_MS);
        self.plan(wait, Due::Tick(number));
    }

    /// What is asked of any server, if it is the leader's or the leader is known; the leader may be another by now.
    fn ask(&mut self, ask: Ask) {
        let number = self.shared.rng.random_range(0..SERVERS);
        if let Some(leader) = self.members[number].leads_to()
            && !self.members[leader].is_down()
        {
            self.members[leader].queue.push_back(ask);
        }
    }

    fn operate(&mut self) {
        if self.shared.faulty {
            let shown = self.etcd(|etcd| etcd.states.last().cloned()).unwrap_or_default();
            let (number, event) = self.operators.wish(&shown, &mut self.shared);
            self.ask(Ask { number: Some(number), changer: "user:op".to_owned(), event });
            let wait = self.shared.between(20, 800);
            self.plan(wait, Due::Operate);
        }
    }

    /// The nodes say that what they were told is so.
    fn report(&mut self) {
        if !self.shared.faulty {
            return;
        }
        let shown = self.etcd(|etcd| etcd.states.last().cloned()).unwrap_or_default();
        for node in shown.nodes().values() {
            let report = |pod: &Arc<scheduler_core::pod::Pod>| PodReport {
                id: pod.id.clone(),
                phase: PodPhase::Running,
                message: String::new(),
                restarts: 0,
                gone: pod.stop,
                version: Some(pod.job_version),
                ending: None,
            };
            let reports: Vec<_> = shown.pods_on(&node.name).map(report).collect();
            let event = Event::PodReports(node.name.clone(), reports);
            self.ask(Ask { number: None, changer: format!("node:{}", node.name), event });
        }
        // All is well with every deploy, as far as its driver sees.
        for event in shown.deploys().values().filter_map(|deploy| deploy::at_once(deploy)) {
            self.ask(Ask { number: None, changer: "deploy".to_owned(), event });
        }
        let drained = shown.pods().keys().cloned().collect();
        self.ask(Ask { number: None, changer: "scheduler".to_owned(), event: Event::Drained(drained) });
        let wait = self.shared.between(100, 1_500);
        self.plan(wait, Due::Report);
    }

    /// A watcher that reads nobody looks for the leader.
    fn watch(&mut self, number: usize) {
        let watcher = &mut self.watchers[number];
        let is_there = |(server, fence): (usize, i64)| {
            self.members[server].term().is_some_and(|term| term.fence == fence && term.has(number))
        };
        if watcher.at.is_none_or(|at| !is_there(at)) {
            watcher.at = None;
            let asked = self.shared.rng.random_range(0..SERVERS);
            let leader = self.members[asked].leads_to().filter(|leader| {
                let leader = &self.members[*leader];
                leader.term().is_some() && leader.frozen_until <= self.shared.now
            });
            if let Some(leader) = leader {
                let from = watcher.has_begun.then_some(watcher.revision);
                let selector = watcher.selector.clone();
                let fence = self.members[leader].subscribe(number, selector, from, &mut self.shared);
                self.watchers[number].at = fence.map(|fence| (leader, fence));
            }
        }
        let wait = self.shared.between(50, 500);
        self.plan(wait, Due::Watch(number));
    }

    /// The watchers of a server read what it has for them.
    fn deliver(&mut self, server: usize) {
        for number in 0..self.watchers.len() {
            if self.watchers[number].busy_until > self.shared.now {
                continue;
            }
            let messages = self.members[server].take(number, &mut self.shared);
            let Some(fence) = self.members[server].term().map(|term| term.fence) else { return };
            if self.watchers[number].at != Some((server, fence)) {
                continue;
            }
            for message in messages {
                self.shared.figures.watched += 1;
                if let Err(what) = self.read(number, message) {
                    self.shared.wrong(format!("watcher {number}: {what}"));
                }
            }
        }
    }

    /// A watcher applies a message. It then knows exactly what the cluster was at its revision.
    fn read(&mut self, number: usize, message: Message) -> Result<(), String> {
        let watcher = &mut self.watchers[number];
        let (revision, is_next) = match message {
            Message::Snapshot { revision, endpoints } => {
                watcher.known =
                    endpoints.into_iter().map(|endpoint| (endpoint.pod.clone(), endpoint)).collect();
                (revision, revision >= watcher.revision)
            }
            Message::Event { revision, diff } => {
                diff.apply(&mut watcher.known);
                (revision, revision > watcher.revision)
            }
            Message::Bookmark { revision } => (revision, revision >= watcher.revision),
        };
        if !is_next {
            return Err(format!("it was at {} and is told of {revision}", watcher.revision));
        }
        (watcher.revision, watcher.has_begun) = (revision, true);
        let watcher = &self.watchers[number];
        self.etcd(|etcd| match etcd.states.get(revision as usize) {
            None => Err(format!("it is told of {revision}, which is not durable")),
            Some(state) if endpoint::select(state, &watcher.selector) == watcher.known => Ok(()),
            Some(_) => Err(format!("it does not know what {} was at {revision}", watcher.selector)),
        })
    }

    fn make_peace(&mut self) {
        self.shared.note("peace");
        let now = self.shared.now;
        self.etcd(|etcd| {
            etcd.is_faulty = false;
            etcd.cut.clear();
        });
        self.agenda.retain(|_, due| !matches!(due, Due::Fault));
        self.members.iter_mut().for_each(|member| member.frozen_until = now);
        self.watchers.iter_mut().for_each(|watcher| watcher.busy_until = now);
    }

    fn has_converged(&self) -> Result<(), String> {
        let last = self.etcd(|etcd| etcd.states.last().cloned()).unwrap_or_default();
        let leaders: Vec<_> = self.members.iter().filter_map(Member::term).collect();
        match leaders.as_slice() {
            [term] if term.state == last => {}
            [_] => return Err("the leader's state is not what is in etcd".to_owned()),
            leaders => return Err(format!("{} servers lead", leaders.len())),
        }
        for (number, watcher) in self.watchers.iter().enumerate() {
            if watcher.known != endpoint::select(&last, &watcher.selector) {
                return Err(format!("watcher {number} does not know the present"));
            }
        }
        Ok(())
    }

    fn fail(&mut self) {
        self.shared.figures.faults += 1;
        let number = self.shared.rng.random_range(0..SERVERS);
        // Mostly the one that matters.
        let number = self.leader().filter(|_| self.shared.rng.random_bool(0.6)).unwrap_or(number);
        match self.shared.rng.random_range(0..10) {
            0..=2 => {
                self.members[number].crash(&mut self.shared);
                let wait = self.shared.between(100, 6_000);
                self.plan(wait, Due::Start(number));
            }
            3..=5 => {
                let wait = self.shared.between(100, 6_000);
                self.shared.note(format!("server {number} is stopped for {} ms", wait.as_millis()));
                self.members[number].frozen_until = self.shared.now + wait;
            }
            6..=7 => {
                let wait = self.shared.between(100, 6_000);
                self.shared.note(format!("server {number} is cut from etcd for {} ms", wait.as_millis()));
                self.etcd(|etcd| etcd.cut.insert(number));
                self.plan(wait, Due::Reach(number));
            }
            8 => {
                let watcher = self.shared.rng.random_range(0..self.watchers.len());
                let wait = self.shared.between(100, 8_000);
                self.watchers[watcher].busy_until = self.shared.now + wait;
                if self.shared.chance(0.5) {
                    self.watchers[watcher].at = None;
                }
            }
            _ => self.members[number].compacts_soon(),
        }
        let wait = self.shared.between(100, 3_000);
        self.plan(wait, Due::Fault);
    }
}
