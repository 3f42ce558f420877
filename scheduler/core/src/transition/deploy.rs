//! Begins deploys, brings about what their driver decides, and follows orders.

use std::{collections::BTreeSet, sync::Arc};

use crate::{
    change::{Key, Value},
    deploy::{
        self, Deploy, DeployError, DeployId, Fault, Form, GAVE_UP_MAX, Move, OnFailure, Order, Pause,
        Schedule, Stage, health,
    },
    draft::Draft,
    event::Refusal,
    job::{Availability, Job},
    rollout,
    transition::{Context, Step, job},
};

pub(super) fn begin(
    draft: &mut Draft<'_>,
    text: &Job,
    schedule: &Schedule,
    changer: &str,
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    schedule.check().map_err(DeployError::from)?;
    text.validate()?;
    check_free(draft, &text.job)?;
    let before = draft.job(&text.job).cloned();
    let before = before.ok_or_else(|| DeployError::FirstVersion(text.job.clone()))?;
    let previous = draft.job_record(&text.job).map_or(0, |record| record.version);
    if *before == *text {
        return Err(DeployError::Unchanged { job: text.job.clone(), version: previous }.into());
    }
    let groups = Deploy::groups_between(&before, text);
    check_texts(&before, text, &groups, schedule.in_place)?;
    check_kept(draft, &text.job)?;
    job::check_total(draft, text)?;
    let id = DeployId { job: text.job.clone(), version: job::next_version(draft, &text.job) };
    let deploy = Deploy {
        id: id.clone(),
        previous,
        text: Arc::new(text.clone()),
        schedule: Schedule { steps: distinct(schedule, text, &groups), ..schedule.clone() },
        groups,
        step: 0,
        stage: Stage::Watching,
        proven: false,
        moves: 0,
        failures: 0,
        faults: Default::default(),
        reason: String::new(),
        output: String::new(),
        aborted: false,
        changer: changer.to_owned(),
        begun: context.wall,
        ended: None,
    };
    let deploy = at_step(deploy, 0);
    let in_force = deploy.text_in_force(&before);
    in_force.validate()?;
    forget_ended(draft, &text.job);
    job::bring_about(draft, &in_force, None, changer, context);
    let message = format!("deploy {id} begun ({}): {}", schedule.strategy, step_words(&deploy));
    put(draft, Deploy { faults: health::known_faults(draft, &deploy), ..deploy });
    Ok(Step { message, replan: true })
}

/// The text of a job belongs to its deploy until that has ended.
pub(super) fn check_free(draft: &Draft<'_>, job: &str) -> Result<(), DeployError> {
    let busy = deploy::of_job(draft.deploys(), job).find(|deploy| !deploy.stage.is_end());
    busy.map_or(Ok(()), |deploy| {
        let (id, owner) = (deploy.id.clone(), deploy.changer.clone());
        Err(DeployError::Busy { job: job.to_owned(), id, owner })
    })
}

/// With a job go its deploys, but for those that failed and that nobody has looked at.
pub(super) fn forget_job(draft: &mut Draft<'_>, job: &str, context: &Context<'_>) {
    let failed = |deploy: &Deploy| {
        !deploy.aborted && matches!(deploy.stage, Stage::Waiting | Stage::Stuck | Stage::GoingBack)
    };
    let deploys: Vec<_> = deploy::of_job(draft.deploys(), job).cloned().collect();
    for deploy in deploys.into_iter().filter(|deploy| failed(deploy)) {
        end(draft, Deploy { stage: Stage::GaveUp, ..Deploy::clone(&deploy) }, context);
    }
    forget(draft, job, |deploy| deploy.stage != Stage::GaveUp);
}

