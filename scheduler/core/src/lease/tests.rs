//! Leases under a clock that the tests turn.

use super::*;
use crate::testing;

/// Silence ends after a second.
const LEASE: Duration = Duration::from_secs(5);
const STEP_MS: u64 = 50;

#[test]
fn a_silent_node_that_no_neighbour_reaches_is_lost_after_a_second() {
    let mut world = World::new(&["n1", "n2", "n3"]);
    world.run(1000, &["n1", "n2", "n3"]);
    let asked = world.run_until_asked(&["n2", "n3"]);
    assert_eq!(asked, ["n2 about n1", "n3 about n1"]);
    assert!((1000..=1100).contains(&world.since), "{} ms", world.since);
    world.leases.answered("n2", "n1", false);
    assert_eq!(world.run(50, &["n2", "n3"]), NOTHING, "the other may still say that it is there");
    world.leases.answered("n3", "n1", false);
    assert_eq!(world.run(50, &["n2", "n3"]), [lost("n1")]);
}

#[test]
fn one_neighbour_that_reaches_it_is_enough() {
    let mut world = World::new(&["n1", "n2", "n3"]);
    world.run_until_asked(&["n2", "n3"]);
    world.leases.answered("n2", "n1", false);
    world.leases.answered("n3", "n1", true);
    assert_eq!(world.run(50, &["n2", "n3"]), [cut_off("n1")]);
    world.follow("n1", NodePhase::CutOff);
    // For weeks, if need be.
    for _ in 0..1000 {
        world.run_until_asked(&["n2", "n3"]);
        world.leases.answered("n2", "n1", true);
        world.leases.answered("n3", "n1", true);
    }
    assert_eq!(world.run(50, &["n2", "n3"]), [Finding::Fenced("n1".into())], "it has no lease, though");
}

#[test]
fn one_that_is_cut_off_and_dies_is_lost_then() {
    let mut world = World::new(&["n1", "n2"]);
    world.run_until_asked(&["n2"]);
    world.leases.answered("n2", "n1", true);
    world.run(50, &["n2"]);
    world.follow("n1", NodePhase::CutOff);
    world.run_until_asked(&["n2"]);
    world.leases.answered("n2", "n1", false);
    assert_eq!(world.run(50, &["n2"]), [lost("n1")]);
}

#[test]
fn an_agent_that_has_ended_has_a_lease_to_come_back() {
    let mut world = World::new(&["n1", "n2"]);
    world.run(100, &["n1", "n2"]);
    world.leases.ended("n1", world.now);
    let mut found = Vec::new();
    while found.is_empty() {
        world.run_until_asked(&["n2"]);
        world.leases.answered("n2", "n1", true);
        found = world.run(50, &["n2"]);
    }
    assert_eq!(found, [lost("n1")]);
    assert!((4900..=6000).contains(&world.since), "{} ms", world.since);
    world.leases.renew("n1", world.now);
    assert!(world.leases.runs("n1", world.now));
}

/// A server notices long after a cut that a connection is dead.
#[test]
fn a_stream_that_ends_late_says_nothing_of_the_agent() {
    let mut world = World::new(&["n1", "n2"]);
    world.run_until_asked(&["n2"]);
    world.leases.ended("n1", world.now);
    world.leases.answered("n2", "n1", true);
    assert_eq!(world.run(50, &["n2"]), [cut_off("n1")]);
}

#[test]
fn a_server_that_hears_nobody_blames_nobody() {
    let mut world = World::new(&["n1", "n2", "n3"]);
    let mut found = world.run(10_000, &[]);
    found.retain(|finding| !matches!(finding, Finding::CutOff(_)));
    assert_eq!(found, NOTHING);
}

/// A node that died 9 s after the start of a server was lost only 16 s after it.
#[test]
fn who_is_back_after_a_start_has_a_lease_and_not_the_time_of_those_who_are_not() {
    let mut world = World::new(&["n1", "n2", "n3"]);
    world.leases.give_all(LEASE * LEASES_AT_START, world.now);
    world.run(1000, &["n1", "n2"]);
    let asked = world.run_until_asked(&["n2"]);
    assert_eq!(asked, ["n2 about n1"]);
    assert!((6000..=6200).contains(&world.since), "{} ms", world.since);
    assert!(world.run(8000, &["n2"]).iter().all(|found| *found != lost("n3")));
}

#[test]
fn a_node_without_neighbours_is_lost_when_its_lease_ends() {
    let mut world = World::new(&["n1", "n2"]);
    world.neighbours = false;
    assert_eq!(world.run(4900, &["n2"]), NOTHING);
    let found = world.run(1300, &["n2"]);
    assert!(found.contains(&lost("n1")), "whoever is asked elsewhere and says nothing: {found:?}");
}

