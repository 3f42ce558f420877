//! Pods whose address another machine has: when the server is asked for another one. Pure: time is an argument.
//!
//! The first few are asked for at once. When each new address is another's too, something on the LAN answers for
//! all of them, and the pod waits longer and longer, so that neither the LAN nor the server's log is flooded.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

/// Addresses in a row that are asked for at once.
const AT_ONCE: u32 = 5;
const WAIT_FIRST: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(60);
/// After so long without a conflict the next one is the first again.
const CALM: Duration = Duration::from_secs(300);

/// The pods that had conflicts.
#[derive(Debug, Default)]
pub(crate) struct Conflicts {
    pods: BTreeMap<String, Row>,
}

#[derive(Debug)]
struct Row {
    in_a_row: u32,
    last: Instant,
    /// Another address is asked for then; none when it has been.
    ask_at: Option<Instant>,
}

/// How it stands with a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Addresses that were another's, this one included.
    pub(crate) in_a_row: u32,
    /// How long until another is asked for.
    pub(crate) wait: Duration,
}

impl Conflicts {
    /// Another machine has the address of `pod`.
    pub(crate) fn heard(&mut self, pod: &str, now: Instant) -> Standing {
        let before = self.pods.get(pod).filter(|row| now < row.last + CALM);
        let in_a_row = before.map_or(1, |row| row.in_a_row.saturating_add(1));
        let wait = wait(in_a_row);
        let row = Row { in_a_row, last: now, ask_at: Some(now + wait) };
        self.pods.insert(pod.to_owned(), row);
        Standing { in_a_row, wait }
    }

    /// Whether another address for `pod` may be asked for, now or again.
    pub(crate) fn may_ask(&self, pod: &str, now: Instant) -> bool {
        self.pods.get(pod).and_then(|row| row.ask_at).is_none_or(|at| at <= now)
    }

    /// When [`Conflicts::due`] is to be asked.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.pods.values().filter_map(|row| row.ask_at).min()
    }

    /// Pods for which another address is to be asked for now, each once.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<String> {
        let due = self.pods.iter_mut().filter(|(_, row)| row.ask_at.is_some_and(|at| at <= now));
        due.map(|(pod, row)| {
            row.ask_at = None;
            pod.clone()
        })
        .collect()
    }

    /// The pod is no more.
    pub(crate) fn forget(&mut self, pod: &str) {
        self.pods.remove(pod);
    }
}

fn wait(in_a_row: u32) -> Duration {
    match in_a_row.checked_sub(AT_ONCE + 1) {
        None => Duration::ZERO,
        Some(doublings) => WAIT_MAX.min(WAIT_FIRST * 2_u32.saturating_pow(doublings)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_few_are_asked_for_at_once_and_the_rest_ever_later() {
        let mut conflicts = Conflicts::default();
        let start = Instant::now();
        let waits: Vec<u64> = (0..14).map(|_| conflicts.heard("a", start).wait.as_secs()).collect();
        assert_eq!(waits, [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(conflicts.heard("b", start), Standing { in_a_row: 1, wait: Duration::ZERO });
    }

    #[test]
    fn a_conflict_after_a_calm_time_is_the_first_again() {
        let mut conflicts = Conflicts::default();
        let start = Instant::now();
        for _ in 0..9 {
            conflicts.heard("a", start);
        }
        assert_eq!(conflicts.heard("a", start + CALM - Duration::from_secs(1)).in_a_row, 10);
        assert_eq!(conflicts.heard("a", start + CALM * 3).in_a_row, 1);
        // The longest wait is no calm time.
        assert!(WAIT_MAX < CALM);
    }

    #[test]
    fn each_is_asked_for_once_and_when_it_is_due() {
        let mut conflicts = Conflicts::default();
        let start = Instant::now();
        assert_eq!(conflicts.next(), None);
        conflicts.heard("a", start);
        for _ in 0..6 {
            conflicts.heard("b", start);
        }
        assert!(conflicts.may_ask("a", start) && !conflicts.may_ask("b", start));
        assert_eq!(conflicts.due(start), ["a"]);
        assert_eq!(conflicts.next(), Some(start + WAIT_FIRST));
        assert!(conflicts.due(start).is_empty());
        assert_eq!(conflicts.due(start + WAIT_FIRST), ["b"]);
        assert_eq!(conflicts.next(), None);
        assert!(conflicts.may_ask("b", start), "again, as on a new stream");
    }

    #[test]
    fn nothing_is_kept_of_a_pod_that_is_no_more() {
        let mut conflicts = Conflicts::default();
        conflicts.heard("a", Instant::now());
        conflicts.forget("a");
        assert_eq!((conflicts.next(), conflicts.pods.len()), (None, 0));
    }
}
