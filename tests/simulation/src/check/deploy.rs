//! What must hold of deploys in every revision, and of the pods when one has ended.

use std::collections::BTreeSet;

use scheduler_core::{
    change::{Change, Key, Revision, Value},
    deploy::{Deploy, DeployId, Stage},
    job::Job,
    pod::PodPhase,
    state::State,
};

/// `acknowledges`: this revision is what somebody asked for who has seen how that deploy ended.
pub(super) fn holds(
    before: &State,
    after: &State,
    revision: &Revision,
    acknowledges: &dyn Fn(&DeployId) -> bool,
) -> Result<(), String> {
    for change in &revision.changes {
        if let Key::Deploy(id) = &change.key {
            moves(after, revision, change, id, acknowledges(id))?;
        }
        if let Key::Job(name) = &change.key {
            belongs_to_its_deploy(before, after, name)?;
        }
    }
    one_of_each_job(after)?;
    let mut under_way = after.deploys().values().filter(|deploy| !deploy.stage.is_end());
    under_way.try_for_each(|deploy| text_is_as_recorded(after, deploy))
}

/// How many deploys this revision promotes, and how many go back.
pub(super) fn ends(revision: &Revision) -> [u64; 2] {
    let ended =
        revision.changes.iter().filter(|change| of(&change.old).is_some_and(|old| !old.stage.is_end()));
    let stages: Vec<_> = ended.filter_map(|change| Some(of(&change.new)?.stage)).collect();
    let count = |is: fn(&Stage) -> bool| stages.iter().filter(|stage| is(stage)).count() as u64;
    [count(|stage| *stage == Stage::Promoted), count(|stage| matches!(stage, Stage::Aborted | Stage::GaveUp))]
}

/// What becomes of one deploy in a revision.
fn moves(
    after: &State,
    revision: &Revision,
    change: &Change,
    id: &DeployId,
    is_acknowledged: bool,
) -> Result<(), String> {
    match (of(&change.old), of(&change.new)) {
        (None, Some(new)) if new.stage.is_end() => Err(format!("deploy {id} ends before it begins")),
        (None, Some(_)) if !revision.changer.starts_with("user:") => {
            Err(format!("deploy {id} is begun by {}", revision.changer))
        }
        (Some(old), Some(_)) if old.stage.is_end() => Err(format!("deploy {id} {}, and moves", old.stage)),
        (Some(old), Some(new)) if new.moves != old.moves + 1 => {
            Err(format!("deploy {id} moves from {} to {}", old.moves, new.moves))
        }
        (_, Some(new)) if new.stage.is_end() => ends_as_it_says(after, new),
        (Some(old), None) if !is_acknowledged => may_be_forgotten(after, old),
        _ => Ok(()),
    }
}

fn of(value: &Option<Value>) -> Option<&Deploy> {
    match value {
        Some(Value::Deploy(deploy)) => Some(deploy),
        _ => None,
    }
}

/// Unacknowledged a deploy goes with its job, or for the job's next one; one that gave up, or had failed, does not.
fn may_be_forgotten(after: &State, old: &Deploy) -> Result<(), String> {
    let job = &old.id.job;
    let is_removed = after.job_record(job).is_none_or(|record| record.removed);
    let mut others = after.deploys().values().filter(|other| other.id.job == *job);
    let is_followed = others.any(|other| other.id > old.id && !other.stage.is_end());
    let is_right = match old.stage {
        Stage::GaveUp => false,
        Stage::Waiting | Stage::Stuck | Stage::GoingBack if !old.aborted => false,
        stage => is_removed || stage.is_end() && is_followed,
    };
    if is_right { Ok(()) } else { Err(format!("deploy {}, which {}, vanishes", old.id, old.stage)) }
}

/// The text in force is that of the version that the end says, as everybody may read in the job's record.
fn ends_as_it_says(after: &State, new: &Deploy) -> Result<(), String> {
    let id = &new.id;
    let record = after.job_record(&id.job).ok_or_else(|| format!("the job of deploy {id} is not there"))?;
    if record.removed {
        // It had failed when its job went, and is kept for that.
        let is_kept = new.stage == Stage::GaveUp && !new.aborted && new.ended.is_some();
        return if is_kept { Ok(()) } else { Err(format!("deploy {id} {}, and its job is gone", new.stage)) };
    }
    let previous = new.before(record).map(AsRef::as_ref);
    let wanted = if new.stage == Stage::Promoted { Some(new.text.as_ref()) } else { previous };
    let is_told = new.stage == Stage::Promoted || record.equals == Some(new.previous);
    let is_wanted = new.stage != Stage::GaveUp || !new.aborted;
    // A text that nothing names any more is not kept; the one in force has taken its place.
    let is_so = wanted.is_none() || record.current().map(AsRef::as_ref) == wanted;
    if is_so && is_told && is_wanted && new.ended.is_some() {
        return Ok(());
    }
    Err(format!("deploy {id} {}, and the job's text is another", new.stage))
}

/// While a deploy is under way no other text than its own comes into force.
fn belongs_to_its_deploy(before: &State, after: &State, job: &str) -> Result<(), String> {
    let mut deploys = before.deploys().values().filter(|deploy| deploy.id.job == job);
    let Some(deploy) = deploys.find(|deploy| !deploy.stage.is_end()) else { return Ok(()) };
    let version = |state: &State| state.job_record(job).map(|record| record.version);
    let moved = after.deploys().get(&deploy.id).is_some_and(|new| new.moves > deploy.moves);
    let is_new = version(after) != version(before);
    if moved || !is_new {
        return Ok(());
    }
    Err(format!("the text of {job} changes, which is that of deploy {}", deploy.id))
}

fn one_of_each_job(state: &State) -> Result<(), String> {
    let mut jobs = BTreeSet::new();
    let mut under_way = state.deploys().values().filter(|deploy| !deploy.stage.is_end());
    match under_way.find(|deploy| !jobs.insert(&deploy.id.job)) {
        Some(second) => Err(format!("deploy {} is under way beside another of its job", second.id)),
        None => Ok(()),
    }
}

fn text_is_as_recorded(state: &State, deploy: &Deploy) -> Result<(), String> {
    let record = state.job_record(&deploy.id.job).filter(|record| !record.removed);
    let before = record.and_then(|record| deploy.before(record));
    let Some((record, before)) = record.zip(before) else {
        return Err(format!("deploy {} has lost the text that it leaves", deploy.id));
    };
    let is_so = record.current().is_some_and(|text| **text == deploy.text_in_force(before));
    if is_so { Ok(()) } else { Err(format!("the text in force is not that of deploy {}", deploy.id)) }
}

/// Pods of groups without a rollout run the tasks that the text in force says.
pub(super) fn pods_are_of_the_text(state: &State) -> Result<(), String> {
    for (name, record) in state.jobs() {
        let Some(job) = record.current() else { continue };
        for pod in state.pods_of_job(name).filter(|pod| pod.phase == PodPhase::Running) {
            let text = |job: &Job| job.group(&pod.group).map(|group| group.tasks.clone());
            let is_split = job.group(&pod.group).is_some_and(|group| group.rollout.is_some());
            let own = record.versions.get(&pod.job_version).and_then(|job| text(job));
            if !is_split && own != text(job) {
                return Err(format!("{} is of version {}, and {name} of others", pod.id, pod.job_version));
            }
        }
    }
    Ok(())
}
