//! Random events from one seed; what must always hold is checked after each.
//!
//! `SEED=7 cargo test -p scheduler-core --test simulation` runs one seed alone.

#[path = "support/mod.rs"]
mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
};

use rand::{Rng as _, seq::IteratorRandom as _};
use scheduler_core::{
    assignment,
    change::{Revision, Value},
    countable::Countables,
    endpoint,
    event::{Claim, Conflict, Event, Mac, PodReport, PrefixChoice},
    job::{Availability, Constraint, Group, Job, Spread, Task},
    node::NodePhase,
    placement,
    pod::{Pod, PodId, PodPhase},
    quantity::{Cpu, Memory, Resources},
    rollout::{self, Rollout},
    state::State,
    time::WallTime,
};
use support::World;

const STEPS: usize = 300;
const SEEDS: u64 = 48;

#[test]
fn what_must_hold_holds_after_every_step_and_all_converges() {
    let one = std::env::var("SEED").ok().map(|seed| seed.parse().expect("SEED is a number"));
    let seeds = one.map_or(0..SEEDS, |seed| seed..seed + 1);
    for seed in seeds {
        println!("seed {seed}");
        let mut simulation = Simulation::new(seed);
        (0..STEPS).for_each(|_| simulation.step());
        simulation.settle();
    }
}

struct Simulation {
    world: World,
    /// The state that revisions alone make: what a restart would load.
    replica: State,
    /// Every address that any pod ever had.
    given: BTreeMap<Ipv6Addr, PodId>,
    made: BTreeSet<PodId>,
    /// What a load balancer of job j0 has seen, event by event.
    seen: endpoint::Selection,
}

impl Simulation {
    fn new(seed: u64) -> Simulation {
        let world = World::new(seed);
        let replica = world.state.clone();
        let (given, made, seen) = Default::default();
        Simulation { world, replica, given, made, seen }
    }

    fn step(&mut self) {
        self.world.watched = self.world.rng.random_bool(0.5);
        match self.world.rng.random_range(0..15) {
            0 => self.join(),
            1..=3 => self.apply(),
            4 => self.delete_job(),
            5 => self.lose(),
            6 => self.everyone_returns(0.5),
            7 => self.delete_node(),
            8 => self.drain(),
            9 => self.conflict(),
            10..=11 => self.roll(),
            _ => self.report(0.5),
        }
    }

    /// Faults stop: everybody returns and reports. Then nothing terminates, every pod that has room runs,
    /// and nothing that is pending would fit anywhere.
    fn settle(&mut self) {
        self.everyone_returns(1.0);
        for _ in 0..8 {
            self.drain();
            self.report(1.0);
        }
        let state = &self.world.state;
        for pod in state.pods().values() {
            let settled = matches!(pod.phase, PodPhase::Running | PodPhase::Pending);
            assert!(settled, "{} is {}: {}", pod.id, pod.phase, pod.message);
        }
        for (name, record) in state.jobs() {
            for (group, wanted) in &record.current().unwrap().groups {
                let pods: Vec<_> = state.pods_of_group(name, group).collect();
                if let Some(sides) = rollout::sides(record, group, wanted) {
                    let nexts = pods.iter().filter(|pod| rollout::is_next(record, &sides, pod)).count();
                    let [previous, next] = sides;
                    let full = pods.iter().any(|pod| pod.phase == PodPhase::Pending);
                    let exact = nexts == next.text.count as usize && pods.len() == wanted.count as usize;
                    // Without room for the new the old ones stay: it would shrink before it grows.
                    assert!(exact || full, "{name}/{group}: {nexts} of {previous:?} to {next:?}");
                } else {
                    assert_eq!(pods.len(), wanted.count as usize, "{name}/{group}");
                }
            }
        }
        let pending = state.pods().values().filter(|pod| pod.phase == PodPhase::Pending);
        pending.for_each(|pod| assert!(!fits_somewhere(state, pod), "{} fits: {}", pod.id, pod.message));
    }

    fn event(&mut self, event: Event) {
        let before = self.world.state.clone();
        match self.world.event("test", event.clone()) {
            Ok(Some(revision)) => self.committed(&before, &revision),
            Ok(None) | Err(_) => assert_eq!(self.world.state, before, "{event:?} changed something"),
        }
    }

