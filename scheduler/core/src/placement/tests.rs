//! Small cases of [`place`] and [`explain`], each for one rule.

use super::*;
use crate::{
    node::NodePhase,
    quantity::{Cpu, Memory},
    testing,
};

#[test]
fn spread_takes_the_node_with_the_fewest_pods_of_the_group() {
    let nodes = [node("n1", 4000, 8), node("n2", 4000, 8), node("n3", 4000, 8)];
    assert_eq!(placed(&Spread::Node, 5, 100, &nodes), ["n1", "n2", "n3", "n1", "n2"]);
}

#[test]
fn spread_prefers_the_less_used_node_among_equals() {
    let nodes = [node("n1", 1000, 8), node("n2", 4000, 8)];
    let mut all = candidates(&nodes);
    all[0].usage.cpu_millis = 500;
    all[1].usage.cpu_millis = 600;
    assert_eq!(place(&demand(&Spread::Node, 1, 100), all), ["n2"]);
}

#[test]
fn pack_fills_one_node_before_the_next() {
    let nodes = [node("n1", 300, 8), node("n2", 300, 8)];
    assert_eq!(placed(&Spread::Pack, 5, 100, &nodes), ["n2", "n2", "n2", "n1", "n1"]);
}

#[test]
fn spread_over_a_label_takes_the_value_with_the_fewest_pods_and_there_the_node() {
    let nodes = [rack("n1", "a"), rack("n2", "a"), rack("n3", "b"), node("n4", 4000, 8)];
    let spread = Spread::Label("rack".to_owned());
    assert_eq!(placed(&spread, 6, 100, &nodes), ["n1", "n3", "n4", "n2", "n3", "n4"]);
}

#[test]
fn pods_that_were_there_before_count_for_the_spread() {
    let nodes = [rack("n1", "a"), rack("n2", "a"), rack("n3", "b")];
    let mut all = candidates(&nodes);
    all[0].group_pods = 1;
    assert_eq!(place(&demand(&Spread::Label("rack".to_owned()), 2, 100), all), ["n3", "n2"]);
}

#[test]
fn pods_that_keep_apart_from_each_other_have_no_value_in_common() {
    let nodes = [rack("n1", "a"), rack("n2", "a"), rack("n3", "b")];
    let occupied = Occupied { whom: "a/web".into(), by: "rack".into(), values: BTreeSet::new(), own: true };
    let demand = Demand { occupied: vec![occupied], ..demand(&Spread::Node, 3, 100) };
    assert_eq!(place(&demand, candidates(&nodes)), ["n1", "n3"]);
    let values = BTreeSet::from([Some("a".to_owned()), Some("b".to_owned())]);
    let occupied = Occupied { whom: "a/web".into(), by: "rack".into(), values, own: true };
    let demand = Demand { occupied: vec![occupied], ..demand };
    let change = explain(&demand, &candidates(&nodes)).smallest_change();
    assert_eq!(
        change.as_deref(),
        Some("join a node with another rack"),
        "to move its own pods gains nothing"
    );
}

#[test]
fn pods_of_others_that_are_kept_apart_from_are_a_reason() {
    let nodes = [rack("n1", "a"), node("n2", 4000, 8)];
    let values = BTreeSet::from([Some("a".to_owned()), None]);
    let occupied = Occupied { whom: "b/db".into(), by: "rack".into(), values, own: false };
    let demand = Demand { occupied: vec![occupied], ..demand(&Spread::Node, 1, 100) };
    assert_eq!(
        explain(&demand, &candidates(&nodes)).short(),
        "no node fits, the smallest change is to move b/db away on n1; \
         n1: b/db is at rack=a already; n2: has no rack, and b/db is on such a node already"
    );
}

#[test]
fn a_late_failure_counts_as_one_more_pod() {
    let nodes = [node("n1", 4000, 8), node("n2", 4000, 8)];
    let mut all = candidates(&nodes);
    all[0].failures = 2;
    assert_eq!(place(&demand(&Spread::Node, 4, 100), all.clone()), ["n2", "n2", "n1", "n2"]);
    assert_eq!(place(&demand(&Spread::Pack, 1, 100), all), ["n2"]);
}

#[test]
fn countables_are_taken_one_by_one() {
    let mut nodes = [node("n1", 4000, 8), node("n2", 4000, 8)];
    nodes[1].countables = gpus(3);
    let demand = Demand { countables: gpus(2), ..demand(&Spread::Node, 2, 100) };
    assert_eq!(place(&demand, candidates(&nodes)), ["n2"]);
    let mut all = candidates(&nodes);
    all[1].usage.countables = gpus(2);
    assert_eq!(
        explain(&demand, &all).short(),
        "no node fits, the smallest change is to free 1 gpu on n2; n1: needs 2 gpu, 0 free; n2: needs 2 gpu, 1 free"
    );
}

