//! What an apply would do: the transition itself, on a copy of the state that is then thrown away.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use hextet_lifecycle::{Hook, pod};

use crate::{
    change::{Change, Key, Value},
    event::{Event, PodReport, Refusal, Texts},
    job::Job,
    node::NodePhase,
    pod::{Pod, PodPhase},
    state::State,
    transition::{Context, Origin, handle},
};

/// How far ahead a rollout is looked at: pods start, others stop, and what waited for their room starts, twice.
const ROUNDS: usize = 4;

/// What would become of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobPlan {
    /// Its name.
    pub job: String,
    /// The version in force now; 0 if there is none.
    pub from: u32,
    /// The version that would be in force; the same if nothing changes.
    pub to: u32,
    /// What would become of pods, also of other jobs that get room, by pod. Those that are not named stay as they are.
    pub pods: Vec<PodPlan>,
}

/// What would become of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlan {
    /// The pod. That of a new one is what it gets if nothing else happens before.
    pub pod: String,
    /// Where it is, or would be.
    pub node: Option<String>,
    /// What would become of it.
    pub fate: PodFate,
    /// Why, in words.
    pub why: String,
}

/// What would become of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodFate {
    /// It is new, or waited for a place, and gets one.
    Placed,
    /// Its tasks are started anew, in the same place and with the same address.
    Restarted,
    /// It goes on as it is; what changes beside it is said in words.
    Kept,
    /// It cannot stay; this pod would take its place.
    Moved {
        /// The pod that takes its place.
        to: String,
        /// Where; `None` if no node fits.
        node: Option<String>,
    },
    /// It is not wanted any more.
    Stopped,
    /// It has no place, and waits.
    Waits,
}

/// Plans the jobs one after the other, as they would be applied.
///
/// # Errors
/// The refusal that an apply would get.
pub fn plan(
    state: &State,
    jobs: &[(Job, Texts)],
    origin: &Origin,
    context: &mut Context<'_>,
) -> Result<Vec<JobPlan>, Refusal> {
    let mut copy = state.clone();
    jobs.iter().map(|wanted| plan_one(&mut copy, wanted, origin, context)).collect()
}

fn plan_one(
    copy: &mut State,
    (job, texts): &(Job, Texts),
    origin: &Origin,
    context: &mut Context<'_>,
) -> Result<JobPlan, Refusal> {
    let version = |state: &State| match state.job_record(&job.job) {
        Some(record) if !record.removed => record.version,
        _ => 0,
    };
    let (from, before) = (version(copy), copy.clone());
    let revision = handle(copy, &Event::ApplyJob(job.clone(), texts.clone()), origin, context)?;
    let changes = revision.map(|revision| revision.changes).unwrap_or_default();
    let mut pods: Vec<Planned> = changes.iter().filter_map(|change| planned(change, &before, copy)).collect();
    if job.groups.values().any(|group| group.rollout.is_some()) {
        pods.extend(stopped_later(copy, &job.job, context));
    } else if !pods.is_empty() || from != version(copy) {
        pods.extend(unheard(copy, job));
    }
    Ok(JobPlan { job: job.job.clone(), from, to: version(copy), pods: pair(pods) })
}

/// Pods that stay as they are until their node hears of the new text.
fn unheard(state: &State, job: &Job) -> Vec<Planned> {
    let is_old = |pod: &&Arc<Pod>| {
        let node = state.node_of(pod);
        let differs =
            state.group_of(pod).zip(job.group(&pod.group)).is_some_and(|(now, next)| now.tasks != next.tasks);
        pod.is_wanted() && differs && node.is_some_and(|node| node.phase != NodePhase::Ready)
    };
    let kept = state.pods_of_job(&job.job).filter(is_old);
    kept.map(|pod| {
        later(pod, PodFate::Kept, "its node does not report: what becomes of it is decided when that is back")
    })
    .collect()
}

fn later(pod: &Pod, fate: PodFate, why: &str) -> Planned {
    let (group, is_replaced) = ((pod.job.clone(), pod.group.clone()), fate == PodFate::Stopped);
    let plan = PodPlan { pod: pod.id.to_string(), node: pod.node.clone(), fate, why: why.to_owned() };
    Planned { group, is_new: false, is_replaced, plan }
}

/// Pods that a rollout stops as soon as others run: what would follow if all that can start did, and all that is told to
/// stop did.
fn stopped_later(state: &State, job: &str, context: &mut Context<'_>) -> Vec<Planned> {
    let mut later = state.clone();
    let origin = Origin { changer: String::new(), message: String::new() };
    for _ in 0..ROUNDS {
        for (node, reports) in good_news(&later, job) {
            // Whatever is refused does not happen.
            drop(handle(&mut later, &Event::PodReports(node, reports), &origin, context));
        }
    }
    let stops = |pod: &Pod| later.pods().get(&pod.id).is_none_or(|later| !later.is_wanted());
    let stopped = state.pods_of_job(job).filter(|pod| pod.is_wanted() && pod.node.is_some() && stops(pod));
    let why = "the rollout stops it as soon as enough others run";
    stopped.map(|pod| self::later(pod, PodFate::Stopped, why)).collect()
}

