//! What a load balancer knows: the endpoints of its selector, kept up to date from the stream.
//!
//! [`EndpointSet`] is pure: messages go in, changes come out. It survives a lost connection (ask again with
//! [`EndpointSet::subscribe`], which resumes) and, through serde, a restart of its program. Connecting,
//! acknowledging and doing something with the addresses are the caller's.
//!
//! # Example
//! ```
//! use hextet_api::{endpoints::EndpointSet, v1};
//!
//! let mut set = EndpointSet::default();
//! let web = v1::Endpoint {
//!     pod: "hello-web-x7k2p".into(),
//!     address: "fd12:3456:789a:1::17".parse::<std::net::Ipv6Addr>()?.octets().to_vec(),
//!     state: v1::EndpointState::Ready.into(),
//!     ..Default::default()
//! };
//! let snapshot = v1::Snapshot { epoch: "e".into(), revision: 7, endpoints: vec![web], last: true };
//! let changes = set.apply(v1::watch_response::Response::Snapshot(snapshot))?;
//! assert_eq!(changes.expect("the set has changed").len(), 1);
//! assert_eq!(set.ready().count(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::{collections::BTreeMap, fmt, net::Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::v1::{self, watch_request::Request, watch_response::Response};

/// The most endpoints that a set holds.
pub const ENDPOINTS_MAX: usize = 200_000;

/// One pod that a selector selects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The pod's id, for ever its own.
    pub pod: String,
    /// Its group in the job.
    pub group: String,
    /// The node that it runs on.
    pub node: String,
    /// Its address, for ever its own.
    pub address: Ipv6Addr,
    /// Whether it takes connections.
    pub state: EndpointState,
}

/// Whether an endpoint takes connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// Not yet.
    Starting,
    /// Yes.
    Ready,
    /// Those that it has; no new ones.
    Terminating,
}

/// One difference between a set and the one before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is new or has changed.
    Set(Endpoint),
    /// The pod with this id is gone.
    Removed(String),
}

/// Why a message cannot be followed. The caller ends the stream and subscribes anew with an empty set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointsError {
    /// A message without content, of a later server.
    #[error("the server sent a message that this program does not know: use the server's version")]
    Unknown,
    /// An address that is none.
    #[error("pod {pod} has an address of {len} bytes, not 16")]
    Address {
        /// Its id.
        pod: String,
        /// How long what was sent is.
        len: usize,
    },
    /// A state that is none.
    #[error("pod {pod} has the unknown state {state}")]
    State {
        /// Its id.
        pod: String,
        /// What was sent.
        state: i32,
    },
    /// An older revision than the set's.
    #[error("the server sent revision {sent} after revision {known}")]
    Backwards {
        /// What was sent.
        sent: u64,
        /// The set's.
        known: u64,
    },
    /// More than [`ENDPOINTS_MAX`].
    #[error("the selector has more than {ENDPOINTS_MAX} endpoints: select one group")]
    TooMany,
}

/// The endpoints of a selector as of one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSet {
    epoch: String,
    revision: u64,
    endpoints: BTreeMap<String, Endpoint>,
    /// The chunks so far of a snapshot whose last has not come.
    #[serde(skip)]
    snapshot: BTreeMap<String, Endpoint>,
}

impl EndpointSet {
    /// The first message of a stream: everything, or what came after this set's revision.
    ///
    /// `client` is a name for people to read. Chunks of a snapshot that a lost stream left are forgotten.
    pub fn subscribe(&mut self, job: &str, group: &str, client: &str) -> v1::WatchRequest {
        self.snapshot.clear();
        let subscribe = v1::Subscribe {
            job: job.to_owned(),
            group: group.to_owned(),
            epoch: self.epoch.clone(),
            from_revision: self.revision,
            client: client.to_owned(),
        };
        v1::WatchRequest { request: Some(Request::Subscribe(subscribe)) }
    }

    /// Takes in one message. `Some` means that the set is whole again and its revision awaits an answer:
    /// do what the changes ask for, then send [`ack`] or [`reject`] with [`EndpointSet::revision`].
    ///
    /// # Errors
    /// The message is against the contract; the set is as it was.
    pub fn apply(&mut self, message: Response) -> Result<Option<Vec<Change>>, EndpointsError> {
        match message {
            Response::Snapshot(snapshot) => self.apply_snapshot(snapshot),
            Response::Event(event) => self.apply_event(event).map(Some),
            Response::Bookmark(bookmark) => {
                // A bookmark before the first snapshot, or of another epoch, says nothing about this set.
                if bookmark.epoch == self.epoch {
                    self.revision = self.revision.max(bookmark.revision);
                }
                Ok(None)
            }
            // The snapshot that follows says all of it.
            Response::Compacted(_) => Ok(None),
        }
    }

