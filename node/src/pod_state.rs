//! The life of one pod on this node: what happened in, what to do out. Pure.
//!
//! The order is the graph's ([`hextet_lifecycle::pod`]): this module translates. What the kernel, the supervisor and
//! hooks say becomes events of steps; steps that are to start or to stop become actions of the agent.
//!
//! A pod that is wanted again while it ends, ends first and then starts anew. One whose address turns out to be
//! another machine's goes down to its link and up again; its kernel objects go at once, out of turn.

use std::{sync::Arc, time::Duration};

use hextet_lifecycle::{
    Command, Ending, Event as Walk, Graph, Owner, Run, StepStatus,
    pod::{ANNOUNCED, FOLDERS, HOOKS, LINK, ROUTES, SUPERVISOR, TASKS},
};

use crate::supervisor::status::{Status, TaskState, bounded_message};

/// What happened to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Its kernel objects are complete; why its address was not announced, if so.
    NetworkReady(Option<String>),
    /// Its kernel objects are not complete, or not all gone.
    NetworkFailed(Failure),
    /// Its network namespace was made anew while it ran.
    NetworkReplaced,
    /// Nothing of it is left in the kernel.
    NetworkGone,
    /// Its folders are made or removed.
    Folders(Result<(), String>),
    /// A hook of it, or what undoes one, has come to its end; else why, and the last lines that it wrote.
    Hook(String, Result<(), HookFailure>),
    /// Its supervisor said this.
    Status(Status),
    /// Its supervisor has ended or was not started.
    SupervisorLost(String),
    /// None of its tasks lives and nor does its supervisor.
    SupervisorStopped,
    /// Somebody asks that these steps, which have failed, are tried again.
    Retry(Vec<String>),
    /// Time has passed.
    Tick,
    /// What it must run has changed: its steps, and perhaps its tasks.
    Changed { graph: Arc<Graph>, tasks: bool },
    /// It must leave its address, for another that it has by now or will get.
    Displaced,
    /// It must end.
    Remove,
}

/// Why a hook has failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HookFailure {
    pub(crate) why: String,
    /// The last lines that it wrote.
    pub(crate) output: String,
}

/// What is missing in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Whether its link is complete and only routes, neighbours or its guard are missing.
    pub(crate) has_link: bool,
    pub(crate) why: String,
}

/// What to do for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Bring kernel and desired state together.
    Reconcile,
    /// Make its folders.
    MakeFolders,
    /// Remove its folders.
    RemoveFolders,
    /// Start a supervisor, or connect to the one that is there.
    Supervise,
    /// Give the supervisor the new spec.
    Update,
    /// Look whether the supervisor lives in the namespace that has the pod's name; end it if not.
    Check,
    /// Stop the tasks and the supervisor.
    Stop,
    /// Run a hook, or find the one that is under way.
    RunHook(String),
    /// End a hook that is under way, and run what undoes it, if it has that.
    UndoHook(String),
    /// End a hook that takes too long.
    AbortHook(String),
    /// Nothing is left: remove its record, then report it gone.
    Finish,
}

/// What the server is told of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) phase: Phase,
    pub(crate) message: String,
    pub(crate) restarts: u32,
    /// How a task or a hook of it ended by itself last.
    pub(crate) ending: Option<Arc<Ending>>,
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
    run: Run,
    /// What its supervisor said last, while it has one.
    status: Option<Status>,
    /// How often its tasks were started again by supervisors that are no more, and because they are no more.
    restarts_before: u32,
    /// Why its supervisor is not there.
    supervisor_error: Option<String>,
    /// Why its kernel objects are not as they should be.
    network_error: Option<String>,
    /// How a task or a hook of it ended by itself last.
    ending: Option<Arc<Ending>>,
    /// Nothing is known of it yet since the agent started: what the server knows is as good.
    unknown: bool,
    /// It leaves its address for another.
    moves: bool,
    removing: bool,
}

impl PodState {
    /// A pod that was just assigned, or one of before the agent's restart; what is to be done first. `hooks` were
    /// begun by an agent before: they are undone when the pod ends, also if this one does not come to them.
    pub(crate) fn begin(
        graph: Arc<Graph>,
        from_store: bool,
        hooks: &[&String],
        now: Duration,
    ) -> (PodState, Vec<Action>) {
        let mut pod = PodState {
            run: Run::new(graph),
            status: None,
            restarts_before: 0,
            supervisor_error: None,
            network_error: None,
            ending: None,
            unknown: from_store,
            moves: false,
            removing: false,
        };
        let mut actions = Vec::new();
        let mut commands = pod.run.handle(Walk::Up, now);
        if from_store {
            // Its supervisor was there before this agent: what the tasks had to wait for is behind them.
            pod.run.pass(SUPERVISOR);
            commands.extend(pod.run.handle(Walk::Tick, now));
        }
        // Another agent may have begun: what is there is found when it is begun again, and taken away in any case.
        pod.run.assume(&[LINK, FOLDERS, SUPERVISOR]);
        pod.run.assume(&hooks.iter().map(|name| name.as_str()).collect::<Vec<_>>());
        pod.follow(commands, now, &mut actions);
        (pod, actions)
    }

