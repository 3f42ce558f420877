//! Keys, values and revisions: the form in which state is stored, logged and compared.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    authority::Authorities,
    cluster::{Cluster, Counters},
    deploy::{Deploy, DeployId},
    ending::LastEnding,
    failure::Failures,
    job::Job,
    node::Node,
    pod::{Pod, PodId},
    renewal::Renewal,
    restore::Restored,
    time::WallTime,
    token::{Token, TokenId},
    version::{JobVersion, VersionId},
};

/// The name of one thing that is stored; as text `kind/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// What never changes.
    Cluster,
    /// Numbers that only grow.
    Counters,
    /// Which CAs vouch for the members.
    Authorities,
    /// A job by its name.
    Job(String),
    /// A version of a job, in force or not.
    Version(VersionId),
    /// A node by its name.
    Node(String),
    /// A pod by its id.
    Pod(PodId),
    /// How a pod failed last, by its id.
    Ending(PodId),
    /// Where pods of a group have failed, by `job/group`.
    Failures(String),
    /// A deploy by the job and the version that it goes to.
    Deploy(DeployId),
    /// A token by the hash of its secret.
    Token(TokenId),
    /// A key of a certificate that another takes the place of, by its hash.
    Renewal(String),
    /// While leases may run that the server before a restore has granted.
    Restored,
}

/// One thing that is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Value {
    /// At [`Key::Cluster`].
    Cluster(Arc<Cluster>),
    /// At [`Key::Counters`].
    Counters(Counters),
    /// At [`Key::Authorities`].
    Authorities(Arc<Authorities>),
    /// At [`Key::Job`].
    Job(Arc<JobRecord>),
    /// At [`Key::Version`].
    Version(Arc<JobVersion>),
    /// At [`Key::Node`].
    Node(Arc<Node>),
    /// At [`Key::Pod`].
    Pod(Arc<Pod>),
    /// At [`Key::Ending`].
    Ending(Arc<LastEnding>),
    /// At [`Key::Failures`].
    Failures(Arc<Failures>),
    /// At [`Key::Deploy`].
    Deploy(Arc<Deploy>),
    /// At [`Key::Token`].
    Token(Arc<Token>),
    /// At [`Key::Renewal`].
    Renewal(Arc<Renewal>),
    /// At [`Key::Restored`].
    Restored(Arc<Restored>),
}

/// A job as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// The version in force. It goes on counting when a removed job is applied again, so that a version
    /// names one text for ever.
    pub version: u32,
    /// The version in force and older ones that pods still run.
    pub versions: BTreeMap<u32, Arc<Job>>,
    /// It was deleted. The record stays for the sake of `version`.
    pub removed: bool,
    /// When the version in force was applied.
    pub applied: WallTime,
    /// Who applied it.
    pub changer: String,
    /// The older version whose text it was made of, when somebody went back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<u32>,
}

/// A key with its value before and after; `None` is absence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What changed.
    pub key: Key,
    /// Its value before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<Value>,
    /// Its value from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<Value>,
}

/// One committed change of the cluster's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// Its number, one more than the last.
    pub revision: u64,
    /// When it was made, for people to read.
    pub time: WallTime,
    /// Who made it: `user:alice`, `scheduler`, `node:n1`.
    pub changer: String,
    /// Why, in words.
    pub message: String,
    /// What changed, in the order of the keys.
    pub changes: Vec<Change>,
}

impl Value {
    /// Whether this is what `key` names: of its kind and, where a value knows its own name, of that name.
    #[must_use]
    pub fn is_of(&self, key: &Key) -> bool {
        match self {
            Value::Cluster(_) => *key == Key::Cluster,
            Value::Counters(_) => *key == Key::Counters,
            Value::Authorities(_) => *key == Key::Authorities,
            Value::Job(record) => {
                let is_its = |name: &String| record.versions.values().all(|job| job.job == *name);
                matches!(key, Key::Job(name) if is_its(name))
            }
            Value::Version(_) => matches!(key, Key::Version(_)),
            Value::Node(node) => matches!(key, Key::Node(name) if node.name == *name),
            Value::Pod(pod) => matches!(key, Key::Pod(id) if pod.id == *id),
            Value::Deploy(deploy) => matches!(key, Key::Deploy(id) if deploy.id == *id),
            Value::Ending(_) => matches!(key, Key::Ending(_)),
            Value::Failures(_) => matches!(key, Key::Failures(_)),
            Value::Token(_) => matches!(key, Key::Token(_)),
            Value::Renewal(_) => matches!(key, Key::Renewal(_)),
            Value::Restored(_) => *key == Key::Restored,
        }
    }
}

impl JobRecord {
    /// The text in force, unless the job was deleted.
    #[must_use]
    pub fn current(&self) -> Option<&Arc<Job>> {
        if self.removed { None } else { self.versions.get(&self.version) }
    }
}

/// Why a text is not a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the key of anything")]
pub struct KeyError(String);

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Key, KeyError> {
        match text.split_once('/') {
            None if text == "cluster" => Ok(Key::Cluster),
            None if text == "counters" => Ok(Key::Counters),
            None if text == "restored" => Ok(Key::Restored),
            None if text == "authorities" => Ok(Key::Authorities),
            Some(("job", name)) => Ok(Key::Job(name.to_owned())),
            Some(("version", id)) => Ok(Key::Version(id.parse().map_err(|_| KeyError(text.to_owned()))?)),
            Some(("node", name)) => Ok(Key::Node(name.to_owned())),
            Some(("pod", id)) => Ok(Key::Pod(PodId(id.to_owned()))),
            Some(("ending", id)) => Ok(Key::Ending(PodId(id.to_owned()))),
            Some(("failures", group)) => Ok(Key::Failures(group.to_owned())),
            Some(("deploy", id)) => Ok(Key::Deploy(id.parse().map_err(|_| KeyError(text.to_owned()))?)),
            Some(("token", id)) => Ok(Key::Token(id.to_owned())),
            Some(("renewal", key)) => Ok(Key::Renewal(key.to_owned())),
            _ => Err(KeyError(text.to_owned())),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Cluster => f.write_str("cluster"),
            Key::Counters => f.write_str("counters"),
            Key::Authorities => f.write_str("authorities"),
            Key::Job(name) => write!(f, "job/{name}"),
            Key::Version(id) => write!(f, "version/{id}"),
            Key::Node(name) => write!(f, "node/{name}"),
            Key::Pod(id) => write!(f, "pod/{id}"),
            Key::Ending(id) => write!(f, "ending/{id}"),
            Key::Failures(group) => write!(f, "failures/{group}"),
            Key::Deploy(id) => write!(f, "deploy/{id}"),
            Key::Token(id) => write!(f, "token/{id}"),
            Key::Renewal(key) => write!(f, "renewal/{key}"),
            Key::Restored => f.write_str("restored"),
        }
    }
}

impl Serialize for Key {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Key, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_read_back_as_they_print() {
        let keys = [
            "cluster",
            "counters",
            "authorities",
            "job/a",
            "version/a@3",
            "node/n1",
            "pod/a-b-00000",
            "ending/a-b-00000",
            "failures/a/b",
            "deploy/a@4",
            "token/ff",
            "renewal/ff",
            "restored",
        ];
        for text in keys {
            assert_eq!(text.parse::<Key>().unwrap().to_string(), text);
        }
        for text in ["", "pods/a", "cluster/a", "job", "version/a", "deploy/a", "deploy/a@b"] {
            assert!(text.parse::<Key>().is_err(), "{text}");
        }
    }
}