    /// The revision that the set is at.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Names the store that the revision belongs to; empty before the first snapshot.
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Every endpoint, in the order of pod ids.
    pub fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.values()
    }

    /// Those that take new connections, in the order of pod ids.
    pub fn ready(&self) -> impl Iterator<Item = &Endpoint> {
        self.iter().filter(|endpoint| endpoint.state == EndpointState::Ready)
    }

    fn apply_snapshot(&mut self, chunk: v1::Snapshot) -> Result<Option<Vec<Change>>, EndpointsError> {
        for endpoint in chunk.endpoints {
            let endpoint = Endpoint::try_from(endpoint)?;
            self.snapshot.insert(endpoint.pod.clone(), endpoint);
        }
        check_len(&self.snapshot)?;
        if !chunk.last {
            return Ok(None);
        }
        let before = std::mem::replace(&mut self.endpoints, std::mem::take(&mut self.snapshot));
        (self.epoch, self.revision) = (chunk.epoch, chunk.revision);
        Ok(Some(difference(&before, &self.endpoints)))
    }

    fn apply_event(&mut self, event: v1::Event) -> Result<Vec<Change>, EndpointsError> {
        if event.revision < self.revision {
            return Err(EndpointsError::Backwards { sent: event.revision, known: self.revision });
        }
        let upserts: Vec<Endpoint> =
            event.upserts.into_iter().map(Endpoint::try_from).collect::<Result<_, _>>()?;
        if self.endpoints.len() + upserts.len() > ENDPOINTS_MAX + event.removals.len() {
            return Err(EndpointsError::TooMany);
        }
        self.revision = event.revision;
        let mut changes = Vec::new();
        for pod in event.removals {
            if self.endpoints.remove(&pod).is_some() {
                changes.push(Change::Removed(pod));
            }
        }
        for endpoint in upserts {
            if self.endpoints.insert(endpoint.pod.clone(), endpoint.clone()).as_ref() != Some(&endpoint) {
                changes.push(Change::Set(endpoint));
            }
        }
        Ok(changes)
    }
}

/// Says that everything up to `revision` is in effect.
pub fn ack(revision: u64) -> v1::WatchRequest {
    v1::WatchRequest { request: Some(Request::Ack(v1::Ack { revision })) }
}

/// Says that `revision` could not be brought into effect, and why.
pub fn reject(revision: u64, reason: impl Into<String>) -> v1::WatchRequest {
    v1::WatchRequest { request: Some(Request::Reject(v1::Reject { revision, reason: reason.into() })) }
}

impl TryFrom<v1::Endpoint> for Endpoint {
    type Error = EndpointsError;

    fn try_from(message: v1::Endpoint) -> Result<Endpoint, EndpointsError> {
        let state = EndpointState::try_from_message(message.state)
            .ok_or_else(|| EndpointsError::State { pod: message.pod.clone(), state: message.state })?;
        let octets: [u8; 16] = message
            .address
            .as_slice()
            .try_into()
            .map_err(|_| EndpointsError::Address { pod: message.pod.clone(), len: message.address.len() })?;
        Ok(Endpoint {
            pod: message.pod,
            group: message.group,
            node: message.node,
            address: octets.into(),
            state,
        })
    }
}

impl EndpointState {
    fn try_from_message(state: i32) -> Option<EndpointState> {
        match v1::EndpointState::try_from(state).ok()? {
            v1::EndpointState::Unspecified => None,
            v1::EndpointState::Starting => Some(EndpointState::Starting),
            v1::EndpointState::Ready => Some(EndpointState::Ready),
            v1::EndpointState::Terminating => Some(EndpointState::Terminating),
        }
    }
}

impl fmt::Display for EndpointState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EndpointState::Starting => "starting",
            EndpointState::Ready => "ready",
            EndpointState::Terminating => "terminating",
        })
    }
}

fn check_len(endpoints: &BTreeMap<String, Endpoint>) -> Result<(), EndpointsError> {
    if endpoints.len() > ENDPOINTS_MAX { Err(EndpointsError::TooMany) } else { Ok(()) }
}

