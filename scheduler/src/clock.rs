//! The two clocks of `scheduler-core`, read from the system.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use scheduler_core::time::{Moment, WallTime};

/// Reads both clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    /// Moments are counted from now.
    pub(crate) fn start() -> Clock {
        Clock(Instant::now())
    }

    pub(crate) fn now(self) -> Moment {
        Moment(self.0.elapsed())
    }

    /// The system's instant of a moment, for timers.
    pub(crate) fn instant(self, moment: Moment) -> Instant {
        self.0 + moment.0
    }

    pub(crate) fn wall(self) -> WallTime {
        wall()
    }
}

/// The time of day, which needs no beginning.
pub(crate) fn wall() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
