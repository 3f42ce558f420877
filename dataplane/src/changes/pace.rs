//! How often changes may lead to a look at the kernel: at once, and not without end.

use std::time::Duration;

use tokio::time::Instant;

/// A bucket of permits that fills by itself.
#[derive(Debug)]
pub struct Pace {
    /// Permits that it holds when nothing has happened for a while.
    burst: u32,
    /// The time in which one comes back.
    refill: Duration,
    left: u32,
    counted: Instant,
}

impl Pace {
    /// A full one.
    pub fn new(burst: u32, refill: Duration) -> Pace {
        Pace { burst, refill, left: burst, counted: Instant::now() }
    }

    /// When the next permit is there; not after `now` when one is.
    pub fn next(&mut self, now: Instant) -> Instant {
        self.fill(now);
        if self.left > 0 { now } else { self.counted + self.refill }
    }

    /// Takes a permit, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let taken = self.left > 0;
        self.left = self.left.saturating_sub(1);
        taken
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counted);
        let back = u32::try_from(passed.as_nanos() / self.refill.as_nanos()).unwrap_or(u32::MAX);
        if self.left.saturating_add(back) >= self.burst {
            (self.left, self.counted) = (self.burst, now);
        } else {
            self.left += back;
            self.counted += self.refill * back;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_and_a_storm_is_not() {
        let start = Instant::now();
        let mut pace = Pace::new(3, Duration::from_millis(200));
        let at = |ms: u64| start + Duration::from_millis(ms) + Duration::from_millis(1);
        assert!([0, 1, 2].iter().all(|ms| pace.take(at(*ms))));
        assert!(!pace.take(at(3)));
        assert!(pace.next(at(3)) > at(150) && pace.next(at(3)) <= at(203));
        assert!(pace.take(at(203)));
        // Ten seconds of it: the burst, and five in a second.
        let taken = (0..10_000).filter(|ms| pace.take(at(1_000 + ms))).count();
        assert!((50..=53).contains(&taken), "{taken}");
    }

    #[test]
    fn what_was_not_used_does_not_add_up() {
        let mut pace = Pace::new(3, Duration::from_millis(200));
        let late = Instant::now() + Duration::from_secs(3600);
        assert_eq!((0..10).filter(|_| pace.take(late)).count(), 3);
    }
}
