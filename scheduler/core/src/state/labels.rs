//! Nodes by the values of the labels that groups are spread over.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Map, seat::Usage, seats::Seats};
use crate::{change::JobRecord, job::Spread, node::Node};

/// The most labels that are kept, the first by name: for a group that is spread over another all nodes are walked.
const LABELS_MAX: usize = 8;

/// Nodes by the values of labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Labels {
    /// How many texts of jobs spread a group over each label.
    used: BTreeMap<String, usize>,
    kept: BTreeMap<String, Values>,
}

/// Nodes by the value of one label; `None` is those without it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Values {
    seats: Map<Option<String>, Seats>,
    /// By the share and name of its least used node: each value.
    order: Map<(u64, String), Option<String>>,
}

impl Labels {
    pub(super) fn values(&self, label: &str) -> Option<&Values> {
        self.kept.get(label)
    }

    /// Follows the texts of a job; `nodes` are all there are.
    pub(super) fn change_job(&mut self, old: Option<&JobRecord>, new: Option<&JobRecord>, nodes: &Seats) {
        let (old, new) = (labels(old), labels(new));
        if old == new {
            return;
        }
        new.difference(&old).for_each(|label| *self.used.entry((*label).to_owned()).or_default() += 1);
        for label in old.difference(&new) {
            if let Some(count) = self.used.get_mut(*label) {
                *count -= 1;
            }
        }
        self.used.retain(|_, count| *count > 0);
        self.keep(nodes);
    }

    fn keep(&mut self, nodes: &Seats) {
        let wanted: BTreeSet<&String> = self.used.keys().take(LABELS_MAX).collect();
        self.kept.retain(|label, _| wanted.contains(label));
        for label in wanted {
            if !self.kept.contains_key(label) {
                let mut values = Values::default();
                nodes.iter().for_each(|seat| values.insert(label, &seat.node, &seat.usage));
                self.kept.insert(label.clone(), values);
            }
        }
    }

    pub(super) fn insert(&mut self, node: &Arc<Node>, usage: &Usage) {
        self.kept.iter_mut().for_each(|(label, values)| values.insert(label, node, usage));
    }

    pub(super) fn remove(&mut self, node: &Node, usage: &Usage) {
        self.kept.iter_mut().for_each(|(label, values)| values.remove(label, node, usage));
    }
}

impl Values {
    /// The nodes that have this value.
    #[must_use]
    pub fn get(&self, value: &Option<String>) -> Option<&Seats> {
        self.seats.get(value)
    }

    /// Values with their nodes, that with the least used node first.
    pub fn least_used_first(&self) -> impl Iterator<Item = (&Option<String>, &Seats)> {
        self.order.values().filter_map(|value| self.seats.get_key_value(value))
    }

    fn insert(&mut self, label: &str, node: &Arc<Node>, usage: &Usage) {
        let value = node.label(label).map(str::to_owned);
        self.change(value, |seats| seats.insert(node, usage.clone()));
    }

    fn remove(&mut self, label: &str, node: &Node, usage: &Usage) {
        let value = node.label(label).map(str::to_owned);
        self.change(value, |seats| seats.remove(node, usage));
    }

    fn change(&mut self, value: Option<String>, change: impl FnOnce(&mut Seats)) {
        let seats = self.seats.entry(value.clone()).or_default();
        let old = seats.first();
        change(seats);
        let new = seats.first();
        if new.is_none() {
            self.seats.remove(&value);
        }
        if old != new {
            old.and_then(|old| self.order.remove(&old));
            new.and_then(|new| self.order.insert(new, value));
        }
    }
}

/// The labels over which the texts of a job spread groups, also those of older versions that are still needed.
fn labels(record: Option<&JobRecord>) -> BTreeSet<&str> {
    let texts = record.into_iter().flat_map(|record| record.versions.values());
    texts
        .flat_map(|job| job.groups.values())
        .filter_map(|group| match &group.spread {
            Spread::Label(label) => Some(label.as_str()),
            Spread::Node | Spread::Pack => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        job::{Group, Job},
        testing::{group, node},
        time::WallTime,
    };

    #[test]
    fn a_label_is_kept_while_a_text_spreads_over_it() {
        let (mut labels, mut seats) = (Labels::default(), Seats::default());
        let join = |labels: &mut Labels, seats: &mut Seats, name: &str, rack: &str| {
            let node = Arc::new(Node { labels: [("rack".into(), rack.into())].into(), ..node(name) });
            labels.insert(&node, &Usage::default());
            seats.insert(&node, Usage::default());
            node
        };
        let first = join(&mut labels, &mut seats, "n1", "a");
        let of_racks = record(&["rack"]);
        labels.change_job(None, Some(&of_racks), &seats);
        join(&mut labels, &mut seats, "n2", "b");
        assert_eq!(shown(&labels, "rack"), ["a: n1", "b: n2"]);
        let used = Usage { cpu_millis: 1, ..Usage::default() };
        labels.remove(&first, &Usage::default());
        labels.insert(&first, &used);
        assert_eq!(shown(&labels, "rack"), ["b: n2", "a: n1"], "the least used first");
        labels.remove(&first, &used);
        assert_eq!(shown(&labels, "rack"), ["b: n2"]);
        labels.change_job(None, Some(&of_racks), &seats);
        labels.change_job(Some(&of_racks), Some(&record(&["zone"])), &seats);
        assert!(labels.values("rack").is_some(), "another job spreads over it");
        assert_eq!(shown(&labels, "zone"), ["-: n1 n2"]);
        labels.change_job(Some(&of_racks), None, &seats);
        assert!(labels.values("rack").is_none());
    }

    #[test]
    fn no_more_labels_are_kept_than_the_bound() {
        let names: Vec<String> = (0..LABELS_MAX + 2).map(|number| format!("l{number:02}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut labels = Labels::default();
        labels.change_job(None, Some(&record(&names[1..])), &Seats::default());
        assert!(labels.values(names[8]).is_some() && labels.values(names[9]).is_none());
        labels.change_job(None, Some(&record(&names[..1])), &Seats::default());
        assert!(labels.values(names[0]).is_some() && labels.values(names[8]).is_none());
    }

    fn record(labels: &[&str]) -> JobRecord {
        let of = |label: &&str| {
            (format!("g-{label}"), Box::new(Group { spread: Spread::from(*label), ..group() }))
        };
        let job = Job { job: "a".into(), groups: labels.iter().map(of).collect(), ..Job::default() };
        JobRecord {
            version: 1,
            versions: [(1, Arc::new(job))].into(),
            removed: false,
            applied: WallTime(0),
            changer: String::new(),
            equals: None,
        }
    }

    fn shown(labels: &Labels, label: &str) -> Vec<String> {
        let values = labels.values(label).unwrap().least_used_first();
        let names = |seats: &Seats| {
            let names = seats.iter().map(|seat| seat.node.name.as_str());
            names.collect::<Vec<_>>().join(" ")
        };
        values
            .map(|(value, seats)| format!("{}: {}", value.as_deref().unwrap_or("-"), names(seats)))
            .collect()
    }
}
