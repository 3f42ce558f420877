//! A pod of this node, told event by event.

use std::collections::BTreeMap;

use hextet_lifecycle::{
    Hook,
    pod::{self, RUNNING},
};

use super::*;
use crate::supervisor::status::TaskStatus;

const NOW: Duration = Duration::from_secs(1);
/// Every retry is due.
const LATER: Duration = Duration::from_secs(1000);

fn status(tasks: &[(&str, TaskState)]) -> Status {
    let task = |state| TaskStatus { state, pid: None, restarts: 1, message: "exited with status 1".into() };
    Status {
        tasks: tasks.iter().map(|(name, state)| ((*name).into(), task(*state))).collect(),
        ..Status::default()
    }
}

fn running() -> Event {
    Event::Status(status(&[("web", TaskState::Running)]))
}

fn ready() -> Event {
    Event::NetworkReady(None)
}

fn failed(why: &str) -> Event {
    Event::NetworkFailed(Failure { has_link: false, why: why.into() })
}

fn graph(hooks: &str) -> Arc<Graph> {
    let hooks: BTreeMap<String, Hook> = serde_json::from_str(hooks).unwrap();
    Arc::new(pod::graph(&hooks, &BTreeMap::new()).unwrap())
}

/// A pod with its folders after `events`, and what the last of them asked for.
fn after(from_store: bool, events: Vec<Event>) -> (PodState, Vec<Action>) {
    with(graph("{}"), from_store, events)
}

fn with(graph: Arc<Graph>, from_store: bool, events: Vec<Event>) -> (PodState, Vec<Action>) {
    let (mut pod, mut actions) = PodState::begin(graph, from_store, &[], NOW);
    assert_eq!(actions, [Action::Reconcile, Action::MakeFolders]);
    pod.step(Event::Folders(Ok(())), NOW);
    for event in events {
        actions = pod.step(event, NOW);
    }
    (pod, actions)
}

fn phase(pod: &PodState) -> Option<Phase> {
    pod.report().map(|report| report.phase)
}

#[test]
fn a_supervisor_starts_only_when_network_and_folders_are_complete() {
    let (pod, actions) = after(false, vec![failed("no veth")]);
    assert_eq!(actions, []);
    assert_eq!(pod.report().unwrap().message, "no veth");
    let (pod, actions) = after(false, vec![failed("no veth"), ready()]);
    assert_eq!(actions, [Action::Supervise]);
    assert_eq!(phase(&pod), Some(Phase::Starting));

    let (mut pod, _) = PodState::begin(graph("{}"), false, &[], NOW);
    assert_eq!(pod.step(ready(), NOW), []);
    assert_eq!(pod.step(Event::Folders(Err("disk full".into())), NOW), []);
    assert_eq!(pod.report().unwrap().message, "disk full");
    assert_eq!(pod.step(Event::Tick, LATER), [Action::MakeFolders]);
    assert_eq!(pod.step(Event::Folders(Ok(())), LATER), [Action::Supervise]);
}

#[test]
fn a_network_that_is_checked_again_starts_nothing_again() {
    let (_, actions) = after(false, vec![ready(), running(), ready()]);
    assert_eq!(actions, []);
}

#[test]
fn a_pod_that_could_not_be_announced_starts_and_is_announced_later() {
    let (mut pod, actions) = after(false, vec![Event::NetworkReady(Some("no socket".into()))]);
    assert_eq!(actions, [Action::Supervise]);
    assert!(pod.awaits_announcement());
    assert_eq!(pod.step(ready(), NOW), []);
    assert!(!pod.awaits_announcement());
}

#[test]
fn a_pod_runs_when_all_its_tasks_do() {
    let of = |tasks: &[(&str, TaskState)]| report_of(&status(tasks));
    assert_eq!(of(&[("a", TaskState::Running), ("b", TaskState::Running)]).phase, Phase::Running);
    assert_eq!(of(&[("a", TaskState::Running), ("b", TaskState::Starting)]).phase, Phase::Starting);
    let failed = of(&[("a", TaskState::Running), ("b", TaskState::Failed)]);
    let message = "task b: exited with status 1".to_owned();
    assert_eq!(failed, Report { phase: Phase::Failed, message, restarts: 2, ending: None });
}

