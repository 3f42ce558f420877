//! What must hold of every state that was ever durable. Asked without the code under test.

use scheduler_core::{
    assignment,
    change::Revision,
    job::Availability,
    node::{Hello, NodePhase},
    pod::{Pod, PodPhase},
    rollout,
    state::State,
};

use super::room::{fits_somewhere, would_fit_instead_of_others};

/// A revision can be taken back, and a restart loads what was there.
pub(super) fn is_reversible(before: &State, after: &State, revision: &Revision) -> Result<(), String> {
    let mut undone = after.clone();
    undone.undo(revision);
    if undone != *before {
        return Err(format!("revision {} cannot be taken back", revision.revision));
    }
    if State::load(after.revision(), after.values()) != *after {
        return Err(format!("after revision {} the indexes are not those of the values", revision.revision));
    }
    Ok(())
}

/// `hello` is what a machine said of itself.
pub(super) fn holds<'a>(state: &State, hello: &dyn Fn(&str) -> Option<&'a Hello>) -> Result<(), String> {
    for node in state.nodes().values() {
        let usage = state.usage(&node.name);
        let Some(has) = hello(&node.name) else { return Err(format!("{} is nobody's", node.name)) };
        let is_counted = usage.countables.0.iter().all(|(name, used)| *used <= has.countables.get(name));
        let (cpu, memory) = (u64::from(has.capacity.cpu.0), has.capacity.memory.0);
        if !is_counted || usage.cpu_millis > cpu || usage.memory_bytes > memory {
            return Err(format!("{} is asked for {usage:?} and has {has:?}", node.name));
        }
        for (id, assigned) in &assignment::view(state, &node.name).pods {
            if assigned.spec().is_none() {
                return Err(format!("the text of {id} is lost"));
            }
        }
    }
    state.pods().values().try_for_each(|pod| pod_holds(state, pod))?;
    counts_hold(state)
}

fn pod_holds(state: &State, pod: &Pod) -> Result<(), String> {
    let node = pod.node.as_ref().and_then(|name| state.nodes().get(name));
    let is_placed = match (pod.phase, node, pod.address) {
        (PodPhase::Pending, None, None) => true,
        (PodPhase::Pending, ..) => false,
        (_, Some(node), Some(address)) => node.prefix.contains(address),
        _ => false,
    };
    let is_lost = pod.phase == PodPhase::Lost;
    let is_right = node.is_none_or(|node| match node.phase {
        // One of which there may only be one terminates until it has surely ended.
        NodePhase::Lost | NodePhase::Dead => is_lost || pod.phase == PodPhase::Terminating,
        // What only one node may run has ended there.
        NodePhase::CutOff => !is_lost || node.fenced,
        NodePhase::Ready | NodePhase::Joined => !is_lost,
    });
    if is_placed && is_right {
        return Ok(());
    }
    Err(format!("a pod cannot be so: {pod:?}"))
}

/// Every group has the pods that its job wants; an ha pod is lost only while nothing can take its place.
fn counts_hold(state: &State) -> Result<(), String> {
    for (name, record) in state.jobs() {
        let Some(job) = record.current() else { continue };
        for (group, wanted) in &job.groups {
            let pods: Vec<_> = state.pods_of_group(name, group).filter(|pod| pod.is_wanted()).collect();
            let count = wanted.count as usize;
            let is_right = if wanted.rollout.is_some() { pods.len() >= count } else { pods.len() == count };
            if !is_right {
                return Err(format!("{name}/{group} has {} pods and wants {}", pods.len(), wanted.count));
            }
            let is_ha = wanted.availability() == Availability::Ha;
            let mut lost = pods.into_iter().filter(|pod| pod.phase == PodPhase::Lost);
            if let Some(pod) = lost.find(|pod| is_ha && fits_somewhere(state, pod)) {
                return Err(format!("{} is lost and would fit elsewhere", pod.id));
            }
        }
    }
    Ok(())
}

/// Nothing is under way any more, and what waits for room finds none.
pub(super) fn has_settled(state: &State) -> Result<(), String> {
    if let Some(node) = state.nodes().values().find(|node| node.phase != NodePhase::Ready) {
        return Err(format!("{} is {}", node.name, node.phase));
    }
    for pod in state.pods().values() {
        if !matches!(pod.phase, PodPhase::Running | PodPhase::Pending) {
            return Err(format!("{} is {}: {}", pod.id, pod.phase, pod.message));
        }
        if pod.phase == PodPhase::Pending && fits_somewhere(state, pod) {
            return Err(format!("{} waits and would fit: {}", pod.id, pod.message));
        }
        if pod.phase == PodPhase::Pending && would_fit_instead_of_others(state, pod) {
            return Err(format!("{} waits, and others would give way: {}", pod.id, pod.message));
        }
    }
    rollouts_have_settled(state)
}

/// Every rollout has as many pods of each version as it says. Without room for the new ones the old ones stay: it
/// would shrink before it grows.
fn rollouts_have_settled(state: &State) -> Result<(), String> {
    for (name, record) in state.jobs() {
        let Some(job) = record.current() else { continue };
        for (group, wanted) in &job.groups {
            let Some(sides) = rollout::sides(record, group, wanted) else { continue };
            let pods: Vec<_> = state.pods_of_group(name, group).collect();
            let is_full = pods.iter().any(|pod| pod.phase == PodPhase::Pending);
            let of = |which| pods.iter().filter(|pod| rollout::side_of(record, &sides, pod) == which).count();
            let there = [of(Some(0)), of(Some(1)), of(None)];
            let [previous, next] = sides.each_ref().map(|side| side.text.count as usize);
            if !is_full && there != [previous, next, 0] {
                return Err(format!(
                    "{name}/{group} has {there:?} pods of the previous, next and other versions, not {:?}",
                    [previous, next, 0]
                ));
            }
        }
    }
    Ok(())
}
