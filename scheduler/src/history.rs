//! Reads of the log, from its end backwards.

use std::ops::ControlFlow;

use scheduler_core::change::{Key, Revision};

use crate::store::{Store, StoreError};

mod version;

pub(crate) use version::{Lost, Made, Version, VersionError, lost_before, made_before, texts, version};

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
}