    fn committed(&mut self, before: &State, revision: &Revision) {
        self.replica.advance(revision);
        assert_eq!(self.replica, self.world.state, "a replica that follows the revisions is equal");
        let mut undone = self.world.state.clone();
        undone.undo(revision);
        assert_eq!(undone, *before, "a revision can be taken back");
        let loaded = State::load(self.world.state.revision(), self.world.state.values());
        assert_eq!(loaded, self.world.state, "indexes are those of the values");

        self.note_given(revision);
        self.check_grows_before_it_shrinks(revision);
        let selector = "j0".parse().unwrap();
        endpoint::changed_by(revision, &selector).apply(&mut self.seen);
        assert_eq!(self.seen, endpoint::select(&self.world.state, &selector), "a watch misses nothing");
        self.check();
    }

    /// A rollout stops a pod that runs only while as many as are wanted run without it. Jobs that give way to others
    /// may have lost more of them in the same revision.
    fn check_grows_before_it_shrinks(&self, revision: &Revision) {
        for change in &revision.changes {
            let (Some(Value::Pod(old)), Some(Value::Pod(new))) = (&change.old, &change.new) else { continue };
            let Some(job) = self.world.state.job(&new.job).filter(|job| !job.preemptible) else { continue };
            if old.phase == PodPhase::Running && new.message.starts_with("the rollout wants") {
                let pods = self.world.state.pods_of_group(&new.job, &new.group);
                let running = pods.filter(|pod| pod.phase == PodPhase::Running).count();
                assert!(running >= job.groups[&new.group].count as usize, "{} was stopped too early", new.id);
            }
        }
    }

    /// An address is given once: to no second pod, and not to the same one again.
    fn note_given(&mut self, revision: &Revision) {
        let of = |value: &Option<Value>| match value {
            Some(Value::Pod(pod)) => Some((pod.address?, pod.id.clone())),
            _ => None,
        };
        for change in &revision.changes {
            let (old, new) = (of(&change.old), of(&change.new));
            if let Some((address, pod)) = new.filter(|new| old.as_ref() != Some(new)) {
                assert_eq!(self.given.insert(address, pod), None, "{address} was given before");
            }
        }
    }

    fn check(&mut self) {
        let state = &self.world.state;
        for node in state.nodes().values() {
            let usage = state.usage(&node.name);
            assert!(usage.cpu_millis <= u64::from(node.capacity.cpu.0), "{} is over-committed", node.name);
            for (name, used) in &usage.countables.0 {
                assert!(*used <= node.countables.get(name), "{} is over-committed", node.name);
            }
            assert!(usage.memory_bytes <= node.capacity.memory.0, "{} is over-committed", node.name);
            for assigned in assignment::view(state, &node.name).pods.values() {
                assert!(assigned.spec().is_some(), "the text of every pod that runs is kept");
            }
        }
        for pod in state.pods().values() {
            check_pod(state, pod);
            if let Some(address) = pod.address {
                let owner = self.given.entry(address).or_insert_with(|| pod.id.clone());
                assert_eq!(*owner, pod.id, "{address} was given to a second pod");
            }
            self.made.insert(pod.id.clone());
        }
        assert_eq!(self.made.len() as u64, state.counters().pods_made, "an id names one pod for ever");
        check_counts(state);
        check_pools(state, self.world.wall);
    }

    fn join(&mut self) {
        if self.world.state.nodes().len() > 6 {
            return;
        }
        let number = self.world.rng.random_range(0..9);
        let capacity = Resources { cpu: Cpu(1000 * (1 + number % 3)), memory: Memory(1 << 30) };
        let labels = BTreeMap::from([("disk".to_owned(), ["fast", "slow"][number as usize % 2].to_owned())]);
        let before = self.world.state.revision();
        // Three events in one: the replica takes over what they made.
        self.world.countables = Countables(BTreeMap::from([("gpu".to_owned(), number % 4)]));
        self.world.countables.0.retain(|_, number| *number > 0);
        let claim = self.world.next_claim();
        // Some on the LAN, some with a /64 of their own.
        let claim = if number % 2 == 0 { claim } else { Claim { prefix: PrefixChoice::Own, ..claim } };
        let name = format!("n{number}");
        let _refused_when_the_name_is_taken = self.world.join_with(&name, capacity, labels, claim);
        if self.world.state.revision() != before {
            self.replica = self.world.state.clone();
            self.seen = endpoint::select(&self.world.state, &"j0".parse().unwrap());
            self.check();
        }
    }

