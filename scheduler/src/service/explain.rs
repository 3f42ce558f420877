//! Why a pod is as it is, and what happened to it: the steps of its node and of the control plane, and events.

use std::{ops::ControlFlow, sync::Arc};

use hextet_api::v1;
use hextet_lifecycle::pod::{ASSIGNED, FOLDERS, LINK, PLACED, PUBLISHED, RUNNING};
use scheduler_core::{
    change::{Change, Key, Revision, Value},
    job::Availability,
    placement::why_not,
    pod::{Pod, PodId, PodPhase},
    state::State,
    time::Moment,
};
use tokio::{
    sync::{
        broadcast::{Receiver, error::RecvError},
        mpsc,
    },
    task,
};
use tonic::Status;

use super::status;
use crate::{
    happenings::{Moments, is_about},
    history::{self, Seen},
    hub::Hub,
    writer::WriteError,
};

/// Past events in one answer, when nothing is said and at most.
const EVENTS_MAX: u32 = 1_000;
/// Revisions that are read for them.
const READ_MAX: usize = 20_000;
/// Nodes whose reasons are told.
const REASONS_MAX: usize = 100;
/// Pods that an event names.
const PODS_MAX: usize = 100;
/// Events between the server and a reader.
const OUT_MAX: usize = 64;

/// Where a reader's events come out.
pub(super) type Events = tokio_stream::wrappers::ReceiverStream<Result<v1::ClusterEvent, Status>>;

