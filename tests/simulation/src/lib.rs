//! A cluster under a fake clock and a fake network, all of it from one seed.
//!
//! What decides is the code that is shipped: the scheduler's core with its sessions, watches, leases, drains and
//! batches, and the node's roster with its assignment and pod states. What is played is what surrounds it: the
//! disks, the processes, the clocks, the wires between the machines, and everything that can go wrong with them.
//! Several servers are played apart from that, over a store that they share ([`play_several`]).
//! There are no threads, no sockets and no real time, and every collection is ordered, so that a seed always plays
//! the same; [`Outcome::hash`] says so.

#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};

mod balancer;
mod check;
mod clock;
mod deploy;
mod faults;
mod join;
mod machine;
mod network;
mod operator;
mod rollout;
mod server;
mod several;
mod shared;
mod store;
mod trace;
mod world;

// The agent's crate holds the kernel's side, too, and needs its build; what decides is compiled here a second time.
#[allow(dead_code, reason = "the agent uses more of it")]
#[path = "../../../node/src"]
mod node {
    pub(crate) mod assignment;
    pub(crate) mod identity;
    pub(crate) mod news;
    pub(crate) mod pod_ipv4;
    pub(crate) mod pod_state;
    pub(crate) mod roster;
    #[allow(unreachable_pub, reason = "it is public there")]
    pub(crate) mod supervisor {
        pub(crate) mod status;
    }
}
use node::{assignment, identity, news, pod_ipv4, pod_state, roster, supervisor};

/// What to play.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Machines that run pods.
    pub nodes: usize,
    /// Steps with faults, before everything is left in peace and must converge.
    pub steps: u64,
    /// Breaks the code on purpose: the simulation must find it.
    pub broken: Option<Broken>,
}

impl Default for Options {
    fn default() -> Options {
        Options { nodes: 5, steps: 15_000, broken: None }
    }
}

/// A mistake, made on purpose by what surrounds the deciding code, to show that it would be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The server answers before the commit is durable.
    AnswersBeforeDurable,
    /// The agent follows an assignment that its store does not hold.
    FollowsBeforeDurable,
    /// The server does not tell a node which pods must end.
    ForgetsToStop,
    /// A watch loses an event now and then.
    LosesEvents,
    /// A watch that goes on begins one revision too early.
    RepeatsEvents,
    /// The store forgets which addresses were given, and the generator begins anew with each start.
    ForgetsAddresses,
    /// The agent says that a pod is gone while its processes live.
    SaysGoneTooEarly,
    /// The stream of a node whose pods are lost goes on.
    KeepsStreamsOfTheLost,
    /// Supervisors take a lease for longer than it is granted for.
    NeverFences,
    /// Placement is done on a state that forgets what other pods ask for.
    OverCommits,
    /// The server does not hear which labels nodes have.
    ForgetsLabels,
    /// The agent says that a pod runs before it does.
    SaysRunningTooEarly,
    /// The server takes a node that is lost for one of which an operator says that it is dead.
    DeclaresDead,
    /// The driver of deploys forgets at each look since when pods do well.
    ForgetsTheGood,
    /// The driver of deploys takes every gate for passed, whatever the new pods do.
    PassesUnseen,
    /// The store forgets a deploy when it gives up.
    ForgetsWhoGaveUp,
    /// The store holds a deploy at the step before.
    RecordsTheLastStep,
    /// The server does not hear which agent says hello: one that was taken down, or another.
    ForgetsSessions,
    /// A node that is taken down says so before what only one node may run has ended.
    LeavesTooEarly,
    /// A server that goes on from a backup does not wait for leases of the one before.
    DoesNotWaitForLeases,
    /// A restored cluster goes on with the numbers of its backup.
    KeepsTheNumbers,
    /// Of several servers: their store takes every transaction, whatever it relies on.
    StoreTakesAll,
    /// Of several servers: one that takes the lead does not read what is there.
    BeginsAnew,
    /// Of several servers: a watch that goes on at another begins one revision too late.
    ResumesTooLate,
    /// Of several servers: one that follows misses an entry of the log now and then.
    MissesAnEntry,
}

