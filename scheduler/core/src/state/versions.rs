//! The versions of jobs that are kept, how much they take, and which of them was kept first.

use std::sync::Arc;

use super::Map;
use crate::version::{JobVersion, VersionId};

/// The versions of all jobs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Versions {
    all: Map<VersionId, Arc<JobVersion>>,
    by_age: Map<(u64, VersionId), ()>,
    bytes: u64,
}

impl Versions {
    /// Each with its name, in the order of those.
    pub fn iter(&self) -> impl Iterator<Item = (&VersionId, &Arc<JobVersion>)> {
        self.all.iter()
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, id: &VersionId) -> Option<&Arc<JobVersion>> {
        self.all.get(id)
    }

    /// Those of a job, the oldest first.
    pub fn of_job(
        &self,
        job: &str,
    ) -> impl DoubleEndedIterator<Item = (&VersionId, &Arc<JobVersion>)> + use<'_> {
        let id = |version| VersionId { job: job.to_owned(), version };
        self.all.range(id(0)..=id(u32::MAX))
    }

    /// The one that was kept before all others.
    #[must_use]
    pub fn oldest(&self) -> Option<&VersionId> {
        self.by_age.get_min().map(|((_, id), ())| id)
    }

    /// What all of them take.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn set(&mut self, id: &VersionId, version: Option<Arc<JobVersion>>) {
        if let Some(old) = self.all.remove(id) {
            self.bytes -= old.bytes();
            self.by_age.remove(&(old.kept, id.clone()));
        }
        if let Some(version) = version {
            self.bytes += version.bytes();
            self.by_age.insert((version.kept, id.clone()), ());
            self.all.insert(id.clone(), version);
        }
    }
}
