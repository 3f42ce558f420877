//! Makes the pods of a group in a rollout what its two versions say: grows before it shrinks.
//!
//! A pod of one version never becomes one of the other: the missing ones are made, and those that are too many are
//! stopped once others serve in their place. What serves nobody may be stopped at once. A rollout in place is the
//! opposite: pods are given the tasks of the other version where they are, and there are never more than wanted.

use crate::{
    change::JobRecord,
    draft::Draft,
    event::{Refusal, Texts},
    job::{Group, Job},
    pod::Pod,
    rollout::{self, Side},
    transition::{
        Context,
        group::{self, Fate, On},
    },
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
    wanted: &Group,
    sides: &[Side; 2],
    context: &mut Context<'_>,
) {
    let (count, in_place) = (wanted.count as usize, wanted.rollout.is_some_and(|rollout| rollout.in_place));
    stop_unfit(draft, (job, name), sides, context);
    if in_place {
        change_in_place(draft, (job, name), sides, context);
    }
    let room = if in_place { count.saturating_sub(group::live(draft, job, name).len()) } else { usize::MAX };
    create(draft, (job, name), sides, room, context);
    switch(draft, (job, name), sides);
    let ([previous, next], neither) = split(draft, (job, name), sides);
    let all = previous.len() + next.len() + neither.len();
    let mut too_many = if in_place { all.saturating_sub(count) } else { all };
    let mut serving = [&previous, &next, &neither].into_iter().flatten().filter(|pod| pod.serves()).count();
    let [of_previous, of_next] = sides.each_ref().map(|side| {
        let wanted = side.text.count;
        (wanted as usize, format!("the rollout wants {wanted} pods of version {}", side.version))
    });
    let of_neither = (0, "the rollout wants pods of its two versions".to_owned());
    for (pods, (wanted, why)) in [(neither, of_neither), (previous, of_previous), (next, of_next)] {
        let surplus = pods.len().saturating_sub(wanted).min(too_many);
        for pod in rollout::to_stop(pods, surplus, &mut serving, count) {
            too_many -= 1;
            group::stop(draft, pod, &why, context);
        }
    }
}

/// Makes the pods that are missing, at most `room` of them.
fn create(
    draft: &mut Draft<'_>,
    (job, name): (&str, &str),
    sides: &[Side; 2],
    room: usize,
    context: &mut Context<'_>,
) {
    let (made, _) = split(draft, (job, name), sides);
    let missing = |(side, pods): (_, Vec<Pod>)| {
        let side: &Side = side;
        (pods.len()..side.text.count as usize).map(move |_| side)
    };
    for side in sides.iter().zip(made).flat_map(missing).take(room) {
        group::create_of(draft, job, name, &side.text, side.version, context);
    }
}

/// Gives pods that are too many of their version, or are of neither, the tasks of the version that has too few: first
/// those that serve nobody, then the oldest.
fn change_in_place(
    draft: &mut Draft<'_>,
    (job, name): (&str, &str),
    sides: &[Side; 2],
    context: &mut Context<'_>,
) {
    let order = |pod: &Pod| (pod.serves(), pod.serial);
    let (made, mut spare) = split(draft, (job, name), sides);
    let mut missing = [0, 0];
    for (which, mut pods) in made.into_iter().enumerate() {
        let wanted = sides[which].text.count as usize;
        missing[which] = wanted.saturating_sub(pods.len());
        pods.sort_by_key(order);
        pods.truncate(pods.len().saturating_sub(wanted));
        spare.append(&mut pods);
    }
    spare.sort_by_key(order);
    let mut spare = spare.into_iter();
    for (side, missing) in sides.iter().zip(missing) {
        let changed = spare.by_ref().filter(|pod| {
            let (pod, next) = (pod.clone(), (&side.text, side.version));
            match group::fate(draft, &pod, &side.text) {
                // Both versions may have the same tasks.
                Fate::IsSame => {
                    group::renew(draft, pod, next, On::Unharmed);
                    true
                }
                Fate::Waits => false,
                _ => {
                    group::give(draft, pod, next, context);
                    true
                }
            }
        });
        changed.take(missing).for_each(drop);
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

/// Pods that cannot stay where they are, such as on a node that no longer has the labels that their version asks for.
fn stop_unfit(
    draft: &mut Draft<'_>,
    (job, name): (&str, &str),
    sides: &[Side; 2],
    context: &mut Context<'_>,
) {
    let (pods, _) = split(draft, (job, name), sides);
    for (side, pods) in sides.iter().zip(pods) {
        for pod in pods {
            if let Fate::IsReplaced(why) = group::fate(draft, &pod, &side.text) {
                group::stop(draft, pod, &why, context);
            }
        }
    }
}
