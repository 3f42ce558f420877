//! While the store cannot be written, as on a full disk, what the server says is lost to this node: it follows nothing
//! but a whole assignment then, and asks for one ever more rarely. The stream stays, for what the node has to say. Pure:
//! time is an argument.

use std::time::Duration;

use rand::Rng;
use tokio::time::Instant;

use crate::backoff::Backoff;

const ASK_FIRST: Duration = Duration::from_secs(1);
const ASK_MAX: Duration = Duration::from_secs(30);

/// Whether something was lost, and when a whole assignment is asked for.
#[derive(Debug)]
pub(crate) struct Behind {
    is_behind: bool,
    ask: Option<Instant>,
    backoff: Backoff,
}

impl Default for Behind {
    fn default() -> Behind {
        Behind { is_behind: false, ask: None, backoff: Backoff::new(ASK_FIRST, ASK_MAX) }
    }
}

impl Behind {
    /// Whether an assignment can be followed. One that says what has changed goes on from what is lost.
    pub(crate) fn can_follow(&self, is_whole: bool) -> bool {
        is_whole || !self.is_behind
    }

    /// An assignment is lost.
    pub(crate) fn lost(&mut self, now: Instant, rng: &mut impl Rng) {
        (self.is_behind, self.ask) = (true, Some(now + self.backoff.next(rng)));
    }

    /// An assignment is durable.
    pub(crate) fn kept(&mut self) {
        *self = Behind::default();
    }

    /// There may be room by now, or be made.
    pub(crate) fn hurry(&mut self, now: Instant) {
        if self.is_behind {
            self.ask = Some(now);
        }
    }

    /// When [`Behind::asked`] is to be said, with a new stream: its first assignment is whole.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.ask
    }

    pub(crate) fn asked(&mut self) {
        self.ask = None;
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    /// It began a new stream with each refusal of the disk, five in a second, and ended it before its reports were heard.
    #[test]
    fn a_whole_assignment_is_asked_for_ever_more_rarely_until_one_is_kept() {
        let (mut behind, mut rng) = (Behind::default(), StdRng::seed_from_u64(1));
        let mut now = Instant::now();
        assert!(behind.can_follow(false) && behind.next().is_none());
        for full in [1, 2, 4, 8, 16, 30, 30] {
            behind.lost(now, &mut rng);
            assert!(behind.can_follow(true) && !behind.can_follow(false));
            let wait = behind.next().unwrap() - now;
            assert!((full * 500..=full * 1000).contains(&wait.as_millis()), "{wait:?} of {full} s");
            now += wait;
            behind.asked();
            assert_eq!(behind.next(), None, "once");
        }
        behind.hurry(now);
        assert_eq!(behind.next(), Some(now));
        behind.kept();
        behind.hurry(now);
        assert!(behind.can_follow(false) && behind.next().is_none());
    }
}
