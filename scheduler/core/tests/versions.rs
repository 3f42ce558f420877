//! Which versions of jobs are kept, and which go.

#[allow(dead_code)]
mod support;

use std::fmt::Write as _;

use scheduler_core::{
    change::Key,
    event::{Event, Refusal, Texts},
    job::Job,
    state::State,
    version::{VERSIONS_BYTES_MAX, VERSIONS_MAX, VersionId},
};
use support::World;

fn job(name: &str, argument: &str) -> Job {
    let text = format!("{{job: {name}, groups: {{web: {{tasks: {{t: {{exec: [/x, '{argument}']}}}}}}}}}}");
    serde_norway::from_str(&text).unwrap()
}

fn apply(world: &mut World, name: &str, argument: &str) {
    world.event("user:alice", Event::ApplyJob(job(name, argument), Texts::new())).unwrap();
}

fn kept(world: &World, name: &str) -> Vec<u32> {
    world.state.versions().of_job(name).map(|(id, _)| id.version).collect()
}

fn id(name: &str, version: u32) -> VersionId {
    VersionId { job: name.to_owned(), version }
}

#[test]
fn every_version_says_who_made_it_by_which_revision_and_what_it_was() {
    let mut world = World::new(1);
    apply(&mut world, "a", "one");
    apply(&mut world, "a", "two");
    apply(&mut world, "a", "two");
    let back = Event::RollbackJob(job("a", "one"), 1, Texts::new());
    let made = world.event("user:bob", back).unwrap().unwrap();
    world.event("user:bob", Event::DeleteJob("a".to_owned())).unwrap();
    assert_eq!(kept(&world, "a"), [1, 2, 3], "also when the job is deleted");
    let third = world.state.versions().get(&id("a", 3)).unwrap();
    assert_eq!((third.equals, third.made, third.changer.as_str()), (Some(1), made.revision, "user:bob"));
    assert_eq!(third.message, made.message);
    assert_eq!(*third.text.job().unwrap(), job("a", "one"));
    assert_eq!(kept(&world, "b"), [0; 0]);
}

#[test]
fn of_a_job_the_newest_are_kept_and_of_those_as_many_as_fit() {
    let mut world = World::new(1);
    for number in 0..VERSIONS_MAX + 5 {
        apply(&mut world, "many", &number.to_string());
    }
    let (first, last) = (6, VERSIONS_MAX as u32 + 5);
    assert_eq!(kept(&world, "many"), (first..=last).collect::<Vec<_>>());

    let text = |fill: char| fill.to_string().repeat(VERSIONS_BYTES_MAX as usize / 5);
    ('a'..='f').for_each(|fill| apply(&mut world, "large", &text(fill)));
    assert_eq!(kept(&world, "large"), [3, 4, 5, 6]);
    assert_eq!(kept(&world, "many").len(), VERSIONS_MAX, "each job has its own");
}

#[test]
fn there_is_a_way_back_from_a_text_that_is_larger_than_what_is_kept() {
    let mut world = World::new(1);
    let mut huge = |fill: &str| {
        let mut tasks = String::new();
        for task in 0..6 {
            write!(tasks, "t{task}: {{exec: [/x, '{}']}}, ", fill.repeat(60_000)).unwrap();
        }
        let text = format!("{{job: huge, groups: {{web: {{tasks: {{{tasks}}}}}}}}}");
        let job = serde_norway::from_str(&text).unwrap();
        world.event("user:alice", Event::ApplyJob(job, Texts::new())).unwrap();
        kept(&world, "huge")
    };
    assert_eq!(huge("a"), [1]);
    assert_eq!(huge("b"), [1, 2]);
    assert_eq!(huge("c"), [2, 3]);
}

/// A cluster of an earlier version has texts in force that nobody has kept.
#[test]
fn what_was_in_force_before_versions_were_kept_is_kept_when_it_goes() {
    let mut world = World::new(1);
    for name in ["a", "b"] {
        apply(&mut world, name, "one");
        apply(&mut world, name, "two");
    }
    let old = world.state.values().filter(|(key, _)| !matches!(key, Key::Version(_)));
    world.state = State::load(world.state.revision(), old);
    assert_eq!((kept(&world, "a"), world.state.versions().bytes()), (vec![], 0));
    apply(&mut world, "a", "three");
    assert_eq!(kept(&world, "a"), [2, 3]);
    let second = world.state.versions().get(&id("a", 2)).unwrap();
    assert_eq!(second.kept, world.state.revision());
    assert_eq!((second.made, second.changer.as_str(), second.message.as_str()), (0, "user:alice", ""));
    world.event("user:alice", Event::DeleteJob("b".to_owned())).unwrap();
    assert_eq!(kept(&world, "b"), [2]);
}

#[test]
fn a_revision_that_is_taken_back_takes_its_versions_with_it() {
    let mut world = World::new(1);
    apply(&mut world, "a", "one");
    let before = world.state.clone();
    let event = Event::ApplyJob(job("a", "two"), Texts::new());
    let revision = world.event("user:alice", event).unwrap().unwrap();
    let after = world.state.clone();
    world.state.undo(&revision);
    assert_eq!(world.state, before);
    world.state.advance(&revision);
    assert_eq!(world.state, after);
    let values: Vec<_> = after.values().collect();
    assert_eq!(State::load(after.revision(), values), after);
}

#[test]
fn who_says_which_version_they_have_seen_overwrites_no_other() {
    let mut world = World::new(1);
    let mut at = |version, argument: &str| {
        world.event("user:alice", Event::ApplyJobAt(version, job("a", argument), Texts::new()))
    };
    let other = |wanted, found| Refusal::OtherVersion { job: "a".to_owned(), wanted, found };
    assert_eq!(at(1, "one").unwrap_err(), other(1, 0));
    assert!(at(0, "one").unwrap().is_some());
    assert_eq!(at(0, "two").unwrap_err(), other(0, 1));
    assert!(at(1, "two").unwrap().is_some());
    let refusal = at(1, "three").unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "job `a` is at version 2, and not at version 1: somebody else has changed it (`netctl history a`)"
    );
    assert!(at(2, "two").unwrap().is_none(), "it is so already");
    world.event("user:alice", Event::DeleteJob("a".to_owned())).unwrap();
    let event = Event::ApplyJobAt(0, job("a", "two"), Texts::new());
    assert!(world.event("user:alice", event).unwrap().is_some(), "a deleted job is none");
}
