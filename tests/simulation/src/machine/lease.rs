//! The thread of the agent that holds the node's lease, on a stream of its own, and the supervisors that look at it.

use std::{collections::BTreeMap, time::Duration};

use hextet_api::v1::{LeaseGrant, LookFor, NeighbourSeen, lease_answer::Answer, lease_renewal::Renewal};
use scheduler_core::time::Moment;

use super::Machine;
use crate::{
    Broken,
    clock::{Time, ms},
    network::{End, Packet, StreamId},
    server::LEASE,
    shared::{AgentDue, Shared, What},
};

/// A stream on which nothing comes for so long is given up for another.
const SILENCE_MAX: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(250);
const SENT_MAX: usize = 64;
/// How often supervisors look at the lease.
const LEASE_LOOK: Duration = Duration::from_millis(100);

/// What a machine says when it is asked about another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Witness {
    Honest,
    /// It says the truth when nobody waits for it any more.
    Slow,
    SeesNobody,
    SeesEverybody,
}

/// What dies with the agent.
pub(super) struct Renewer {
    pub(super) stream: Option<StreamId>,
    period: Duration,
    number: u64,
    /// When each number was sent that has no grant yet.
    sent: BTreeMap<u64, Moment>,
    heard: Moment,
    /// The node is taken down: it is not renewed any more.
    is_given_back: bool,
    /// Until when, and in which term.
    granted: Option<(Moment, u64)>,
}

impl Renewer {
    pub(super) fn new() -> Renewer {
        let (sent, heard) = (BTreeMap::new(), Moment::default());
        Renewer { stream: None, period: RETRY, number: 0, sent, heard, is_given_back: false, granted: None }
    }

    pub(super) fn give_back(&mut self) {
        self.is_given_back = true;
    }
}

impl Machine {
    pub(super) fn connect_lease(&mut self, server_listens: bool, shared: &mut Shared) {
        if self.agent_mut().lease.stream.is_some() {
            return;
        }
        if !server_listens || self.is_stranger || shared.network.is_cut_off(self.host()) {
            return self.plan(shared, RETRY, AgentDue::ConnectLease);
        }
        let stream = shared.network.open(self.host());
        let heard = self.clock.moment(shared.now);
        let lease = &mut self.agent_mut().lease;
        (lease.stream, lease.heard) = (Some(stream), heard);
        shared.send(stream, End::Server, Packet::Hold(self.name.clone()));
        self.plan(shared, ms(0), AgentDue::Renew(stream));
    }

    pub(super) fn renew(&mut self, stream: StreamId, shared: &mut Shared) {
        let now = self.clock.moment(shared.now);
        let lease = &mut self.agent_mut().lease;
        if lease.stream != Some(stream) || lease.is_given_back {
            return;
        }
        if now - lease.heard > SILENCE_MAX {
            self.let_go_of_lease(stream, shared);
            return;
        }
        lease.number += 1;
        lease.sent.insert(lease.number, now);
        if lease.sent.len() > SENT_MAX {
            lease.sent.pop_first();
        }
        let (number, period) = (lease.number, lease.period);
        if shared.network.has_room(stream, End::Server) {
            shared.send(stream, End::Server, Packet::Renewal(Renewal::Number(number)));
        }
        self.plan(shared, period, AgentDue::Renew(stream));
    }

    /// The lease stream is no more; true when it was that.
    pub(super) fn let_go_of_lease(&mut self, stream: StreamId, shared: &mut Shared) -> bool {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.lease.stream == Some(stream)) else {
            return false;
        };
        agent.lease.stream = None;
        shared.drop_stream(stream, End::Client, false);
        self.plan(shared, RETRY, AgentDue::ConnectLease);
        true
    }

    pub(super) fn hear_answer(
        &mut self,
        stream: StreamId,
        answer: Answer,
        alive: &[bool],
        shared: &mut Shared,
    ) {
        let now = self.clock.moment(shared.now);
        self.agent_mut().lease.heard = now;
        match answer {
            Answer::Grant(grant) => self.granted(&grant, shared),
            Answer::LookFor(LookFor { node, .. }) => self.look_for(stream, node, alive, shared),
        }
    }

    /// The wire between the machines is whole: a kernel answers as long as it has power. What is said of it may be
    /// another thing, and late.
    fn look_for(&mut self, stream: StreamId, node: String, alive: &[bool], shared: &mut Shared) {
        let number: usize = node[1..].parse().expect("a machine's name");
        let is_alive = alive[number];
        let (is_there, wait) = match self.witness {
            Witness::Honest => (is_alive, ms(0)),
            Witness::Slow => (is_alive, shared.between(100, 4_000)),
            Witness::SeesNobody => (false, ms(0)),
            Witness::SeesEverybody => (true, ms(0)),
        };
        if is_there != is_alive {
            shared.figures.lies += 1;
        }
        self.plan(shared, wait, AgentDue::Testify(stream, NeighbourSeen { node, is_there }));
    }

    pub(super) fn testify(&mut self, stream: StreamId, seen: NeighbourSeen, shared: &mut Shared) {
        if self.agent_mut().lease.stream == Some(stream) {
            shared.send(stream, End::Server, Packet::Renewal(Renewal::Seen(seen)));
        }
    }

    fn granted(&mut self, grant: &LeaseGrant, shared: &mut Shared) {
        let lease = &mut self.agent_mut().lease;
        lease.period = Duration::from_millis(grant.renew_ms.into());
        let later = lease.sent.split_off(&grant.number.saturating_add(1));
        let sent = lease.sent.remove(&grant.number);
        lease.sent = later;
        if let Some(sent) = sent {
            let until = sent + Duration::from_millis(grant.lease_ms.into());
            self.agent_mut().lease.granted = Some((until, grant.term));
            self.write_lease(shared);
        }
    }

    /// A grant is good in the term of the assignment that is followed. Until the first grant, one of the agent before
    /// may be good.
    pub(super) fn write_lease(&mut self, shared: &Shared) {
        let never_ends = shared.is_broken(Broken::NeverFences);
        let agent = self.agent_mut();
        let followed = agent.roster.assignment().term_of_singletons();
        if let Some((until, term)) = agent.lease.granted {
            let until = if never_ends { until + LEASE * 10 } else { until };
            self.lease_file = (followed == Some(term) && !agent.lease.is_given_back).then_some(until);
        }
    }

    pub(super) fn lease_runs(&self, now: Time) -> bool {
        self.lease_file.is_some_and(|until| self.clock.moment(now) < until)
    }

    /// Supervisors of pods of which there may only be one look whether they may run, and go on looking.
    pub(crate) fn look_at_lease(&mut self, shared: &mut Shared) {
        self.looks_at_lease = false;
        let runs = self.lease_runs(shared.now);
        let mut changed = Vec::new();
        for (pod, process) in self.processes.iter_mut().filter(|(_, process)| process.is_single) {
            if std::mem::replace(&mut process.lives, runs) != runs {
                changed.push(pod.clone());
            }
        }
        for pod in changed {
            shared.note(format!(
                "{}: {pod} {} with the lease",
                self.name,
                if runs { "lives" } else { "ends" }
            ));
            self.keeper_hears(&pod, shared);
        }
        self.look_at_lease_soon(shared);
    }

    pub(super) fn look_at_lease_soon(&mut self, shared: &mut Shared) {
        let any = self.processes.values().any(|process| process.is_single);
        if any && !std::mem::replace(&mut self.looks_at_lease, true) {
            shared.plan(LEASE_LOOK, What::Supervisors(self.number));
        }
    }
}
