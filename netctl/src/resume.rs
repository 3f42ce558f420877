//! Takes up again a stream whose connection was lost: waits that double, a bound on the silence, a word on stderr.

use std::time::{Duration, Instant};

use tonic::{Code, Status};

use crate::{client::Client, print};

const WAIT_MIN: Duration = Duration::from_millis(200);
const WAIT_MAX: Duration = Duration::from_secs(5);
/// A server that is not back after so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(600);

/// How it is with the connection of one stream.
#[derive(Debug, Default)]
pub(crate) struct Resume {
    /// Since when it is lost, and how long was waited last.
    lost: Option<(Instant, Duration)>,
}

/// How long to wait before the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wait {
    time: Duration,
    is_first: bool,
}

impl Resume {
    /// The stream has brought something: the connection is there.
    pub(crate) fn heard(&mut self) {
        self.lost = None;
    }

    /// The stream has ended with this: says so and waits before the next attempt.
    ///
    /// # Errors
    /// The silence lasts too long, or it is no loss of a connection.
    pub(crate) async fn again(&mut self, client: &Client, status: &Status) -> anyhow::Result<()> {
        let wait = if is_loss(status) { self.lost(Instant::now()) } else { None };
        let Some(wait) = wait else { return Err(client.explain(status)) };
        if wait.is_first {
            let (minutes, why) = (SILENCE_MAX.as_secs() / 60, client.explain(status));
            print::note(format!("connection lost; trying again for {minutes} minutes ({why:#})"));
        }
        tokio::time::sleep(wait.time).await;
        Ok(())
    }

    fn lost(&mut self, now: Instant) -> Option<Wait> {
        let (since, time) = match self.lost {
            None => (now, WAIT_MIN),
            Some((since, _)) if now.duration_since(since) >= SILENCE_MAX => return None,
            Some((since, last)) => (since, (last * 2).min(WAIT_MAX)),
        };
        let is_first = self.lost.is_none();
        self.lost = Some((since, time));
        Some(Wait { time, is_first })
    }
}

/// Whether the connection or whoever was at its end has gone, and may come back.
pub(crate) fn is_loss(status: &Status) -> bool {
    use Code::{Aborted, Cancelled, DeadlineExceeded, Internal, Unavailable, Unknown};
    matches!(status.code(), Unavailable | Unknown | Cancelled | Aborted | Internal | DeadlineExceeded)
}

/// What the end of a stream means that goes on for ever: its server is going.
pub(crate) fn ended() -> Status {
    Status::unavailable("the server ended the stream")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_their_bound_and_then_it_is_given_up() {
        let (mut resume, mut now) = (Resume::default(), Instant::now());
        let begin = now;
        let mut waits = Vec::new();
        while let Some(Wait { time, is_first }) = resume.lost(now) {
            assert_eq!(is_first, waits.is_empty());
            waits.push(time.as_millis());
            now += time;
        }
        assert_eq!(waits[..7], [200, 400, 800, 1600, 3200, 5000, 5000]);
        assert!(now - begin >= SILENCE_MAX && now - begin < SILENCE_MAX + WAIT_MAX);
        resume.heard();
        assert_eq!(resume.lost(now), Some(Wait { time: WAIT_MIN, is_first: true }), "it was there again");
    }

    #[test]
    fn what_the_server_refuses_is_no_loss() {
        assert!(is_loss(&ended()) && is_loss(&Status::unknown("transport error")));
        assert!(!is_loss(&Status::not_found("no pod")) && !is_loss(&Status::permission_denied("no")));
    }
}
