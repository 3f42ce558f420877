//! Deploys: what operators begin and want of them, under faults and in peace.

use rand::{Rng as _, seq::IteratorRandom as _};
use scheduler_core::{
    deploy::{Deploy, Form, Move, OnFailure, Order, Pause, Schedule, Stage, Step, Strategy},
    event::Event,
    job::{Availability, Group, Job},
    pod::PodPhase,
    state::State,
};

use crate::shared::Shared;

/// What a version executes whose tasks end soon after each start, as long as there are faults.
pub(crate) const BAD: &str = "/bin/bad";
/// How long a step may take.
const TIMEOUT_MS: u64 = 8_000;

/// The text in force with other tasks, to become so by random steps with short times.
pub(crate) fn begin(job: &Job, shared: &mut Shared) -> Event {
    let bad = shared.chance(0.3);
    let number = shared.rng.random_range(0..3);
    let mut job = Job::clone(job);
    if shared.chance(0.2) {
        let count = shared.rng.random_range(0..6);
        job.groups.values_mut().filter(|group| !is_single(group)).for_each(|group| group.count = count);
    }
    let program = if bad { BAD } else { "/bin/x" };
    let schedule = schedule(shared);
    Event::Deploy(retasked(job, program, number, schedule.in_place), schedule)
}

/// The job with other tasks where there may be two versions, or everywhere.
pub(crate) fn retasked(mut job: Job, program: &str, number: u32, singles: bool) -> Job {
    for group in job.groups.values_mut().filter(|group| singles || !is_single(group)) {
        group.rollout = None;
        for task in group.tasks.values_mut() {
            task.exec = vec![program.to_owned(), number.to_string()];
        }
    }
    job
}

fn is_single(group: &Group) -> bool {
    group.availability() == Availability::Singleton
}

/// Steps of any strategy, with times of seconds.
pub(crate) fn schedule(shared: &mut Shared) -> Schedule {
    let all = [Strategy::Rolling, Strategy::Canary, Strategy::BlueGreen, Strategy::AllAtOnce];
    let strategy = all[shared.rng.random_range(0..all.len())];
    let pause = match shared.rng.random_range(0..4) {
        0 => Pause::None,
        1 => Pause::Hold,
        _ => Pause::For(shared.rng.random_range(100..3_000)),
    };
    let steps = match strategy {
        Strategy::Rolling if shared.chance(0.5) => own_steps(pause, shared),
        strategy => Schedule::steps_of(strategy, pause),
    };
    let on_failure = if shared.chance(0.7) { OnFailure::Rollback } else { OnFailure::Hold };
    Schedule {
        strategy,
        steps,
        healthy_for_ms: shared.rng.random_range(0..2_000),
        timeout_ms: TIMEOUT_MS,
        retries: shared.rng.random_range(0..3),
        retry_after_ms: shared.rng.random_range(100..1_000),
        on_failure,
        in_place: strategy != Strategy::BlueGreen && shared.chance(0.4),
    }
}

fn own_steps(pause: Pause, shared: &mut Shared) -> Vec<Step> {
    let first = shared.rng.random_range(1..100);
    [(first, pause), (100, Pause::None)]
        .map(|(percent, pause)| Step { percent, form: Form::Split, pause })
        .into()
}

/// What somebody wants of a deploy, whether it can be or not.
pub(crate) fn order(shown: &State, shared: &mut Shared) -> Option<Event> {
    let id = shown.deploys().keys().choose(&mut shared.rng)?.clone();
    let order = match shared.rng.random_range(0..6) {
        0..=2 => Order::Resume,
        3 => Order::Abort { now: shared.chance(0.3) },
        _ => Order::Acknowledge,
    };
    Some(Event::DeployOrder(id, order))
}

/// What a deploy does next when its gates let everything through, and nobody waits.
pub(crate) fn at_once(deploy: &Deploy) -> Option<Event> {
    let moved = |decided| Some(Event::DeployMoved(deploy.id.clone(), deploy.moves, decided));
    match deploy.stage {
        Stage::Growing | Stage::Watching => moved(Move::Passed),
        Stage::Waiting => moved(Move::TryAgain),
        Stage::GoingBack => moved(Move::Back),
        Stage::Held => Some(Event::DeployOrder(deploy.id.clone(), Order::Resume)),
        Stage::Stuck => Some(Event::DeployOrder(deploy.id.clone(), Order::Abort { now: true })),
        Stage::Promoted | Stage::Aborted | Stage::GaveUp => None,
    }
}

/// In peace somebody lets go on what is held, and takes back what is stuck; what cannot go back for want of room goes
/// back in place.
pub(crate) fn attended(state: &State, is_late: bool) -> Option<Event> {
    let order = |deploy: &Deploy| match deploy.stage {
        Stage::Held => Some(Order::Resume),
        Stage::Stuck => Some(Order::Abort { now: false }),
        Stage::GoingBack if is_late => Some(Order::Abort { now: true }),
        _ => None,
    };
    state.deploys().values().find_map(|deploy| Some(Event::DeployOrder(deploy.id.clone(), order(deploy)?)))
}

/// The next version of a job for a deploy in peace: no pod of it gives way to others, and all that are wanted run.
pub(crate) fn chosen(state: &State, number: u32) -> Option<Job> {
    let is_fit = |job: &Job| {
        let mut pods = state.pods_of_job(&job.job);
        let is_whole = job.groups.values().any(|group| group.count > 0 && !is_single(group))
            && job.groups.values().all(|group| group.rollout.is_none());
        !job.preemptible && is_whole && pods.all(|pod| pod.phase == PodPhase::Running)
    };
    let job = state.jobs().filter_map(|(_, record)| record.current()).find(|job| is_fit(job))?;
    Some(retasked(Job::clone(job), "/bin/x", number, false))
}

/// By job and group how many pods serve, as load balancers are told.
pub(crate) fn floor(job: &Job, state: &State) -> Vec<(String, String, usize)> {
    let groups = job.groups.iter().filter(|(_, group)| !is_single(group));
    let floor = groups.map(|(name, group)| {
        (job.job.clone(), name.clone(), serving(state, &job.job, name).min(group.count as usize))
    });
    floor.collect()
}

pub(crate) fn holds(floor: &[(String, String, usize)], state: &State) -> Result<(), String> {
    for (job, group, floor) in floor {
        let now = serving(state, job, group);
        if now < *floor {
            return Err(format!("in a deploy {now} pods of {job}/{group} serve, and {floor} did before"));
        }
    }
    Ok(())
}

fn serving(state: &State, job: &str, group: &str) -> usize {
    state.pods_of_group(job, group).filter(|pod| pod.serves()).count()
}

/// Every deploy has come to its end.
pub(crate) fn have_ended(state: &State) -> Result<(), String> {
    let under_way = state.deploys().values().find(|deploy| !deploy.stage.is_end());
    under_way.map_or(Ok(()), |deploy| {
        Err(format!("deploy {} {}, step {}: {}", deploy.id, deploy.stage, deploy.step, deploy.reason))
    })
}
