//! Why a pod is as it is: the steps of its node and of the control plane.

use std::sync::Arc;

use hextet_api::v1;
use hextet_lifecycle::pod::{ASSIGNED, FOLDERS, LINK, PLACED, PUBLISHED, RUNNING};
use scheduler_core::{
    job::Availability,
    placement::why_not,
    pod::{Pod, PodId, PodPhase},
    state::State,
    time::Moment,
};
use tonic::Status;

use super::gone;
use crate::{convert, happenings::Moments, hub::Hub};

/// Nodes whose reasons are told.
const REASONS_MAX: usize = 100;

pub(super) async fn explain(hub: &Arc<Hub>, id: String) -> Result<v1::ExplainPodResponse, Status> {
    let id = PodId(id);
    let state = hub.state();
    let Some(pod) = state.pods().get(&id).cloned() else { return gone::explain(hub, id).await };
    let mut answer = v1::ExplainPodResponse {
        pod: Some(convert::pod(&pod)),
        ending: state.ending(&id).map(|ending| convert::ending(ending)),
        ..v1::ExplainPodResponse::default()
    };
    let (mut of_node, mut told) = (Vec::new(), false);
    match &pod.node {
        None => answer.reasons = reasons(hub, &pod),
        Some(node) => match hub.questions.ask(&hub.sessions, node, id.as_str(), false).await {
            Ok(described) => (of_node, told) = (described.steps, true),
            Err(why) => answer.node_error = why,
        },
    }
    for step in of_node.iter_mut().filter(|step| [LINK, FOLDERS].contains(&step.name.as_str())) {
        step.follows.push(ASSIGNED.to_owned());
    }
    let own = own_steps(&pod, told, hub.happenings.moments(&id), hub.clock.now());
    answer.steps = own.into_iter().chain(of_node).collect();
    Ok(answer)
}

/// Has the pod's node try again what of it has failed.
pub(super) async fn retry(hub: &Arc<Hub>, id: String) -> Result<v1::RetryPodResponse, Status> {
    let id = PodId(id);
    let pod = hub.state().pods().get(&id).cloned();
    let pod =
        pod.ok_or_else(|| Status::not_found(format!("there is no pod `{id}`; `netctl pods` lists them")))?;
    let nowhere = || Status::failed_precondition(format!("{id} runs nowhere: {}", pod.message));
    let node = pod.node.as_deref().ok_or_else(nowhere)?;
    let answer = hub.questions.ask(&hub.sessions, node, id.as_str(), true).await;
    let answer = answer.map_err(Status::unavailable)?;
    let is_left = |step: &v1::StepStatus| step.phase == "failed" && !step.follows.is_empty();
    if answer.retried.is_empty() && answer.steps.iter().any(is_left) {
        return Err(Status::failed_precondition(format!(
            "the agent of node {node} cannot do that yet: upgrade it"
        )));
    }
    Ok(v1::RetryPodResponse { steps: answer.retried })
}

/// Why no node takes the pod, node by node, the smallest change first.
fn reasons(hub: &Hub, pod: &Pod) -> Vec<String> {
    if let Some(wait) = hub.restore_wait().filter(|_| is_singleton(&hub.state(), pod)) {
        let seconds = wait.as_secs_f32();
        return vec![format!(
            "the last lease from before the restore is over in {seconds:.1} s at the latest"
        )];
    }
    let explanation = why_not(&hub.state(), pod, hub.clock.wall());
    let smallest = explanation.smallest_change().map(|change| format!("the smallest change is to {change}"));
    let verdicts = explanation.nodes.iter();
    let each = verdicts
        .map(|verdict| format!("{}: {}; would fit: {}", verdict.node, verdict.reason, verdict.change()));
    let no_such = explanation.no_such_node();
    let shown = no_such.into_iter().chain(smallest).chain(each.take(REASONS_MAX));
    let rest = explanation.nodes.len().saturating_sub(REASONS_MAX);
    shown.chain((rest > 0).then(|| format!("and {rest} more nodes"))).collect()
}

fn is_singleton(state: &State, pod: &Pod) -> bool {
    let group = state.job(&pod.job).and_then(|job| job.group(&pod.group));
    group.is_some_and(|group| group.availability() == Availability::Singleton)
}

/// The steps of the control plane.
fn own_steps(pod: &Pod, told: bool, moments: Moments, now: Moment) -> Vec<v1::StepStatus> {
    let placed = match &pod.node {
        Some(_) => done(PLACED, moments.created, moments.placed, now),
        None => step(PLACED, "waiting", Some(pod.message.clone())),
    };
    let assigned = match (&pod.node, told) {
        (Some(_), true) => step(ASSIGNED, "done", None),
        (Some(_), false) => step(ASSIGNED, "running", None),
        (None, _) => step(ASSIGNED, "waiting", None),
    };
    let published = match pod.phase {
        PodPhase::Running if pod.standby => {
            step(PUBLISHED, "waiting", Some("it stands by until the rollout switches to it".to_owned()))
        }
        PodPhase::Running => done(PUBLISHED, moments.running, moments.running, now),
        PodPhase::Terminating if pod.stop => {
            done_as(PUBLISHED, "gone", moments.terminating, moments.stopped, now)
        }
        PodPhase::Terminating => step(PUBLISHED, "stopping", None),
        _ => step(PUBLISHED, "waiting", None),
    };
    let follows =
        |step: v1::StepStatus, name: &str| v1::StepStatus { follows: vec![name.to_owned()], ..step };
    vec![placed, follows(assigned, PLACED), follows(published, RUNNING)]
}

fn step(name: &str, phase: &str, error: Option<String>) -> v1::StepStatus {
    v1::StepStatus {
        name: name.to_owned(),
        owner: "server".to_owned(),
        phase: phase.to_owned(),
        error: error.filter(|error| !error.is_empty()),
        ..v1::StepStatus::default()
    }
}

fn done(name: &str, began: Option<Moment>, ended: Option<Moment>, now: Moment) -> v1::StepStatus {
    done_as(name, "done", began, ended, now)
}

fn done_as(
    name: &str,
    phase: &str,
    began: Option<Moment>,
    ended: Option<Moment>,
    now: Moment,
) -> v1::StepStatus {
    let ms = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    v1::StepStatus {
        took_ms: began.zip(ended).map(|(began, ended)| ms(ended - began)),
        ended_ms_ago: ended.map(|ended| ms(now - ended)),
        ..step(name, phase, None)
    }
}
