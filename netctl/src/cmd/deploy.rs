//! `netctl deploy`: brings a job to its next version by steps, and steers that.

mod follow;
mod steps;

use std::{fmt, path::PathBuf, time::Duration};

use clap::{Subcommand, ValueEnum};
use hextet_api::v1;
use scheduler::convert;
use scheduler_core::deploy::{OnFailure, Schedule, Strategy};
use serde::Serialize;

use super::WrongUse;
use crate::{
    client::{Client, ServerArgs, request},
    duration, job_file,
    print::{self, Format},
};

/// Bring a job to its next version by steps, each behind a gate
///
/// The server makes pods of the next version step by step, and passes a step when all of them have run for a while
/// without a failure. A step that fails is left and tried again, after waits that double; one that fails too often
/// brings the previous version back. The command follows until the end, and fails unless the version was promoted; the
/// server goes on without it.
///
/// Strategies: `rolling` (20, 40, 60, 80, 100 %), `canary` (10 % watched for 5m, then all), `blue-green` (all new pods
/// beside the others, then all connections at once; those before stand by for 1m), `all-at-once`.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "\
Examples:
  netctl deploy -f shop.yaml --strategy canary -m 'new checkout'
  netctl deploy -f shop.yaml --steps 5:10m,50:hold,100
  netctl deploy -f agent.yaml --in-place --steps 5:1m,25,100
  netctl deploy resume shop
  netctl deploys"
)]
pub(super) struct Args {
    #[command(subcommand)]
    order: Option<OrderCommand>,
    #[command(flatten)]
    start: StartArgs,
}

