//! What must hold of every revision: what it may do to the pods of a state.

use std::collections::BTreeMap;

use scheduler_core::{
    change::{Change, Key, Revision, Value},
    job::{Availability, Group, Job, Spread},
    node::NodePhase,
    placement::{self, Pools},
    pod::{Pod, PodId, PodPhase},
    state::State,
};

use super::room;

/// What becomes of one pod in a revision.
struct Step<'a> {
    old: Option<&'a Pod>,
    new: Option<&'a Pod>,
}

impl<'a> Step<'a> {
    fn of(change: &'a Change) -> Option<Step<'a>> {
        let pod = |value: &'a Option<Value>| match value {
            Some(Value::Pod(pod)) => Some(pod.as_ref()),
            _ => None,
        };
        matches!(change.key, Key::Pod(_)).then(|| Step { old: pod(&change.old), new: pod(&change.new) })
    }

    /// The pod, when it is told to stop.
    fn stopped(&self) -> Option<(&'a Pod, &'a Pod)> {
        let (old, new) = (self.old?, self.new?);
        (old.phase != PodPhase::Terminating && new.phase == PodPhase::Terminating).then_some((old, new))
    }

    /// The pod, when it is given a place.
    fn placed(&self) -> Option<&'a Pod> {
        let had_none = self.old.is_none_or(|old| old.node.is_none());
        self.new.filter(|new| had_none && new.node.is_some())
    }
}

/// `is_unwell`: of these pods it was said in the same moment that they do not run.
pub(super) fn holds(
    before: &State,
    after: &State,
    revision: &Revision,
    is_unwell: &dyn Fn(&PodId) -> bool,
) -> Result<(), String> {
    let steps: Vec<Step<'_>> = revision.changes.iter().filter_map(Step::of).collect();
    for step in &steps {
        if let Some((old, new)) = step.stopped() {
            if !is_unwell(&new.id) {
                grows_before_it_shrinks(after, old, new)?;
            }
            gives_way_by_consent(after, new)?;
        }
        if let Some(pod) = step.new.filter(|_| step.old.is_none()) {
            makes_none_in_place(after, pod)?;
        }
        if let Some(pod) = step.placed() {
            keeps_apart(after, pod)?;
        }
        pets_wait(before, after, revision, step)?;
    }
    lies_as_it_should(after, &steps)?;
    dead_by_word(before, after, revision)?;
    looks_at_enough(after, revision)
}

/// A rollout stops a pod that serves only while as many as are wanted serve without it. Jobs that give way to others
/// may have lost more of them in the same revision.
fn grows_before_it_shrinks(state: &State, old: &Pod, new: &Pod) -> Result<(), String> {
    let Some(job) = state.job(&new.job).filter(|job| !job.preemptible) else { return Ok(()) };
    let is_step = old.serves() && new.message.starts_with("the rollout wants");
    let Some(group) = job.group(&new.group).filter(|_| is_step) else { return Ok(()) };
    let pods = state.pods_of_group(&new.job, &new.group);
    let serving = pods.filter(|pod| pod.serves()).count();
    if serving >= group.count as usize {
        return Ok(());
    }
    Err(format!("a rollout stops {}, and of {} pods only {serving} serve", new.id, group.count))
}

/// A rollout in place never has more pods than are wanted; those of before it may be.
fn makes_none_in_place(state: &State, pod: &Pod) -> Result<(), String> {
    let group = state.job(&pod.job).and_then(|job| job.group(&pod.group));
    let Some(group) = group.filter(|group| group.rollout.is_some_and(|rollout| rollout.in_place)) else {
        return Ok(());
    };
    let wanted = state.pods_of_group(&pod.job, &pod.group).filter(|pod| pod.is_wanted()).count();
    if wanted <= group.count as usize {
        return Ok(());
    }
    Err(format!("a rollout in place makes {}, and {wanted} are more than {}", pod.id, group.count))
}

/// A pod gives way only when both jobs allow it.
fn gives_way_by_consent(state: &State, pod: &Pod) -> Result<(), String> {
    let rest = pod.message.strip_prefix("gives way to job ");
    let Some((other, _)) = rest.and_then(|rest| rest.split_once(',')) else { return Ok(()) };
    let jobs = state.job(&pod.job).zip(state.job(other));
    match jobs {
        Some((job, other)) if job.preemptible && other.preempts && job.priority < other.priority => Ok(()),
        _ => Err(format!("{} gives way to {other}, and need not", pod.id)),
    }
}

/// A pod is put beside none from which it keeps apart, or that keeps apart from it.
fn keeps_apart(state: &State, pod: &Pod) -> Result<(), String> {
    let node = pod.node.as_ref().and_then(|name| state.nodes().get(name));
    let Some(node) = node else { return Err(format!("{} is put on a node that is not there", pod.id)) };
    match state.pods().values().find(|other| room::kept_apart(state, pod, node, other)) {
        Some(other) => Err(format!("{} is put beside {}, from which it keeps apart", pod.id, other.id)),
        None => Ok(()),
    }
}