#[test]
fn a_lost_supervisor_is_replaced_after_a_wait() {
    let lost = || Event::SupervisorLost("it was killed".into());
    let (mut pod, actions) = after(false, vec![ready(), running(), lost()]);
    assert_eq!(actions, [Action::Reconcile]);
    assert_eq!(pod.report().unwrap().message, "supervisor: it was killed");
    assert_eq!(pod.due(), Some(NOW + Duration::from_millis(250)));
    assert_eq!(pod.step(ready(), NOW), [], "its time has not come");
    assert_eq!(pod.step(Event::Tick, LATER), [Action::Supervise]);
    pod.step(running(), LATER);
    assert_eq!(phase(&pod), Some(Phase::Running));
    assert_eq!(
        pod.report().unwrap().restarts,
        3,
        "one each by both supervisors, and one for the loss of the first"
    );
}

#[test]
fn a_pod_ends_tasks_first_and_network_last() {
    let mut pod = after(false, vec![ready(), running()]).0;
    assert_eq!(pod.step(Event::Remove, NOW), [Action::Stop]);
    assert!(!pod.is_absent() && pod.is_ending());
    assert_eq!(pod.step(Event::SupervisorStopped, NOW), [Action::RemoveFolders, Action::Reconcile]);
    assert!(pod.is_absent());
    assert_eq!(pod.step(failed("busy"), NOW), []);
    assert_eq!(pod.step(Event::Folders(Ok(())), NOW), []);
    assert_eq!(pod.step(Event::NetworkGone, NOW), [Action::Finish]);
    assert_eq!(pod.step(Event::NetworkGone, NOW), [Action::Finish], "again, when that has failed");
}

#[test]
fn a_pod_that_moves_leaves_its_address_at_once_and_starts_anew_when_its_tasks_have_ended() {
    let mut pod = after(false, vec![ready(), running()]).0;
    assert_eq!(pod.step(Event::Displaced, NOW), [Action::Stop, Action::Reconcile]);
    assert!(pod.is_absent());
    assert_eq!(pod.report().unwrap().message, "it moves to another address");
    assert_eq!(pod.step(Event::Displaced, NOW), [], "it is moving already");
    assert_eq!(pod.step(Event::SupervisorStopped, NOW), [Action::Reconcile]);
    assert!(pod.is_absent());
    assert_eq!(pod.step(Event::NetworkGone, NOW), [Action::Reconcile]);
    assert!(!pod.is_absent());
    assert_eq!(pod.step(failed("no address yet"), NOW), []);
    assert_eq!(pod.report().unwrap().message, "no address yet");
    assert_eq!(pod.step(Event::Displaced, NOW), [Action::Reconcile], "it has got one");
    assert_eq!(pod.step(ready(), NOW), [Action::Supervise]);
}

#[test]
fn a_pod_that_is_removed_while_it_moves_ends() {
    for events in [vec![], vec![Event::SupervisorStopped]] {
        let mut pod = after(false, vec![ready(), running(), Event::Displaced]).0;
        events.into_iter().for_each(|event| drop(pod.step(event, NOW)));
        pod.step(Event::Remove, NOW);
        assert_eq!(pod.report(), None);
        pod.step(Event::SupervisorStopped, NOW);
        pod.step(Event::Folders(Ok(())), NOW);
        assert_eq!(pod.step(Event::NetworkGone, NOW), [Action::Finish]);
    }
}

#[test]
fn a_pod_that_never_started_ends_the_same_way() {
    for events in [vec![], vec![ready()], vec![failed("x")]] {
        let mut pod = after(false, events).0;
        assert_eq!(pod.step(Event::Remove, NOW), [Action::Stop]);
    }
}

#[test]
fn a_pod_that_ends_is_removed_once_and_reported_no_more() {
    let mut pod = after(false, vec![ready(), running(), Event::Remove]).0;
    assert_eq!(pod.step(Event::Remove, NOW), []);
    assert_eq!(pod.step(running(), NOW), []);
    assert_eq!(pod.report(), None);
    assert_eq!(pod.step(Event::SupervisorLost("it was killed".into()), NOW), [Action::Stop]);
}