#[derive(Debug, clap::Args)]
struct StartArgs {
    /// The file with the job, or - for standard input
    #[arg(short, long, value_name = "FILE", required = true)]
    file: Option<PathBuf>,
    /// How it goes about it: rolling, canary, blue-green or all-at-once
    #[arg(long, value_name = "STRATEGY", default_value = "rolling", hide_possible_values = true)]
    strategy: StrategyArg,
    /// Steps of one's own, PERCENT, PERCENT:TIME or PERCENT:hold, for rolling and canary
    #[arg(long, value_name = "STEP,...")]
    steps: Option<String>,
    /// What the usual steps wait for before they go on, besides their gates: a time, none, or hold
    #[arg(long, value_name = "TIME", conflicts_with = "steps", value_parser = steps::pause)]
    pause: Option<steps::PauseArg>,
    /// Pods restart with the new tasks where they are, keep their addresses, and none is made beside them; for rolling, canary
    /// and all-at-once
    #[arg(long)]
    in_place: bool,
    /// How long the new pods have to run without a failure before others stop
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration::parse)]
    healthy_for: Duration,
    /// How long it may take until they all run
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration::parse)]
    timeout: Duration,
    /// How often steps that fail are tried again, all together
    #[arg(long, value_name = "NUMBER", default_value_t = 2)]
    retries: u32,
    /// How long after the first failure; doubled after each
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration::parse)]
    retry_after: Duration,
    /// What happens then: rollback, or hold until somebody says what
    #[arg(long, value_name = "WHAT", default_value = "rollback", hide_possible_values = true)]
    on_failure: OnFailureArg,
    /// Why; kept with the revision
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    /// Do not follow
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Subcommand)]
enum OrderCommand {
    /// Go on with a deploy that is held, stuck, or waits for its next attempt
    Resume(OrderArgs),
    /// Go back to the previous version
    Abort(AbortArgs),
    /// Take a deploy that has ended off the list
    Ack(AckArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl deploy resume shop -m 'looks good'")]
struct OrderArgs {
    /// The job, or JOB@VERSION as `netctl deploys` lists it
    #[arg(value_name = "JOB[@VERSION]")]
    deploy: String,
    /// Why; kept with the revision
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl deploy ack shop@4 -m 'seen; a ticket is open'")]
struct AckArgs {
    #[command(flatten)]
    order: OrderArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl deploy abort shop -m 'error rate'")]
struct AbortArgs {
    /// At once, in place: the new pods are given the previous tasks without waiting for others
    #[arg(long)]
    now: bool,
    #[command(flatten)]
    order: OrderArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StrategyArg {
    Rolling,
    Canary,
    BlueGreen,
    AllAtOnce,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnFailureArg {
    Rollback,
    Hold,
}

/// What became of an order.
#[derive(Debug, Serialize)]
struct Steered {
    deploy: String,
    done: &'static str,
    revision: u64,
}

impl fmt::Display for Steered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "deploy {} {} (revision {})", self.deploy, self.done, self.revision)
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    use v1::DeployOrder::{Abort, AbortNow, Acknowledge, Resume};
    match args.order {
        None => start(args.start, format).await,
        Some(OrderCommand::Resume(args)) => steer(args, Resume, "resumed", format).await,
        Some(OrderCommand::Ack(AckArgs { order })) => steer(order, Acknowledge, "acknowledged", format).await,
        Some(OrderCommand::Abort(AbortArgs { now: true, order })) => {
            steer(order, AbortNow, "aborted", format).await
        }
        Some(OrderCommand::Abort(AbortArgs { order, .. })) => steer(order, Abort, "goes back", format).await,
    }
}

async fn steer(
    args: OrderArgs,
    order: v1::DeployOrder,
    done: &'static str,
    format: Format,
) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let deploy = args.deploy.strip_prefix("job/").unwrap_or(&args.deploy).to_owned();
    let message = v1::SteerDeployRequest { deploy, order: order.into(), message: args.message };
    let answer = client.answer(client.cluster().steer_deploy(request(message))).await?;
    let steered = Steered { deploy: answer.deploy, done, revision: answer.revision };
    print::to_stdout(|out| print::one(out, format, &steered))
}

async fn start(args: StartArgs, format: Format) -> anyhow::Result<()> {
    let schedule = schedule(&args)?;
    let file = args.file.as_deref().ok_or_else(|| WrongUse("--file is missing".to_owned()))?;
    let mut jobs = job_file::read(file)?;
    let (Some(job), true) = (jobs.pop(), jobs.is_empty()) else {
        let text = format!("{} has several jobs; one is deployed at a time", file.display());
        return Err(WrongUse(text).into());
    };
    let client = Client::connect(&args.server).await?;
    let message = v1::StartDeployRequest {
        job: Some(convert::job_to_message(&job)),
        schedule: Some(convert::schedule_to_message(&schedule)),
        message: args.message,
    };
    let answer = client.answer(client.cluster().start_deploy(request(message))).await?;
    let deploy = answer.deploy.unwrap_or_default();
    follow::begun(&deploy, args.detach, format)?;
    if args.detach { Ok(()) } else { follow::follow(&args.server, client, deploy, format).await }
}

fn schedule(args: &StartArgs) -> anyhow::Result<Schedule> {
    let strategy = match args.strategy {
        StrategyArg::Rolling => Strategy::Rolling,
        StrategyArg::Canary => Strategy::Canary,
        StrategyArg::BlueGreen => Strategy::BlueGreen,
        StrategyArg::AllAtOnce => Strategy::AllAtOnce,
    };
    let steps = match (&args.steps, strategy) {
        (None, _) => Schedule::steps_of(strategy, steps::usual_pause(strategy, args.pause)),
        (Some(text), Strategy::Rolling | Strategy::Canary) => steps::parse(text).map_err(WrongUse)?,
        (Some(_), _) => return Err(WrongUse(format!("--steps: {strategy} has its own")).into()),
    };
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let schedule = Schedule {
        strategy,
        steps,
        healthy_for_ms: ms(args.healthy_for),
        timeout_ms: ms(args.timeout),
        retries: args.retries,
        retry_after_ms: ms(args.retry_after),
        on_failure: match args.on_failure {
            OnFailureArg::Rollback => OnFailure::Rollback,
            OnFailureArg::Hold => OnFailure::Hold,
        },
        in_place: args.in_place,
    };
    schedule.check().map_err(|error| WrongUse(format!("--{error}")))?;
    Ok(schedule)
}

#[cfg(test)]
mod tests {
    use scheduler_core::deploy::Pause;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parsed(line: &str) -> Result<Args, clap::Error> {
        use clap::Parser as _;
        Ok(Line::try_parse_from(line.split(' '))?.args)
    }

    fn made(line: &str) -> Result<Schedule, String> {
        let args = parsed(line).map_err(|error| error.to_string())?;
        schedule(&args.start).map_err(|error| error.to_string())
    }

    #[test]
    fn strategies_have_their_usual_steps() {
        let percents =
            |line| -> Vec<u32> { made(line).unwrap().steps.iter().map(|step| step.percent).collect() };
        assert_eq!(percents("deploy -f x"), [20, 40, 60, 80, 100]);
        assert_eq!(percents("deploy -f x --strategy canary"), [10, 100]);
        assert_eq!(percents("deploy -f x --strategy blue-green"), [100, 100, 100]);
        assert_eq!(percents("deploy -f x --strategy all-at-once"), [100]);
        let pause = |line| made(line).unwrap().steps[0].pause;
        assert_eq!(pause("deploy -f x --strategy canary"), Pause::For(300_000));
        assert_eq!(pause("deploy -f x --strategy canary --pause hold"), Pause::Hold);
        assert_eq!(pause("deploy -f x"), Pause::None);
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let refused = |line| made(line).unwrap_err();
        assert_eq!(
            refused("deploy -f x --steps 50,20,100"),
            "--steps: percentages grow from step to step, from 1 to 100, and 20 does not"
        );
        assert_eq!(
            refused("deploy -f x --strategy blue-green --steps 50"),
            "--steps: blue-green has its own"
        );
        assert_eq!(
            refused("deploy -f x --strategy blue-green --in-place"),
            "--in-place: blue-green has all pods of the next version stand by beside the others"
        );
        assert_eq!(refused("deploy -f x --retries 21"), "--retries: 21 are more than 20");
        assert_eq!(refused("deploy -f x --timeout 0s"), "--timeout: it has to be more than nothing");
    }

    #[test]
    fn orders_need_no_file_and_a_start_does() {
        assert!(parsed("deploy resume shop").unwrap().order.is_some());
        assert!(parsed("deploy abort shop --now").unwrap().order.is_some());
        assert!(parsed("deploy").is_err());
        assert!(parsed("deploy -f x resume shop").is_err());
    }
}