/// A pet that is lost with its node waits for it, or for an operator's word that the node is dead.
fn pets_wait(before: &State, after: &State, revision: &Revision, step: &Step<'_>) -> Result<(), String> {
    let lost = step.old.filter(|old| old.phase == PodPhase::Lost && step.new.is_none());
    let Some(pod) = lost.filter(|_| !revision.changer.starts_with("user:")) else { return Ok(()) };
    let group = after.job(&pod.job).and_then(|job| job.group(&pod.group));
    let is_pet = |group: &&Group| group.availability() == Availability::Pet && group.rollout.is_none();
    let node = pod.node.as_ref().and_then(|name| before.nodes().get(name));
    let is_dead = node.is_none_or(|node| node.phase == NodePhase::Dead);
    // A deploy that ends stops pods of the other version, and those that are too many, as whoever began it wanted.
    let pods = before.pods_of_group(&pod.job, &pod.group).filter(|pod| pod.is_wanted()).count();
    let is_too_many = group.is_some_and(|group| pods > group.count as usize);
    let is_other = revision.changer == "deploy" && (is_too_many || !is_of_the_text(after, pod));
    if group.filter(is_pet).is_none() || is_dead || is_other {
        return Ok(());
    }
    Err(format!("{} is a pet, and was replaced although nobody says that its node is dead", pod.id))
}

/// Whether a pod has the tasks that the text in force says.
fn is_of_the_text(state: &State, pod: &Pod) -> bool {
    let tasks = |job: &Job| job.group(&pod.group).map(|group| group.tasks.clone());
    let own = state.job_record(&pod.job).and_then(|record| record.versions.get(&pod.job_version));
    own.is_some_and(|own| state.job(&pod.job).is_some_and(|text| tasks(own) == tasks(text)))
}

/// Only an operator says that a node is dead.
fn dead_by_word(before: &State, after: &State, revision: &Revision) -> Result<(), String> {
    for node in after.nodes().values().filter(|node| node.phase == NodePhase::Dead) {
        let was_dead = before.nodes().get(&node.name).is_some_and(|old| old.phase == NodePhase::Dead);
        if !was_dead && !revision.changer.starts_with("user:") {
            return Err(format!("{} is declared dead by {}", node.name, revision.changer));
        }
    }
    Ok(())
}

/// Pods that are spread over a label are put where fewest of their group are. Revisions that also take pods away
/// are passed over: what counted when the place was chosen is no more. So are groups that keep apart: where the next
/// pod may go depends on the one before.
fn lies_as_it_should(state: &State, steps: &[Step<'_>]) -> Result<(), String> {
    if steps.iter().any(|step| step.new.is_none() || step.stopped().is_some()) {
        return Ok(());
    }
    for pod in steps.iter().filter_map(Step::placed) {
        let text = state.job(&pod.job).and_then(|job| job.group(&pod.group));
        if let Some(group) = text.filter(|group| group.rollout.is_none() && group.apart.is_empty())
            && let Spread::Label(label) = &group.spread
        {
            is_where_fewest_are(state, pod, group, label)?;
        }
    }
    Ok(())
}

fn is_where_fewest_are(state: &State, pod: &Pod, group: &Group, label: &str) -> Result<(), String> {
    let mut pods: BTreeMap<Option<&str>, usize> = BTreeMap::new();
    for other in state.pods_of_group(&pod.job, &pod.group).filter(|other| other.is_wanted()) {
        if let Some(node) = other.node.as_ref().and_then(|name| state.nodes().get(name)) {
            *pods.entry(node.label(label)).or_default() += 1;
        }
    }
    let own = pod.node.as_ref().and_then(|name| state.nodes().get(name)).and_then(|node| node.label(label));
    for node in state.nodes().values().filter(|node| node.phase == NodePhase::Ready) {
        let there = pods.get(&node.label(label)).copied().unwrap_or(0);
        if there + 1 < pods[&own] && room::fits(state, pod, group, node, &state.usage(&node.name)) {
            return Err(format!(
                "{} lies with {} others, and with {there} on {}",
                pod.id,
                pods[&own] - 1,
                node.name
            ));
        }
    }
    Ok(())
}

/// Placement finds among the nodes that it looks at what it would find among all. One group each time, in turn.
fn looks_at_enough(state: &State, revision: &Revision) -> Result<(), String> {
    let jobs = state.jobs().filter_map(|(name, record)| Some((name, record.current()?)));
    let groups: Vec<_> = jobs
        .flat_map(|(job, text)| text.groups.iter().map(move |(name, group)| (job, name, group)))
        .collect();
    let turn = revision.revision as usize % groups.len().max(1);
    let Some((job, name, group)) = groups.get(turn) else { return Ok(()) };
    let survey = placement::survey(state, (job, name), group, revision.time);
    let demand = survey.demand(3);
    let few = placement::place(&demand, survey.pools(&demand));
    let all = placement::place(&demand, Pools::of(&demand, survey.all()));
    if few == all {
        Ok(())
    } else {
        Err(format!("{job}/{name} goes to {few:?}, and of all nodes to {all:?}"))
    }
}
