//! What the log knows of a pod that is gone: when and why it ended, and what came instead.

use std::{ops::ControlFlow, sync::Arc};

use hextet_api::v1;
use scheduler_core::{
    change::{Change, Key, Revision, Value},
    ending::LastEnding,
    pod::{Pod, PodId, PodPhase},
    state::State,
    time::WallTime,
};
use tonic::Status;

use super::{in_thread, status};
use crate::{
    convert,
    history::{self, Ended, Seen},
    hub::Hub,
    store::StoreError,
    writer::WriteError,
};

/// Pods that are named in the place of one that is gone.
const INSTEAD_MAX: usize = 10;

/// What is found of a pod, from the newest revision back.
#[derive(Default)]
struct Found {
    gone: Option<Mark>,
    last: Option<Arc<Pod>>,
    ending: Option<Arc<LastEnding>>,
    stopped: Option<Mark>,
    /// A revision that might tell more cannot be read.
    unreadable: Option<u64>,
    /// The oldest revision that was read.
    oldest: Option<(u64, WallTime)>,
}

/// A revision, in short.
#[derive(Clone)]
struct Mark {
    revision: u64,
    time: WallTime,
    by: String,
    message: String,
}

/// How a pod that is not there came to its end.
///
/// # Errors
/// It never was, or the log does not reach back to it; the words say which.
pub(super) async fn explain(hub: &Arc<Hub>, id: PodId) -> Result<v1::ExplainPodResponse, Status> {
    let state = hub.state();
    if hub.store.damage().is_some_and(|damage| damage.may_hide(&Key::Pod(id.clone()))) {
        // It may be there, whatever the log says: what is not found is doubted.
        return Err(Status::not_found(format!("there is no pod `{id}`")));
    }
    if !is_named_like_a_pod(&state, &id) {
        return Err(Status::not_found(format!(
            "there never was a pod `{id}`: no job has pods of such a name; `netctl pods` lists them"
        )));
    }
    let (last, name) = (state.revision(), id.clone());
    let walk = move |hub: &Hub| {
        let mut found = Found::default();
        let ended = history::back(hub.store.as_ref(), Some(&Key::Pod(name.clone())), last + 1, |seen| {
            found.see(&name, seen)
        })?;
        Ok::<_, StoreError>((found, ended))
    };
    let failed = |error| status(WriteError::Store(Arc::new(error)));
    let (found, ended) = in_thread(hub, walk, failed).await?;
    match (&found.gone, &found.last) {
        (Some(gone), Some(pod)) => Ok(answer(&state, &found, gone, pod)),
        _ => Err(Status::not_found(found.nothing(&id, ended))),
    }
}

/// Names begin with that of a job, and the record of a job stays for ever.
fn is_named_like_a_pod(state: &State, id: &PodId) -> bool {
    let id = id.as_str();
    id.match_indices('-').any(|(at, _)| state.job_record(&id[..at]).is_some())
}

impl Found {
    fn see(&mut self, id: &PodId, seen: Seen<'_>) -> ControlFlow<()> {
        match seen {
            Seen::Revision(revision) => self.read(id, revision),
            Seen::Unreadable(number) => {
                self.unreadable = self.unreadable.or(Some(number));
                ControlFlow::Continue(())
            }
            Seen::Other => ControlFlow::Continue(()),
        }
    }

    fn read(&mut self, id: &PodId, revision: &Revision) -> ControlFlow<()> {
        self.oldest = Some((revision.revision, revision.time));
        let Some(change) = revision.changes.iter().find(|change| change.key == Key::Pod(id.clone())) else {
            return ControlFlow::Continue(());
        };
        if self.gone.is_none() && change.new.is_none() {
            self.gone = Some(Mark::new(revision));
            self.last = pod(&change.old).cloned();
            let ending = revision.changes.iter().find(|change| change.key == Key::Ending(id.clone()));
            self.ending = ending.and_then(|change| match &change.old {
                Some(Value::Ending(ending)) => Some(ending.clone()),
                _ => None,
            });
        }
        if was_stopped(change) {
            self.stopped = Some(Mark::new(revision));
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    /// Why nothing is known of the pod.
    fn nothing(&self, id: &PodId, ended: Ended) -> String {
        let oldest = match ended {
            Ended::AtTheBeginning(oldest) | Ended::Stopped(oldest) => oldest,
        };
        match self.unreadable {
            Some(number) => format!(
                "there is no pod `{id}`, and nobody knows whether there was: the store is damaged, and revision {number} \
                 cannot be read"
            ),
            None if oldest > 1 => format!(
                "there is no pod `{id}`, and the history, which begins with revision {oldest}, does not reach back to one: it \
                 ended before that, or never was; `netctl pods` lists those that are there"
            ),
            None => format!("there never was a pod `{id}`; `netctl pods` lists those that are there"),
        }
    }
}

impl Mark {
    fn new(revision: &Revision) -> Mark {
        let Revision { revision, time, changer, message, .. } = revision;
        Mark { revision: *revision, time: *time, by: changer.clone(), message: message.clone() }
    }
}

fn pod(value: &Option<Value>) -> Option<&Arc<Pod>> {
    match value {
        Some(Value::Pod(pod)) => Some(pod),
        _ => None,
    }
}

/// Whether this is the change by which a pod had to end: from then on it terminates, or is gone at once.
fn was_stopped(change: &Change) -> bool {
    let lives = |value: &Option<Value>| pod(value).is_some_and(|pod| pod.phase != PodPhase::Terminating);
    lives(&change.old) && !lives(&change.new)
}

fn answer(state: &State, found: &Found, gone: &Mark, pod: &Pod) -> v1::ExplainPodResponse {
    let (instead, instead_total) = instead(state, pod);
    let stopped = found.stopped.as_ref();
    let message = v1::GonePod {
        revision: gone.revision,
        unix_ms: gone.time.0,
        stopped_revision: stopped.map_or(0, |mark| mark.revision),
        stopped_unix_ms: stopped.map_or(0, |mark| mark.time.0),
        by: stopped.map(|mark| mark.by.clone()).unwrap_or_default(),
        message: stopped.map(|mark| mark.message.clone()).unwrap_or_default(),
        why: if pod.phase == PodPhase::Terminating { pod.message.clone() } else { String::new() },
        otherwise: if instead.is_empty() { why_none(state, pod) } else { String::new() },
        instead,
        instead_total,
    };
    v1::ExplainPodResponse {
        pod: Some(convert::pod(pod)),
        gone: Some(message),
        ending: found.ending.as_deref().map(convert::ending),
        ..v1::ExplainPodResponse::default()
    }
}

/// The pods of its group that were made after it, the first ones, and how many there are.
fn instead(state: &State, pod: &Pod) -> (Vec<v1::Pod>, u32) {
    let group = state.pods_of_group(&pod.job, &pod.group);
    let mut later: Vec<&Arc<Pod>> =
        group.filter(|other| other.serial > pod.serial && other.is_wanted()).collect();
    later.sort_by_key(|pod| pod.serial);
    let total = u32::try_from(later.len()).unwrap_or(u32::MAX);
    (later.into_iter().take(INSTEAD_MAX).map(|pod| convert::pod(pod)).collect(), total)
}

fn why_none(state: &State, pod: &Pod) -> String {
    let Pod { job, group, .. } = pod;
    let Some(text) = state.job(job) else { return format!("job {job} is deleted") };
    match text.group(group) {
        None => format!("job {job} has no group {group} any more"),
        Some(text) => format!("{job}/{group} wants {} pods, and was given none since", text.count),
    }
}
