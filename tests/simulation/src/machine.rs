//! A machine that runs pods: its disk, its processes, its kernel, and the agent, which may die at any time.
//!
//! What the agent decides is decided by the node's roster; here its disk, its supervisors and its stream are played.

use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv6Addr,
    time::Duration,
};

use hextet_api::v1;
use scheduler_core::{
    node::{Hello, Node},
    time::Moment,
};

use crate::{
    Broken,
    assignment::{Assignment, PodRecord},
    clock::{Clock, Time, ms},
    identity::Identity,
    network::{End, Host, Packet, StreamId},
    pod_state::{Event, Failure},
    roster::{Duty, Pending, Roster},
    shared::{AgentDue, Shared, What, backoff},
};

mod down;
mod lease;
mod processes;

use lease::Renewer;
pub(crate) use lease::Witness;
use processes::Keeper;
pub(crate) use processes::Process;

/// Why a pod cannot use its address.
const TAKEN: &str = "another has it";
/// How long a node that boots waits for the server's word, before it starts what it was told last.
const BOOT_HEARING_MAX: Duration = Duration::from_millis(1500);
const AUDIT: Duration = Duration::from_secs(30);

pub(crate) struct Machine {
    pub(crate) number: usize,
    pub(crate) name: String,
    identity: Identity,
    pub(crate) hello: Hello,
    pub(crate) clock: Clock,
    pub(crate) life: u64,
    pub(crate) frozen_until: Time,
    pub(crate) has_power: bool,
    /// Its node was deleted: it is not of the cluster until it has joined again.
    pub(crate) is_outcast: bool,
    /// The cluster was restored from before it joined: its key is not known.
    pub(crate) is_stranger: bool,
    /// It was taken down, and nobody has brought it back.
    pub(crate) is_down: bool,
    /// What a crash leaves.
    pub(crate) disk: Assignment,
    /// What the agent's death leaves.
    pub(crate) processes: BTreeMap<String, Process>,
    pub(crate) kernel: BTreeMap<String, Ipv6Addr>,
    /// Until when pods of which there may only be one run, by the file that their supervisors read.
    lease_file: Option<Moment>,
    looks_at_lease: bool,
    pub(crate) witness: Witness,
    pub(crate) agent: Option<Agent>,
}

/// What dies with the agent.
pub(crate) struct Agent {
    pub(crate) roster: Roster,
    pub(crate) stream: Option<StreamId>,
    failures: u32,
    keepers: BTreeMap<String, Keeper>,
    keepers_made: u64,
    lease: Renewer,
    /// What it was told last is not started yet: the server may have replaced it.
    is_booting: bool,
    is_reconciling: bool,
    is_saying: bool,
    /// It is being taken down, and does nothing else.
    is_leaving: bool,
    /// When it looks at the steps of its pods next.
    step_at: Option<Duration>,
}

impl Machine {
    pub(crate) fn new(number: usize, identity: Identity, hello: Hello, shared: &mut Shared) -> Machine {
        Machine {
            number,
            name: identity.name.clone(),
            identity,
            hello,
            clock: Clock::new(&mut shared.rng),
            life: 0,
            frozen_until: Time::default(),
            has_power: true,
            is_outcast: false,
            is_stranger: false,
            is_down: false,
            disk: Assignment::default(),
            processes: BTreeMap::new(),
            kernel: BTreeMap::new(),
            lease_file: None,
            looks_at_lease: false,
            witness: Witness::Honest,
            agent: None,
        }
    }

    /// Whether a node of this name is this machine.
    pub(crate) fn is(&self, node: &Node) -> bool {
        (node.prefix, node.group_id) == (self.identity.prefix, self.identity.group)
    }

    fn host(&self) -> Host {
        Host::Node(self.number)
    }

    fn plan(&self, shared: &mut Shared, wait: Duration, due: AgentDue) {
        let wait = self.clock.real(wait);
        shared.plan(wait, What::Agent(self.number, self.life, due));
    }

    fn agent_mut(&mut self) -> &mut Agent {
        self.agent.as_mut().expect("the agent runs")
    }

