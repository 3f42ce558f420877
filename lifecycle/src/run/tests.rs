//! Walks over small graphs, told event by event.

use super::*;
use crate::step::{Owner, Step};

const S: Duration = Duration::from_secs(1);

fn step(name: &str) -> Step {
    Step::new(name, Owner::Node, "").undo()
}

/// `a` and `b` at a time, then `c`, then the target `up`.
fn diamond(change: impl FnOnce(&mut Vec<Step>)) -> Run {
    let mut steps = vec![
        step("a"),
        step("b"),
        step("c").requires("a").requires("b"),
        Step::target("up", Owner::Node, "").requires("c"),
    ];
    change(&mut steps);
    Run::new(Arc::new(Graph::new(steps).unwrap()))
}

fn start(names: &[&str]) -> Vec<Command> {
    names.iter().map(|name| Command::Start((*name).to_owned())).collect()
}

fn stop(names: &[&str]) -> Vec<Command> {
    names.iter().map(|name| Command::Stop((*name).to_owned())).collect()
}

fn up(run: &mut Run) {
    run.handle(Event::Up, S);
    for name in ["a", "b", "c"] {
        run.handle(Event::Done(name), S);
    }
    assert!(run.is_done("up"));
}

#[test]
fn steps_run_at_the_same_time_as_far_as_the_graph_allows() {
    let mut run = diamond(|_| ());
    assert_eq!(run.handle(Event::Up, S), start(&["a", "b"]));
    assert_eq!(run.handle(Event::Done("b"), S), []);
    assert_eq!(run.handle(Event::Done("a"), S), start(&["c"]));
    assert!(!run.is_done("up"));
    assert_eq!(run.handle(Event::Done("c"), S), []);
    assert!(run.is_done("up"));
}

#[test]
fn the_way_down_is_the_way_up_backwards() {
    let mut run = diamond(|_| ());
    up(&mut run);
    assert_eq!(run.handle(Event::Down, S), stop(&["c"]));
    assert_eq!(run.handle(Event::Done("c"), S), stop(&["b", "a"]));
    assert_eq!(run.handle(Event::Done("a"), S), []);
    assert!(!run.is_down());
    run.handle(Event::Done("b"), S);
    assert!(run.is_down());
    assert_eq!(run.handle(Event::Up, S), start(&["a", "b"]));
}

#[test]
fn what_never_began_is_not_undone_and_what_is_under_way_is_ended() {
    let mut run = diamond(|steps| steps[1].undo = false);
    run.handle(Event::Up, S);
    run.handle(Event::Done("a"), S);
    assert_eq!(run.handle(Event::Down, S), stop(&["b", "a"]));
    // Its program ended before it heard of that.
    run.handle(Event::Failed("b", "killed"), S);
    assert_eq!(run.handle(Event::Done("a"), S), []);
    assert_eq!(run.handle(Event::Tick, S * 2), stop(&["b"]), "whether it has ended is looked at again");
    run.handle(Event::Done("b"), S * 2);
    assert!(run.is_down());
}

#[test]
fn a_failed_step_blocks_its_dependants_alone_and_says_so() {
    let mut run = diamond(|steps| {
        steps[0] = step("a").attempts(2);
        steps.push(step("d").requires("b"));
    });
    assert_eq!(run.handle(Event::Up, S), start(&["a", "b"]));
    assert_eq!(run.handle(Event::Failed("a", "no"), S), []);
    assert_eq!(run.due(), Some(S + Duration::from_millis(250)));
    assert_eq!(run.handle(Event::Tick, S * 2), start(&["a"]));
    run.handle(Event::Failed("a", "no again"), S * 2);
    assert_eq!(run.handle(Event::Done("b"), S * 2), start(&["d"]));
    assert_eq!(run.due(), None);
    assert_eq!(run.failed_for_good().collect::<Vec<_>>(), [("a", "no again")]);
    let phases: Vec<(String, String)> =
        run.status(S * 2).into_iter().map(|step| (step.name, step.phase.to_string())).collect();
    let phases: Vec<(&str, &str)> =
        phases.iter().map(|(name, phase)| (name.as_str(), phase.as_str())).collect();
    assert_eq!(
        phases,
        [("a", "failed"), ("b", "done"), ("c", "blocked"), ("up", "blocked"), ("d", "running")]
    );
    // What made it fail is mended.
    assert_eq!(run.handle(Event::Again("a"), S * 3), start(&["a"]));
    assert_eq!(run.handle(Event::Done("a"), S * 3), start(&["c"]));
}

