//! The cluster's state in memory: the stored values, and indexes that are made from them.
//!
//! `State::set` is the only way in, so that an index can never disagree with what it was made from.

use std::{net::Ipv6Addr, sync::Arc};

pub use self::{
    labels::Values,
    seat::{Seat, Usage},
    seats::Seats,
    versions::Versions,
};

use crate::{
    authority::Authorities,
    change::{Change, JobRecord, Key, Revision, Value},
    cluster::{Cluster, Counters},
    deploy::{Deploy, DeployId},
    ending::LastEnding,
    failure::Failures,
    job::{Group, Job},
    node::Node,
    pod::{Pod, PodId},
    renewal::Renewal,
    restore::Restored,
    token::{Token, TokenId},
};

mod index;
mod labels;
mod seat;
mod seats;
mod versions;

use index::Index;

/// A map in order of which a copy costs next to nothing: copies share what they have in common.
pub type Map<K, V> = imbl::OrdMap<K, V>;

/// Everything that is stored, and indexes of it. A copy of it costs little, however large it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    revision: u64,
    cluster: Option<Arc<Cluster>>,
    counters: Counters,
    authorities: Option<Arc<Authorities>>,
    jobs: Map<String, Arc<JobRecord>>,
    versions: Versions,
    nodes: Map<String, Arc<Node>>,
    pods: Map<PodId, Arc<Pod>>,
    endings: Map<PodId, Arc<LastEnding>>,
    failures: Map<String, Arc<Failures>>,
    deploys: Map<DeployId, Arc<Deploy>>,
    tokens: Map<TokenId, Arc<Token>>,
    renewals: Map<String, Arc<Renewal>>,
    restored: Option<Arc<Restored>>,
    index: Index,
}

impl State {
    /// The state that these values make.
    #[must_use]
    pub fn load(revision: u64, values: impl IntoIterator<Item = (Key, Value)>) -> State {
        let mut state = State { revision, ..State::default() };
        // Each node gets its place once, when all is known that its pods ask for, and not anew for every pod.
        let mut nodes = Vec::new();
        for (key, value) in values {
            match key {
                Key::Node(_) => nodes.push((key, value)),
                _ => state.set(&key, Some(value)),
            }
        }
        nodes.into_iter().for_each(|(key, value)| state.set(&key, Some(value)));
        state
    }

    /// The number of the last revision that is in it.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// What never changes; `None` before the first start.
    #[must_use]
    pub fn cluster(&self) -> Option<&Arc<Cluster>> {
        self.cluster.as_ref()
    }

    /// The numbers that only grow.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Which CAs vouch for the members; `None` as long as there is the one with which the cluster began.
    #[must_use]
    pub fn authorities(&self) -> Option<&Arc<Authorities>> {
        self.authorities.as_ref()
    }

    /// Jobs that are not deleted, by name.
    pub fn jobs(&self) -> impl Iterator<Item = (&String, &Arc<JobRecord>)> {
        self.jobs.iter().filter(|(_, record)| !record.removed)
    }

    /// A job's record, also when it is deleted.
    #[must_use]
    pub fn job_record(&self, name: &str) -> Option<&Arc<JobRecord>> {
        self.jobs.get(name)
    }

    /// The text in force of a job that is not deleted.
    #[must_use]
    pub fn job(&self, name: &str) -> Option<&Arc<Job>> {
        self.jobs.get(name)?.current()
    }

    /// The text of the version that a pod runs.
    #[must_use]
    pub fn job_of(&self, pod: &Pod) -> Option<&Arc<Job>> {
        self.jobs.get(&pod.job)?.versions.get(&pod.job_version)
    }

    /// What the version that a pod runs says of its group.
    #[must_use]
    pub fn group_of(&self, pod: &Pod) -> Option<&Group> {
        self.job_of(pod)?.group(&pod.group)
    }

    /// The node that a pod has.
    #[must_use]
    pub fn node_of(&self, pod: &Pod) -> Option<&Arc<Node>> {
        self.nodes.get(pod.node.as_ref()?)
    }

    /// Versions of jobs, deleted ones among them.
    #[must_use]
    pub fn versions(&self) -> &Versions {
        &self.versions
    }