    /// The agent starts; with it, after a power failure, the machine.
    pub(crate) fn start(&mut self, shared: &mut Shared) {
        if self.agent.is_some() || self.is_outcast || self.is_down {
            return;
        }
        self.life += 1;
        self.hello.session = self.life;
        if !self.has_power {
            self.has_power = true;
            self.clock.restart(shared.now);
        }
        shared.note(format!("{}: the agent starts with {} pods", self.name, self.disk.pods.len()));
        self.agent = Some(Agent {
            roster: Roster::new(self.identity.clone(), self.disk.clone()),
            stream: None,
            failures: 0,
            keepers: BTreeMap::new(),
            keepers_made: 0,
            lease: Renewer::new(),
            is_booting: true,
            is_reconciling: false,
            is_saying: false,
            is_leaving: false,
            step_at: None,
        });
        let mut wanted = self.disk.pods.iter().filter(|(_, record)| !record.removing);
        let is_any_down = wanted.any(|(pod, _)| !self.processes.contains_key(pod));
        self.plan(shared, ms(1), AgentDue::Connect);
        self.plan(shared, ms(1), AgentDue::ConnectLease);
        self.plan(shared, AUDIT, AgentDue::Audit);
        if is_any_down {
            self.plan(shared, BOOT_HEARING_MAX, AgentDue::Boot);
        } else {
            self.boot(shared);
        }
    }

    fn boot(&mut self, shared: &mut Shared) {
        let processes = self.processes.clone();
        let agent = self.agent_mut();
        if std::mem::replace(&mut agent.is_booting, false) {
            let duties = agent.roster.boot(|pod| processes.contains_key(pod), |_, _| false);
            self.fulfil(duties, shared);
        }
    }

    /// The agent is killed, and tried again; with the power everything but the disk is gone.
    pub(crate) fn crash(&mut self, power: bool, shared: &mut Shared) {
        if !self.has_power || (self.agent.is_none() && !power) {
            return;
        }
        shared.note(format!(
            "{}: {}",
            self.name,
            if power { "loses its power" } else { "the agent is killed" }
        ));
        let agent = self.agent.take();
        // Killed meanwhile, it is started again.
        self.is_down &= agent.as_ref().is_none_or(|agent| !agent.is_leaving);
        let streams = agent.into_iter().flat_map(|agent| [agent.stream, agent.lease.stream]).flatten();
        for stream in streams {
            if power {
                shared.vanish(stream, End::Client);
            } else {
                shared.drop_stream(stream, End::Client, false);
            }
        }
        if power {
            self.has_power = false;
            self.processes.clear();
            self.kernel.clear();
            self.lease_file = None;
        }
        let wait = if power { shared.between(500, 40_000) } else { shared.between(50, 5_000) };
        shared.plan(wait, What::StartAgent(self.number));
    }

    /// Everything on it ends, and its disk is emptied.
    pub(crate) fn wipe(&mut self, shared: &mut Shared) {
        self.crash(true, shared);
        self.is_down = false;
        self.disk = Assignment::default();
    }

    /// It is of the cluster again, as if it had never been.
    pub(crate) fn reborn(&mut self, identity: Identity, shared: &mut Shared) {
        shared.note(format!("{} has joined again", self.name));
        (self.identity, self.is_outcast, self.is_stranger) = (identity, false, false);
        self.start(shared);
    }

    pub(crate) fn due(&mut self, due: AgentDue, server_listens: bool, shared: &mut Shared) {
        if self.agent.as_ref().is_none_or(|agent| agent.is_leaving && !Machine::is_of_leaving(&due)) {
            return;
        }
        match due {
            AgentDue::Connect => self.connect(server_listens, shared),
            AgentDue::ConnectLease => self.connect_lease(server_listens, shared),
            AgentDue::Renew(stream) => self.renew(stream, shared),
            AgentDue::Testify(stream, seen) => self.testify(stream, seen, shared),
            AgentDue::Boot => self.boot(shared),
            AgentDue::Say => self.say(shared),
            AgentDue::Reconcile => self.reconcile(shared),
            AgentDue::Audit => {
                self.reconcile_soon(shared);
                self.plan(shared, AUDIT, AgentDue::Audit);
            }
            AgentDue::Keeper(pod, number) => self.keeper_due(&pod, number, shared),
            AgentDue::Step => self.step(shared),
            AgentDue::Leave => self.leave(shared),
            AgentDue::Echo => self.echo(shared),
            AgentDue::Down => self.down(shared),
            AgentDue::Fail(pod) => self.fail_by_itself(&pod, shared),
        }
    }

    fn connect(&mut self, server_listens: bool, shared: &mut Shared) {
        if self.agent_mut().stream.is_some() {
            return;
        }
        if !server_listens || self.is_stranger || shared.network.is_cut_off(self.host()) {
            return self.connect_later(shared);
        }
        let stream = shared.network.open(self.host());
        shared.note(format!("{}: attaches by stream {stream}", self.name));
        let agent = self.agent_mut();
        agent.stream = Some(stream);
        agent.roster.attached();
        let taken: Vec<_> = agent
            .roster
            .assignment()
            .pods
            .iter()
            .filter(|(_, pod)| pod.taken_by.is_some())
            .map(|(id, _)| id.clone())
            .collect();
        taken.iter().for_each(|pod| agent.roster.ask_for_address(pod));
        shared.send(stream, End::Server, Packet::Hello(self.name.clone(), self.hello.clone()));
        self.say_soon(shared);
    }