    fn apply(&mut self) {
        let rng = &mut self.world.rng;
        let task = Task {
            exec: vec!["/bin/x".to_owned(), rng.random_range(0..3).to_string()],
            env: BTreeMap::new(),
            cpu: Cpu(100 * rng.random_range(1..8)),
            memory: Memory(1 << 26),
            resources: Countables::default(),
        };
        let constraints = match rng.random_bool(0.3) {
            true => BTreeMap::from([("disk".to_owned(), Constraint::from("fast"))]),
            false => BTreeMap::new(),
        };
        let gpus = match rng.random_bool(0.3) {
            true => BTreeMap::from([("gpu".to_owned(), rng.random_range(1..3))]),
            false => BTreeMap::new(),
        };
        let (priority, preempts, preemptible) =
            (rng.random_range(-1..2), rng.random_bool(0.3), rng.random_bool(0.5));
        let group = Group {
            count: rng.random_range(0..6),
            availability: [None, Some(Availability::Ha), Some(Availability::Pet)][rng.random_range(0..3)],
            spread: [Spread::Node, Spread::Pack, Spread::Label("disk".to_owned())][rng.random_range(0..3)]
                .clone(),
            constraints,
            apart: Vec::new(),
            rollout: None,
            hooks: BTreeMap::new(),
            resources: Countables(gpus),
            tasks: BTreeMap::from([("t".to_owned(), task)]),
        };
        let name = format!("g{}", rng.random_range(0..2));
        let job = format!("j{}", rng.random_range(0..3));
        self.event(Event::ApplyJob(Job {
            job,
            priority,
            preempts,
            preemptible,
            groups: BTreeMap::from([(name, group)]),
        }));
    }

    /// A rollout from the text in force to other tasks, or another percentage of one that is under way.
    fn roll(&mut self) {
        let rng = &mut self.world.rng;
        let Some((name, record)) = self.world.state.jobs().choose(rng) else { return };
        let mut job = Job::clone(record.current().unwrap());
        let (name, version) = (name.clone(), record.version);
        let percent_next = [0, 20, 50, 99, 100][rng.random_range(0..5)];
        for group in job.groups.values_mut() {
            let start = Rollout {
                previous: version,
                next: version + 1,
                percent_next,
                percent_previous: None,
                standby: false,
            };
            let rollout = group.rollout.map_or(start, |rollout| Rollout { percent_next, ..rollout });
            if group.rollout.is_none() {
                group.tasks.get_mut("t").unwrap().exec[1] = rng.random_range(0..3).to_string();
            }
            group.rollout = Some(rollout);
        }
        let known = !self.world.state.job_record(&name).unwrap().removed;
        assert!(known, "only jobs that are there are rolled");
        self.event(Event::ApplyJob(job));
    }

    fn lose(&mut self) {
        let ready = self.world.state.nodes().values().filter(|node| node.phase == NodePhase::Ready);
        let Some(name) = ready.map(|node| node.name.clone()).choose(&mut self.world.rng) else { return };
        self.event(Event::LeaseEnded(vec![name]));
    }

    fn everyone_returns(&mut self, chance: f64) {
        let names: Vec<_> = self.world.state.nodes().keys().cloned().collect();
        for name in names {
            if self.world.rng.random_bool(chance) {
                self.event(Event::NodeReturned(name));
            }
        }
    }

    fn delete_job(&mut self) {
        let name = format!("j{}", self.world.rng.random_range(0..3));
        self.event(Event::DeleteJob(name));
    }

    fn delete_node(&mut self) {
        let name = format!("n{}", self.world.rng.random_range(0..9));
        self.event(Event::DeleteNode(name));
    }

    /// Another machine has the address of some pod, or has had it.
    fn conflict(&mut self) {
        let placed = self.world.state.pods().values().filter(|pod| pod.phase != PodPhase::Lost);
        let placed: Vec<_> =
            placed.filter_map(|pod| Some((pod.node.clone()?, pod.id.clone(), pod.address?))).collect();
        let Some((node, pod, address)) = placed.into_iter().choose(&mut self.world.rng) else { return };
        let stale = self.world.rng.random_bool(0.2);
        let address = if stale { Ipv6Addr::LOCALHOST } else { address };
        let wanted = self.world.state.pods()[&pod].is_wanted();
        let mac = Mac([2, 0, 0, 0, 1, 0]);
        self.event(Event::AddressConflict(node, Conflict { pod: pod.clone(), address, mac }));
        let now = self.world.state.pods()[&pod].address;
        assert_eq!(now == Some(address), !stale && !wanted, "{pod} moves when it is wanted");
    }

