//! How long to wait before the next try: doubling, bounded, with jitter so that a cluster does not try in step.

use std::time::Duration;

use rand::Rng;

/// Counts failures in a row; randomness is an argument.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, max: Duration) -> Backoff {
        Backoff { first, max, failures: 0 }
    }

    /// The wait after one more failure: half to all of the doubled time.
    pub(crate) fn next(&mut self, rng: &mut impl Rng) -> Duration {
        let full = self.first.saturating_mul(1 << self.failures.min(20)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        full.mul_f64(rng.random_range(0.5..=1.0))
    }

    /// It worked.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    const FIRST: Duration = Duration::from_millis(250);
    const MAX: Duration = Duration::from_secs(5);

    #[test]
    fn waits_grow_to_their_bound_and_start_over() {
        let (mut backoff, mut rng) = (Backoff::new(FIRST, MAX), StdRng::seed_from_u64(1));
        for full_ms in [250, 500, 1000, 2000, 4000, 5000, 5000] {
            let wait = backoff.next(&mut rng).as_millis();
            assert!((full_ms / 2..=full_ms).contains(&wait), "{wait} of {full_ms}");
        }
        backoff.reset();
        assert!(backoff.next(&mut rng) <= FIRST);
    }

    #[test]
    fn a_year_of_failures_is_fine() {
        let (mut backoff, mut rng) = (Backoff::new(FIRST, MAX), StdRng::seed_from_u64(1));
        backoff.failures = u32::MAX;
        assert!(backoff.next(&mut rng) <= MAX);
    }
}