#[test]
fn the_answer_says_why_not_for_every_node() {
    let mut nodes = [node("n1", 500, 8), node("n2", 9000, 8), node("n3", 9000, 0), node("n4", 9000, 8)];
    nodes[1].phase = NodePhase::Lost;
    nodes[3].labels.insert("rack".into(), "b".into());
    let constraints = BTreeMap::from([("rack".to_owned(), Constraint::from("a"))]);
    nodes[0].labels.insert("rack".into(), "a".into());
    nodes[2].labels.insert("rack".into(), "a".into());
    let demand = Demand { constraints: &constraints, ..demand(&Spread::Node, 1, 4000) };
    let why = explain(&demand, &candidates(&nodes));
    assert_eq!(
        why.short(),
        "no node fits, the smallest change is to label rack=a on n4; n1: needs 4000m CPU, 500m free; \
         n2: its lease has ended; n3: needs 64Mi memory, 0 free; n4: needs rack=a, has rack=b"
    );
    let changes: Vec<String> = why.nodes.iter().map(Verdict::change).collect();
    assert_eq!(
        changes,
        [
            "have 3500m more CPU or ask for less",
            "bring the agent back and label rack=a",
            "have 64Mi more memory or ask for less",
            "label rack=a"
        ]
    );
}

#[test]
fn a_node_that_is_asked_for_and_not_there_is_the_first_reason() {
    let nodes = [node("n1", 4000, 8), node("n2", 4000, 8)];
    let short = |wanted: Constraint| {
        let constraints = BTreeMap::from([("node".to_owned(), wanted)]);
        let demand = Demand { constraints: &constraints, ..demand(&Spread::Node, 1, 9000) };
        explain(&demand, &candidates(&nodes)).short()
    };
    assert_eq!(
        short(Constraint::from("n9")),
        "no node fits: there is no node n9, the smallest change is to allow it without node=n9 and have 5000m more CPU or \
         ask for less on n1; n1: needs node=n9, has node=n1; n2: needs node=n9, has node=n2"
    );
    let one_of = |names: &[&str]| Constraint::OneOf(names.iter().map(ToString::to_string).collect());
    assert!(short(one_of(&["n8", "n1", "n9"])).starts_with("no node fits: there is no node n8 or n9, the"));
    assert!(short(one_of(&["n2", "n1"])).starts_with("no node fits, the"));
    let many: Vec<String> = (10..30).map(|number| format!("n{number}")).collect();
    let many = short(Constraint::OneOf(many));
    assert!(many.contains(" or n17 or others that are asked for, the"), "{many}");
}

#[test]
fn the_smallest_change_is_one_that_helps() {
    let nodes = [node("n1", 4000, 8), node("n2", 4000, 8), node("n3", 4000, 8)];
    let mut all = candidates(&nodes);
    (all[0].usage.cpu_millis, all[0].usage.memory_bytes) = (3_950, 8 << 26);
    all[1].usage.cpu_millis = 3_990;
    all[2].usage.cpu_millis = 3_970;
    let why = explain(&demand(&Spread::Node, 1, 100), &all);
    assert_eq!(why.smallest_change().as_deref(), Some("free 70m CPU on n3"));
    all[2].usage.cpu_millis -= 70;
    assert_eq!(place(&demand(&Spread::Node, 1, 100), all), ["n3"]);
}

#[test]
fn a_node_holds_no_more_pods_than_it_has_addresses_for() {
    let nodes = [node("n1", 9000, 800)];
    let demand = Demand { pods_per_node_max: 2, ..demand(&Spread::Node, 3, 1) };
    assert_eq!(place(&demand, candidates(&nodes)), ["n1", "n1"]);
    let mut full = candidates(&nodes);
    full[0].usage.pods = 2;
    assert_eq!(explain(&demand, &full).nodes[0].reason, Reason::Full(2));
}

#[test]
fn long_answers_are_cut_and_no_nodes_is_said_in_words() {
    let nodes: Vec<Node> = (0..20).map(|number| node(&format!("n{number}"), 0, 8)).collect();
    let answer = explain(&demand(&Spread::Node, 1, 1), &candidates(&nodes));
    assert_eq!(answer.nodes.len(), 20);
    assert!(answer.short().ends_with("; and 12 more nodes"));
    assert!(explain(&demand(&Spread::Node, 1, 1), &[]).short().starts_with("no node has joined yet"));
}

fn place(demand: &Demand<'_>, candidates: Vec<Candidate<'_>>) -> Vec<String> {
    super::place(demand, Pools::of(demand, candidates))
}

fn placed(spread: &Spread, count: usize, cpu: u32, nodes: &[Node]) -> Vec<String> {
    place(&demand(spread, count, cpu), candidates(nodes))
}

fn demand(spread: &Spread, count: usize, cpu: u32) -> Demand<'_> {
    static NONE: BTreeMap<String, Constraint> = BTreeMap::new();
    Demand {
        resources: Resources { cpu: Cpu(cpu), memory: Memory(64 << 20) },
        countables: Countables::default(),
        constraints: &NONE,
        spread,
        occupied: Vec::new(),
        count,
        pods_per_node_max: 4000,
    }
}

fn candidates(nodes: &[Node]) -> Vec<Candidate<'_>> {
    let candidate = |node| Candidate { node, usage: Usage::default(), group_pods: 0, failures: 0 };
    nodes.iter().map(candidate).collect()
}

fn gpus(number: u32) -> Countables {
    Countables(BTreeMap::from([("gpu".to_owned(), number)]))
}

fn rack(name: &str, rack: &str) -> Node {
    Node { labels: BTreeMap::from([("rack".to_owned(), rack.to_owned())]), ..node(name, 4000, 8) }
}

fn node(name: &str, cpu: u32, memory_units: u64) -> Node {
    let capacity = Resources { cpu: Cpu(cpu), memory: Memory(memory_units << 26) };
    Node { capacity, ..testing::node(name) }
}
