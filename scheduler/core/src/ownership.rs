//! Who may write what: each field of each object has one owner.
//!
//! Each part of Hextet registers the fields that it writes. A second part that claims a field is refused when it
//! registers, with both names, and not when the two fight. What somebody writes of another's is refused with the
//! owner's name.

use std::{collections::BTreeMap, fmt, fmt::Write as _};

use crate::{pod::PodId, state::State};

/// A part that writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// Who applies and deletes jobs and makes tokens.
    User,
    /// The scheduler: placement, versions, phases that follow from leases and drains.
    Scheduler,
    /// The node itself, or the one that the pod is on.
    Node,
    /// Who enrolls a node, once.
    Enrollment,
    /// The cluster's founding, once.
    Founding,
}

/// What each owner writes: the kind of object, and its fields.
type Claims = &'static [(&'static str, &'static [&'static str])];

/// Claims of every part.
const CLAIMS: &[(Owner, Claims)] = &[
    (
        Owner::User,
        &[
            ("job", &["versions", "removed"]),
            ("version", &["text", "message"]),
            ("deploy", &["text", "schedule", "aborted", "changer"]),
            ("token", &["role", "name", "expires"]),
            ("authorities", &["first", "issuing", "leaving"]),
        ],
    ),
    (
        Owner::Scheduler,
        &[
            ("job", &["version", "applied", "changer", "equals"]),
            (
                "pod",
                &[
                    "id",
                    "job",
                    "group",
                    "job_version",
                    "serial",
                    "resources",
                    "countables",
                    "node",
                    "address",
                    "created",
                    "standby",
                    "stop",
                ],
            ),
            ("node", &["phase", "left", "fenced", "term", "taken_down"]),
            (
                "deploy",
                &[
                    "id", "previous", "groups", "step", "stage", "proven", "moves", "failures", "faults",
                    "reason", "output", "begun", "ended",
                ],
            ),
            ("version", &["made", "kept", "applied", "changer", "equals"]),
            ("ending", &["time", "job_version"]),
            ("counters", &["pods_made", "restored_from"]),
            ("restored", &["revision", "time", "lease_ms"]),
        ],
    ),
    (
        Owner::Node,
        &[
            // While it is there: of a pod that is pending, lost or terminating the scheduler says how it is.
            ("pod", &["phase", "message", "restarts"]),
            ("ending", &["what", "output", "for_good"]),
            (
                "node",
                &[
                    "underlay",
                    "underlay_v4",
                    "labels",
                    "capacity",
                    "countables",
                    "agent_version",
                    "machine",
                    "hardware",
                ],
            ),
        ],
    ),
    (
        Owner::Enrollment,
        &[("node", &["name", "key", "ca", "prefix", "group_id", "joined"]), ("token", &["used_by"])],
    ),
    (Owner::Founding, &[("cluster", &["prefix", "pod_prefix", "pod_ipv4", "id_key", "created"])]),
];

/// Which part owns which field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registry(BTreeMap<(String, String), String>);

/// A field that has an owner was claimed by another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{claimant} cannot register {kind}.{field}: {owner} owns it")]
pub struct Claimed {
    /// The kind of the object.
    pub kind: String,
    /// Its field.
    pub field: String,
    /// Whose it is.
    pub owner: String,
    /// Who claims it, too.
    pub claimant: String,
}

/// Somebody writes what is another's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{writer} cannot write {what} of pod {pod}: node {owner} owns it")]
pub struct NotOwner {
    /// Who writes.
    pub writer: String,
    /// What.
    pub what: &'static str,
    /// Of which pod.
    pub pod: PodId,
    /// The node whose it is.
    pub owner: String,
}

impl Registry {
    /// The parts of Hextet.
    ///
    /// # Errors
    /// Two of them claim one field.
    pub fn hextet() -> Result<Registry, Claimed> {
        let mut registry = Registry::default();
        for (owner, claims) in CLAIMS {
            for (kind, fields) in *claims {
                fields.iter().try_for_each(|field| registry.claim(&owner.to_string(), kind, field))?;
            }
        }
        Ok(registry)
    }

    /// Registers that `claimant` writes a field. It may say so again.
    ///
    /// # Errors
    /// The field is another's.
    pub fn claim(&mut self, claimant: &str, kind: &str, field: &str) -> Result<(), Claimed> {
        let owner = self.0.entry((kind.to_owned(), field.to_owned())).or_insert_with(|| claimant.to_owned());
        if owner == claimant {
            return Ok(());
        }
        let (kind, field) = (kind.to_owned(), field.to_owned());
        Err(Claimed { kind, field, owner: owner.clone(), claimant: claimant.to_owned() })
    }