    /// Deploys by job and version: under way, the last one that ended well, and those that gave up.
    #[must_use]
    pub fn deploys(&self) -> &Map<DeployId, Arc<Deploy>> {
        &self.deploys
    }

    /// Nodes by name.
    #[must_use]
    pub fn nodes(&self) -> &Map<String, Arc<Node>> {
        &self.nodes
    }

    /// The other nodes on the link of one.
    #[must_use]
    pub fn neighbours(&self, name: &str) -> Vec<&str> {
        let Some(node) = self.nodes.get(name) else { return Vec::new() };
        let here = self.nodes.values().filter(|other| other.name != name && other.shares_link(node));
        here.map(|other| other.name.as_str()).collect()
    }

    /// Pods by id.
    #[must_use]
    pub fn pods(&self) -> &Map<PodId, Arc<Pod>> {
        &self.pods
    }

    /// How a pod failed last.
    #[must_use]
    pub fn ending(&self, pod: &PodId) -> Option<&Arc<LastEnding>> {
        self.endings.get(pod)
    }

    /// Tokens by the hash of their secret.
    #[must_use]
    pub fn tokens(&self) -> &Map<TokenId, Arc<Token>> {
        &self.tokens
    }

    /// Keys that others take the place of, by their hash.
    #[must_use]
    pub fn renewals(&self) -> &Map<String, Arc<Renewal>> {
        &self.renewals
    }

    /// While leases may run that the server before a restore has granted: nothing that there may only be one of has a
    /// place.
    #[must_use]
    pub fn restored(&self) -> Option<&Arc<Restored>> {
        self.restored.as_ref()
    }

    /// Whether another key has taken the place of this one of a person or load balancer.
    #[must_use]
    pub fn is_replaced(&self, key: &str) -> bool {
        self.renewals.get(key).is_some_and(|renewal| renewal.confirmed)
    }

    /// Whether a node may speak with this key: its own, or the one that comes next.
    #[must_use]
    pub fn is_key_of(&self, node: &Node, key: &str) -> bool {
        node.key == key || self.renewals.get(&node.key).is_some_and(|renewal| renewal.new == key)
    }

    /// Whether this is the key of a node that somebody deleted, or the one that was to come next.
    #[must_use]
    pub fn is_deleted(&self, key: &str) -> bool {
        let deleted = |renewal: &Renewal| renewal.deleted.is_some();
        self.renewals.get(key).is_some_and(|renewal| deleted(renewal))
            || self.renewals.values().any(|renewal| renewal.new == key && deleted(renewal))
    }

    /// What is asked of a node.
    #[must_use]
    pub fn usage(&self, node: &str) -> Usage {
        self.index.usage(node).cloned().unwrap_or_default()
    }

    /// Nodes and what is asked of them, the least used first; nodes that are used alike by name.
    #[must_use]
    pub fn seats(&self) -> &Seats {
        &self.index.seats
    }

    /// The same by the value of a label, if groups are spread over it; `None` is nodes without the label.
    #[must_use]
    pub fn seats_by(&self, label: &str) -> Option<&Values> {
        self.index.seats_by(label)
    }

    /// A node and what is asked of it.
    #[must_use]
    pub fn seat(&self, node: &str) -> Option<&Seat> {
        self.index.seat(self.nodes.get(node)?)
    }

    /// How many pods the jobs that are not deleted ask for.
    #[must_use]
    pub fn pods_wanted(&self) -> u64 {
        self.index.pods_wanted
    }

    /// Jobs that have rules by which their pods keep apart from those of `job`.
    pub fn jobs_that_keep_apart(&self, job: &str) -> impl Iterator<Item = &Arc<Job>> {
        self.index.keep_apart(job).filter_map(|name| self.job(name))
    }

    /// Where pods of a group have failed.
    #[must_use]
    pub fn failures(&self, job: &str, group: &str) -> Option<&Arc<Failures>> {
        if self.failures.is_empty() {
            return None;
        }
        self.failures.get(&format!("{job}/{group}"))
    }

    /// The pods that have this node, in the order in which they were made.
    pub fn pods_on(&self, node: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.index.pods_on(node)
    }

    /// The pods of a job, by group and then in the order in which they were made.
    pub fn pods_of_job(&self, job: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.index.groups.job(job)
    }

