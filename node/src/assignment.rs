//! What the node was told to run, and how one more message of the server changes that.
//!
//! Pure: a message and the present assignment in, the next assignment out. A pod that the message gets wrong
//! is kept with its problem, so that it is reported, and does not spoil the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use hextet_address::NodePrefix;
use hextet_api::v1;
use hextet_lifecycle::{Hook, hook::Timeout};
use ipnetwork::{Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};

use crate::{identity::Identity, pod_ipv4};

/// A label of RFC 1123 with the length that the longest pod id has: `JOB-GROUP-xxxxx`.
const POD_ID_BYTES_MAX: usize = 80;
const TASK_NAME_BYTES_MAX: usize = 32;
const TASKS_MAX: usize = 16;
/// Addresses of one peer that LAN hosts are made to ask for anew.
const LEFT_MAX: usize = 1_024;

/// Everything that the node was told, and what it decided about its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Assignment {
    pub(crate) head: Head,
    pub(crate) peers: BTreeMap<String, Peer>,
    pub(crate) pods: BTreeMap<String, PodRecord>,
}

/// Which state of the cluster the assignment is from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head {
    pub(crate) epoch: String,
    pub(crate) revision: u64,
    /// The node's term: see [`crate::lease::Hold`].
    #[serde(default)]
    pub(crate) term: u64,
    /// The term of which a lease is good: an earlier one until pods that were replaced meanwhile are gone.
    #[serde(default)]
    pub(crate) lease_term: u64,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Peer {
    pub(crate) prefix: NodePrefix,
    pub(crate) underlay: Ipv6Addr,
    /// Its lease has ended: it may be dead.
    #[serde(default)]
    pub(crate) lost: bool,
    /// Addresses that its pods had, if it is this node that makes LAN hosts ask for them anew.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) left: Vec<Ipv6Addr>,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodRecord {
    pub(crate) job: String,
    pub(crate) group: String,
    pub(crate) job_version: u32,
    pub(crate) address: Ipv6Addr,
    pub(crate) tasks: Vec<Task>,
    /// Programs that its job adds to its lifecycle.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) hooks: BTreeMap<String, Hook>,
    /// Chosen by the node; none while the range is used up.
    pub(crate) ipv4: Option<Ipv4Addr>,
    /// Must end; the record goes when nothing is left of the pod.
    #[serde(default)]
    pub(crate) removing: bool,
    /// Why it cannot run.
    #[serde(default)]
    pub(crate) problem: Option<String>,
    /// The MAC address of another machine that has its address: it must not be used again, also after a reboot
    /// without a server. The problem says so until the server gives the pod another.
    #[serde(default)]
    pub(crate) taken_by: Option<[u8; 6]>,
    /// There must never be two of it that live: its place in the order in which pods were made.
    #[serde(default)]
    pub(crate) singleton: Option<u64>,
}

/// A process of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) name: String,
    pub(crate) exec: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
}

/// What a message made of the assignment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Merged {
    pub(crate) next: Assignment,
    /// Pods that the server wants gone and that are not here: gone already.
    pub(crate) unknown: BTreeSet<String>,
    /// What of the message could not be used.
    pub(crate) complaints: Vec<String>,
}

/// The assignment after `message`.
pub(crate) fn merge(identity: &Identity, now: &Assignment, message: v1::Assignment) -> Merged {
    let mut merged = Merged { next: now.clone(), ..Merged::default() };
    merged.next.head = Head { lease_term: now.head.lease_term, ..head(&message) };
    if message.full {
        merged.next.peers.clear();
        mark_unnamed(&mut merged.next.pods, &message.pods);
    }
    for name in &message.removed_peers {
        merged.next.peers.remove(name);
    }
    for peer in message.peers {
        merged.take_peer(identity, peer);
    }
    for id in message.removed_pods {
        match merged.next.pods.get_mut(&id) {
            Some(pod) => pod.removing = true,
            None => drop(merged.unknown.insert(id)),
        }
    }
    for pod in message.pods {
        merged.take_pod(identity, pod);
    }
    give_ipv4(identity.pod_ipv4, &mut merged.next.pods);
    merged.next.settle_term();
    merged
}

/// Removes the records of pods of which nothing is left; their IPv4 addresses may go to others that wait.
pub(crate) fn forget(identity: &Identity, now: &Assignment, gone: &[String]) -> Assignment {
    let mut next = now.clone();
    next.pods.retain(|id, _| !gone.contains(id));
    give_ipv4(identity.pod_ipv4, &mut next.pods);
    next.settle_term();
    next
}

