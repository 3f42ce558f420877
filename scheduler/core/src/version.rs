//! Versions of jobs that stay known whatever becomes of the log: who made each, why, and its text.
//!
//! # Bounds
//! Of each job the newest [`VERSIONS_MAX`] are kept, as far as they take no more than [`VERSIONS_BYTES_MAX`], and the newest
//! [`NEWEST`] whatever they take, so that there is a way back. When all jobs together take more than [`ALL_BYTES_MAX`], what
//! was kept before all others goes first. A version that is not kept is in the log until that is compacted.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{job::Job, state::State, time::WallTime};

/// The most versions of one job.
pub const VERSIONS_MAX: usize = 100;
/// The most bytes of the versions of one job: a text is counted as JSON, and the message with it.
pub const VERSIONS_BYTES_MAX: u64 = 256 << 10;
/// The most bytes of the versions of all jobs.
pub const ALL_BYTES_MAX: u64 = 32 << 20;
/// Versions of a job that stay whatever they take alone.
pub const NEWEST: usize = 2;

/// A job and the number of one of its versions, `blog@3`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VersionId {
    /// The job.
    pub job: String,
    /// The number.
    pub version: u32,
}

/// A version of a job as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobVersion {
    /// What the job said.
    pub text: Text,
    /// The revision that made it; 0 when nobody knows.
    #[serde(default)]
    pub made: u64,
    /// The revision since which it is kept.
    pub kept: u64,
    /// When that was.
    pub applied: WallTime,
    /// Who made it.
    pub changer: String,
    /// Why.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The older version whose text it was made of, when somebody went back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<u32>,
}

/// The text of a job, written out: it takes a tenth of the memory, and few are ever read.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Text(Box<RawValue>);

impl Text {
    /// Writes it out.
    #[must_use]
    pub fn of(job: &Job) -> Text {
        Text(serde_json::value::to_raw_value(job).expect("keys are text and no value can fail to be written"))
    }

    /// Reads it.
    ///
    /// # Errors
    /// It is not the text of a job.
    pub fn job(&self) -> Result<Arc<Job>, serde_json::Error> {
        serde_json::from_str(self.0.get()).map(Arc::new)
    }

    fn bytes(&self) -> u64 {
        self.0.get().len() as u64
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Text) -> bool {
        self.0.get() == other.0.get()
    }
}

impl Eq for Text {}

impl JobVersion {
    /// What it is counted as.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.text.bytes() + self.message.len() as u64
    }
}

/// Those of one job that are more than are kept.
#[must_use]
pub fn surplus(state: &State, job: &str) -> Vec<VersionId> {
    let (mut count, mut bytes) = (0, 0);
    let is_surplus = |(_, version): &(&VersionId, &Arc<JobVersion>)| {
        count += 1;
        bytes += version.bytes();
        count > NEWEST && (count > VERSIONS_MAX || bytes > VERSIONS_BYTES_MAX)
    };
    state.versions().of_job(job).rev().filter(is_surplus).map(|(id, _)| id.clone()).collect()
}

/// Why a text names no version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not JOB@VERSION")]
pub struct VersionIdError(String);

impl FromStr for VersionId {
    type Err = VersionIdError;

    fn from_str(text: &str) -> Result<VersionId, VersionIdError> {
        let parts = text.split_once('@').and_then(|(job, version)| Some((job, version.parse().ok()?)));
        let (job, version) = parts.ok_or_else(|| VersionIdError(text.to_owned()))?;
        Ok(VersionId { job: job.to_owned(), version })
    }
}

impl fmt::Display for VersionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.job, self.version)
    }
}
