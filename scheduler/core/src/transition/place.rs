//! Gives pods without a place a node and an address, or the reason why they have none.
//!
//! Groups take turns by the priority of their job, and among equals the one that has waited longest is first. A pod
//! that is lost with its node and whose group is `ha` gives way to a new pod once that has a place elsewhere, and
//! not before: when no other node can take it, it is still there if its node returns.

use std::{cmp::Reverse, sync::Arc};

use crate::{
    draft::Draft,
    job::{Availability, Group, Job},
    node::NodePhase,
    placement,
    pod::{Pod, PodPhase},
    rollout::{Side, side_of},
    transition::{Context, address, group, preempt, rollout},
};

/// How many pods of a group get a new reason in one revision; the others keep an older one for now.
const REASONS_CHANGED_MAX: usize = 256;

/// How many nodes are asked for their reason in one revision; groups beyond it keep an older one for now.
const LOOKS_MAX: usize = 200_000;

/// What is in the way of what there may only be one of, after a restore.
const WAITS_FOR_LEASES: &str = "the cluster was restored from a backup: waits until no lease from before can run \
     (`netctl server status` says how long)";

/// A group that has pods without a place.
pub(super) struct Turn {
    pub(super) job: Arc<Job>,
    pub(super) group: String,
    /// Of a group in a rollout its versions, and which of them this is.
    side: Option<([Side; 2], usize)>,
}

pub(super) fn place_all(draft: &mut Draft<'_>, context: &mut Context<'_>) {
    let mut looks = LOOKS_MAX;
    for turn in turns(draft) {
        place_group(draft, &turn, &mut looks, context);
    }
    for turn in preempt::make_room(draft, context) {
        place_group(draft, &turn, &mut looks, context);
    }
}

/// Groups that have pods without a place, in the order in which they are served.
pub(super) fn turns(draft: &Draft<'_>) -> Vec<Turn> {
    let mut turns = Vec::new();
    for (name, group) in draft.unplaced_groups() {
        let first = draft.unplaced_of_group(&name, &group).next().map(|pod| pod.serial);
        for turn in Turn::of(draft, &name, group) {
            turns.push(((Reverse(turn.job.priority), first), turn));
        }
    }
    turns.sort_by_key(|(order, _)| *order);
    turns.into_iter().map(|(_, turn)| turn).collect()
}

impl Turn {
    /// The pods of a group without a place: all are alike, or in a rollout those of each version.
    pub(super) fn of(draft: &Draft<'_>, job: &str, group: String) -> Vec<Turn> {
        let Some(job) = draft.job(job).cloned() else { return Vec::new() };
        let sides = job.group(&group).and_then(|text| rollout::sides(draft, &job.job, &group, text));
        let turn = |side| Turn { job: job.clone(), group: group.clone(), side };
        match sides {
            None => vec![turn(None)],
            Some(sides) => vec![turn(Some((sides.clone(), 1))), turn(Some((sides, 0)))],
        }
    }

    pub(super) fn text(&self) -> Option<&Group> {
        match &self.side {
            Some((sides, which)) => Some(&sides[*which].text),
            None => self.job.group(&self.group),
        }
    }

    fn has(&self, draft: &Draft<'_>, pod: &Pod) -> bool {
        let Some((sides, which)) = &self.side else { return true };
        let record = draft.job_record(&self.job.job);
        record.is_some_and(|record| side_of(record, sides, pod) == Some(*which))
    }

    pub(super) fn name(&self) -> (&str, &str) {
        (&self.job.job, &self.group)
    }

    /// Its pods without a place that may have one.
    pub(super) fn unplaced(&self, draft: &Draft<'_>) -> Vec<Arc<Pod>> {
        let Some(group) = self.text() else { return Vec::new() };
        let pods = draft.unplaced_of_group(&self.job.job, &self.group);
        pods.filter(|pod| is_replaceable(draft, group, pod) && self.has(draft, pod)).cloned().collect()
    }

    /// Of a group that may only have one pod that lives, what may live beside another, in words.
    pub(super) fn in_the_way(&self, draft: &Draft<'_>) -> Option<String> {
        if self.text()?.availability() != Availability::Singleton {
            return None;
        }
        if draft.restored().is_some() {
            return Some(WAITS_FOR_LEASES.to_owned());
        }
        let mut pods = draft.pods_of_group(&self.job.job, &self.group);
        let other = pods.find(|pod| group::may_live(draft, pod))?;
        let node = other.node.as_deref().unwrap_or_default();
        Some(format!("waits until {} has ended on {node}: there is never more than one", other.id))
    }
}