/// What nodes that can would say next of the pods of a job, if all went well.
fn good_news(state: &State, job: &str) -> BTreeMap<String, Vec<PodReport>> {
    let mut news: BTreeMap<String, Vec<PodReport>> = BTreeMap::new();
    for pod in state.pods_of_job(job) {
        let Some(node) = state.node_of(pod).filter(|node| node.phase == NodePhase::Ready) else { continue };
        let (id, gone) = (pod.id.clone(), pod.phase == PodPhase::Terminating);
        let (phase, message, restarts) = (PodPhase::Running, String::new(), pod.restarts);
        let report = PodReport { id, phase, message, restarts, gone, ending: None, version: None };
        news.entry(node.name.clone()).or_default().push(report);
    }
    news
}

/// A planned pod with its group, and whether a new one has to take its place.
struct Planned {
    group: (String, String),
    is_new: bool,
    is_replaced: bool,
    plan: PodPlan,
}

fn planned(change: &Change, before: &State, after: &State) -> Option<Planned> {
    let Key::Pod(id) = &change.key else { return None };
    let pod = |value: &Option<Value>| match value {
        Some(Value::Pod(pod)) => Some(pod.clone()),
        _ => None,
    };
    let (old, new) = (pod(&change.old), pod(&change.new));
    let any = new.as_ref().or(old.as_ref())?;
    let fate = fate(old.as_deref(), new.as_deref())?;
    let is_new = old.is_none();
    let was_live = old.as_ref().is_some_and(|old| old.node.is_some());
    let is_replaced = fate == PodFate::Stopped && was_live;
    let why = match (&fate, &old, &new) {
        (PodFate::Kept | PodFate::Restarted, Some(old), Some(new)) => beside((old, before), (new, after)),
        _ => any.message.clone(),
    };
    let plan = PodPlan { pod: id.to_string(), node: any.node.clone(), fate, why };
    Some(Planned { group: (any.job.clone(), any.group.clone()), is_new, is_replaced, plan })
}

/// What an apply does for a pod that stays where it is, besides to its tasks.
fn beside((old, before): (&Pod, &State), (new, after): (&Pod, &State)) -> String {
    let had = before.group_of(old);
    let is_new = |name: &str, hook: &Hook| had.and_then(|had| had.hooks.get(name)) != Some(hook);
    let has = after.group_of(new).into_iter().flat_map(|group| &group.hooks);
    let runs = has.filter(|(name, hook)| hook.on.is_empty() && is_new(name, hook));
    let names: Vec<&str> = runs.map(|(name, _)| name.as_str()).collect();
    let amounts = (&old.resources, &old.countables) != (&new.resources, &new.countables);
    let amounts = amounts.then(|| "other amounts are kept free for it".to_owned());
    let restarts = new.phase == PodPhase::Starting;
    let again = after.group_of(new).filter(|_| restarts).map(|group| follow_tasks(&group.hooks));
    let again: Vec<&str> = again.into_iter().flatten().filter(|name| !names.contains(name)).collect();
    let late = hooks(&names, |it| format!("run, and nothing waits for {it}"));
    let parts = [amounts, late, hooks(&again, |_| "run again".to_owned())];
    parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// Hooks that are done anew when the tasks are.
fn follow_tasks(hooks: &BTreeMap<String, Hook>) -> Vec<&str> {
    let Ok(graph) = pod::graph(hooks, &BTreeMap::new()) else { return Vec::new() };
    hooks.keys().map(String::as_str).filter(|name| graph.leans_on(name, pod::TASKS)).collect()
}

/// What becomes of some hooks, in words; `what` is told how they are called.
fn hooks(names: &[&str], what: impl Fn(&str) -> String) -> Option<String> {
    match names {
        [] => None,
        [name] => Some(format!("its hook {name} is {}", what("it"))),
        names => Some(format!("its hooks {} are {}", names.join(", "), what("them"))),
    }
}

fn fate(old: Option<&Pod>, new: Option<&Pod>) -> Option<PodFate> {
    let Some(new) = new else { return Some(PodFate::Stopped) };
    let placed_now = new.node.is_some() && old.is_none_or(|old| old.node.is_none());
    match new.phase {
        PodPhase::Terminating => old.is_some_and(Pod::is_wanted).then_some(PodFate::Stopped),
        _ if placed_now => Some(PodFate::Placed),
        PodPhase::Pending => Some(PodFate::Waits),
        _ if old.is_some_and(|old| old.job_version != new.job_version) => {
            let restarts = new.phase == PodPhase::Starting;
            Some(if restarts { PodFate::Restarted } else { PodFate::Kept })
        }
        _ => None,
    }
}

/// A pod that is stopped while its group gets a new one has moved there.
fn pair(planned: Vec<Planned>) -> Vec<PodPlan> {
    let mut new: BTreeMap<(String, String), VecDeque<PodPlan>> = BTreeMap::new();
    let (fresh, rest): (Vec<_>, Vec<_>) = planned.into_iter().partition(|planned| planned.is_new);
    for Planned { group, plan, .. } in fresh {
        new.entry(group).or_default().push_back(plan);
    }
    let mut plans: Vec<PodPlan> = Vec::new();
    for Planned { group, is_replaced, mut plan, .. } in rest {
        let successor = new.get_mut(&group).filter(|_| is_replaced).and_then(VecDeque::pop_front);
        if let Some(PodPlan { pod, node, why, .. }) = successor {
            if node.is_none() {
                plan.why = format!("{}; {why}", plan.why);
            }
            plan.fate = PodFate::Moved { to: pod, node };
        }
        plans.push(plan);
    }
    plans.extend(new.into_values().flatten());
    plans.sort_by(|one, other| one.pod.cmp(&other.pod));
    plans
}
