//! What unit tests are about, without what they do not ask for.

use std::collections::BTreeMap;

use hextet_address::{GroupId, NodePrefix};

use crate::{
    countable::Countables,
    job::{Group, Spread},
    node::{Node, NodePhase},
    time::WallTime,
};

/// A node that reports, without labels and without room.
pub(crate) fn node(name: &str) -> Node {
    let prefix = NodePrefix::new("fd00:1:2:3::/64".parse().unwrap()).unwrap();
    let joined = Node::joined(name, "", prefix, GroupId::new(1).unwrap(), WallTime(0));
    Node { phase: NodePhase::Ready, ..joined }
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