/// Silence over routes proves nothing: the lease decides, as if nobody had been asked.
#[test]
fn nodes_elsewhere_are_asked_when_there_is_nobody_on_the_link_and_only_their_yes_counts() {
    let mut world = World::new(&["n1", "n2", "n3", "n4", "n5"]);
    world.neighbours = false;
    let others = ["n2", "n3", "n4", "n5"];
    let asked = world.run_until_asked(&others);
    assert_eq!(asked.len(), WITNESSES_MAX, "{asked:?}");
    let answer = |world: &mut World, asked: &[String], is_there| {
        let witnesses = asked.iter().filter_map(|question| question.split(' ').next());
        witnesses.for_each(|witness| world.leases.answered(witness, "n1", is_there));
    };
    answer(&mut world, &asked, false);
    assert_eq!(world.run(500, &others), NOTHING, "the lease runs");
    let asked = world.run_until_asked(&others);
    world.leases.answered(asked[0].split(' ').next().unwrap(), "n1", true);
    assert_eq!(world.run(50, &others), [cut_off("n1")]);
    world.follow("n1", NodePhase::CutOff);
    for _ in 0..20 {
        let asked = world.run_until_asked(&others);
        answer(&mut world, &asked, true);
    }
    assert!(!world.run(50, &others).contains(&lost("n1")), "for weeks, if need be");
    let asked = world.run_until_asked(&others);
    answer(&mut world, &asked, false);
    assert!(world.run(50, &others).contains(&lost("n1")), "its lease has long ended");
}

#[test]
fn witnesses_that_say_nothing_make_nobody_dead() {
    let mut world = World::new(&["n1", "n2"]);
    let found = world.run(8_000, &["n2"]);
    assert!(found.contains(&cut_off("n1")) && !found.contains(&lost("n1")), "{found:?}");
}

#[test]
fn only_nodes_that_report_are_asked_and_three_at_most() {
    let mut world = World::new(&["n1", "n2", "n3", "n4", "n5", "n6"]);
    let asked = world.run_until_asked(&["n3", "n4", "n5", "n6"]);
    let about = |name: &str| asked.iter().filter(|question| question.ends_with(name)).count();
    assert_eq!((about("about n1"), about("about n2")), (3, 3), "{asked:?}");
    assert!(!asked.iter().any(|question| question.starts_with("n1") || question.starts_with("n2")));
}

#[test]
fn a_server_that_was_stopped_gives_all_nodes_time() {
    let mut world = World::new(&["n1", "n2"]);
    world.now = world.now + Duration::from_secs(60);
    assert_eq!(world.run(4_000, &[]), NOTHING);
}

#[test]
fn what_was_granted_is_over_a_quarter_of_a_lease_after_its_end() {
    let mut world = World::new(&["n1", "n2"]);
    world.run(1000, &["n1", "n2"]);
    assert_eq!(world.leases.grant("n1", world.now), Some(LEASE));
    let granted = world.now;
    world.follow("n1", NodePhase::Lost);
    assert_eq!(world.leases.grant("n1", world.now), None, "one that is lost gets nothing");
    while world.run(50, &["n2"]) == NOTHING {}
    let waited = world.now - granted;
    assert!(waited >= LEASE * 5 / 4 && waited < LEASE * 5 / 4 + Duration::from_millis(100), "{waited:?}");
    let fenced = Node { fenced: true, ..node("n1", NodePhase::Lost) };
    world.leases.follow(&fenced, world.now);
    assert_eq!(world.run(50, &["n2"]), NOTHING, "it is said until the state holds it");
}

#[test]
fn a_copy_is_refused_by_a_server_that_has_just_started_and_let_in_by_an_operators_word() {
    let now = Moment(Duration::from_secs(100));
    let first = Node { machine: "first".into(), ..node("n1", NodePhase::Ready) };
    let mut leases = Leases::new(LEASE, now);
    leases.follow(&first, now);
    let copy = Claimant { machine: "copy", hardware: "", underlay: None };
    assert!(leases.claim("n1", copy, now + LEASE).is_err());
    assert!(leases.may_claim("n1", Claimant { machine: "first", ..copy }, now).is_ok());
    leases.renew("n1", now + LEASE);
    assert!(leases.claim("n1", copy, now + LEASE * 2).is_err());
    assert!(leases.claimed("n1", now + LEASE * 2).is_some());
    leases.follow(&Node { phase: NodePhase::CutOff, ..first.clone() }, now + LEASE * 2);
    assert!(leases.may_claim("n1", copy, now + LEASE * 2).is_err());
    leases.follow(&Node { phase: NodePhase::Dead, ..first }, now + LEASE * 2);
    assert_eq!(leases.claim("n1", copy, now + LEASE * 2), Ok(Taken::Anew));
}

