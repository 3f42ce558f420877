//! `netctl why`: why a pod is as it is, from its graph of steps.

use std::fmt;

use hextet_api::v1::{self, PodPhase};
use hextet_lifecycle::{
    Chain, Phase, StepStatus,
    pod::{HOOKS, RUNNING},
    status::time,
};
use serde::Serialize;

use crate::{
    client::{Client, ServerArgs},
    print::{self, Format},
};

/// Say why a pod is as it is
///
/// One sentence first. Then the chain of steps that held it up the longest: after @ when each began, counted from the
/// pod's first step on its node, after + how long it took. Then every step, with what it waits for and its last error.
/// For a pod without a place, why no node takes it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl why pod/hello-web-x7k2p")]
pub(super) struct Args {
    /// POD or pod/POD, as `netctl pods` lists it
    pod: String,
    #[command(flatten)]
    server: ServerArgs,
}

/// Everything that is known of why a pod is as it is.
#[derive(Debug, Serialize)]
struct Explanation {
    pod: String,
    phase: String,
    node: Option<String>,
    sentence: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_error: Option<String>,
    steps: Vec<StepStatus>,
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let pod = args.pod.strip_prefix("pod/").unwrap_or(&args.pod).to_owned();
    let answer = client.answer(client.cluster().explain_pod(v1::ExplainPodRequest { pod })).await?;
    let explanation = Explanation::of(answer);
    print::to_stdout(|out| print::one(out, format, &explanation))
}

impl Explanation {
    fn of(answer: v1::ExplainPodResponse) -> Explanation {
        let pod = answer.pod.unwrap_or_default();
        let steps: Vec<StepStatus> = answer.steps.into_iter().map(step).collect();
        let node_error = Some(answer.node_error).filter(|error| !error.is_empty());
        Explanation {
            sentence: sentence(&pod, &steps, node_error.as_deref()),
            phase: super::pods::state(pod.phase()).to_owned(),
            pod: pod.id,
            node: Some(pod.node).filter(|node| !node.is_empty()),
            reasons: answer.reasons,
            node_error,
            steps,
        }
    }
}

/// A step from its message; what this netctl does not know of is waiting.
fn step(message: v1::StepStatus) -> StepStatus {
    let phase = serde_json::from_value(message.phase.into()).unwrap_or_default();
    StepStatus {
        name: message.name,
        owner: message.owner,
        phase,
        optional: message.optional,
        at_ms: message.at_ms,
        took_ms: message.took_ms,
        ended_ms_ago: message.ended_ms_ago,
        retry_in_ms: message.retry_in_ms,
        attempts: message.attempts,
        error: message.error,
        follows: message.follows,
        waits_for: message.waits_for,
        output: message.output,
    }
}

/// Why the pod does not run, or that it does.
fn sentence(pod: &v1::Pod, steps: &[StepStatus], node_error: Option<&str>) -> String {
    let id = &pod.id;
    let find = |name: &str| steps.iter().find(|step| step.name == name);
    match pod.phase() {
        PodPhase::Pending => format!("{id} has no place: {}", pod.message),
        PodPhase::Lost => format!("{id} is lost: {}", pod.message),
        PodPhase::Terminating => match steps.iter().find(|step| step.phase == Phase::Stopping) {
            Some(step) => format!("{id} ends: {} is being undone{}", step.name, since(step)),
            None => format!("{id} ends: {}", pod.message),
        },
        _ => match (culprit(steps), find(RUNNING)) {
            (None, _) if pod.standby && pod.phase() == PodPhase::Running => standing_by(pod, find(RUNNING)),
            (_, Some(running)) if running.phase == Phase::Done => {
                let since = time(running.ended_ms_ago.unwrap_or(0));
                format!("{id} runs since {since}{}{}", after(running), but(steps))
            }
            (Some(step), _) => format!("{id} does not run: {}{}", words(step), waiting(step, steps)),
            (None, _) if pod.phase() == PodPhase::Running => {
                format!("{id} runs, by its node's last report{}", unknown(node_error))
            }
            (None, _) if pod.message.is_empty() => {
                format!("{id} does not run yet{}", unknown(node_error))
            }
            (None, _) => format!("{id} does not run: {}{}", pod.message, unknown(node_error)),
        },
    }
}

fn standing_by(pod: &v1::Pod, running: Option<&StepStatus>) -> String {
    let v1::Pod { id, job, group, job_version, .. } = pod;
    let since = running.and_then(|running| running.ended_ms_ago);
    let since = since.map(|ms| format!(" since {}", time(ms))).unwrap_or_default();
    format!(
        "{id} stands by for version {job_version} of {job}/{group}: it runs{since}, and load balancers are told of it only \
         when the rollout switches to that version"
    )
}

fn unknown(node_error: Option<&str>) -> String {
    node_error.map(|why| format!(" ({why})")).unwrap_or_default()
}