    fn connect_later(&mut self, shared: &mut Shared) {
        let failures = self.agent_mut().failures;
        self.agent_mut().failures = failures.saturating_add(1);
        let wait = backoff(shared, failures, 250, 5_000);
        self.plan(shared, wait, AgentDue::Connect);
    }

    fn say_soon(&mut self, shared: &mut Shared) {
        let agent = self.agent_mut();
        if !agent.roster.news().is_empty() && !std::mem::replace(&mut agent.is_saying, true) {
            self.plan(shared, ms(1), AgentDue::Say);
        }
    }

    fn say(&mut self, shared: &mut Shared) {
        let agent = self.agent_mut();
        agent.is_saying = false;
        let Some(stream) = agent.stream else { return };
        if agent.roster.news().is_empty() {
            return;
        }
        if !shared.network.has_room(stream, End::Server) {
            agent.is_saying = true;
            return self.plan(shared, ms(20), AgentDue::Say);
        }
        shared.send(stream, End::Server, Packet::Report(agent.roster.take_news()));
        self.say_soon(shared);
    }

    pub(crate) fn receive(&mut self, stream: StreamId, packet: Packet, alive: &[bool], shared: &mut Shared) {
        if self.agent.as_ref().is_some_and(|agent| agent.lease.stream == Some(stream)) {
            return match packet {
                Packet::Answer(answer) => self.hear_answer(stream, answer, alive, shared),
                _ => drop(self.let_go_of_lease(stream, shared)),
            };
        }
        if self.agent.as_ref().is_none_or(|agent| agent.stream != Some(stream)) {
            return shared.drop_stream(stream, End::Client, false);
        }
        if self.agent_mut().is_leaving {
            return self.hear_while_leaving(&packet, shared);
        }
        match packet {
            Packet::Assignment(message) => self.follow(message, shared),
            Packet::Closed => self.detach(stream, shared),
            other => shared.wrong(format!("{} was sent {other:?}", self.name)),
        }
    }

