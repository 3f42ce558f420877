//! A machine that runs pods, as the control plane knows it.

use std::{
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use hextet_address::{GroupId, NodePrefix};
use serde::{Deserialize, Serialize};

use crate::{
    claim::MACHINE_LEN_MAX,
    countable::{COUNTABLES_MAX, Countables},
    job::{self, LABEL_LEN_MAX, MEMORY_MAX},
    quantity::Resources,
    time::WallTime,
};

/// The most labels of a node.
pub const LABELS_MAX: usize = 64;

/// The most addresses of a lost node that are remembered. LAN hosts find out about the others in their own time.
pub const LEFT_MAX: usize = 1_024;

/// The label that every node has: its name.
pub const NODE_LABEL: &str = "node";

/// A machine that runs pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// SHA-256 of its public key, in hex: who may speak for it.
    pub key: String,
    /// The /64 in which its pods have their addresses: its own, or that of its LAN, which others share.
    pub prefix: NodePrefix,
    /// The low 24 bits that its pods' addresses share, and no other node's.
    pub group_id: GroupId,
    /// Where peers send packets for its prefix; none until it has attached.
    pub underlay: Option<Ipv6Addr>,
    /// Its own IPv4 address, if it has one.
    pub underlay_v4: Option<Ipv4Addr>,
    /// What constraints are matched with.
    pub labels: BTreeMap<String, String>,
    /// What it has for pods.
    pub capacity: Resources,
    /// What it has for pods besides, such as `gpu`.
    #[serde(default, skip_serializing_if = "Countables::is_empty")]
    pub countables: Countables,
    /// The version of its agent.
    pub agent_version: String,
    /// Whether it can be used.
    pub phase: NodePhase,
    /// Which machine it is, in its present boot; empty until one has said so. A copy of its disk is another.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub machine: String,
    /// Which hardware that is, in its own words: a machine that has booted again is another on the same hardware.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hardware: String,
    /// When it got its certificate.
    pub joined: WallTime,
    /// While it is lost: the addresses of the pods that it had then, at most [`LEFT_MAX`], for LAN hosts to ask anew.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<Ipv6Addr>,
    /// The CA that made its certificate; none for the one with which the cluster began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// The last grant of its lease is over, by its own clock: it has ended what only one node may run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fenced: bool,
    /// How often that was so. What only one node may run needs a lease and an assignment of one term: a node that returns
    /// hears first what was replaced.
    #[serde(default)]
    pub term: u64,
    /// It was taken down, in this session: only a hello of a later one brings it back, and no other sign of life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_down: Option<u64>,
}

/// Whether a node can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodePhase {
    /// It has a certificate and has not attached yet.
    Joined,
    /// It reports.
    Ready,
    /// It does not report, and nobody says that it is dead: its pods run and are reached.
    CutOff,
    /// It does not report, and its neighbours do not reach it, or its agent has not come back for a lease's time.
    Lost,
    /// An operator says that it is dead.
    Dead,
}

/// What a node says of itself when it attaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Where peers send packets for its prefix.
    pub underlay: Ipv6Addr,
    /// Its own IPv4 address, if it has one.
    pub underlay_v4: Option<Ipv4Addr>,
    /// What constraints are matched with.
    pub labels: BTreeMap<String, String>,
    /// What it has for pods.
    pub capacity: Resources,
    /// What it has for pods besides, such as `gpu`.
    pub countables: Countables,
    /// The version of its agent.
    pub agent_version: String,
    /// Which machine it is, in its present boot; empty when the agent does not say.
    pub machine: String,
    /// Which hardware it runs on; empty when it cannot tell.
    pub hardware: String,
    /// When the agent started: of two of one machine that with the greater number is the later. 0 when it does not say.
    pub session: u64,
}

/// Why a node's word about itself is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Too much of it.
    #[error("{0} labels are more than {LABELS_MAX}")]
    TooManyLabels(usize),
    /// A label that no constraint can match.
    #[error(
        "label `{key}`: its key and value have 1 to {LABEL_LEN_MAX} characters, none of them a control character"
    )]
    Label {
        /// The label's key.
        key: String,
    },
    /// More kinds of countables than fit.
    #[error("{0} kinds of resources are more than {COUNTABLES_MAX}")]
    TooManyCountables(usize),
    /// A countable that no pod can ask for.
    #[error("resource `{name}`: {problem}")]
    Countable {
        /// Its name.
        name: String,
        /// What is wrong with it.
        problem: job::JobProblem,
    },
    /// More words for the machine than fit.
    #[error("the machine or its hardware is named with {0} bytes, which is more than {MACHINE_LEN_MAX}")]
    Machine(usize),
    /// A label that is not the node's to set.
    #[error("the label `node` is the node's name and cannot be set")]
    NodeLabel,
    /// An address that packets cannot be sent to.
    #[error("the underlay address {0} is not one that other nodes can send packets to: use --underlay")]
    Underlay(Ipv6Addr),
}

