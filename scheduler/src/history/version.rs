//! Versions of jobs: those that the state keeps, and older ones from the log.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::ControlFlow,
    sync::Arc,
};

use scheduler_core::{
    change::{JobRecord, Key, Revision, Value},
    event::Texts,
    history::{self as core, Fate, ObjectChange},
    job::Job,
    state::State,
    time::WallTime,
    version::{JobVersion, VERSIONS_BYTES_MAX, VERSIONS_MAX, VersionId},
};

use super::{Ended, Seen, back};
use crate::store::{Store, StoreError};

/// A version of a job, and what is known of how it came.
#[derive(Clone, Debug)]
pub(crate) struct Version {
    pub(crate) number: u32,
    pub(crate) equals: Option<u32>,
    pub(crate) job: Arc<Job>,
    /// `None` when nobody knows any more.
    pub(crate) made: Option<Made>,
}

/// How a version came.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    /// 0 when nobody knows.
    pub(crate) revision: u64,
    pub(crate) time: WallTime,
    pub(crate) changer: String,
    pub(crate) message: String,
}

/// Why there is no such version.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VersionError {
    #[error("there never was a job `{0}`; `netctl jobs` lists jobs")]
    NoJob(String),
    #[error("job `{job}` has no version {version} yet; its newest is {newest}")]
    Unknown { job: String, version: u32, newest: u32 },
    #[error(
        "version {version} of job `{job}` is forgotten: of a job the newest {VERSIONS_MAX} are kept, up to {} KiB, \
         and what the history holds, which begins with revision {oldest}; it has {there_are}",
        VERSIONS_BYTES_MAX >> 10
    )]
    Forgotten { job: String, version: u32, oldest: u64, there_are: String },
    #[error(
        "version {version} of job `{job}` cannot be found: the store is damaged, and revision {revision} cannot be read"
    )]
    Unreadable { job: String, version: u32, revision: u64 },
    #[error("the text of {id} is of a later netctl: use that")]
    Later { id: VersionId, source: serde_json::Error },
    #[error("job `{0}` is deleted: say which version is meant")]
    Deleted(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Versions that go with a part of the log, by job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost(BTreeMap<String, Vec<u32>>);

/// Finds a version of a job; 0 is the one in force. One that the state does not keep may be in the log.
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
    if version > record.version {
        let (job, newest) = (name.to_owned(), record.version);
        return Err(VersionError::Unknown { job, version, newest });
    }
    let id = VersionId { job: name.to_owned(), version };
    match state.versions().get(&id) {
        Some(kept) => of_kept(id, kept),
        None => in_the_log(store, state, record, id),
    }
}

fn of_kept(id: VersionId, kept: &JobVersion) -> Result<Version, VersionError> {
    let job = kept.text.job().map_err(|source| VersionError::Later { id: id.clone(), source })?;
    let JobVersion { made, applied, changer, message, equals, .. } = kept.clone();
    let made = Some(Made { revision: made, time: applied, changer, message });
    Ok(Version { number: id.version, equals, job, made })
}

