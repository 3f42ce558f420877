//! A load balancer: follows the addresses of one selector, applies what it is told, and says so.

use scheduler_core::{
    endpoint::{Selection, Selector},
    watch::Message,
};

use crate::{
    clock::Time,
    network::{End, Host, Packet, StreamId},
    shared::{Shared, What, backoff},
};

pub(crate) struct Balancer {
    number: usize,
    pub(crate) selector: Selector,
    pub(crate) life: u64,
    pub(crate) epoch: String,
    pub(crate) revision: u64,
    pub(crate) known: Selection,
    pub(crate) stream: Option<StreamId>,
    failures: u32,
    /// It is busy, and reads nothing.
    pub(crate) busy_until: Time,
}

impl Balancer {
    pub(crate) fn new(number: usize, selector: Selector) -> Balancer {
        Balancer {
            number,
            selector,
            life: 0,
            epoch: String::new(),
            revision: 0,
            known: Selection::new(),
            stream: None,
            failures: 0,
            busy_until: Time::default(),
        }
    }

    /// Starts with nothing: what it knew died with it.
    pub(crate) fn restart(&mut self, shared: &mut Shared) {
        if let Some(stream) = self.stream.take() {
            shared.drop_stream(stream, End::Client, false);
        }
        (self.epoch, self.revision, self.known) = (String::new(), 0, Selection::new());
        self.life += 1;
        shared.note(format!("balancer {} starts", self.number));
        let wait = shared.between(10, 2_000);
        shared.plan(wait, What::Balancer(self.number, self.life));
    }

    pub(crate) fn connect(&mut self, server_listens: bool, shared: &mut Shared) {
        if self.stream.is_some() {
            return;
        }
        let host = Host::Balancer(self.number);
        if !server_listens || shared.network.is_cut_off(host) {
            return self.connect_later(shared);
        }
        self.failures = 0;
        let stream = shared.network.open(host);
        shared.note(format!(
            "balancer {} asks by stream {stream} from revision {}",
            self.number, self.revision
        ));
        self.stream = Some(stream);
        let (selector, epoch, from) = (self.selector.clone(), self.epoch.clone(), self.revision);
        shared.send(stream, End::Server, Packet::Subscribe { selector, epoch, from });
    }

    fn connect_later(&mut self, shared: &mut Shared) {
        self.failures = self.failures.saturating_add(1);
        let wait = backoff(shared, self.failures, 100, 5_000);
        shared.plan(wait, What::Balancer(self.number, self.life));
    }

    /// Applies a message; true when it should now know what the cluster was at its revision.
    pub(crate) fn receive(&mut self, stream: StreamId, packet: Packet, shared: &mut Shared) -> bool {
        if self.stream != Some(stream) {
            shared.drop_stream(stream, End::Client, false);
            return false;
        }
        match packet {
            Packet::Watched(epoch, message) => {
                if self.epoch != epoch {
                    // What it knows of another store says nothing of this one.
                    (self.epoch, self.revision) = (epoch, 0);
                }
                self.apply(message, shared);
                shared.figures.watched += 1;
                if !shared.fault(0.05) {
                    shared.send(stream, End::Server, Packet::Acknowledge(self.revision));
                }
                return true;
            }
            Packet::Compacted => {}
            Packet::Closed => self.detach(stream, shared),
            other => shared.wrong(format!("balancer {} was sent {other:?}", self.number)),
        }
        false
    }

    pub(crate) fn detach(&mut self, stream: StreamId, shared: &mut Shared) {
        if self.stream == Some(stream) {
            self.stream = None;
            shared.drop_stream(stream, End::Client, false);
            self.connect_later(shared);
        }
    }

    fn apply(&mut self, message: Message, shared: &mut Shared) {
        let (revision, is_next) = match message {
            Message::Snapshot { revision, endpoints } => {
                self.known = endpoints.into_iter().map(|endpoint| (endpoint.pod.clone(), endpoint)).collect();
                (revision, revision >= self.revision)
            }
            Message::Event { revision, diff } => {
                diff.apply(&mut self.known);
                (revision, revision > self.revision)
            }
            Message::Bookmark { revision } => (revision, revision >= self.revision),
        };
        if !is_next {
            shared
                .wrong(format!("balancer {} at {} was told of {revision} again", self.number, self.revision));
        }
        self.revision = revision;
    }

    /// Reads nothing for a while.
    pub(crate) fn be_busy(&mut self, shared: &mut Shared) {
        let wait = shared.between(500, 15_000);
        self.busy_until = shared.now + wait;
        shared.note(format!("balancer {} is busy for {} ms", self.number, wait.as_millis()));
    }
}
