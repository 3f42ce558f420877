//! Deploys by a clock of the test's own: what passes, what is tried again and when, and what becomes of it.

#[path = "support/mod.rs"]
#[allow(dead_code)]
mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
    time::Duration,
};

use hextet_lifecycle::Ending;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use scheduler_core::{
    change::Key,
    deploy::{Deploy, Deploys, Form, OnFailure, Order, Pause, Schedule, Stage, Step, Strategy},
    event::{Event, PodReport, Refusal, Texts},
    job::{Availability, Job},
    pod::{Pod, PodId, PodPhase},
    quantity::Resources,
    time::Moment,
};
use support::World;

const TICK_MS: u64 = 250;

/// A cluster of two nodes, the driver, and how the pods of a version do.
struct Run {
    world: World,
    deploys: Deploys,
    now: Moment,
    /// Its pods fail when they have run for so long.
    bad: BTreeMap<u32, Option<Duration>>,
    started: BTreeMap<String, Moment>,
    /// Versions of which a hook after `running` is given up in each pod.
    hookless: BTreeSet<u32>,
    /// Nodes that do not report.
    silent: BTreeSet<&'static str>,
}

#[test]
fn a_good_version_is_promoted_when_it_has_done_well_at_every_step() {
    let mut run = Run::new(4);
    run.deploy(schedule(Strategy::Rolling, Pause::None)).unwrap();
    let steps = run.deploy_of().schedule.steps.iter().map(|step| step.percent).collect::<Vec<_>>();
    assert_eq!(steps, [20, 40, 80, 100], "60 % of 4 are as many as 80 %");
    let took = run.until(Stage::Promoted, 120);
    // Each step needs ten seconds of pods that do well.
    assert!((40..45).contains(&took.as_secs()), "{took:?}");
    assert!(run.pods().all(|pod| pod.job_version == 2), "every pod is of the next version");
    assert_eq!(run.world.state.job("shop"), Some(&text("two", 4).into()));
}

#[test]
fn while_it_goes_on_no_pod_is_missing() {
    let mut run = Run::new(5);
    run.deploy(schedule(Strategy::Rolling, Pause::None)).unwrap();
    while !run.deploy_of().stage.is_end() {
        run.tick();
        let serving = run.pods().filter(|pod| pod.serves()).count();
        assert!(serving >= 5, "{serving} serve");
    }
}

#[test]
fn in_place_pods_keep_their_place_and_address_and_none_is_made() {
    let mut run = Run::new(5);
    let before = run.places();
    run.deploy(Schedule { in_place: true, ..schedule(Strategy::Rolling, Pause::None) }).unwrap();
    let (mut fewest, mut of_next) = (5, Vec::new());
    while !run.deploy_of().stage.is_end() {
        fewest = fewest.min(run.pods().filter(|pod| pod.serves()).count());
        of_next.push(run.pods().filter(|pod| pod.job_version > 1).count());
        run.tick();
        assert_eq!(run.places(), before);
    }
    assert_eq!(run.deploy_of().stage, Stage::Promoted);
    of_next.dedup();
    assert_eq!((fewest, of_next), (4, vec![1, 2, 3, 4, 5]), "one after the other");
    assert_eq!(run.world.state.job("shop"), Some(&text("two", 5).into()));
}

#[test]
fn in_place_a_bad_version_costs_the_pods_of_its_step_alone() {
    let mut run = Run::new(5);
    run.bad.insert(2, None);
    let before = run.places();
    let in_place = Schedule { retries: 1, in_place: true, ..schedule(Strategy::Rolling, Pause::None) };
    run.deploy(in_place).unwrap();
    let mut fewest = 5;
    while !run.deploy_of().stage.is_end() {
        run.tick();
        fewest = fewest.min(run.pods().filter(|pod| pod.serves()).count());
    }
    (0..8).for_each(|_| run.tick());
    assert_eq!((run.deploy_of().stage, fewest), (Stage::GaveUp, 4));
    assert_eq!(run.places(), before);
    assert!(run.pods().all(|pod| pod.serves()));
    assert_eq!(run.world.state.job("shop"), Some(&text("one", 5).into()));
}

