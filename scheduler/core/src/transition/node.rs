//! Nodes attach, report, are lost, return and are deleted.

use std::{collections::BTreeSet, net::Ipv6Addr, sync::Arc};

use crate::{
    change::{Key, Value},
    draft::Draft,
    ending,
    event::{PodReport, Refusal},
    failure::Failures,
    node::{Hello, LEFT_MAX, Node, NodePhase},
    pod::{MESSAGE_LEN_MAX, Pod, PodPhase},
    transition::{Context, Step, group, renew},
};

pub(super) fn hello(
    draft: &mut Draft<'_>,
    name: &str,
    hello: &Hello,
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    hello.validate()?;
    let node = find(draft, name)?;
    if node.is_over(&hello.machine, hello.session) {
        return Err(Refusal::TakenDown(name.to_owned()));
    }
    check_underlay(draft, name, hello.underlay)?;
    let greeted = node.greeted(hello);
    if *node == greeted {
        return Ok(Step::nothing());
    }
    draft.put_node(greeted.clone());
    pods_return(draft, name);
    reconcile_groups(draft, groups_on(draft, name), context);
    Ok(Step { message: format!("node {name} attached"), replan: true })
}

/// Of two nodes with one address neither could be told where the other's packets go. That of a node that is lost
/// may have been given to another machine.
fn check_underlay(draft: &Draft<'_>, name: &str, address: Ipv6Addr) -> Result<(), Refusal> {
    let has_it = |node: &&Arc<Node>| node.name != name && node.underlay == Some(address);
    let mut others = draft.nodes().values().filter(has_it);
    match others.find(|node| node.phase.has_pods()) {
        Some(other) => Err(Refusal::UnderlayTaken { address, node: other.name.clone() }),
        None => Ok(()),
    }
}

pub(super) fn returned(
    draft: &mut Draft<'_>,
    name: &str,
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    let node = find(draft, name)?;
    if node.phase.reports() || node.taken_down.is_some() {
        return Ok(Step::nothing());
    }
    draft.put_node(node.returned());
    pods_return(draft, name);
    reconcile_groups(draft, groups_on(draft, name), context);
    Ok(Step { message: format!("node {name} returned"), replan: true })
}

/// Pods that were lost with the node and not replaced are its own again. What changed for them meanwhile, and
/// could not be decided without it, is decided next: the texts of their jobs, its labels, its capacity.
fn pods_return(draft: &mut Draft<'_>, name: &str) {
    for pod in pods_on(draft, name) {
        if pod.phase == PodPhase::Lost {
            let message = "its node is back".to_owned();
            draft.put_pod(Pod { phase: PodPhase::Starting, message, ..pod });
        }
    }
}

pub(super) fn reports(
    draft: &mut Draft<'_>,
    name: &str,
    reports: &[PodReport],
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    // A report is as good a sign of life as a heartbeat.
    let mut replan = returned(draft, name, context)?.replan;
    let mut changed = BTreeSet::new();
    for report in reports {
        let Some(pod) = draft.pods().get(&report.id).map(|pod| Pod::clone(pod)) else { continue };
        if pod.node.as_deref() == Some(name) {
            let (before, group) = (pod.phase, (pod.job.clone(), pod.group.clone()));
            replan |= take_report(draft, pod, report, context);
            if draft.pods().get(&report.id).is_none_or(|pod| pod.phase != before) {
                changed.insert(group);
            }
        }
    }
    replan |= go_on_with_rollouts(draft, changed, context);
    Ok(Step { message: format!("node {name} reported"), replan })
}

/// A rollout goes on when one of its pods runs, and stops what it no longer needs. Says whether there was one.
fn go_on_with_rollouts(
    draft: &mut Draft<'_>,
    mut changed: BTreeSet<(String, String)>,
    context: &mut Context<'_>,
) -> bool {
    changed.retain(|(job, group)| {
        let text = draft.job(job).and_then(|job| job.group(group));
        text.is_some_and(|text| text.rollout.is_some())
    });
    let any = !changed.is_empty();
    reconcile_groups(draft, changed, context);
    any
}

