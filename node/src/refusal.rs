//! What becomes of an agent that the server takes for a copy of its node: it asks again, slowly, and starts nothing. One
//! whose node was deleted ends its pods, and asks again as slowly.
//!
//! A machine that has only booted again is let in when the lease of the boot before has ended, so the first refusals are
//! asked about often. Decided here, done by [`crate::attach`], [`crate::lease`] and [`crate::agent`].

use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;
use tonic::Status;

/// A machine that is refused for longer than the lease of a dead one could run, and for so long more, is a copy.
const SLACK: Duration = Duration::from_secs(5);
/// Longer leases than this are not waited for.
const LEASE_MAX: Duration = Duration::from_secs(600);
/// When a server does not say how long the lease runs.
const LEASE_DEFAULT: Duration = Duration::from_secs(10);
/// Between two attempts until it is sure, and from then on.
const RETRY: Duration = Duration::from_millis(500);
const RETRY_OF_COPY: Duration = Duration::from_secs(30);
/// A server that refused a machine which may have only booted again, and says nothing for so long, is not waited for.
const WORD_MAX: Duration = Duration::from_secs(3);

/// Another machine with this node's name and key is served.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{why}")]
pub(crate) struct TakenForCopy {
    /// In the server's words.
    pub(crate) why: String,
    /// How long the other's lease runs if that one is dead.
    pub(crate) lease: Duration,
}

/// Somebody deleted this node. Only a server of the cluster's CA can say so, and it says so only when it has that in its
/// state: one that merely does not know the node, as after a restore, says something else.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub(crate) struct Deleted(pub(crate) String);

impl Deleted {
    /// Whether a server's answer says so.
    pub(crate) fn of(status: &Status) -> Option<Deleted> {
        let is_certain = status.metadata().get(hextet_api::DELETED).is_some();
        is_certain.then(|| Deleted(status.message().to_owned()))
    }

    /// What the node says of itself, with what there is to do.
    pub(crate) fn advice(&self) -> String {
        format!(
            "{}. Its pods are ended. To have the machine in the cluster again: `netctl node down`, remove its state \
             folder, and `netctl node --join` with the token of `netctl token --for node`",
            self.0
        )
    }
}

impl TakenForCopy {
    /// Whether a server's answer says so.
    pub(crate) fn of(status: &Status) -> Option<TakenForCopy> {
        let metadata = status.metadata();
        let taken = metadata.get(hextet_api::TAKEN)?;
        let lease_ms = metadata.get(hextet_api::TAKEN_FOR_MS).and_then(|ms| ms.to_str().ok()?.parse().ok());
        let lease = lease_ms.map_or(LEASE_DEFAULT, Duration::from_millis).min(LEASE_MAX);
        (taken == hextet_api::TAKEN_MACHINE).then(|| TakenForCopy { why: status.message().to_owned(), lease })
    }

    /// From when on a machine that is refused for the first time `now` is surely a copy.
    fn sure(&self, now: Instant) -> Instant {
        now + self.lease + SLACK
    }
}

/// How often a stream is asked for while the server refuses it.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    sure: Option<Instant>,
}

impl Pace {
    /// Was refused: so long until the next attempt.
    pub(crate) fn refused(&mut self, copy: &TakenForCopy, now: Instant) -> Duration {
        let sure = *self.sure.get_or_insert_with(|| copy.sure(now));
        if now < sure { RETRY } else { RETRY_OF_COPY }
    }

    /// The node was deleted, which a server that is put back from a backup may yet undo.
    pub(crate) fn deleted(&mut self) -> Duration {
        self.sure = None;
        RETRY_OF_COPY
    }

    /// Was let in, or failed in another way.
    pub(crate) fn reset(&mut self) {
        self.sure = None;
    }
}

/// What the agent knows of the server's refusals.
#[derive(Clone, Debug)]
pub(crate) struct Refused {
    /// In the server's words.
    pub(crate) why: String,
    /// From when on it is no lease of the boot before that stands in the way.
    sure: Instant,
    last: Instant,
}

impl Refused {
    /// The first word or another.
    pub(crate) fn again(before: Option<Refused>, copy: TakenForCopy, now: Instant) -> Refused {
        let sure = before.map_or_else(|| copy.sure(now), |before| before.sure);
        Refused { why: copy.why, sure, last: now }
    }

    /// Whether this machine is a copy, and has not only booted again.
    pub(crate) fn is_sure(&self) -> bool {
        self.last >= self.sure
    }

    /// When a node that has started nothing yet goes on without the server; never when it is surely a copy.
    pub(crate) fn goes_on(&self) -> Option<Instant> {
        (!self.is_sure()).then(|| self.last + WORD_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_may_have_booted_again_asks_often_and_a_copy_seldom() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        let after = |s| start + Duration::from_secs(s);
        assert_eq!(pace.refused(&copy(), start), RETRY);
        assert_eq!(pace.refused(&copy(), after(64)), RETRY, "the lease is a minute");
        assert_eq!(pace.refused(&copy(), after(65)), RETRY_OF_COPY);
        assert_eq!(pace.refused(&copy(), after(600)), RETRY_OF_COPY);
        pace.reset();
        assert_eq!(pace.refused(&copy(), after(601)), RETRY);
    }

    #[test]
    fn a_server_that_dies_after_a_refusal_is_not_waited_for_and_a_copy_starts_nothing_for_ever() {
        let start = Instant::now();
        let once = Refused::again(None, copy(), start);
        assert_eq!((once.goes_on(), once.is_sure()), (Some(start + WORD_MAX), false));
        let twice = Refused::again(Some(once), copy(), start + copy().lease + SLACK);
        assert_eq!((twice.goes_on(), twice.is_sure()), (None, true));
    }

    fn copy() -> TakenForCopy {
        TakenForCopy { why: "why".to_owned(), lease: Duration::from_secs(60) }
    }

    #[test]
    fn a_node_is_deleted_only_when_the_server_is_sure() {
        let mut status = Status::permission_denied("this server knows no node n1");
        assert_eq!(Deleted::of(&status), None);
        status.metadata_mut().insert(hextet_api::DELETED, "node".parse().unwrap());
        assert_eq!(Deleted::of(&status), Some(Deleted("this server knows no node n1".to_owned())));
    }

    #[test]
    fn only_a_taken_machine_is_a_copy() {
        let mut status = Status::already_exists("why");
        assert_eq!(TakenForCopy::of(&status), None);
        status.metadata_mut().insert(hextet_api::TAKEN, "underlay".parse().unwrap());
        assert_eq!(TakenForCopy::of(&status), None);
        status.metadata_mut().insert(hextet_api::TAKEN, hextet_api::TAKEN_MACHINE.parse().unwrap());
        let taken = |lease| Some(TakenForCopy { why: "why".to_owned(), lease });
        assert_eq!(TakenForCopy::of(&status), taken(LEASE_DEFAULT));
        for (ms, lease) in [(60_000, Duration::from_secs(60)), (u64::MAX, LEASE_MAX)] {
            status.metadata_mut().insert(hextet_api::TAKEN_FOR_MS, ms.into());
            assert_eq!(TakenForCopy::of(&status), taken(lease));
        }
    }
}