#[test]
fn in_place_versions_with_the_same_tasks_are_counted_all_the_same() {
    let mut run = Run::new(3);
    let with = |rollout: &str| -> Job {
        let text = format!(
            "{{job: shop, groups: {{web: {{count: 3, rollout: {{{rollout}, in-place: true}}, tasks: {{t: {{exec: [/bin/one]}}}}}}}}}}"
        );
        serde_norway::from_str(&text).unwrap()
    };
    let before = run.places();
    for (percent, of_next) in [(50, 2), (100, 3), (0, 0)] {
        let text = with(&format!("previous: 1, next: 2, percent-next: {percent}"));
        run.world.event("user:alice", Event::ApplyJob(text, Texts::new())).unwrap();
        assert_eq!(run.pods().filter(|pod| pod.job_version == 2).count(), of_next);
        assert!(run.pods().all(|pod| pod.serves()), "nothing restarts");
        assert_eq!(run.places(), before);
    }
}

/// What failed in the previous version, often or at this moment, is not held against the next.
#[test]
fn in_place_the_next_version_may_be_the_cure() {
    let mut run = Run::new(3);
    run.bad.insert(1, Some(Duration::from_secs(2)));
    (0..40).for_each(|_| run.tick());
    assert!(run.pods().all(|pod| pod.restarts > 0));
    let once = Schedule { retries: 0, in_place: true, ..schedule(Strategy::AllAtOnce, Pause::None) };
    run.deploy(once).unwrap();
    run.until(Stage::Promoted, 60);
}

#[test]
fn in_place_a_singleton_is_deployed_and_goes_back() {
    for (bad, stage) in [(false, Stage::Promoted), (true, Stage::GaveUp)] {
        let mut run = Run::new(1);
        let single = |program: &str| {
            let mut job = text(program, 1);
            job.groups.get_mut("web").unwrap().availability = Some(Availability::Singleton);
            job
        };
        run.world.event("user:alice", Event::ApplyJob(single("one"), Texts::new())).unwrap();
        (0..8).for_each(|_| run.tick());
        let before = run.places();
        if bad {
            run.bad.insert(3, None);
        }
        let in_place = Schedule { in_place: true, ..schedule(Strategy::Rolling, Pause::None) };
        let refused = run.begin(single("two"), Schedule { in_place: false, ..in_place.clone() });
        assert!(refused.unwrap_err().to_string().contains("--in-place restarts it where it is"));
        run.begin(single("two"), in_place).unwrap();
        run.until(stage, 200);
        (0..8).for_each(|_| run.tick());
        assert_eq!(run.places(), before);
        let program = if bad { "one" } else { "two" };
        assert_eq!(run.world.state.job("shop"), Some(&single(program).into()));
    }
}

#[test]
fn in_place_what_does_not_fit_any_more_goes_elsewhere() {
    let mut run = Run::new(2);
    // Two nodes of 4 processors: each has one pod, which fills it.
    let big = |program: &str, cpu: &str, count: u32| {
        let mut job = text(program, count);
        job.groups.get_mut("web").unwrap().tasks.get_mut("t").unwrap().cpu = cpu.parse().unwrap();
        job
    };
    run.world.event("user:alice", Event::ApplyJob(big("one", "2", 4), Texts::new())).unwrap();
    (0..8).for_each(|_| run.tick());
    assert!(run.pods().all(|pod| pod.serves()), "the cluster is full");
    let in_place = Schedule { retries: 0, in_place: true, ..schedule(Strategy::Rolling, Pause::None) };
    run.begin(big("two", "1", 4), in_place.clone()).unwrap();
    run.until(Stage::Promoted, 120);
    run.begin(big("three", "3", 4), in_place).unwrap();
    run.until(Stage::GaveUp, 1_000);
    (0..8).for_each(|_| run.tick());
    assert!(run.pods().all(|pod| pod.serves()), "all are back, also what had no place");
    assert_eq!(run.pods().count(), 4);
}