/// Brings about what the driver decided after so many moves, unless the deploy has moved since.
pub(super) fn advance(
    draft: &mut Draft<'_>,
    (id, moves): (&DeployId, u64),
    decided: &Move,
    changer: &str,
    context: &mut Context<'_>,
) -> Step {
    let deploy = draft.deploys().get(id).filter(|deploy| deploy.moves == moves && !deploy.stage.is_end());
    let Some(deploy) = deploy.map(|deploy| Deploy::clone(deploy)) else {
        return Step::nothing();
    };
    match (decided, deploy.stage) {
        (Move::Passed, Stage::Growing | Stage::Watching) => passed(draft, deploy, changer, context),
        (Move::Failed(fault), Stage::Growing | Stage::Watching | Stage::Held) => {
            failed(draft, deploy, fault, changer, context)
        }
        (Move::TryAgain, Stage::Waiting) => {
            let again = again(deploy);
            let message = format!("deploy {id} tries again: {}", step_words(&again));
            enter(draft, again, message, changer, context)
        }
        (Move::Back, Stage::GoingBack) => end_back(draft, deploy, changer, context),
        _ => Step::nothing(),
    }
}

pub(super) fn order(
    draft: &mut Draft<'_>,
    id: &DeployId,
    order: Order,
    changer: &str,
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    let deploy = draft.deploys().get(id).map(|deploy| Deploy::clone(deploy));
    let deploy = deploy.ok_or_else(|| DeployError::NoDeploy(id.to_string()))?;
    match (order, deploy.stage.is_end()) {
        (Order::Acknowledge, true) => {
            draft.put(Key::Deploy(id.clone()), None);
            Ok(Step { message: format!("deploy {id} acknowledged"), replan: false })
        }
        (Order::Acknowledge, false) => Err(DeployError::UnderWay(id.clone(), deploy.stage).into()),
        (Order::Resume | Order::Abort { .. }, true) => {
            Err(DeployError::Ended(id.clone(), deploy.stage).into())
        }
        (Order::Resume, false) => resume(draft, deploy, changer, context),
        (Order::Abort { now }, false) => abort(draft, deploy, now, changer, context),
    }
}

fn resume(
    draft: &mut Draft<'_>,
    deploy: Deploy,
    changer: &str,
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    match deploy.stage {
        Stage::Held => Ok(go_on(draft, deploy, changer, context)),
        Stage::Waiting | Stage::Stuck => {
            let again = again(Deploy { failures: 0, ..deploy });
            let message = format!("deploy {} resumed: {}", again.id, step_words(&again));
            Ok(enter(draft, again, message, changer, context))
        }
        stage => Err(DeployError::NotHeld(deploy.id, stage).into()),
    }
}

/// The step that failed, once more. Pods that have left the service have to do well before they are switched to.
fn again(deploy: Deploy) -> Deploy {
    let left = deploy.stage == Stage::Waiting && deploy.schedule.steps[deploy.step].form == Form::Switched;
    let step = deploy.step - usize::from(left);
    at_step(Deploy { reason: String::new(), output: String::new(), ..deploy }, step)
}

/// The beginning of a step.
fn at_step(deploy: Deploy, step: usize) -> Deploy {
    let stage = deploy.first_stage(step);
    Deploy { step, stage, proven: stage != Stage::Growing, ..deploy }
}

fn abort(
    draft: &mut Draft<'_>,
    deploy: Deploy,
    now: bool,
    changer: &str,
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    let back = match deploy.stage {
        Stage::GoingBack if !now => return Err(DeployError::GoingBack(deploy.id).into()),
        Stage::GoingBack => deploy,
        _ => {
            let (reason, output) = (format!("{changer} aborted it"), String::new());
            Deploy { aborted: true, reason, output, ..deploy }
        }
    };
    // Pods that stand by are the fastest way back.
    let form = back.schedule.steps[back.step].form;
    if now && (back.stage == Stage::GoingBack || form == Form::Split) {
        return Ok(end_back(draft, back, changer, context));
    }
    let message = format!("deploy {} aborted", back.id);
    Ok(enter(draft, Deploy { stage: Stage::GoingBack, ..back }, message, changer, context))
}

