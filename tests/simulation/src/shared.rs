//! What everything in the simulated world shares: time, chance, the network, and what is to happen.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use hextet_api::v1::NeighbourSeen;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use scheduler_core::{deploy::DeployId, pod::PodId};

use crate::{
    Broken, Figures, Options,
    clock::{Time, ms},
    network::{End, Host, Network, Packet, StreamId},
    trace::Trace,
};

/// What is to happen. `life` counts the starts of a process: what waits for an earlier one never happens.
#[derive(Clone, Debug)]
pub(crate) enum What {
    Arrive(StreamId, End),
    StartServer,
    Server(u64, ServerDue),
    StartAgent(usize),
    /// A machine whose node was deleted joins again.
    Rejoin(usize),
    /// Somebody brings a node back that was taken down.
    NodeUp(usize),
    /// The supervisors of a machine look whether its lease runs.
    Supervisors(usize),
    Agent(usize, u64, AgentDue),
    Balancer(usize, u64),
    Operate,
    /// Somebody looks after the deploys.
    Attend,
    Fault,
    /// Nothing arrives any more in this direction.
    Cut(Host, End),
    Heal(crate::faults::Healing),
    /// An end hears nothing and gives the stream up, if the stream is still cut.
    GiveUp(StreamId, End),
}

#[derive(Clone, Debug)]
pub(crate) enum ServerDue {
    Committed,
    Recover,
    LookAtLeases,
    LookAtDrains,
    LookAtDeploys,
    /// Leases of the server before a restore are over.
    SettleRestore,
    TellLeasesAgain,
    TellDrainsAgain,
    TellDeploysOn,
    Tell(StreamId),
    WriteDown(StreamId),
    TellReader(StreamId),
    Bookmark(StreamId),
}

#[derive(Clone, Debug)]
pub(crate) enum AgentDue {
    Connect,
    ConnectLease,
    Renew(StreamId),
    /// What it says of another machine.
    Testify(StreamId, NeighbourSeen),
    Boot,
    Say,
    Reconcile,
    Audit,
    Keeper(String, u64),
    /// A step of a pod is due.
    Step,
    /// The node is taken down: what only one node may run has ended, and the server is told.
    Leave,
    /// What it has said before, on connections that are no more, arrives late.
    Echo,
    /// It has heard from the server, or has not: everything of it ends.
    Down,
    /// A task of a version that fails ends.
    Fail(String),
}

pub(crate) struct Shared {
    pub(crate) now: Time,
    pub(crate) rng: StdRng,
    pub(crate) network: Network,
    pub(crate) trace: Trace,
    pub(crate) figures: Figures,
    pub(crate) options: Options,
    /// Faults happen. When they have stopped everything must converge.
    pub(crate) faulty: bool,
    /// Pods that were said not to run in what a revision came of.
    pub(crate) unwell: BTreeMap<u64, BTreeSet<PodId>>,
    /// Operators who have seen how a deploy ended, by their numbers.
    pub(crate) acknowledged: BTreeMap<u64, DeployId>,
    /// What did not hold where it was noticed.
    pub(crate) broken: Option<String>,
    agenda: BTreeMap<(Time, u64), What>,
    planned: u64,
}

impl Shared {
    pub(crate) fn new(seed: u64, options: Options) -> Shared {
        Shared {
            now: Time::default(),
            rng: StdRng::seed_from_u64(seed),
            network: Network::default(),
            trace: Trace::new(),
            figures: Figures::default(),
            options,
            faulty: true,
            unwell: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            broken: None,
            agenda: BTreeMap::new(),
            planned: 0,
        }
    }

    pub(crate) fn figures(&self) -> Figures {
        Figures { seconds: self.now.0 / 1_000_000, ..self.figures }
    }

    pub(crate) fn is_broken(&self, how: Broken) -> bool {
        self.options.broken == Some(how)
    }

    pub(crate) fn note(&mut self, line: impl AsRef<str>) {
        self.trace.note(self.now, line.as_ref());
    }

    /// Something that must never happen has happened.
    pub(crate) fn wrong(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }

    pub(crate) fn plan(&mut self, after: Duration, what: What) {
        self.planned += 1;
        self.agenda.insert((self.now + after, self.planned), what);
    }

    pub(crate) fn next(&mut self) -> Option<What> {
        let ((time, _), what) = self.agenda.pop_first()?;
        self.now = time;
        Some(what)
    }

    pub(crate) fn chance(&mut self, of: f64) -> bool {
        self.rng.random_bool(of)
    }

    /// The same, of something that goes wrong.
    pub(crate) fn fault(&mut self, of: f64) -> bool {
        let happens = self.faulty && self.rng.random_bool(of);
        self.figures.faults += u64::from(happens);
        happens
    }

    pub(crate) fn between(&mut self, from_ms: u64, to_ms: u64) -> Duration {
        Duration::from_micros(self.rng.random_range(from_ms * 1000..=to_ms * 1000))
    }

    /// How long a packet travels. One that is lost comes with a retransmission.
    pub(crate) fn travel(&mut self) -> Duration {
        if self.fault(0.02) {
            self.between(200, 1500)
        } else {
            Duration::from_micros(self.rng.random_range(50..3000))
        }
    }

    pub(crate) fn send(&mut self, stream: StreamId, to: End, packet: Packet) {
        if self.network.send(stream, to, packet) {
            let wait = self.travel();
            self.plan(wait, What::Arrive(stream, to));
        }
    }

    /// The end of a process that held `end`: some of what it said last may be lost with it.
    pub(crate) fn drop_stream(&mut self, stream: StreamId, end: End, orderly: bool) {
        let peer = other(end);
        if !orderly && self.chance(0.5) {
            let sent = self.network.on_the_way(stream, peer);
            let kept = self.rng.random_range(0..=sent);
            self.network.lose(stream, peer, kept);
        }
        self.send(stream, peer, Packet::Closed);
        self.network.deafen(stream, end);
    }

    /// The end of a machine that held `end`: nobody says so, and the peer finds out because it hears nothing.
    pub(crate) fn vanish(&mut self, stream: StreamId, end: End) {
        self.network.deafen(stream, end);
        let wait = self.between(10_000, 20_000);
        self.plan(wait, What::GiveUp(stream, other(end)));
    }
}

pub(crate) fn other(end: End) -> End {
    match end {
        End::Server => End::Client,
        End::Client => End::Server,
    }
}

/// As long as a try that failed waits for the next, doubled and bounded, with jitter.
pub(crate) fn backoff(shared: &mut Shared, failures: u32, first_ms: u64, max_ms: u64) -> Duration {
    let full = (first_ms << failures.min(10)).min(max_ms);
    ms(shared.rng.random_range(full / 2..=full))
}