#[test]
fn after_a_restart_of_the_agent_a_pod_is_not_reported_until_it_is_known() {
    let (pod, _) = after(true, vec![ready()]);
    assert_eq!(pod.report(), None);
    let (pod, _) = after(true, vec![ready(), running()]);
    assert_eq!(phase(&pod), Some(Phase::Running));
    let (pod, _) = after(true, vec![failed("x")]);
    assert_eq!(phase(&pod), Some(Phase::Failed));
}

#[test]
fn a_changed_spec_reaches_a_supervisor_that_is_there() {
    let mut pod = after(false, vec![ready(), running()]).0;
    assert_eq!(pod.step(Event::Changed { graph: graph("{}"), tasks: false }, NOW), [Action::Update]);
    let mut pod = after(false, vec![]).0;
    assert_eq!(pod.step(Event::Changed { graph: graph("{}"), tasks: false }, NOW), []);
}

#[test]
fn with_other_tasks_a_pod_runs_when_its_supervisor_says_so_of_these() {
    let mut pod = after(false, vec![ready(), running()]).0;
    pod.step(Event::Changed { graph: graph("{}"), tasks: false }, NOW);
    assert_eq!(phase(&pod), Some(Phase::Running), "its supervisor will say nothing new");
    pod.step(
        Event::Status(Status {
            ending: Some(Ending::new("task web: x", b"y")),
            ..status(&[("web", TaskState::Running)])
        }),
        NOW,
    );
    assert!(pod.report().unwrap().ending.is_some());
    pod.step(Event::Changed { graph: graph("{}"), tasks: true }, NOW);
    assert_eq!(phase(&pod), Some(Phase::Starting));
    assert_eq!(pod.report().unwrap().ending, None, "that was of other tasks");
    pod.step(running(), NOW);
    assert_eq!(phase(&pod), Some(Phase::Running));
}

#[test]
fn a_replaced_namespace_is_looked_at_when_something_runs_in_it() {
    let mut pod = after(false, vec![ready(), running()]).0;
    assert_eq!(pod.step(Event::NetworkReplaced, NOW), [Action::Check]);
    assert_eq!(after(false, vec![]).0.step(Event::NetworkReplaced, NOW), []);
}

/// A hook after `running` ran again when a task had ended by itself, and not when a new text restarted it.
#[test]
fn with_other_tasks_a_pod_comes_to_run_once_more() {
    let hooks = r#"{"tell": {"exec": ["/bin/t"], "after": ["running"]}}"#;
    let tell = Action::RunHook("tell".into());
    let mut pod = PodState::begin(graph(hooks), false, &[], NOW).0;
    pod.step(Event::Folders(Ok(())), NOW);
    pod.step(ready(), NOW);
    assert!(pod.step(running(), NOW).contains(&tell));
    pod.step(Event::Hook("tell".into(), Ok(())), NOW);
    pod.step(Event::Changed { graph: graph(hooks), tasks: true }, LATER);
    assert!(pod.step(running(), LATER).contains(&tell));
    let running = pod.steps(LATER).into_iter().find(|step| step.name == RUNNING).unwrap();
    assert_eq!(running.ended_ms_ago, Some(0), "it runs since then");
    assert!(pod.steps(LATER).iter().all(|step| step.error.is_none()));
}

const MIGRATE: &str = r#"{"migrate": {"exec": ["/bin/m"], "before": ["running"], "attempts": 2}}"#;

fn hook(result: Result<(), &str>) -> Event {
    Event::Hook("migrate".into(), result.map_err(failure))
}

fn failure(why: &str) -> HookFailure {
    HookFailure { why: why.to_owned(), output: String::new() }
}

