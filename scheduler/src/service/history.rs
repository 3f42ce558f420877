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
use tonic::Status;

use super::{in_thread, status};
use crate::{
    compaction, convert,
    history::{self, Ended, Lost, Made, Seen, Version, VersionError},
    hub::Hub,
    store::{Store, StoreError},
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
/// So many revisions in a row that are older than a time are before it, and not of a clock that was wrong for a while.
const OLDER_MAX: usize = 1024;
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
        let mut older = 0;
        let ended = history::back(hub.store.as_ref(), key.as_ref(), before, |seen| {
            match seen {
                Seen::Revision(revision) if revision.time < since => {
                    older += 1;
                    if older == OLDER_MAX {
                        return ControlFlow::Break(());
                    }
                }
                Seen::Revision(revision) => {
                    older = 0;
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
        let mut next_before = match ended {
            Ended::Stopped(at) if older < OLDER_MAX => at,
            _ => 0,
        };
        let oldest = hub.store.oldest()?;
        if let (Ended::AtTheBeginning(_), Some(Key::Job(name))) = (ended, &key) {
            let kept = history::made_before(&hub.state(), name, before.min(oldest)).into_iter();
            let meant = kept.filter(|(made, _)| made.time >= since && filter.selects(&made.changer));
            let mut meant = meant.map(|(made, change)| version_revision(made, change));
            revisions.extend(meant.by_ref().take(limit - revisions.len()));
            next_before = meant.next().map_or(0, |next| next.revision + 1);
        }
        let oldest_unix_ms =
            hub.store.log_after(oldest.saturating_sub(1), 1)?.first().map_or(0, |first| first.time.0);
        Ok(v1::ListRevisionsResponse { revisions, next_before, oldest, oldest_unix_ms })
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
        let after = after.max(first_since(hub.store.as_ref(), last_revision + 1, since)?.saturating_sub(1));
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
            past = revision.revision <= after;
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
    Ok(v1::GetJobVersionResponse { job, version: Some(version_message(version)) })
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

/// Forgets the oldest part of the log, or says what would be forgotten.
pub(super) async fn compact(
    hub: &Arc<Hub>,
    request: v1::CompactHistoryRequest,
) -> Result<v1::CompactHistoryResponse, Status> {
    if hub.writes_fail().is_some() {
        // Who writes looks whether the disk has room again; until then nothing of the store is read.
        hub.compact(0, 0).await.map_err(status)?;
    }
    let last = hub.state().revision();
    let before = match (request.keep_revisions, request.since_unix_ms) {
        (0, 0) => None,
        (0, since) => {
            Some(read(hub, move |hub| first_since(hub.store.as_ref(), last + 1, WallTime(since))).await?)
        }
        (kept, _) => Some((last + 1).saturating_sub(kept)),
    };
    // The newest one always stays.
    let before = before.map(|before| before.min(last));
    let lost = match before {
        Some(before) => {
            read(hub, move |hub| history::lost_before(hub.store.as_ref(), &hub.state(), before)).await?
        }
        None => Lost::default(),
    };
    let oldest = read(hub, |hub| hub.store.oldest()).await?;
    let removed = match (before, request.dry_run) {
        (before, true) => Ok(before.map_or(0, |before| before.saturating_sub(oldest))),
        (Some(before), false) => compaction::before(hub, before).await,
        (None, false) => compaction::to_size(hub).await,
    };
    let (removed, bytes) = (removed.map_err(status)?, read(hub, |hub| hub.store.log_bytes()).await?);
    let lost = lost.lines().collect();
    Ok(v1::CompactHistoryResponse { oldest: oldest + removed, removed, bytes, lost })
}

/// The first revision of those since a time. A clock may have been wrong for a while: what came before that stays one of
/// them, unless [`OLDER_MAX`] in a row say that they are older.
fn first_since(store: &dyn Store, end: u64, since: WallTime) -> Result<u64, StoreError> {
    if since == WallTime(0) {
        return store.oldest();
    }
    let (mut first, mut older) = (end, 0);
    history::back(store, None, end, |seen| {
        match seen {
            Seen::Revision(revision) if revision.time < since => older += 1,
            Seen::Revision(revision) => (first, older) = (revision.revision, 0),
            Seen::Other | Seen::Unreadable(_) => {}
        }
        if older < OLDER_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(first)
}

async fn find(hub: &Arc<Hub>, name: String, number: u32) -> Result<Version, Status> {
    let find = move |hub: &Hub| history::version(hub.store.as_ref(), &hub.state(), &name, number);
    in_thread(hub, find, no_version).await
}

/// The texts of older versions that the rollouts of `job` name.
pub(super) async fn texts(hub: &Arc<Hub>, job: &Job) -> Result<Texts, Status> {
    if job.versions_named().next().is_none() {
        return Ok(Texts::new());
    }
    let job = job.clone();
    in_thread(hub, move |hub| history::texts(hub.store.as_ref(), &hub.state(), &job), no_version).await
}

pub(super) fn no_version(error: VersionError) -> Status {
    match error {
        VersionError::Store(error) => Status::unavailable(chain(&error)),
        error @ (VersionError::Unreadable { .. } | VersionError::Later { .. }) => {
            Status::data_loss(chain(&error))
        }
        other => Status::not_found(other.to_string()),
    }
}

async fn read<T: Send + 'static>(
    hub: &Arc<Hub>,
    with: impl FnOnce(&Hub) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    in_thread(hub, with, |error| Status::unavailable(chain(&error))).await
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

/// What is kept of a revision that is compacted.
fn version_revision(made: Made, change: ObjectChange) -> v1::Revision {
    let external = core::is_external(&made.changer);
    v1::Revision {
        revision: made.revision,
        time_unix_ms: made.time.0,
        changer: made.changer,
        external,
        message: made.message,
        objects: vec![object_message(change)],
        objects_total: 1,
        unreadable_from: 0,
    }
}

fn version_message(version: Version) -> v1::JobVersion {
    let Version { number, equals, made, .. } = version;
    let made = made.map(|made| (made.revision, made.time.0, made.changer, made.message));
    let (revision, time_unix_ms, changer, message) = made.unwrap_or_default();
    v1::JobVersion {
        version: number,
        equals: equals.unwrap_or_default(),
        revision,
        time_unix_ms,
        changer,
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        store::{RedbStore, suite::revision},
        writer::{
            RECOVER_INTERVAL,
            tests::{Next, apply, hub},
        },
    };

    /// It was refused for ever, and with it the way to make room.
    #[tokio::test]
    async fn a_store_that_was_full_is_compacted_when_there_is_room_again() {
        let (hub, store) = hub();
        apply(&hub, "a").await.unwrap();
        store.next(Next::Fails { written: false });
        apply(&hub, "b").await.unwrap_err();
        let request = v1::CompactHistoryRequest { keep_revisions: 1, ..Default::default() };
        assert_eq!(compact(&hub, request).await.unwrap_err().code(), tonic::Code::Unavailable);
        tokio::time::sleep(RECOVER_INTERVAL).await;
        assert_eq!(compact(&hub, request).await.unwrap().removed, 1);
    }

    /// A machine whose clock was wrong for a moment forgot all that came before it.
    #[test]
    fn a_clock_that_was_wrong_for_a_while_ends_no_period() {
        let dir = tempfile::tempdir().unwrap();
        let store = RedbStore::open(&dir.path().join("server.redb")).unwrap();
        // Old ones, one from a clock that was ahead, then the period with a while in the past, and one more.
        let times =
            [vec![100; 2 * OLDER_MAX], vec![9_000], vec![500; 10], vec![7; 20], vec![510; 5]].concat();
        let revisions = (1..).zip(&times);
        let revisions: Vec<Revision> = revisions
            .map(|(number, time)| Revision { time: WallTime(*time), ..revision(number, None) })
            .collect();
        store.commit(&revisions).unwrap();
        let (old, end) = (2 * OLDER_MAX as u64, times.len() as u64 + 1);
        let first = |since| first_since(&store, end, WallTime(since)).unwrap();
        assert_eq!(first(400), old + 1, "all of the period, and what a clock may have been wrong about");
        assert_eq!(first(505), old + 1);
        assert_eq!(first(9_001), end, "nothing is so new");
        assert_eq!((first(50), first(0)), (1, 1));
    }
}
