//! Indexes of the stored values: what they would otherwise have to be walked for.
//!
//! Each is a function of the values alone, in whatever order they came: two states of equal values have equal
//! indexes.

use std::{net::Ipv6Addr, sync::Arc};

use imbl::OrdSet;

use super::{
    Map,
    labels::{Labels, Values},
    seat::{Seat, Usage},
    seats::Seats,
};
use crate::{
    change::JobRecord,
    job::Job,
    node::Node,
    pod::{Pod, PodPhase},
};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) groups: Groups,
    /// The pods of `groups` that are pending or lost.
    pub(super) unplaced: Groups,
    /// How many pods the jobs ask for.
    pub(super) pods_wanted: u64,
    /// By the name of a job: those whose rules keep their pods apart from its.
    keep_apart: Map<String, OrdSet<String>>,
    /// What is asked of nodes, also of those whose own record is not there at the moment.
    usage: Map<String, Usage>,
    pub(super) seats: Seats,
    labels: Labels,
    on_node: Map<String, Map<u64, Arc<Pod>>>,
    addresses: OrdSet<Ipv6Addr>,
    /// How many pods run each version of a job.
    versions: Map<(String, u32), usize>,
}

/// Job, group, serial number: pods in the order in which they were made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Groups(Map<String, Map<String, Map<u64, Arc<Pod>>>>);

impl Index {
    pub(super) fn usage(&self, node: &str) -> Option<&Usage> {
        self.usage.get(node)
    }

    /// Nodes by the value of a label, if a group is spread over it.
    pub(super) fn seats_by(&self, label: &str) -> Option<&Values> {
        self.labels.values(label)
    }

    pub(super) fn keep_apart(&self, from: &str) -> impl Iterator<Item = &String> {
        self.keep_apart.get(from).into_iter().flatten()
    }

    pub(super) fn seat(&self, node: &Node) -> Option<&Seat> {
        match self.usage.get(&node.name) {
            Some(usage) => self.seats.get(node, usage),
            None => self.seats.get(node, &Usage::default()),
        }
    }

    pub(super) fn pods_on(&self, node: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.on_node.get(node).into_iter().flat_map(Map::values)
    }

    pub(super) fn has_address(&self, address: &Ipv6Addr) -> bool {
        self.addresses.contains(address)
    }

    pub(super) fn runs_version(&self, job: &str, version: u32) -> bool {
        self.versions.contains_key(&(job.to_owned(), version))
    }

    pub(super) fn change_job(
        &mut self,
        name: &str,
        old: Option<&Arc<JobRecord>>,
        new: Option<&Arc<JobRecord>>,
    ) {
        let text = |record: Option<&Arc<JobRecord>>| record.and_then(|record| record.current().cloned());
        let (old_text, new_text) = (text(old), text(new));
        let wanted = |job: &Option<Arc<Job>>| job.as_ref().map_or(0, |job| job.pods_wanted());
        self.pods_wanted = self.pods_wanted + wanted(&new_text) - wanted(&old_text);
        self.change_keep_apart(name, old_text.as_deref(), new_text.as_deref());
        self.labels.change_job(old.map(AsRef::as_ref), new.map(AsRef::as_ref), &self.seats);
    }

    fn change_keep_apart(&mut self, name: &str, old: Option<&Job>, new: Option<&Job>) {
        for from in old.into_iter().flat_map(Job::keeps_apart_from) {
            let Some(names) = self.keep_apart.get_mut(from) else { continue };
            names.remove(name);
            if names.is_empty() {
                self.keep_apart.remove(from);
            }
        }
        for from in new.into_iter().flat_map(Job::keeps_apart_from) {
            self.keep_apart.entry(from.to_owned()).or_default().insert(name.to_owned());
        }
    }

    pub(super) fn change_node(&mut self, old: Option<&Arc<Node>>, new: Option<&Arc<Node>>) {
        let Some(name) = old.or(new).map(|node| &node.name) else { return };
        let usage = self.usage.get(name).cloned().unwrap_or_default();
        if let Some(old) = old {
            self.unseat(old, &usage);
        }
        if let Some(new) = new {
            self.seat_at(new, &usage);
        }
    }

    fn seat_at(&mut self, node: &Arc<Node>, usage: &Usage) {
        self.labels.insert(node, usage);
        self.seats.insert(node, usage.clone());
    }

    fn unseat(&mut self, node: &Node, usage: &Usage) {
        self.labels.remove(node, usage);
        self.seats.remove(node, usage);
    }

    pub(super) fn change_pod(
        &mut self,
        nodes: &Map<String, Arc<Node>>,
        old: Option<&Arc<Pod>>,
        new: Option<&Arc<Pod>>,
    ) {
        if let Some(new) = new {
            self.groups.insert(new);
        } else if let Some(old) = old {
            self.groups.remove(old);
        }
        self.change_unplaced(old, new);
        self.change_version(old, new);
        self.change_address(old, new);
        self.change_on_node(old, new);
        self.change_usage(nodes, old, new);
    }

