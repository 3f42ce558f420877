//! Steps and pauses as people write them: `5:10m,50:hold,100`.

use scheduler_core::deploy::{Form, Pause, Step, Strategy};

use crate::duration;

/// A pause, in a type that clap can keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PauseArg(Pause);

/// How long a canary is watched.
const CANARY_MS: u64 = 5 * 60_000;
/// How long the previous pods stand by after a switch.
const SWITCHED_MS: u64 = 60_000;

/// `none`, `hold`, or a time.
pub(super) fn pause(text: &str) -> Result<PauseArg, String> {
    read_pause(text).map(PauseArg)
}

fn read_pause(text: &str) -> Result<Pause, String> {
    match text {
        "none" => Ok(Pause::None),
        "hold" => Ok(Pause::Hold),
        time => {
            let time = duration::parse(time).map_err(|error| format!("{error}; or hold, or none"))?;
            Ok(Pause::For(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)))
        }
    }
}

/// What was written, or what the strategy is for.
pub(super) fn usual_pause(strategy: Strategy, given: Option<PauseArg>) -> Pause {
    let usual = match strategy {
        Strategy::Rolling | Strategy::AllAtOnce => Pause::None,
        Strategy::Canary => Pause::For(CANARY_MS),
        Strategy::BlueGreen => Pause::For(SWITCHED_MS),
    };
    given.map_or(usual, |PauseArg(pause)| pause)
}

/// Reads `5:10m,50:hold,100`; 100 at the end may be left out.
pub(super) fn parse(text: &str) -> Result<Vec<Step>, String> {
    let mut steps = text.split(',').map(step).collect::<Result<Vec<Step>, String>>()?;
    if steps.last().is_some_and(|last| last.percent < 100) {
        steps.push(Step { percent: 100, form: Form::Split, pause: Pause::None });
    }
    Ok(steps)
}

fn step(text: &str) -> Result<Step, String> {
    let (percent, pause) = text.split_once(':').unwrap_or((text, "none"));
    let wrong = || format!("--steps: `{text}` is not a step: write 20, 20:10m or 20:hold");
    let percent = percent.trim().trim_end_matches('%').parse().map_err(|_| wrong())?;
    Ok(Step { percent, form: Form::Split, pause: read_pause(pause.trim()).map_err(|_| wrong())? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read() {
        let step = |percent, pause| Step { percent, form: Form::Split, pause };
        assert_eq!(
            parse("5:10m, 50%:hold"),
            Ok(vec![step(5, Pause::For(600_000)), step(50, Pause::Hold), step(100, Pause::None)])
        );
        assert_eq!(parse("100"), Ok(vec![step(100, Pause::None)]));
        for wrong in ["", "x", "5:", "5:x", "5,,9", "-5"] {
            assert!(parse(wrong).unwrap_err().contains("is not a step"), "{wrong}");
        }
    }
}
