//! Waiting for a condition, always with a deadline, never by a bare sleep.
//!
//! Deadlines are for a machine that runs at full speed. `HEXTET_TEST_TIME_SCALE` (a number, 1 by default)
//! multiplies them where every instruction is interpreted, as in an emulated VM.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long to wait between two looks at a condition.
const POLL_EVERY: Duration = Duration::from_millis(20);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes every wait and every command of this process end early with an error, or allows them again.
pub fn set_interrupted(value: bool) {
    INTERRUPTED.store(value, Ordering::SeqCst);
}

/// Whether the user has asked to stop.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// The factor by which this machine is slower than the one that deadlines are written for.
pub fn time_scale() -> f64 {
    static SCALE: OnceLock<f64> = OnceLock::new();
    *SCALE.get_or_init(|| parse_scale(std::env::var("HEXTET_TEST_TIME_SCALE").ok().as_deref()))
}

/// `limit`, stretched by [`time_scale`].
pub fn scaled(limit: Duration) -> Duration {
    limit.mul_f64(time_scale())
}

/// Waits until `condition` holds and says how long that took.
///
/// # Errors
/// When it does not hold within `limit` (scaled): the error names `what` was waited for.
pub fn wait_until(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<Duration> {
    wait_for(limit, what, || if condition() { Ok(()) } else { Err(String::new()) }).map(|(took, ())| took)
}

/// Waits until `attempt` gives a value; its last reason for not giving one is part of the error.
///
/// # Errors
/// When there is no value within `limit` (scaled).
pub fn wait_for<T>(
    limit: Duration,
    what: &str,
    mut attempt: impl FnMut() -> Result<T, String>,
) -> Result<(Duration, T)> {
    let start = Instant::now();
    let limit = scaled(limit);
    loop {
        let reason = match attempt() {
            Ok(value) => return Ok((start.elapsed(), value)),
            Err(reason) => reason,
        };
        if interrupted() {
            bail!("interrupted while waiting for: {what}");
        }
        if start.elapsed() >= limit {
            let because = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
            bail!("not within {:.1} s: {what}{because}", limit.as_secs_f64());
        }
        std::thread::sleep(POLL_EVERY);
    }
}

fn parse_scale(text: Option<&str>) -> f64 {
    text.and_then(|text| text.parse::<f64>().ok())
        .filter(|scale| scale.is_finite() && *scale > 0.0)
        .map_or(1.0, |scale| scale.min(1000.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_never_holds_names_itself() {
        let error = wait_until(Duration::from_millis(1), "the moon is blue", || false).unwrap_err();
        assert!(error.to_string().contains("the moon is blue"), "{error}");
    }

    #[test]
    fn a_nonsense_scale_is_one() {
        for text in [None, Some(""), Some("-2"), Some("nan"), Some("fast")] {
            assert_eq!(parse_scale(text), 1.0, "{text:?}");
        }
        assert_eq!(parse_scale(Some("10")), 10.0);
    }
}