#[test]
fn a_hook_before_running_runs_before_the_tasks_and_its_failure_keeps_them_back() {
    let run = || Action::RunHook("migrate".into());
    let (mut pod, actions) = with(graph(MIGRATE), false, vec![ready()]);
    assert_eq!(actions, [run()]);
    assert_eq!(pod.report().unwrap().message, "its hook migrate runs");
    assert_eq!(pod.step(hook(Err("exited with status 1")), NOW), []);
    let again = "hook migrate is tried again, attempt 1 of 2 has failed: exited with status 1";
    let ending = Some(Arc::new(Ending::new("hook migrate: exited with status 1", b"")));
    let starting = Some(Report { phase: Phase::Starting, message: again.to_owned(), restarts: 0, ending });
    assert_eq!(pod.report(), starting, "one attempt is not all of them");
    assert_eq!(pod.step(Event::Tick, LATER), [run()]);
    assert_eq!(pod.report(), starting, "nothing new is known while it runs again");
    assert_eq!(pod.step(hook(Err("exited with status 2")), LATER), []);
    let report = pod.report().unwrap();
    assert_eq!(
        (report.phase, report.message.as_str()),
        (Phase::Failed, "hook migrate: exited with status 2")
    );
    // A corrected text.
    let fixed = MIGRATE.replace("/bin/m", "/bin/fixed");
    assert_eq!(pod.step(Event::Changed { graph: graph(&fixed), tasks: false }, LATER), [run()]);
    assert_eq!(pod.report().unwrap().message, "its hook migrate runs", "the text is another");
    assert_eq!(pod.step(hook(Ok(())), LATER), [Action::Supervise]);
    assert_eq!(phase(&pod), Some(Phase::Starting));
}

#[test]
fn a_hook_that_has_failed_for_good_is_named_before_one_that_is_tried_again() {
    let two = r#"{"again": {"exec": ["/bin/a"], "before": ["running"], "attempts": 9},
                  "for-good": {"exec": ["/bin/b"], "before": ["running"], "attempts": 1},
                  "spare": {"exec": ["/bin/c"], "before": ["running"], "attempts": 1, "optional": true}}"#;
    let told = |name: &str, why: &str| Event::Hook(name.into(), Err(failure(why)));
    let mut pod = with(graph(two), false, vec![ready(), told("spare", "no"), told("again", "not yet")]).0;
    let report = pod.report().unwrap();
    let again = "hook again is tried again, attempt 1 of 9 has failed: not yet";
    assert_eq!((report.phase, report.message.as_str()), (Phase::Starting, again));
    pod.step(told("for-good", "never"), NOW);
    let report = pod.report().unwrap();
    assert_eq!((report.phase, report.message.as_str()), (Phase::Failed, "hook for-good: never"));
}

#[test]
fn a_hook_is_undone_after_the_tasks_when_it_ran_before_them() {
    let text = MIGRATE.replace("\"before\"", "\"undo\": [\"/bin/u\"], \"before\"");
    let mut pod = with(graph(&text), false, vec![ready(), hook(Ok(())), running()]).0;
    assert_eq!(pod.step(Event::Remove, NOW), [Action::Stop]);
    assert_eq!(pod.step(Event::SupervisorStopped, NOW), [Action::UndoHook("migrate".into())]);
    assert_eq!(pod.step(hook(Ok(())), NOW), [Action::RemoveFolders, Action::Reconcile]);
}

#[test]
fn a_hook_that_takes_too_long_is_ended() {
    let mut pod = with(graph(MIGRATE), false, vec![ready()]).0;
    assert_eq!(pod.due(), Some(NOW + Duration::from_secs(70)));
    assert_eq!(pod.step(Event::Tick, NOW + Duration::from_secs(70)), [Action::AbortHook("migrate".into())]);
}