/// What holds the pod up: what has failed, else what is under way.
fn culprit(steps: &[StepStatus]) -> Option<&StepStatus> {
    let chain =
        |phase| steps.iter().find(|step| step.phase == phase && !step.optional && step.owner != "server");
    chain(Phase::Failed).or_else(|| chain(Phase::Retrying)).or_else(|| chain(Phase::Running))
}

/// What a pod that runs goes on without.
fn but(steps: &[StepStatus]) -> String {
    let is_users = |step: &&StepStatus| ["job", "operator"].contains(&step.owner.as_str());
    let failed = steps.iter().filter(is_users).find(|step| step.phase == Phase::Failed);
    failed.map(|step| format!("; it goes on, but {}", words(step))).unwrap_or_default()
}

/// Whether it is a program that follows events: no part of the graph.
fn is_script(step: &StepStatus) -> bool {
    step.follows.is_empty() && ["job", "operator"].contains(&step.owner.as_str())
}

fn words(step: &StepStatus) -> String {
    let what = match step.owner.as_str() {
        "operator" if step.name == HOOKS => "the check that its hooks fit each other".to_owned(),
        "job" | "operator" if is_script(step) => format!("the {}'s script {}", step.owner, step.name),
        "job" | "operator" => format!("the {}'s hook {}", step.owner, step.name),
        _ => format!("step {}", step.name),
    };
    let error = step.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
    match step.phase {
        Phase::Failed if is_script(step) => format!("{what} has failed when it ran last{error}"),
        Phase::Failed => format!("{what} has failed for good after {}{error}", attempts(step)),
        Phase::Retrying => {
            let next =
                step.retry_in_ms.map(|ms| format!(", tried again in {}", time(ms))).unwrap_or_default();
            format!("{what} has failed{error} ({}{next})", attempts(step))
        }
        _ => format!("{what} is under way{}{error}", since(step)),
    }
}

fn attempts(step: &StepStatus) -> String {
    match step.attempts {
        1 => "1 attempt".to_owned(),
        attempts => format!("{attempts} attempts"),
    }
}

fn since(step: &StepStatus) -> String {
    step.took_ms.map(|took| format!(" since {}", time(took))).unwrap_or_default()
}

fn after(running: &StepStatus) -> String {
    running.at_ms.map(|at| format!(", {} after its first step", time(at))).unwrap_or_default()
}

/// Who waits for the step.
fn waiting(step: &StepStatus, steps: &[StepStatus]) -> String {
    let waits = |other: &&StepStatus| other.waits_for.contains(&step.name);
    let names: Vec<&str> = steps.iter().filter(waits).map(|other| other.name.as_str()).collect();
    if names.is_empty() { String::new() } else { format!("; {} wait for it", names.join(", ")) }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.sentence)?;
        if let Some(why) = &self.node_error {
            writeln!(f, "The steps of its node are not known: {why}")?;
        }
        for reason in self.reasons.iter().filter(|_| self.node.is_none()) {
            writeln!(f, "  {reason}")?;
        }
        if self.steps.iter().any(|step| step.name == RUNNING) {
            write!(f, "\n{}", Chain::to(RUNNING, &self.steps))?;
        }
        let mut table = Vec::new();
        let rows = self.steps.iter().map(row);
        print::table(
            &mut table,
            &["STEP", "OWNER", "STATE", "AT", "TOOK", "TRIES", "WAITS FOR", "LAST ERROR"],
            rows,
        )
        .map_err(|_| fmt::Error)?;
        write!(f, "\n{}", String::from_utf8_lossy(&table))?;
        for step in self.steps.iter().filter(|step| !step.output.is_empty()) {
            writeln!(f, "\nThe last lines of {}:", step.name)?;
            step.output.lines().try_for_each(|line| writeln!(f, "  {line}"))?;
        }
        Ok(())
    }
}