fn difference(before: &BTreeMap<String, Endpoint>, after: &BTreeMap<String, Endpoint>) -> Vec<Change> {
    let removed = before.keys().filter(|pod| !after.contains_key(*pod)).cloned().map(Change::Removed);
    let set = after.values().filter(|endpoint| before.get(&endpoint.pod) != Some(endpoint));
    removed.chain(set.cloned().map(Change::Set)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(pod: &str, state: v1::EndpointState) -> v1::Endpoint {
        v1::Endpoint {
            pod: pod.into(),
            group: "web".into(),
            node: "n1".into(),
            address: vec![0xfd; 16],
            state: state.into(),
        }
    }

    fn ready(pod: &str) -> v1::Endpoint {
        message(pod, v1::EndpointState::Ready)
    }

    fn snapshot(revision: u64, endpoints: Vec<v1::Endpoint>, last: bool) -> Response {
        Response::Snapshot(v1::Snapshot { epoch: "e".into(), revision, endpoints, last })
    }

    fn event(revision: u64, upserts: Vec<v1::Endpoint>, removals: &[&str]) -> Response {
        let removals = removals.iter().map(|pod| (*pod).to_owned()).collect();
        Response::Event(v1::Event { revision, upserts, removals })
    }

    fn pods(set: &EndpointSet) -> Vec<&str> {
        set.iter().map(|endpoint| endpoint.pod.as_str()).collect()
    }

    fn set_of(names: &[&str]) -> EndpointSet {
        let mut set = EndpointSet::default();
        set.apply(snapshot(5, names.iter().map(|pod| ready(pod)).collect(), true)).unwrap();
        set
    }

    #[test]
    fn a_snapshot_counts_when_its_last_chunk_is_there() {
        let mut set = set_of(&["old"]);
        assert_eq!(set.apply(snapshot(9, vec![ready("a")], false)), Ok(None));
        assert_eq!((pods(&set), set.revision()), (vec!["old"], 5));
        let changes = set.apply(snapshot(9, vec![ready("b")], true)).unwrap().unwrap();
        assert_eq!((pods(&set), set.revision()), (vec!["a", "b"], 9));
        assert_eq!(changes[0], Change::Removed("old".into()));
        assert_eq!(changes.len(), 3);
    }

    #[test]
    fn events_change_what_they_name() {
        let mut set = set_of(&["a", "b"]);
        let leaving = message("b", v1::EndpointState::Terminating);
        let changes = set.apply(event(6, vec![leaving, ready("c"), ready("a")], &["x"])).unwrap().unwrap();
        assert_eq!(changes.len(), 2, "a is as it was, x was never there: {changes:?}");
        let ready: Vec<&str> = set.ready().map(|endpoint| endpoint.pod.as_str()).collect();
        assert_eq!(ready, ["a", "c"]);
        set.apply(event(7, vec![], &["b"])).unwrap();
        assert_eq!(pods(&set), ["a", "c"]);
    }

    #[test]
    fn a_bookmark_moves_the_revision_of_its_epoch() {
        let mut set = set_of(&["a"]);
        let bookmark =
            |epoch: &str, revision| Response::Bookmark(v1::Bookmark { epoch: epoch.into(), revision });
        assert_eq!(set.apply(bookmark("e", 8)), Ok(None));
        assert_eq!(set.revision(), 8);
        set.apply(bookmark("other", 99)).unwrap();
        set.apply(bookmark("e", 3)).unwrap();
        assert_eq!(set.revision(), 8);
    }

    #[test]
    fn a_lost_stream_is_resumed_and_its_half_snapshot_forgotten() {
        let mut set = set_of(&["a"]);
        set.apply(snapshot(9, vec![ready("half")], false)).unwrap();
        let Some(Request::Subscribe(subscribe)) = set.subscribe("hello", "web", "me").request else {
            panic!("it subscribes")
        };
        assert_eq!((subscribe.epoch.as_str(), subscribe.from_revision), ("e", 5));
        set.apply(snapshot(9, vec![ready("b")], true)).unwrap();
        assert_eq!(pods(&set), ["b"]);
    }

    #[test]
    fn a_message_against_the_contract_changes_nothing() {
        let mut set = set_of(&["a"]);
        let short = v1::Endpoint { address: vec![1, 2], ..ready("b") };
        let before = set.clone();
        assert_eq!(
            set.apply(event(6, vec![ready("c"), short], &["a"])),
            Err(EndpointsError::Address { pod: "b".into(), len: 2 })
        );
        assert_eq!(set.apply(event(4, vec![], &[])), Err(EndpointsError::Backwards { sent: 4, known: 5 }));
        let state = v1::Endpoint { state: 77, ..ready("b") };
        assert!(matches!(
            set.apply(event(6, vec![state], &[])),
            Err(EndpointsError::State { state: 77, .. })
        ));
        assert_eq!(set, before);
    }

    #[test]
    fn a_set_survives_its_file() {
        let set = set_of(&["a", "b"]);
        let text = serde_json::to_string(&set).unwrap();
        assert_eq!(serde_json::from_str::<EndpointSet>(&text).unwrap(), set);
    }
}