/// Says whether room has become free.
fn take_report(draft: &mut Draft<'_>, pod: Pod, report: &PodReport, context: &Context<'_>) -> bool {
    if pod.phase == PodPhase::Terminating {
        if report.gone {
            group::forget(draft, &pod);
        }
        return report.gone;
    }
    let version = report.version.unwrap_or(pod.job_version);
    if let Some(said) = &report.ending {
        ending::keep(draft, (&pod, version), said, context.wall);
    }
    let known = matches!(report.phase, PodPhase::Starting | PodPhase::Running | PodPhase::Failed);
    if version == pod.job_version && known && !report.gone {
        if report.phase == PodPhase::Failed && pod.phase != PodPhase::Failed {
            note_failure(draft, &pod, context);
        }
        let message = cut(&report.message);
        draft.put_pod(Pod { phase: report.phase, message, restarts: report.restarts, ..pod });
    }
    false
}

/// For the next choice of a node for its group.
fn note_failure(draft: &mut Draft<'_>, pod: &Pod, context: &Context<'_>) {
    let Some(node) = pod.node.as_deref().filter(|_| draft.job(&pod.job).is_some()) else { return };
    let mut failures =
        draft.failures(&pod.job, &pod.group).map_or_else(Failures::default, |all| Failures::clone(all));
    failures.note(node, context.wall);
    let key = Key::Failures(format!("{}/{}", pod.job, pod.group));
    draft.put(key, Some(Value::Failures(Arc::new(failures))));
}

fn cut(message: &str) -> String {
    message[..message.floor_char_boundary(MESSAGE_LEN_MAX)].to_owned()
}

/// The node is lost and its pods with it. Those of `ha` groups get their replacements in the placement that
/// follows; those that were being stopped are as good as gone.
pub(super) fn lease_ended(draft: &mut Draft<'_>, names: &[String]) -> Step {
    let mut lost = Vec::new();
    for name in names {
        let Some(node) = draft.nodes().get(name).filter(|node| node.phase.has_pods()).cloned() else {
            continue;
        };
        lose_node(draft, &node, NodePhase::Lost);
        lost.push(name.as_str());
    }
    let replan = !lost.is_empty();
    Step { message: format!("lease of {} ended", lost.join(", ")), replan }
}

fn lose_node(draft: &mut Draft<'_>, node: &Node, phase: NodePhase) {
    let pods = pods_on(draft, &node.name);
    let left = pods.iter().filter_map(|pod| pod.address).take(LEFT_MAX).collect();
    draft.put_node(Node { phase, left, ..node.clone() });
    pods.into_iter().for_each(|pod| lose(draft, pod, &node.name));
}

/// The same, by the node's own word and at once: what only one node may run has ended there. What was said in this session
/// or before and comes later brings the node back no more.
pub(super) fn leaving(draft: &mut Draft<'_>, name: &str, session: u64) -> Step {
    let names = [name.to_owned()];
    let step = lease_ended(draft, &names);
    fenced(draft, &names);
    if let Some(node) = draft.nodes().get(name).filter(|node| node.phase != NodePhase::Joined).cloned() {
        let taken_down = node.taken_down.max(Some(session));
        draft.put_node(Node { taken_down, ..Node::clone(&node) });
    }
    Step { message: format!("node {name} was taken down"), ..step }
}

/// The nodes get no new pods, and those that they have go on: nobody says that they are dead.
pub(super) fn cut_off(draft: &mut Draft<'_>, names: &[String]) -> Step {
    let mut cut = Vec::new();
    for name in names {
        let Some(node) = draft.nodes().get(name).filter(|node| node.phase == NodePhase::Ready).cloned()
        else {
            continue;
        };
        draft.put_node(Node { phase: NodePhase::CutOff, ..Node::clone(&node) });
        cut.push(name.as_str());
    }
    Step {
        message: format!("{} cut off: no report comes, and nobody says dead", cut.join(", ")),
        replan: false,
    }
}

/// What only one node may run has ended on these: another may.
pub(super) fn fenced(draft: &mut Draft<'_>, names: &[String]) -> Step {
    let mut done = Vec::new();
    for name in names {
        let is_silent = |node: &&Arc<Node>| node.phase.is_gone() || node.phase == NodePhase::CutOff;
        let Some(node) = draft.nodes().get(name).filter(is_silent).filter(|node| !node.fenced).cloned()
        else {
            continue;
        };
        fence(draft, &node);
        done.push(name.as_str());
    }
    let replan = !done.is_empty();
    Step { message: format!("what {} alone could run has ended there", done.join(", ")), replan }
}

