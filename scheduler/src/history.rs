//! Reads of the log, from its end backwards.

use std::{collections::BTreeSet, ops::ControlFlow, sync::Arc};

use scheduler_core::{
    change::{JobRecord, Key, Revision, Value},
    event::Texts,
    job::Job,
    state::State,
};

use crate::store::{Store, StoreError};

/// Revisions that are in memory at a time.
const CHUNK: u64 = 256;

/// Where a walk through the log ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The visitor had enough, after this revision.
    Stopped(u64),
    /// There are no older ones: the log begins with this revision.
    AtTheBeginning(u64),
}

/// What a walk through the log comes by.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Seen<'a> {
    /// A revision.
    Revision(&'a Revision),
    /// One that does not change what is asked about.
    Other,
    /// One that a damaged store cannot give.
    Unreadable(u64),
}

/// A version of a job, and what is known of how it came.
#[derive(Clone, Debug)]
pub(crate) struct Version {
    pub(crate) number: u32,
    pub(crate) equals: Option<u32>,
    pub(crate) job: Arc<Job>,
    /// `None` when it was compacted.
    pub(crate) revision: Option<Revision>,
}

/// Why there is no such version.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VersionError {
    #[error("there never was a job `{0}`; `netctl jobs` lists jobs")]
    NoJob(String),
    #[error("job `{job}` has no version {version} yet; it has {there_are}")]
    Unknown { job: String, version: u32, there_are: String },
    #[error(
        "version {version} of job `{job}` was compacted: the history begins with revision {oldest}; it has {there_are}"
    )]
    Compacted { job: String, version: u32, oldest: u64, there_are: String },
    #[error(
        "version {version} of job `{job}` cannot be found: the store is damaged, and revision {revision} cannot be read"
    )]
    Unreadable { job: String, version: u32, revision: u64 },
    #[error("job `{0}` is deleted: say which version is meant")]
    Deleted(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Shows revisions older than `before`, newest first, until `visit` has had enough. With a key, those that do not change
/// it may be no more than [`Seen::Other`].
///
/// # Errors
/// The log cannot be read.
pub(crate) fn back(
    store: &dyn Store,
    about: Option<&Key>,
    before: u64,
    mut visit: impl FnMut(Seen<'_>) -> ControlFlow<()>,
) -> Result<Ended, StoreError> {
    let is_damaged = store.damage().is_some();
    let (oldest, mut before) = (store.oldest()?, before);
    while before > oldest {
        let after = before.saturating_sub(CHUNK + 1).max(oldest.saturating_sub(1));
        let len = (before - 1 - after) as usize;
        let chunk = match about {
            Some(key) => store.log_about(key, after, len)?,
            None => store.log_after(after, len)?,
        };
        for number in (after + 1..before).rev() {
            let seen = match chunk.binary_search_by_key(&number, |revision| revision.revision) {
                Ok(at) => Seen::Revision(&chunk[at]),
                Err(_) if is_damaged => Seen::Unreadable(number),
                Err(_) if about.is_some() => Seen::Other,
                // It has just been compacted.
                Err(_) => continue,
            };
            if visit(seen).is_break() {
                return Ok(Ended::Stopped(number));
            }
        }
        before = after + 1;
    }
    Ok(Ended::AtTheBeginning(oldest))
}

/// Finds a version of a job; 0 is the one in force. Its text is in the record while a pod runs it, and in the log.
///
/// # Errors
/// It says which versions there are.
pub(crate) fn version(
    store: &dyn Store,
    state: &State,
    name: &str,
    version: u32,
) -> Result<Version, VersionError> {
    let record = state.job_record(name).ok_or_else(|| VersionError::NoJob(name.to_owned()))?;
    if version == 0 && record.removed {
        return Err(VersionError::Deleted(name.to_owned()));
    }
    let version = if version == 0 { record.version } else { version };
    let (key, mut found, mut earliest) = (Key::Job(name.to_owned()), None, None);
    let mut unreadable = None;
    let ended = back(store, Some(&key), state.revision() + 1, |seen| {
        let revision = match seen {
            Seen::Revision(revision) => revision,
            Seen::Other => return ControlFlow::Continue(()),
            Seen::Unreadable(number) => {
                unreadable = Some(number);
                return ControlFlow::Continue(());
            }
        };
        let Some(made) = made(revision, &key) else { return ControlFlow::Continue(()) };
        earliest = Some(made.version);
        if made.version == version {
            let (number, equals) = (version, made.equals);
            let job = made.versions.get(&version).cloned();
            found = job.map(|job| Version { number, equals, job, revision: Some(revision.clone()) });
        }
        if made.version == version { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let kept = || {
        let job = record.versions.get(&version)?.clone();
        let equals = record.equals.filter(|_| record.version == version);
        Some(Version { number: version, equals, job, revision: None })
    };
    let lost = || match unreadable {
        Some(revision) if version <= record.version => {
            VersionError::Unreadable { job: name.to_owned(), version, revision }
        }
        _ => missing(record, name, version, earliest, ended),
    };
    found.or_else(kept).ok_or_else(lost)
}

/// The texts that the rollouts of `job` name and that its record does not keep. A version that is still to come has
/// none: it may be that of `job` itself.
///
/// # Errors
/// The text of an older version is lost.
pub(crate) fn texts(store: &dyn Store, state: &State, job: &Job) -> Result<Texts, VersionError> {
    let Some(record) = state.job_record(&job.job) else { return Ok(Texts::new()) };
    let is_recalled = |number: &u32| *number <= record.version && !record.versions.contains_key(number);
    let named: BTreeSet<u32> =
        job.versions_named().filter(|number| *number != 0).filter(is_recalled).collect();
    let text = |number: u32| Ok((number, version(store, state, &job.job, number)?.job));
    named.into_iter().map(text).collect()
}

/// The record of a job whose version this revision made.
fn made<'a>(revision: &'a Revision, key: &Key) -> Option<&'a Arc<JobRecord>> {
    let change = revision.changes.iter().find(|change| change.key == *key)?;
    let (Some(Value::Job(new)), old) = (&change.new, &change.old) else { return None };
    let before = match old {
        Some(Value::Job(old)) => old.version,
        _ => 0,
    };
    (new.version != before).then_some(new)
}

fn missing(
    record: &JobRecord,
    name: &str,
    version: u32,
    earliest: Option<u32>,
    ended: Ended,
) -> VersionError {
    let job = name.to_owned();
    let mut there_are: Vec<u32> = record.versions.keys().copied().collect();
    there_are.extend(earliest.into_iter().flat_map(|earliest| earliest..=record.version));
    let there_are = ranges(there_are);
    match ended {
        Ended::AtTheBeginning(oldest) if version <= record.version => {
            VersionError::Compacted { job, version, oldest, there_are }
        }
        _ => VersionError::Unknown { job, version, there_are },
    }
}

/// `versions 1, 4 to 7`.
fn ranges(mut numbers: Vec<u32>) -> String {
    numbers.sort_unstable();
    numbers.dedup();
    let runs = numbers.chunk_by(|one, next| one + 1 == *next).map(|run| match run {
        [one] => one.to_string(),
        run => format!("{} to {}", run[0], run[run.len() - 1]),
    });
    let text = runs.collect::<Vec<_>>().join(", ");
    let word = if numbers.len() == 1 { "version" } else { "versions" };
    if text.is_empty() { "none any more".to_owned() } else { format!("{word} {text}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::writer::tests::{apply, hub};

    #[tokio::test]
    async fn the_log_is_read_from_its_end_to_its_beginning_once() {
        let (hub, store) = hub();
        for number in 0..600 {
            apply(&hub, &format!("j{number}")).await.unwrap();
        }
        store.compact(51, 1000).unwrap();
        let mut seen = vec![];
        let visit = |found: Seen<'_>| {
            let Seen::Revision(revision) = found else { panic!("{found:?}") };
            seen.push(revision.revision);
            ControlFlow::Continue(())
        };
        assert_eq!(back(store.as_ref(), None, 502, visit).unwrap(), Ended::AtTheBeginning(51));
        assert_eq!(seen, (51..=501).rev().collect::<Vec<_>>());
        let ended = back(store.as_ref(), None, 502, |_| ControlFlow::Break(())).unwrap();
        assert_eq!(ended, Ended::Stopped(501));
        assert_eq!(back(store.as_ref(), None, 51, |_| panic!("none")).unwrap(), Ended::AtTheBeginning(51));
    }

    #[test]
    fn versions_are_told_in_ranges() {
        assert_eq!(ranges(vec![]), "none any more");
        assert_eq!(ranges(vec![3]), "version 3");
        assert_eq!(ranges(vec![5, 1, 4, 4, 6]), "versions 1, 4 to 6");
    }
}