/// The word may have been on its way, or its node cannot follow, as with a full disk.
#[test]
fn what_a_node_says_of_another_version_says_nothing_of_this_one() {
    let mut run = Run::new(1);
    run.world.event("user:alice", Event::ApplyJob(text("two", 1), Texts::new())).unwrap();
    let pod = run.pods().next().unwrap().clone();
    assert_eq!((pod.phase, pod.job_version), (PodPhase::Starting, 2));
    let mut say = |phase, version| {
        let (id, message) = (pod.id.clone(), String::new());
        let report = PodReport { id, phase, message, restarts: 0, gone: false, ending: None, version };
        let node = pod.node.clone().unwrap();
        run.world.event("node", Event::PodReports(node, vec![report])).unwrap();
        run.pods().next().unwrap().phase
    };
    assert_eq!(say(PodPhase::Running, Some(1)), PodPhase::Starting);
    assert_eq!(say(PodPhase::Failed, Some(1)), PodPhase::Starting);
    assert_eq!(say(PodPhase::Running, Some(2)), PodPhase::Running);
}

#[test]
fn a_pod_whose_node_is_cut_off_serves_as_it_is_until_the_node_hears_of_its_new_text() {
    let mut run = Run::new(2);
    run.world.event("scheduler", Event::CutOff(vec!["n1".to_owned()])).unwrap();
    run.world.event("user:alice", Event::ApplyJob(text("two", 2), Texts::new())).unwrap();
    let of = |run: &Run, node: &str| -> Vec<(PodPhase, u32)> {
        let pods = run.pods().filter(|pod| pod.node.as_deref() == Some(node));
        pods.map(|pod| (pod.phase, pod.job_version)).collect()
    };
    assert_eq!(of(&run, "n1"), [(PodPhase::Running, 1)]);
    assert_eq!(of(&run, "n2"), [(PodPhase::Starting, 2)]);
    run.world.event("node:n1", Event::NodeReturned("n1".to_owned())).unwrap();
    assert_eq!(of(&run, "n1"), [(PodPhase::Starting, 2)]);
}

#[test]
fn in_place_a_deploy_says_which_node_it_waits_for() {
    let mut run = Run::new(2);
    run.world.event("scheduler", Event::CutOff(vec!["n1".to_owned()])).unwrap();
    run.silent.insert("n1");
    let in_place = Schedule {
        retries: 0,
        timeout_ms: 20_000,
        in_place: true,
        ..schedule(Strategy::AllAtOnce, Pause::None)
    };
    run.deploy(in_place).unwrap();
    run.until(Stage::GaveUp, 60);
    let reason = run.deploy_of().reason;
    assert!(reason.contains("1 of 2 pods of web run in version 2; n1, with shop-web-"), "{reason}");
    assert!(reason.ends_with("does not report"), "{reason}");
}

/// What a node said before it was cut off is no sign of doing well: nobody knows how its pods do.
#[test]
fn a_pod_whose_node_does_not_report_passes_no_gate() {
    let mut run = Run::new(2);
    run.deploy(schedule(Strategy::AllAtOnce, Pause::None)).unwrap();
    (0..20).for_each(|_| run.tick());
    assert!(run.pods().filter(|pod| pod.job_version == 2).all(|pod| pod.serves()));
    run.world.event("scheduler", Event::CutOff(vec!["n1".to_owned()])).unwrap();
    run.silent.insert("n1");
    (0..200).for_each(|_| run.tick());
    assert_eq!(run.deploy_of().stage, Stage::Growing, "50 s later");
    let outlook = run.deploys.outlook(&run.deploy_of(), run.now);
    assert!(
        outlook.what.contains("; n1, with shop-web-") && outlook.what.ends_with("does not report"),
        "{outlook:?}"
    );
    run.silent.clear();
    let took = run.until(Stage::Promoted, 60);
    assert!(took.as_secs() >= 9, "{took:?}");
}

#[test]
fn a_bad_version_is_tried_again_after_waits_that_double_and_then_given_up() {
    let mut run = Run::new(4);
    run.bad.insert(2, None);
    let before: Vec<_> = run.pods().map(|pod| pod.id.clone()).collect();
    run.deploy(schedule(Strategy::Rolling, Pause::None)).unwrap();
    let mut waits = Vec::new();
    for failures in 1..=3 {
        run.until(Stage::Waiting, 60);
        assert_eq!(run.deploy_of().failures, failures);
        waits.push(run.until(Stage::Growing, 600).as_secs());
    }
    assert_eq!(waits, [10, 20, 40]);
    run.until(Stage::GaveUp, 60);
    let deploy = run.deploy_of();
    assert!(deploy.reason.starts_with("20 % (step 1 of 4): pod shop-web-"), "{}", deploy.reason);
    assert_eq!(run.world.state.job("shop"), Some(&text("one", 4).into()));
    assert_eq!(run.world.state.job_record("shop").unwrap().equals, Some(1));
    let left: Vec<_> = run.pods().filter(|pod| pod.is_wanted()).map(|pod| pod.id.clone()).collect();
    assert_eq!(left, before, "it has cost no pod of the previous version");
}

