//! The server's side of attached nodes.

use std::{collections::VecDeque, sync::Arc};

use hextet_api::v1::{self, node_report::Report};
use scheduler::convert;
use scheduler_core::{
    change::Revision,
    event::Event,
    node::Hello,
    session::{Inbox, Told},
    transition::Origin,
};

use super::{Answer, RETRY, REVISIONS_KEPT, Request, Server, Then};
use crate::{
    Broken,
    clock::ms,
    network::{End, Packet, StreamId},
    shared::{ServerDue, Shared},
};

pub(super) struct Session {
    pub(super) node: String,
    inbox: Inbox,
    /// None while its hello is being written down.
    told: Option<Told>,
    is_first: bool,
    early: Vec<v1::NodeReport>,
    backlog: VecDeque<Arc<Revision>>,
    has_lagged: bool,
    is_telling: bool,
    is_writing: bool,
    is_leaving: bool,
}

/// What is being written down of an inbox.
pub(super) struct Writing {
    taken: Inbox,
    rest: VecDeque<Event>,
}

impl Server {
    pub(super) fn hear_hello(&mut self, stream: StreamId, node: String, hello: Hello, shared: &mut Shared) {
        let now = self.clock.moment(shared.now);
        let process = self.process_mut();
        process.leases.renew(&node, now);
        let session = Session {
            node: node.clone(),
            inbox: Inbox::default(),
            told: None,
            is_first: true,
            early: Vec::new(),
            backlog: VecDeque::new(),
            has_lagged: false,
            is_telling: false,
            is_writing: false,
            is_leaving: false,
        };
        process.sessions.insert(stream, session);
        let hello = misheard(hello, shared);
        let event = Event::NodeHello(node.clone(), hello);
        self.ask(Request { event, origin: origin(&node), then: Then::Greeted(stream) }, shared);
    }

    pub(super) fn greeted(&mut self, stream: StreamId, shared: &mut Shared) {
        let Some(session) = self.process_mut().sessions.get_mut(&stream) else { return };
        let node = session.node.clone();
        session.told = Some(Told::new(&node));
        let early = std::mem::take(&mut session.early);
        let before = self.process_mut().places.insert(node.clone(), stream);
        if let Some(before) = before {
            shared.note(format!("{node}: stream {stream} takes over from {before}"));
            self.hang_up(before, false, shared);
            self.process_mut().places.insert(node, stream);
        }
        self.tell_soon(stream, shared);
        early.into_iter().for_each(|report| self.hear_report(stream, report, shared));
    }

    pub(super) fn hear_report(&mut self, stream: StreamId, report: v1::NodeReport, shared: &mut Shared) {
        let now = self.clock.moment(shared.now);
        let process = self.process_mut();
        let Some(session) = process.sessions.get_mut(&stream) else { return };
        if session.told.is_none() {
            return session.early.push(report);
        }
        process.leases.renew(&session.node, now);
        let taken = match report.report {
            Some(Report::Pods(pods)) => pods.pods.into_iter().try_for_each(|pod| {
                session.inbox.report(convert::pod_report(pod).expect("a report is well formed"))
            }),
            Some(Report::Conflict(conflict)) => {
                session.inbox.conflict(convert::conflict(conflict).expect("a conflict is well formed"))
            }
            Some(Report::Leaving(leaving)) => return self.hear_leaving(stream, leaving.session, shared),
            other => return shared.wrong(format!("the server was told {other:?}")),
        };
        if let Err(full) = taken {
            shared.wrong(full.to_string());
        }
        if process.shown.nodes().get(&session.node).is_some_and(|node| !node.phase.reports()) {
            session.inbox.returned();
        }
        self.write_down(stream, shared);
    }

    /// The node is taken down. What it has said before counts no more: it would bring the node back.
    fn hear_leaving(&mut self, stream: StreamId, left: u64, shared: &mut Shared) {
        let Some(session) = self.process_mut().sessions.get_mut(&stream) else { return };
        session.inbox.take();
        session.is_leaving = true;
        let node = session.node.clone();
        self.process_mut().places.remove(&node);
        self.give_back(&node);
        let event = Event::NodeLeaving(node.clone(), left);
        self.ask(Request { event, origin: origin(&node), then: Then::Left(stream) }, shared);
    }

