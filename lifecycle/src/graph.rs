//! The checked form of a set of steps: every name is known, none is there twice, and nothing waits for itself.

use std::collections::BTreeMap;

use crate::step::{Owner, Step};

/// The most steps of a graph.
pub const STEPS_MAX: usize = 128;
/// The most bytes of a step's name.
pub const NAME_BYTES_MAX: usize = 32;
/// The target at which every graph begins, and ends on the way down.
pub const STOPPED: &str = "stopped";

/// Steps in an order in which they can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Graph {
    nodes: Vec<Node>,
}

/// A step and its edges, as places in the graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) step: Step,
    pub(crate) needs: Vec<usize>,
    /// Order alone; none of them is in `needs`.
    pub(crate) after: Vec<usize>,
    /// Those that have this one in `needs` or `after`.
    pub(crate) then: Vec<usize>,
}

/// Why steps are no graph.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    /// Something else has the name.
    #[error(
        "the step `{name}` is registered by {first} already and cannot be registered by {second}: choose another name"
    )]
    Twice {
        /// The name.
        name: String,
        /// Whose it is.
        first: Owner,
        /// Who wants it, too.
        second: Owner,
    },
    /// It names a step that is not there.
    #[error("the step `{step}` is {edge} `{name}`, which is no step; there are {known}")]
    Unknown {
        /// Who names it.
        step: String,
        /// How.
        edge: &'static str,
        /// What is not there.
        name: String,
        /// What is.
        known: String,
    },
    /// Steps that wait for each other.
    #[error("steps wait for each other in a circle: {0}")]
    Cycle(String),
    /// The name cannot be one.
    #[error("`{0}` is not the name of a step: a name has 1 to {NAME_BYTES_MAX} characters of a-z, 0-9 and -")]
    Name(String),
    /// There are too many.
    #[error("{given} steps are more than {STEPS_MAX}")]
    TooMany {
        /// How many there are.
        given: usize,
    },
    /// It belongs to something that others can belong to only if it is a target.
    #[error("the step `{step}` is part of `{name}`, which is no target")]
    NoTarget {
        /// Who names it.
        step: String,
        /// What is no target.
        name: String,
    },
}

impl Graph {
    /// Checks the steps and puts them in order.
    ///
    /// # Errors
    /// See [`GraphError`].
    pub fn new(steps: Vec<Step>) -> Result<Graph, GraphError> {
        check_names(&steps)?;
        let edges = edges(&steps)?;
        let order = order(&steps, &edges)?;
        let mut place = vec![0; steps.len()];
        order.iter().enumerate().for_each(|(to, from)| place[*from] = to);
        let mut steps: Vec<Option<Step>> = steps.into_iter().map(Some).collect();
        let mut nodes: Vec<Node> = order
            .iter()
            .map(|from| Node {
                step: steps[*from].take().expect("each step has one place"),
                needs: edges[*from].iter().filter(|(_, need)| **need).map(|(to, _)| place[*to]).collect(),
                after: edges[*from].iter().filter(|(_, need)| !**need).map(|(to, _)| place[*to]).collect(),
                then: Vec::new(),
            })
            .collect();
        for index in 0..nodes.len() {
            for earlier in [nodes[index].needs.clone(), nodes[index].after.clone()].concat() {
                nodes[earlier].then.push(index);
            }
        }
        Ok(Graph { nodes })
    }