    pub(crate) fn detach(&mut self, stream: StreamId, shared: &mut Shared) {
        if self.let_go_of_lease(stream, shared) {
            return;
        }
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.stream == Some(stream)) else { return };
        agent.stream = None;
        agent.roster.detached();
        shared.drop_stream(stream, End::Client, false);
        self.connect_later(shared);
    }

    /// Makes the server's word durable, then acts on it.
    fn follow(&mut self, message: v1::Assignment, shared: &mut Shared) {
        let agent = self.agent_mut();
        agent.failures = 0;
        let stream = agent.stream;
        let (pending, complaints) = agent.roster.told(message);
        // What it has said itself, and the server has not answered yet, is no mistake of the server.
        if let Some(complaint) = complaints.iter().find(|complaint| !complaint.ends_with(TAKEN)) {
            shared.wrong(format!("{} cannot follow the server: {complaint}", self.name));
        }
        match self.commit(pending, shared) {
            // What the boot does about it follows.
            Some(_) if self.agent_mut().is_booting => self.boot(shared),
            Some(duties) => self.fulfil(duties, shared),
            // Only a whole assignment can be followed after one that is lost.
            None => stream.into_iter().for_each(|stream| self.detach(stream, shared)),
        }
    }

    /// Another machine turns out to have the address of a pod.
    pub(crate) fn lose_address(&mut self, pod: &str, shared: &mut Shared) {
        let Some(agent) = self.agent.as_mut().filter(|agent| !agent.is_leaving) else { return };
        let record = agent.roster.assignment().pods.get(pod);
        if !record.is_some_and(|record| !record.removing && record.taken_by.is_none()) {
            return;
        }
        shared.note(format!("{}: the address of {pod} is another's", self.name));
        let pending = agent.roster.displaced(pod, [2, 0, 0, 0, 1, 0], TAKEN.to_owned());
        if let Some(duties) = self.commit(pending, shared) {
            self.agent_mut().roster.ask_for_address(pod);
            self.fulfil(duties, shared);
        }
    }

    /// What there is to do when it is durable; none when the disk is full, or when the agent died just then.
    fn commit(&mut self, pending: Pending, shared: &mut Shared) -> Option<Vec<Duty>> {
        if shared.fault(0.003) {
            shared.note(format!("{}: the disk is full", self.name));
            return None;
        }
        if !shared.is_broken(Broken::FollowsBeforeDurable) || shared.chance(0.5) {
            self.disk = pending.next.clone();
        }
        if shared.fault(0.003) {
            self.crash(false, shared);
            return None;
        }
        let duties = self.agent_mut().roster.durable(pending, is_changed);
        self.write_lease(shared);
        Some(duties)
    }

    fn happen(&mut self, pod: &str, event: Event, shared: &mut Shared) {
        let now = self.clock.moment(shared.now).0;
        let roster = &mut self.agent_mut().roster;
        let mut duties = roster.advance(now);
        duties.extend(roster.happen(pod, event));
        self.fulfil(duties, shared);
    }

    /// Waits of pods that are over.
    fn step(&mut self, shared: &mut Shared) {
        let now = self.clock.moment(shared.now).0;
        let agent = self.agent_mut();
        agent.step_at = None;
        let duties = agent.roster.advance(now);
        self.fulfil(duties, shared);
    }

    /// Comes back when the next step of a pod is due.
    fn step_later(&mut self, shared: &mut Shared) {
        let now = self.clock.moment(shared.now).0;
        let agent = self.agent_mut();
        let Some(due) = agent.roster.due() else { return };
        if agent.step_at.is_none_or(|at| due < at) {
            agent.step_at = Some(due);
            self.plan(shared, due.saturating_sub(now).max(ms(1)), AgentDue::Step);
        }
    }

    fn fulfil(&mut self, duties: Vec<Duty>, shared: &mut Shared) {
        let mut finished = Vec::new();
        let mut duties = VecDeque::from(duties);
        while let Some(duty) = duties.pop_front() {
            match duty {
                Duty::Reconcile => self.reconcile_soon(shared),
                Duty::Act(pod, action) => duties.extend(self.act(&pod, action, shared)),
                Duty::Finish(pod) => finished.push(pod),
            }
        }
        self.finish(finished, shared);
        if self.agent.is_some() {
            self.say_soon(shared);
            self.step_later(shared);
        }
    }

    /// The records of these pods go.
    fn finish(&mut self, mut pods: Vec<String>, shared: &mut Shared) {
        pods.retain(|_| !shared.fault(0.01));
        let (duties, pending) = self.agent_mut().roster.finished(pods);
        if !duties.is_empty() {
            self.fulfil(duties, shared);
        }
        let Some(pending) = pending else { return };
        if self.commit(pending, shared).is_some_and(|duties| !duties.is_empty()) {
            self.reconcile_soon(shared);
        }
    }

    fn reconcile_soon(&mut self, shared: &mut Shared) {
        if !std::mem::replace(&mut self.agent_mut().is_reconciling, true) {
            let wait = shared.between(1, 30);
            self.plan(shared, wait, AgentDue::Reconcile);
        }
    }

    /// Brings the kernel to what is wanted, and the pods on from there.
    fn reconcile(&mut self, shared: &mut Shared) {
        let agent = self.agent.as_mut().expect("the agent runs");
        agent.is_reconciling = false;
        let all: Vec<_> =
            agent.roster.assignment().pods.iter().map(|(id, pod)| (id.clone(), pod.clone())).collect();
        let is_wanted = |id: &str, pod: &PodRecord| {
            pod.problem.is_none() && pod.ipv4.is_some() && !agent.roster.is_absent(id)
        };
        let wanted: BTreeMap<String, Ipv6Addr> = all
            .iter()
            .filter(|(id, pod)| is_wanted(id, pod))
            .map(|(id, pod)| (id.clone(), pod.address))
            .collect();
        let mut failures = BTreeMap::new();
        for (id, _) in &all {
            if shared.fault(0.01) {
                let has_link = shared.chance(0.5);
                failures.insert(id.clone(), Failure { has_link, why: "the kernel refuses".to_owned() });
            } else if let Some(address) = wanted.get(id) {
                self.kernel.insert(id.clone(), *address);
            } else {
                self.kernel.remove(id);
            }
        }
        let failure = |pod: &str| failures.get(pod).cloned();
        let events = agent.roster.network_events(|pod| wanted.contains_key(pod), failure, None);
        if !failures.is_empty() {
            let wait = shared.between(250, 1_000);
            self.plan(shared, wait, AgentDue::Reconcile);
        }
        for (pod, event) in events {
            if self.agent.is_some() {
                self.happen(&pod, event, shared);
            }
        }
    }
}

/// Whether a pod's supervisor must be told of its new record.
fn is_changed(_: &str, before: &PodRecord, now: &PodRecord) -> bool {
    let spec = |pod: &PodRecord| (pod.tasks.clone(), pod.ipv4, pod.singleton);
    spec(before) != spec(now)
}