impl Hello {
    /// Checks bounds and the address.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), HelloError> {
        if self.labels.len() > LABELS_MAX {
            return Err(HelloError::TooManyLabels(self.labels.len()));
        }
        if self.labels.contains_key(NODE_LABEL) {
            return Err(HelloError::NodeLabel);
        }
        for (key, value) in &self.labels {
            job::check_label(key, value)
                .map_err(|_| HelloError::Label { key: key.chars().take(LABEL_LEN_MAX).collect() })?;
        }
        if self.countables.0.len() > COUNTABLES_MAX {
            return Err(HelloError::TooManyCountables(self.countables.0.len()));
        }
        for (name, number) in &self.countables.0 {
            job::check_countable(name, *number).map_err(|problem| HelloError::Countable {
                name: name.chars().take(LABEL_LEN_MAX).collect(),
                problem,
            })?;
        }
        let longest = self.machine.len().max(self.hardware.len());
        if longest > MACHINE_LEN_MAX {
            return Err(HelloError::Machine(longest));
        }
        let underlay = self.underlay;
        if underlay.is_unspecified() || underlay.is_multicast() || underlay.is_loopback() {
            return Err(HelloError::Underlay(underlay));
        }
        Ok(())
    }
}

impl Node {
    /// One that has a certificate and has not attached yet.
    #[must_use]
    pub fn joined(name: &str, key: &str, prefix: NodePrefix, group_id: GroupId, now: WallTime) -> Node {
        Node {
            name: name.to_owned(),
            key: key.to_owned(),
            prefix,
            group_id,
            underlay: None,
            underlay_v4: None,
            labels: BTreeMap::new(),
            capacity: Resources::default(),
            countables: Countables::default(),
            agent_version: String::new(),
            machine: String::new(),
            hardware: String::new(),
            phase: NodePhase::Joined,
            joined: now,
            left: Vec::new(),
            ca: None,
            fenced: false,
            term: 0,
            taken_down: None,
        }
    }

    /// The value of a label; every node has the label `node`.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        if key == NODE_LABEL { Some(&self.name) } else { self.labels.get(key).map(String::as_str) }
    }

    /// Takes over what the node says of itself.
    #[must_use]
    pub fn greeted(&self, hello: &Hello) -> Node {
        Node {
            underlay: Some(hello.underlay),
            underlay_v4: hello.underlay_v4,
            labels: hello.labels.clone(),
            capacity: Resources { memory: hello.capacity.memory.min(MEMORY_MAX), ..hello.capacity },
            countables: hello.countables.clone(),
            agent_version: hello.agent_version.chars().take(LABEL_LEN_MAX).collect(),
            machine: hello.machine.clone(),
            hardware: hello.hardware.clone(),
            taken_down: None,
            ..self.returned()
        }
    }

    /// The same, now that it reports.
    #[must_use]
    pub fn returned(&self) -> Node {
        Node { phase: NodePhase::Ready, left: Vec::new(), fenced: false, ..self.clone() }
    }

    /// Whether what this agent of `machine` says was said before the node was taken down, and comes late.
    #[must_use]
    pub fn is_over(&self, machine: &str, session: u64) -> bool {
        let is_known = session > 0 && self.machine == machine;
        is_known && self.taken_down.is_some_and(|last| session <= last)
    }

    /// Whether both have underlay addresses of one /64, which is one link (RFC 4291 section 2.5.4).
    #[must_use]
    pub fn shares_link(&self, other: &Node) -> bool {
        let link = |node: &Node| node.underlay.map(|address| u128::from(address) >> 64);
        link(self).is_some() && link(self) == link(other)
    }
}

impl NodePhase {
    /// Whether it is expected to report, or not yet.
    #[must_use]
    pub fn reports(self) -> bool {
        matches!(self, NodePhase::Joined | NodePhase::Ready)
    }

    /// Whether its pods count as running: it reports, or only its path to the server is gone.
    #[must_use]
    pub fn has_pods(self) -> bool {
        matches!(self, NodePhase::Ready | NodePhase::CutOff)
    }

    /// Whether its pods count as lost.
    #[must_use]
    pub fn is_gone(self) -> bool {
        matches!(self, NodePhase::Lost | NodePhase::Dead)
    }
}

impl fmt::Display for NodePhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NodePhase::Joined => "joined",
            NodePhase::Ready => "ready",
            NodePhase::CutOff => "cut-off",
            NodePhase::Lost => "lost",
            NodePhase::Dead => "dead",
        })
    }
}