#[test]
fn the_kernel_is_not_touched_before_the_operators_hook_has_run() {
    let operator: BTreeMap<String, Hook> =
        serde_json::from_str(r#"{"first": {"exec": ["/bin/f"], "before": ["networking"]}}"#).unwrap();
    let graph = Arc::new(pod::graph(&BTreeMap::new(), &operator).unwrap());
    let (mut pod, actions) = PodState::begin(graph, false, &[], NOW);
    assert_eq!(actions, [Action::MakeFolders, Action::RunHook("first".into())]);
    assert!(pod.is_absent());
    assert_eq!(pod.step(Event::Hook("first".into(), Ok(())), NOW), [Action::Reconcile]);
    assert!(!pod.is_absent() && pod.awaits_network());
}

#[test]
fn a_hook_of_before_the_agents_restart_is_undone_although_it_was_not_begun_again() {
    let text = MIGRATE.replace("\"before\"", "\"undo\": [\"/bin/u\"], \"before\"");
    let (mut pod, _) = PodState::begin(graph(&text), true, &[&"migrate".to_owned()], NOW);
    assert_eq!(pod.step(Event::Remove, NOW), [Action::Stop]);
    assert_eq!(pod.step(Event::SupervisorStopped, NOW), [Action::UndoHook("migrate".into())]);
}

/// An agent that was started with another hook of its operator's once took every running pod of the node down.
#[test]
fn a_hook_that_is_new_to_a_pod_that_runs_is_run_and_nothing_waits_for_it() {
    let operator: BTreeMap<String, Hook> =
        serde_json::from_str(r#"{"first": {"exec": ["/bin/f"], "before": ["networking"], "attempts": 1}}"#)
            .unwrap();
    let graph = Arc::new(pod::graph(&BTreeMap::new(), &operator).unwrap());
    let (mut pod, actions) = PodState::begin(graph, true, &[], NOW);
    for action in [Action::Reconcile, Action::MakeFolders, Action::RunHook("first".into())] {
        assert!(actions.contains(&action), "{actions:?}");
    }
    assert!(!pod.is_absent() && pod.awaits_network(), "its kernel objects stay");
    pod.step(Event::Hook("first".into(), Err(failure("exited with status 1"))), NOW);
    assert_eq!(pod.report(), None, "the server knows as much");
    pod.step(Event::Folders(Ok(())), NOW);
    assert_eq!(pod.step(ready(), NOW), [Action::Supervise]);
    pod.step(running(), NOW);
    assert_eq!(phase(&pod), Some(Phase::Running));
}

/// The same rule before and after the agent's restart.
#[test]
fn a_new_hook_of_the_job_that_fails_leaves_the_pod_running_before_and_after_a_restart_of_the_agent() {
    let once = MIGRATE.replace('2', "1");
    let mut pod = after(false, vec![ready(), running()]).0;
    assert_eq!(
        pod.step(Event::Changed { graph: graph(&once), tasks: false }, NOW),
        [Action::Update, Action::RunHook("migrate".into())]
    );
    pod.step(hook(Err("exited with status 1")), NOW);
    pod.step(running(), NOW);
    let before = pod.steps(NOW).into_iter().find(|step| step.name == "migrate").unwrap();

    let mut again = PodState::begin(graph(&once), true, &[&"migrate".to_owned()], NOW).0;
    for event in [Event::Folders(Ok(())), ready(), hook(Err("exited with status 1")), running()] {
        again.step(event, NOW);
    }
    let after = again.steps(NOW).into_iter().find(|step| step.name == "migrate").unwrap();
    assert_eq!(phase(&pod), Some(Phase::Running));
    assert_eq!(pod.report(), again.report());
    assert_eq!((before.phase, before.optional, &before.error), (after.phase, after.optional, &after.error));
    assert!(
        again
            .steps(NOW)
            .iter()
            .any(|step| step.name == "running" && step.phase == hextet_lifecycle::Phase::Done)
    );
}

#[test]
fn how_a_task_ended_is_told_also_when_it_runs_again() {
    let mut failed = status(&[("t", TaskState::Failed)]);
    failed.ending = Some(Ending::new("task t: exited with status 3", b"no such table"));
    let mut pod = after(false, vec![ready(), Event::Status(failed.clone())]).0;
    assert_eq!(pod.report().unwrap().ending.as_deref(), failed.ending.as_ref());
    pod.step(running(), NOW);
    let report = pod.report().unwrap();
    assert_eq!((report.phase, report.ending.as_deref()), (Phase::Running, failed.ending.as_ref()));
    pod.step(Event::SupervisorLost("it was killed".into()), NOW);
    assert_eq!(pod.report().unwrap().ending.as_deref(), failed.ending.as_ref());
}

#[test]
fn what_a_hook_wrote_is_told_with_its_failure() {
    let mut pod = with(graph(MIGRATE), false, vec![ready()]).0;
    let failure = HookFailure { why: "exited with status 1".into(), output: "no such table".into() };
    pod.step(Event::Hook("migrate".into(), Err(failure)), NOW);
    let ending = Ending::new("hook migrate: exited with status 1", b"no such table");
    assert_eq!(pod.report().unwrap().ending.as_deref(), Some(&ending));
}