pub(super) async fn explain(hub: &Arc<Hub>, id: String) -> Result<v1::ExplainPodResponse, Status> {
    let id = PodId(id);
    let pod = hub.state().pods().get(&id).cloned();
    let pod =
        pod.ok_or_else(|| Status::not_found(format!("there is no pod `{id}`; `netctl pods` lists them")))?;
    let mut answer =
        v1::ExplainPodResponse { pod: Some(crate::convert::pod(&pod)), ..v1::ExplainPodResponse::default() };
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
    let shown = smallest.into_iter().chain(each.take(REASONS_MAX));
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

/// Past events of a pod, or of all, the oldest first; then, if that is asked for, what comes.
pub(super) async fn watch(hub: &Arc<Hub>, request: v1::WatchEventsRequest) -> Result<Events, Status> {
    let (revisions, news) = (hub.revisions(), hub.happenings.follow());
    let last = hub.state().revision();
    let past = past(hub, &request, last).await?;
    let (out, events) = mpsc::channel(OUT_MAX);
    let (hub, pod) = (hub.clone(), request.pod);
    tokio::spawn(async move {
        for event in past {
            if out.send(Ok(event)).await.is_err() {
                return;
            }
        }
        if request.follow {
            follow(&hub, &pod, (last, revisions, news), &out).await;
        }
    });
    Ok(Events::new(events))
}

/// What comes after the revision `last`, until the reader or the server ends.
async fn follow(
    hub: &Hub,
    pod: &str,
    (last, mut revisions, mut news): (u64, Receiver<Arc<Revision>>, Receiver<v1::ClusterEvent>),
    out: &mpsc::Sender<Result<v1::ClusterEvent, Status>>,
) {
    loop {
        let event = tokio::select! {
            revision = revisions.recv() => match revision {
                Ok(revision) if revision.revision <= last => None,
                Ok(revision) => of_revision(&revision, pod),
                Err(RecvError::Lagged(lost)) => Some(behind(lost)),
                Err(RecvError::Closed) => return,
            },
            event = news.recv() => match event {
                Ok(event) => Some(event).filter(|event| is_about(event, pod)),
                Err(RecvError::Lagged(lost)) => Some(behind(lost)),
                Err(RecvError::Closed) => return,
            },
            () = out.closed() => return,
            () = hub.closed() => {
                // A reader that is behind finds out by the end of the stream.
                let _ = out.try_send(Err(Status::unavailable("the server is stopping")));
                return;
            }
        };
        if let Some(event) = event
            && out.send(Ok(event)).await.is_err()
        {
            return;
        }
    }
}

async fn past(
    hub: &Arc<Hub>,
    request: &v1::WatchEventsRequest,
    last: u64,
) -> Result<Vec<v1::ClusterEvent>, Status> {
    let limit = if request.limit == 0 { EVENTS_MAX } else { request.limit.min(EVENTS_MAX) } as usize;
    let mut events = hub.happenings.kept(&request.pod);
    let (store, pod, now) = (hub.store.clone(), request.pod.clone(), hub.clock.wall().0);
    let read = task::spawn_blocking(move || {
        let (mut found, mut read, mut in_gap) = (Vec::new(), 0, false);
        let about = (!pod.is_empty()).then(|| Key::Pod(PodId(pod.clone())));
        history::back(store.as_ref(), about.as_ref(), last + 1, |seen| {
            match seen {
                Seen::Revision(revision) => found.extend(of_revision(revision, &pod)),
                Seen::Unreadable(number) if !in_gap => {
                    let unix_ms = found.last().map_or(now, |newer: &v1::ClusterEvent| newer.unix_ms);
                    found.push(unreadable(number, unix_ms));
                }
                Seen::Unreadable(_) | Seen::Other => {}
            }
            in_gap = matches!(seen, Seen::Unreadable(_));
            read += 1;
            // With the revision that made it, there is no more to find of a pod.
            let made = found.last().is_some_and(|event| !pod.is_empty() && event.kind == MADE);
            let full = found.len() >= limit || read >= READ_MAX || made;
            if full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .map(|_| found)
    });
    let read = read.await.map_err(|_| Status::internal("the reader of the log failed"))?;
    events.extend(read.map_err(|error| status(WriteError::Store(Arc::new(error))))?);
    events.sort_by_key(|event| (event.unix_ms, event.revision));
    Ok(events.split_off(events.len().saturating_sub(limit)))
}

/// The kind of the revision that made a pod.
const MADE: &str = "pod-created";

/// Nobody knows what this revision did, nor those right before it that cannot be read either. It is shown with what came
/// after it.
fn unreadable(number: u64, unix_ms: u64) -> v1::ClusterEvent {
    v1::ClusterEvent {
        unix_ms,
        revision: number,
        kind: "unreadable".to_owned(),
        what: "revisions up to this one cannot be read: the store is damaged".to_owned(),
        ..Default::default()
    }
}

/// What a revision did to a pod, or to pods at all.
fn of_revision(revision: &Revision, pod: &str) -> Option<v1::ClusterEvent> {
    let about = |change: &&Change| match &change.key {
        Key::Pod(id) => pod.is_empty() || id.as_str() == pod,
        _ => false,
    };
    let changes: Vec<&Change> = revision.changes.iter().filter(about).collect();
    if changes.is_empty() && !pod.is_empty() {
        return None;
    }
    let words = match changes.as_slice() {
        [only] => pod_words(only),
        _ => String::new(),
    };
    let what =
        [revision.message.clone(), words].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>();
    let made = changes.len() == 1 && changes[0].old.is_none();
    let ids = changes.iter().take(PODS_MAX).map(|change| change.key.to_string());
    Some(v1::ClusterEvent {
        unix_ms: revision.time.0,
        by: revision.changer.clone(),
        kind: if made { MADE } else { "revision" }.to_owned(),
        pods: ids.filter_map(|key| key.strip_prefix("pod/").map(str::to_owned)).collect(),
        what: what.join(": "),
        revision: revision.revision,
    })
}

fn pod_words(change: &Change) -> String {
    let of = |value: &Option<Value>| match value {
        Some(Value::Pod(pod)) => Some(pod.clone()),
        _ => None,
    };
    let (old, new) = (of(&change.old), of(&change.new));
    let Some(new) = new else { return "its record is gone".to_owned() };
    let mut words = Vec::new();
    if old.as_ref().map(|old| old.phase) != Some(new.phase) {
        words.push(new.phase.to_string());
    }
    if old.as_ref().and_then(|old| old.node.clone()) != new.node {
        words.extend(new.node.as_ref().map(|node| format!("on node {node}")));
    }
    if new.stop && !old.as_ref().is_some_and(|old| old.stop) {
        words.push("load balancers know: it is stopped".to_owned());
    }
    if !new.message.is_empty() && old.as_ref().map(|old| &old.message) != Some(&new.message) {
        words.push(new.message.clone());
    }
    words.join(", ")
}

fn behind(lost: u64) -> v1::ClusterEvent {
    let what = format!("{lost} events were lost to this reader: it is behind");
    v1::ClusterEvent { kind: "lost".to_owned(), by: "server".to_owned(), what, ..v1::ClusterEvent::default() }
}
