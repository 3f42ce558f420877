//! How long a server may believe that it leads: by its own clock, and always shorter than the lease that it holds.

use std::time::Duration;

use crate::time::Moment;

/// A leader counts itself deposed so long before its lease ends.
pub const MARGIN: Duration = Duration::from_millis(100);
/// Keep-alives in the time of a lease.
pub const KEEP_ALIVES: u32 = 8;

/// The time in which a server leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenure {
    until: Moment,
}

impl Tenure {
    /// A lease of `length` that was asked for at `asked`.
    #[must_use]
    pub fn new(asked: Moment, length: Duration) -> Tenure {
        Tenure { until: asked + length }
    }

    /// How long the lease is good to be kept alive; none when it is over.
    #[must_use]
    pub fn left(&self, now: Moment) -> Option<Duration> {
        let left = (self.until - now).saturating_sub(MARGIN);
        (!left.is_zero()).then_some(left)
    }

    /// The lease was kept alive for `length`, as was asked for at `asked`. An answer that comes when the lease was over,
    /// because this process was stopped, is of no use: another may lead.
    pub fn kept(&mut self, asked: Moment, length: Duration, now: Moment) {
        if self.left(now).is_some() {
            self.until = asked + length;
        }
    }

    /// How long to wait until the next keep-alive.
    #[must_use]
    pub fn pause(length: Duration) -> Duration {
        length / KEEP_ALIVES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment(Duration::from_millis(ms))
    }

    const LENGTH: Duration = Duration::from_secs(2);

    #[test]
    fn a_tenure_ends_before_its_lease_and_is_counted_from_the_question() {
        let mut tenure = Tenure::new(at(0), LENGTH);
        assert_eq!(tenure.left(at(1_000)), Some(Duration::from_millis(900)));
        tenure.kept(at(1_000), LENGTH, at(1_400));
        assert_eq!(tenure.left(at(2_899)), Some(Duration::from_millis(1)));
        assert_eq!(tenure.left(at(2_900)), None);
    }

    #[test]
    fn an_answer_to_one_who_was_stopped_too_long_is_of_no_use() {
        let mut tenure = Tenure::new(at(0), LENGTH);
        tenure.kept(at(100), LENGTH, at(60_000));
        assert_eq!(tenure.left(at(60_000)), None);
    }
}
