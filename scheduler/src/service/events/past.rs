//! What has happened already: from the log and from memory, in one row.

use std::{collections::VecDeque, ops::ControlFlow, sync::Arc};

use hextet_api::v1::{self, ClusterEvent, EventPosition};
use scheduler_core::{change::Key, pod::PodId};
use tonic::Status;

use super::{
    super::{in_thread, status},
    words::{self, MADE, gap},
};
use crate::{
    happenings::Numbered,
    history::{self, Ended, Seen},
    hub::Hub,
    store::StoreError,
    writer::WriteError,
};

/// Past events in one answer, when nothing is said and at most.
const EVENTS_MAX: u32 = 1_000;
/// Revisions that are read for them.
const READ_MAX: usize = 20_000;

/// What has happened, the oldest first; what nodes said has a number.
#[derive(Debug)]
pub(super) struct Past {
    pub(super) events: Vec<(Option<u64>, ClusterEvent)>,
    /// The revision and the number right before the first.
    pub(super) before: (u64, u64),
    /// Those of the last, whether it is told or not.
    pub(super) until: (u64, u64),
}

/// What is read from the log.
struct Log {
    /// The oldest first.
    events: Vec<ClusterEvent>,
    /// The revision from which on nothing is missing.
    from: u64,
    last: u64,
}

/// What a reader asks for: the newest, or everything after a position.
pub(super) async fn asked(hub: &Arc<Hub>, request: &v1::WatchEventsRequest) -> Result<Past, Status> {
    let (epoch, now) = (hub.store.epoch(), hub.clock.wall().0);
    match &request.after {
        None => newest(hub, request).await,
        Some(after) if after.epoch == epoch => {
            let number = if after.run == hub.happenings.run() { after.number } else { 0 };
            since(hub, &request.pod, after.revision, number).await
        }
        Some(EventPosition { epoch: before, .. }) => {
            let what = format!(
                "the server has another store (epoch {epoch}, and {before} before): what happened in between is not known"
            );
            let mut past = newest(hub, request).await?;
            past.events.insert(0, (None, gap(what, now)));
            Ok(past)
        }
    }
}

async fn newest(hub: &Arc<Hub>, request: &v1::WatchEventsRequest) -> Result<Past, Status> {
    let limit = if request.limit == 0 { EVENTS_MAX } else { request.limit.min(EVENTS_MAX) } as usize;
    let (kept, _, number) = hub.happenings.kept(&request.pod, 0);
    let log = read(hub, &request.pod, 0, limit).await?;
    let mut events = merged(log.events, kept);
    let events = events.split_off(events.len().saturating_sub(limit));
    let before = |first: Option<u64>, last: u64| first.map_or(last, |first| first - 1);
    let revision = events.iter().map(|(_, event)| event.revision).find(|revision| *revision > 0);
    let first_number = events.iter().find_map(|(number, _)| *number);
    let before = (before(revision, log.last), before(first_number, number));
    Ok(Past { events, before, until: (log.last, number) })
}

/// Everything after a revision and a number; what cannot be told is said.
pub(super) async fn since(hub: &Arc<Hub>, pod: &str, revision: u64, number: u64) -> Result<Past, Status> {
    let (kept, lost, last) = hub.happenings.kept(pod, number);
    let log = read(hub, pod, revision, usize::MAX).await?;
    let now = hub.clock.wall().0;
    let mut gaps = Vec::new();
    if log.last < revision {
        let what =
            format!("the log ends with revision {}, and {revision} was told: it is an older copy", log.last);
        gaps.push((None, gap(what, now)));
    }
    if log.from > revision + 1 {
        let what = format!(
            "what revisions {} to {} have done is not told: they are compacted, or too many",
            revision + 1,
            log.from - 1
        );
        gaps.push((None, gap(what, log.events.first().map_or(now, |event| event.unix_ms))));
    }
    if lost > 0 {
        let what = format!("{lost} events of nodes are not kept any more");
        gaps.push((None, gap(what, kept.first().map_or(now, |(_, event)| event.unix_ms))));
    }
    gaps.extend(merged(log.events, kept));
    Ok(Past { events: gaps, before: (revision, number), until: (log.last, last) })
}

