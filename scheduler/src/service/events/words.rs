//! What happened, in words: a revision as an event, and what there is to say when something cannot be told.

use hextet_api::v1;
use scheduler_core::{
    change::{Change, Key, Revision, Value},
    ending::LastEnding,
};

/// The kind of the revision that made a pod.
pub(super) const MADE: &str = "pod-created";
/// Pods that an event names.
const PODS_MAX: usize = 100;

/// What a revision did to a pod, or to pods at all.
pub(super) fn of_revision(revision: &Revision, pod: &str) -> Option<v1::ClusterEvent> {
    let about = |change: &&Change| match &change.key {
        Key::Pod(id) => pod.is_empty() || id.as_str() == pod,
        _ => false,
    };
    let changes: Vec<&Change> = revision.changes.iter().filter(about).collect();
    if changes.is_empty() && !pod.is_empty() {
        return None;
    }
    let words = match changes.as_slice() {
        [only] => pod_words(only),
        _ => String::new(),
    };
    let what =
        [revision.message.clone(), words].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>();
    let made = changes.len() == 1 && changes[0].old.is_none();
    let ids = changes.iter().take(PODS_MAX).map(|change| change.key.to_string());
    Some(v1::ClusterEvent {
        unix_ms: revision.time.0,
        by: revision.changer.clone(),
        kind: if made { MADE } else { "revision" }.to_owned(),
        pods: ids.filter_map(|key| key.strip_prefix("pod/").map(str::to_owned)).collect(),
        what: what.join(": "),
        revision: revision.revision,
        output: ending(revision, pod).map(|ending| ending.output.clone()).unwrap_or_default(),
        position: None,
    })
}

/// How the pod has failed; of several pods no one.
fn ending<'a>(revision: &'a Revision, pod: &str) -> Option<&'a LastEnding> {
    let mut endings = revision.changes.iter().filter_map(|change| match (&change.key, &change.new) {
        (Key::Ending(id), Some(Value::Ending(ending))) if pod.is_empty() || id.as_str() == pod => {
            Some(&**ending)
        }
        _ => None,
    });
    let first = endings.next();
    first.filter(|_| endings.next().is_none())
}

fn pod_words(change: &Change) -> String {
    let of = |value: &Option<Value>| match value {
        Some(Value::Pod(pod)) => Some(pod.clone()),
        _ => None,
    };
    let (old, new) = (of(&change.old), of(&change.new));
    let Some(new) = new else { return "its record is gone".to_owned() };
    let mut words = Vec::new();
    if old.as_ref().map(|old| old.phase) != Some(new.phase) {
        words.push(new.phase.to_string());
    }
    if old.as_ref().and_then(|old| old.node.clone()) != new.node {
        words.extend(new.node.as_ref().map(|node| format!("on node {node}")));
    }
    if new.stop && !old.as_ref().is_some_and(|old| old.stop) {
        words.push("load balancers know: it is stopped".to_owned());
    }
    if !new.message.is_empty() && old.as_ref().map(|old| &old.message) != Some(&new.message) {
        words.push(new.message.clone());
    }
    words.join(", ")
}

/// Nobody knows what this revision did, nor those right before it that cannot be read either. It is shown with what came
/// after it.
pub(super) fn unreadable(number: u64, unix_ms: u64) -> v1::ClusterEvent {
    v1::ClusterEvent {
        unix_ms,
        revision: number,
        kind: "unreadable".to_owned(),
        what: "revisions up to this one cannot be read: the store is damaged".to_owned(),
        ..Default::default()
    }
}

/// Something happened that cannot be told.
pub(super) fn gap(what: String, unix_ms: u64) -> v1::ClusterEvent {
    v1::ClusterEvent { kind: "gap".to_owned(), by: "server".to_owned(), what, unix_ms, ..Default::default() }
}
