//! The processes of a machine's pods, which live on without the agent, and the agent's keepers of them.

use std::net::Ipv6Addr;

use hextet_lifecycle::Ending;

use super::Machine;
use crate::{
    Broken,
    assignment::{PodRecord, Task},
    clock::ms,
    deploy::BAD,
    pod_state::{Action, Event},
    roster::Duty,
    shared::{AgentDue, Shared},
    supervisor::status::{Status, TaskState, TaskStatus},
};

/// What runs for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) address: Ipv6Addr,
    pub(crate) tasks: Vec<Task>,
    pub(crate) restarts: u32,
    /// Its job and group.
    pub(crate) group: String,
    /// There must never be two of it that live: it lives while the machine's lease runs.
    pub(crate) is_single: bool,
    /// What the tasks of such a pod show to what they write to.
    pub(crate) token: u64,
    pub(crate) lives: bool,
}

/// The agent's hold on a pod's supervisor.
pub(super) struct Keeper {
    number: u64,
    record: PodRecord,
    stops: bool,
    has_begun: bool,
}

impl Machine {
    /// Does something for a pod; what follows at once.
    pub(super) fn act(&mut self, pod: &str, action: Action, shared: &mut Shared) -> Vec<Duty> {
        match action {
            Action::Supervise => {
                self.keep(pod, false, shared);
                if shared.is_broken(Broken::SaysRunningTooEarly) {
                    let running = Event::Status(Status::default());
                    return self.agent_mut().roster.happen(pod, running);
                }
            }
            Action::Update => self.update(pod, shared),
            Action::Stop => self.keep(pod, true, shared),
            Action::MakeFolders | Action::RemoveFolders => {
                let result = if shared.fault(0.01) { Err("the disk is full".to_owned()) } else { Ok(()) };
                return self.agent_mut().roster.happen(pod, Event::Folders(result));
            }
            // Jobs here have no hooks.
            _ => {}
        }
        Vec::new()
    }

    /// Starts, finds or stops a supervisor, which takes its time.
    fn keep(&mut self, pod: &str, stops: bool, shared: &mut Shared) {
        let agent = self.agent_mut();
        let Some(record) = agent.roster.assignment().pods.get(pod).cloned() else { return };
        agent.keepers_made += 1;
        let number = agent.keepers_made;
        match agent.keepers.get_mut(pod) {
            Some(keeper) if stops => (keeper.stops, keeper.number) = (true, number),
            _ => {
                let keeper = Keeper { number, record, stops, has_begun: false };
                agent.keepers.insert(pod.to_owned(), keeper);
            }
        }
        let wait = if stops { shared.between(5, 1_500) } else { shared.between(5, 300) };
        self.plan(shared, wait, AgentDue::Keeper(pod.to_owned(), number));
    }

    fn update(&mut self, pod: &str, shared: &mut Shared) {
        let agent = self.agent_mut();
        let Some(record) = agent.roster.assignment().pods.get(pod).cloned() else { return };
        let Some(keeper) = agent.keepers.get_mut(pod) else { return };
        keeper.record = record;
        let number = keeper.number;
        self.plan(shared, ms(20), AgentDue::Keeper(pod.to_owned(), number));
    }

    pub(super) fn keeper_due(&mut self, pod: &str, number: u64, shared: &mut Shared) {
        let agent = self.agent.as_mut().expect("the agent runs");
        let Some(keeper) = agent.keepers.get_mut(pod).filter(|keeper| keeper.number == number) else {
            return;
        };
        if keeper.stops {
            agent.keepers.remove(pod);
            if !shared.is_broken(Broken::SaysGoneTooEarly) {
                self.processes.remove(pod);
            }
            return self.happen(pod, Event::SupervisorStopped, shared);
        }
        if !keeper.has_begun && shared.fault(0.03) {
            agent.keepers.remove(pod);
            self.processes.remove(pod);
            return self.happen(pod, Event::SupervisorLost("it did not start".to_owned()), shared);
        }
        keeper.has_begun = true;
        let record = keeper.record.clone();
        self.run(pod, &record, shared);
        if shared.faulty && is_bad(&record.tasks) {
            let wait = shared.between(20, 1_500);
            self.plan(shared, wait, AgentDue::Fail(pod.to_owned()));
        }
        let status = self.status(pod, TaskState::Running);
        self.happen(pod, Event::Status(status), shared);
    }

