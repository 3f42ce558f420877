//! Where a pod would have room, by the letter of its group's text. Asked without the code under test.

use scheduler_core::{
    job::Group,
    node::{Node, NodePhase},
    pod::{Pod, PodPhase},
    rollout,
    state::{State, Usage},
};

/// The text that a pod is made by: of a group in a rollout that of its version.
pub(super) fn text(state: &State, pod: &Pod) -> Option<Group> {
    let record = state.job_record(&pod.job)?;
    let wanted = record.current()?.group(&pod.group)?;
    let Some(sides) = rollout::sides(record, &pod.group, wanted) else { return Some(wanted.clone()) };
    Some(sides[rollout::side_of(record, &sides, pod)?].text.clone())
}

/// Whether a node has room for one more pod like this.
pub(super) fn fits_somewhere(state: &State, pod: &Pod) -> bool {
    let Some(wanted) = text(state, pod) else { return false };
    ready(state).any(|node| fits(state, pod, &wanted, node, &state.usage(&node.name)))
}

/// The same, if those gave way that must when asked.
pub(super) fn would_fit_instead_of_others(state: &State, pod: &Pod) -> bool {
    let Some(job) = state.job(&pod.job).filter(|job| job.preempts) else { return false };
    let Some(wanted) = text(state, pod) else { return false };
    let gives_way = |other: &Pod| {
        state.job(&other.job).is_some_and(|other| other.preemptible && other.priority < job.priority)
    };
    ready(state).any(|node| {
        let mut usage = state.usage(&node.name);
        state.pods_on(&node.name).filter(|other| gives_way(other)).for_each(|other| usage.take_away(other));
        fits(state, pod, &wanted, node, &usage)
    })
}

fn ready(state: &State) -> impl Iterator<Item = &Node> {
    state.nodes().values().map(AsRef::as_ref).filter(|node| node.phase == NodePhase::Ready)
}

pub(super) fn fits(state: &State, pod: &Pod, wanted: &Group, node: &Node, usage: &Usage) -> bool {
    let needs = wanted.resources();
    let taken = wanted.countables();
    let is_free = |name: &String, more: u32| usage.countables.get(name) + more <= node.countables.get(name);
    wanted.constraints.iter().all(|(key, wanted)| wanted.is_met(node.label(key)))
        && taken.0.iter().all(|(name, more)| is_free(name, *more))
        && usage.cpu_millis + u64::from(needs.cpu.0) <= u64::from(node.capacity.cpu.0)
        && usage.memory_bytes + needs.memory.0 <= node.capacity.memory.0
        && state.pods().values().all(|other| !kept_apart(state, pod, node, other))
}

/// Whether `pod` on `node` would be beside one of which it or the other says that they keep apart.
pub(super) fn kept_apart(state: &State, pod: &Pod, node: &Node, other: &Pod) -> bool {
    let there = other.node.as_ref().and_then(|name| state.nodes().get(name));
    let Some(there) = there.filter(|_| other.id != pod.id && other.phase != PodPhase::Lost) else {
        return false;
    };
    let says = |one: &Pod, of: &Pod| {
        let group = state.job(&one.job).and_then(|job| job.group(&one.group));
        group.is_some_and(|group| {
            let mut rules = group.apart.iter();
            rules.any(|rule| {
                rule.means((&one.job, &one.group), (&of.job, &of.group))
                    && node.label(&rule.by) == there.label(&rule.by)
            })
        })
    };
    says(pod, other) || says(other, pod)
}
