//! `netctl deploys`: lists deploys, and keeps those that gave up before everybody's eyes.

use hextet_api::v1::{self, DeployForm, DeployStage, DeployStrategy};
use serde::Serialize;

use super::{age, now_unix_ms};
use crate::{
    client::{Client, ServerArgs, request},
    duration,
    print::{self, Format, Row},
    unreadable,
};

/// List deploys: those under way, the last of each job, and those that gave up
///
/// One that gave up stays until `netctl deploy ack`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  netctl deploys\n  netctl deploys shop@4 -o json")]
pub(super) struct Args {
    /// Only of this job, or only this one
    #[arg(value_name = "JOB[@VERSION]", default_value = "", hide_default_value = true)]
    deploy: String,
    #[command(flatten)]
    server: ServerArgs,
}

/// A deploy, as it is printed.
#[derive(Debug, Serialize)]
pub(super) struct DeployRow {
    deploy: String,
    job: String,
    previous: u32,
    next: u32,
    pub(super) strategy: &'static str,
    pub(super) step: String,
    pub(super) stage: &'static str,
    failures: u32,
    new_running: u32,
    new_wanted: u32,
    others: u32,
    reason: String,
    /// The last lines of what has failed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) output: String,
    waits_for: String,
    left_ms: Option<u64>,
    changer: String,
    begun_unix_ms: u64,
    ended_unix_ms: Option<u64>,
    #[serde(skip)]
    age: String,
}

impl Row for DeployRow {
    const HEADER: &'static [&'static str] =
        &["DEPLOY", "FROM", "STRATEGY", "STEP", "STAGE", "NEW", "OTHERS", "AGE", "CHANGER"];
    const TEXT: &'static [&'static str] = &["CHANGER"];

    fn cells(&self) -> Vec<String> {
        let is_over = self.ended_unix_ms.is_some();
        let number = |text: String| if is_over { String::new() } else { text };
        vec![
            self.deploy.clone(),
            self.previous.to_string(),
            self.strategy.to_owned(),
            self.step.clone(),
            self.stage.to_owned(),
            number(format!("{}/{}", self.new_running, self.new_wanted)),
            number(self.others.to_string()),
            self.age.clone(),
            self.changer.clone(),
        ]
    }
}

impl DeployRow {
    pub(super) fn new(deploy: v1::Deploy, now_unix_ms: u64) -> DeployRow {
        let stage = deploy.stage();
        let schedule = deploy.schedule.unwrap_or_default();
        DeployRow {
            strategy: strategy(schedule.strategy()),
            step: step(&schedule, deploy.step),
            stage: stage_word(stage),
            age: age(deploy.begun_unix_ms, now_unix_ms),
            deploy: deploy.id,
            job: deploy.job,
            previous: deploy.previous,
            next: deploy.next,
            failures: deploy.failures,
            new_running: deploy.new_running,
            new_wanted: deploy.new_wanted,
            others: deploy.others,
            reason: deploy.reason,
            output: deploy.output,
            waits_for: deploy.waits_for,
            left_ms: deploy.left_ms,
            changer: deploy.changer,
            begun_unix_ms: deploy.begun_unix_ms,
            ended_unix_ms: Some(deploy.ended_unix_ms).filter(|ended| *ended > 0),
        }
    }

    /// What is to be known or done about it.
    fn note(&self) -> Option<String> {
        let DeployRow { deploy, reason, waits_for, .. } = self;
        let left = self.left_ms.map(std::time::Duration::from_millis).map(duration::age);
        match (self.stage, left) {
            ("gave up", _) => Some(format!(
                "{deploy} gave up: {reason}; `netctl deploy ack {deploy}` takes it off the list"
            )),
            ("held" | "stuck", _) => Some(format!(
                "{deploy} is {}: {reason}; `netctl deploy resume {deploy}` or abort",
                self.stage
            )),
            ("growing" | "watching" | "going back", _) if !waits_for.is_empty() => {
                Some(format!("{deploy}: {waits_for}"))
            }
            ("growing" | "watching", Some(left)) => {
                Some(format!("{deploy}: its pods do well, and it goes on in {left}"))
            }
            ("waiting", Some(left)) => Some(format!("{deploy}: {reason}; it is tried again in {left}")),
            _ => None,
        }
    }
}