    /// The pods of a group in the order in which they were made.
    pub fn pods_of_group(&self, job: &str, group: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.index.groups.group(job, group)
    }

    /// The pods of a group that are pending or lost, in the order in which they were made.
    pub fn unplaced_of_group(&self, job: &str, group: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.index.unplaced.group(job, group)
    }

    /// Groups that have a pod that is pending or lost.
    #[must_use]
    pub fn unplaced_groups(&self) -> Vec<(String, String)> {
        self.index.unplaced.names()
    }

    /// Whether a pod has this address now.
    #[must_use]
    pub fn has_address(&self, address: &Ipv6Addr) -> bool {
        self.index.has_address(address)
    }

    /// Whether a pod runs this version of the job.
    #[must_use]
    pub fn runs_version(&self, job: &str, version: u32) -> bool {
        self.index.runs_version(job, version)
    }

    /// The value at a key.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<Value> {
        match key {
            Key::Cluster => self.cluster.clone().map(Value::Cluster),
            Key::Counters if self.counters == Counters::default() => None,
            Key::Counters => Some(Value::Counters(self.counters)),
            Key::Authorities => self.authorities.clone().map(Value::Authorities),
            Key::Job(name) => self.jobs.get(name).cloned().map(Value::Job),
            Key::Version(id) => self.versions.get(id).cloned().map(Value::Version),
            Key::Node(name) => self.nodes.get(name).cloned().map(Value::Node),
            Key::Pod(id) => self.pods.get(id).cloned().map(Value::Pod),
            Key::Ending(id) => self.endings.get(id).cloned().map(Value::Ending),
            Key::Failures(group) => self.failures.get(group).cloned().map(Value::Failures),
            Key::Deploy(id) => self.deploys.get(id).cloned().map(Value::Deploy),
            Key::Token(id) => self.tokens.get(id).cloned().map(Value::Token),
            Key::Renewal(key) => self.renewals.get(key).cloned().map(Value::Renewal),
            Key::Restored => self.restored.clone().map(Value::Restored),
        }
    }

    /// Everything that is stored, in the order of the keys.
    pub fn values(&self) -> impl Iterator<Item = (Key, Value)> {
        let cluster = self.cluster.iter().map(|cluster| (Key::Cluster, Value::Cluster(cluster.clone())));
        let counters = self.get(&Key::Counters).map(|counters| (Key::Counters, counters));
        let authorities = self.get(&Key::Authorities).map(|authorities| (Key::Authorities, authorities));
        let jobs = self.jobs.iter().map(|(name, job)| (Key::Job(name.clone()), Value::Job(job.clone())));
        let versions = self.versions.iter();
        let versions =
            versions.map(|(id, version)| (Key::Version(id.clone()), Value::Version(version.clone())));
        let nodes =
            self.nodes.iter().map(|(name, node)| (Key::Node(name.clone()), Value::Node(node.clone())));
        let pods = self.pods.iter().map(|(id, pod)| (Key::Pod(id.clone()), Value::Pod(pod.clone())));
        let endings =
            self.endings.iter().map(|(id, ending)| (Key::Ending(id.clone()), Value::Ending(ending.clone())));
        let failures = self.failures.iter();
        let failures = failures
            .map(|(group, failures)| (Key::Failures(group.clone()), Value::Failures(failures.clone())));
        let deploys =
            self.deploys.iter().map(|(id, deploy)| (Key::Deploy(id.clone()), Value::Deploy(deploy.clone())));
        let tokens =
            self.tokens.iter().map(|(id, token)| (Key::Token(id.clone()), Value::Token(token.clone())));
        let renewals =
            self.renewals.iter().map(|(key, next)| (Key::Renewal(key.clone()), Value::Renewal(next.clone())));
        let restored = self.restored.iter().map(|mark| (Key::Restored, Value::Restored(mark.clone())));
        cluster
            .chain(counters)
            .chain(authorities)
            .chain(jobs)
            .chain(versions)
            .chain(nodes)
            .chain(pods)
            .chain(endings)
            .chain(failures)
            .chain(deploys)
            .chain(tokens)
            .chain(renewals)
            .chain(restored)
    }

    /// Takes over a revision that is one more than this state's.
    ///
    /// # Panics
    /// When it is another: the caller has lost one.
    pub fn advance(&mut self, revision: &Revision) {
        assert_eq!(revision.revision, self.revision + 1, "revisions come in order, none left out");
        for change in &revision.changes {
            self.set(&change.key, change.new.clone());
        }
        self.revision = revision.revision;
    }

    /// The values of the next revision are there already.
    pub(crate) fn count_revision(&mut self) {
        self.revision += 1;
    }

    /// Takes back the last revision: it could not be made durable.
    ///
    /// # Panics
    /// When it is not the last.
    pub fn undo(&mut self, revision: &Revision) {
        assert_eq!(revision.revision, self.revision, "only the last revision can be taken back");
        for Change { key, old, .. } in &revision.changes {
            self.set(key, old.clone());
        }
        self.revision -= 1;
    }

    /// Puts a value at a key, or takes it away. A value of another kind than the key's is absence: the
    /// store's format check has refused such a file before.
    pub(crate) fn set(&mut self, key: &Key, value: Option<Value>) {
        match (key, value) {
            (Key::Cluster, Some(Value::Cluster(cluster))) => self.cluster = Some(cluster),
            (Key::Cluster, _) => self.cluster = None,
            (Key::Counters, Some(Value::Counters(counters))) => self.counters = counters,
            (Key::Counters, _) => self.counters = Counters::default(),
            (Key::Authorities, Some(Value::Authorities(authorities))) => self.authorities = Some(authorities),
            (Key::Authorities, _) => self.authorities = None,
            (Key::Job(name), Some(Value::Job(job))) => self.set_job(name, Some(job)),
            (Key::Job(name), _) => self.set_job(name, None),
            (Key::Version(id), Some(Value::Version(version))) => self.versions.set(id, Some(version)),
            (Key::Version(id), _) => self.versions.set(id, None),
            (Key::Node(name), Some(Value::Node(node))) => self.set_node(name, Some(node)),
            (Key::Node(name), _) => self.set_node(name, None),
            (Key::Pod(id), Some(Value::Pod(pod))) => self.set_pod(id, Some(pod)),
            (Key::Pod(id), _) => self.set_pod(id, None),
            (Key::Ending(id), Some(Value::Ending(ending))) => drop(self.endings.insert(id.clone(), ending)),
            (Key::Ending(id), _) => drop(self.endings.remove(id)),
            (Key::Failures(group), Some(Value::Failures(failures))) => {
                drop(self.failures.insert(group.clone(), failures));
            }
            (Key::Failures(group), _) => drop(self.failures.remove(group)),
            (Key::Deploy(id), Some(Value::Deploy(deploy))) => drop(self.deploys.insert(id.clone(), deploy)),
            (Key::Deploy(id), _) => drop(self.deploys.remove(id)),
            (Key::Token(id), Some(Value::Token(token))) => drop(self.tokens.insert(id.clone(), token)),
            (Key::Token(id), _) => drop(self.tokens.remove(id)),
            (Key::Renewal(key), Some(Value::Renewal(next))) => {
                drop(self.renewals.insert(key.clone(), next));
            }
            (Key::Renewal(key), _) => drop(self.renewals.remove(key)),
            (Key::Restored, Some(Value::Restored(mark))) => self.restored = Some(mark),
            (Key::Restored, _) => self.restored = None,
        }
    }

    fn set_job(&mut self, name: &str, record: Option<Arc<JobRecord>>) {
        let old = match record.clone() {
            Some(record) => self.jobs.insert(name.to_owned(), record),
            None => self.jobs.remove(name),
        };
        self.index.change_job(name, old.as_ref(), record.as_ref());
    }

    fn set_node(&mut self, name: &str, node: Option<Arc<Node>>) {
        let old = match node.clone() {
            Some(node) => self.nodes.insert(name.to_owned(), node),
            None => self.nodes.remove(name),
        };
        self.index.change_node(old.as_ref(), node.as_ref());
    }

    fn set_pod(&mut self, id: &PodId, pod: Option<Arc<Pod>>) {
        let old = match pod.clone() {
            Some(pod) => self.pods.insert(id.clone(), pod),
            None => self.pods.remove(id),
        };
        self.index.change_pod(&self.nodes, old.as_ref(), pod.as_ref());
    }
}
