//! The life of one pod on this node as a state machine: what happened in, what to do out. Pure.
//!
//! ```text
//! Networking -> Starting -> Supervised        a pod that is wanted
//!                  ^  v         v
//!                  Waiting <----+             its supervisor ended or could not be started
//! Stopping -> Unlinking -> (gone)             a pod that is not
//!                  v
//!                  Networking                 a pod that moves to another address
//! ```
//! A pod that is wanted again while it ends, ends first and then starts anew.

use crate::supervisor::status::{Status, TaskState, bounded_message};

/// How far a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Waits for its kernel objects; why they failed last.
    Networking(Option<String>),
    /// Its supervisor is being started or found.
    Starting,
    /// Its supervisor is there.
    Supervised(Status),
    /// Its supervisor ended or could not be started; another is tried after a while.
    Waiting(String),
    /// Its tasks are being stopped.
    Stopping,
    /// Its kernel objects go; why they did not last.
    Unlinking(Option<String>),
}

/// What happened to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Its kernel objects are complete.
    NetworkReady,
    /// Its kernel objects are not complete, or not all gone.
    NetworkFailed(String),
    /// Its network namespace was made anew while it ran.
    NetworkReplaced,
    /// Nothing of it is left in the kernel.
    NetworkGone,
    /// Its supervisor said this.
    Status(Status),
    /// Its supervisor has ended or was not started.
    SupervisorLost(String),
    /// None of its tasks lives and nor does its supervisor.
    SupervisorStopped,
    /// The wait for the next supervisor is over.
    RetryDue,
    /// What it must run has changed.
    Changed,
    /// It must leave its address, for another that it has by now or will get.
    Displaced,
    /// It must end.
    Remove,
}

/// What to do for a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Bring kernel and desired state together.
    Reconcile,
    /// Start a supervisor, or connect to the one that is there.
    Supervise,
    /// Give the supervisor the new spec.
    Update,
    /// Look whether the supervisor lives in the namespace that has the pod's name; end it if not.
    Check,
    /// Stop the tasks and the supervisor.
    Stop,
    /// Say [`Event::RetryDue`] after a while.
    RetryLater,
    /// Nothing is left: remove its folders and its record, then report it gone.
    Finish,
}

/// What the server is told of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) phase: Phase,
    pub(crate) message: String,
    pub(crate) restarts: u32,
}

/// The phase of a pod that lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Starting,
    Running,
    Failed,
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodState {
    stage: Stage,
    /// Nothing is known of it yet since the agent started: what the server knows is as good.
    unknown: bool,
    /// Supervisors that failed in a row.
    failures: u32,
    /// It ends only to start anew with another address.
    moves: bool,
}

impl PodState {
    /// A pod that was just assigned, or one of before the agent's restart.
    pub(crate) fn new(from_store: bool) -> PodState {
        PodState { stage: Stage::Networking(None), unknown: from_store, failures: 0, moves: false }
    }

    pub(crate) fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Supervisors that failed in a row.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Whether its kernel objects must not be there. Those of an address that is another's go at once, while
    /// the tasks are still being stopped.
    pub(crate) fn is_absent(&self) -> bool {
        self.moves || matches!(self.stage, Stage::Unlinking(_))
    }

    /// Takes note of `event`; what is to be done now, in order.
    pub(crate) fn step(&mut self, event: Event) -> Vec<Action> {
        use Action::{Check, Finish, Reconcile, RetryLater, Stop, Supervise, Update};
        let (next, actions) = match (self.stage.clone(), event) {
            (Stage::Networking(_), Event::NetworkReady) => (Stage::Starting, vec![Supervise]),
            (Stage::Networking(_), Event::NetworkFailed(why)) => {
                self.unknown = false;
                (Stage::Networking(Some(bounded_message(why))), vec![])
            }
            (Stage::Starting | Stage::Supervised(_), Event::Status(status)) => {
                (self.unknown, self.failures) = (false, 0);
                (Stage::Supervised(status), vec![])
            }
            (Stage::Starting | Stage::Supervised(_), Event::SupervisorLost(why)) => {
                self.unknown = false;
                self.failures = self.failures.saturating_add(1);
                (Stage::Waiting(bounded_message(why)), vec![RetryLater])
            }
            // Through the network again: a namespace that was replaced is noticed there.
            (Stage::Waiting(_), Event::RetryDue) => (Stage::Networking(None), vec![Reconcile]),
            (stage @ (Stage::Starting | Stage::Supervised(_)), Event::Changed) => (stage, vec![Update]),
            (stage @ (Stage::Starting | Stage::Supervised(_)), Event::NetworkReplaced) => {
                (stage, vec![Check])
            }
            (
                Stage::Networking(_) | Stage::Starting | Stage::Supervised(_) | Stage::Waiting(_),
                Event::Remove,
            ) => (Stage::Stopping, vec![Stop]),
            // Nothing runs that knows the address.
            (Stage::Networking(_), Event::Displaced) => (Stage::Networking(None), vec![Reconcile]),
            (Stage::Starting | Stage::Supervised(_) | Stage::Waiting(_), Event::Displaced) => {
                (self.moves, self.unknown) = (true, false);
                (Stage::Stopping, vec![Stop, Reconcile])
            }
            (stage @ (Stage::Stopping | Stage::Unlinking(_)), Event::Remove) => {
                self.moves = false;
                (stage, vec![])
            }
            (Stage::Unlinking(_), Event::NetworkGone) if self.moves => {
                self.moves = false;
                (Stage::Networking(None), vec![Reconcile])
            }
            (Stage::Stopping, Event::SupervisorStopped) => (Stage::Unlinking(None), vec![Reconcile]),
            // The supervisor may have ended by itself just before; whether it has is looked at again.
            (Stage::Stopping, Event::SupervisorLost(_)) => (Stage::Stopping, vec![Stop]),
            (Stage::Unlinking(_), Event::NetworkFailed(why)) => {
                (Stage::Unlinking(Some(bounded_message(why))), vec![])
            }
            (stage @ Stage::Unlinking(_), Event::NetworkGone) => (stage, vec![Finish]),
            (stage, _) => (stage, vec![]),
        };
        self.stage = next;
        actions
    }