/// What revisions after this one have done to a pod, or to any; at most `limit` events, the newest.
async fn read(hub: &Arc<Hub>, pod: &str, after: u64, limit: usize) -> Result<Log, Status> {
    let (pod, now) = (pod.to_owned(), hub.clock.wall().0);
    let last = hub.state().revision();
    if last <= after {
        return Ok(Log { events: Vec::new(), from: after + 1, last });
    }
    let read_max = usize::try_from(last - after).unwrap_or(READ_MAX).min(READ_MAX);
    let read = move |hub: &Hub| {
        let (mut found, mut read, mut in_gap, mut made) = (VecDeque::new(), 0, false, false);
        let about = (!pod.is_empty()).then(|| Key::Pod(PodId(pod.clone())));
        let ended = history::back(hub.store.as_ref(), about.as_ref(), last + 1, |seen| {
            match seen {
                Seen::Revision(revision) => {
                    words::of_revision(revision, &pod).into_iter().for_each(|event| found.push_front(event));
                }
                Seen::Unreadable(number) if !in_gap => {
                    let unix_ms = found.front().map_or(now, |newer: &ClusterEvent| newer.unix_ms);
                    found.push_front(words::unreadable(number, unix_ms));
                }
                Seen::Unreadable(_) | Seen::Other => {}
            }
            in_gap = matches!(seen, Seen::Unreadable(_));
            read += 1;
            // With the revision that made it, there is no more to find of a pod.
            made = found.front().is_some_and(|event| !pod.is_empty() && event.kind == MADE);
            let enough = made || read >= read_max || found.len() >= limit;
            if enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let from = match ended {
            _ if made => after + 1,
            Ended::Stopped(number) | Ended::AtTheBeginning(number) => number,
        };
        Ok::<_, StoreError>(Log { events: found.into(), from, last })
    };
    in_thread(hub, read, |error| status(WriteError::Store(Arc::new(error)))).await
}

/// Both by their times, and each in its own order whatever the clocks said.
fn merged(revisions: Vec<ClusterEvent>, kept: Vec<Numbered>) -> Vec<(Option<u64>, ClusterEvent)> {
    let (mut revisions, mut kept) = (VecDeque::from(revisions), VecDeque::from(kept));
    let mut all = Vec::with_capacity(revisions.len() + kept.len());
    loop {
        let is_revision = match (revisions.front(), kept.front()) {
            (Some(revision), Some((_, said))) => revision.unix_ms < said.unix_ms,
            (revision, None) => revision.is_some(),
            (None, Some(_)) => false,
        };
        let next = if is_revision {
            revisions.pop_front().map(|event| (None, event))
        } else {
            kept.pop_front().map(|(number, event)| (Some(number), event))
        };
        match next {
            Some(next) => all.push(next),
            None => return all,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(unix_ms: u64, revision: u64) -> ClusterEvent {
        ClusterEvent { unix_ms, revision, ..Default::default() }
    }

    /// A clock that was set back would have made a reader skip what it goes on from.
    #[test]
    fn each_row_keeps_its_order_whatever_the_clocks_said() {
        let revisions = vec![event(50, 1), event(20, 2), event(60, 3)];
        let kept = vec![(1, event(10, 0)), (2, event(55, 0)), (3, event(5, 0))];
        let all: Vec<(Option<u64>, u64)> =
            merged(revisions, kept).into_iter().map(|(number, event)| (number, event.revision)).collect();
        let of = |is_said: bool| all.iter().filter(move |(number, _)| number.is_some() == is_said);
        assert!(of(true).map(|(number, _)| number.unwrap()).eq([1, 2, 3]), "{all:?}");
        assert!(of(false).map(|(_, revision)| *revision).eq([1, 2, 3]), "{all:?}");
        assert_eq!(all[0], (Some(1), 0));
    }
}
