//! Tries each cell of the table in `docs/node-states.md`.

#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeMap;

use scheduler_core::{
    event::{Event, Refusal},
    node::Node,
    quantity::Resources,
};
use support::World;

const DOCUMENT: &str = include_str!("../../../docs/node-states.md");

/// What the columns of the table stand for, in their order.
const EVENTS: [fn(String) -> Event; 6] = [
    |name| Event::CutOff(vec![name]),
    |name| Event::LeaseEnded(vec![name]),
    |name| Event::NodeLeaving(name, 0),
    |name| Event::Fenced(vec![name]),
    Event::NodeDead,
    Event::DeleteNode,
];

#[test]
fn the_table_of_node_states_is_what_happens() {
    let rows: Vec<Vec<&str>> =
        DOCUMENT.lines().skip_while(|line| !line.starts_with("| joined")).map(cells).collect();
    let rows: Vec<_> = rows.into_iter().take_while(|row| !row.is_empty()).collect();
    let states: Vec<&str> = rows.iter().map(|row| row[0]).collect();
    assert_eq!(states, ["joined", "ready", "cut-off", "lost", "dead"]);
    for row in rows {
        assert_eq!(attached(row[0]), expected(row[0], row[1]), "{} attaches or reports", row[0]);
        for (event, cell) in EVENTS.iter().zip(&row[2..]) {
            let event = event("n1".to_owned());
            assert_eq!(after(row[0], event.clone()), expected(row[0], cell), "{} and {event:?}", row[0]);
        }
        assert_eq!(row.len(), EVENTS.len() + 2);
    }
}

/// What is said of a node that was taken down by its agent of session 7, by the words of the second table.
fn said(world: &mut World, word: &str) {
    world.session = if word.contains("later") { 8 } else { 7 };
    let (name, pods) = ("n1".to_owned(), Vec::new());
    let event = match word {
        "a report on a stream that is still open" => Event::PodReports(name, pods),
        "a renewal of its lease" => Event::NodeReturned(name),
        _ => {
            let said = world.attach("n1", Resources::default(), BTreeMap::new());
            let is_refused = matches!(said, Err(Refusal::TakenDown(_)));
            return assert_eq!(is_refused, world.session == 7, "{word}: {said:?}");
        }
    };
    world.event("node:n1", event).unwrap();
}

#[test]
fn a_node_that_was_taken_down_comes_back_by_a_later_agents_hello_alone() {
    let rows = DOCUMENT.lines().skip_while(|line| !line.starts_with("| a hello of that agent"));
    let rows: Vec<Vec<&str>> = rows.map(cells).take_while(|row| !row.is_empty()).collect();
    assert_eq!(rows.len(), 4);
    for row in rows {
        let mut world = in_state("ready");
        world.event("node:n1", Event::NodeLeaving("n1".to_owned(), 7)).unwrap();
        said(&mut world, row[0]);
        assert_eq!(word(&world), row[1], "{}", row[0]);
        if row[1] == "ready" {
            assert_eq!(world.state.nodes()["n1"].taken_down, None);
        }
    }
}

fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).filter(|cell| !cell.is_empty()).collect()
}

fn expected(state: &str, cell: &str) -> String {
    if cell == "-" { state.to_owned() } else { cell.to_owned() }
}

/// A world with the node `n1` in this state.
fn in_state(state: &str) -> World {
    let mut world = World::new(1);
    let claim = world.next_claim();
    let event = |world: &mut World, event| drop(world.event("test", event).unwrap());
    if state == "joined" {
        world.enroll_with("n1", claim).unwrap();
        return world;
    }
    world.join_with("n1", Resources::default(), BTreeMap::new(), claim).unwrap();
    match state {
        "cut-off" => event(&mut world, Event::CutOff(vec!["n1".into()])),
        "lost" => event(&mut world, Event::LeaseEnded(vec!["n1".into()])),
        "dead" => {
            event(&mut world, Event::LeaseEnded(vec!["n1".into()]));
            event(&mut world, Event::NodeDead("n1".into()));
        }
        _ => {}
    }
    assert_eq!(word(&world), state);
    world
}

fn after(state: &str, event: Event) -> String {
    let mut world = in_state(state);
    match world.event("test", event) {
        Ok(_) => word(&world),
        Err(Refusal::NodeReports(_) | Refusal::NodeCutOff(_)) => "refused".to_owned(),
        Err(other) => panic!("{other}"),
    }
}

fn attached(state: &str) -> String {
    let mut world = in_state(state);
    if state == "joined" {
        world.attach("n1", Resources::default(), BTreeMap::new()).unwrap();
    } else {
        world.event("node:n1", Event::NodeReturned("n1".into())).unwrap();
    }
    word(&world)
}

fn word(world: &World) -> String {
    let Some(node) = world.state.nodes().get("n1") else { return "gone".to_owned() };
    let Node { phase, fenced, .. } = &**node;
    if *fenced { format!("{phase}, fenced") } else { phase.to_string() }
}
