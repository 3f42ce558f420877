//! `netctl why`: why a pod is as it is, from its graph of steps; why one is gone, from the history.

use std::fmt;

use hextet_api::v1;
use hextet_lifecycle::{Chain, StepStatus, pod::RUNNING, status::time};
use serde::Serialize;

use super::now_unix_ms;
use crate::{
    client::{Client, ServerArgs},
    print::{self, Format},
};

mod gone;
mod sentence;

use self::{
    gone::{Ending, Gone},
    sentence::sentence,
};

/// Say why a pod is as it is
///
/// One sentence first. Then the chain of steps that held it up the longest: after @ when each began, counted from the
/// pod's first step on its node, after + how long it took. Then every step, with what it waits for, and last errors that were
/// not said before. For a pod without a place, why no node takes it. Of a pod that is gone, when and why it ended and what
/// came instead, as far as the history reaches. The last lines of what has failed are shown, 10 and 2 KiB at most.
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
    #[serde(skip_serializing_if = "Option::is_none")]
    gone: Option<Gone>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ending: Option<Ending>,
    /// Of a table.
    #[serde(skip)]
    width: usize,
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let pod = args.pod.strip_prefix("pod/").unwrap_or(&args.pod).to_owned();
    let answer = client.answer(client.cluster().explain_pod(v1::ExplainPodRequest { pod })).await?;
    let explanation = Explanation { width: print::line_width(), ..Explanation::of(answer, now_unix_ms()) };
    print::to_stdout(|out| print::one(out, format, &explanation))
}

impl Explanation {
    fn of(answer: v1::ExplainPodResponse, now: u64) -> Explanation {
        let pod = answer.pod.unwrap_or_default();
        let steps: Vec<StepStatus> = answer.steps.into_iter().map(step).collect();
        let node_error = Some(answer.node_error).filter(|error| !error.is_empty());
        let gone = answer.gone.map(|gone| Gone::new(gone, now));
        Explanation {
            sentence: match &gone {
                Some(gone) => gone.sentence(&pod),
                None => sentence(&pod, &steps, node_error.as_deref()),
            },
            phase: if gone.is_some() { "gone" } else { super::pods::state(pod.phase()) }.to_owned(),
            pod: pod.id,
            node: Some(pod.node).filter(|node| !node.is_empty()),
            reasons: answer.reasons,
            node_error,
            steps,
            gone,
            ending: answer.ending.map(|ending| Ending::new(ending, now)),
            width: usize::MAX,
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

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What was said is not said again.
        let mut said = self.sentence.clone();
        writeln!(f, "{}", self.sentence)?;
        let unknown = self
            .node_error
            .iter()
            .map(|why| (why.clone(), format!("The steps of its node are not known: {why}")));
        let reasons = self.reasons.iter().filter(|_| self.node.is_none());
        for (what, line) in unknown.chain(reasons.map(|reason| (reason.clone(), format!("  {reason}")))) {
            if !said.contains(&what) {
                writeln!(f, "{line}")?;
                said.push_str(&what);
            }
        }
        if let Some(gone) = &self.gone {
            write!(f, "{gone}")?;
        }
        if self.steps.iter().any(|step| step.name == RUNNING) {
            write!(f, "\n{}", Chain::to(RUNNING, &self.steps))?;
        }
        self.table(f)?;
        self.errors(f, &said)?;
        self.outputs(f)
    }
}

impl Explanation {
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.steps.is_empty() {
            return Ok(());
        }
        let header = ["STEP", "OWNER", "STATE", "AT", "TOOK", "TRIES", "WAITS FOR"];
        let (mut table, rows) = (Vec::new(), self.steps.iter().map(row));
        print::narrow_table(&mut table, &header, &header[6..], rows, self.width).map_err(|_| fmt::Error)?;
        write!(f, "\n{}", String::from_utf8_lossy(&table))
    }

    /// The last error of each step, each once and none that was said.
    fn errors(&self, f: &mut fmt::Formatter<'_>, said: &str) -> fmt::Result {
        let mut errors: Vec<(&str, Vec<&str>)> = Vec::new();
        for step in &self.steps {
            let Some(error) = step.error.as_deref().filter(|error| !said.contains(error)) else { continue };
            match errors.iter_mut().find(|(known, _)| *known == error) {
                Some((_, steps)) => steps.push(&step.name),
                None => errors.push((error, vec![&step.name])),
            }
        }
        if !errors.is_empty() {
            writeln!(f, "\nLast errors:")?;
        }
        errors.into_iter().try_for_each(|(error, steps)| writeln!(f, "  {}: {error}", steps.join(", ")))
    }

