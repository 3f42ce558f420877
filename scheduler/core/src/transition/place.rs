//! Gives pods without a place a node and an address, or the reason why they have none.
//!
//! A pod that is lost with its node and whose group is `ha` gives way to a new pod once that has a place
//! elsewhere, and not before: when no other node can take it, it is still there if its node returns.

use std::collections::BTreeMap;

use crate::{
    draft::Draft,
    job::{Availability, Group},
    placement::{self, Candidate, Demand},
    pod::{Pod, PodPhase},
    transition::{Context, address, group},
};

/// How many pods of a group get a new reason in one revision; the others keep an older one for now.
const REASONS_CHANGED_MAX: usize = 256;

pub(super) fn place_all(draft: &mut Draft<'_>, context: &mut Context<'_>) {
    for (job, name) in draft.unplaced_groups() {
        let Some(text) = draft.job(&job).cloned() else { continue };
        if let Some(group) = text.groups.get(&name) {
            place_group(draft, &job, &name, group, context);
        }
    }
}

fn place_group(draft: &mut Draft<'_>, job: &str, name: &str, group: &Group, context: &mut Context<'_>) {
    let replaceable = |pod: &Pod| match pod.phase {
        PodPhase::Lost => group.availability() == Availability::Ha,
        _ => pod.phase == PodPhase::Pending,
    };
    let unplaced = draft.unplaced_of_group(job, name).filter(|pod| replaceable(pod));
    let unplaced: Vec<Pod> = unplaced.map(|pod| Pod::clone(pod)).collect();
    if unplaced.is_empty() {
        return;
    }
    let answer = placement::place(&demand(draft, group, unplaced.len()), candidates(draft, job, name));
    let (placed, left) = unplaced.split_at(answer.nodes.len());
    for (pod, node) in placed.iter().zip(&answer.nodes) {
        let pod = if pod.phase == PodPhase::Lost { replace(draft, pod, group, context) } else { pod.clone() };
        settle(draft, pod, node, context);
    }
    explain(draft, left, &answer.explain());
}

fn demand<'a>(draft: &Draft<'_>, group: &'a Group, count: usize) -> Demand<'a> {
    let pods_per_node_max = draft.cluster().map_or(u32::MAX, |cluster| cluster.pods_per_node_max());
    Demand {
        resources: group.resources(),
        constraints: &group.constraints,
        spread: group.spread,
        count,
        pods_per_node_max,
    }
}

fn candidates<'a>(draft: &'a Draft<'_>, job: &str, group: &str) -> Vec<Candidate<'a>> {
    let mut per_node: BTreeMap<&str, u32> = BTreeMap::new();
    for pod in draft.pods_of_group(job, group).filter(|pod| pod.is_wanted()) {
        if let Some(node) = &pod.node {
            *per_node.entry(node).or_default() += 1;
        }
    }
    let candidate = |node: &'a std::sync::Arc<crate::node::Node>| Candidate {
        node,
        usage: draft.usage(&node.name),
        group_pods: per_node.get(node.name.as_str()).copied().unwrap_or(0),
    };
    draft.nodes().values().map(candidate).collect()
}

/// A new pod in the place of one that is lost with its node.
fn replace(draft: &mut Draft<'_>, lost: &Pod, wanted: &Group, context: &mut Context<'_>) -> Pod {
    group::forget(draft, lost);
    group::create(draft, &lost.job, &lost.group, wanted, context)
}

fn settle(draft: &mut Draft<'_>, pod: Pod, node: &str, context: &mut Context<'_>) {
    let Some(address) = address::draw(draft, node, context) else { return };
    let (node, address) = (Some(node.to_owned()), Some(address));
    let message = "waits for its node to start it".to_owned();
    draft.put_pod(Pod { node, address, phase: PodPhase::Starting, message, ..pod });
}

fn explain(draft: &mut Draft<'_>, pods: &[Pod], why: &str) {
    let mut changed = 0;
    for pod in pods {
        let lost = pod.node.as_ref().filter(|_| pod.phase == PodPhase::Lost);
        let message = match lost {
            Some(node) => format!("its node {node} does not report, and for another pod in its place {why}"),
            None => why.to_owned(),
        };
        if pod.message.is_empty() || (pod.message != message && changed < REASONS_CHANGED_MAX) {
            changed += 1;
            draft.put_pod(Pod { message, ..pod.clone() });
        }
    }
}
