//! The cluster's state in memory: the stored values, and indexes that are made from them.
//!
//! `State::set` is the only way in, so that an index can never disagree with what it was made from.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
    sync::Arc,
};

use crate::{
    change::{Change, JobRecord, Key, Revision, Value},
    cluster::{Cluster, Counters},
    job::Job,
    node::Node,
    pod::{Pod, PodId, PodPhase},
    token::{Token, TokenId},
};

/// Everything that is stored, and indexes of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    revision: u64,
    cluster: Option<Arc<Cluster>>,
    counters: Counters,
    jobs: BTreeMap<String, Arc<JobRecord>>,
    nodes: BTreeMap<String, Arc<Node>>,
    pods: BTreeMap<PodId, Arc<Pod>>,
    tokens: BTreeMap<TokenId, Arc<Token>>,
    index: Index,
}

/// What is asked of a node's capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Thousandths of a CPU.
    pub cpu_millis: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// Pods.
    pub pods: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Index {
    usage: BTreeMap<String, Usage>,
    on_node: BTreeMap<String, BTreeSet<PodId>>,
    groups: Groups,
    /// The pods of `groups` that have no node or a lost one.
    unplaced: Groups,
    addresses: BTreeSet<Ipv6Addr>,
    versions: BTreeMap<(String, u32), usize>,
}

/// Job, group, serial number: pods in the order in which they were made.
type Groups = BTreeMap<String, BTreeMap<String, BTreeMap<u64, PodId>>>;

impl State {
    /// The state that these values make.
    #[must_use]
    pub fn load(revision: u64, values: impl IntoIterator<Item = (Key, Value)>) -> State {
        let mut state = State { revision, ..State::default() };
        for (key, value) in values {
            state.set(&key, Some(value));
        }
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

    /// Nodes by name.
    #[must_use]
    pub fn nodes(&self) -> &BTreeMap<String, Arc<Node>> {
        &self.nodes
    }

    /// Pods by id.
    #[must_use]
    pub fn pods(&self) -> &BTreeMap<PodId, Arc<Pod>> {
        &self.pods
    }

    /// Tokens by the hash of their secret.
    #[must_use]
    pub fn tokens(&self) -> &BTreeMap<TokenId, Arc<Token>> {
        &self.tokens
    }

    /// What is asked of a node.
    #[must_use]
    pub fn usage(&self, node: &str) -> Usage {
        self.index.usage.get(node).copied().unwrap_or_default()
    }

    /// The pods that have this node, by id.
    pub fn pods_on(&self, node: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.index.on_node.get(node).into_iter().flatten().filter_map(|id| self.pods.get(id))
    }

    /// The pods of a job, by group and then in the order in which they were made.
    pub fn pods_of_job(&self, job: &str) -> impl Iterator<Item = &Arc<Pod>> {
        let groups = self.index.groups.get(job).into_iter().flat_map(BTreeMap::values);
        groups.flat_map(BTreeMap::values).filter_map(|id| self.pods.get(id))
    }

    /// The pods of a group in the order in which they were made.
    pub fn pods_of_group(&self, job: &str, group: &str) -> impl Iterator<Item = &Arc<Pod>> {
        let ids = self.index.groups.get(job).and_then(|groups| groups.get(group));
        ids.into_iter().flat_map(BTreeMap::values).filter_map(|id| self.pods.get(id))
    }

    /// The pods of a group that are pending or lost, in the order in which they were made.
    pub fn unplaced_of_group(&self, job: &str, group: &str) -> impl Iterator<Item = &Arc<Pod>> {
        let ids = self.index.unplaced.get(job).and_then(|groups| groups.get(group));
        ids.into_iter().flat_map(BTreeMap::values).filter_map(|id| self.pods.get(id))
    }

    /// Groups that have a pod that is pending or lost.
    #[must_use]
    pub fn unplaced_groups(&self) -> Vec<(String, String)> {
        let pairs = |(job, groups): (&String, &BTreeMap<String, _>)| {
            groups.keys().map(|group| (job.clone(), group.clone())).collect::<Vec<_>>()
        };
        self.index.unplaced.iter().flat_map(pairs).collect()
    }

    /// Whether a pod has this address now.
    #[must_use]
    pub fn has_address(&self, address: &Ipv6Addr) -> bool {
        self.index.addresses.contains(address)
    }

    /// Whether a pod runs this version of the job.
    #[must_use]
    pub fn runs_version(&self, job: &str, version: u32) -> bool {
        self.index.versions.contains_key(&(job.to_owned(), version))
    }

    /// The value at a key.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<Value> {
        match key {
            Key::Cluster => self.cluster.clone().map(Value::Cluster),
            Key::Counters if self.counters == Counters::default() => None,
            Key::Counters => Some(Value::Counters(self.counters)),
            Key::Job(name) => self.jobs.get(name).cloned().map(Value::Job),
            Key::Node(name) => self.nodes.get(name).cloned().map(Value::Node),
            Key::Pod(id) => self.pods.get(id).cloned().map(Value::Pod),
            Key::Token(id) => self.tokens.get(id).cloned().map(Value::Token),
        }
    }