    fn change_unplaced(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
        match (old.filter(|old| is_unplaced(old)), new.filter(|new| is_unplaced(new))) {
            (_, Some(new)) => self.unplaced.insert(new),
            (Some(old), None) => self.unplaced.remove(old),
            (None, None) => {}
        }
    }

    fn change_version(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
        if old.map(|old| old.job_version) == new.map(|new| new.job_version) {
            return;
        }
        if let Some(new) = new {
            *self.versions.entry((new.job.clone(), new.job_version)).or_default() += 1;
        }
        let Some(old) = old else { return };
        let key = (old.job.clone(), old.job_version);
        let Some(count) = self.versions.get_mut(&key) else { return };
        *count -= 1;
        if *count == 0 {
            self.versions.remove(&key);
        }
    }

    fn change_address(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
        let (old, new) = (old.and_then(|old| old.address), new.and_then(|new| new.address));
        if old != new {
            old.map(|old| self.addresses.remove(&old));
            self.addresses.extend(new);
        }
    }

    fn change_on_node(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
        let node = |pod: Option<&Arc<Pod>>| pod.and_then(|pod| pod.node.clone());
        let (left, taken) = (node(old), node(new));
        if let (Some(node), Some(new)) = (&taken, new) {
            match self.on_node.get_mut(node) {
                Some(pods) => drop(pods.insert(new.serial, new.clone())),
                None => drop(self.on_node.insert(node.clone(), Map::unit(new.serial, new.clone()))),
            }
        }
        let (Some(node), Some(old)) = (left.filter(|left| Some(left) != taken.as_ref()), old) else { return };
        if let Some(pods) = self.on_node.get_mut(&node) {
            pods.remove(&old.serial);
            if pods.is_empty() {
                self.on_node.remove(&node);
            }
        }
    }

    fn change_usage(
        &mut self,
        nodes: &Map<String, Arc<Node>>,
        old: Option<&Arc<Pod>>,
        new: Option<&Arc<Pod>>,
    ) {
        let asks = |pod: &Pod| (pod.node.clone(), pod.resources, pod.countables.clone());
        if old.map(|old| asks(old)) == new.map(|new| asks(new)) {
            return;
        }
        if let Some(old) = old {
            self.update_usage(nodes, old, |usage| usage.take_away(old));
        }
        if let Some(new) = new {
            self.update_usage(nodes, new, |usage| usage.add(new));
        }
    }

    fn update_usage(&mut self, nodes: &Map<String, Arc<Node>>, pod: &Pod, change: impl FnOnce(&mut Usage)) {
        let Some(name) = &pod.node else { return };
        let old = self.usage.get(name).cloned().unwrap_or_default();
        let mut new = old.clone();
        change(&mut new);
        if let Some(node) = nodes.get(name) {
            self.unseat(node, &old);
            self.seat_at(node, &new);
        }
        match self.usage.get_mut(name) {
            _ if new.pods == 0 => drop(self.usage.remove(name)),
            Some(usage) => *usage = new,
            None => drop(self.usage.insert(name.clone(), new)),
        }
    }
}

impl Groups {
    pub(super) fn job(&self, job: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.0.get(job).into_iter().flat_map(Map::values).flat_map(Map::values)
    }

    pub(super) fn group(&self, job: &str, group: &str) -> impl Iterator<Item = &Arc<Pod>> {
        let pods = self.0.get(job).and_then(|groups| groups.get(group));
        pods.into_iter().flat_map(Map::values)
    }

    pub(super) fn names(&self) -> Vec<(String, String)> {
        let pairs = |(job, groups): (&String, &Map<String, _>)| {
            groups.keys().map(|group| (job.clone(), group.clone())).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(pairs).collect()
    }

    fn insert(&mut self, pod: &Arc<Pod>) {
        let known = self.0.get_mut(&pod.job).and_then(|groups| groups.get_mut(&pod.group));
        let pods = match known {
            Some(pods) => pods,
            None => self.0.entry(pod.job.clone()).or_default().entry(pod.group.clone()).or_default(),
        };
        pods.insert(pod.serial, pod.clone());
    }

    fn remove(&mut self, pod: &Pod) {
        let Some(job) = self.0.get_mut(&pod.job) else { return };
        if let Some(group) = job.get_mut(&pod.group) {
            group.remove(&pod.serial);
            if group.is_empty() {
                job.remove(&pod.group);
            }
        }
        if job.is_empty() {
            self.0.remove(&pod.job);
        }
    }
}

fn is_unplaced(pod: &Pod) -> bool {
    matches!(pod.phase, PodPhase::Pending | PodPhase::Lost)
}