impl Assignment {
    /// The term that the lease must be of, if there are pods that need it.
    pub(crate) fn term_of_singletons(&self) -> Option<u64> {
        self.pods.values().any(|pod| pod.singleton.is_some()).then_some(self.head.lease_term)
    }

    /// In a new term the lease is good when nothing is left of pods that may have been replaced in the one before: their
    /// supervisors would take it for theirs.
    fn settle_term(&mut self) {
        if !self.pods.values().any(|pod| pod.singleton.is_some() && pod.removing) {
            self.head.lease_term = self.head.term;
        }
    }
}

/// The same, with a pod that must not use its address any more.
pub(crate) fn take_address(now: &Assignment, pod: &str, mac: [u8; 6], why: String) -> Assignment {
    let mut next = now.clone();
    if let Some(record) = next.pods.get_mut(pod) {
        (record.taken_by, record.problem) = (Some(mac), Some(why));
    }
    next
}

fn head(message: &v1::Assignment) -> Head {
    Head { epoch: message.epoch.clone(), revision: message.revision, term: message.term, lease_term: 0 }
}

/// A full message ends what it does not name.
fn mark_unnamed(pods: &mut BTreeMap<String, PodRecord>, named: &[v1::PodAssignment]) {
    let named: BTreeSet<&str> = named.iter().map(|pod| pod.id.as_str()).collect();
    for (id, pod) in pods {
        pod.removing |= !named.contains(id.as_str());
    }
}

/// Gives the lowest free address to each pod that has none, in the order of their ids.
fn give_ipv4(range: Ipv4Network, pods: &mut BTreeMap<String, PodRecord>) {
    let mut used: BTreeSet<Ipv4Addr> = pods.values().filter_map(|pod| pod.ipv4).collect();
    for pod in pods.values_mut().filter(|pod| pod.ipv4.is_none() && pod.problem.is_none()) {
        pod.ipv4 = pod_ipv4::lowest_free(range, &used);
        used.extend(pod.ipv4);
    }
}

impl Merged {
    fn take_peer(&mut self, identity: &Identity, peer: v1::Peer) {
        match peer_of(identity, &peer) {
            Ok(known) => drop(self.next.peers.insert(peer.name, known)),
            Err(why) => self.complaints.push(format!("peer {:?}: {why}", peer.name)),
        }
    }

    fn take_pod(&mut self, identity: &Identity, pod: v1::PodAssignment) {
        if !is_label(&pod.id, POD_ID_BYTES_MAX) {
            self.complaints.push(format!("pod {:?}: the id is not a name", pod.id));
            return;
        }
        let known = self.next.pods.get(&pod.id);
        let record = record(identity, &pod, known);
        if let Some(problem) = &record.problem {
            self.complaints.push(format!("pod {}: {problem}", pod.id));
        }
        self.next.pods.insert(pod.id, record);
    }
}

fn peer_of(identity: &Identity, peer: &v1::Peer) -> Result<Peer, &'static str> {
    let prefix = peer.prefix.as_ref().and_then(ipv6_network).ok_or("it has no prefix")?;
    let prefix = NodePrefix::new(prefix).map_err(|_| "its prefix is not a /64")?;
    // Only that of a LAN is shared.
    if prefix == identity.prefix && identity.cluster.has_subnet(prefix) {
        return Err("its prefix is this node's own");
    }
    let underlay = ipv6(&peer.underlay).ok_or("it has no underlay address")?;
    // What is no pod's of that node is nothing to speak of.
    let left = peer.left.iter().filter_map(|bytes| ipv6(bytes)).filter(|address| prefix.contains(*address));
    Ok(Peer { prefix, underlay, lost: peer.lost, left: left.take(LEFT_MAX).collect() })
}

/// The record of `pod`, with what the node decided when it was told of it before.
fn record(identity: &Identity, pod: &v1::PodAssignment, known: Option<&PodRecord>) -> PodRecord {
    let address = ipv6(&pod.address);
    let tasks = pod.tasks.iter().map(task).collect();
    let own = address.filter(|address| is_own(identity, *address));
    let taken = known.filter(|known| known.taken_by.is_some() && Some(known.address) == own);
    let problem = problem(own, address, pod).map(str::to_owned);
    PodRecord {
        job: pod.job.clone(),
        group: pod.group.clone(),
        job_version: pod.job_version,
        address: own.or(known.map(|known| known.address)).or(address).unwrap_or(Ipv6Addr::UNSPECIFIED),
        tasks,
        hooks: pod.hooks.iter().map(|hook| (hook.name.clone(), self::hook(hook))).collect(),
        ipv4: known.and_then(|known| known.ipv4),
        removing: false,
        problem: problem.or_else(|| taken.and_then(|known| known.problem.clone())),
        taken_by: taken.and_then(|known| known.taken_by),
        singleton: pod.singleton.then_some(pod.serial),
    }
}

