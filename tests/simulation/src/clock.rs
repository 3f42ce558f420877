//! The world's time, and the clocks of its machines, none of which is right.

use std::{fmt, ops::Add, time::Duration};

use rand::Rng;
use scheduler_core::time::{Moment, WallTime};

/// The world's time in microseconds. Nobody in it can read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time(pub(crate) u64);

/// When the simulation begins, for people: 2026-11-21.
const BEGIN_MS: i64 = 1_795_219_200_000;
/// A clock is no more than this wrong, in millionths: ten times what a bad quartz is.
const DRIFT_MAX_PPM: i64 = 1_000;

/// The clocks of one machine since it was started: a steady one of its own speed, and a wall clock that jumps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    speed_ppm: i64,
    started: Time,
    wall_offset_ms: i64,
}

impl Clock {
    pub(crate) fn new(rng: &mut impl Rng) -> Clock {
        let speed_ppm = 1_000_000 + rng.random_range(-DRIFT_MAX_PPM..=DRIFT_MAX_PPM);
        Clock { speed_ppm, started: Time::default(), wall_offset_ms: 0 }
    }

    /// Moments are counted from now, as after a start.
    pub(crate) fn restart(&mut self, now: Time) {
        self.started = now;
    }

    /// Somebody sets the wall clock.
    pub(crate) fn jump(&mut self, by_ms: i64) {
        self.wall_offset_ms += by_ms;
    }

    pub(crate) fn moment(&self, now: Time) -> Moment {
        let since = now.0.saturating_sub(self.started.0);
        let seen = u128::from(since) * self.speed_ppm.unsigned_abs() as u128 / 1_000_000;
        Moment(Duration::from_micros(seen as u64))
    }

    pub(crate) fn wall(&self, now: Time) -> WallTime {
        WallTime((BEGIN_MS + self.wall_offset_ms + (now.0 / 1000) as i64).max(0) as u64)
    }

    /// How long the world waits while this machine waits for `wait`.
    pub(crate) fn real(&self, wait: Duration) -> Duration {
        Duration::from_micros((wait.as_micros() * 1_000_000 / self.speed_ppm.unsigned_abs() as u128) as u64)
    }
}

impl Add<Duration> for Time {
    type Output = Time;

    fn add(self, later: Duration) -> Time {
        Time(self.0 + later.as_micros() as u64)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:6}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

/// What a wall clock shows that is right.
pub(crate) fn right(now: Time) -> WallTime {
    WallTime(BEGIN_MS.unsigned_abs() + now.0 / 1000)
}

pub(crate) fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}