/// The pods went on running, and the deploy was promoted.
#[test]
fn a_version_whose_hook_is_given_up_while_its_pods_run_goes_back() {
    for in_place in [false, true] {
        let mut run = Run::new(4);
        run.hookless.insert(2);
        run.deploy(Schedule { in_place, retries: 0, ..schedule(Strategy::Rolling, Pause::None) }).unwrap();
        run.until(Stage::GaveUp, 120);
        let deploy = run.deploy_of();
        let fault = format!("{deploy:?}");
        assert!(fault.contains("its hook smoke: exited with status 1 (nobody tries again)"), "{fault}");
        assert!(fault.contains("404"), "{fault}");
        run.come_to_an_end();
        assert!(run.pods().all(|pod| pod.job_version != 2 && pod.serves()));
    }
    // What was given up before is not held against the next version.
    let mut run = Run::new(2);
    run.hookless.insert(1);
    (0..8).for_each(|_| run.tick());
    run.deploy(Schedule { in_place: true, ..schedule(Strategy::Rolling, Pause::None) }).unwrap();
    run.until(Stage::Promoted, 120);
}

#[test]
fn one_that_fails_only_later_is_noticed_while_the_canary_is_watched() {
    let mut run = Run::new(10);
    run.bad.insert(2, Some(Duration::from_secs(40)));
    let retries = Schedule { retries: 0, ..schedule(Strategy::Canary, Pause::For(60_000)) };
    run.deploy(retries).unwrap();
    run.until(Stage::GaveUp, 60);
    assert_eq!(run.deploy_of().step, 0, "nine of ten pods were left alone");
    assert_eq!(run.deploy_of().output, "no such table", "the pod is gone, and what it wrote is not");
    let gone = |id: &_| !run.world.state.pods().contains_key(id);
    assert!(run.world.state.values().all(|(key, _)| !matches!(key, Key::Ending(id) if gone(&id))));
}

#[test]
fn a_pod_without_a_place_is_waited_for_and_then_it_is_no_more() {
    let mut run = Run::new(4);
    let big = serde_norway::from_str::<Job>(
        "{job: shop, groups: {web: {count: 4, tasks: {t: {exec: [/bin/two], cpu: 64}}}}}",
    );
    run.begin(big.unwrap(), Schedule { retries: 0, ..schedule(Strategy::Rolling, Pause::None) }).unwrap();
    let took = run.until(Stage::GaveUp, 400);
    assert!((300..310).contains(&took.as_secs()), "{took:?}");
    let deploy = run.deploy_of();
    assert!(
        deploy.reason.contains("0 of 1 pods of web run") && deploy.reason.contains("is pending"),
        "{}",
        deploy.reason
    );
}

#[test]
fn a_server_that_was_away_does_not_count_the_time() {
    let mut run = Run::new(4);
    run.deploy(schedule(Strategy::AllAtOnce, Pause::None)).unwrap();
    (0..20).for_each(|_| run.tick());
    // Stopped for an hour; the pods may have done anything.
    run.now = run.now + Duration::from_secs(3_600);
    run.tick();
    assert_eq!(run.deploy_of().stage, Stage::Growing);
    let took = run.until(Stage::Promoted, 20);
    assert!(took.as_secs() >= 9, "{took:?}");
}

#[test]
fn a_server_that_is_started_anew_goes_on_and_waits_anew() {
    let mut run = Run::new(4);
    run.bad.insert(2, None);
    run.deploy(schedule(Strategy::AllAtOnce, Pause::None)).unwrap();
    run.until(Stage::Waiting, 60);
    (0..30).for_each(|_| run.tick());
    run.deploys = Deploys::default();
    let took = run.until(Stage::Growing, 60);
    assert_eq!(took.as_secs(), 10, "not the two and a half that were left");
    run.bad.clear();
    run.until(Stage::Promoted, 60);
}