/// Whether an address can be that of a pod of this node.
fn is_own(identity: &Identity, address: Ipv6Addr) -> bool {
    let group = address.to_bits() & 0xff_ffff;
    identity.prefix.contains(address) && group == u128::from(identity.group.bits())
}

fn problem(
    own: Option<Ipv6Addr>,
    address: Option<Ipv6Addr>,
    pod: &v1::PodAssignment,
) -> Option<&'static str> {
    if address.is_none() {
        return Some("the server gave it no address");
    }
    if own.is_none() {
        return Some("the server gave it an address that is not of this node");
    }
    let fits = |task: &v1::Task| {
        is_label(&task.name, TASK_NAME_BYTES_MAX)
            && task.exec.first().is_some_and(|program| program.starts_with('/'))
            && task
                .exec
                .iter()
                .chain(task.env.keys())
                .chain(task.env.values())
                .all(|text| !text.contains('\0'))
            && task.env.keys().all(|key| !key.is_empty() && !key.contains('='))
    };
    if pod.tasks.is_empty() || pod.tasks.len() > TASKS_MAX || !pod.tasks.iter().all(fits) {
        return Some("the server gave it a task that cannot be started");
    }
    None
}

/// What is wrong with it is told when the pod comes to it.
fn hook(hook: &v1::Hook) -> Hook {
    let timeout = match hook.timeout_ms {
        0 => Timeout::default(),
        ms => Timeout(Duration::from_millis(ms)),
    };
    Hook {
        exec: hook.exec.clone(),
        undo: hook.undo.clone(),
        before: hook.before.clone(),
        after: hook.after.clone(),
        on: hook.on.clone(),
        user: None,
        env: hook.env.clone(),
        timeout,
        attempts: if hook.attempts == 0 { hextet_lifecycle::hook::ATTEMPTS } else { hook.attempts },
        optional: hook.optional,
    }
}

fn task(task: &v1::Task) -> Task {
    Task { name: task.name.clone(), exec: task.exec.clone(), env: task.env.clone() }
}

/// Whether `text` is safe as the name of a folder, a namespace and a link alias.
fn is_label(text: &str, bytes_max: usize) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !text.is_empty()
        && text.len() <= bytes_max
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

pub(crate) fn ipv6(bytes: &[u8]) -> Option<Ipv6Addr> {
    <[u8; 16]>::try_from(bytes).ok().map(Ipv6Addr::from)
}

pub(crate) fn ipv6_network(prefix: &v1::Ipv6Prefix) -> Option<Ipv6Network> {
    Ipv6Network::new(ipv6(&prefix.address)?, u8::try_from(prefix.length_bits).ok()?).ok()
}

