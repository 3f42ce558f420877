//! What becomes of an agent that the server takes for a copy of its node: it asks again, slowly, and starts nothing.
//!
//! A machine that has only booted again is let in when the lease of the boot before has ended, so the first refusals are
//! asked about often. Decided here, done by [`crate::attach`], [`crate::lease`] and [`crate::agent`].

use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;
use tonic::Status;

/// For so long a refusal may be one of a machine that has only booted again; longer than a lease.
const SURE_AFTER: Duration = Duration::from_secs(15);
/// Between two attempts until then, and from then on.
const RETRY: Duration = Duration::from_millis(500);
const RETRY_OF_COPY: Duration = Duration::from_secs(30);
/// A server that refused a machine which may have only booted again, and says nothing for so long, is not waited for.
const WORD_MAX: Duration = Duration::from_secs(3);

/// Another machine with this node's name and key is served.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub(crate) struct TakenForCopy(pub(crate) String);

impl TakenForCopy {
    /// Whether a server's answer says so.
    pub(crate) fn of(status: &Status) -> Option<TakenForCopy> {
        let taken = status.metadata().get(hextet_api::TAKEN)?;
        (taken == hextet_api::TAKEN_MACHINE).then(|| TakenForCopy(status.message().to_owned()))
    }
}

/// How often a stream is asked for while the server refuses it.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    first: Option<Instant>,
}

impl Pace {
    /// Was refused: so long until the next attempt.
    pub(crate) fn refused(&mut self, now: Instant) -> Duration {
        let first = *self.first.get_or_insert(now);
        if now - first < SURE_AFTER { RETRY } else { RETRY_OF_COPY }
    }

    /// Was let in, or failed in another way.
    pub(crate) fn reset(&mut self) {
        self.first = None;
    }
}

/// What the agent knows of the server's refusals.
#[derive(Clone, Debug)]
pub(crate) struct Refused {
    /// In the server's words.
    pub(crate) why: String,
    first: Instant,
    last: Instant,
}

impl Refused {
    /// The first word or another.
    pub(crate) fn again(before: Option<Refused>, why: String, now: Instant) -> Refused {
        let first = before.map_or(now, |before| before.first);
        Refused { why, first, last: now }
    }

    /// When a node that has started nothing yet goes on without the server; never when it is surely a copy.
    pub(crate) fn goes_on(&self) -> Option<Instant> {
        let is_sure = self.last - self.first >= SURE_AFTER;
        (!is_sure).then(|| self.last + WORD_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_may_have_booted_again_asks_often_and_a_copy_seldom() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        assert_eq!(pace.refused(start), RETRY);
        assert_eq!(pace.refused(start + SURE_AFTER / 2), RETRY);
        assert_eq!(pace.refused(start + SURE_AFTER), RETRY_OF_COPY);
        assert_eq!(pace.refused(start + 10 * SURE_AFTER), RETRY_OF_COPY);
        pace.reset();
        assert_eq!(pace.refused(start + 11 * SURE_AFTER), RETRY);
    }

    #[test]
    fn a_server_that_dies_after_a_refusal_is_not_waited_for_and_a_copy_starts_nothing_for_ever() {
        let start = Instant::now();
        let once = Refused::again(None, "why".to_owned(), start);
        assert_eq!(once.goes_on(), Some(start + WORD_MAX));
        let twice = Refused::again(Some(once), "why".to_owned(), start + SURE_AFTER);
        assert_eq!(twice.goes_on(), None);
    }

    #[test]
    fn only_a_taken_machine_is_a_copy() {
        let mut status = Status::already_exists("why");
        assert_eq!(TakenForCopy::of(&status), None);
        status.metadata_mut().insert(hextet_api::TAKEN, "underlay".parse().unwrap());
        assert_eq!(TakenForCopy::of(&status), None);
        status.metadata_mut().insert(hextet_api::TAKEN, hextet_api::TAKEN_MACHINE.parse().unwrap());
        assert_eq!(TakenForCopy::of(&status), Some(TakenForCopy("why".to_owned())));
    }
}