#[test]
fn one_that_is_left_as_it_is_keeps_the_pods_that_were_there() {
    let mut run = Run::new(4);
    run.bad.insert(2, Some(Duration::from_secs(3)));
    let before: Vec<_> = run.pods().map(|pod| pod.id.clone()).collect();
    let hold =
        Schedule { retries: 0, on_failure: OnFailure::Hold, ..schedule(Strategy::AllAtOnce, Pause::None) };
    run.deploy(hold).unwrap();
    run.until(Stage::Stuck, 60);
    (0..200).for_each(|_| run.tick());
    let old: Vec<_> = run.pods().filter(|pod| pod.job_version == 1).map(|pod| pod.id.clone()).collect();
    assert_eq!(old, before);
    // Its reason outlives the job.
    run.world.event("user:alice", Event::DeleteJob("shop".to_owned())).unwrap();
    assert_eq!(run.deploy_of().stage, Stage::GaveUp);
}

#[test]
fn after_a_switch_also_an_order_to_go_back_at_once_switches() {
    let mut run = Run::new(2);
    run.deploy(schedule(Strategy::BlueGreen, Pause::Hold)).unwrap();
    run.until(Stage::Held, 60);
    run.order(Order::Abort { now: true }).unwrap();
    assert_eq!(run.pods().filter(|pod| pod.serves() && pod.job_version == 1).count(), 2);
    run.until(Stage::Aborted, 5);
}

#[test]
fn a_failure_from_before_somebody_resumed_is_not_held_against_it() {
    let mut run = Run::new(2);
    run.bad.insert(2, Some(Duration::from_secs(2)));
    let hold =
        Schedule { retries: 0, on_failure: OnFailure::Hold, ..schedule(Strategy::AllAtOnce, Pause::None) };
    run.deploy(hold).unwrap();
    run.until(Stage::Stuck, 60);
    // What it needs is there now; its pods come up by themselves.
    run.bad.clear();
    run.order(Order::Resume).unwrap();
    run.until(Stage::Promoted, 60);
}

#[test]
fn after_an_order_to_go_back_at_once_no_other_pod_is_needed() {
    let mut run = Run::new(2);
    run.deploy(schedule(Strategy::Canary, Pause::Hold)).unwrap();
    run.until(Stage::Held, 60);
    let pods: Vec<_> = run.pods().map(|pod| pod.id.clone()).collect();
    run.order(Order::Abort { now: true }).unwrap();
    run.until(Stage::Aborted, 1);
    assert_eq!(run.pods().map(|pod| pod.id.clone()).collect::<Vec<_>>(), pods, "restarted where they are");
    assert_eq!(run.order(Order::Resume).unwrap_err().to_string(), "deploy shop@2 has ended: it was aborted");
}

/// Whatever fails and whenever somebody meddles, a deploy comes to one end, and the job is what that end says.
#[test]
fn every_deploy_comes_to_one_end() {
    let mut ends = BTreeMap::new();
    for seed in 0..120 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut run = Run::new(rng.random_range(1..8));
        run.deploy(random_schedule(&mut rng)).unwrap();
        for _ in 0..150 {
            meddle(&mut run, &mut rng);
            (0..8).for_each(|_| run.tick());
        }
        run.bad.clear();
        run.come_to_an_end();
        let deploy = run.deploy_of();
        assert!(deploy.stage.is_end(), "seed {seed}: {deploy:?}");
        let (name, version) = if deploy.stage == Stage::Promoted { ("two", 2) } else { ("one", 1) };
        let count = run.world.state.job("shop").unwrap().groups["web"].count;
        assert_eq!(run.world.state.job("shop"), Some(&text(name, count).into()), "seed {seed}");
        let record = run.world.state.job_record("shop").unwrap();
        for pod in run.pods() {
            let tasks = &record.versions[&pod.job_version].groups["web"].tasks;
            assert_eq!(
                *tasks,
                text(name, 1).groups["web"].tasks,
                "seed {seed}: {pod:?} is of version {version}"
            );
            assert!(pod.serves(), "seed {seed}: {pod:?}");
        }
        assert_eq!(run.pods().count() as u32, count, "seed {seed}");
        *ends.entry(deploy.stage.to_string()).or_insert(0) += 1;
    }
    println!("{ends:?}");
    assert_eq!(ends.len(), 3, "each end is met: {ends:?}");
}

