//! What unit tests are about, without what they do not ask for.

use std::collections::BTreeMap;

use hextet_address::{GroupId, NodePrefix};

use crate::{
    countable::Countables,
    job::{Group, Spread},
    node::{Node, NodePhase},
    quantity::Resources,
    time::WallTime,
};

/// A node that reports, without labels and without room.
pub(crate) fn node(name: &str) -> Node {
    Node {
        name: name.to_owned(),
        key: String::new(),
        prefix: NodePrefix::new("fd00:1:2:3::/64".parse().unwrap()).unwrap(),
        group_id: GroupId::new(1).unwrap(),
        underlay: None,
        underlay_v4: None,
        labels: BTreeMap::new(),
        capacity: Resources::default(),
        countables: Countables::default(),
        agent_version: String::new(),
        machine: String::new(),
        phase: NodePhase::Ready,
        joined: WallTime(0),
        left: Vec::new(),
        fenced: false,
        term: 0,
    }
}

/// A group of one pod, without tasks.
pub(crate) fn group() -> Group {
    Group {
        count: 1,
        availability: None,
        spread: Spread::Node,
        constraints: BTreeMap::new(),
        apart: Vec::new(),
        rollout: None,
        resources: Countables::default(),
        tasks: BTreeMap::new(),
        hooks: BTreeMap::new(),
    }
}