    /// What the server is told; none while it knows as much itself.
    pub(crate) fn report(&self) -> Option<Report> {
        if self.unknown {
            return None;
        }
        let plain = |phase, message: &str| Some(Report { phase, message: message.to_owned(), restarts: 0 });
        match &self.stage {
            Stage::Networking(None) | Stage::Starting => plain(Phase::Starting, ""),
            Stage::Networking(Some(why)) => plain(Phase::Failed, why),
            Stage::Waiting(why) => plain(Phase::Failed, &format!("supervisor: {why}")),
            Stage::Supervised(status) => Some(report_of(status)),
            Stage::Stopping | Stage::Unlinking(_) if self.moves => {
                plain(Phase::Starting, "it moves to another address")
            }
            Stage::Stopping | Stage::Unlinking(_) => None,
        }
    }
}

/// What the tasks make of their pod: it runs when all run, and has failed when one has.
fn report_of(status: &Status) -> Report {
    let restarts = status.tasks.values().fold(0_u32, |sum, task| sum.saturating_add(task.restarts));
    let failed = status.tasks.iter().find(|(_, task)| task.state == TaskState::Failed);
    let (phase, message) = match failed {
        Some((name, task)) => (Phase::Failed, bounded_message(format!("task {name}: {}", task.message))),
        None if status.tasks.values().all(|task| task.state == TaskState::Running) => {
            (Phase::Running, String::new())
        }
        None => (Phase::Starting, what_is_waited_for(status)),
    };
    Report { phase, message, restarts }
}

