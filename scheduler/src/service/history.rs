//! What was changed, and the way back: the calls of `history.proto`.
//!
//! The log is read past the writer, in a thread that may block. What a call may read and answer is bounded; a
//! client goes on where it ended.

use std::{ops::ControlFlow, sync::Arc};

use hextet_api::v1;
use scheduler_core::{
    change::{Key, Revision},
    event::{Event, Texts},
    history::{self as core, Fate, FieldChange, Filter, Net, ObjectChange},
    job::Job,
    time::WallTime,
    transition::Origin,
};
use tokio::task;
use tonic::Status;

use super::status;
use crate::{
    compaction, convert,
    history::{self, Ended, Seen, Version, VersionError},
    hub::Hub,
    store::StoreError,
    writer::chain,
};

/// Revisions in a page, when nothing is said and at most.
const PAGE_LEN: u32 = 100;
const PAGE_LEN_MAX: u32 = 1000;
/// Revisions that are read for one page.
const READ_MAX: usize = 20_000;
/// Revisions that are read for one diff.
const DIFF_READ_MAX: usize = 200_000;
/// Objects that one diff tells.
const DIFF_OBJECTS_MAX: usize = 10_000;
/// Objects that are touched on the way, some of which came and went.
const DIFF_TOUCHED_MAX: usize = 30_000;
/// Objects of one revision.
const OBJECTS_MAX: usize = 50;
/// Fields of one object.
const FIELDS_MAX: usize = 200;
/// Bytes of one field.
const FIELD_LEN_MAX: usize = 1024;
/// Patterns of one filter, and bytes of each.
const PATTERNS_MAX: usize = 16;
const PATTERN_LEN_MAX: usize = 128;