fn fence(draft: &mut Draft<'_>, node: &Node) {
    let mut pods = pods_on(draft, &node.name);
    pods.retain(|pod| group::is_singleton(draft, pod));
    draft.put_node(Node { fenced: true, term: node.term + 1, ..node.clone() });
    pods.into_iter().for_each(|pod| lose_singleton(draft, pod, &node.name));
}

fn lose_singleton(draft: &mut Draft<'_>, pod: Pod, node: &str) {
    if pod.phase == PodPhase::Terminating {
        return group::forget(draft, &pod);
    }
    let message = format!("its node {node} does not report, and has ended it");
    draft.put_pod(Pod { phase: PodPhase::Lost, message, ..pod });
}

/// An operator says that a node is dead: also pods that wait for it are replaced.
pub(super) fn dead(draft: &mut Draft<'_>, name: &str) -> Result<Step, Refusal> {
    let node = find(draft, name)?;
    match node.phase {
        NodePhase::Ready => return Err(Refusal::NodeReports(name.to_owned())),
        NodePhase::Dead => return Ok(Step::nothing()),
        NodePhase::CutOff => lose_node(draft, &node, NodePhase::Dead),
        NodePhase::Joined | NodePhase::Lost => {
            draft.put_node(Node { phase: NodePhase::Dead, ..Node::clone(&node) });
        }
    }
    Ok(Step { message: format!("node {name} declared dead"), replan: true })
}

fn lose(draft: &mut Draft<'_>, pod: Pod, node: &str) {
    if pod.phase == PodPhase::Terminating {
        if !group::may_live(draft, &pod) {
            group::forget(draft, &pod);
        }
        return;
    }
    let then = match group::is_singleton(draft, &pod) {
        true => "another takes its place once it has surely ended",
        false => "it waits for it",
    };
    let message = format!("its node {node} does not report; {then}");
    draft.put_pod(Pod { phase: PodPhase::Lost, message, ..pod });
}

pub(super) fn delete(draft: &mut Draft<'_>, name: &str, context: &mut Context<'_>) -> Result<Step, Refusal> {
    let node = find(draft, name)?;
    match node.phase {
        NodePhase::Ready => return Err(Refusal::NodeReports(name.to_owned())),
        NodePhase::CutOff => return Err(Refusal::NodeCutOff(name.to_owned())),
        NodePhase::Joined | NodePhase::Lost | NodePhase::Dead => {}
    }
    if draft.pods_on(name).any(|pod| group::may_live(draft, pod)) {
        return Err(Refusal::NotFenced(name.to_owned()));
    }
    let groups = groups_on(draft, name);
    pods_on(draft, name).iter().for_each(|pod| group::forget(draft, pod));
    draft.put(Key::Node(name.to_owned()), None);
    renew::delete(draft, &node, context.wall);
    reconcile_groups(draft, groups, context);
    Ok(Step { message: format!("node {name} deleted"), replan: true })
}

pub(super) fn reconcile_groups(
    draft: &mut Draft<'_>,
    groups: BTreeSet<(String, String)>,
    context: &mut Context<'_>,
) {
    for (job, name) in groups {
        let Some(text) = draft.job(&job).cloned() else { continue };
        group::reconcile(draft, &job, &name, text.group(&name), context);
    }
}

fn find(draft: &Draft<'_>, name: &str) -> Result<Arc<Node>, Refusal> {
    draft.nodes().get(name).cloned().ok_or_else(|| Refusal::NoNode(name.to_owned()))
}

fn groups_on(draft: &Draft<'_>, name: &str) -> BTreeSet<(String, String)> {
    draft.pods_on(name).map(|pod| (pod.job.clone(), pod.group.clone())).collect()
}

fn pods_on(draft: &Draft<'_>, name: &str) -> Vec<Pod> {
    draft.pods_on(name).map(|pod| Pod::clone(pod)).collect()
}
