//! Makes the pods of a group in a rollout what its two versions say: grows before it shrinks.
//!
//! A pod of one version never becomes one of the other: the missing ones are made, and those that are too many are
//! stopped once others serve in their place. What serves nobody may be stopped at once.

use crate::{
    change::JobRecord,
    draft::Draft,
    event::{Refusal, Texts},
    job::{Group, Job},
    placement,
    pod::Pod,
    rollout::{self, Side},
    transition::{Context, group},
};

/// Keeps those of `texts`, from the history, that rollouts of `job` name.
pub(super) fn recall(draft: &mut Draft<'_>, job: &Job, texts: &Texts) {
    let Some(record) = draft.job_record(&job.job) else { return };
    let is_wanted = |version: u32| job.names_version(version) && !record.versions.contains_key(&version);
    let recalled: Vec<_> = texts.iter().filter(|(version, _)| is_wanted(**version)).collect();
    if !recalled.is_empty() {
        let mut record = JobRecord::clone(record);
        record.versions.extend(recalled.into_iter().map(|(version, text)| (*version, text.clone())));
        draft.put_job(&job.job, record);
    }
}

/// Refuses rollouts that name a version that is not kept. `version` is the one that the text will be.
pub(super) fn check(draft: &Draft<'_>, job: &Job, version: u32) -> Result<(), Refusal> {
    let kept = draft.job_record(&job.job).map(|record| record.versions.clone()).unwrap_or_default();
    for (name, group) in &job.groups {
        let Some(rollout) = group.rollout else { continue };
        for named in [rollout.previous, rollout.next] {
            let text = if named == version { Some(job) } else { kept.get(&named).map(AsRef::as_ref) };
            if !text.is_some_and(|text| text.groups.contains_key(name)) {
                let (job, group) = (job.job.clone(), name.clone());
                return Err(Refusal::NoVersion { job, group, version: named, this: version });
            }
        }
    }
    Ok(())
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
    let (made, _) = split(draft, (job, name), sides);
    for (side, pods) in sides.iter().zip(made) {
        for _ in pods.len()..side.text.count as usize {
            group::create_of(draft, job, name, &side.text, side.version, context);
        }
    }
    switch(draft, (job, name), sides);
    let ([previous, next], neither) = split(draft, (job, name), sides);
    let mut serving = [&previous, &next, &neither].into_iter().flatten().filter(|pod| pod.serves()).count();
    let [of_previous, of_next] = sides.each_ref().map(|side| {
        let wanted = side.text.count;
        (wanted as usize, format!("the rollout wants {wanted} pods of version {}", side.version))
    });
    let of_neither = (0, "the rollout wants pods of its two versions".to_owned());
    for (pods, (wanted, why)) in [(neither, of_neither), (previous, of_previous), (next, of_next)] {
        let surplus = pods.len().saturating_sub(wanted);
        for pod in rollout::to_stop(pods, surplus, &mut serving, count as usize) {
            group::stop(draft, pod, &why, context);
        }
    }
}

/// Shows each side to load balancers, or keeps it back: all of its pods in one revision. Those of a side that goes stay
/// as they are: it would be for a moment.
fn switch(draft: &mut Draft<'_>, (job, name): (&str, &str), sides: &[Side; 2]) {
    let (pods, _) = split(draft, (job, name), sides);
    for (side, pods) in sides.iter().zip(pods) {
        if side.text.count > 0 {
            group::set_standby(draft, pods, side.standby);
        }
    }
}

/// The pods of each side, and those of neither.
fn split(draft: &Draft<'_>, (job, name): (&str, &str), sides: &[Side; 2]) -> ([Vec<Pod>; 2], Vec<Pod>) {
    let (mut of_sides, mut neither) = ([Vec::new(), Vec::new()], Vec::new());
    let Some(record) = draft.job_record(job) else { return (of_sides, neither) };
    for pod in group::live(draft, job, name) {
        match rollout::side_of(record, sides, &pod) {
            Some(which) => of_sides[which].push(pod),
            None => neither.push(pod),
        }
    }
    (of_sides, neither)
}

/// Pods whose node no longer has the labels that their version asks for.
fn stop_misplaced(
    draft: &mut Draft<'_>,
    (job, name): (&str, &str),
    sides: &[Side; 2],
    context: &mut Context<'_>,
) {
    let (pods, _) = split(draft, (job, name), sides);
    for (side, pods) in sides.iter().zip(pods) {
        for pod in pods {
            let node = pod.node.as_deref().and_then(|node| draft.nodes().get(node));
            if let Some(reason) = node.and_then(|node| placement::unmet(&side.text.constraints, node)) {
                group::stop(draft, pod, &format!("its node no longer fits: {reason}"), context);
            }
        }
    }
}
