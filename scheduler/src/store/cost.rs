//! What a version costs, and what a history of the largest size does: tests that measure, and fail when it grows.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use hextet_lifecycle::Ending;
use rand::{SeedableRng as _, rngs::StdRng};
use scheduler_core::{
    change::Revision,
    event::{Event, PodReport, Texts},
    job::Job,
    node::Hello,
    pod::{PodId, PodPhase},
    quantity::{Cpu, Memory, Resources},
    state::State,
    time::WallTime,
    token::{Role, Token},
    transition::{Context, Origin, handle},
};

use super::{RedbStore, Store as _};
use crate::{
    history,
    writer::tests::{claim, cluster},
};

const PODS: u32 = 100;
const NODES: u16 = 10;
const VERSIONS: u32 = 1000;

/// A cluster that makes revisions as a server does, and what they would take as plain JSON.
struct World {
    state: State,
    rng: StdRng,
    made: Vec<Revision>,
    wall: u64,
}

impl World {
    fn event(&mut self, changer: &str, event: Event) {
        self.wall += 1234;
        let wall = WallTime(1_795_265_640_000 + self.wall);
        let mut context = Context { wall, rng: &mut self.rng, is_watched: &|_| false };
        let origin = Origin { changer: changer.to_owned(), message: String::new() };
        self.made.extend(handle(&mut self.state, &event, &origin, &mut context).unwrap());
    }

    fn join(&mut self, number: u16) {
        let name = format!("n{number}");
        let token = Token { role: Role::Node, name: None, expires: WallTime(u64::MAX), used_by: None };
        self.event("user:root", Event::CreateToken(name.clone(), token));
        self.event("scheduler", Event::Enroll(claim(&name, number)));
        let hello = Hello {
            underlay: std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number),
            underlay_v4: None,
            labels: Default::default(),
            countables: Default::default(),
            capacity: Resources { cpu: Cpu(64_000), memory: Memory(1 << 36) },
            agent_version: "0.1.0".to_owned(),
            machine: String::new(),
            hardware: String::new(),
            session: 0,
        };
        self.event(&format!("node:{name}"), Event::NodeHello(name, hello));
    }

    fn apply(&mut self, version: u32) {
        self.apply_job("blog", PODS, version);
    }

    fn apply_job(&mut self, name: &str, count: u32, version: u32) {
        let text = format!(
            "{{job: {name}, groups: {{web: {{count: {count}, tasks: {{server: {{exec: [/usr/bin/blog, --release, \
             'v{version}'], env: {{PORT: '80'}}, cpu: 100m, memory: 64Mi}}}}}}}}}}"
        );
        let job: Job = serde_norway::from_str(&text).unwrap();
        self.event("user:alice", Event::ApplyJob(job, Texts::new()));
    }

    fn report(&mut self, node: u16, phase: PodPhase, message: &str) {
        let name = format!("n{node}");
        let ids: Vec<PodId> = self.state.pods_on(&name).map(|pod| pod.id.clone()).collect();
        let report = |id| PodReport {
            id,
            phase,
            message: message.to_owned(),
            restarts: 0,
            gone: false,
            ending: None,
            version: None,
        };
        self.event(&format!("node:{name}"), Event::PodReports(name, ids.into_iter().map(report).collect()));
    }

    /// Bytes of a revision as JSON and in the log.
    fn cost(&mut self, store: &RedbStore) -> (usize, usize) {
        let made = std::mem::take(&mut self.made);
        let json: usize = made.iter().map(|revision| serde_json::to_vec(revision).unwrap().len()).sum();
        let before = store.log_bytes().unwrap();
        made.chunks(64).for_each(|some| store.commit(some).unwrap());
        (json / made.len(), (store.log_bytes().unwrap() - before) as usize / made.len())
    }
}