    /// The last lines of what has failed: as its node has them, else as they were kept.
    fn outputs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut known = self.steps.iter().filter(|step| !step.output.is_empty()).peekable();
        if let (None, Some(ending)) = (known.peek(), &self.ending) {
            return write!(f, "\n{ending}");
        }
        known.try_for_each(|step| {
            writeln!(f, "\nThe last lines of {}:", step.name)?;
            write!(f, "{}", print::quoted(&step.output))
        })
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
    ]
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use hextet_api::v1::PodPhase;

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
        let node_error = node_error.into();
        let answer = v1::ExplainPodResponse { pod: Some(pod), steps, node_error, ..Default::default() };
        Explanation::of(answer, 0).to_string()
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

            STEP     OWNER  STATE    AT     TOOK  TRIES  WAITS FOR
            link     node   done     @0ms   42ms  -      -
            migrate  job    failed   @42ms  1.2s  2      -
            tasks    node   blocked  -      -     -      migrate
            running  node   blocked  -      -     -      tasks

            The last lines of migrate:
                | no such table
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

    /// It blamed the hook, which waits for the task that fails.
    #[test]
    fn what_waits_for_the_pod_to_run_is_not_why_it_does_not() {
        let failed = |name: &str, owner: &str, phase: &str, follows: &[&str]| v1::StepStatus {
            error: Some(format!("{name} exited")),
            ..message(name, owner, phase, 0, 7, follows)
        };
        let steps = vec![
            failed("tasks", "node", "retrying", &[]),
            failed("running", "node", "waiting", &["tasks"]),
            failed("tell", "job", "failed", &["running"]),
            failed("more", "job", "failed", &["tell"]),
        ];
        let text = explained(PodPhase::Failed, steps, "", "");
        assert!(text.starts_with("a-b-00000 does not run: step tasks has failed: tasks exited"), "{text}");
    }

    #[test]
    fn a_pod_that_runs_says_what_does_not_begin() {
        let steps = vec![message("running", "node", "done", 1_000, 0, &[])];
        let text = explained(PodPhase::Failed, steps, "", "the disk is full");
        assert!(
            text.contains("after its first step; version 0 does not begin: the disk is full\n"),
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
        assert_eq!(text.matches("node n1 is not attached").count(), 1, "{text}");
    }

    #[test]
    fn a_pod_without_a_place_says_why() {
        let text = explained(PodPhase::Pending, vec![], "", "no node has 64 GiB free");
        assert!(text.starts_with("a-b-00000 has no place: no node has 64 GiB free\n"), "{text}");
    }

    /// It said one reason in the sentence, in the graph and in the table.
    #[test]
    fn each_reason_is_said_once() {
        let why = "task web: exited with status 3 after 0.1 s";
        let failed = |name: &str, phase: &str, error: &str| v1::StepStatus {
            error: Some(error.into()),
            ..message(name, "node", phase, 0, 7, &[])
        };
        let steps = vec![
            failed("link", "done", "no veth"),
            failed("routes", "done", "no veth"),
            failed("tasks", "retrying", why),
            message("running", "node", "waiting", 7, 0, &["tasks"]),
        ];
        let text = explained(PodPhase::Failed, steps, "", why);
        assert_eq!(text.matches("exited with status 3").count(), 1, "{text}");
        assert!(text.ends_with("\nLast errors:\n  link, routes: no veth\n"), "{text}");
    }

    #[test]
    fn a_table_is_no_wider_than_it_may_be() {
        let waits = v1::StepStatus {
            waits_for: (0..20).map(|n| format!("hook-{n}")).collect(),
            ..message("tasks", "node", "waiting", 0, 7, &[])
        };
        let answer = v1::ExplainPodResponse { steps: vec![waits], ..Default::default() };
        let mut explanation = Explanation::of(answer, 0);
        let line = |explanation: &Explanation| explanation.to_string().lines().last().unwrap().to_owned();
        assert!(line(&explanation).ends_with("hook-19"), "nothing is cut without a terminal");
        explanation.width = 80;
        assert_eq!(line(&explanation).chars().count(), 80);
    }
}