fn row(step: &StepStatus) -> Vec<String> {
    let state = match (step.phase, step.optional) {
        (phase, true) => format!("{phase} (optional)"),
        (phase, false) => phase.to_string(),
    };
    let tries = if step.attempts > 1 { step.attempts.to_string() } else { String::new() };
    vec![
        step.name.clone(),
        step.owner.clone(),
        state,
        step.at_ms.map(|at| format!("@{}", time(at))).unwrap_or_default(),
        step.took_ms.map(time).unwrap_or_default(),
        tries,
        step.waits_for.join(", "),
        step.error.clone().unwrap_or_default(),
    ]
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn message(
        name: &str,
        owner: &str,
        phase: &str,
        at_ms: u64,
        took_ms: u64,
        follows: &[&str],
    ) -> v1::StepStatus {
        v1::StepStatus {
            name: name.into(),
            owner: owner.into(),
            phase: phase.into(),
            at_ms: Some(at_ms),
            took_ms: Some(took_ms),
            ended_ms_ago: Some(90_000),
            attempts: 1,
            follows: follows.iter().map(|name| (*name).into()).collect(),
            ..v1::StepStatus::default()
        }
    }

    fn explained(phase: PodPhase, steps: Vec<v1::StepStatus>, node_error: &str, message: &str) -> String {
        let pod = v1::Pod {
            id: "a-b-00000".into(),
            node: "n1".into(),
            phase: phase.into(),
            message: message.into(),
            ..v1::Pod::default()
        };
        let answer =
            v1::ExplainPodResponse { pod: Some(pod), steps, node_error: node_error.into(), reasons: vec![] };
        Explanation::of(answer).to_string()
    }

    #[test]
    fn a_pod_that_stands_by_says_so_and_for_what() {
        let mut pod = v1::Pod {
            id: "a-b-00000".into(),
            job: "a".into(),
            group: "b".into(),
            job_version: 4,
            phase: PodPhase::Running.into(),
            standby: true,
            ..v1::Pod::default()
        };
        let steps = [step(message("running", "node", "done", 0, 42, &[]))];
        expect!["a-b-00000 stands by for version 4 of a/b: it runs since 1min 30s, and load balancers are told of it only when the rollout switches to that version"]
            .assert_eq(&sentence(&pod, &steps, None));
        pod.standby = false;
        assert!(sentence(&pod, &steps, None).starts_with("a-b-00000 runs since "));
    }

    #[test]
    fn a_failed_hook_is_named_with_who_waits_for_it() {
        let blocked = |name: &str, follows: &[&str], waits: &str| v1::StepStatus {
            at_ms: None,
            took_ms: None,
            waits_for: vec![waits.into()],
            ..message(name, "node", "blocked", 0, 0, follows)
        };
        let steps = vec![
            message("link", "node", "done", 0, 42, &[]),
            v1::StepStatus {
                error: Some("exited with status 3".into()),
                attempts: 2,
                output: "no such table".into(),
                ..message("migrate", "job", "failed", 42, 1_200, &["link"])
            },
            blocked("tasks", &["link", "migrate"], "migrate"),
            blocked("running", &["tasks"], "tasks"),
        ];
        expect![[r#"
            a-b-00000 does not run: the job's hook migrate has failed for good after 2 attempts: exited with status 3; tasks wait for it

            running blocked
            └─tasks blocked
              └─migrate @42ms +1.2s failed  <- the long pole
                └─link @0ms +42ms

            STEP     OWNER  STATE    AT     TOOK  TRIES  WAITS FOR  LAST ERROR
            link     node   done     @0ms   42ms  -      -          -
            migrate  job    failed   @42ms  1.2s  2      -          exited with status 3
            tasks    node   blocked  -      -     -      migrate    -
            running  node   blocked  -      -     -      tasks      -

            The last lines of migrate:
              no such table
        "#]]
        .assert_eq(&explained(PodPhase::Failed, steps, "", ""));
    }

    #[test]
    fn a_pod_that_runs_says_since_when() {
        let steps = vec![
            message("tasks", "node", "done", 100, 900, &[]),
            message("running", "node", "done", 1_000, 0, &["tasks"]),
        ];
        let text = explained(PodPhase::Running, steps, "", "");
        assert!(text.starts_with("a-b-00000 runs since 1min 30s, 1.0s after its first step\n"), "{text}");
    }

    /// It said of a pod that ran that it did not.
    #[test]
    fn a_pod_that_runs_without_a_hook_that_has_failed_says_both() {
        let failed = |name: &str, follows: &[&str]| v1::StepStatus {
            optional: true,
            error: Some("exited with status 9".into()),
            ..message(name, "job", "failed", 0, 7, follows)
        };
        let running = || message("running", "node", "done", 1_000, 0, &["tasks"]);
        let told = |step| explained(PodPhase::Running, vec![running(), step], "", "");
        let text = told(failed("chk", &["networking"]));
        let hook = "; it goes on, but the job's hook chk has failed for good after 1 attempt: exited with status 9\n";
        assert!(
            text.contains(&format!("a-b-00000 runs since 1min 30s, 1.0s after its first step{hook}")),
            "{text}"
        );
        let text = told(failed("tell", &[]));
        assert!(
            text.contains("but the job's script tell has failed when it ran last: exited with status 9\n"),
            "{text}"
        );
    }

    #[test]
    fn a_node_that_does_not_answer_is_no_error() {
        let text = explained(PodPhase::Running, vec![], "node n1 is not attached", "");
        assert!(
            text.starts_with("a-b-00000 runs, by its node's last report (node n1 is not attached)\n"),
            "{text}"
        );
        assert!(text.contains("The steps of its node are not known: node n1 is not attached"));
    }

    #[test]
    fn a_pod_without_a_place_says_why() {
        let text = explained(PodPhase::Pending, vec![], "", "no node has 64 GiB free");
        assert!(text.starts_with("a-b-00000 has no place: no node has 64 GiB free\n"), "{text}");
    }
}
