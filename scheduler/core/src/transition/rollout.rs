//! Makes the pods of a group in a rollout what its two versions say: grows before it shrinks.
//!
//! A pod of one version never becomes one of the other: the missing ones are made, and those that are too many are
//! stopped once others serve in their place. What serves nobody may be stopped at once.

use crate::{
    draft::Draft,
    event::Refusal,
    job::{Group, Job},
    placement,
    pod::{Pod, PodPhase},
    rollout::{self, Side},
    transition::{Context, group},
};

/// Refuses rollouts that name a version that is not kept. `version` is the one that the text will be.
pub(super) fn check(draft: &Draft<'_>, job: &Job, version: u32) -> Result<(), Refusal> {
    let kept = draft.job_record(&job.job).map(|record| record.versions.clone()).unwrap_or_default();
    for (name, group) in &job.groups {
        let Some(rollout) = group.rollout else { continue };
        for named in [rollout.previous, rollout.next] {
            let text = if named == version { Some(job) } else { kept.get(&named).map(AsRef::as_ref) };
            if !text.is_some_and(|text| text.groups.contains_key(name)) {
                let mut known: Vec<String> = kept.keys().map(u32::to_string).collect();
                known.push(format!("{version} (this text)"));
                let (job, group) = (job.job.clone(), name.clone());
                return Err(Refusal::NoVersion { job, group, version: named, known: known.join(", ") });
            }
        }
    }
    Ok(())
}

/// Whether a rollout of `job` names this version.
pub(super) fn names(job: &Job, version: u32) -> bool {
    let mut rollouts = job.groups.values().filter_map(|group| group.rollout);
    rollouts.any(|rollout| rollout.previous == version || rollout.next == version)
}

/// The two versions of a group, when its text in force has a rollout.
pub(super) fn sides(draft: &Draft<'_>, job: &str, name: &str, wanted: &Group) -> Option<[Side; 2]> {
    rollout::sides(draft.job_record(job)?, name, wanted)
}

pub(super) fn reconcile(
    draft: &mut Draft<'_>,
    (job, name): (&str, &str),
    count: u32,
    sides: &[Side; 2],
    context: &mut Context<'_>,
) {
    stop_misplaced(draft, (job, name), sides, context);
    stop_strangers(draft, (job, name), sides, context);
    let [previous, next] = sides;
    let (nexts, previouses) = split(draft, (job, name), sides);
    for (side, pods) in [(next, nexts), (previous, previouses)] {
        for _ in pods.len()..side.text.count as usize {
            group::create_of(draft, job, name, &side.text, side.version, context);
        }
    }
    switch(draft, (job, name), sides);
    let (nexts, previouses) = split(draft, (job, name), sides);
    let mut serving = nexts.iter().chain(&previouses).filter(|pod| pod.serves()).count();
    for (side, pods) in [(previous, previouses), (next, nexts)] {
        let surplus = pods.len().saturating_sub(side.text.count as usize);
        for pod in rollout::to_stop(pods, surplus, &mut serving, count as usize) {
            let why = format!("the rollout wants {} pods of version {}", side.text.count, side.version);
            group::stop(draft, pod, &why, context);
        }
    }
}

/// Shows each side to load balancers, or keeps it back: all of its pods in one revision. Those of a side that goes stay
/// as they are: it would be for a moment.
fn switch(draft: &mut Draft<'_>, (job, name): (&str, &str), sides: &[Side; 2]) {
    let [previous, next] = sides;
    let (nexts, previouses) = split(draft, (job, name), sides);
    for (side, pods) in [(next, nexts), (previous, previouses)] {
        if side.text.count > 0 {
            group::set_standby(draft, pods, side.standby);
        }
    }
}

/// Pods of the next side, and all others, which are to be replaced.
fn split(draft: &Draft<'_>, (job, name): (&str, &str), sides: &[Side; 2]) -> (Vec<Pod>, Vec<Pod>) {
    let Some(record) = draft.job_record(job) else { return Default::default() };
    group::live(draft, job, name).into_iter().partition(|pod| rollout::is_next(record, sides, pod))
}

/// Pods whose node no longer has the labels that their version asks for.
fn stop_misplaced(
    draft: &mut Draft<'_>,
    (job, name): (&str, &str),
    sides: &[Side; 2],
    context: &mut Context<'_>,
) {
    let [previous, next] = sides;
    let (nexts, previouses) = split(draft, (job, name), sides);
    for (side, pods) in [(next, nexts), (previous, previouses)] {
        for pod in pods {
            let node = pod.node.as_deref().and_then(|node| draft.nodes().get(node));
            if let Some(reason) = node.and_then(|node| placement::unmet(&side.text.constraints, node)) {
                group::stop(draft, pod, &format!("its node no longer fits: {reason}"), context);
            }
        }
    }
}

/// Pods that wait for a place and are of neither version: what they ask for is not what a place is looked for with.
fn stop_strangers(
    draft: &mut Draft<'_>,
    (job, name): (&str, &str),
    sides: &[Side; 2],
    context: &mut Context<'_>,
) {
    let (_, previouses) = split(draft, (job, name), sides);
    let is_stranger = |pod: &Pod| pod.phase == PodPhase::Pending && pod.job_version != sides[0].version;
    for pod in previouses.into_iter().filter(is_stranger) {
        group::stop(draft, pod, "the rollout wants pods of its two versions", context);
    }
}