#[test]
fn a_failed_optional_step_does_not_block_not_even_those_that_require_it() {
    let mut run = diamond(|steps| steps[0] = step("a").attempts(1).optional());
    run.handle(Event::Up, S);
    run.handle(Event::Done("b"), S);
    assert_eq!(run.handle(Event::Failed("a", "no"), S), start(&["c"]));
}

#[test]
fn order_alone_waits_for_the_end_and_not_for_success() {
    let mut run = diamond(|steps| {
        steps[0] = step("a").attempts(1);
        steps.push(step("e").after("a").after("c"));
    });
    run.handle(Event::Up, S);
    run.handle(Event::Done("b"), S);
    // `c` will never run: there is nothing to wait for.
    assert_eq!(run.handle(Event::Failed("a", "no"), S), start(&["e"]));
}

#[test]
fn a_step_that_takes_too_long_is_given_up_and_tried_again() {
    let mut run = diamond(|steps| steps[0] = step("a").deadline(S));
    run.handle(Event::Up, S);
    assert_eq!(run.due(), Some(S * 2));
    assert_eq!(run.handle(Event::Tick, S * 2), [Command::TimedOut("a".to_owned())]);
    assert_eq!(run.error("a"), Some("it was not done within 1 s"));
    assert_eq!(run.handle(Event::Tick, S * 3), start(&["a"]));
}

#[test]
fn what_is_lost_takes_with_it_what_was_done_on_top() {
    let mut run = diamond(|steps| steps.push(step("d").after("a")));
    up(&mut run);
    run.handle(Event::Done("d"), S);
    assert_eq!(run.handle(Event::Lost("a", "gone"), S), []);
    assert!(!run.is_done("c") && !run.is_done("up") && run.is_done("d"), "`d` only came after it");
    assert_eq!(run.handle(Event::Tick, S * 2), start(&["a"]));
    assert_eq!(run.handle(Event::Done("a"), S * 2), start(&["c"]));
}

#[test]
fn what_is_done_once_more_is_no_failure_and_what_was_done_on_top_follows() {
    let mut run = diamond(|_| ());
    run.handle(Event::Up, S);
    assert_eq!(run.handle(Event::Anew("a"), S), [], "it is under way as it is");
    run.handle(Event::Done("a"), S);
    run.handle(Event::Done("b"), S);
    run.handle(Event::Done("c"), S);
    assert_eq!(run.handle(Event::Anew("a"), S * 4), []);
    assert!(run.is_under_way("a") && run.is_done("b") && !run.is_done("c") && !run.is_done("up"));
    assert_eq!((run.error("a"), run.failures("a")), (None, 0));
    assert_eq!(run.handle(Event::Done("a"), S * 6), start(&["c"]));
    run.handle(Event::Done("c"), S * 7);
    let status = run.status(S * 8);
    let of = |name: &str| status.iter().find(|step| step.name == name).unwrap();
    assert_eq!((of("a").took_ms, of("up").ended_ms_ago), (Some(2000), Some(1000)));
}

#[test]
fn the_end_of_what_leaned_on_something_lost_counts_for_nothing() {
    let mut run = diamond(|_| ());
    run.handle(Event::Up, S);
    run.handle(Event::Done("a"), S);
    assert_eq!(run.handle(Event::Done("b"), S), start(&["c"]));
    run.handle(Event::Lost("a", "gone"), S);
    assert_eq!(run.handle(Event::Done("c"), S), []);
    assert!(!run.is_done("c"));
    assert_eq!(run.handle(Event::Tick, S * 2), start(&["a"]));
    assert_eq!(run.handle(Event::Done("a"), S * 2), start(&["c"]));
}