/// A neighbour that reaches it says that the first lives, although its lease has ended.
#[test]
fn a_copy_elsewhere_is_refused_for_as_long_as_neighbours_reach_the_first() {
    let mut world = World::new(&["n1", "n2"]);
    let first = Claimant { machine: "first", hardware: "", underlay: Some("2001:db8::1".parse().unwrap()) };
    let copy = Claimant { machine: "copy", hardware: "", underlay: Some("2001:db8::2".parse().unwrap()) };
    world.leases.claim("n1", first, world.now).unwrap();
    for _ in 0..20 {
        world.run_until_asked(&["n2"]);
        world.leases.answered("n2", "n1", true);
        world.run(50, &["n2"]);
    }
    assert!(world.since > 10_000);
    assert!(world.leases.claim("n1", copy, world.now).is_err());
    for _ in 0..20 {
        world.run_until_asked(&["n2"]);
        world.leases.answered("n2", "n1", false);
    }
    assert_eq!(world.leases.claim("n1", copy, world.now), Ok(Taken::Anew));
}

/// A machine that boots is back after two seconds. It is served at once, and what only one node may run waits until the
/// lease of the boot before is over for sure.
#[test]
fn the_next_boot_is_let_in_at_once_and_gets_no_lease_before_the_old_one_is_over() {
    let mut world = World::new(&["n1", "n2"]);
    let on = |machine| Claimant { machine, hardware: "board", underlay: None };
    world.leases.claim("n1", on("first"), world.now).unwrap();
    world.run(500, &["n1", "n2"]);
    assert_eq!(world.leases.grant("n1", world.now), Some(LEASE));
    let granted = world.now;
    assert!(world.leases.claim("n1", on("second boot"), world.now).is_err(), "the first is heard");
    world.run(2_000, &["n2"]);
    let copy = Claimant { hardware: "another board", ..on("copy") };
    assert!(world.leases.claim("n1", copy, world.now).is_err());
    assert_eq!(world.leases.claim("n1", on("second boot"), world.now), Ok(Taken::Anew));
    while world.now - granted < LEASE * 5 / 4 {
        assert_eq!(world.leases.grant("n1", world.now), Some(Duration::ZERO), "{:?}", world.now - granted);
        world.run(50, &["n1", "n2"]);
    }
    assert_eq!(world.leases.grant("n1", world.now), Some(LEASE));
    assert!(world.leases.claim("n1", on("first"), world.now).is_err());
}

const NOTHING: [Finding; 0] = [];

fn lost(name: &str) -> Finding {
    Finding::Lost(name.to_owned())
}

fn cut_off(name: &str) -> Finding {
    Finding::CutOff(name.to_owned())
}

struct World {
    leases: Leases,
    names: Vec<String>,
    neighbours: bool,
    now: Moment,
    /// Milliseconds since all reported.
    since: u64,
}

impl World {
    fn new(names: &[&str]) -> World {
        let now = Moment(Duration::from_secs(100));
        let mut leases = Leases::new(LEASE, now);
        names.iter().for_each(|name| leases.follow(&node(name, NodePhase::Ready), now));
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        World { leases, names, neighbours: true, now, since: 0 }
    }

    fn follow(&mut self, name: &str, phase: NodePhase) {
        self.leases.follow(&node(name, phase), self.now);
    }

    /// Lets time go by while some report; what is found.
    fn run(&mut self, ms: u64, reporting: &[&str]) -> Vec<Finding> {
        let mut found = Vec::new();
        for _ in 0..ms / STEP_MS {
            found.extend(self.step(reporting).findings);
        }
        found
    }

    fn run_until_asked(&mut self, reporting: &[&str]) -> Vec<String> {
        loop {
            let questions = self.step(reporting).questions;
            if !questions.is_empty() {
                let mut asked: Vec<String> = questions
                    .iter()
                    .map(|asked| format!("{} about {}", asked.witness, asked.about))
                    .collect();
                asked.sort();
                return asked;
            }
        }
    }

    fn step(&mut self, reporting: &[&str]) -> Look {
        self.now = self.now + Duration::from_millis(STEP_MS);
        self.since = if reporting.len() == self.names.len() { 0 } else { self.since + STEP_MS };
        reporting.iter().for_each(|name| self.leases.renew(name, self.now));
        let names = if self.neighbours { self.names.clone() } else { Vec::new() };
        self.leases.look_with(|_| names.iter().map(String::as_str).collect(), self.now)
    }
}

fn node(name: &str, phase: NodePhase) -> Node {
    Node { phase, ..testing::node(name) }
}
