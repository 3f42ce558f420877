//! Operators who apply, change, roll back and delete jobs, and look at none of it.

use std::collections::BTreeMap;

use rand::{Rng as _, seq::IndexedRandom as _};
use scheduler_core::{
    countable::Countables,
    event::Event,
    job::{Availability, Constraint, Group, Job, Spread, Task},
    quantity::{Cpu, Memory},
};

use crate::shared::Shared;

/// Texts of a job that are kept, so that a later operator goes back to one.
const KEPT: usize = 8;

#[derive(Default)]
pub(crate) struct Operators {
    pub(crate) asked: u64,
    texts: BTreeMap<String, Vec<Job>>,
}

impl Operators {
    /// The next wish, with its number.
    pub(crate) fn wish(&mut self, shared: &mut Shared) -> (u64, Event) {
        self.asked += 1;
        let name = format!("j{}", shared.rng.random_range(0..3));
        let event = match shared.rng.random_range(0..10) {
            0 => Event::DeleteJob(name),
            1 | 2 => self.roll_back(name, shared),
            3 => Event::NodeDead(format!("n{}", shared.rng.random_range(0..shared.options.nodes))),
            _ => self.apply(name, shared),
        };
        (self.asked, event)
    }

    fn apply(&mut self, name: String, shared: &mut Shared) -> Event {
        let groups = (0..shared.rng.random_range(1..=2)).map(|number| (format!("g{number}"), group(shared)));
        let mut groups: BTreeMap<_, _> = groups.collect();
        if shared.chance(0.6) {
            let count = shared.rng.random_range(0..=1);
            let single = Group { count, availability: Some(Availability::Singleton), ..group(shared) };
            groups.insert("single".to_owned(), single);
        }
        let priority = shared.rng.random_range(0..3);
        let [preempts, preemptible] = [0.3, 0.5].map(|chance| shared.chance(chance));
        let job = Job { job: name.clone(), priority, preempts, preemptible, groups };
        let texts = self.texts.entry(name).or_default();
        if texts.len() == KEPT {
            texts.remove(0);
        }
        texts.push(job.clone());
        Event::ApplyJob(job)
    }

    fn roll_back(&mut self, name: String, shared: &mut Shared) -> Event {
        match self.texts.get(&name).and_then(|texts| texts.choose(&mut shared.rng)) {
            Some(job) => Event::ApplyJob(job.clone()),
            None => self.apply(name, shared),
        }
    }
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
        spread: [Spread::Node, Spread::Pack, Spread::Label("disk".to_owned())][rng.random_range(0..3)]
            .clone(),
        constraints,
        apart: Vec::new(),
        rollout: None,
        resources: Countables::default(),
        tasks: BTreeMap::from([("t".to_owned(), task)]),
    }
}
