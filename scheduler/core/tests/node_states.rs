//! Tries each cell of the table in `docs/node-states.md`.

#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeMap;

use scheduler_core::{
    event::{Enrolled, Event, Refusal, Renew},
    node::Node,
    quantity::Resources,
    renewal::DELETED_MAX,
    time::WallTime,
    token::Role,
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
    assert_eq!(states, ["joined", "ready", "cut-off", "lost", "dead", "gone"]);
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

/// Only who was deleted here is told so, and gives up its pods: after a restore of an old backup there are nodes that
/// nobody deleted and nobody knows.
#[test]
fn the_key_of_a_deleted_node_is_remembered_and_one_that_never_was_here_is_none() {
    let mut world = in_state("dead");
    let before = world.state.clone();
    world.event("user:root", Event::DeleteNode("n1".into())).unwrap();
    assert!(world.state.is_deleted("key-1"));
    assert!(!world.state.is_deleted("key-2") && !world.state.is_deleted(""));
    assert!(!before.is_deleted("key-1"), "a backup of before knows the node, and nothing of its end");

    let claim = world.next_claim();
    world.enroll_with("n1", claim).unwrap();
    assert!(world.state.is_deleted("key-1"), "another machine has the name");
    assert!(!world.state.is_deleted("key-2"));
}

#[test]
fn the_key_that_a_deleted_node_would_have_had_next_is_its_key_too() {
    let mut world = in_state("ready");
    let holder = Enrolled { role: Role::Node, name: "n1".to_owned() };
    let renew = |old: &str, new: &str| {
        Event::Renew(Renew {
            holder: holder.clone(),
            old: old.into(),
            new: new.into(),
            ends: WallTime(9),
            takes_ca: true,
        })
    };
    world.event("node:n1", renew("key-1", "key-next")).unwrap();
    world.event("scheduler", Event::LeaseEnded(vec!["n1".into()])).unwrap();
    world.event("user:root", Event::DeleteNode("n1".into())).unwrap();
    assert!(world.state.is_deleted("key-1") && world.state.is_deleted("key-next"));
    let refused = world.event("node:n1", renew("key-next", "key-third")).unwrap_err();
    assert_eq!(refused, Refusal::KeyReplaced);
    assert!(world.state.is_deleted("key-next"), "asking does not bring it back");
}

#[test]
fn keys_of_deleted_nodes_are_remembered_up_to_a_bound_the_oldest_go() {
    let mut world = World::new(1);
    for number in 0..=DELETED_MAX {
        let name = format!("n{number}");
        let claim = world.next_claim();
        world.enroll_with(&name, claim).unwrap();
        world.wall = WallTime(world.wall.0 + 1);
        world.event("user:root", Event::DeleteNode(name)).unwrap();
    }
    assert_eq!(world.state.renewals().len(), DELETED_MAX);
    assert!(!world.state.is_deleted("key-1") && world.state.is_deleted("key-2"));
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
        "dead" | "gone" => {
            event(&mut world, Event::LeaseEnded(vec!["n1".into()]));
            event(&mut world, Event::NodeDead("n1".into()));
            if state == "gone" {
                event(&mut world, Event::DeleteNode("n1".into()));
            }
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
        Err(Refusal::NodeReports(_) | Refusal::NodeCutOff(_) | Refusal::NoNode(_)) => "refused".to_owned(),
        Err(other) => panic!("{other}"),
    }
}

fn attached(state: &str) -> String {
    let mut world = in_state(state);
    if state == "joined" {
        world.attach("n1", Resources::default(), BTreeMap::new()).unwrap();
    } else if state == "gone" {
        let returned = world.event("node:n1", Event::NodeReturned("n1".into()));
        assert_eq!(returned, Err(Refusal::NoNode("n1".into())));
        assert!(world.state.is_deleted("key-1"), "what the machine is told, so that it gives up its pods");
        return "refused".to_owned();
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