pub(super) async fn list(
    hub: &Arc<Hub>,
    request: v1::ListRevisionsRequest,
) -> Result<v1::ListRevisionsResponse, Status> {
    let key = Some(&request.key).filter(|key| !key.is_empty());
    let key = key.map(|key| key.parse::<Key>()).transpose();
    let key = key.map_err(|error| Status::invalid_argument(format!("key: {error}")))?;
    let filter = filter(request.changers)?;
    let limit = if request.limit == 0 { PAGE_LEN } else { request.limit.min(PAGE_LEN_MAX) } as usize;
    let before = if request.before == 0 { u64::MAX } else { request.before };
    let before = before.min(hub.state().revision() + 1);
    let since = WallTime(request.since_unix_ms);
    read(hub, move |hub| {
        let (mut revisions, mut read) = (Vec::new(), 0);
        let mut past = false;
        let ended = history::back(hub.store.as_ref(), key.as_ref(), before, |seen| {
            match seen {
                Seen::Revision(revision) => {
                    past = revision.time < since;
                    if past {
                        return ControlFlow::Break(());
                    }
                    if filter.selects(&revision.changer) {
                        revisions.extend(revision_message(revision, key.as_ref()));
                    }
                }
                Seen::Other => {}
                Seen::Unreadable(number) => return push_unreadable(&mut revisions, number),
            }
            read += 1;
            let full = revisions.len() >= limit || read >= READ_MAX;
            if full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let next_before = match ended {
            Ended::Stopped(at) if !past => at,
            _ => 0,
        };
        Ok(v1::ListRevisionsResponse { revisions, next_before, oldest: hub.store.oldest()? })
    })
    .await
}

pub(super) async fn diff(
    hub: &Arc<Hub>,
    request: v1::DiffRevisionsRequest,
) -> Result<v1::DiffRevisionsResponse, Status> {
    let filter = filter(request.changers)?;
    let (since, after) = (WallTime(request.since_unix_ms), request.since_revision);
    let last_revision = hub.state().revision();
    read(hub, move |hub| {
        let (mut net, mut selected, mut read, mut first_revision) = (Net::default(), 0, 0, last_revision + 1);
        let (mut past, mut unreadable, mut too_many) = (false, 0, false);
        let ended = history::back(hub.store.as_ref(), None, last_revision + 1, |seen| {
            let revision = match seen {
                Seen::Revision(revision) => revision,
                Seen::Other => return ControlFlow::Continue(()),
                Seen::Unreadable(number) if number > after => {
                    unreadable += 1;
                    return ControlFlow::Continue(());
                }
                Seen::Unreadable(_) => return ControlFlow::Break(()),
            };
            past = revision.time < since || revision.revision <= after;
            too_many = !past && (read >= DIFF_READ_MAX || net.len() >= DIFF_TOUCHED_MAX);
            if past || too_many {
                return ControlFlow::Break(());
            }
            (read, first_revision) = (read + 1, revision.revision);
            if filter.selects(&revision.changer) {
                selected += 1;
                net.add_older(revision);
            }
            ControlFlow::Continue(())
        })?;
        // The first revision of all has nothing before it.
        let complete = unreadable == 0 && (past || ended == Ended::AtTheBeginning(1));
        let objects: Vec<_> = net.finish().into_iter().map(object_message).collect();
        if too_many || objects.len() > DIFF_OBJECTS_MAX {
            return Ok(Err(too_much(first_revision, last_revision)));
        }
        Ok(Ok(v1::DiffRevisionsResponse {
            objects,
            first_revision,
            last_revision,
            selected,
            complete,
            unreadable,
        }))
    })
    .await?
}

/// Half of an answer would be another answer: what came and went would be told as gone.
fn too_much(first: u64, last: u64) -> Status {
    Status::resource_exhausted(format!(
        "more has changed than one answer holds ({DIFF_OBJECTS_MAX} objects that differ, {DIFF_TOUCHED_MAX} that were \
         touched, {DIFF_READ_MAX} revisions): revisions {first} to {last} were looked at; ask for a shorter time, or \
         leave changers out with --not-by"
    ))
}

pub(super) async fn version(
    hub: &Arc<Hub>,
    request: v1::GetJobVersionRequest,
) -> Result<v1::GetJobVersionResponse, Status> {
    let version = find(hub, request.name, request.version).await?;
    let job = Some(convert::job_to_message(&version.job));
    Ok(v1::GetJobVersionResponse { job, version: Some(version_message(&version)) })
}

pub(super) async fn rollback(
    hub: &Arc<Hub>,
    origin: Origin,
    request: v1::RollbackJobRequest,
) -> Result<v1::RollbackJobResponse, Status> {
    if request.to == 0 {
        return Err(Status::invalid_argument("to: say which version is meant"));
    }
    // The text of a version never changes: what is found is right also when others write meanwhile.
    let Version { job, number, .. } = find(hub, request.name.clone(), request.to).await?;
    let texts = texts(hub, &job).await?;
    let event = Event::RollbackJob(Arc::unwrap_or_clone(job), number, texts);
    let committed = hub.write(origin, event).await.map_err(status)?;
    // It always makes one.
    let version = committed.version_of(&request.name).unwrap_or_default();
    Ok(v1::RollbackJobResponse { revision: committed.revision, version })
}

/// Gives how many revisions were forgotten.
pub(super) async fn compact(hub: &Arc<Hub>, request: v1::CompactHistoryRequest) -> Result<u64, Status> {
    let removed = match (request.keep_revisions, request.since_unix_ms) {
        (0, 0) => compaction::to_size(hub).await,
        (0, since) => compaction::before(hub, first_since(hub, WallTime(since)).await?).await,
        (kept, _) => compaction::before(hub, (hub.state().revision() + 1).saturating_sub(kept)).await,
    };
    removed.map_err(status)
}

/// The first revision after the last one that is older.
async fn first_since(hub: &Arc<Hub>, since: WallTime) -> Result<u64, Status> {
    let end = hub.state().revision() + 1;
    let older = move |seen: Seen<'_>| match seen {
        Seen::Revision(revision) if revision.time < since => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let ended = read(hub, move |hub| history::back(hub.store.as_ref(), None, end, older)).await?;
    Ok(match ended {
        Ended::Stopped(older) => older + 1,
        Ended::AtTheBeginning(oldest) => oldest,
    })
}

async fn find(hub: &Arc<Hub>, name: String, number: u32) -> Result<Version, Status> {
    let hub = hub.clone();
    let found =
        task::spawn_blocking(move || history::version(hub.store.as_ref(), &hub.state(), &name, number)).await;
    found.map_err(|error| Status::internal(error.to_string()))?.map_err(no_version)
}

/// The texts of older versions that the rollouts of `job` name.
pub(super) async fn texts(hub: &Arc<Hub>, job: &Job) -> Result<Texts, Status> {
    if job.versions_named().next().is_none() {
        return Ok(Texts::new());
    }
    let (hub, job) = (hub.clone(), job.clone());
    let found = task::spawn_blocking(move || history::texts(hub.store.as_ref(), &hub.state(), &job)).await;
    found.map_err(|error| Status::internal(error.to_string()))?.map_err(no_version)
}

pub(super) fn no_version(error: VersionError) -> Status {
    match error {
        VersionError::Store(error) => Status::unavailable(chain(&error)),
        error @ VersionError::Unreadable { .. } => Status::data_loss(error.to_string()),
        other => Status::not_found(other.to_string()),
    }
}

async fn read<T: Send + 'static>(
    hub: &Arc<Hub>,
    with: impl FnOnce(&Hub) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    let hub = hub.clone();
    let read = task::spawn_blocking(move || with(&hub)).await;
    let read = read.map_err(|error| Status::internal(error.to_string()))?;
    read.map_err(|error| Status::unavailable(chain(&error)))
}

fn filter(message: Option<v1::ChangerFilter>) -> Result<Filter, Status> {
    let v1::ChangerFilter { by, not_by } = message.unwrap_or_default();
    let patterns = || by.iter().chain(&not_by);
    if patterns().count() > PATTERNS_MAX || patterns().any(|pattern| pattern.len() > PATTERN_LEN_MAX) {
        let text = format!("changers: at most {PATTERNS_MAX} patterns of {PATTERN_LEN_MAX} bytes");
        return Err(Status::invalid_argument(text));
    }
    Ok(Filter { by, not_by })
}

/// Revisions that follow each other and cannot be read are one line.
fn push_unreadable(revisions: &mut Vec<v1::Revision>, number: u64) -> ControlFlow<()> {
    match revisions.last_mut() {
        Some(last) if last.unreadable_from == number + 1 => last.unreadable_from = number,
        _ => revisions.push(v1::Revision {
            revision: number,
            unreadable_from: number,
            message: "it cannot be read: the store is damaged".to_owned(),
            ..Default::default()
        }),
    }
    ControlFlow::Continue(())
}

/// `None` when it changes nothing that is asked for or that people see.
fn revision_message(revision: &Revision, key: Option<&Key>) -> Option<v1::Revision> {
    let asked = revision.changes.iter().filter(|change| key.is_none_or(|key| change.key == *key));
    let mut objects: Vec<ObjectChange> = asked.filter_map(core::object_change).collect();
    let objects_total = u32::try_from(objects.len()).unwrap_or(u32::MAX);
    objects.truncate(OBJECTS_MAX);
    (objects_total > 0).then(|| v1::Revision {
        revision: revision.revision,
        time_unix_ms: revision.time.0,
        changer: revision.changer.clone(),
        external: core::is_external(&revision.changer),
        message: revision.message.clone(),
        objects: objects.into_iter().map(object_message).collect(),
        objects_total,
        unreadable_from: 0,
    })
}

fn object_message(object: ObjectChange) -> v1::ObjectChange {
    let fate = match object.fate {
        Fate::Created => v1::ObjectFate::Created,
        Fate::Changed => v1::ObjectFate::Changed,
        Fate::Removed => v1::ObjectFate::Removed,
    };
    let (version, equals) = object.version.unwrap_or_default();
    v1::ObjectChange {
        key: object.key.to_string(),
        fate: fate.into(),
        fields: object.fields.into_iter().take(FIELDS_MAX).map(field_message).collect(),
        version,
        equals: equals.unwrap_or_default(),
    }
}

fn field_message(change: FieldChange) -> v1::FieldChange {
    let FieldChange { field, old, new } = change;
    v1::FieldChange { field, old: old.map(cut), new: new.map(cut) }
}

fn cut(mut text: String) -> String {
    if text.len() > FIELD_LEN_MAX {
        text.truncate(text.floor_char_boundary(FIELD_LEN_MAX - 3));
        text.push('…');
    }
    text
}

fn version_message(version: &Version) -> v1::JobVersion {
    let equals = version.equals.unwrap_or_default();
    let known = version.revision.as_ref();
    v1::JobVersion {
        version: version.number,
        equals,
        revision: known.map_or(0, |revision| revision.revision),
        time_unix_ms: known.map_or(0, |revision| revision.time.0),
        changer: known.map(|revision| revision.changer.clone()).unwrap_or_default(),
        message: known.map(|revision| revision.message.clone()).unwrap_or_default(),
    }
}
