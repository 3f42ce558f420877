//! One sentence: why a pod does not run, or that it does.

use hextet_api::v1::{self, PodPhase};
use hextet_lifecycle::{
    Phase, StepStatus,
    pod::{HOOKS, RUNNING},
    status::time,
};

/// Why the pod does not run, or that it does.
pub(super) fn sentence(pod: &v1::Pod, steps: &[StepStatus], node_error: Option<&str>) -> String {
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
                format!("{id} runs since {since}{}{}{}", after(running), but(steps), not_yet(pod))
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

/// What holds the pod up: what has failed, else what is under way. Nothing that itself waits for the pod to run.
fn culprit(steps: &[StepStatus]) -> Option<&StepStatus> {
    let in_the_way =
        |step: &&StepStatus| !step.optional && step.owner != "server" && !comes_after(step, steps);
    let chain = |phase| steps.iter().filter(in_the_way).find(|step| step.phase == phase);
    chain(Phase::Failed).or_else(|| chain(Phase::Retrying)).or_else(|| chain(Phase::Running))
}

/// Whether the step follows `running`, itself or by way of others: a graph has no cycles.
fn comes_after(step: &StepStatus, steps: &[StepStatus]) -> bool {
    let earlier = |name: &String| steps.iter().find(|other| other.name == *name);
    let is_after =
        |name: &String| name == RUNNING || earlier(name).is_some_and(|other| comes_after(other, steps));
    step.follows.iter().any(is_after)
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

/// What of a pod that runs does not begin.
fn not_yet(pod: &v1::Pod) -> String {
    match pod.phase() {
        PodPhase::Failed if !pod.message.is_empty() => {
            format!("; version {} does not begin: {}", pod.job_version, pod.message)
        }
        _ => String::new(),
    }
}

/// Who waits for the step.
fn waiting(step: &StepStatus, steps: &[StepStatus]) -> String {
    let waits = |other: &&StepStatus| other.waits_for.contains(&step.name);
    let names: Vec<&str> = steps.iter().filter(waits).map(|other| other.name.as_str()).collect();
    if names.is_empty() { String::new() } else { format!("; {} wait for it", names.join(", ")) }
}
