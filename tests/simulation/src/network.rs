//! Streams between machines: ordered, as TCP's are, late, and sometimes broken. Streams overtake each other.
//!
//! A packet that is lost is sent again and only comes late. While a direction is cut nothing arrives in it; what was
//! sent arrives after the cut, unless an end has given the stream up by then.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use hextet_api::v1;
use scheduler_core::{endpoint::Selector, node::Hello, watch};

/// A machine or a load balancer; the server is none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Host {
    Node(usize),
    Balancer(usize),
}

/// An end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    Server,
    Client,
}

pub(crate) type StreamId = u64;

/// What travels.
#[derive(Clone, Debug)]
pub(crate) enum Packet {
    Hello(String, Hello),
    Report(v1::NodeReport),
    Assignment(v1::Assignment),
    /// The first word of a stream that holds a lease: whose.
    Hold(String),
    Renewal(v1::lease_renewal::Renewal),
    Answer(v1::lease_answer::Answer),
    Subscribe {
        selector: Selector,
        epoch: String,
        from: u64,
    },
    Acknowledge(u64),
    Compacted,
    Watched(String, watch::Message),
    /// The stream's end, behind all that was said.
    Closed,
}

/// Packets on their way before who sends more must wait.
pub(crate) const WINDOW: usize = 16;

#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) client: Host,
    to_server: Lane,
    to_client: Lane,
}

#[derive(Debug, Default)]
struct Lane {
    packets: VecDeque<Packet>,
    /// Somebody listens at its far end.
    open: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Network {
    last: StreamId,
    streams: BTreeMap<StreamId, Stream>,
    /// Directions in which nothing arrives: from this host to the server, or to it.
    cuts: BTreeSet<(Host, End)>,
}

impl Network {
    pub(crate) fn open(&mut self, client: Host) -> StreamId {
        self.last += 1;
        let lane = || Lane { open: true, ..Lane::default() };
        self.streams.insert(self.last, Stream { client, to_server: lane(), to_client: lane() });
        self.last
    }

    fn lane(&mut self, stream: StreamId, to: End) -> Option<&mut Lane> {
        let stream = self.streams.get_mut(&stream)?;
        Some(match to {
            End::Server => &mut stream.to_server,
            End::Client => &mut stream.to_client,
        })
    }

    pub(crate) fn client(&self, stream: StreamId) -> Option<Host> {
        self.streams.get(&stream).map(|stream| stream.client)
    }

    /// Puts a packet on its way; true when nothing else was on the way, so that somebody must carry it.
    pub(crate) fn send(&mut self, stream: StreamId, to: End, packet: Packet) -> bool {
        let Some(lane) = self.lane(stream, to).filter(|lane| lane.open) else { return false };
        lane.packets.push_back(packet);
        lane.packets.len() == 1
    }

    pub(crate) fn has_room(&mut self, stream: StreamId, to: End) -> bool {
        self.lane(stream, to).is_some_and(|lane| lane.packets.len() < WINDOW)
    }

    /// The next packet to arrive, and whether others follow.
    pub(crate) fn arrive(&mut self, stream: StreamId, to: End) -> Option<(Packet, bool)> {
        let lane = self.lane(stream, to)?;
        let packet = lane.packets.pop_front()?;
        Some((packet, !lane.packets.is_empty()))
    }

    /// An end listens no more: what was on its way to it is gone.
    pub(crate) fn deafen(&mut self, stream: StreamId, end: End) {
        if let Some(lane) = self.lane(stream, end) {
            lane.open = false;
            lane.packets.clear();
        }
        if self.streams.get(&stream).is_some_and(|stream| !stream.to_server.open && !stream.to_client.open) {
            self.streams.remove(&stream);
        }
    }

    /// What is on its way to an end from some packet on is lost.
    pub(crate) fn lose(&mut self, stream: StreamId, to: End, kept: usize) -> bool {
        let Some(lane) = self.lane(stream, to) else { return false };
        lane.packets.truncate(kept);
        lane.packets.is_empty()
    }

    pub(crate) fn on_the_way(&mut self, stream: StreamId, to: End) -> usize {
        self.lane(stream, to).map_or(0, |lane| lane.packets.len())
    }

    pub(crate) fn is_listening(&mut self, stream: StreamId, end: End) -> bool {
        self.lane(stream, end).is_some_and(|lane| lane.open)
    }

    pub(crate) fn streams_of(&self, host: Host) -> Vec<StreamId> {
        self.streams.iter().filter(|(_, stream)| stream.client == host).map(|(id, _)| *id).collect()
    }

    pub(crate) fn all(&self) -> Vec<StreamId> {
        self.streams.keys().copied().collect()
    }

    pub(crate) fn cut(&mut self, host: Host, to: End) {
        self.cuts.insert((host, to));
    }

    pub(crate) fn heal(&mut self, host: Host, to: End) {
        self.cuts.remove(&(host, to));
    }

    pub(crate) fn heal_all(&mut self) {
        self.cuts.clear();
    }

    pub(crate) fn is_cut(&self, host: Host, to: End) -> bool {
        self.cuts.contains(&(host, to))
    }

    pub(crate) fn is_cut_off(&self, host: Host) -> bool {
        self.is_cut(host, End::Server) || self.is_cut(host, End::Client)
    }
}