fn in_the_log(
    store: &dyn Store,
    state: &State,
    record: &JobRecord,
    VersionId { job: name, version }: VersionId,
) -> Result<Version, VersionError> {
    let (key, mut found, mut earliest) = (Key::Job(name.clone()), None, None);
    let mut unreadable = None;
    let ended = back(store, Some(&key), state.revision() + 1, |seen| {
        match seen {
            Seen::Revision(revision) => {
                let made = made(revision, &key);
                earliest = made.map(|made| made.version).or(earliest);
                found = made.filter(|made| made.version == version).and_then(|made| of_log(revision, made));
            }
            Seen::Other => {}
            Seen::Unreadable(number) => unreadable = Some(number),
        }
        let is_past = earliest.is_some_and(|earliest| earliest <= version);
        if is_past { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let in_record = || {
        let job = record.versions.get(&version)?.clone();
        let equals = record.equals.filter(|_| record.version == version);
        Some(Version { number: version, equals, job, made: None })
    };
    found.or_else(in_record).ok_or_else(|| match unreadable {
        Some(revision) => VersionError::Unreadable { job: name.clone(), version, revision },
        None => forgotten(state, record, (name, version), (earliest, ended)),
    })
}

fn of_log(revision: &Revision, record: &JobRecord) -> Option<Version> {
    let job = record.versions.get(&record.version)?.clone();
    let Revision { revision, time, changer, message, .. } = revision.clone();
    let made = Some(Made { revision, time, changer, message });
    Some(Version { number: record.version, equals: record.equals, job, made })
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

/// The versions of a job that revisions before this one made, the newest first, as changes of the job. What a version
/// has changed is told where the one before it is kept, too.
pub(crate) fn made_before(state: &State, job: &str, before: u64) -> Vec<(Made, ObjectChange)> {
    let kept: Vec<(&VersionId, &Arc<JobVersion>)> = state.versions().of_job(job).collect();
    let is_before = |version: &JobVersion| (1..before).contains(&version.made);
    let told = kept.iter().enumerate().filter(|(_, (_, version))| is_before(version));
    let told = told.map(|(at, (id, version))| {
        let older = at.checked_sub(1).map(|at| kept[at]).filter(|(older, _)| older.version + 1 == id.version);
        let JobVersion { made, applied, changer, message, .. } = JobVersion::clone(version);
        (
            Made { revision: made, time: applied, changer, message },
            change(id, version, older.map(|older| older.1)),
        )
    });
    let mut told: Vec<_> = told.collect();
    told.reverse();
    told
}

fn change(id: &VersionId, version: &JobVersion, older: Option<&Arc<JobVersion>>) -> ObjectChange {
    let is_first = id.version == 1;
    let fields = |version: &JobVersion| version.text.job().ok().map(|job| core::job_fields(&job));
    let old = if is_first { Some(core::Fields::new()) } else { older.and_then(|older| fields(older)) };
    let differing = old.zip(fields(version)).map(|(old, new)| core::diff_fields(&old, &new));
    ObjectChange {
        key: Key::Job(id.job.clone()),
        fate: if is_first { Fate::Created } else { Fate::Changed },
        fields: differing.unwrap_or_default(),
        version: Some((id.version, version.equals)),
    }
}

/// The versions whose text would be lost with the revisions before this one.
///
/// # Errors
/// The log cannot be read.
pub(crate) fn lost_before(store: &dyn Store, state: &State, before: u64) -> Result<Lost, StoreError> {
    let mut lost = Lost::default();
    back(store, None, before, |seen| {
        if let Seen::Revision(revision) = seen {
            for id in revision
                .changes
                .iter()
                .filter_map(|change| made(revision, &change.key).map(|made| (&change.key, made.version)))
            {
                lost.add(state, id);
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(lost)
}

impl Lost {
    fn add(&mut self, state: &State, (key, version): (&Key, u32)) {
        let Key::Job(name) = key else { return };
        let id = VersionId { job: name.clone(), version };
        let in_record = state.job_record(name).is_some_and(|record| record.versions.contains_key(&version));
        if state.versions().get(&id).is_none() && !in_record {
            self.0.entry(id.job).or_default().push(version);
        }
    }

    /// A line for each job: `blog: versions 1 to 7`.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(job, versions)| format!("{job}: {}", Ranges(versions.clone())))
    }
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

fn forgotten(
    state: &State,
    record: &JobRecord,
    (job, version): (String, u32),
    (earliest, ended): (Option<u32>, Ended),
) -> VersionError {
    let mut there_are: Vec<u32> = state.versions().of_job(&job).map(|(id, _)| id.version).collect();
    there_are.extend(record.versions.keys().copied());
    there_are.extend(earliest.into_iter().flat_map(|earliest| earliest..=record.version));
    let there_are = Ranges(there_are).to_string();
    let (Ended::Stopped(oldest) | Ended::AtTheBeginning(oldest)) = ended;
    VersionError::Forgotten { job, version, oldest, there_are }
}

/// `versions 1, 4 to 7`.
struct Ranges(Vec<u32>);

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut numbers = self.0.clone();
        numbers.sort_unstable();
        numbers.dedup();
        let runs = numbers.chunk_by(|one, next| one + 1 == *next).map(|run| match run {
            [one] => one.to_string(),
            run => format!("{} to {}", run[0], run[run.len() - 1]),
        });
        match (numbers.len(), runs.collect::<Vec<_>>().join(", ")) {
            (0, _) => f.write_str("none any more"),
            (1, text) => write!(f, "version {text}"),
            (_, text) => write!(f, "versions {text}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_in_ranges() {
        let ranges = |numbers: &[u32]| Ranges(numbers.to_vec()).to_string();
        assert_eq!(ranges(&[]), "none any more");
        assert_eq!(ranges(&[3]), "version 3");
        assert_eq!(ranges(&[5, 1, 4, 4, 6]), "versions 1, 4 to 6");
    }
}
