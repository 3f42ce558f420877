//! What a cluster that goes on from a backup does not know: what was done after the backup was made.
//!
//! Leases that the server before has granted may still run, on nodes that the state does not name. So nothing of which
//! there may only be one has a place until all of them are over, by the monotonic clock of the server that waits. Numbers
//! that must only grow leap over all that may have been given meanwhile.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{lease::FENCE_MARGIN_DIVISOR, time::WallTime};

/// So far a number leaps when the clock says nothing: it is behind what the backup holds, and wrong.
const LEAP_WITHOUT_CLOCK: u64 = 1 << 32;
/// No number grows faster than this in the long run: a pod is made in microseconds at best, and written to a disk. A
/// leap over the age of the cluster in these is therefore also one over what was given after an earlier restore.
const PER_MILLISECOND_MAX: u64 = 64;

/// The mark of a store that was made of a backup. It stays until no lease of the server before can run any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// The last revision of the backup.
    pub revision: u64,
    /// When it was restored, for people to read.
    pub time: WallTime,
    /// How long leases of the server were that made the backup; 0 when the backup does not say.
    #[serde(default, skip_serializing_if = "crate::job::is_default")]
    pub lease_ms: u64,
}

impl Restored {
    /// How long a server that starts waits, whose own leases are of this length. One that starts again waits anew: it
    /// does not know for how long it was away.
    #[must_use]
    pub fn wait(&self, lease: Duration) -> Duration {
        let longest = lease.max(Duration::from_millis(self.lease_ms));
        longest + longest / FENCE_MARGIN_DIVISOR
    }
}

/// A number after `last` that was not given after the backup, in a cluster of this age.
#[must_use]
pub(crate) fn leap(last: u64, age: Duration) -> u64 {
    let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
    let by_age = age_ms.saturating_mul(PER_MILLISECOND_MAX);
    if by_age > last { by_age } else { last.saturating_add(LEAP_WITHOUT_CLOCK) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YEAR: Duration = Duration::from_secs(365 * 86_400);

    #[test]
    fn the_wait_is_for_the_longer_of_both_leases_and_what_clocks_may_differ() {
        let mark = |lease_ms| Restored { revision: 7, time: WallTime(0), lease_ms };
        let seconds = Duration::from_secs;
        assert_eq!(mark(0).wait(seconds(4)), seconds(5));
        assert_eq!(mark(2_000).wait(seconds(4)), seconds(5));
        assert_eq!(mark(8_000).wait(seconds(4)), seconds(10), "the server before had longer ones");
    }

    #[test]
    fn the_same_backup_restored_twice_leaps_over_what_was_given_in_between() {
        let first = leap(12, YEAR);
        let second = leap(12, YEAR + Duration::from_secs(60));
        assert!(second > first + 60 * 50_000, "a minute of a busy cluster");
        assert!(leap(second + 5, Duration::ZERO) > second + 5, "also with a clock that is wrong");
    }

    /// Both leaps were as far as the shortest one after what the backup had, which was made after a restore itself.
    #[test]
    fn a_backup_of_a_restored_cluster_leaps_by_the_clock_as_well() {
        let backup = leap(12, YEAR) + 3;
        let [first, second] = [1, 2].map(|minutes| leap(backup, YEAR + Duration::from_secs(60 * minutes)));
        assert!(second > first + 60 * 50_000, "{first} {second}");
    }

    /// Tokens are read by programs that count in floating point.
    #[test]
    fn a_number_of_an_old_cluster_is_still_exact_as_a_double() {
        assert!(leap(0, YEAR * 100) < 1 << 53);
        assert_eq!(leap(u64::MAX, YEAR), u64::MAX, "it never goes back");
    }
}
