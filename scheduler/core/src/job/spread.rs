//! How a group's pods are laid over the nodes, and what they keep away from.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::node::NODE_LABEL;

/// How a group's pods are laid over the nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Spread {
    /// As few pods of the group on each node as can be.
    #[default]
    Node,
    /// As few nodes as can be.
    Pack,
    /// As few pods of the group at each value of this label as can be, and there as few on each node. Nodes
    /// without the label are together one value.
    Label(String),
}

/// Pods that the group's own are never put beside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apart {
    /// Of which pods: `job/group`, or `job` for all of its groups; without it, of each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The label of which they have no value in common; `node` is each node for itself. Nodes without the label
    /// are together one value, for nobody has said that they are apart.
    #[serde(default = "node")]
    pub by: String,
}

fn node() -> String {
    NODE_LABEL.to_owned()
}

impl Apart {
    /// Whether the pods of `other` are meant when this is a rule of the group `own`; both as job and group.
    #[must_use]
    pub fn means(&self, own: (&str, &str), other: (&str, &str)) -> bool {
        match self.from.as_deref().map(|from| from.split_once('/').unwrap_or((from, ""))) {
            None => own == other,
            Some((job, group)) => job == other.0 && (group.is_empty() || group == other.1),
        }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Spread::Node => "node",
            Spread::Pack => "pack",
            Spread::Label(label) => label,
        })
    }
}

impl From<&str> for Spread {
    fn from(text: &str) -> Spread {
        match text {
            "node" => Spread::Node,
            "pack" => Spread::Pack,
            label => Spread::Label(label.to_owned()),
        }
    }
}

impl Serialize for Spread {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Spread {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Spread, D::Error> {
        String::deserialize(deserializer).map(|text| Spread::from(text.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_reads_back_as_it_prints() {
        for spread in [Spread::Node, Spread::Pack, Spread::Label("rack".to_owned())] {
            assert_eq!(Spread::from(spread.to_string().as_str()), spread);
        }
    }

    #[test]
    fn a_rule_means_its_own_group_one_group_or_a_whole_job() {
        let means = |from: Option<&str>, other| {
            let apart = Apart { from: from.map(str::to_owned), by: node() };
            apart.means(("a", "web"), other)
        };
        assert!(means(None, ("a", "web")) && !means(None, ("a", "db")) && !means(None, ("b", "web")));
        assert!(means(Some("b/db"), ("b", "db")) && !means(Some("b/db"), ("b", "web")));
        assert!(means(Some("b"), ("b", "db")) && !means(Some("b"), ("a", "db")));
    }
}