    /// Whose a field is.
    #[must_use]
    pub fn owner(&self, kind: &str, field: &str) -> Option<&str> {
        self.0.get(&(kind.to_owned(), field.to_owned())).map(String::as_str)
    }

    /// The table of the docs, in Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let mut lines: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
        for ((kind, field), owner) in &self.0 {
            lines.entry((kind, owner)).or_default().push(field);
        }
        let mut table = "| object | owner | fields |\n| --- | --- | --- |\n".to_owned();
        for ((kind, owner), fields) in lines {
            let fields: Vec<String> = fields.iter().map(|field| format!("`{field}`")).collect();
            let _ = writeln!(table, "| {kind} | {owner} | {} |", fields.join(", "));
        }
        table
    }
}

/// Whether `node` may say `what` of a pod: nobody else's pod is its to speak of. Of one that is gone it may.
///
/// # Errors
/// [`NotOwner`], with the name of the node that the pod is on.
pub fn check_node(state: &State, node: &str, pod: &PodId, what: &'static str) -> Result<(), NotOwner> {
    match state.pods().get(pod).and_then(|pod| pod.node.as_deref()) {
        Some(owner) if owner != node => {
            let (writer, owner) = (format!("node {node}"), owner.to_owned());
            Err(NotOwner { writer, what, pod: pod.clone(), owner })
        }
        _ => Ok(()),
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Owner::User => "user",
            Owner::Scheduler => "scheduler",
            Owner::Node => "node",
            Owner::Enrollment => "enrollment",
            Owner::Founding => "founding",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_field_that_is_owned_is_refused_with_both_names() {
        let mut registry = Registry::hextet().unwrap();
        registry.claim("node", "node", "labels").unwrap();
        let refused = registry.claim("rollout", "pod", "job_version").unwrap_err().to_string();
        assert_eq!(refused, "rollout cannot register pod.job_version: scheduler owns it");
        registry.claim("rollout", "pod", "wave").unwrap();
        assert_eq!(registry.owner("pod", "wave"), Some("rollout"));
    }

    /// The fields in the source of a type: what is stored has no other.
    fn fields(source: &str, name: &str) -> BTreeSet<String> {
        let begin = source.find(&format!("pub struct {name} {{")).unwrap();
        let body = &source[begin..];
        let lines = body[..body.find("\n}").unwrap()].lines().skip(1);
        let named =
            lines.filter_map(|line| Some(line.trim().strip_prefix("pub ")?.split_once(':')?.0.to_owned()));
        named.collect()
    }

    #[test]
    fn every_field_of_every_object_has_an_owner_and_no_other_has() {
        let sources = [
            ("pod", "Pod", include_str!("pod.rs")),
            ("node", "Node", include_str!("node.rs")),
            ("job", "JobRecord", include_str!("change.rs")),
            ("version", "JobVersion", include_str!("version.rs")),
            ("deploy", "Deploy", include_str!("deploy.rs")),
            ("token", "Token", include_str!("token.rs")),
            ("cluster", "Cluster", include_str!("cluster.rs")),
            ("ending", "LastEnding", include_str!("ending.rs")),
            ("counters", "Counters", include_str!("cluster.rs")),
            ("restored", "Restored", include_str!("restore.rs")),
            ("authorities", "Authorities", include_str!("authority.rs")),
        ];
        let there: BTreeSet<(String, String)> = sources
            .iter()
            .flat_map(|(kind, name, source)| {
                fields(source, name).into_iter().map(|field| ((*kind).to_owned(), field))
            })
            .collect();
        let owned: BTreeSet<(String, String)> = Registry::hextet().unwrap().0.into_keys().collect();
        assert_eq!(owned, there);
    }

    /// `UPDATE_DOCS=1 cargo test -p scheduler-core ownership` rewrites the table in the docs.
    #[test]
    fn the_table_in_the_docs_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/lifecycle.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (begin, end) = ("<!-- owners -->\n", "<!-- /owners -->");
        let (head, rest) = text.split_once(begin).expect("the page marks where the table begins");
        let (there, tail) = rest.split_once(end).expect("the page marks where the table ends");
        let table = Registry::hextet().unwrap().table();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, format!("{head}{begin}{table}{end}{tail}")).unwrap();
        } else {
            assert_eq!(there, table, "UPDATE_DOCS=1 cargo test -p scheduler-core ownership");
        }
    }
}