pub(crate) fn ipv4_network(prefix: &v1::Ipv4Prefix) -> Option<Ipv4Network> {
    let address = <[u8; 4]>::try_from(prefix.address.as_slice()).ok()?;
    Ipv4Network::new(address.into(), u8::try_from(prefix.length_bits).ok()?).ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::identity::tests::identity;

    pub(crate) fn pod(id: &str, host: u16) -> v1::PodAssignment {
        v1::PodAssignment {
            id: id.into(),
            job: "hello".into(),
            group: "web".into(),
            address: address(host).octets().to_vec(),
            tasks: vec![v1::Task {
                name: "server".into(),
                exec: vec!["/bin/true".into()],
                ..v1::Task::default()
            }],
            job_version: 1,
            ..v1::PodAssignment::default()
        }
    }

    pub(crate) fn address(host: u16) -> Ipv6Addr {
        format!("fd00:1:2:a::{host:x}:0bcc:ddee").parse().unwrap()
    }

    fn full(pods: Vec<v1::PodAssignment>) -> v1::Assignment {
        v1::Assignment { epoch: "e".into(), revision: 7, full: true, pods, ..v1::Assignment::default() }
    }

    pub(crate) fn peer(name: &str, subnet: u16) -> v1::Peer {
        let prefix: Ipv6Addr = format!("fd00:1:2:{subnet:x}::").parse().unwrap();
        v1::Peer {
            name: name.into(),
            prefix: Some(v1::Ipv6Prefix { address: prefix.octets().to_vec(), length_bits: 64 }),
            underlay: "2001:db8:1::12".parse::<Ipv6Addr>().unwrap().octets().to_vec(),
            lost: false,
            left: vec![],
        }
    }

    fn after(now: &Assignment, message: v1::Assignment) -> Assignment {
        let merged = merge(&identity(), now, message);
        assert_eq!(merged.complaints, Vec::<String>::new());
        merged.next
    }

    fn problem_of(change: impl FnOnce(&mut v1::PodAssignment)) -> String {
        let mut wrong = pod("a", 1);
        change(&mut wrong);
        let merged = merge(&identity(), &Assignment::default(), full(vec![wrong, pod("b", 2)]));
        assert_eq!(merged.next.pods["b"].problem, None, "the other pod is fine");
        merged.complaints.join("; ")
    }

    #[test]
    fn each_pod_gets_the_lowest_free_ipv4_and_keeps_it() {
        let one = after(&Assignment::default(), full(vec![pod("b", 2)]));
        let two = after(&one, full(vec![pod("a", 1), pod("b", 2)]));
        assert_eq!(two.pods["b"].ipv4, Some("10.254.0.1".parse().unwrap()));
        assert_eq!(two.pods["a"].ipv4, Some("10.254.0.2".parse().unwrap()));
    }

    #[test]
    fn what_a_full_message_does_not_name_ends() {
        let message = v1::Assignment { peers: vec![peer("n2", 0xb)], ..full(vec![pod("a", 1), pod("b", 2)]) };
        let one = after(&Assignment::default(), message);
        let two = after(&one, full(vec![pod("b", 2)]));
        assert!(two.pods["a"].removing && !two.pods["b"].removing);
        assert!(two.peers.is_empty());
    }

    #[test]
    fn a_delta_changes_only_what_it_names() {
        let one = after(&Assignment::default(), full(vec![pod("a", 1), pod("b", 2)]));
        let delta = v1::Assignment { full: false, removed_pods: vec!["a".into()], ..full(vec![pod("c", 3)]) };
        let two = after(&one, delta);
        assert!(two.pods["a"].removing);
        assert_eq!(two.pods["b"], one.pods["b"]);
        assert_eq!(two.pods.len(), 3);
    }

    /// A node came back after its only pod of a group was replaced. Its new lease was good at once, and the old pod's
    /// supervisor, which had not yet been told to stop, started its tasks again beside the new pod's.
    #[test]
    fn in_a_new_term_the_lease_is_good_when_what_was_replaced_is_gone() {
        let single = |id: &str, host| v1::PodAssignment { singleton: true, serial: 1, ..pod(id, host) };
        let of_term = |term, pods| v1::Assignment { term, ..full(pods) };
        let one = after(&Assignment::default(), of_term(1, vec![single("a", 1), single("b", 2)]));
        assert_eq!(one.term_of_singletons(), Some(1));
        let two = after(&one, of_term(1, vec![single("b", 2)]));
        assert_eq!(two.term_of_singletons(), Some(1), "b goes on while a is stopped");
        let three = after(&one, of_term(2, vec![single("b", 2)]));
        assert_eq!(three.term_of_singletons(), Some(1), "a may have been replaced");
        assert_eq!(forget(&identity(), &three, &["a".into()]).term_of_singletons(), Some(2));
    }

    #[test]
    fn a_removed_pod_that_is_not_here_is_gone_already() {
        let message = v1::Assignment { removed_pods: vec!["old".into()], ..full(vec![]) };
        let merged = merge(&identity(), &Assignment::default(), message);
        assert_eq!(merged.unknown, BTreeSet::from(["old".to_owned()]));
    }

    #[test]
    fn the_ipv4_of_a_pod_that_is_ending_is_not_free_yet() {
        let one = after(&Assignment::default(), full(vec![pod("a", 1)]));
        let two = after(&one, full(vec![pod("b", 2)]));
        assert_eq!(two.pods["b"].ipv4, Some("10.254.0.2".parse().unwrap()));
        let three = after(&forget(&identity(), &two, &["a".into()]), full(vec![pod("b", 2), pod("c", 3)]));
        assert_eq!(three.pods["c"].ipv4, Some("10.254.0.1".parse().unwrap()));
    }

    #[test]
    fn a_pod_that_waited_for_an_ipv4_gets_the_one_that_is_freed() {
        let identity = Identity { pod_ipv4: "10.0.0.0/30".parse().unwrap(), ..identity() };
        let pods = vec![pod("a", 1), pod("b", 2), pod("c", 3)];
        let one = merge(&identity, &Assignment::default(), full(pods)).next;
        assert_eq!(one.pods["c"].ipv4, None);
        assert_eq!(forget(&identity, &one, &["a".into()]).pods["c"].ipv4, Some("10.0.0.1".parse().unwrap()));
    }

    #[test]
    fn a_pod_that_is_wrong_is_kept_with_its_problem() {
        let foreign = |pod: &mut v1::PodAssignment| pod.address = vec![0xfd; 16];
        assert_eq!(problem_of(foreign), "pod a: the server gave it an address that is not of this node");
        let other_group = |pod: &mut v1::PodAssignment| pod.address[15] ^= 1;
        assert_eq!(problem_of(other_group), "pod a: the server gave it an address that is not of this node");
        assert_eq!(problem_of(|pod| pod.address.clear()), "pod a: the server gave it no address");
        let task = "pod a: the server gave it a task that cannot be started";
        assert_eq!(problem_of(|pod| pod.tasks.clear()), task);
        assert_eq!(problem_of(|pod| pod.tasks[0].name = "../x".into()), task);
        assert_eq!(problem_of(|pod| pod.tasks[0].exec = vec!["sh".into()]), task);
        assert_eq!(problem_of(|pod| pod.tasks[0].exec.push("a\0b".into())), task);
    }

    #[test]
    fn an_id_that_is_not_a_name_is_never_kept() {
        for id in ["", "../../etc", "A", "-a", "a-", "a.b", &"a".repeat(81)] {
            let merged = merge(&identity(), &Assignment::default(), full(vec![pod(id, 1)]));
            assert!(merged.next.pods.is_empty() && merged.complaints.len() == 1, "{id}");
        }
    }

    #[test]
    fn a_pod_whose_address_is_taken_cannot_run_until_the_server_gives_it_another() {
        let one = after(&Assignment::default(), full(vec![pod("a", 1)]));
        let taken = take_address(&one, "a", [2, 0, 0, 0, 1, 0], "another has it".into());
        assert_eq!(taken.pods["a"].problem.as_deref(), Some("another has it"));
        // The server has not heard of it yet.
        let again = merge(&identity(), &taken, full(vec![pod("a", 1)])).next;
        assert_eq!(again, Assignment { head: again.head.clone(), ..taken.clone() });

        let moved = after(&again, full(vec![pod("a", 2)]));
        assert_eq!((moved.pods["a"].address, moved.pods["a"].taken_by), (address(2), None));
        assert_eq!(moved.pods["a"].problem, None);
        assert_eq!(moved.pods["a"].ipv4, one.pods["a"].ipv4);
    }

    #[test]
    fn an_address_that_is_wrong_does_not_take_the_place_of_one_that_is_right() {
        let one = after(&Assignment::default(), full(vec![pod("a", 1)]));
        let mut wrong = pod("a", 1);
        wrong.address = vec![0xfd; 16];
        let merged = merge(&identity(), &one, full(vec![wrong]));
        assert_eq!(merged.complaints, ["pod a: the server gave it an address that is not of this node"]);
        assert_eq!(merged.next.pods["a"].address, address(1));
    }

    #[test]
    fn a_peer_with_this_nodes_subnet_is_refused_and_one_with_a_lans_is_not() {
        let mut outside = peer("n4", 0xb);
        outside.prefix.as_mut().unwrap().address[1] = 9;
        let peers = vec![peer("n2", 0xa), peer("n3", 0xc), outside];
        let message = v1::Assignment { peers, ..full(vec![]) };
        let merged = merge(&identity(), &Assignment::default(), message.clone());
        assert_eq!(merged.next.peers.keys().collect::<Vec<_>>(), ["n3", "n4"]);
        assert_eq!(merged.complaints, ["peer \"n2\": its prefix is this node's own"]);

        let lan = merged.next.peers["n4"].prefix;
        let on_the_lan = Identity { prefix: lan, ..identity() };
        let merged = merge(&on_the_lan, &Assignment::default(), message);
        assert_eq!(merged.next.peers.len(), 3, "{:?}", merged.complaints);
    }
}
