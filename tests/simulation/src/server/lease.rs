//! The server's side of leases: renewals, grants, and questions about nodes that are silent.

use hextet_api::v1::{LeaseGrant, LookFor, NeighbourSeen, lease_answer::Answer, lease_renewal::Renewal};
use scheduler_core::{
    event::Event,
    lease::{self, Finding, Look},
    transition::Origin,
};

use super::{Request, Server, Then, by_scheduler};
use crate::{
    Broken,
    network::{End, Packet, StreamId},
    shared::{ServerDue, Shared},
};

const LOOKS_PER_SILENCE: u32 = 10;
const RENEWALS_PER_SILENCE: u32 = 4;

/// One node's lease stream.
pub(super) struct Holder {
    node: String,
    /// The state is being told that the node reports again.
    is_returning: bool,
}

impl Server {
    pub(super) fn hold(&mut self, stream: StreamId, node: String) {
        let process = self.process_mut();
        // The stream before it is read no more.
        let before = process.leases_held.insert(node.clone(), stream);
        before.into_iter().for_each(|before| drop(process.holders.remove(&before)));
        process.holders.insert(stream, Holder { node, is_returning: false });
    }

    /// A lease stream has ended, if it was one.
    pub(super) fn let_go(&mut self, stream: StreamId, shared: &mut Shared) {
        let now = self.clock.moment(shared.now);
        let process = self.process_mut();
        let Some(holder) = process.holders.remove(&stream) else { return };
        process.leases.ended(&holder.node, now);
        if process.leases_held.get(&holder.node) == Some(&stream) {
            process.leases_held.remove(&holder.node);
        }
    }

    /// The node is taken down: renewals that are on their way would bring it back.
    pub(super) fn give_back(&mut self, node: &str) {
        let process = self.process_mut();
        if let Some(stream) = process.leases_held.remove(node) {
            process.holders.remove(&stream);
        }
    }

    pub(super) fn hear_renewal(&mut self, stream: StreamId, renewal: Renewal, shared: &mut Shared) {
        let Some(holder) = self.process_mut().holders.get(&stream) else { return };
        let node = holder.node.clone();
        match renewal {
            Renewal::Number(number) => self.renew(stream, &node, number, shared),
            Renewal::Seen(NeighbourSeen { node: about, is_there }) => {
                self.process_mut().leases.answered(&node, &about, is_there);
            }
            // No machine is copied here.
            Renewal::Holder(_) => {}
        }
    }

    fn renew(&mut self, stream: StreamId, node: &str, number: u64, shared: &mut Shared) {
        let now = self.clock.moment(shared.now);
        let process = self.process_mut();
        process.leases.renew(node, now);
        let Some(lease) = process.leases.grant(node, now) else {
            return self.returns(stream, node, shared);
        };
        let term = process.shown.nodes().get(node).map_or(0, |node| node.term);
        let lease_ms = lease.as_millis() as u32;
        let renew_ms = (process.leases.silence_max() / RENEWALS_PER_SILENCE).as_millis() as u32;
        if shared.network.has_room(stream, End::Client) {
            let grant = LeaseGrant { number, lease_ms, renew_ms, term };
            shared.send(stream, End::Client, Packet::Answer(Answer::Grant(grant)));
        }
    }

    /// A node that was taken down comes back by a hello alone.
    fn returns(&mut self, stream: StreamId, node: &str, shared: &mut Shared) {
        let shown = &self.process_mut().shown;
        if shown.nodes().get(node).is_some_and(|node| node.taken_down.is_some()) {
            return;
        }
        let Some(holder) = self.process_mut().holders.get_mut(&stream) else { return };
        if !std::mem::replace(&mut holder.is_returning, true) {
            let origin = Origin { changer: format!("node:{node}"), message: String::new() };
            let event = Event::NodeReturned(node.to_owned());
            self.ask(Request { event, origin, then: Then::Returned(stream) }, shared);
        }
    }

    pub(super) fn returned(&mut self, stream: StreamId) {
        if let Some(holder) = self.process_mut().holders.get_mut(&stream) {
            holder.is_returning = false;
        }
    }

    pub(super) fn look_at_leases(&mut self, shared: &mut Shared) {
        let now = self.clock.moment(shared.now);
        let process = self.process_mut();
        let shown = process.shown.clone();
        let Look { questions, findings } = process.leases.look(&shown, now);
        let wait = process.leases.silence_max() / LOOKS_PER_SILENCE;
        for question in questions {
            let Some(stream) = self.process_mut().leases_held.get(&question.witness).copied() else {
                continue;
            };
            if shared.network.has_room(stream, End::Client) {
                let look_for = LookFor { node: question.about, underlay: vec![], routed: question.routed };
                shared.send(stream, End::Client, Packet::Answer(Answer::LookFor(look_for)));
            }
        }
        if self.process_mut().telling_leases == 0 {
            self.tell_findings(findings, shared);
        }
        self.plan(shared, wait, ServerDue::LookAtLeases);
    }

    fn tell_findings(&mut self, findings: Vec<Finding>, shared: &mut Shared) {
        let lost = findings.iter().filter(|finding| matches!(finding, Finding::Lost(_)));
        shared.figures.lost += lost.count() as u64;
        for event in lease::events(findings) {
            if let Event::LeaseEnded(nodes) = &event
                && shared.is_broken(Broken::DeclaresDead)
            {
                let dead = Event::NodeDead(nodes[0].clone());
                self.process_mut().telling_leases += 1;
                self.ask(by_scheduler(dead, Then::LeasesTold), shared);
            }
            self.process_mut().telling_leases += 1;
            self.ask(by_scheduler(event, Then::LeasesTold), shared);
        }
    }
}