    pub(super) fn write_down(&mut self, stream: StreamId, shared: &mut Shared) {
        let Some(session) = self.process_mut().sessions.get_mut(&stream).filter(|one| !one.is_writing) else {
            return;
        };
        let Some(taken) = session.inbox.take() else { return };
        session.is_writing = true;
        let rest = taken.clone().events(&session.node).into();
        self.write_next(stream, Writing { taken, rest }, shared);
    }

    fn write_next(&mut self, stream: StreamId, mut writing: Writing, shared: &mut Shared) {
        let session = self.process_mut().sessions.get_mut(&stream);
        let Some(session) = session.filter(|session| !session.is_leaving) else { return };
        match writing.rest.pop_front() {
            Some(event) => {
                let origin = origin(&session.node);
                self.ask(Request { event, origin, then: Then::WrittenDown(stream, writing) }, shared);
            }
            None => {
                session.is_writing = false;
                self.write_down(stream, shared);
            }
        }
    }

    pub(super) fn written_down(
        &mut self,
        stream: StreamId,
        writing: Writing,
        answer: Answer,
        shared: &mut Shared,
    ) {
        let Some(session) = self.process_mut().sessions.get_mut(&stream) else { return };
        match answer {
            Answer::Done(..) => self.write_next(stream, writing, shared),
            Answer::Refused(why) => {
                shared.note(format!("a report is refused: {why}"));
                self.hang_up(stream, false, shared);
            }
            Answer::Store => {
                session.inbox.put_back(writing.taken);
                session.is_writing = false;
                self.plan(shared, RETRY, ServerDue::WriteDown(stream));
            }
        }
    }

    pub(super) fn is_news(&mut self, stream: StreamId, revision: &Arc<Revision>, shared: &mut Shared) {
        let Some(session) = self.process_mut().sessions.get_mut(&stream) else { return };
        if session.told.is_none() {
            return;
        }
        session.backlog.push_back(revision.clone());
        if session.backlog.len() > REVISIONS_KEPT {
            session.backlog.pop_front();
            session.has_lagged = true;
        }
        self.tell_soon(stream, shared);
    }

    fn tell_soon(&mut self, stream: StreamId, shared: &mut Shared) {
        let Some(session) = self.process_mut().sessions.get_mut(&stream) else { return };
        if !std::mem::replace(&mut session.is_telling, true) {
            let wait = shared.between(0, 3);
            self.plan(shared, wait, ServerDue::Tell(stream));
        }
    }

    pub(super) fn tell(&mut self, stream: StreamId, shared: &mut Shared) {
        if !self.process_mut().sessions.contains_key(&stream) {
            return;
        }
        if !shared.network.has_room(stream, End::Client) {
            return self.plan(shared, ms(20), ServerDue::Tell(stream));
        }
        let epoch = self.epoch();
        let process = self.process_mut();
        let shown = process.shown.clone();
        let Some(session) = process.sessions.get_mut(&stream) else { return };
        let Some(told) = &mut session.told else { return };
        session.is_telling = false;
        let telling = if std::mem::take(&mut session.is_first) {
            Some(told.all(&shown))
        } else if std::mem::take(&mut session.has_lagged) {
            told.what_changed(&shown)
        } else {
            let news = session.backlog.pop_front().filter(|revision| told.is_news(revision));
            news.and_then(|_| told.what_changed(&shown))
        };
        let more = !session.backlog.is_empty();
        if let Some(mut telling) = telling {
            if shared.is_broken(Broken::ForgetsToStop) && !telling.full {
                telling.diff.removed_pods.clear();
            }
            let message = convert::assignment(telling.diff, telling.revision, &epoch, telling.full);
            shared.send(stream, End::Client, Packet::Assignment(message));
        }
        if more {
            self.tell_soon(stream, shared);
        }
    }
}

fn origin(node: &str) -> Origin {
    Origin { changer: format!("node:{node}"), message: String::new() }
}

/// What the server makes of a hello when it is broken so.
fn misheard(hello: Hello, shared: &Shared) -> Hello {
    let mut hello = hello;
    if shared.is_broken(Broken::OverCommits) {
        hello.capacity.cpu.0 *= 2;
    }
    if shared.is_broken(Broken::ForgetsSessions) {
        hello.session = 0;
    }
    if shared.is_broken(Broken::ForgetsLabels) {
        hello.labels.clear();
    }
    hello
}