    /// Everything that is stored, in the order of the keys.
    pub fn values(&self) -> impl Iterator<Item = (Key, Value)> {
        let cluster = self.cluster.iter().map(|cluster| (Key::Cluster, Value::Cluster(cluster.clone())));
        let counters = self.get(&Key::Counters).map(|counters| (Key::Counters, counters));
        let jobs = self.jobs.iter().map(|(name, job)| (Key::Job(name.clone()), Value::Job(job.clone())));
        let nodes =
            self.nodes.iter().map(|(name, node)| (Key::Node(name.clone()), Value::Node(node.clone())));
        let pods = self.pods.iter().map(|(id, pod)| (Key::Pod(id.clone()), Value::Pod(pod.clone())));
        let tokens =
            self.tokens.iter().map(|(id, token)| (Key::Token(id.clone()), Value::Token(token.clone())));
        cluster.chain(counters).chain(jobs).chain(nodes).chain(pods).chain(tokens)
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
            (Key::Job(name), Some(Value::Job(job))) => drop(self.jobs.insert(name.clone(), job)),
            (Key::Job(name), _) => drop(self.jobs.remove(name)),
            (Key::Node(name), Some(Value::Node(node))) => drop(self.nodes.insert(name.clone(), node)),
            (Key::Node(name), _) => drop(self.nodes.remove(name)),
            (Key::Pod(id), Some(Value::Pod(pod))) => self.set_pod(id, Some(pod)),
            (Key::Pod(id), _) => self.set_pod(id, None),
            (Key::Token(id), Some(Value::Token(token))) => drop(self.tokens.insert(id.clone(), token)),
            (Key::Token(id), _) => drop(self.tokens.remove(id)),
        }
    }

    fn set_pod(&mut self, id: &PodId, pod: Option<Arc<Pod>>) {
        if let Some(new) = &pod {
            self.index.add(new);
        }
        let old = match pod {
            Some(pod) => self.pods.insert(id.clone(), pod),
            None => self.pods.remove(id),
        };
        if let Some(old) = old {
            self.index.take_away(&old, self.pods.get(id).map(Arc::as_ref));
        }
    }
}

impl Index {
    fn add(&mut self, pod: &Pod) {
        insert(&mut self.groups, pod);
        if is_unplaced(pod) {
            insert(&mut self.unplaced, pod);
        }
        *self.versions.entry((pod.job.clone(), pod.job_version)).or_default() += 1;
        self.addresses.extend(pod.address);
        if let Some(node) = &pod.node {
            self.on_node.entry(node.clone()).or_default().insert(pod.id.clone());
            let usage = self.usage.entry(node.clone()).or_default();
            usage.cpu_millis += u64::from(pod.resources.cpu.0);
            usage.memory_bytes = usage.memory_bytes.saturating_add(pod.resources.memory.0);
            usage.pods += 1;
        }
    }

    /// Takes away what `old` added and `new`, which was added before, does not hold.
    fn take_away(&mut self, old: &Pod, new: Option<&Pod>) {
        if new.is_none() {
            remove(&mut self.groups, old);
        }
        if is_unplaced(old) && !new.is_some_and(is_unplaced) {
            remove(&mut self.unplaced, old);
        }
        let version = (old.job.clone(), old.job_version);
        if let Some(count) = self.versions.get_mut(&version) {
            *count -= 1;
            if *count == 0 {
                self.versions.remove(&version);
            }
        }
        if let Some(address) = old.address.filter(|_| new.and_then(|new| new.address) != old.address) {
            self.addresses.remove(&address);
        }
        if let Some(node) = &old.node {
            self.leave_node(node, old, new.is_some_and(|new| new.node == old.node));
        }
    }

    fn leave_node(&mut self, node: &str, old: &Pod, stays: bool) {
        if let Some(usage) = self.usage.get_mut(node) {
            usage.cpu_millis -= u64::from(old.resources.cpu.0);
            usage.memory_bytes = usage.memory_bytes.saturating_sub(old.resources.memory.0);
            usage.pods -= 1;
            if usage.pods == 0 {
                self.usage.remove(node);
            }
        }
        if stays {
            return;
        }
        if let Some(ids) = self.on_node.get_mut(node) {
            ids.remove(&old.id);
            if ids.is_empty() {
                self.on_node.remove(node);
            }
        }
    }
}

fn is_unplaced(pod: &Pod) -> bool {
    matches!(pod.phase, PodPhase::Pending | PodPhase::Lost)
}

fn insert(groups: &mut Groups, pod: &Pod) {
    let group = groups.entry(pod.job.clone()).or_default().entry(pod.group.clone()).or_default();
    group.insert(pod.serial, pod.id.clone());
}

fn remove(groups: &mut Groups, pod: &Pod) {
    let Some(job) = groups.get_mut(&pod.job) else { return };
    if let Some(group) = job.get_mut(&pod.group) {
        group.remove(&pod.serial);
        if group.is_empty() {
            job.remove(&pod.group);
        }
    }
    if job.is_empty() {
        groups.remove(&pod.job);
    }
}
