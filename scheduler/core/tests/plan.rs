//! A plan says what the apply does, and changes nothing.

mod support;

use std::collections::BTreeMap;

use rand::{SeedableRng as _, rngs::StdRng};
use scheduler_core::{
    event::{Event, PodReport, Texts},
    job::Job,
    plan::{JobPlan, PodFate, plan},
    pod::{Pod, PodId, PodPhase},
    quantity::Resources,
    state::Map,
    time::WallTime,
    transition::{Context, Origin},
};
use support::World;

fn job(text: &str) -> Job {
    serde_norway::from_str(text).unwrap()
}

fn node(world: &mut World, name: &str, cpu: &str, labels: &[(&str, &str)]) {
    let capacity = Resources { cpu: cpu.parse().unwrap(), memory: "8Gi".parse().unwrap() };
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let claim = world.next_claim();
    world.join_with(name, capacity, labels, claim).unwrap();
}

fn all_run(world: &mut World, name: &str) {
    let report = |pod: &std::sync::Arc<Pod>| {
        let gone = !pod.is_wanted();
        let (phase, message) = (PodPhase::Running, String::new());
        PodReport { id: pod.id.clone(), phase, message, restarts: 0, gone, ending: None, version: None }
    };
    let reports = world.state.pods_on(name).map(report).collect();
    world.event(&format!("node:{name}"), Event::PodReports(name.to_owned(), reports)).unwrap();
}

/// Plans and then applies; the plan has to be what then is.
fn check(world: &mut World, text: &str) -> Vec<String> {
    let before = world.state.clone();
    let origin = Origin { changer: "user:alice".to_owned(), message: String::new() };
    let mut rng = StdRng::seed_from_u64(99);
    let mut context = Context { wall: WallTime(0), rng: &mut rng, is_watched: &|_| false };
    let plan = plan(&world.state, &[(job(text), Texts::new())], &origin, &mut context).unwrap().remove(0);
    assert_eq!(world.state, before, "a plan changes nothing");
    world.event("user:alice", Event::ApplyJob(job(text), Texts::new())).unwrap();
    let version = world.state.job_record(&plan.job).unwrap().version;
    assert_eq!(plan.to, version);
    compare(&plan, before.pods(), world);
    plan.pods
        .iter()
        .map(|pod| format!("{:?} {} {}", pod.fate, pod.node.as_deref().unwrap_or("-"), pod.why))
        .collect()
}

/// Every pod is, in place and phase, where the plan has it or where it was.
fn compare(plan: &JobPlan, before: &Map<PodId, std::sync::Arc<Pod>>, world: &World) {
    let mut expected: BTreeMap<String, (Option<String>, bool)> =
        before.values().map(|pod| (pod.id.to_string(), (pod.node.clone(), pod.is_wanted()))).collect();
    let mut restarted = vec![];
    for pod in &plan.pods {
        let is_wanted = !matches!(pod.fate, PodFate::Stopped | PodFate::Moved { .. });
        expected.insert(pod.pod.clone(), (pod.node.clone(), is_wanted));
        match &pod.fate {
            PodFate::Moved { to, node } => drop(expected.insert(to.clone(), (node.clone(), true))),
            PodFate::Restarted => restarted.push(pod.pod.clone()),
            _ => {}
        }
    }
    let is = world.state.pods().values().map(|pod| (pod.id.to_string(), (pod.node.clone(), pod.is_wanted())));
    // What is stopped and has nothing running is forgotten at once.
    let is: BTreeMap<_, _> = is.collect();
    expected.retain(|id, (_, wanted)| *wanted || is.contains_key(id));
    assert_eq!(is, expected);
    for id in restarted {
        let (old, new) = (&before[&PodId(id.clone())], &world.state.pods()[&PodId(id)]);
        assert_eq!((old.address, new.phase), (new.address, PodPhase::Starting), "in place");
    }
}

