//! Forgets the oldest part of the log, a little at a time, so that commits go on in between.

use crate::{hub::Hub, store::StoreError, writer::WriteError};

/// Revisions that are forgotten between two commits.
const CHUNK: usize = 1000;
/// Revisions that stay whatever their size: those who watch can go on after a short absence.
const KEPT_MIN: u64 = 1024;
/// How much of the size is left after a trim, so that the next one is not due at once.
const LEFT_PERCENT: u64 = 75;

/// Forgets the revisions before this one, but for the newest of all; gives how many.
///
/// # Errors
/// The store takes nothing.
pub(crate) async fn before(hub: &Hub, revision: u64) -> Result<u64, WriteError> {
    let begin = hub.store.oldest().map_err(store)?;
    let revision = revision.min(hub.state().revision());
    let mut oldest = begin;
    while oldest < revision {
        hub.compact(revision, CHUNK).await?;
        oldest = hub.store.oldest().map_err(store)?;
    }
    Ok(oldest.saturating_sub(begin))
}

/// Brings a log that is larger than it may be well below its size; gives how many revisions were forgotten.
///
/// # Errors
/// The store takes nothing.
pub(crate) async fn to_size(hub: &Hub) -> Result<u64, WriteError> {
    let bytes = || hub.store.log_bytes().map_err(store);
    if bytes()? <= hub.history_bytes {
        return Ok(0);
    }
    let begin = hub.store.oldest().map_err(store)?;
    let end = hub.state().revision().saturating_sub(KEPT_MIN);
    let mut oldest = begin;
    while oldest < end && bytes()? > hub.history_bytes / 100 * LEFT_PERCENT {
        hub.compact(end, CHUNK).await?;
        oldest = hub.store.oldest().map_err(store)?;
    }
    Ok(oldest.saturating_sub(begin))
}

fn store(error: StoreError) -> WriteError {
    WriteError::Store(error.into())
}

#[cfg(test)]
mod tests {
    use scheduler_core::{
        event::Event,
        token::{Role, Token},
    };

    use super::*;
    use crate::{
        hub::scheduler,
        store::Store as _,
        writer::tests::{apply, hub},
    };

    /// Revisions that cost little.
    async fn revisions(hub: &Hub, count: u64) {
        for number in 0..count {
            let expires = hub.clock.wall();
            let token = Token { role: Role::Node, name: None, expires, used_by: None };
            let id = format!("{}-{number}", hub.state().revision());
            hub.write(scheduler(), Event::CreateToken(id, token)).await.unwrap();
        }
    }

    #[tokio::test]
    async fn the_oldest_part_is_forgotten_and_the_newest_revision_stays() {
        let (hub, store) = hub();
        revisions(&hub, 2500).await;
        let last = hub.state().revision();
        assert_eq!(before(&hub, 2201).await.unwrap(), 2200);
        assert_eq!(store.oldest().unwrap(), 2201);
        assert_eq!(before(&hub, 5).await.unwrap(), 0);
        before(&hub, u64::MAX).await.unwrap();
        assert_eq!((store.oldest().unwrap(), store.log_after(0, 10).unwrap().len()), (last, 1));
        apply(&hub, "after").await.unwrap();
    }

    /// The store of these tests counts revisions in the place of bytes.
    #[tokio::test]
    async fn a_log_that_has_grown_beyond_its_size_is_trimmed_and_watchers_can_still_resume() {
        let (hub, store) = crate::writer::tests::hub_with_history(2000);
        revisions(&hub, 1900).await;
        assert_eq!(to_size(&hub).await.unwrap(), 0);
        revisions(&hub, 200).await;
        assert!(to_size(&hub).await.unwrap() > 500);
        let left = store.log_bytes().unwrap();
        assert!((KEPT_MIN..=1500).contains(&left), "{left}");
        assert_eq!(to_size(&hub).await.unwrap(), 0);
    }
}