fn random_schedule(rng: &mut StdRng) -> Schedule {
    let strategies = [Strategy::Rolling, Strategy::Canary, Strategy::BlueGreen, Strategy::AllAtOnce];
    let pauses = [Pause::None, Pause::For(20_000), Pause::Hold];
    let usual = schedule(strategies[rng.random_range(0..4)], pauses[rng.random_range(0..3)]);
    let in_place = usual.strategy != Strategy::BlueGreen && rng.random_bool(0.4);
    let on_failure = if rng.random_bool(0.3) { OnFailure::Hold } else { OnFailure::Rollback };
    Schedule { retries: rng.random_range(0..3), on_failure, in_place, ..usual }
}

fn meddle(run: &mut Run, rng: &mut StdRng) {
    match rng.random_range(0..60) {
        0 => drop(run.bad.insert(2, Some(Duration::from_secs(rng.random_range(0..30))))),
        1..4 => run.bad.clear(),
        4 => drop(run.bad.insert(1, Some(Duration::from_secs(5)))),
        5 => run.deploys = Deploys::default(),
        6 => run.now = run.now + Duration::from_secs(100),
        7 | 8 => drop(run.order(Order::Resume)),
        9 if rng.random_bool(0.3) => drop(run.order(Order::Abort { now: rng.random() })),
        10 => {
            let node = ["n1", "n2"][rng.random_range(0..2)].to_owned();
            run.world.event("scheduler", Event::LeaseEnded(vec![node.clone()])).unwrap();
            run.tick();
            run.world.event("node:n1", Event::NodeReturned(node)).unwrap();
        }
        _ => {}
    }
}

#[test]
fn a_schedule_that_cannot_be_is_refused() {
    let split = |percent| Step { percent, form: Form::Split, pause: Pause::None };
    let standing_by = Schedule { in_place: true, ..schedule(Strategy::BlueGreen, Pause::None) };
    let cases: [(Schedule, &str); 6] = [
        (standing_by, "in-place: blue-green has all pods of the next version stand by beside the others"),
        (Schedule { steps: vec![], ..usual() }, "steps: at least one is needed"),
        (Schedule { steps: vec![split(50)], ..usual() }, "steps: the last one is 100"),
        (
            Schedule { steps: vec![split(50), split(50), split(100)], ..usual() },
            "steps: percentages grow from step to step, from 1 to 100, and 50 does not",
        ),
        (Schedule { retries: 21, ..usual() }, "retries: 21 are more than 20"),
        (Schedule { healthy_for_ms: 31 * 86_400_000, ..usual() }, "healthy-for: at most 30 days"),
    ];
    for (schedule, error) in cases {
        assert_eq!(Run::new(2).deploy(schedule).unwrap_err().to_string(), error);
    }
    assert_eq!(usual().wait(100), Duration::from_secs(3_600), "waits are bounded");
}

fn usual() -> Schedule {
    schedule(Strategy::Rolling, Pause::None)
}

fn schedule(strategy: Strategy, pause: Pause) -> Schedule {
    Schedule {
        strategy,
        steps: Schedule::steps_of(strategy, pause),
        healthy_for_ms: 10_000,
        timeout_ms: 300_000,
        retries: 3,
        retry_after_ms: 10_000,
        on_failure: OnFailure::Rollback,
        in_place: false,
    }
}

fn text(program: &str, count: u32) -> Job {
    let text = format!(
        "{{job: shop, groups: {{web: {{count: {count}, tasks: {{t: {{exec: [/bin/{program}]}}}}}}}}}}"
    );
    serde_norway::from_str(&text).unwrap()
}

impl Run {
    /// Version 1 runs.
    fn new(count: u32) -> Run {
        let mut world = World::new(1);
        let capacity = Resources { cpu: "4".parse().unwrap(), memory: "8Gi".parse().unwrap() };
        for name in ["n1", "n2"] {
            let claim = world.next_claim();
            world.join_with(name, capacity, BTreeMap::new(), claim).unwrap();
        }
        world.event("user:alice", Event::ApplyJob(text("one", count), Texts::new())).unwrap();
        let now = Moment(Duration::from_secs(1));
        let mut run = Run {
            world,
            deploys: Deploys::default(),
            now,
            bad: BTreeMap::new(),
            started: BTreeMap::new(),
            hookless: BTreeSet::new(),
            silent: BTreeSet::new(),
        };
        (0..8).for_each(|_| run.tick());
        assert!(run.pods().all(|pod| pod.serves()));
        run
    }

