//! What must hold after every step, and what must hold when faults have stopped.
//!
//! The server is judged by its disk, revision by revision; a node by its disk, its processes and its kernel; a load
//! balancer by what the cluster was at the revision that it says it knows.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
};

use scheduler_core::{
    assignment,
    change::{Revision, Value},
    endpoint::{self, Selection, Selector},
    node::Node,
    pod::{PodId, PodPhase},
    state::State,
};

use self::numbers::Numbers;
use crate::{balancer::Balancer, machine::Machine, server::Server, shared::Shared};

mod change;
mod deploy;
mod numbers;
mod room;
mod state;

pub(crate) struct Checks {
    /// The state of the last revision that was looked at.
    state: State,
    /// Which pod had an address first.
    given: BTreeMap<Ipv6Addr, PodId>,
    made: BTreeSet<PodId>,
    /// What each selector selected, by the epoch and the revision that changed it.
    selected: BTreeMap<Selector, BTreeMap<(u64, u64), Selection>>,
    /// How often a backup was restored.
    epoch: u64,
    numbers: Numbers,
    acknowledged: usize,
    /// Nodes that said that they are taken down, and that nobody has brought back.
    left: BTreeSet<String>,
    /// Deploys that were promoted, and that went back.
    pub(crate) deploys: [u64; 2],
}

impl Checks {
    pub(crate) fn new(selectors: &[Selector]) -> Checks {
        let of = |selector: &Selector| (selector.clone(), BTreeMap::from([((0, 0), Selection::new())]));
        Checks {
            state: State::default(),
            given: BTreeMap::new(),
            made: BTreeSet::new(),
            selected: selectors.iter().map(of).collect(),
            epoch: 0,
            numbers: Numbers::default(),
            acknowledged: 0,
            left: BTreeSet::new(),
            deploys: [0, 0],
        }
    }

    pub(crate) fn after_step(
        &mut self,
        server: &Server,
        machines: &[Machine],
        shared: &Shared,
    ) -> Result<(), String> {
        if self.epoch != server.epoch {
            self.restored(server)?;
        }
        while self.state.revision() < server.disk.revision() {
            self.next_revision(server, machines, shared)?;
        }
        self.acknowledgements(server)?;
        if let Some(process) = &server.process
            && process.shown.revision() > server.disk.revision()
            && shared.options.broken.is_none()
        {
            return Err("the server shows what is not durable".to_owned());
        }
        machines.iter().try_for_each(has_what_it_runs)?;
        self.numbers.tokens_grow(machines)?;
        runs_once(machines)
    }

    /// The state is that of the backup, and what came after it is no more.
    fn restored(&mut self, server: &Server) -> Result<(), String> {
        let backup = server.backup.as_ref().ok_or("something is restored, and there was no backup")?;
        self.epoch = server.epoch;
        self.state = backup.state().clone();
        self.acknowledged = 0;
        self.left.clear();
        for (selector, selected) in &mut self.selected {
            let now = endpoint::select(&self.state, selector);
            selected.insert((self.epoch, self.state.revision()), now);
        }
        Ok(())
    }

    fn next_revision(
        &mut self,
        server: &Server,
        machines: &[Machine],
        shared: &Shared,
    ) -> Result<(), String> {
        let number = self.state.revision() + 1;
        let revision = server.disk.get(number).ok_or_else(|| format!("revision {number} is missing"))?;
        let before = self.state.clone();
        self.state.advance(revision);
        state::is_reversible(&before, &self.state, revision)?;
        let unwell = shared.unwell.get(&number);
        let is_unwell = |pod: &PodId| unwell.is_some_and(|pods| pods.contains(pod));
        change::holds(&before, &as_labelled(&self.state, machines), revision, &is_unwell)?;
        let asked = revision.message.strip_prefix("op ").and_then(|number| number.parse().ok());
        let seen = asked.and_then(|number: u64| shared.acknowledged.get(&number));
        deploy::holds(&before, &self.state, revision, &|id| seen == Some(id))?;
        self.stays_down(revision, machines)?;
        let [promoted, back] = deploy::ends(revision);
        self.deploys = [self.deploys[0] + promoted, self.deploys[1] + back];
        for (selector, selected) in &mut self.selected {
            let now = endpoint::select(&self.state, selector);
            if selected.last_key_value().is_none_or(|(_, last)| *last != now) {
                selected.insert((self.epoch, number), now);
            }
        }
        let machine = |node: &str| machines.iter().find(|machine| machine.name == node);
        state::holds(&self.state, &|node| machine(node).map(|machine| &machine.hello))?;
        for pod in self.state.pods().values() {
            let Some(address) = pod.address else { continue };
            let owner = self.given.entry(address).or_insert_with(|| pod.id.clone());
            if *owner != pod.id {
                return Err(format!("{address} was {owner}'s and is given to {}", pod.id));
            }
        }
        self.names_are_new(revision)?;
        self.numbers.terms_grow(revision)
    }