    fn drain(&mut self) {
        self.event(Event::Drained(self.world.state.pods().keys().cloned().collect()));
    }

    /// Nodes that are not lost say how their pods are: stopped ones gone, the others running.
    fn report(&mut self, chance: f64) {
        let nodes = self.world.state.nodes().values().filter(|node| node.phase == NodePhase::Ready);
        let nodes: Vec<_> = nodes.map(|node| node.name.clone()).collect();
        for node in nodes {
            if self.world.rng.random_bool(chance) {
                let reports = self.world.state.pods_on(&node).map(|pod| report(pod)).collect();
                self.event(Event::PodReports(node, reports));
            }
        }
    }
}

fn report(pod: &Pod) -> PodReport {
    let (id, message) = (pod.id.clone(), String::new());
    PodReport { id, phase: PodPhase::Running, message, restarts: 0, gone: pod.stop }
}

fn check_pod(state: &State, pod: &Pod) {
    let node = pod.node.as_ref().and_then(|name| state.nodes().get(name));
    match pod.phase {
        PodPhase::Pending => assert!(pod.node.is_none() && pod.address.is_none(), "{pod:?}"),
        _ => assert!(node.unwrap().prefix.contains(pod.address.unwrap()), "{pod:?}"),
    }
    if let Some(node) = node {
        let lost = node.phase == NodePhase::Lost;
        assert_eq!(pod.phase == PodPhase::Lost, lost, "{pod:?} on a node that is {}", node.phase);
    }
}

/// Every group has the pods that its job wants; an ha pod is lost only while nothing can take its place.
fn check_counts(state: &State) {
    for (name, record) in state.jobs() {
        let job = record.current().unwrap();
        for (group, wanted) in &job.groups {
            let pods: Vec<_> = state.pods_of_group(name, group).filter(|pod| pod.is_wanted()).collect();
            match wanted.rollout {
                None => assert_eq!(pods.len(), wanted.count as usize, "{name}/{group}"),
                Some(_) => assert!(pods.len() >= wanted.count as usize, "{name}/{group} has {}", pods.len()),
            }
            for pod in pods.into_iter().filter(|pod| pod.phase == PodPhase::Lost) {
                let ha = wanted.availability() == Availability::Ha;
                assert!(!ha || !fits_somewhere(state, pod), "{} is lost and would fit elsewhere", pod.id);
            }
        }
    }
}

/// Placement finds among the nodes that it looks at what it would find among all.
fn check_pools(state: &State, now: WallTime) {
    for (name, record) in state.jobs() {
        for (group, wanted) in &record.current().unwrap().groups {
            let survey = placement::survey(state, (name, group), wanted, now);
            let demand = survey.demand(3);
            let few = placement::place(&demand, survey.pools(&demand));
            let all = placement::place(&demand, placement::Pools::of(&demand, survey.all()));
            assert_eq!(few, all, "{name}/{group}");
        }
    }
}

/// Asked without the code under test.
fn fits_somewhere(state: &State, pod: &Pod) -> bool {
    let wanted = &state.job(&pod.job).unwrap().groups[&pod.group];
    let record = state.job_record(&pod.job).unwrap();
    let sides = rollout::sides(record, &pod.group, wanted);
    let side = sides.as_ref().map(|sides| &sides[usize::from(rollout::is_next(record, sides, pod))].text);
    let wanted = side.unwrap_or(wanted);
    let needs = wanted.resources();
    state.nodes().values().filter(|node| node.phase == NodePhase::Ready).any(|node| {
        let usage = state.usage(&node.name);
        let labels = wanted.constraints.iter().all(|(key, wanted)| wanted.is_met(node.label(key)));
        let gpus = usage.countables.get("gpu") + wanted.countables().get("gpu") <= node.countables.get("gpu");
        let cpu = usage.cpu_millis + u64::from(needs.cpu.0) <= u64::from(node.capacity.cpu.0);
        labels && gpus && cpu && usage.memory_bytes + needs.memory.0 <= node.capacity.memory.0
    })
}