#[test]
fn a_plan_is_what_the_apply_does() {
    let mut world = World::new(1);
    node(&mut world, "n1", "1000m", &[("disk", "fast")]);
    node(&mut world, "n2", "1000m", &[]);
    let text = |count: u32, rest: &str| {
        format!(
            "{{job: a, groups: {{web: {{count: {count}, {rest} tasks: {{t: {{exec: [/x], cpu: 300m}}}}}}}}}}"
        )
    };
    let told = check(&mut world, &text(2, ""));
    assert_eq!(told.iter().filter(|line| line.starts_with("Placed")).count(), 2, "{told:?}");
    ["n1", "n2"].iter().for_each(|node| all_run(&mut world, node));

    let told = check(&mut world, &text(2, ""));
    assert_eq!(told, Vec::<String>::new(), "nothing to change");
    let told = check(&mut world, &text(2, "").replace("/x", "/y"));
    assert!(told.len() == 2 && told.iter().all(|line| line.starts_with("Restarted")), "{told:?}");
    ["n1", "n2"].iter().for_each(|node| all_run(&mut world, node));
    let told = check(&mut world, &text(2, "").replace("/x", "/y").replace("300m", "200m"));
    assert!(told.len() == 2 && told.iter().all(|line| line.starts_with("Kept")), "{told:?}");

    // A program is run, and no amount is another.
    let hooks =
        "hooks: {chk: {exec: [/bin/false], before: [running]}, tell: {exec: [/t], on: [pod-running]}},";
    let told = check(&mut world, &text(2, hooks).replace("/x", "/y").replace("300m", "200m"));
    let kept = |line: &String| {
        line.starts_with("Kept") && line.contains("its hook chk is run") && !line.contains("amounts")
    };
    assert!(told.len() == 2 && told.iter().all(kept), "{told:?}");

    // What comes after the tasks follows them.
    let follows = "hooks: {tell: {exec: [/t], after: [running]}, late: {exec: [/l], after: [tell]}},";
    check(&mut world, &text(2, follows).replace("/x", "/y"));
    let told = check(&mut world, &text(2, follows).replace("/x", "/z"));
    let again = |line: &String| line.starts_with("Restarted") && line.contains("late, tell are run again");
    assert!(told.len() == 2 && told.iter().all(again), "{told:?}");
    ["n1", "n2"].iter().for_each(|node| all_run(&mut world, node));

    // Only what cannot stay moves.
    let told = check(&mut world, &text(2, "constraints: {disk: fast},").replace("/x", "/y"));
    assert_eq!(told.iter().filter(|line| line.starts_with("Moved")).count(), 1, "{told:?}");
    assert!(told.iter().any(|line| line.contains("node: Some(\"n1\")") && line.contains("disk")), "{told:?}");
    ["n1", "n2"].iter().for_each(|node| all_run(&mut world, node));

    // More than fits: the others wait, with the reason.
    let told = check(&mut world, &text(9, "constraints: {disk: fast},").replace("/x", "/y"));
    let waits: Vec<_> = told.iter().filter(|line| line.starts_with("Waits")).collect();
    assert!(!waits.is_empty() && waits.iter().all(|line| line.len() > "Waits - ".len()), "{told:?}");
    let told = check(&mut world, &text(1, "constraints: {disk: fast},").replace("/x", "/y"));
    assert!(told.iter().filter(|line| line.starts_with("Stopped")).count() >= 8, "{told:?}");
}

#[test]
fn a_plan_is_refused_as_the_apply_is() {
    let world = World::new(1);
    let origin = Origin { changer: "user:alice".to_owned(), message: String::new() };
    let mut rng = StdRng::seed_from_u64(99);
    let mut context = Context { wall: WallTime(0), rng: &mut rng, is_watched: &|_| false };
    let bad = job("{job: a, groups: {web: {count: 2, tasks: {t: {exec: [x]}}}}}");
    let refused = plan(&world.state, &[(bad, Texts::new())], &origin, &mut context).unwrap_err();
    assert!(refused.to_string().contains("absolute path"), "{refused}");
}

/// What it stops, it stops when others run: the plan knows that before.
#[test]
fn a_plan_of_a_rollout_names_what_it_stops_later() {
    let mut world = World::new(3);
    ["n1", "n2"].iter().for_each(|name| node(&mut world, name, "4", &[]));
    let text = |count: u32, rollout: &str, program: &str| {
        job(&format!(
            "{{job: a, groups: {{web: {{count: {count}, {rollout} tasks: {{t: {{exec: [{program}]}}}}}}}}}}"
        ))
    };
    let settle =
        |world: &mut World| (0..4).for_each(|_| ["n1", "n2"].iter().for_each(|node| all_run(world, node)));
    world.event("user:alice", Event::ApplyJob(text(5, "", "/one"), Texts::new())).unwrap();
    settle(&mut world);
    let rollout = |percent: u32| format!("rollout: {{previous: 1, next: 2, percent-next: {percent}}},");
    for (count, percent) in [(5, 40), (3, 40), (3, 0), (4, 100)] {
        let next = text(count, &rollout(percent), "/two");
        let origin = Origin { changer: "user:alice".to_owned(), message: String::new() };
        let (before, mut rng) = (world.state.clone(), StdRng::seed_from_u64(99));
        let mut context = Context { wall: WallTime(0), rng: &mut rng, is_watched: &|_| false };
        let plan =
            plan(&world.state, &[(next.clone(), Texts::new())], &origin, &mut context).unwrap().remove(0);
        assert_eq!(world.state, before, "a plan changes nothing");
        world.event("user:alice", Event::ApplyJob(next, Texts::new())).unwrap();
        settle(&mut world);
        let mut expected: BTreeMap<String, ()> =
            before.pods().keys().map(|id| (id.to_string(), ())).collect();
        for pod in &plan.pods {
            match &pod.fate {
                PodFate::Stopped => drop(expected.remove(&pod.pod)),
                PodFate::Moved { to, .. } => {
                    expected.remove(&pod.pod);
                    expected.insert(to.clone(), ());
                }
                _ => drop(expected.insert(pod.pod.clone(), ())),
            }
        }
        let is: Vec<String> = world.state.pods().keys().map(ToString::to_string).collect();
        assert_eq!(is, expected.into_keys().collect::<Vec<_>>(), "{percent} % of {count}: {:?}", plan.pods);
        assert!(is.len() == count as usize);
    }
}

#[test]
fn a_plan_names_what_a_node_that_is_cut_off_has_yet_to_hear() {
    let mut world = World::new(3);
    node(&mut world, "n1", "4", &[]);
    let text = "{job: a, groups: {web: {tasks: {t: {exec: [/one]}}}}}";
    check(&mut world, text);
    all_run(&mut world, "n1");
    world.event("scheduler", Event::CutOff(vec!["n1".to_owned()])).unwrap();
    let told = check(&mut world, &text.replace("/one", "/two"));
    assert_eq!(told, ["Kept n1 its node does not report: what becomes of it is decided when that is back"]);
}