    /// Whether its link is to be made, and the kernel has not been brought to that yet.
    pub(crate) fn awaits_network(&self) -> bool {
        self.run.is_under_way(LINK) || self.run.is_under_way(ROUTES)
    }

    /// Whether its kernel objects are to go, or all is gone but its record.
    pub(crate) fn awaits_end(&self) -> bool {
        self.run.is_stopping(LINK) || (self.removing && self.run.is_down())
    }

    /// Whether it was announced in vain.
    pub(crate) fn awaits_announcement(&self) -> bool {
        self.run.is_done(ROUTES) && !self.run.is_done(ANNOUNCED)
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.removing || self.moves
    }

    /// Whether its kernel objects must not be there: its link's turn has not come, or is over. Those of an address
    /// that is another's go at once, while the tasks are still being stopped.
    pub(crate) fn is_absent(&self) -> bool {
        self.moves || !(self.run.is_done(LINK) || self.run.is_under_way(LINK))
    }

    /// When [`Event::Tick`] has something to do.
    pub(crate) fn due(&self) -> Option<Duration> {
        self.run.due()
    }

    /// Every step, for people.
    pub(crate) fn steps(&self, now: Duration) -> Vec<StepStatus> {
        self.run.status(now)
    }

    /// Takes note of `event`; what is to be done now, in order.
    pub(crate) fn step(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::NetworkReady(unannounced) => self.network_ready(unannounced, now, &mut actions),
            Event::NetworkFailed(failure) => self.network_failed(failure, now, &mut actions),
            Event::NetworkGone => self.network_gone(now, &mut actions),
            Event::NetworkReplaced => actions.extend(self.is_supervised().then_some(Action::Check)),
            Event::Folders(result) => self.ended(FOLDERS, result, now, &mut actions),
            Event::Hook(name, result) => self.hook_ended(&name, result, now, &mut actions),
            Event::Status(status) => self.hear(status, now, &mut actions),
            Event::SupervisorLost(why) => self.supervisor_lost(why, now, &mut actions),
            Event::SupervisorStopped => {
                self.status = None;
                self.walk(Walk::Done(SUPERVISOR), now, &mut actions);
            }
            Event::Retry(steps) => {
                steps.iter().for_each(|step| self.walk(Walk::Again(step), now, &mut actions));
            }
            Event::Tick => self.walk(Walk::Tick, now, &mut actions),
            Event::Changed { graph, tasks } => self.changed(graph, tasks, now, &mut actions),
            Event::Displaced => self.displaced(now, &mut actions),
            Event::Remove => self.remove(now, &mut actions),
        }
        self.rise_again(now, &mut actions);
        actions
    }

    /// What the server is told; none while it knows as much itself.
    pub(crate) fn report(&self) -> Option<Report> {
        if self.unknown || self.removing {
            return None;
        }
        let (restarts, ending) = (self.restarts_before, self.ending.clone());
        let plain = |phase, message: String| {
            Some(Report { phase, message: bounded_message(message), restarts, ending: ending.clone() })
        };
        if self.moves {
            return plain(Phase::Starting, "it moves to another address".to_owned());
        }
        if let Some(why) = &self.network_error {
            return plain(Phase::Failed, why.clone());
        }
        if let Some(why) = &self.supervisor_error {
            return plain(Phase::Failed, format!("supervisor: {why}"));
        }
        if let Some(status) = &self.status {
            let report = report_of(status);
            return Some(Report { restarts: report.restarts.saturating_add(restarts), ending, ..report });
        }
        match self.hook_in_the_way() {
            Some((phase, message)) => plain(phase, message),
            None => plain(
                Phase::Starting,
                self.run.error(FOLDERS).filter(|_| !self.run.is_done(FOLDERS)).unwrap_or("").to_owned(),
            ),
        }
    }

    /// The hook that the pod waits for: one that has failed for good, else one that is tried again, else one that runs.
    fn hook_in_the_way(&self) -> Option<(Phase, String)> {
        let of_hook = |(name, why): (&str, &str)| {
            let owner = self.run.graph().step(name).map(|step| step.owner);
            let what = if name == HOOKS {
                "its hooks do not fit each other".to_owned()
            } else {
                format!("hook {name}")
            };
            (owner != Some(Owner::Node)).then(|| (Phase::Failed, format!("{what}: {why}")))
        };
        let failed = self.run.failed_for_good().find_map(of_hook);
        let graph = self.run.graph().clone();
        let needed = |step: &&hextet_lifecycle::Step| {
            step.owner != Owner::Node && !step.optional && !self.run.is_late(&step.name)
        };
        let open = || graph.steps().filter(needed).filter(|step| !self.run.is_done(&step.name));
        let tried = || open().find_map(|step| self.is_tried_again(step));
        let runs = || open().find(|step| self.run.is_under_way(&step.name));
        let starting = || tried().or_else(|| runs().map(|step| format!("its hook {} runs", step.name)));
        failed.or_else(|| starting().map(|message| (Phase::Starting, message)))
    }

    /// What is said of a hook from its first failed attempt until it succeeds or has none left.
    fn is_tried_again(&self, step: &hextet_lifecycle::Step) -> Option<String> {
        let failures = Some(self.run.failures(&step.name)).filter(|failures| *failures > 0)?;
        let all = step.retry.attempts_max.map(|max| format!(" of {max}")).unwrap_or_default();
        let why = self.run.error(&step.name).unwrap_or("it failed");
        Some(format!("hook {} is tried again, attempt {failures}{all} has failed: {why}", step.name))
    }

    fn is_supervised(&self) -> bool {
        !self.is_ending() && (self.run.is_under_way(SUPERVISOR) || self.run.is_done(SUPERVISOR))
    }

    fn network_ready(&mut self, unannounced: Option<String>, now: Duration, actions: &mut Vec<Action>) {
        self.network_error = None;
        self.walk(Walk::Done(LINK), now, actions);
        self.walk(Walk::Done(ROUTES), now, actions);
        match unannounced {
            None => self.walk(Walk::Done(ANNOUNCED), now, actions),
            Some(why) => self.walk(Walk::Failed(ANNOUNCED, &why), now, actions),
        }
    }

    fn network_failed(&mut self, failure: Failure, now: Duration, actions: &mut Vec<Action>) {
        let why = bounded_message(failure.why);
        if self.awaits_network() {
            (self.unknown, self.network_error) = (false, Some(why.clone()));
        }
        if failure.has_link && self.awaits_network() {
            self.walk(Walk::Done(LINK), now, actions);
            self.walk(Walk::Tried(ROUTES, &why), now, actions);
        } else {
            self.walk(Walk::Tried(LINK, &why), now, actions);
        }
    }

    fn network_gone(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.run.is_stopping(LINK) {
            self.network_error = None;
            self.walk(Walk::Done(LINK), now, actions);
        } else if self.removing && self.run.is_down() {
            // What was to be done last has failed.
            actions.push(Action::Finish);
        }
    }

    fn ended(&mut self, step: &str, result: Result<(), String>, now: Duration, actions: &mut Vec<Action>) {
        match result {
            Ok(()) => self.walk(Walk::Done(step), now, actions),
            Err(why) => {
                self.unknown &= self.run.is_stopping(step) || self.run.is_late(step);
                self.walk(Walk::Failed(step, &bounded_message(why)), now, actions);
            }
        }
    }

    fn hook_ended(
        &mut self,
        name: &str,
        result: Result<(), HookFailure>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let ending = result.as_ref().err().map(|HookFailure { why, output }| {
            Ending::new(&format!("hook {name}: {why}"), output.as_bytes())
        });
        self.ended(name, result.map_err(|failure| failure.why), now, actions);
        if let Some(ending) = ending {
            let for_good = self.run.failed_for_good().any(|(failed, _)| failed == name);
            self.ending = Some(Arc::new(Ending { for_good, ..ending }));
        }
    }

    fn hear(&mut self, status: Status, now: Duration, actions: &mut Vec<Action>) {
        if !self.is_supervised() {
            return;
        }
        (self.unknown, self.supervisor_error) = (false, None);
        self.walk(Walk::Done(SUPERVISOR), now, actions);
        let failed = status.tasks.iter().find(|(_, task)| task.state == TaskState::Failed);
        let why = failed.map(|(name, task)| format!("task {name}: {}", task.message));
        if let Some(ending) = &status.ending
            && self.ending.as_deref() != Some(ending)
        {
            self.ending = Some(Arc::new(ending.clone()));
        }
        let all_run = status.tasks.values().all(|task| task.state == TaskState::Running);
        self.status = Some(status);
        match why {
            Some(why) if self.run.is_done(TASKS) => self.walk(Walk::Lost(TASKS, &why), now, actions),
            Some(why) => self.walk(Walk::Tried(TASKS, &why), now, actions),
            None if all_run => self.walk(Walk::Done(TASKS), now, actions),
            None => {}
        }
    }

    fn supervisor_lost(&mut self, why: String, now: Duration, actions: &mut Vec<Action>) {
        let tasks = self.status.take().map(|status| {
            let again = u32::try_from(status.tasks.len()).unwrap_or(u32::MAX);
            report_of(&status).restarts.saturating_add(again)
        });
        self.restarts_before = self.restarts_before.saturating_add(tasks.unwrap_or(0));
        if self.is_ending() {
            // It may have ended by itself just before; whether it has is looked at again.
            actions.extend(self.run.is_stopping(SUPERVISOR).then_some(Action::Stop));
            return;
        }
        let why = bounded_message(why);
        (self.unknown, self.supervisor_error) = (false, Some(why.clone()));
        self.walk(Walk::Lost(SUPERVISOR, &why), now, actions);
        // Its namespace may have gone.
        actions.push(Action::Reconcile);
    }

    fn changed(&mut self, graph: Arc<Graph>, tasks: bool, now: Duration, actions: &mut Vec<Action>) {
        if tasks {
            self.forget_tasks();
        }
        if self.is_supervised() {
            actions.push(Action::Update);
        }
        if **self.run.graph() != *graph {
            self.run.replace(graph);
        }
        if tasks {
            self.walk(Walk::Anew(TASKS), now, actions);
        }
        // What failed for good may succeed with another text.
        let failed: Vec<String> = self.run.failed_for_good().map(|(name, _)| name.to_owned()).collect();
        failed.iter().for_each(|name| self.walk(Walk::Again(name), now, actions));
        self.walk(Walk::Tick, now, actions);
    }

    /// What its supervisor said was of other tasks than those that it must run.
    fn forget_tasks(&mut self) {
        self.ending = None;
        for task in self.status.iter_mut().flat_map(|status| status.tasks.values_mut()) {
            (task.state, task.message) = (TaskState::Starting, String::new());
        }
    }

    fn displaced(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.is_ending() {
            return;
        }
        if self.is_begun() {
            (self.moves, self.unknown) = (true, false);
            self.walk(Walk::DownFrom(LINK), now, actions);
        }
        // Otherwise nothing runs that knows the address.
        actions.push(Action::Reconcile);
    }

    /// Whether anything that knows the address may run.
    fn is_begun(&self) -> bool {
        let graph = self.run.graph().clone();
        let mut later = graph.steps().filter(|step| step.owner != Owner::Node || step.name == SUPERVISOR);
        later.any(|step| self.run.was_begun(&step.name))
    }

    fn remove(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.moves = false;
        if !self.removing {
            self.removing = true;
            self.walk(Walk::Down, now, actions);
        }
    }

    /// A pod that moves starts anew when it has left.
    fn rise_again(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.moves && self.run.is_down_from(LINK) {
            (self.moves, self.network_error, self.supervisor_error) = (false, None, None);
            self.walk(Walk::Up, now, actions);
        }
    }

    fn walk(&mut self, event: Walk<'_>, now: Duration, actions: &mut Vec<Action>) {
        let commands = self.run.handle(event, now);
        self.follow(commands, now, actions);
    }

    fn follow(&mut self, commands: Vec<Command>, now: Duration, actions: &mut Vec<Action>) {
        for command in commands {
            match command {
                Command::Start(step) => actions.extend(self.start(step)),
                Command::Stop(step) => self.stop(step, now, actions),
                Command::TimedOut(step) => actions.push(Action::AbortHook(step)),
            }
        }
        let last = self.removing && self.run.is_down() && !actions.contains(&Action::Finish);
        actions.extend(last.then_some(Action::Finish));
    }

    fn start(&mut self, step: String) -> Option<Action> {
        match step.as_str() {
            LINK => Some(Action::Reconcile),
            FOLDERS => Some(Action::MakeFolders),
            SUPERVISOR => {
                self.supervisor_error = None;
                Some(Action::Supervise)
            }
            // The same look at the kernel, and the supervisor itself.
            ROUTES | ANNOUNCED | TASKS => None,
            _ => Some(Action::RunHook(step)),
        }
    }

    fn stop(&mut self, step: String, now: Duration, actions: &mut Vec<Action>) {
        match step.as_str() {
            LINK => actions.push(Action::Reconcile),
            FOLDERS => actions.push(Action::RemoveFolders),
            SUPERVISOR => actions.push(Action::Stop),
            // They go with the link, and with the supervisor.
            ROUTES | ANNOUNCED | TASKS => self.walk(Walk::Done(&step), now, actions),
            _ => actions.push(Action::UndoHook(step)),
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
    Report { phase, message, restarts, ending: None }
}

fn what_is_waited_for(status: &Status) -> String {
    let waiting = status.tasks.iter().find(|(_, task)| task.state == TaskState::Starting);
    let told = waiting.filter(|(_, task)| !task.message.is_empty());
    told.map_or_else(String::new, |(name, task)| bounded_message(format!("task {name}: {}", task.message)))
}

#[cfg(test)]
mod tests;