    /// No two pods have one id, also when one of them was made after the backup that the other's cluster was made of.
    fn names_are_new(&mut self, revision: &Revision) -> Result<(), String> {
        for change in &revision.changes {
            if let (None, Some(Value::Pod(pod))) = (&change.old, &change.new)
                && !self.made.insert(pod.id.clone())
            {
                return Err(format!("two pods have had the id {}", pod.id));
            }
        }
        Ok(())
    }

    /// A node that was taken down does not come back by itself.
    fn stays_down(&mut self, revision: &Revision, machines: &[Machine]) -> Result<(), String> {
        let is_down = |name: &String| machines.iter().any(|machine| machine.name == *name && machine.is_down);
        if let Some((_, name)) = revision.changer.split_once(':')
            && revision.message == format!("node {name} was taken down")
        {
            self.left.insert(name.to_owned());
        }
        self.left.retain(is_down);
        let nodes = self.left.iter().filter_map(|name| self.state.nodes().get(name));
        match nodes.into_iter().find(|node| node.phase.reports()) {
            Some(node) => Err(format!("{} was taken down, and comes back by itself", node.name)),
            None => Ok(()),
        }
    }

    /// What an operator was told to be done is on the disk, as that operator's.
    fn acknowledgements(&mut self, server: &Server) -> Result<(), String> {
        for (revision, operator) in &server.acknowledged[self.acknowledged..] {
            let message = format!("op {operator}");
            if server.disk.get(*revision).is_none_or(|entry| entry.message != message) {
                return Err(format!(
                    "the write of op {operator} was acknowledged as {revision} and is not on the disk"
                ));
            }
        }
        self.acknowledged = server.acknowledged.len();
        Ok(())
    }

    /// A balancer knows exactly what the cluster was at its revision.
    pub(crate) fn knows(&self, balancer: &Balancer) -> Result<(), String> {
        let history = &self.selected[&balancer.selector];
        let epoch: u64 = balancer.epoch[1..].parse().expect("the store's name");
        let Some((_, then)) = history.range((epoch, 0)..=(epoch, balancer.revision)).next_back() else {
            return Err("it knows a revision from before the first".to_owned());
        };
        if epoch == self.epoch && balancer.revision > self.state.revision() {
            return Err(format!("it knows revision {}, which is not durable", balancer.revision));
        }
        if *then == balancer.known {
            return Ok(());
        }
        let diff = endpoint::diff(&balancer.known, then);
        Err(format!("at revision {} of {} it lacks {diff:?}", balancer.revision, balancer.selector))
    }

    /// When nothing goes wrong any more, everybody agrees.
    pub(crate) fn has_converged(
        &self,
        server: &Server,
        machines: &[Machine],
        balancers: &[Balancer],
    ) -> Result<(), String> {
        let process = server.process.as_ref().ok_or("the server is down")?;
        if process.shown.revision() != server.disk.revision() {
            return Err("the server does not show what is on its disk".to_owned());
        }
        if self.state.restored().is_some() {
            return Err("singletons still wait for leases from before a restore".to_owned());
        }
        state::has_settled(&self.state)?;
        deploy::pods_are_of_the_text(&self.state)?;
        crate::deploy::have_ended(&self.state)?;
        machines.iter().try_for_each(|machine| runs_what_it_should(&self.state, machine))?;
        for balancer in balancers {
            self.knows(balancer)?;
            if balancer.known != endpoint::select(&self.state, &balancer.selector) {
                return Err(format!("the balancer of {} does not know the present", balancer.selector));
            }
        }
        Ok(())
    }
}

