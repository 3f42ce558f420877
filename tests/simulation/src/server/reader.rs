//! The server's side of load balancers that watch.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use scheduler_core::{
    change::Revision,
    drain::SubscriberId,
    endpoint::Selector,
    watch::{self, Begin, Message, Reader, Resume},
};

use super::{REVISIONS_KEPT, Server};
use crate::{
    Broken,
    clock::ms,
    network::{End, Packet, StreamId},
    shared::{ServerDue, Shared},
};

const BOOKMARK_INTERVAL: Duration = Duration::from_secs(5);

pub(super) struct ReaderSession {
    pub(super) subscriber: SubscriberId,
    reader: Reader,
    /// Said at the beginning, one after the other.
    waiting: VecDeque<Packet>,
    backlog: VecDeque<Arc<Revision>>,
    has_lagged: bool,
    is_telling: bool,
    is_quiet: bool,
}

impl Server {
    pub(super) fn subscribe(
        &mut self,
        stream: StreamId,
        selector: Selector,
        epoch: &str,
        from: u64,
        shared: &mut Shared,
    ) {
        let from = if shared.is_broken(Broken::RepeatsEvents) { from.saturating_sub(1) } else { from };
        let own = self.epoch();
        let (oldest, disk) = (self.disk.oldest(), &self.disk);
        let process = self.process.as_mut().expect("the server runs");
        let subscriber = process.drains.subscribe(selector.clone(), 0);
        let mut reader = Reader::new(selector);
        let resume = Some(Resume { same_store: epoch == own, from }).filter(|_| !epoch.is_empty());
        let mut waiting = VecDeque::new();
        let watched = |message| Packet::Watched(own.clone(), message);
        match watch::begin(resume, oldest, process.shown.revision()) {
            Begin::Snapshot => waiting.push_back(watched(reader.snapshot(&process.shown))),
            Begin::Compacted => {
                waiting.push_back(Packet::Compacted);
                waiting.push_back(watched(reader.snapshot(&process.shown)));
            }
            Begin::Replay(from) => {
                reader.skip_to(&process.shown);
                waiting.extend(disk.log_after(from).filter_map(|entry| reader.replay(entry)).map(watched));
                waiting.push_back(watched(reader.bookmark()));
            }
        }
        let (backlog, has_lagged, is_telling, is_quiet) = (VecDeque::new(), false, false, false);
        let session =
            ReaderSession { subscriber, reader, waiting, backlog, has_lagged, is_telling, is_quiet };
        process.readers.insert(stream, session);
        self.tell_reader_soon(stream, shared);
        self.plan(shared, BOOKMARK_INTERVAL, ServerDue::Bookmark(stream));
    }

    pub(super) fn acknowledge(&mut self, stream: StreamId, revision: u64, shared: &mut Shared) {
        let process = self.process_mut();
        let Some(reader) = process.readers.get(&stream) else { return };
        process.drains.acknowledge(reader.subscriber, revision);
        self.look_at_drains(shared);
    }

    pub(super) fn is_news_to_reader(
        &mut self,
        stream: StreamId,
        revision: &Arc<Revision>,
        shared: &mut Shared,
    ) {
        let Some(session) = self.process_mut().readers.get_mut(&stream) else { return };
        session.backlog.push_back(revision.clone());
        if session.backlog.len() > REVISIONS_KEPT {
            session.backlog.pop_front();
            session.has_lagged = true;
        }
        self.tell_reader_soon(stream, shared);
    }

    fn tell_reader_soon(&mut self, stream: StreamId, shared: &mut Shared) {
        let Some(session) = self.process_mut().readers.get_mut(&stream) else { return };
        if !std::mem::replace(&mut session.is_telling, true) {
            let wait = shared.between(0, 3);
            self.plan(shared, wait, ServerDue::TellReader(stream));
        }
    }

    pub(super) fn tell_reader(&mut self, stream: StreamId, shared: &mut Shared) {
        if !self.process_mut().readers.contains_key(&stream) {
            return;
        }
        if !shared.network.has_room(stream, End::Client) {
            return self.plan(shared, ms(20), ServerDue::TellReader(stream));
        }
        let epoch = self.epoch();
        let process = self.process_mut();
        let shown = process.shown.clone();
        let Some(session) = process.readers.get_mut(&stream) else { return };
        session.is_telling = false;
        let packet = session.waiting.pop_front().or_else(|| {
            let message = if std::mem::take(&mut session.has_lagged) {
                session.reader.lagged(&shown)
            } else {
                let revision = session.backlog.pop_front();
                revision.and_then(|revision| session.reader.committed(&revision, || shown.clone()))
            };
            message.map(|message| Packet::Watched(epoch, message))
        });
        let more = !(session.backlog.is_empty() && session.waiting.is_empty());
        if let Some(packet) = packet {
            session.is_quiet = false;
            let is_event = matches!(packet, Packet::Watched(_, Message::Event { .. }));
            if !(is_event && shared.is_broken(Broken::LosesEvents) && shared.chance(0.05)) {
                shared.send(stream, End::Client, packet);
            }
        }
        if more {
            self.tell_reader_soon(stream, shared);
        }
    }

    /// A reader to whom nothing was said for a while hears how far it is.
    pub(super) fn bookmark(&mut self, stream: StreamId, shared: &mut Shared) {
        let epoch = self.epoch();
        let Some(session) = self.process_mut().readers.get_mut(&stream) else { return };
        let is_done = session.waiting.is_empty() && session.backlog.is_empty() && !session.has_lagged;
        if std::mem::replace(&mut session.is_quiet, true) && is_done {
            let bookmark = Packet::Watched(epoch, session.reader.bookmark());
            shared.send(stream, End::Client, bookmark);
        }
        self.plan(shared, BOOKMARK_INTERVAL, ServerDue::Bookmark(stream));
    }
}