#[test]
fn a_part_goes_down_and_comes_back() {
    let mut run = diamond(|_| ());
    up(&mut run);
    assert_eq!(run.handle(Event::DownFrom("a"), S), stop(&["c"]));
    assert_eq!(run.handle(Event::Done("c"), S), stop(&["a"]));
    assert!(!run.is_down_from("a"));
    run.handle(Event::Done("a"), S);
    assert!(run.is_down_from("a") && run.is_done("b"));
    assert_eq!(run.handle(Event::Up, S), start(&["a"]));
}

#[test]
fn what_cannot_be_undone_is_given_up_after_its_attempts() {
    let mut run = diamond(|steps| steps[2] = step("c").requires("a").requires("b").attempts(2));
    up(&mut run);
    run.handle(Event::Down, S);
    assert_eq!(run.handle(Event::Failed("c", "no"), S), []);
    assert_eq!(run.handle(Event::Tick, S * 2), stop(&["c"]));
    assert_eq!(run.handle(Event::Failed("c", "no"), S * 2), stop(&["b", "a"]), "the way down goes on");
}

/// What had succeeded counted as an attempt of the next time, and `why` told of a hook that ran once that it had failed
/// after three.
#[test]
fn attempts_are_those_of_this_time_and_what_is_undone_has_no_error() {
    let mut run = diamond(|steps| steps[2] = step("c").requires("a").requires("b").attempts(2));
    let of = |run: &Run, now: Duration| {
        let c = run.status(now).into_iter().find(|step| step.name == "c").unwrap();
        (c.attempts, c.took_ms, c.error)
    };
    run.handle(Event::Up, S);
    run.handle(Event::Done("a"), S);
    run.handle(Event::Done("b"), S);
    run.handle(Event::Failed("c", "no"), S);
    run.handle(Event::Tick, S * 2);
    run.handle(Event::Failed("c", "no"), S * 3);
    assert_eq!(of(&run, S * 9), (2, Some(2000), Some("no".into())));
    run.handle(Event::Again("c"), S * 9);
    run.handle(Event::Done("c"), S * 10);
    assert_eq!(of(&run, S * 10), (1, Some(1000), Some("no".into())));
    run.handle(Event::Anew("a"), S * 11);
    run.handle(Event::Done("a"), S * 12);
    assert_eq!(of(&run, S * 13).0, 1);
    run.handle(Event::Done("c"), S * 13);
    run.handle(Event::Down, S * 14);
    run.handle(Event::Done("c"), S * 14);
    assert_eq!(of(&run, S * 14).2, None);
}

#[test]
fn what_may_be_there_already_is_undone_although_it_never_began() {
    let mut run = diamond(|steps| steps[0] = step("a").requires("b"));
    run.handle(Event::Up, S);
    run.assume(&["c"]);
    // `a`, between them, was not begun.
    assert_eq!(run.handle(Event::Down, S), stop(&["c"]));
    assert_eq!(run.handle(Event::Done("c"), S), stop(&["b"]));
}

#[test]
fn what_was_lost_is_undone_on_the_way_down() {
    let mut run = diamond(|_| ());
    up(&mut run);
    run.handle(Event::Lost("a", "gone"), S);
    assert_eq!(run.handle(Event::Down, S), stop(&["c"]));
}

#[test]
fn another_graph_keeps_what_is_done_and_runs_what_is_new() {
    let mut run = diamond(|_| ());
    up(&mut run);
    let steps =
        vec![step("a"), step("b"), step("new").requires("a"), step("c").requires("new").requires("b")];
    run.replace(Arc::new(Graph::new(steps).unwrap()));
    assert_eq!(run.handle(Event::Tick, S), start(&["new"]));
    assert!(run.is_done("c"), "what runs is not stopped for it");
    run.handle(Event::Done("new"), S);
    assert_eq!(run.handle(Event::Down, S), stop(&["c"]));
}