    /// A task of a version that fails ends.
    pub(super) fn fail_by_itself(&mut self, pod: &str, shared: &mut Shared) {
        if shared.faulty && self.processes.get(pod).is_some_and(|process| is_bad(&process.tasks)) {
            self.lose_process(pod, false, shared);
        }
    }

    /// Starts the pod's tasks, adopts those that run, or restarts them in place when they are others.
    fn run(&mut self, pod: &str, record: &PodRecord, shared: &mut Shared) {
        match self.disk.pods.get(pod) {
            None => shared.wrong(format!("{} runs {pod}, of which its store does not know", self.name)),
            Some(stored) if stored.removing && !self.processes.contains_key(pod) => {
                shared.wrong(format!("{} starts {pod}, which it was told to give up", self.name));
            }
            Some(_) => {}
        }
        if self.kernel.get(pod) != Some(&record.address) && !self.processes.contains_key(pod) {
            shared.wrong(format!("{} starts {pod} without its network", self.name));
        }
        let is_single = record.singleton.is_some();
        let new = Process {
            address: record.address,
            tasks: record.tasks.clone(),
            restarts: 0,
            group: format!("{}/{}", record.job, record.group),
            is_single,
            token: record.singleton.unwrap_or_default(),
            lives: !is_single || self.lease_runs(shared.now),
        };
        let restarts = match self.processes.get(pod) {
            Some(old) if old.tasks == new.tasks && old.address == new.address => {
                return self.look_at_lease_soon(shared);
            }
            Some(old) => old.restarts + 1,
            None => 0,
        };
        shared.note(format!("{}: {pod} runs at {}", self.name, new.address));
        self.processes.insert(pod.to_owned(), Process { restarts, ..new });
        self.look_at_lease_soon(shared);
    }

    /// The supervisor has something new to say, if anybody listens.
    pub(super) fn keeper_hears(&mut self, pod: &str, shared: &mut Shared) {
        let Some(agent) = &self.agent else { return };
        let Some(keeper) = agent.keepers.get(pod).filter(|keeper| keeper.has_begun) else { return };
        let number = keeper.number;
        self.plan(shared, ms(1), AgentDue::Keeper(pod.to_owned(), number));
    }

    /// A task of a pod ends, and is started again by its supervisor; or the supervisor ends, and its tasks with it.
    pub(crate) fn lose_process(&mut self, pod: &str, supervisor: bool, shared: &mut Shared) {
        let Some(process) = self.processes.get_mut(pod) else { return };
        process.restarts += 1;
        shared.note(format!(
            "{}: {} of {pod} dies",
            self.name,
            if supervisor { "the supervisor" } else { "a task" }
        ));
        if supervisor {
            self.processes.remove(pod);
        }
        let Some(agent) = self.agent.as_mut().filter(|agent| !agent.is_leaving) else { return };
        let Some(keeper) = agent.keepers.get(pod).filter(|keeper| keeper.has_begun && !keeper.stops) else {
            return;
        };
        if supervisor {
            agent.keepers.remove(pod);
            return self.happen(pod, Event::SupervisorLost("it was killed".to_owned()), shared);
        }
        let number = keeper.number;
        let status = self.status(pod, TaskState::Failed);
        let wait = shared.between(200, 2_000);
        self.plan(shared, wait, AgentDue::Keeper(pod.to_owned(), number));
        self.happen(pod, Event::Status(status), shared);
    }

    fn status(&self, pod: &str, state: TaskState) -> Status {
        let Some(process) = self.processes.get(pod) else { return Status::default() };
        let state = if process.lives { state } else { TaskState::Starting };
        let one = TaskStatus { state, restarts: process.restarts, ..TaskStatus::default() };
        let tasks = process.tasks.iter().map(|task| (task.name.clone(), one.clone())).collect();
        let ending =
            (state == TaskState::Failed).then(|| Ending::new("task t: as the seed wants", b"its last line"));
        Status { tasks, ending, ..Status::default() }
    }
}

fn is_bad(tasks: &[Task]) -> bool {
    tasks.iter().any(|task| task.exec.first().is_some_and(|program| program == BAD))
}
