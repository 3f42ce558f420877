//! A cluster goes on from a backup, and some time later knows that nobody else can speak for it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use crate::{
    change::{Key, Value},
    cluster::Counters,
    draft::Draft,
    node::Node,
    pod::{Pod, PodPhase},
    restore::{Restored, leap},
    transition::{Context, Step, group, node},
};

/// Nothing of what was given after the backup is given again, and what there may only be one of begins anew: nobody knows
/// where it was moved.
pub(super) fn restored(draft: &mut Draft<'_>, mark: &Restored, context: &mut Context<'_>) -> Step {
    let age = age(draft, context);
    let pods_made = leap(draft.counters().pods_made, age);
    let counters = Counters { pods_made, restored_from: pods_made };
    draft.put(Key::Counters, Some(Value::Counters(counters)));
    begin_terms(draft, age);
    forget_unused_tokens(draft);
    draft.put(Key::Restored, Some(Value::Restored(Arc::new(mark.clone()))));
    begin_anew(draft, context);
    let (revision, pods) = (mark.revision, pods_made);
    let message = format!("restored from a backup of revision {revision}; pods are numbered from {pods} on");
    Step { message, replan: true }
}

/// No lease of the server before can run any more.
pub(super) fn settled(draft: &mut Draft<'_>) -> Step {
    if draft.restored().is_none() {
        return Step::nothing();
    }
    draft.put(Key::Restored, None);
    let message = "no lease from before the restore can run any more".to_owned();
    Step { message, replan: true }
}

/// By the wall clock, which may be wrong: then it counts for nothing.
fn age(draft: &Draft<'_>, context: &Context<'_>) -> Duration {
    let created = draft.cluster().map_or(context.wall, |cluster| cluster.created);
    Duration::from_millis(context.wall.0.saturating_sub(created.0))
}

/// A lease that the server before has granted is good for nothing that this one says.
fn begin_terms(draft: &mut Draft<'_>, age: Duration) {
    let nodes: Vec<Arc<Node>> = draft.nodes().values().cloned().collect();
    for node in nodes {
        draft.put_node(Node { term: leap(node.term, age), ..Node::clone(&node) });
    }
}

/// Each is good once, and may have been used after the backup.
fn forget_unused_tokens(draft: &mut Draft<'_>) {
    let unused = draft.tokens().iter().filter(|(_, token)| token.used_by.is_none());
    let unused: Vec<_> = unused.map(|(id, _)| id.clone()).collect();
    unused.into_iter().for_each(|id| draft.put(Key::Token(id), None));
}

/// Other pods with later numbers take the place of those that there may only be one of, and of those without a place,
/// which may have got one meanwhile. Nodes, told of everything that they run, end what they have of them.
fn begin_anew(draft: &mut Draft<'_>, context: &mut Context<'_>) {
    let is_single = |pod: &&Arc<Pod>| group::is_singleton(draft, pod);
    let singles: Vec<Arc<Pod>> = draft.pods().values().filter(is_single).cloned().collect();
    let pending = draft.pods().values().filter(|pod| pod.phase == PodPhase::Pending && !is_single(pod));
    let pending: Vec<Arc<Pod>> = pending.cloned().collect();
    let groups: BTreeSet<_> = singles.iter().map(|pod| (pod.job.clone(), pod.group.clone())).collect();
    singles.iter().chain(&pending).for_each(|pod| replace(draft, pod));
    node::reconcile_groups(draft, groups, context);
}

/// A pod without a place that is otherwise as this one, unless this one was being stopped.
fn replace(draft: &mut Draft<'_>, pod: &Pod) {
    if pod.is_wanted() {
        let (serial, id) = group::next_id(draft, &pod.job, &pod.group);
        let (phase, message) = (PodPhase::Pending, String::new());
        let new = Pod { id, serial, node: None, address: None, phase, message, restarts: 0, ..pod.clone() };
        draft.put_pod(new);
    }
    group::forget(draft, pod);
}