impl Broken {
    /// All of them.
    pub const ALL: [Broken; 21] = [
        Broken::AnswersBeforeDurable,
        Broken::FollowsBeforeDurable,
        Broken::ForgetsToStop,
        Broken::LosesEvents,
        Broken::RepeatsEvents,
        Broken::ForgetsAddresses,
        Broken::SaysGoneTooEarly,
        Broken::KeepsStreamsOfTheLost,
        Broken::NeverFences,
        Broken::OverCommits,
        Broken::ForgetsLabels,
        Broken::SaysRunningTooEarly,
        Broken::DeclaresDead,
        Broken::ForgetsTheGood,
        Broken::PassesUnseen,
        Broken::ForgetsWhoGaveUp,
        Broken::RecordsTheLastStep,
        Broken::ForgetsSessions,
        Broken::LeavesTooEarly,
        Broken::DoesNotWaitForLeases,
        Broken::KeepsTheNumbers,
    ];

    /// Those that several servers make.
    pub const OF_SEVERAL: [Broken; 5] = [
        Broken::AnswersBeforeDurable,
        Broken::StoreTakesAll,
        Broken::BeginsAnew,
        Broken::ResumesTooLate,
        Broken::MissesAnEntry,
    ];
}

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Of everything that happened: two runs of one seed have the same.
    pub hash: u64,
    /// How much happened.
    pub figures: Figures,
    /// What did not hold, with the last steps before it.
    pub failure: Option<Failure>,
}

/// How much happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Events of the simulated world.
    pub steps: u64,
    /// Simulated time.
    pub seconds: u64,
    /// Revisions that were committed.
    pub revisions: u64,
    /// Writes that were acknowledged to operators.
    pub acknowledged: u64,
    /// Messages that arrived.
    pub messages: u64,
    /// Faults of every kind.
    pub faults: u64,
    /// Times that a machine said of another what is not so.
    pub lies: u64,
    /// Times that a node was declared lost.
    pub lost: u64,
    /// Times that a reader of several servers was too slow for each revision.
    pub lagged: u64,
    /// Times that one of several servers led with the copy that it kept while it followed.
    pub copies: u64,
    /// Times that the log did not go on from a copy.
    pub astray: u64,
    /// Times that a node was taken down.
    pub left: u64,
    /// Times that an operator restored a backup.
    pub restored: u64,
    /// Deploys that were promoted, and that went back.
    pub deploys: [u64; 2],
    /// Messages that load balancers applied.
    pub watched: u64,
}

/// What did not hold.
#[derive(Clone, Debug)]
pub struct Failure {
    /// In words.
    pub what: String,
    /// The last steps, oldest first.
    pub trace: Vec<String>,
}

/// Plays one seed to its end.
#[must_use]
pub fn play(seed: u64, options: &Options) -> Outcome {
    let mut world = world::World::new(seed, *options);
    let played = catch_unwind(AssertUnwindSafe(|| world.play()));
    outcome(played, &world.shared)
}

/// Plays one seed of several servers over one store to its end.
#[must_use]
pub fn play_several(seed: u64, options: &Options) -> Outcome {
    let mut world = several::Several::new(seed, *options);
    let played = catch_unwind(AssertUnwindSafe(|| world.play()));
    outcome(played, &world.shared)
}

fn outcome(played: std::thread::Result<Result<(), String>>, shared: &shared::Shared) -> Outcome {
    let what = match played {
        Ok(Ok(())) => None,
        Ok(Err(what)) => Some(what),
        Err(panic) => Some(format!("panic: {}", words(&panic))),
    };
    let (figures, trace) = (shared.figures(), &shared.trace);
    Outcome { hash: trace.hash(), figures, failure: what.map(|what| Failure { what, trace: trace.last() }) }
}

fn words(panic: &Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}
