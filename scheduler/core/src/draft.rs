//! A revision in the making: changes the state at once and remembers what was there before.

use std::{collections::BTreeMap, ops::Deref, sync::Arc};

use crate::{
    change::{Change, JobRecord, Key, Revision, Value},
    cluster::Counters,
    node::Node,
    pod::{Pod, PodId},
    state::State,
    time::WallTime,
};

/// A revision in the making. Reads see what was written before.
pub(crate) struct Draft<'a> {
    state: &'a mut State,
    before: BTreeMap<Key, Option<Value>>,
}

impl<'a> Draft<'a> {
    pub(crate) fn new(state: &'a mut State) -> Draft<'a> {
        Draft { state, before: BTreeMap::new() }
    }

    pub(crate) fn put(&mut self, key: Key, value: Option<Value>) {
        if !self.before.contains_key(&key) {
            self.before.insert(key.clone(), self.state.get(&key));
        }
        self.state.set(&key, value);
    }

    pub(crate) fn put_pod(&mut self, pod: Pod) {
        self.put(Key::Pod(pod.id.clone()), Some(Value::Pod(Arc::new(pod))));
    }

    /// The record of a pod of which nothing is left.
    pub(crate) fn forget_pod(&mut self, id: &PodId) {
        self.put(Key::Pod(id.clone()), None);
        self.put(Key::Ending(id.clone()), None);
    }

    pub(crate) fn put_node(&mut self, node: Node) {
        self.put(Key::Node(node.name.clone()), Some(Value::Node(Arc::new(node))));
    }

    pub(crate) fn put_job(&mut self, name: &str, record: JobRecord) {
        self.put(Key::Job(name.to_owned()), Some(Value::Job(Arc::new(record))));
    }

    /// The jobs that were written, each with its record before.
    pub(crate) fn jobs_touched(&self) -> Vec<(String, Option<Arc<JobRecord>>)> {
        let from_first_job = self.before.range(Key::Job(String::new())..);
        let touched = from_first_job.map_while(|(key, old)| match (key, old) {
            (Key::Job(name), Some(Value::Job(record))) => Some((name.clone(), Some(record.clone()))),
            (Key::Job(name), _) => Some((name.clone(), None)),
            _ => None,
        });
        touched.collect()
    }

    /// A serial number that no pod has had.
    pub(crate) fn next_serial(&mut self) -> u64 {
        let counters = self.state.counters();
        let serial = counters.pods_made;
        self.put(Key::Counters, Some(Value::Counters(Counters { pods_made: serial + 1, ..counters })));
        serial
    }

    /// What was changed on the whole as one revision; none when it is nothing.
    pub(crate) fn finish(self, time: WallTime, changer: &str, message: String) -> Option<Revision> {
        let mut changes = Vec::new();
        for (key, old) in self.before {
            let new = self.state.get(&key);
            if new != old {
                changes.push(Change { key, old, new });
            }
        }
        if changes.is_empty() {
            return None;
        }
        self.state.count_revision();
        let revision = self.state.revision();
        Some(Revision { revision, time, changer: changer.to_owned(), message, changes })
    }

    /// Leaves the state as it was found.
    pub(crate) fn abandon(self) {
        for (key, old) in self.before {
            self.state.set(&key, old);
        }
    }
}

impl Deref for Draft<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        self.state
    }
}
