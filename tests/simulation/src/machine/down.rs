//! A node that is taken down: it ends what only one node may run, tells the server, and ends everything else.

use std::time::Duration;

use hextet_api::v1::{NodeLeaving, NodeReport, lease_renewal::Renewal, node_report::Report};

use super::Machine;
use crate::{
    Broken,
    network::{End, Packet},
    shared::{AgentDue, Shared, What},
};

/// How long it waits for the server's word.
const LEAVE_MAX: Duration = Duration::from_secs(3);

impl Machine {
    /// Somebody takes the node down.
    pub(crate) fn take_down(&mut self, shared: &mut Shared) {
        let Some(agent) = self.agent.as_mut().filter(|agent| !agent.is_leaving && !agent.is_booting) else {
            return;
        };
        agent.is_leaving = true;
        self.is_down = true;
        shared.figures.left += 1;
        shared.note(format!("{} is taken down", self.name));
        let wait = shared.between(5, 1_500);
        self.plan(shared, wait, AgentDue::Leave);
    }

    /// What an agent still does that takes its node down.
    pub(super) fn is_of_leaving(due: &AgentDue) -> bool {
        match due {
            AgentDue::Leave | AgentDue::Echo | AgentDue::Down => true,
            // Another thread renews the lease until it is given back.
            AgentDue::Renew(_) | AgentDue::Testify(..) => true,
            _ => false,
        }
    }

    /// What only one node may run has ended; the lease is given back for good, and the server is told.
    pub(super) fn leave(&mut self, shared: &mut Shared) {
        if !shared.is_broken(Broken::LeavesTooEarly) {
            self.processes.retain(|_, process| !process.is_single);
            self.lease_file = None;
        }
        self.agent_mut().lease.give_back();
        if let Some(stream) = self.agent_mut().stream {
            let report = NodeReport {
                report: Some(Report::Leaving(NodeLeaving {
                    session: self.hello.session,
                    ..NodeLeaving::default()
                })),
            };
            shared.send(stream, End::Server, Packet::Report(report));
        }
        if shared.chance(0.5) {
            let wait = shared.between(0, 3_000);
            self.plan(shared, wait, AgentDue::Echo);
        }
        self.plan(shared, LEAVE_MAX, AgentDue::Down);
    }

    /// A hello and a renewal from before: order is kept within a connection, and this agent may have had others.
    pub(super) fn echo(&mut self, shared: &mut Shared) {
        if shared.network.is_cut_off(self.host()) {
            return;
        }
        shared.note(format!("{}: what it said before arrives late", self.name));
        let [attached, held] = [(); 2].map(|()| shared.network.open(self.host()));
        shared.send(attached, End::Server, Packet::Hello(self.name.clone(), self.hello.clone()));
        shared.send(held, End::Server, Packet::Hold(self.name.clone()));
        shared.send(held, End::Server, Packet::Renewal(Renewal::Number(1)));
        for stream in [attached, held] {
            shared.drop_stream(stream, End::Client, true);
        }
    }

    /// The stream's end says that the server has written it down.
    pub(super) fn hear_while_leaving(&mut self, packet: &Packet, shared: &mut Shared) {
        if matches!(packet, Packet::Closed) {
            let wait = shared.between(5, 2_000);
            self.plan(shared, wait, AgentDue::Down);
        }
    }

    /// Everything ends but what is on the disk, until somebody brings the node back.
    pub(super) fn down(&mut self, shared: &mut Shared) {
        let agent = self.agent.take();
        let streams = agent.into_iter().flat_map(|agent| [agent.stream, agent.lease.stream]).flatten();
        streams.for_each(|stream| shared.drop_stream(stream, End::Client, false));
        self.processes.clear();
        self.kernel.clear();
        self.lease_file = None;
        shared.note(format!("{} is down", self.name));
        let wait = shared.between(500, 30_000);
        shared.plan(wait, What::NodeUp(self.number));
    }

    pub(crate) fn bring_up(&mut self, shared: &mut Shared) {
        if self.agent.is_none() {
            self.is_down = false;
            self.start(shared);
        }
    }
}
