//! Which revisions of the log are about an object, so that the history of one is found without reading that of all.
//!
//! It is in memory: made from what a start reads anyway, and kept as revisions come and go. Of pods it knows nothing: there
//! are too many, and most of the log is about them.

use std::{collections::HashMap, ops::Range};

use scheduler_core::change::Revision;
use twox_hash::XxHash3_128;

/// The revisions that are about an object, in order, by what its key comes to.
#[derive(Debug, Default)]
pub(super) struct About(HashMap<u128, Vec<u64>>);

/// Whether it knows of objects with such keys.
pub(super) fn knows(key: &str) -> bool {
    !["pod/", "ending/", "failures/", "counters"].iter().any(|kind| key.starts_with(kind))
}

/// What a key comes to.
pub(super) fn name(key: &str) -> u128 {
    XxHash3_128::oneshot(key.as_bytes())
}

impl About {
    /// Takes revisions that follow on those that it has.
    pub(super) fn add(&mut self, revisions: &[Revision]) {
        for revision in revisions {
            let keys = revision.changes.iter().map(|change| change.key.to_string());
            self.add_names(revision.revision, keys.filter(|key| knows(key)).map(|key| name(&key)));
        }
    }

    /// Takes one revision that follows, and what the keys that it changes come to.
    pub(super) fn add_names(&mut self, revision: u64, names: impl IntoIterator<Item = u128>) {
        names.into_iter().for_each(|name| self.0.entry(name).or_default().push(revision));
    }

    /// The revisions of a range that are about an object; `None` if it knows nothing of such objects.
    pub(super) fn within(&self, key: &str, range: Range<u64>) -> Option<Vec<u64>> {
        let all = knows(key).then(|| self.0.get(&name(key)).map_or(&[][..], Vec::as_slice))?;
        let [begin, end] = [range.start, range.end].map(|bound| all.partition_point(|one| *one < bound));
        Some(all[begin..end.max(begin)].to_vec())
    }

    /// The log begins with this revision now.
    pub(super) fn forget_before(&mut self, oldest: u64) {
        self.0.retain(|_, all| {
            all.drain(..all.partition_point(|one| *one < oldest));
            !all.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_gives_what_is_within_a_range_and_forgets_from_the_beginning() {
        let mut about = About::default();
        for (revision, key) in [(3, "job/a"), (4, "job/b"), (7, "job/a"), (9, "job/a")] {
            about.add_names(revision, [name(key)]);
        }
        assert_eq!(about.within("job/a", 0..9), Some(vec![3, 7]));
        assert_eq!(about.within("job/a", 4..10), Some(vec![7, 9]));
        assert_eq!(about.within("job/c", 0..10), Some(vec![]));
        assert_eq!(about.within("pod/a", 0..9), None);
        about.forget_before(7);
        assert_eq!((about.within("job/a", 0..9), about.0.len()), (Some(vec![7]), 1));
    }
}