/// A hook that was added to a pod that runs, and failed, was in the way after the next restart of the agent and not before.
#[test]
fn nobody_waits_for_what_is_new_before_what_is_done_already() {
    let new = |attempts| Step::new("new", Owner::Job, "").requires("a").before("c").attempts(attempts);
    let graph = |attempts| {
        let steps = vec![step("a"), step("b"), step("c").requires("a").requires("b"), new(attempts)];
        Arc::new(Graph::new(steps).unwrap())
    };
    let mut run = diamond(|_| ());
    up(&mut run);
    run.replace(graph(1));
    assert_eq!(run.handle(Event::Tick, S), start(&["new"]));
    run.handle(Event::Failed("new", "no"), S);
    assert!(run.is_done("c") && run.is_late("new"));
    assert_eq!(run.failed_for_good().count(), 0, "nobody waits for it");
    let told = run.status(S).into_iter().find(|step| step.name == "new").unwrap();
    assert!(told.optional && told.error.as_deref() == Some("no"));
    assert_eq!(run.handle(Event::Lost("c", "gone"), S), []);
    assert_eq!(run.handle(Event::Tick, S * 9), start(&["c"]), "what ran once runs again without it");
    run.handle(Event::Done("c"), S * 9);

    // The next walk from the bottom is like any other.
    run.handle(Event::Down, S * 9);
    ["c", "a", "b"].iter().for_each(|name| drop(run.handle(Event::Done(name), S * 9)));
    assert!(run.is_down());
    assert_eq!(run.handle(Event::Up, S * 9), start(&["a", "b"]));
    run.handle(Event::Done("b"), S * 9);
    assert_eq!(run.handle(Event::Done("a"), S * 9), start(&["new"]));
    run.handle(Event::Failed("new", "no"), S * 9);
    assert!(!run.is_under_way("c") && run.failed_for_good().count() == 1);
}

#[test]
fn what_is_new_before_what_has_not_begun_is_waited_for() {
    let mut run = diamond(|_| ());
    run.handle(Event::Up, S);
    let new = Step::new("new", Owner::Job, "").before("c");
    let steps = vec![step("a"), step("b"), step("c").requires("a").requires("b"), new];
    run.replace(Arc::new(Graph::new(steps).unwrap()));
    assert_eq!(run.handle(Event::Tick, S), start(&["new"]));
    run.handle(Event::Done("a"), S);
    assert_eq!(run.handle(Event::Done("b"), S), []);
    assert_eq!(run.handle(Event::Done("new"), S), start(&["c"]));
}

#[test]
fn what_was_there_before_the_walk_waits_for_no_program_of_others() {
    let steps =
        || vec![Step::new("first", Owner::Operator, "").before("a"), step("a"), step("b").requires("a")];
    let mut run = Run::new(Arc::new(Graph::new(steps()).unwrap()));
    assert_eq!(run.handle(Event::Up, S), start(&["first"]));
    run.pass("b");
    assert_eq!(run.handle(Event::Tick, S), start(&["a"]));
    assert_eq!(run.handle(Event::Done("a"), S), start(&["b"]), "but for Hextet's own steps");
}

#[test]
fn a_step_that_was_retried_began_with_its_first_attempt() {
    let mut run = diamond(|steps| steps[0] = step("a").attempts(3));
    run.handle(Event::Up, S);
    let told = |run: &Run, now| {
        let a = run.status(now).into_iter().find(|step| step.name == "a").unwrap();
        (a.at_ms, a.took_ms, a.attempts)
    };
    run.handle(Event::Failed("a", "no"), S);
    assert_eq!(told(&run, S * 2), (Some(0), Some(1000), 1), "the wait is a part of it");
    run.handle(Event::Tick, S * 2);
    assert_eq!(told(&run, S * 3), (Some(0), Some(2000), 2));
    run.handle(Event::Done("a"), S * 4);
    assert_eq!(told(&run, S * 9), (Some(0), Some(3000), 2));
}