fn what_is_waited_for(status: &Status) -> String {
    let waiting = status.tasks.iter().find(|(_, task)| task.state == TaskState::Starting);
    let told = waiting.filter(|(_, task)| !task.message.is_empty());
    told.map_or_else(String::new, |(name, task)| bounded_message(format!("task {name}: {}", task.message)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::status::TaskStatus;

    fn status(tasks: &[(&str, TaskState)]) -> Status {
        let task =
            |state| TaskStatus { state, pid: None, restarts: 1, message: "exited with status 1".into() };
        Status {
            tasks: tasks.iter().map(|(name, state)| ((*name).into(), task(*state))).collect(),
            ..Status::default()
        }
    }

    fn running() -> Event {
        Event::Status(status(&[("web", TaskState::Running)]))
    }

    /// A pod after `events`, and what the last of them asked for.
    fn after(from_store: bool, events: Vec<Event>) -> (PodState, Vec<Action>) {
        let mut pod = PodState::new(from_store);
        let mut actions = vec![];
        for event in events {
            actions = pod.step(event);
        }
        (pod, actions)
    }

    fn phase(pod: &PodState) -> Option<Phase> {
        pod.report().map(|report| report.phase)
    }

    #[test]
    fn a_supervisor_starts_only_when_the_network_is_complete() {
        let (pod, actions) = after(false, vec![Event::NetworkFailed("no veth".into())]);
        assert_eq!(actions, []);
        assert_eq!(pod.report().unwrap().message, "no veth");
        let (pod, actions) = after(false, vec![Event::NetworkFailed("no veth".into()), Event::NetworkReady]);
        assert_eq!(actions, [Action::Supervise]);
        assert_eq!(phase(&pod), Some(Phase::Starting));
    }

    #[test]
    fn a_network_that_is_checked_again_starts_nothing_again() {
        let (_, actions) = after(false, vec![Event::NetworkReady, running(), Event::NetworkReady]);
        assert_eq!(actions, []);
    }

    #[test]
    fn a_pod_runs_when_all_its_tasks_do() {
        let of = |tasks: &[(&str, TaskState)]| report_of(&status(tasks));
        assert_eq!(of(&[("a", TaskState::Running), ("b", TaskState::Running)]).phase, Phase::Running);
        assert_eq!(of(&[("a", TaskState::Running), ("b", TaskState::Starting)]).phase, Phase::Starting);
        let failed = of(&[("a", TaskState::Running), ("b", TaskState::Failed)]);
        let message = "task b: exited with status 1".to_owned();
        assert_eq!(failed, Report { phase: Phase::Failed, message, restarts: 2 });
    }

    #[test]
    fn a_lost_supervisor_is_replaced_after_a_wait() {
        let lost = || Event::SupervisorLost("it was killed".into());
        let (pod, actions) = after(false, vec![Event::NetworkReady, running(), lost()]);
        assert_eq!(actions, [Action::RetryLater]);
        assert_eq!(pod.report().unwrap().message, "supervisor: it was killed");
        let (mut pod, actions) = after(false, vec![Event::NetworkReady, running(), lost(), Event::RetryDue]);
        assert_eq!(actions, [Action::Reconcile]);
        assert_eq!(pod.failures(), 1);
        assert_eq!(pod.step(Event::NetworkReady), [Action::Supervise]);
        pod.step(running());
        assert_eq!(pod.failures(), 0);
    }

    #[test]
    fn a_pod_ends_tasks_first_and_network_last() {
        let mut pod = after(false, vec![Event::NetworkReady, running()]).0;
        assert_eq!(pod.step(Event::Remove), [Action::Stop]);
        assert_eq!(pod.stage(), &Stage::Stopping);
        assert!(!pod.is_absent());
        assert_eq!(pod.step(Event::SupervisorStopped), [Action::Reconcile]);
        assert!(pod.is_absent());
        assert_eq!(pod.step(Event::NetworkFailed("busy".into())), []);
        assert_eq!(pod.step(Event::NetworkGone), [Action::Finish]);
    }

    #[test]
    fn a_pod_that_moves_leaves_its_address_at_once_and_starts_anew_when_its_tasks_have_ended() {
        let mut pod = after(false, vec![Event::NetworkReady, running()]).0;
        assert_eq!(pod.step(Event::Displaced), [Action::Stop, Action::Reconcile]);
        assert!(pod.is_absent());
        assert_eq!(pod.report().unwrap().message, "it moves to another address");
        assert_eq!(pod.step(Event::Displaced), [], "it is moving already");
        assert_eq!(pod.step(Event::SupervisorStopped), [Action::Reconcile]);
        assert!(pod.is_absent());
        assert_eq!(pod.step(Event::NetworkGone), [Action::Reconcile]);
        assert!(!pod.is_absent());
        assert_eq!(pod.step(Event::NetworkFailed("no address yet".into())), []);
        assert_eq!(pod.report().unwrap().message, "no address yet");
        assert_eq!(pod.step(Event::Displaced), [Action::Reconcile], "it has got one");
        assert_eq!(pod.step(Event::NetworkReady), [Action::Supervise]);
    }

    #[test]
    fn a_pod_that_is_removed_while_it_moves_ends() {
        for events in [vec![], vec![Event::SupervisorStopped]] {
            let mut pod = after(false, vec![Event::NetworkReady, running(), Event::Displaced]).0;
            events.into_iter().for_each(|event| drop(pod.step(event)));
            assert_eq!(pod.step(Event::Remove), []);
            assert_eq!(pod.report(), None);
            pod.step(Event::SupervisorStopped);
            assert_eq!(pod.step(Event::NetworkGone), [Action::Finish]);
        }
    }

    #[test]
    fn a_pod_that_never_started_ends_the_same_way() {
        for events in [vec![], vec![Event::NetworkReady], vec![Event::NetworkFailed("x".into())]] {
            let mut pod = after(false, events).0;
            assert_eq!(pod.step(Event::Remove), [Action::Stop]);
        }
    }

    #[test]
    fn a_pod_that_ends_is_removed_once_and_reported_no_more() {
        let mut pod = after(false, vec![Event::NetworkReady, running(), Event::Remove]).0;
        assert_eq!(pod.step(Event::Remove), []);
        assert_eq!(pod.step(running()), []);
        assert_eq!(pod.report(), None);
        assert_eq!(pod.step(Event::SupervisorLost("it was killed".into())), [Action::Stop]);
    }

    #[test]
    fn after_a_restart_of_the_agent_a_pod_is_not_reported_until_it_is_known() {
        let (pod, _) = after(true, vec![Event::NetworkReady]);
        assert_eq!(pod.report(), None);
        let (pod, _) = after(true, vec![Event::NetworkReady, running()]);
        assert_eq!(phase(&pod), Some(Phase::Running));
        let (pod, _) = after(true, vec![Event::NetworkFailed("x".into())]);
        assert_eq!(phase(&pod), Some(Phase::Failed));
    }

    #[test]
    fn a_changed_spec_reaches_a_supervisor_that_is_there() {
        let mut pod = after(false, vec![Event::NetworkReady, running()]).0;
        assert_eq!(pod.step(Event::Changed), [Action::Update]);
        let mut pod = PodState::new(false);
        assert_eq!(pod.step(Event::Changed), []);
    }

    #[test]
    fn a_replaced_namespace_is_looked_at_when_something_runs_in_it() {
        let mut pod = after(false, vec![Event::NetworkReady, running()]).0;
        assert_eq!(pod.step(Event::NetworkReplaced), [Action::Check]);
        assert_eq!(PodState::new(false).step(Event::NetworkReplaced), []);
    }
}