fn strategy(strategy: DeployStrategy) -> &'static str {
    match strategy {
        DeployStrategy::Unspecified => "unknown",
        DeployStrategy::Rolling => "rolling",
        DeployStrategy::Canary => "canary",
        DeployStrategy::BlueGreen => "blue-green",
        DeployStrategy::AllAtOnce => "all-at-once",
    }
}

fn stage_word(stage: DeployStage) -> &'static str {
    match stage {
        DeployStage::Unspecified => "unknown",
        DeployStage::Growing => "growing",
        DeployStage::Watching => "watching",
        DeployStage::Held => "held",
        DeployStage::Waiting => "waiting",
        DeployStage::Stuck => "stuck",
        DeployStage::GoingBack => "going back",
        DeployStage::Promoted => "promoted",
        DeployStage::Aborted => "aborted",
        DeployStage::GaveUp => "gave up",
    }
}

/// `1/5 20%`.
fn step(schedule: &v1::DeploySchedule, at: u32) -> String {
    let Some(step) = schedule.steps.get(at as usize) else { return String::new() };
    let form = match step.form() {
        DeployForm::Split => "",
        DeployForm::Standby => " standby",
        DeployForm::Switched => " switched",
    };
    format!("{}/{} {}%{form}", at + 1, schedule.steps.len(), step.percent)
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let deploy = args.deploy.strip_prefix("job/").unwrap_or(&args.deploy).to_owned();
    let message = v1::ListDeploysRequest { deploy };
    let answer = client.answer(client.cluster().list_deploys(request(message))).await?;
    unreadable::tell(&answer.unreadable);
    if answer.deploys.is_empty() && answer.unreadable.is_empty() && format == Format::Table {
        print::note("there are no deploys: `netctl deploy -f FILE` begins one");
        return Ok(());
    }
    let now = now_unix_ms();
    let rows: Vec<DeployRow> = answer.deploys.into_iter().map(|deploy| DeployRow::new(deploy, now)).collect();
    let notes: Vec<(String, String)> =
        rows.iter().filter_map(|row| Some((row.note()?, row.output.clone()))).collect();
    let lines = unreadable::lines(rows, answer.unreadable);
    print::list(format, &lines)?;
    if format == Format::Table {
        notes.iter().for_each(|(note, output)| print::note_with(note, output));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deploy(stage: DeployStage, reason: &str) -> v1::Deploy {
        let step = |percent| v1::DeployStep { percent, ..v1::DeployStep::default() };
        v1::Deploy {
            id: "shop@4".into(),
            job: "shop".into(),
            previous: 3,
            next: 4,
            schedule: Some(v1::DeploySchedule {
                strategy: DeployStrategy::Canary.into(),
                steps: vec![step(10), step(100)],
                ..v1::DeploySchedule::default()
            }),
            stage: stage.into(),
            new_running: 1,
            new_wanted: 2,
            others: 8,
            reason: reason.into(),
            changer: "user:alice".into(),
            begun_unix_ms: 1_000,
            ended_unix_ms: u64::from(stage == DeployStage::GaveUp) * 2_000,
            ..v1::Deploy::default()
        }
    }

    #[test]
    fn a_deploy_is_one_line() {
        let rows = [deploy(DeployStage::Watching, ""), deploy(DeployStage::GaveUp, "10 %: it failed")]
            .map(|deploy| DeployRow::new(deploy, 43_000));
        let mut out = Vec::new();
        print::rows(&mut out, Format::Table, &rows).unwrap();
        expect_test::expect![[r"
            DEPLOY  FROM  STRATEGY  STEP     STAGE     NEW  OTHERS  AGE  CHANGER
            shop@4  3     canary    1/2 10%  watching  1/2  8       42s  user:alice
            shop@4  3     canary    1/2 10%  gave up   -    -       42s  user:alice
        "]]
        .assert_eq(&String::from_utf8(out).unwrap());
    }

    #[test]
    fn what_is_to_be_done_is_said() {
        let note = |stage, reason| DeployRow::new(deploy(stage, reason), 0).note();
        assert_eq!(
            note(DeployStage::GaveUp, "10 %: it failed").unwrap(),
            "shop@4 gave up: 10 %: it failed; `netctl deploy ack shop@4` takes it off the list"
        );
        assert_eq!(note(DeployStage::Promoted, ""), None);
    }
}