/// A pod that is lost with its node gives way when its group wants that and its node leaves no doubt.
fn is_replaceable(draft: &Draft<'_>, group: &Group, pod: &Pod) -> bool {
    let node = draft.node_of(pod);
    match (pod.phase, group.availability()) {
        (PodPhase::Pending, _) | (PodPhase::Lost, Availability::Ha) => true,
        (PodPhase::Lost, Availability::Pet) => node.is_none_or(|node| node.phase == NodePhase::Dead),
        (PodPhase::Lost, Availability::Singleton) => !group::may_live(draft, pod),
        _ => false,
    }
}

fn place_group(draft: &mut Draft<'_>, turn: &Turn, looks: &mut usize, context: &mut Context<'_>) {
    let Some(wanted) = turn.text() else { return };
    let unplaced = turn.unplaced(draft);
    if unplaced.is_empty() {
        return;
    }
    if let Some(other) = turn.in_the_way(draft) {
        return say(draft, &unplaced, Some(&other));
    }
    let survey = placement::survey(draft, turn.name(), wanted, context.wall);
    let demand = survey.demand(unplaced.len());
    let nodes = placement::place(&demand, survey.pools(&demand));
    let (placed, left) = unplaced.split_at(nodes.len());
    for (pod, node) in placed.iter().zip(&nodes) {
        let pod = Pod::clone(pod);
        let pod = if pod.phase == PodPhase::Lost { replace(draft, &pod, turn, wanted, context) } else { pod };
        settle(draft, pod, node, context);
    }
    if !left.is_empty() {
        let why = why_not(draft, turn, wanted, looks, context);
        say(draft, left, why.as_deref());
    }
}

/// Why no pod of the group fits anywhere now, unless too many nodes have been asked already.
fn why_not(
    draft: &Draft<'_>,
    turn: &Turn,
    wanted: &Group,
    looks: &mut usize,
    context: &Context<'_>,
) -> Option<String> {
    *looks = looks.checked_sub(draft.nodes().len())?;
    let survey = placement::survey(draft, turn.name(), wanted, context.wall);
    Some(placement::explain(&survey.demand(1), &survey.all()).short())
}

/// A new pod in the place of one that is lost with its node.
fn replace(draft: &mut Draft<'_>, lost: &Pod, turn: &Turn, wanted: &Group, context: &mut Context<'_>) -> Pod {
    group::forget(draft, lost);
    let in_force = draft.job_record(&lost.job).map_or(0, |record| record.version);
    let version = turn.side.as_ref().map_or(in_force, |(sides, which)| sides[*which].version);
    let pod = group::create_of(draft, &lost.job, &lost.group, wanted, version, context);
    Pod { standby: lost.standby, ..pod }
}

fn settle(draft: &mut Draft<'_>, pod: Pod, node: &str, context: &mut Context<'_>) {
    let Some(address) = address::draw(draft, node, context) else { return };
    let (node, address) = (Some(node.to_owned()), Some(address));
    let message = "waits for its node to start it".to_owned();
    draft.put_pod(Pod { node, address, phase: PodPhase::Starting, message, ..pod });
}

/// Gives pods without a place their reason; without one, only those that have none yet.
pub(super) fn say(draft: &mut Draft<'_>, pods: &[Arc<Pod>], why: Option<&str>) {
    let why_later = "no node fits; `netctl why` says why not";
    let mut changed = 0;
    for pod in pods {
        let message = message(pod, why.unwrap_or(why_later));
        let newer = why.is_some() && pod.message != message && changed < REASONS_CHANGED_MAX;
        if pod.message.is_empty() || newer {
            changed += 1;
            draft.put_pod(Pod { message, ..Pod::clone(pod) });
        }
    }
}

fn message(pod: &Pod, why: &str) -> String {
    match pod.node.as_ref().filter(|_| pod.phase == PodPhase::Lost) {
        Some(node) => format!("its node {node} does not report, and for another pod in its place {why}"),
        None => why.to_owned(),
    }
}
