//! What a node must run and where its peers are, and the difference to what it was told before.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
    sync::Arc,
};

use hextet_address::NodePrefix;

use crate::{
    change::{Key, Revision, Value},
    job::{Group, Job},
    node::{Node, NodePhase},
    pod::{Pod, PodId},
    state::State,
};

/// Everything that one node is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Other nodes by name.
    pub peers: BTreeMap<String, Peer>,
    /// Pods that it runs, by id.
    pub pods: BTreeMap<PodId, Assigned>,
    /// Pods that it must stop and then report gone.
    pub stopping: BTreeSet<PodId>,
    /// The term of the node in which this is so.
    pub term: u64,
}

/// Another node. A lost one stays a peer: a cut of the control path alone leaves traffic untouched. Its peers are told,
/// so that they ask whether it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its /64.
    pub prefix: NodePrefix,
    /// Where packets for it are sent.
    pub underlay: Ipv6Addr,
    /// Whether its lease has ended.
    pub lost: bool,
    /// The addresses that its pods had, for one of the nodes on its link: LAN hosts are to ask for them anew.
    pub left: Vec<Ipv6Addr>,
}

/// A pod with the text of the job version that it runs.
#[derive(Clone, Debug)]
pub struct Assigned {
    /// The pod's address.
    pub address: Ipv6Addr,
    /// The job's text.
    pub job: Arc<Job>,
    /// The group in it.
    pub group: String,
    /// The job's version.
    pub job_version: u32,
    /// Its serial number: of two pods of a group the later one has the greater.
    pub serial: u64,
}

/// What a node is told: everything, or what has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// Added or changed.
    pub peers: Vec<(String, Peer)>,
    /// By name.
    pub removed_peers: Vec<String>,
    /// Added or changed.
    pub pods: Vec<(PodId, Assigned)>,
    /// Stop them, then report them gone.
    pub removed_pods: Vec<PodId>,
    /// The node's term.
    pub term: u64,
    /// Whether that is another than before.
    pub is_new_term: bool,
}

impl PartialEq for Assigned {
    /// A version names one text for ever.
    fn eq(&self, other: &Assigned) -> bool {
        let key = |one: &Assigned| (one.address, one.job_version);
        key(self) == key(other) && self.group == other.group && self.job.job == other.job.job
    }
}

impl Eq for Assigned {}

impl Assigned {
    /// The group's text.
    #[must_use]
    pub fn spec(&self) -> Option<&Group> {
        self.job.group(&self.group)
    }
}

/// What `node` must be told in this state.
#[must_use]
pub fn view(state: &State, node: &str) -> View {
    let others = state.nodes().values().filter(|other| other.name != node);
    let peer = |other: &Arc<Node>| {
        let left = if tells_of(state, node, other) { other.left.clone() } else { Vec::new() };
        let lost = other.phase.is_gone();
        Some((other.name.clone(), Peer { prefix: other.prefix, underlay: other.underlay?, lost, left }))
    };
    let term = state.nodes().get(node).map_or(0, |node| node.term);
    let mut view = View { peers: others.filter_map(peer).collect(), term, ..View::default() };
    for pod in state.pods_on(node) {
        if pod.stop {
            view.stopping.insert(pod.id.clone());
        } else if let Some(assigned) = assigned(state, pod) {
            view.pods.insert(pod.id.clone(), assigned);
        }
    }
    view
}

/// Whether `node` is the one that tells the hosts of its link about a lost node: the first that reports.
fn tells_of(state: &State, node: &str, lost: &Node) -> bool {
    let mut here =
        state.nodes().values().filter(|node| node.phase == NodePhase::Ready && node.shares_link(lost));
    !lost.left.is_empty() && here.next().is_some_and(|first| first.name == node)
}

fn assigned(state: &State, pod: &Pod) -> Option<Assigned> {
    let job = state.job_of(pod)?.clone();
    Some(Assigned {
        address: pod.address?,
        job,
        group: pod.group.clone(),
        job_version: pod.job_version,
        serial: pod.serial,
    })
}