fn passed(draft: &mut Draft<'_>, deploy: Deploy, changer: &str, context: &mut Context<'_>) -> Step {
    if deploy.stage == Stage::Growing {
        let message = format!("deploy {}: the new pods do well: {}", deploy.id, step_words(&deploy));
        let proven = Deploy { stage: Stage::Watching, proven: true, ..deploy };
        return enter(draft, proven, message, changer, context);
    }
    if deploy.schedule.steps[deploy.step].pause == Pause::Hold {
        let message = format!("deploy {} is held: {}", deploy.id, step_words(&deploy));
        let reason = "its pods do well; it goes on when somebody says so".to_owned();
        return enter(draft, Deploy { stage: Stage::Held, reason, ..deploy }, message, changer, context);
    }
    go_on(draft, deploy, changer, context)
}

/// The next step, or the end.
fn go_on(draft: &mut Draft<'_>, deploy: Deploy, changer: &str, context: &mut Context<'_>) -> Step {
    let deploy = Deploy { reason: String::new(), output: String::new(), ..deploy };
    if deploy.step + 1 < deploy.schedule.steps.len() {
        let step = deploy.step + 1;
        let next = at_step(deploy, step);
        let message = format!("deploy {}: {}", next.id, step_words(&next));
        return enter(draft, next, message, changer, context);
    }
    let (text, message) = (deploy.text.clone(), format!("deploy {} promoted", deploy.id));
    job::bring_about(draft, &text, None, changer, context);
    end(draft, Deploy { stage: Stage::Promoted, ..deploy }, context);
    Step { message, replan: true }
}

fn failed(
    draft: &mut Draft<'_>,
    deploy: Deploy,
    fault: &Fault,
    changer: &str,
    context: &mut Context<'_>,
) -> Step {
    let (id, step) = (deploy.id.clone(), step_words(&deploy));
    let Fault { why, output } = fault;
    let (failures, retries) = (deploy.failures + 1, deploy.schedule.retries);
    let (stage, then) = match deploy.schedule.on_failure {
        _ if failures <= retries => (Stage::Waiting, format!("it is tried again ({failures} of {retries})")),
        OnFailure::Rollback => (Stage::GoingBack, "it goes back".to_owned()),
        OnFailure::Hold => (Stage::Stuck, "it is left so".to_owned()),
    };
    let message = format!("deploy {id} failed, {step}: {why}; {then}");
    let reason = format!("{step}: {why}");
    let output = output.clone();
    enter(draft, Deploy { stage, failures, reason, output, ..deploy }, message, changer, context)
}

/// The text of the previous version is in force again, as a new version that says so.
fn end_back(draft: &mut Draft<'_>, deploy: Deploy, changer: &str, context: &mut Context<'_>) -> Step {
    if let Some(before) = before(draft, &deploy) {
        job::bring_about(draft, &before, Some(deploy.previous), changer, context);
    }
    let stage = if deploy.aborted { Stage::Aborted } else { Stage::GaveUp };
    let (id, previous, reason) = (&deploy.id, deploy.previous, &deploy.reason);
    let message = format!("deploy {id} {stage}, version {previous} is back: {reason}");
    end(draft, Deploy { stage, ..deploy }, context);
    Step { message, replan: true }
}

/// Another stage, and the text that belongs to it.
fn enter(
    draft: &mut Draft<'_>,
    deploy: Deploy,
    message: String,
    changer: &str,
    context: &mut Context<'_>,
) -> Step {
    let text = before(draft, &deploy).map(|before| deploy.text_in_force(&before));
    let changed = text.filter(|text| draft.job(&deploy.id.job).is_none_or(|now| **now != *text));
    if let Some(text) = &changed {
        job::bring_about(draft, text, None, changer, context);
    }
    let faults = health::known_faults(draft, &deploy);
    put(draft, Deploy { moves: deploy.moves + 1, faults, ..deploy });
    Step { message, replan: changed.is_some() }
}