    fn deploy(&mut self, schedule: Schedule) -> Result<(), Refusal> {
        let count = self.world.state.job("shop").unwrap().groups["web"].count;
        self.begin(text("two", count), schedule)
    }

    fn begin(&mut self, job: Job, schedule: Schedule) -> Result<(), Refusal> {
        self.world.event("user:alice", Event::Deploy(job, schedule)).map(drop)
    }

    fn order(&mut self, order: Order) -> Result<(), Refusal> {
        let id = self.deploy_of().id;
        self.world.event("user:alice", Event::DeployOrder(id, order)).map(drop)
    }

    fn deploy_of(&self) -> Deploy {
        Deploy::clone(self.world.state.deploys().values().next_back().unwrap())
    }

    fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.world.state.pods().values().map(|pod| &**pod)
    }

    fn places(&self) -> Vec<(PodId, Option<String>, Option<Ipv6Addr>)> {
        self.pods().map(|pod| (pod.id.clone(), pod.node.clone(), pod.address)).collect()
    }

    fn until(&mut self, stage: Stage, seconds_max: u64) -> Duration {
        let since = self.now;
        while self.deploy_of().stage != stage {
            self.tick();
            let (took, deploy) = (self.now - since, self.deploy_of());
            assert!(took <= Duration::from_secs(seconds_max), "{took:?}: not {stage:?}: {deploy:?}");
        }
        self.now - since
    }

    /// What is held or stuck waits for a person.
    fn come_to_an_end(&mut self) {
        for _ in 0..8_000 {
            match self.deploy_of().stage {
                Stage::Held | Stage::Stuck => self.order(Order::Resume).unwrap(),
                stage if stage.is_end() => break,
                _ => {}
            }
            self.tick();
        }
        (0..40).for_each(|_| self.tick());
    }

    fn tick(&mut self) {
        self.now = self.now + Duration::from_millis(TICK_MS);
        for node in ["n1", "n2"].into_iter().filter(|node| !self.silent.contains(node)).collect::<Vec<_>>() {
            let pods: Vec<Pod> =
                self.pods().filter(|pod| pod.node.as_deref() == Some(node)).cloned().collect();
            let reports = pods.iter().filter_map(|pod| self.report(pod)).collect();
            self.world.event(&format!("node:{node}"), Event::PodReports(node.to_owned(), reports)).unwrap();
        }
        for (id, moves, decided) in self.deploys.look(&self.world.state, self.now) {
            self.world.event("deploy", Event::DeployMoved(id, moves, decided)).unwrap();
        }
    }

    /// How a pod is: a task that ends is started again a second later.
    fn report(&mut self, pod: &Pod) -> Option<PodReport> {
        let hookless = self.hookless.contains(&pod.job_version);
        let report = |phase, restarts, gone| PodReport {
            id: pod.id.clone(),
            phase,
            message: "task t: as the test wants".to_owned(),
            restarts,
            gone,
            version: Some(pod.job_version),
            ending: match phase {
                PodPhase::Failed => Some(Ending::new("task t: as the test wants", b"no such table")),
                PodPhase::Running if hookless => {
                    Some(Ending { for_good: true, ..Ending::new("hook smoke: exited with status 1", b"404") })
                }
                _ => None,
            },
        };
        if pod.phase == PodPhase::Terminating {
            return pod.stop.then(|| report(PodPhase::Terminating, 0, true));
        }
        let began = *self.started.entry(pod.id.to_string()).or_insert(self.now);
        let ends = self.bad.get(&pod.job_version).map(|after| after.unwrap_or_default());
        let runs_for = self.now - began;
        match (pod.phase, ends) {
            (PodPhase::Failed, _) if runs_for >= Duration::from_secs(1) => {
                self.started.insert(pod.id.to_string(), self.now);
                Some(report(PodPhase::Running, pod.restarts + 1, false))
            }
            (PodPhase::Failed, _) => None,
            (_, Some(ends)) if runs_for >= ends => {
                self.started.insert(pod.id.to_string(), self.now);
                Some(report(PodPhase::Failed, pod.restarts, false))
            }
            _ => Some(report(PodPhase::Running, pod.restarts, false)),
        }
    }
}
