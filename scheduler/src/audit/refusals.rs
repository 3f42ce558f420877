//! How many refused calls get a line of the audit: a burst, and then a few each second.

use std::time::Duration;

use scheduler_core::time::Moment;

/// Lines at once.
const BURST: u32 = 100;
/// One more after each of these.
const INTERVAL: Duration = Duration::from_secs(1);

/// Lines that may still be written, and how many were not.
#[derive(Debug)]
pub(super) struct Refusals {
    left: u32,
    filled: Option<Moment>,
    unwritten: u64,
}

impl Default for Refusals {
    fn default() -> Refusals {
        Refusals { left: BURST, filled: None, unwritten: 0 }
    }
}

impl Refusals {
    /// Whether a refusal at `now` gets a line; how many before it did not.
    pub(super) fn admit(&mut self, now: Moment) -> Option<u64> {
        self.fill(now);
        if self.left == 0 {
            self.unwritten += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.unwritten))
    }

    fn fill(&mut self, now: Moment) {
        let since = now.0.saturating_sub(self.filled.unwrap_or(now).0);
        let intervals = u32::try_from(since.as_secs() / INTERVAL.as_secs()).unwrap_or(u32::MAX);
        if self.filled.is_none() || intervals > 0 {
            self.filled = Some(now);
            self.left = self.left.saturating_add(intervals).min(BURST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_gets_a_burst_and_the_next_line_counts_the_rest() {
        let mut refusals = Refusals::default();
        let at = |ms| Moment(Duration::from_millis(ms));
        let written = (0..1000).filter(|_| refusals.admit(at(0)).is_some()).count();
        assert_eq!(written, 100);
        assert_eq!(refusals.admit(at(900)), None);
        assert_eq!(refusals.admit(at(1000)), Some(901));
        assert_eq!(refusals.admit(at(1000)), None);
        assert_eq!(refusals.admit(at(1_000_000)), Some(1));
    }
}
