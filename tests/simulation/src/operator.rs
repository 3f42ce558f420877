//! Operators who apply, roll out, roll back and delete jobs, and take nodes down. What they look at before may be old.

use std::collections::BTreeMap;

use rand::{
    Rng as _,
    seq::{IndexedRandom as _, IteratorRandom as _},
};
use scheduler_core::{
    change::JobRecord,
    countable::Countables,
    event::{Event, Texts},
    job::{Apart, Availability, Constraint, Group, Job, Spread, Task},
    quantity::{Cpu, Memory},
    rollout::Rollout,
    state::State,
};

use crate::{deploy, shared::Shared};

/// Texts of a job that are kept, so that a later operator goes back to one.
const KEPT: usize = 8;

#[derive(Default)]
pub(crate) struct Operators {
    pub(crate) asked: u64,
    texts: BTreeMap<String, Vec<Job>>,
}

impl Operators {
    /// The next wish with its number, of one who has seen the cluster as `shown`.
    pub(crate) fn wish(&mut self, shown: &State, shared: &mut Shared) -> (u64, Event) {
        self.asked += 1;
        let name = format!("j{}", shared.rng.random_range(0..3));
        let event = match shared.rng.random_range(0..27) {
            0 => Event::DeleteJob(name),
            1 => self.roll_back(name, shared),
            2 => self.roll_back_to_version(name, shown, shared),
            3 => Event::NodeDead(format!("n{}", shared.rng.random_range(0..shared.options.nodes))),
            4 => self.delete_node(name, shown, shared),
            18..=22 => self.deploy(name, shown, shared),
            23..=26 => deploy::order(shown, shared).unwrap_or_else(|| self.apply(name, shared)),
            5..=9 => self.roll(name, shown, shared),
            _ => self.apply(name, shared),
        };
        (self.asked, event)
    }

    /// A rollout from the text in force to other tasks, or another percentage of one that is under way.
    fn roll(&mut self, name: String, shown: &State, shared: &mut Shared) -> Event {
        match shown.job_record(&name).filter(|record| !record.removed) {
            Some(record) => {
                let percent_next = [0, 20, 50, 99, 100][shared.rng.random_range(0..5)];
                let number = shared.rng.random_range(0..3);
                let job = rolled(record, percent_next, number, shared.chance(0.3))
                    .expect("a job that is there has a text");
                Event::ApplyJob(job, Texts::new())
            }
            None => self.apply(name, shared),
        }
    }

    /// A deploy of what is there.
    fn deploy(&mut self, name: String, shown: &State, shared: &mut Shared) -> Event {
        match shown.job(&name) {
            Some(job) => deploy::begin(&unrolled(job), shared),
            None => self.apply(name, shared),
        }
    }

    fn roll_back_to_version(&mut self, name: String, shown: &State, shared: &mut Shared) -> Event {
        let versions = shown.job_record(&name).map(|record| &record.versions);
        match versions.and_then(|versions| versions.iter().choose(&mut shared.rng)) {
            Some((version, job)) => Event::RollbackJob(Job::clone(job), *version, Texts::new()),
            None => self.apply(name, shared),
        }
    }

    /// A node that is gone, as far as they know, will not come back as it was.
    fn delete_node(&mut self, name: String, shown: &State, shared: &mut Shared) -> Event {
        let gone = shown.nodes().values().filter(|node| node.phase.is_gone());
        match gone.choose(&mut shared.rng) {
            Some(node) => Event::DeleteNode(node.name.clone()),
            None => self.apply(name, shared),
        }
    }

    fn apply(&mut self, name: String, shared: &mut Shared) -> Event {
        let groups =
            (0..shared.rng.random_range(1..=2)).map(|number| (format!("g{number}"), Box::new(group(shared))));
        let mut groups: BTreeMap<_, _> = groups.collect();
        if shared.chance(0.6) {
            let count = shared.rng.random_range(0..=1);
            let single = Group { count, availability: Some(Availability::Singleton), ..group(shared) };
            groups.insert("single".to_owned(), Box::new(single));
        }
        let priority = shared.rng.random_range(0..3);
        let [preempts, preemptible] = [0.3, 0.5].map(|chance| shared.chance(chance));
        let job = Job { job: name.clone(), priority, preempts, preemptible, groups };
        let texts = self.texts.entry(name).or_default();
        if texts.len() == KEPT {
            texts.remove(0);
        }
        texts.push(job.clone());
        Event::ApplyJob(job, Texts::new())
    }

    fn roll_back(&mut self, name: String, shared: &mut Shared) -> Event {
        match self.texts.get(&name).and_then(|texts| texts.choose(&mut shared.rng)) {
            Some(job) => Event::ApplyJob(job.clone(), Texts::new()),
            None => self.apply(name, shared),
        }
    }
}

/// The text in force with a rollout to tasks with this number, or with another percentage of the one under way.
pub(crate) fn rolled(record: &JobRecord, percent_next: u32, number: u32, in_place: bool) -> Option<Job> {
    let mut job = Job::clone(record.current()?);
    let (previous, next) = (record.version, record.version + 1);
    let start = Rollout { in_place, ..Rollout::new(previous, next, percent_next) };
    // Of what there may only be one, two versions cannot be side by side.
    let is_single = |group: &Group| group.availability() == Availability::Singleton;
    for group in job.groups.values_mut().filter(|group| in_place || !is_single(group)) {
        if group.rollout.is_none() {
            group.tasks.get_mut("t")?.exec[1] = number.to_string();
        }
        group.rollout =
            Some(group.rollout.map_or(start, |rollout| Rollout { percent_next, in_place, ..rollout }));
    }
    Some(job)
}

/// The same without its rollouts.
fn unrolled(job: &Job) -> Job {
    let mut job = job.clone();
    job.groups.values_mut().for_each(|group| group.rollout = None);
    job
}

/// One of what few nodes have.
fn gpu() -> BTreeMap<String, u32> {
    BTreeMap::from([("gpu".to_owned(), 1)])
}

fn group(shared: &mut Shared) -> Group {
    let rng = &mut shared.rng;
    let task = Task {
        exec: vec!["/bin/x".to_owned(), rng.random_range(0..3).to_string()],
        env: BTreeMap::new(),
        cpu: Cpu(100 * rng.random_range(1..8)),
        memory: Memory(1 << 26),
        resources: Countables(if rng.random_bool(0.2) { gpu() } else { BTreeMap::new() }),
    };
    let constraints = match rng.random_bool(0.2) {
        true => BTreeMap::from([("disk".to_owned(), Constraint::Is("fast".to_owned()))]),
        false => BTreeMap::new(),
    };
    Group {
        hooks: BTreeMap::new(),
        count: rng.random_range(0..6),
        availability: [None, Some(Availability::Ha), Some(Availability::Pet)][rng.random_range(0..3)],
        spread: [Spread::Node, Spread::Pack, Spread::Label("zone".to_owned())][rng.random_range(0..3)]
            .clone(),
        constraints,
        apart: apart(rng),
        rollout: None,
        resources: Countables::default(),
        tasks: BTreeMap::from([("t".to_owned(), Box::new(task))]),
    }
}

/// Now and then the pods of a group keep apart from each other or from another job.
fn apart(rng: &mut impl rand::Rng) -> Vec<Apart> {
    let by = ["node", "disk", "zone"][rng.random_range(0..3)].to_owned();
    let from = [None, Some("j0"), Some("j1/g0")][rng.random_range(0..3)].map(str::to_owned);
    if rng.random_bool(0.2) { vec![Apart { from, by }] } else { Vec::new() }
}