    /// The steps, each after all that it waits for.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.nodes.iter().map(|node| &node.step)
    }

    /// The step of this name.
    #[must_use]
    pub fn step(&self, name: &str) -> Option<&Step> {
        self.steps().find(|step| step.name == name)
    }

    /// Everything that the step waits for directly, with whether it needs it.
    #[must_use]
    pub fn waits_for(&self, name: &str) -> Vec<(&str, bool)> {
        let Some(node) = self.nodes.iter().find(|node| node.step.name == name) else { return Vec::new() };
        let needs = node.needs.iter().map(|index| (*index, true));
        let after = node.after.iter().map(|index| (*index, false));
        needs.chain(after).map(|(index, need)| (self.nodes[index].step.name.as_str(), need)).collect()
    }

    /// Whether the step needs `other`, itself or by way of others: when `other` is done anew, so is the step.
    #[must_use]
    pub fn leans_on(&self, name: &str, other: &str) -> bool {
        let places = self.place(name).zip(self.place(other));
        places.is_some_and(|(index, other)| index != other && self.place_leans_on(index, other))
    }

    pub(crate) fn place_leans_on(&self, index: usize, other: usize) -> bool {
        index == other || self.nodes[index].needs.iter().any(|need| self.place_leans_on(*need, other))
    }

    pub(crate) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub(crate) fn place(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.step.name == name)
    }
}

/// Whether `name` can be that of a step.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(good) && !name.starts_with('-')
}

fn check_names(steps: &[Step]) -> Result<(), GraphError> {
    if steps.len() > STEPS_MAX {
        return Err(GraphError::TooMany { given: steps.len() });
    }
    let mut owners: BTreeMap<&str, Owner> = BTreeMap::new();
    for step in steps {
        if !is_name(&step.name) {
            return Err(GraphError::Name(step.name.clone()));
        }
        if let Some(first) = owners.insert(&step.name, step.owner) {
            return Err(GraphError::Twice { name: step.name.clone(), first, second: step.owner });
        }
    }
    Ok(())
}

/// For each step what it waits for, and whether it needs that.
type Edges = Vec<BTreeMap<usize, bool>>;