/// Whether a revision may have changed what `node` is told.
#[must_use]
pub fn concerns(revision: &Revision, node: &str) -> bool {
    let pod_here = |value: &Option<Value>| match value {
        Some(Value::Pod(pod)) => pod.node.as_deref() == Some(node),
        _ => false,
    };
    revision.changes.iter().any(|change| match change.key {
        Key::Node(_) => true,
        Key::Pod(_) => pod_here(&change.old) || pod_here(&change.new),
        _ => false,
    })
}

/// All of a view, for a node that has just attached. Pods that it must stop are named although it may have
/// stopped them already: it answers that they are gone, and their records can go.
#[must_use]
pub fn full(view: &View) -> Diff {
    Diff { removed_pods: view.stopping.iter().cloned().collect(), ..diff(&View::default(), view) }
}

/// What has changed from one view to the next.
#[must_use]
pub fn diff(old: &View, new: &View) -> Diff {
    let changed_peer = |(name, peer): &(&String, &Peer)| old.peers.get(*name) != Some(peer);
    let changed_pod = |(id, pod): &(&PodId, &Assigned)| old.pods.get(*id) != Some(pod);
    let gone = old.pods.keys().filter(|id| !new.pods.contains_key(id));
    let stopping = new.stopping.difference(&old.stopping).filter(|id| !old.pods.contains_key(id));
    Diff {
        peers: new
            .peers
            .iter()
            .filter(changed_peer)
            .map(|(name, peer)| (name.clone(), peer.clone()))
            .collect(),
        removed_peers: old.peers.keys().filter(|name| !new.peers.contains_key(*name)).cloned().collect(),
        pods: new.pods.iter().filter(changed_pod).map(|(id, pod)| (id.clone(), pod.clone())).collect(),
        removed_pods: gone.chain(stopping).cloned().collect(),
        term: new.term,
        is_new_term: old.term != new.term,
    }
}

impl Diff {
    /// Nothing has changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
            && self.removed_peers.is_empty()
            && self.pods.is_empty()
            && self.removed_pods.is_empty()
            && !self.is_new_term
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_sent_whole_first_and_then_only_what_changed() {
        let old = View {
            peers: BTreeMap::from([peer("n2", 2), peer("n3", 3)]),
            pods: BTreeMap::from([pod("a", 1), pod("b", 1)]),
            stopping: BTreeSet::from([PodId("z".into())]),
            term: 0,
        };
        assert_eq!(full(&old).removed_pods, [PodId("z".into())]);
        assert_eq!((full(&old).peers.len(), full(&old).pods.len()), (2, 2));

        let new = View {
            peers: BTreeMap::from([peer("n3", 4), peer("n4", 4)]),
            pods: BTreeMap::from([pod("b", 2)]),
            stopping: BTreeSet::from([PodId("a".into()), PodId("never-sent".into())]),
            term: 0,
        };
        let change = diff(&old, &new);
        assert_eq!(change.peers.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["n3", "n4"]);
        assert_eq!(change.removed_peers, ["n2"]);
        assert_eq!(change.pods, [pod("b", 2)]);
        assert_eq!(change.removed_pods, ["a", "never-sent"].map(|id| PodId(id.into())));
        assert!(diff(&new, &new).is_empty());
        let returned = View { term: 1, ..new.clone() };
        assert!(!diff(&new, &returned).is_empty(), "a node that returns hears so");
    }

    fn peer(name: &str, host: u16) -> (String, Peer) {
        let prefix = NodePrefix::new("fd00:1:2:3::/64".parse().unwrap()).unwrap();
        (
            name.to_owned(),
            Peer {
                prefix,
                underlay: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host),
                lost: false,
                left: Vec::new(),
            },
        )
    }

    fn pod(id: &str, job_version: u32) -> (PodId, Assigned) {
        let job = Arc::new(Job { job: "j".into(), ..Job::default() });
        let address = "fd00:1:2:3::9".parse().unwrap();
        (PodId(id.to_owned()), Assigned { address, job, group: "g".into(), job_version, serial: 0 })
    }
}