/// The text of the version that is left.
fn before(draft: &Draft<'_>, deploy: &Deploy) -> Option<Arc<Job>> {
    draft.job_record(&deploy.id.job).and_then(|record| deploy.before(record)).cloned()
}

fn end(draft: &mut Draft<'_>, deploy: Deploy, context: &Context<'_>) {
    let (moves, ended) = (deploy.moves + 1, Some(context.wall));
    put(draft, Deploy { moves, ended, faults: Default::default(), ..deploy });
}

fn put(draft: &mut Draft<'_>, deploy: Deploy) {
    draft.put(Key::Deploy(deploy.id.clone()), Some(Value::Deploy(Arc::new(deploy))));
}

fn check_texts(
    before: &Job,
    text: &Job,
    groups: &BTreeSet<String>,
    in_place: bool,
) -> Result<(), DeployError> {
    let with_rollout = |job: &Job| -> Option<String> {
        job.groups.iter().find(|(_, group)| group.rollout.is_some()).map(|(name, _)| name.clone())
    };
    if let Some(group) = with_rollout(before) {
        return Err(DeployError::RolloutInForce(group, text.job.clone()));
    }
    if let Some(group) = with_rollout(text) {
        return Err(DeployError::RolloutInText(group));
    }
    if groups.is_empty() {
        return Err(DeployError::NothingToWatch);
    }
    let is_singleton = |name: &&String| {
        !in_place && text.group(name).is_some_and(|group| group.availability() == Availability::Singleton)
    };
    groups.iter().find(is_singleton).map_or(Ok(()), |name| Err(DeployError::Singleton(name.clone())))
}

fn check_kept(draft: &Draft<'_>, job: &str) -> Result<(), DeployError> {
    let kept = deploy::of_job(draft.deploys(), job).filter(|deploy| deploy.stage == Stage::GaveUp);
    if kept.count() < GAVE_UP_MAX { Ok(()) } else { Err(DeployError::TooManyKept(job.to_owned())) }
}

/// Of a job's deploys that ended well the last one is shown.
fn forget_ended(draft: &mut Draft<'_>, job: &str) {
    forget(draft, job, |deploy| matches!(deploy.stage, Stage::Promoted | Stage::Aborted));
}

fn forget(draft: &mut Draft<'_>, job: &str, which: impl Fn(&Deploy) -> bool) {
    let ids = deploy::of_job(draft.deploys(), job).filter(|deploy| which(deploy));
    for id in ids.map(|deploy| deploy.id.clone()).collect::<Vec<_>>() {
        draft.put(Key::Deploy(id), None);
    }
}

/// Steps that ask for something else than the next one, or that are watched for longer.
fn distinct(schedule: &Schedule, text: &Job, groups: &BTreeSet<String>) -> Vec<deploy::Step> {
    let pods = |step: &deploy::Step| -> Vec<u32> {
        groups.iter().map(|name| rollout::share(text.groups[name].count, step.percent)).collect()
    };
    let mut steps: Vec<deploy::Step> = Vec::new();
    for step in &schedule.steps {
        let is_like = |last: &deploy::Step| {
            let waits_less =
                last.pause == Pause::None || (last.pause == step.pause && step.pause != Pause::Hold);
            waits_less && last.form == step.form && pods(last) == pods(step)
        };
        if steps.last().is_some_and(is_like) {
            steps.pop();
        }
        steps.push(*step);
    }
    steps
}

/// `20 % (step 1 of 5)`.
fn step_words(deploy: &Deploy) -> String {
    let step = deploy.schedule.steps[deploy.step];
    let form = match step.form {
        Form::Split => "",
        Form::Standby => " standing by",
        Form::Switched => " serving",
    };
    format!("{} %{form} (step {} of {})", step.percent, deploy.step + 1, deploy.schedule.steps.len())
}
