//! Random graphs and random events, judged by the plainest reading of the rules. A failure prints its seed.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

use super::*;
use crate::step::{Owner, Step};

const SEEDS: u64 = 3_000;
const EVENTS: usize = 80;

/// What is known from the commands and the answers alone.
#[derive(Default)]
struct Model {
    /// Begun and not ended.
    under_way: BTreeSet<String>,
    stopping: BTreeSet<String>,
    done: BTreeSet<String>,
    /// Failed for good.
    failed: BTreeSet<String>,
    failures: BTreeMap<String, u32>,
}

fn random_steps(rng: &mut StdRng) -> Vec<Step> {
    let count = rng.random_range(1..9);
    let mut steps: Vec<Step> = Vec::new();
    for n in 0..count {
        let mut step = Step::new(&format!("s{n}"), Owner::Node, "").attempts(rng.random_range(1..3)).undo();
        step.optional = rng.random_bool(0.25);
        for earlier in 0..n {
            match rng.random_range(0..6) {
                0 => step = step.after(&format!("s{earlier}")),
                1 | 2 => step = step.requires(&format!("s{earlier}")),
                _ => {}
            }
        }
        steps.push(step);
    }
    // The order of registration means nothing.
    let at = rng.random_range(0..count);
    steps.rotate_left(at);
    steps
}

impl Model {
    /// Neither done nor ever to be.
    fn is_barred(&self, steps: &[Step], name: &str) -> bool {
        let step = steps.iter().find(|step| step.name == name).unwrap();
        let needs_barred = || step.requires.iter().any(|need| self.blocks(steps, need));
        self.failed.contains(name)
            || (!self.under_way.contains(name) && !self.done.contains(name) && needs_barred())
    }

    /// It is barred and those that need it are, too.
    fn blocks(&self, steps: &[Step], name: &str) -> bool {
        !steps.iter().any(|step| step.name == name && step.optional) && self.is_barred(steps, name)
    }

    fn may_start(&self, steps: &[Step], step: &Step) -> bool {
        let passed = |name: &String| {
            self.done.contains(name) || (self.is_barred(steps, name) && !self.blocks(steps, name))
        };
        let ended = |name: &String| self.done.contains(name) || self.is_barred(steps, name);
        step.requires.iter().all(passed) && step.after.iter().all(ended)
    }

    fn is_idle(&self, name: &str) -> bool {
        ![&self.under_way, &self.stopping, &self.done, &self.failed].iter().any(|set| set.contains(name))
    }

    fn take(&mut self, steps: &[Step], commands: Vec<Command>) {
        for command in commands {
            match command {
                Command::Start(name) => {
                    let step = steps.iter().find(|step| step.name == name).unwrap();
                    assert!(self.is_idle(&name), "{name} is begun twice");
                    assert!(self.may_start(steps, step), "{name} is begun too early");
                    self.under_way.insert(name);
                }
                Command::Stop(name) => {
                    let mut later = steps.iter().filter(|step| {
                        step.after.iter().chain(&step.requires).any(|earlier| *earlier == name)
                    });
                    let left =
                        later.find(|later| !self.is_idle(&later.name) && !self.failed.contains(&later.name));
                    assert!(left.is_none(), "{name} is undone before {:?}", left.map(|step| &step.name));
                    for set in [&mut self.under_way, &mut self.done, &mut self.failed] {
                        set.remove(&name);
                    }
                    self.stopping.insert(name);
                }
                Command::TimedOut(name) => panic!("{name} has no deadline"),
            }
        }
    }

    fn answer_up(&mut self, steps: &[Step], name: &str, good: bool) {
        self.under_way.remove(name);
        let max = steps.iter().find(|step| step.name == name).unwrap().retry.attempts_max.unwrap();
        let failures = self.failures.entry(name.to_owned()).or_default();
        if good {
            *failures = 0;
            self.done.insert(name.to_owned());
        } else {
            *failures += 1;
            if *failures == max {
                self.failed.insert(name.to_owned());
            }
        }
    }
}

fn walk(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let steps = random_steps(&mut rng);
    let mut run = Run::new(Arc::new(Graph::new(steps.clone()).unwrap()));
    let (mut model, mut now) = (Model::default(), Duration::ZERO);
    let first = run.handle(Event::Up, now);
    model.take(&steps, first);
    for _ in 0..EVENTS {
        // Long enough for every retry to be due.
        now += Duration::from_secs(60);
        let busy: Vec<String> = model.under_way.iter().cloned().collect();
        if let Some(name) = busy.choose(&mut rng) {
            let good = rng.random_bool(0.7);
            let event = if good { Event::Done(name) } else { Event::Failed(name, "no") };
            let commands = run.handle(event, now);
            model.answer_up(&steps, name, good);
            model.take(&steps, commands);
        }
        now += Duration::from_secs(60);
        let due = run.handle(Event::Tick, now);
        model.take(&steps, due);
        for step in &steps {
            let could = model.is_idle(&step.name) && model.may_start(&steps, step);
            assert!(!could, "{} could run and does not", step.name);
        }
    }
    let over = |step: &Step| model.done.contains(&step.name) || model.is_barred(&steps, &step.name);
    assert!(steps.iter().all(over), "it comes to an end");
    tell(&run, &model, &steps, now);
    down(&mut run, &mut model, &steps, &mut rng, now);
}

/// What is told is so.
fn tell(run: &Run, model: &Model, steps: &[Step], now: Duration) {
    use crate::status::Phase;
    for step in run.status(now) {
        let expected = if model.done.contains(&step.name) {
            Phase::Done
        } else if model.failed.contains(&step.name) {
            Phase::Failed
        } else {
            Phase::Blocked
        };
        assert_eq!(step.phase, expected, "{}", step.name);
        let blocked = steps.iter().find(|one| one.name == step.name).unwrap().requires.iter();
        let barred: Vec<&String> = blocked.filter(|need| model.blocks(steps, need)).collect();
        if expected == Phase::Blocked {
            assert!(
                !barred.is_empty() && barred.iter().all(|need| step.waits_for.contains(need)),
                "{}",
                step.name
            );
        }
    }
}

fn down(run: &mut Run, model: &mut Model, steps: &[Step], rng: &mut StdRng, mut now: Duration) {
    let commands = run.handle(Event::Down, now);
    model.take(steps, commands);
    for _ in 0..EVENTS {
        now += Duration::from_secs(120);
        let busy: Vec<String> = model.stopping.iter().cloned().collect();
        let Some(name) = busy.choose(rng) else { break };
        let commands = match rng.random_bool(0.8) {
            true => run.handle(Event::Done(name), now),
            false => run.handle(Event::Failed(name, "no"), now),
        };
        if !run.is_stopping(name) {
            model.stopping.remove(name);
        }
        model.take(steps, commands);
        let due = run.handle(Event::Tick, now + Duration::from_secs(60));
        model.take(steps, due);
    }
    assert!(run.is_down(), "nothing is left: {:?}", model.stopping);
    assert!(model.done.is_empty() && model.under_way.is_empty());
}

#[test]
fn every_walk_keeps_the_rules() {
    for seed in 0..SEEDS {
        let result = std::panic::catch_unwind(|| walk(seed));
        assert!(result.is_ok(), "seed {seed}");
    }
}
