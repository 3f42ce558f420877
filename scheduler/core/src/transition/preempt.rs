//! Makes room for pods of jobs that ask for it, out of pods of jobs that allow it.
//!
//! Only a job with `preempts` makes others give way, only jobs with `preemptible` and a lower priority do, and only
//! where that gives a pod a place that no node has otherwise. Who gives way is stopped as any pod is, load balancers
//! told first, and another pod takes its place where there is room. The room is not reserved: it is given to
//! whoever is first in turn when it is there, and that is by priority.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::place::{Turn, say, turns};
use crate::{
    draft::Draft,
    job::Job,
    placement::{self, Candidate, Demand, obstacle},
    pod::{Pod, PodPhase},
    state::Usage,
    transition::{Context, group},
};

/// How many pods give way in one revision. The next ones do when these are gone.
const VICTIMS_MAX: usize = 256;

/// What was promised on nodes to pods that wait for others to stop.
type Promises = BTreeMap<String, Usage>;

/// Stops pods where that makes room. Gives the groups that have new pods without a place because of it.
pub(super) fn make_room(draft: &mut Draft<'_>, context: &mut Context<'_>) -> Vec<Turn> {
    let mut harmed = BTreeSet::new();
    let (mut promises, mut victims) = (Promises::new(), 0);
    for turn in turns(draft).into_iter().filter(|turn| turn.job.preempts) {
        if turn.in_the_way(draft).is_some() {
            continue;
        }
        let mut waiting = turn.unplaced(draft);
        while victims < VICTIMS_MAX
            && let Some(pod) = waiting.first()
            && let Some(room) = find(draft, &turn, &promises, context)
        {
            say(draft, std::slice::from_ref(pod), Some(&room.say(draft)));
            promises.entry(room.node.clone()).or_default().add(pod);
            victims += room.victims.len();
            for victim in room.victims {
                harmed.insert((victim.job.clone(), victim.group.clone()));
                let why = format!("gives way to job {}, which has a higher priority", turn.job.job);
                group::stop(draft, Pod::clone(&victim), &why, context);
            }
            waiting.remove(0);
        }
    }
    harmed.into_iter().flat_map(|(job, group)| refill(draft, &job, group, context)).collect()
}

/// Makes pods anew for those that gave way.
fn refill(draft: &mut Draft<'_>, job: &str, group: String, context: &mut Context<'_>) -> Vec<Turn> {
    let Some(text) = draft.job(job).cloned() else { return Vec::new() };
    group::reconcile(draft, job, &group, text.group(&group), context);
    Turn::of(draft, job, group)
}

/// A node that has room once some pods are gone.
struct Room {
    node: String,
    /// Those that are not on their way yet; none when it is enough to wait.
    victims: Vec<Arc<Pod>>,
}

impl Room {
    fn say(&self, draft: &Draft<'_>) -> String {
        let stopping = draft.pods_on(&self.node).filter(|pod| !pod.is_wanted()).count();
        let pods = stopping + self.victims.len();
        let pods = if pods == 1 { "1 pod".to_owned() } else { format!("{pods} pods") };
        format!("no node has room; waits for {pods} of lower priority to stop on {}", self.node)
    }
}

/// The node on which it costs least: the victims of the lowest priority, and of them the fewest.
fn find(draft: &Draft<'_>, turn: &Turn, promises: &Promises, context: &Context<'_>) -> Option<Room> {
    let wanted = turn.text()?;
    let survey = placement::survey(draft, turn.name(), wanted, context.wall);
    let demand = survey.demand(1);
    let rooms = survey.all().into_iter().filter_map(|candidate| {
        let name = candidate.node.name.clone();
        let victims = victims(draft, &turn.job, &demand, candidate, promises.get(&name))?;
        let highest = victims.iter().filter_map(|pod| priority(draft, pod)).max();
        Some((highest, victims.len(), name, victims))
    });
    let (_, _, node, victims) = rooms.min_by(|a, b| (&a.0, &a.1, &a.2).cmp(&(&b.0, &b.1, &b.2)))?;
    Some(Room { node, victims })
}

/// Which pods of a node would have to go for one of `demand` to fit there, in addition to those that go anyway.
fn victims(
    draft: &Draft<'_>,
    job: &Job,
    demand: &Demand<'_>,
    mut candidate: Candidate<'_>,
    promised: Option<&Usage>,
) -> Option<Vec<Arc<Pod>>> {
    let mut lower: Vec<(i32, &Arc<Pod>)> = Vec::new();
    for pod in draft.pods_on(&candidate.node.name) {
        match pod.phase {
            PodPhase::Terminating => candidate.usage.take_away(pod),
            _ => lower.extend(preemptible(draft, job, pod).map(|priority| (priority, pod))),
        }
    }
    if let Some(promised) = promised {
        candidate.usage.merge(promised);
    }
    lower.sort_by_key(|(priority, pod)| (*priority, u64::MAX - pod.serial));
    let mut victims = Vec::new();
    let mut lower = lower.into_iter();
    while obstacle(demand, &candidate).is_some() {
        let (_, pod) = lower.next()?;
        candidate.usage.take_away(pod);
        victims.push(pod.clone());
    }
    spare(demand, &mut candidate, &mut victims);
    Some(victims)
}

/// Lets those stay that need not go after all, the most important first.
fn spare(demand: &Demand<'_>, candidate: &mut Candidate<'_>, victims: &mut Vec<Arc<Pod>>) {
    for at in (0..victims.len()).rev() {
        candidate.usage.add(&victims[at]);
        if obstacle(demand, candidate).is_none() {
            victims.remove(at);
        } else {
            candidate.usage.take_away(&victims[at]);
        }
    }
}

/// The priority of a pod that may be stopped for one of `job`.
fn preemptible(draft: &Draft<'_>, job: &Job, pod: &Pod) -> Option<i32> {
    let other = draft.job(&pod.job)?;
    let gives_way = other.preemptible && other.priority < job.priority && pod.phase != PodPhase::Lost;
    gives_way.then_some(other.priority)
}

fn priority(draft: &Draft<'_>, pod: &Pod) -> Option<i32> {
    draft.job(&pod.job).map(|job| job.priority)
}