fn edges(steps: &[Step]) -> Result<Edges, GraphError> {
    let find = |step: &Step, edge, name: &str| {
        steps.iter().position(|other| other.name == name).ok_or_else(|| GraphError::Unknown {
            step: step.name.clone(),
            edge,
            name: name.to_owned(),
            known: steps.iter().map(|step| step.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    };
    let mut edges: Edges = vec![BTreeMap::new(); steps.len()];
    let mut add = |from: usize, to: usize, need: bool| *edges[from].entry(to).or_default() |= need;
    for (index, step) in steps.iter().enumerate() {
        for name in &step.after {
            add(index, find(step, "after", name)?, false);
        }
        for name in &step.requires {
            add(index, find(step, "one that requires", name)?, true);
        }
        for name in &step.before {
            let later = find(step, "before", name)?;
            add(later, index, !step.optional);
            members(steps, name)
                .filter(|member| *member != index)
                .for_each(|member| add(member, index, !step.optional));
        }
        if let Some(name) = &step.part_of {
            let target = find(step, "part of", name)?;
            if !steps[target].is_target {
                return Err(GraphError::NoTarget { step: step.name.clone(), name: name.clone() });
            }
            add(target, index, !step.optional);
        }
    }
    if let Some(root) = steps.iter().position(|step| step.name == STOPPED) {
        (0..steps.len()).filter(|index| *index != root).for_each(|index| add(index, root, false));
    }
    Ok(edges)
}

fn members<'a>(steps: &'a [Step], target: &'a str) -> impl Iterator<Item = usize> + 'a {
    let belongs = move |(_, step): &(usize, &Step)| step.part_of.as_deref() == Some(target);
    steps.iter().enumerate().filter(belongs).map(|(index, _)| index)
}

/// The steps, each after all that it waits for; those that nothing orders, in the order of their registration.
fn order(steps: &[Step], edges: &Edges) -> Result<Vec<usize>, GraphError> {
    let mut order = Vec::with_capacity(steps.len());
    let mut placed = vec![false; steps.len()];
    while order.len() < steps.len() {
        let free = |index: &usize| !placed[*index] && edges[*index].keys().all(|earlier| placed[*earlier]);
        match (0..steps.len()).find(free) {
            Some(index) => {
                placed[index] = true;
                order.push(index);
            }
            None => return Err(GraphError::Cycle(circle(steps, edges, &placed))),
        }
    }
    Ok(order)
}

/// Every step that is left waits for one that is left: whoever follows them comes back to where he was.
fn circle(steps: &[Step], edges: &Edges, placed: &[bool]) -> String {
    let mut path: Vec<usize> = Vec::new();
    let mut at = (0..steps.len()).find(|index| !placed[*index]).expect("some are left");
    while !path.contains(&at) {
        path.push(at);
        let next = edges[at].keys().find(|earlier| !placed[**earlier]);
        at = *next.expect("it waits for one that is left");
    }
    let begin = path.iter().position(|index| *index == at).expect("it is in the path");
    let names = path[begin..].iter().chain([&at]).map(|index| steps[*index].name.as_str());
    names.collect::<Vec<_>>().join(" -> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &str) -> Step {
        Step::new(name, Owner::Node, "")
    }

    fn error(steps: Vec<Step>) -> String {
        Graph::new(steps).unwrap_err().to_string()
    }

    #[test]
    fn a_circle_is_refused_and_printed() {
        let steps =
            vec![step("x"), step("a").requires("b"), step("b").after("c"), step("c").after("a").after("x")];
        assert_eq!(error(steps), "steps wait for each other in a circle: a -> b -> c -> a");
        assert_eq!(error(vec![step("a").after("a")]), "steps wait for each other in a circle: a -> a");
        // Who waits is seen also when it was said the other way about.
        let steps = vec![step("a").before("b"), step("b").before("a")];
        assert_eq!(error(steps), "steps wait for each other in a circle: a -> b -> a");
    }

    #[test]
    fn a_name_is_one_steps_and_the_second_is_told_whose() {
        let second = Step::new("link", Owner::Job, "");
        assert_eq!(
            error(vec![step("link"), second]),
            "the step `link` is registered by node already and cannot be registered by job: choose another name"
        );
    }

    #[test]
    fn what_is_not_there_is_named_with_what_is() {
        for (wrong, edge) in [
            (step("a").after("z"), "after"),
            (step("a").requires("z"), "one that requires"),
            (step("a").before("z"), "before"),
            (step("a").part_of("z"), "part of"),
        ] {
            let expected = format!("the step `a` is {edge} `z`, which is no step; there are a, b");
            assert_eq!(error(vec![wrong, step("b")]), expected);
        }
        assert_eq!(
            error(vec![step("a").part_of("b"), step("b")]),
            "the step `a` is part of `b`, which is no target"
        );
    }

    #[test]
    fn names_and_numbers_have_bounds() {
        for name in ["", "A", "a b", "-a", "a/b", &"a".repeat(33)] {
            assert!(matches!(Graph::new(vec![step(name)]), Err(GraphError::Name(_))), "{name}");
        }
        let many = (0..=STEPS_MAX).map(|n| step(&format!("s{n}"))).collect();
        assert_eq!(error(many), "129 steps are more than 128");
    }

    #[test]
    fn before_a_target_is_before_all_that_belongs_to_it() {
        let steps = vec![
            Step::target("up", Owner::Node, ""),
            step("a").part_of("up"),
            step("b").part_of("up").requires("a"),
            step("first").before("up"),
            step("maybe").before("up").optional(),
        ];
        let graph = Graph::new(steps).unwrap();
        assert_eq!(graph.waits_for("a"), [("first", true), ("maybe", false)]);
        assert_eq!(graph.waits_for("up"), [("a", true), ("b", true), ("first", true), ("maybe", false)]);
        let order: Vec<&str> = graph.steps().map(|step| step.name.as_str()).collect();
        assert_eq!(order, ["first", "maybe", "a", "b", "up"]);
    }

    #[test]
    fn everything_begins_at_stopped() {
        let graph = Graph::new(vec![step("a"), Step::target(STOPPED, Owner::Node, "")]).unwrap();
        assert_eq!(graph.waits_for("a"), [(STOPPED, false)]);
        let steps = vec![step("a").before(STOPPED), Step::target(STOPPED, Owner::Node, "")];
        assert_eq!(error(steps), "steps wait for each other in a circle: a -> stopped -> a");
    }
}