/// `cargo test --release -p scheduler cost -- --nocapture` prints what docs/versions.md says.
#[test]
fn a_version_costs_little() {
    let dir = tempfile::tempdir().unwrap();
    let store = RedbStore::open(&dir.path().join("store.redb")).unwrap();
    let mut world = World { state: State::default(), rng: StdRng::seed_from_u64(1), made: vec![], wall: 0 };
    world.event("scheduler", Event::ClusterCreated(cluster()));
    (1..=NODES).for_each(|number| world.join(number));
    world.apply(0);
    world.cost(&store);

    let versions = if cfg!(debug_assertions) { VERSIONS / 20 } else { VERSIONS };
    (1..=versions).for_each(|version| world.apply(version));
    let apply = world.cost(&store);
    (1..=NODES).for_each(|node| world.report(node, PodPhase::Running, ""));
    let reports = world.cost(&store);
    let one = world.state.pods().keys().next().unwrap().clone();
    let node = world.state.pods()[&one].node.clone().unwrap();
    let fails = |world: &mut World, output: &dyn Fn(u32) -> Option<String>| {
        for number in 0..50 {
            let phase = if number % 2 == 0 { PodPhase::Failed } else { PodPhase::Running };
            let message = format!("task server ended with status {number}");
            let ending = output(number).map(|output| Ending::new("task server: ended", output.as_bytes()));
            let report = PodReport {
                id: one.clone(),
                phase,
                message,
                restarts: number,
                gone: false,
                ending,
                version: None,
            };
            world.event(&format!("node:{node}"), Event::PodReports(node.clone(), vec![report]));
        }
        world.cost(&store)
    };
    let report = fails(&mut world, &|_| None);
    let lines = |number: u32, what: &str| -> String {
        (0..10)
            .map(|line| {
                format!("2026-11-22T12:{line:02}:{number:02}Z ERROR step {line}: {what}: giving up\n")
            })
            .collect()
    };
    let same = fails(&mut world, &|number| Some(lines(number, "cannot connect to db.example")));
    let other = fails(&mut world, &|number| {
        let word = char::from(b'a' + (number % 26) as u8).to_string().repeat(20);
        Some(lines(number, &word))
    });
    for (what, (json, log)) in [
        (format!("an apply that restarts {PODS} pods"), apply),
        (format!("a report about {} pods", PODS / u32::from(NODES)), reports),
        ("a report about one pod".to_owned(), report),
        ("the same, with ten lines of output that differ by their times".to_owned(), same),
        ("the same, with ten lines of another output each time".to_owned(), other),
    ] {
        println!("{what}: {json} bytes of JSON, {log} in the log");
    }
    assert!(same.1 < report.1 + 30, "what a task writes again and again is kept once: {same:?} {report:?}");
    assert!(other.1 < report.1 + 400, "{other:?} {report:?}");
    assert!(apply.1 * 15 < apply.0 && reports.1 * 10 < reports.0 && report.1 * 4 < report.0);
}

/// `cargo test --release -p scheduler cost -- --nocapture` prints what docs/versions.md says: how long a start looks at a
/// history of the usual size, and how long a reader walks through all of it.
#[test]
fn a_history_of_the_largest_size_is_read_in_seconds() {
    let bytes: u64 = if cfg!(debug_assertions) { 1 << 20 } else { 64 << 20 };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let store = RedbStore::open(&path).unwrap();
    let mut world = World { state: State::default(), rng: StdRng::seed_from_u64(1), made: vec![], wall: 0 };
    world.event("scheduler", Event::ClusterCreated(cluster()));
    (1..=NODES).for_each(|number| world.join(number));
    // It is long ago that anybody touched this one.
    (0..3).for_each(|version| world.apply_job("quiet", 1, version));
    let mut version = 0;
    while store.log_bytes().unwrap() < bytes {
        // Of each apply the nodes report twice: that the pods stop, and that they run.
        world.apply(version);
        for phase in [PodPhase::Starting, PodPhase::Running] {
            (1..=NODES).for_each(|node| world.report(node, phase, ""));
        }
        version += 1;
        if version % 8 == 0 {
            world.cost(&store);
        }
    }
    drop(store);

    let begin = Instant::now();
    let store = RedbStore::open(&path).unwrap();
    let opened = begin.elapsed();
    let revision = store.load().unwrap().0;
    let timed = |what: &dyn Fn()| {
        let begin = Instant::now();
        what();
        begin.elapsed()
    };
    let walked = timed(&|| {
        let ended = history::back(&store, None, revision + 1, |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(ended, history::Ended::AtTheBeginning(1));
    });
    let newest = timed(&|| {
        history::back(&store, None, revision + 1, |_| ControlFlow::Break(())).map(drop).unwrap();
    });
    // Of a job, of a node, and of a pod that the log knows nothing of.
    let of_one_took = ["job/quiet", "node/n1", "pod/gone"].map(|key| {
        let key: scheduler_core::change::Key = key.parse().unwrap();
        timed(&|| {
            history::back(&store, Some(&key), revision + 1, |_| ControlFlow::Continue(())).map(drop).unwrap();
        })
    });
    println!(
        "{revision} revisions in {} MiB: a start looks at them in {opened:?}, a reader walks through all in {walked:?}, \
         through those of a job, a node and an unknown pod in {of_one_took:?}, and has the newest after {newest:?}",
        bytes >> 20
    );
    assert!(opened < Duration::from_secs(30) && walked < Duration::from_secs(30), "{opened:?} {walked:?}");
}
