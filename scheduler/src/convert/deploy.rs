//! Deploys and their schedules.

use std::time::Duration;

use hextet_api::v1;
use scheduler_core::{
    deploy::{
        Deploy, Form, OnFailure, Outlook, Pause, Schedule, Stage, Step, Strategy,
        health::{self, Tally},
    },
    state::State,
};

use super::ConvertError;

/// A schedule as a message.
#[must_use]
pub fn schedule_to_message(schedule: &Schedule) -> v1::DeploySchedule {
    let strategy = match schedule.strategy {
        Strategy::Rolling => v1::DeployStrategy::Rolling,
        Strategy::Canary => v1::DeployStrategy::Canary,
        Strategy::BlueGreen => v1::DeployStrategy::BlueGreen,
        Strategy::AllAtOnce => v1::DeployStrategy::AllAtOnce,
    };
    v1::DeploySchedule {
        strategy: strategy.into(),
        steps: schedule.steps.iter().map(step_to_message).collect(),
        healthy_for_ms: schedule.healthy_for_ms,
        timeout_ms: schedule.timeout_ms,
        retries: schedule.retries,
        retry_after_ms: schedule.retry_after_ms,
        hold_on_failure: schedule.on_failure == OnFailure::Hold,
        in_place: schedule.in_place,
    }
}

/// A schedule from a message.
///
/// # Errors
/// Only what its form does not allow; [`Schedule::check`] checks the rest.
pub fn schedule_from_message(message: v1::DeploySchedule) -> Result<Schedule, ConvertError> {
    let strategy = match v1::DeployStrategy::try_from(message.strategy) {
        Ok(v1::DeployStrategy::Rolling) => Strategy::Rolling,
        Ok(v1::DeployStrategy::Canary) => Strategy::Canary,
        Ok(v1::DeployStrategy::BlueGreen) => Strategy::BlueGreen,
        Ok(v1::DeployStrategy::AllAtOnce) => Strategy::AllAtOnce,
        Ok(v1::DeployStrategy::Unspecified) => return Err(ConvertError::Missing("schedule.strategy")),
        Err(_) => {
            return Err(ConvertError::Unknown { field: "schedule.strategy", value: message.strategy });
        }
    };
    Ok(Schedule {
        strategy,
        steps: message.steps.into_iter().map(step_from_message).collect::<Result<_, _>>()?,
        healthy_for_ms: message.healthy_for_ms,
        timeout_ms: message.timeout_ms,
        retries: message.retries,
        retry_after_ms: message.retry_after_ms,
        on_failure: if message.hold_on_failure { OnFailure::Hold } else { OnFailure::Rollback },
        in_place: message.in_place,
    })
}

fn step_to_message(step: &Step) -> v1::DeployStep {
    let form = match step.form {
        Form::Split => v1::DeployForm::Split,
        Form::Standby => v1::DeployForm::Standby,
        Form::Switched => v1::DeployForm::Switched,
    };
    let (pause_ms, hold) = match step.pause {
        Pause::None => (0, false),
        Pause::For(ms) => (ms, false),
        Pause::Hold => (0, true),
    };
    v1::DeployStep { percent: step.percent, form: form.into(), pause_ms, hold }
}

fn step_from_message(message: v1::DeployStep) -> Result<Step, ConvertError> {
    let form = match v1::DeployForm::try_from(message.form) {
        Ok(v1::DeployForm::Split) => Form::Split,
        Ok(v1::DeployForm::Standby) => Form::Standby,
        Ok(v1::DeployForm::Switched) => Form::Switched,
        Err(_) => {
            return Err(ConvertError::Unknown { field: "schedule.steps.form", value: message.form });
        }
    };
    let pause = match (message.hold, message.pause_ms) {
        (true, _) => Pause::Hold,
        (false, 0) => Pause::None,
        (false, ms) => Pause::For(ms),
    };
    Ok(Step { percent: message.percent, form, pause })
}

/// How far a deploy is.
pub(crate) fn deploy(state: &State, deploy: &Deploy, outlook: Outlook) -> v1::Deploy {
    let stage = match deploy.stage {
        Stage::Growing => v1::DeployStage::Growing,
        Stage::Watching => v1::DeployStage::Watching,
        Stage::Held => v1::DeployStage::Held,
        Stage::Waiting => v1::DeployStage::Waiting,
        Stage::Stuck => v1::DeployStage::Stuck,
        Stage::GoingBack => v1::DeployStage::GoingBack,
        Stage::Promoted => v1::DeployStage::Promoted,
        Stage::Aborted => v1::DeployStage::Aborted,
        Stage::GaveUp => v1::DeployStage::GaveUp,
    };
    let Tally { running, wanted, others } =
        if deploy.stage.is_end() { Tally::default() } else { health::tally(state, deploy) };
    let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    v1::Deploy {
        id: deploy.id.to_string(),
        job: deploy.id.job.clone(),
        previous: deploy.previous,
        next: deploy.id.version,
        schedule: Some(schedule_to_message(&deploy.schedule)),
        step: number(deploy.step),
        stage: stage.into(),
        failures: deploy.failures,
        reason: deploy.reason.clone(),
        waits_for: outlook.what,
        left_ms: outlook.left.map(ms),
        new_running: number(running),
        new_wanted: number(wanted),
        others: number(others),
        changer: deploy.changer.clone(),
        begun_unix_ms: deploy.begun.0,
        ended_unix_ms: deploy.ended.map_or(0, |ended| ended.0),
        output: deploy.output.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_survives_the_contract() {
        for strategy in [Strategy::Rolling, Strategy::Canary, Strategy::BlueGreen, Strategy::AllAtOnce] {
            for pause in [Pause::None, Pause::For(5), Pause::Hold] {
                let schedule = Schedule {
                    strategy,
                    steps: Schedule::steps_of(strategy, pause),
                    healthy_for_ms: 1,
                    timeout_ms: 2,
                    retries: 3,
                    retry_after_ms: 4,
                    on_failure: OnFailure::Hold,
                    in_place: strategy != Strategy::BlueGreen,
                };
                assert_eq!(schedule.check(), Ok(()));
                assert_eq!(schedule_from_message(schedule_to_message(&schedule)), Ok(schedule));
            }
        }
    }
}
