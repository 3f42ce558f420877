//! Somebody wants a job to be so, or to be gone.

use std::{collections::BTreeSet, sync::Arc};

use crate::{
    change::{JobRecord, Key},
    draft::Draft,
    event::{Refusal, Texts},
    job::{Group, Job},
    transition::{Context, PODS_MAX, Step, deploy, group, rollout},
};

/// A version that is gone back to, without its own rollout to itself: all the way.
fn whole(mut job: Job, version: u32) -> Job {
    let to_itself = |group: &&mut Box<Group>| group.rollout.is_some_and(|rollout| rollout.next == version);
    job.groups.values_mut().filter(to_itself).for_each(|group| group.rollout = None);
    job
}

/// Whether this version is in force; 0 is none.
pub(super) fn check_version(draft: &Draft<'_>, job: &str, wanted: u32) -> Result<(), Refusal> {
    let record = draft.job_record(job).filter(|record| !record.removed);
    let found = record.map_or(0, |record| record.version);
    if found == wanted { Ok(()) } else { Err(Refusal::OtherVersion { job: job.to_owned(), wanted, found }) }
}

/// A text that `equals` an older version always makes a version, also when it is in force: somebody wanted it.
pub(super) fn apply(
    draft: &mut Draft<'_>,
    (job, equals): (&Job, Option<u32>),
    texts: &Texts,
    changer: &str,
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    job.validate()?;
    deploy::check_free(draft, &job.job)?;
    let back = equals.map(|version| whole(job.clone(), version));
    let job = back.as_ref().unwrap_or(job);
    if equals.is_none() && draft.job(&job.job).is_some_and(|current| **current == *job) {
        return Ok(Step::nothing());
    }
    check_total(draft, job)?;
    rollout::recall(draft, job, texts);
    rollout::check(draft, job, next_version(draft, &job.job))?;
    let version = bring_about(draft, job, equals, changer, context);
    let how = equals.map_or("applied".to_owned(), |older| format!("= {older}"));
    Ok(Step { message: format!("job {} version {version} {how}", job.job), replan: true })
}

/// Makes the text the next version, and its pods what it says.
pub(super) fn bring_about(
    draft: &mut Draft<'_>,
    job: &Job,
    equals: Option<u32>,
    changer: &str,
    context: &mut Context<'_>,
) -> u32 {
    let version = put_version(draft, job, equals, changer, context);
    for name in groups(draft, job) {
        group::reconcile(draft, &job.job, &name, job.group(&name), context);
    }
    version
}

pub(super) fn delete(
    draft: &mut Draft<'_>,
    name: &str,
    changer: &str,
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    let missing = || Refusal::NoJob(name.to_owned());
    let job = draft.job(name).cloned().ok_or_else(missing)?;
    for group in groups(draft, &job) {
        group::reconcile(draft, name, &group, None, context);
    }
    let mut record = draft.job_record(name).map(|record| JobRecord::clone(record)).ok_or_else(missing)?;
    record.versions.retain(|version, _| draft.runs_version(name, *version));
    let (applied, changer) = (context.wall, changer.to_owned());
    draft.put_job(name, JobRecord { removed: true, applied, changer, ..record });
    job.groups.keys().for_each(|group| draft.put(Key::Failures(format!("{name}/{group}")), None));
    deploy::forget_job(draft, name, context);
    Ok(Step { message: format!("job {name} deleted"), replan: true })
}

pub(super) fn check_total(draft: &Draft<'_>, job: &Job) -> Result<(), Refusal> {
    let old = draft.job(&job.job).map_or(0, |old| old.pods_wanted());
    let others = draft.pods_wanted() - old;
    let wanted = others + job.pods_wanted();
    if wanted > PODS_MAX { Err(Refusal::TooManyPods { wanted, max: PODS_MAX }) } else { Ok(()) }
}

pub(super) fn next_version(draft: &Draft<'_>, job: &str) -> u32 {
    draft.job_record(job).map_or(1, |record| record.version.saturating_add(1))
}

/// Makes the text the next version; older ones stay as long as a pod runs them or its rollouts name them.
fn put_version(
    draft: &mut Draft<'_>,
    job: &Job,
    equals: Option<u32>,
    changer: &str,
    context: &Context<'_>,
) -> u32 {
    let old = draft.job_record(&job.job).cloned();
    let version = next_version(draft, &job.job);
    let mut versions = old.map(|record| record.versions.clone()).unwrap_or_default();
    versions.retain(|version, _| draft.runs_version(&job.job, *version) || job.names_version(*version));
    versions.insert(version, Arc::new(job.clone()));
    let (applied, changer) = (context.wall, changer.to_owned());
    draft.put_job(&job.job, JobRecord { version, versions, removed: false, applied, changer, equals });
    version
}

/// Groups that the job names or that still have pods.
fn groups(draft: &Draft<'_>, job: &Job) -> BTreeSet<String> {
    let running = draft.pods_of_job(&job.job).map(|pod| pod.group.clone());
    running.chain(job.groups.keys().cloned()).collect()
}