/// The state with the labels that the machines have, should it have others.
fn as_labelled<'a>(state: &'a State, machines: &[Machine]) -> Cow<'a, State> {
    let labels = |name: &str| Some(&machines.iter().find(|machine| machine.name == name)?.hello.labels);
    let is_so = |node: &Node| node.underlay.is_none() || labels(&node.name) == Some(&node.labels);
    if state.nodes().values().all(|node| is_so(node)) {
        return Cow::Borrowed(state);
    }
    let values = state.values().map(|(key, value)| match value {
        Value::Node(node) => {
            let labels = labels(&node.name).unwrap_or(&node.labels).clone();
            (key, Value::Node(Node { labels, ..Node::clone(&node) }.into()))
        }
        value => (key, value),
    });
    Cow::Owned(State::load(state.revision(), values))
}

/// What runs is in the machine's store, so that a new agent, or the machine after a crash, knows of it.
fn has_what_it_runs(machine: &Machine) -> Result<(), String> {
    let stray = machine.processes.keys().find(|pod| !machine.disk.pods.contains_key(*pod));
    stray.map_or(Ok(()), |pod| Err(format!("{} runs {pod} and has forgotten it", machine.name)))
}

/// No pod runs on two machines, no address is two pods', and of what there may only be one there are not two.
fn runs_once(machines: &[Machine]) -> Result<(), String> {
    let (mut pods, mut addresses) = (BTreeMap::new(), BTreeMap::new());
    let mut single = BTreeMap::new();
    for machine in machines {
        for (pod, process) in &machine.processes {
            if let Some(other) = pods.insert(pod, &machine.name) {
                return Err(format!("{pod} runs on {other} and on {}", machine.name));
            }
            if process.is_single
                && process.lives
                && let Some(other) = single.insert(&process.group, pod)
            {
                return Err(format!(
                    "{other} and {pod} live, and there must never be two of {}",
                    process.group
                ));
            }
            if let Some(other) = addresses.insert(process.address, pod) {
                return Err(format!("{other} and {pod} run with the address {}", process.address));
            }
        }
    }
    Ok(())
}

fn runs_what_it_should(state: &State, machine: &Machine) -> Result<(), String> {
    let view = assignment::view(state, &machine.name);
    let name = &machine.name;
    if !view.stopping.is_empty() {
        return Err(format!("{name} still has to stop {:?}", view.stopping));
    }
    let wanted: BTreeMap<String, Ipv6Addr> =
        view.pods.iter().map(|(id, pod)| (id.to_string(), pod.address)).collect();
    let kept: BTreeMap<_, _> = machine.disk.pods.iter().map(|(id, pod)| (id.clone(), pod.address)).collect();
    let run: BTreeMap<_, _> = machine.processes.iter().map(|(id, one)| (id.clone(), one.address)).collect();
    for (what, has) in [("keeps", &kept), ("runs", &run), ("routes", &machine.kernel)] {
        if *has != wanted {
            return Err(format!("{name} {what} {has:?}, and should {wanted:?}"));
        }
    }
    for (id, pod) in &view.pods {
        let exec: Option<Vec<_>> =
            pod.spec().map(|group| group.tasks.values().map(|task| task.exec.clone()).collect());
        let runs = machine.processes[id.as_str()].tasks.iter().map(|task| task.exec.clone()).collect();
        if exec != Some(runs) {
            return Err(format!("{name} runs another version of {id}"));
        }
        if state.pods()[id].phase != PodPhase::Running {
            return Err(format!("{name} runs {id}, and the server does not know"));
        }
    }
    if let Some((pod, _)) = machine.processes.iter().find(|(_, process)| !process.lives) {
        return Err(format!("{name} holds its lease, and {pod} does not live"));
    }
    let peers: BTreeSet<_> = view.peers.keys().collect();
    if peers != machine.disk.peers.keys().collect() {
        return Err(format!("{name} does not know its peers"));
    }
    Ok(())
}
