//! What changes mean to people: objects, fields, and who changed them. Pure reads of revisions.
//!
//! An object is what a key names. A job's fields are those of the text in force, so that a record that only forgets
//! old texts has not changed; a deleted job is absent.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value as Json;

use crate::{
    change::{Change, Key, Revision, Value},
    deploy::Deploy,
    job::Job,
};

/// Field by path, `groups.web.count`, and its value as text.
pub type Fields = BTreeMap<String, String>;

/// One field that differs; `None` is absence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldChange {
    /// Its path.
    pub field: String,
    /// Before.
    pub old: Option<String>,
    /// From then on.
    pub new: Option<String>,
}

/// What became of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was not there before.
    Created,
    /// It has other fields.
    Changed,
    /// It is not there any more.
    Removed,
}

/// An object that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectChange {
    /// Its key.
    pub key: Key,
    /// What became of it.
    pub fate: Fate,
    /// The fields that differ, by path; of one that was created or removed, all.
    pub fields: Vec<FieldChange>,
    /// Of a job: the version in force from then on, and the one that it equals if it was rolled back to.
    pub version: Option<(u32, Option<u32>)>,
}

/// Whose changes are meant: patterns with `*` for any text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// One of these; empty is everybody.
    pub by: Vec<String>,
    /// None of these.
    pub not_by: Vec<String>,
}

/// What differs between two points of the log, found by going back through it.
#[derive(Debug, Default)]
pub struct Net(BTreeMap<Key, Before>);

#[derive(Debug)]
struct Before {
    was: bool,
    is: bool,
    fields: BTreeMap<String, (Option<String>, Option<String>)>,
    version: Option<(u32, Option<u32>)>,
}

/// Whether somebody outside of the cluster wanted the change: a person or their tool. Everybody else is mechanical.
#[must_use]
pub fn is_external(changer: &str) -> bool {
    changer.starts_with("user:")
}

/// The fields of a value that people see; `None` for a job that is deleted.
#[must_use]
pub fn fields(value: &Value) -> Option<Fields> {
    match value {
        Value::Cluster(cluster) => Some(flat(cluster)),
        // They tell people nothing that the pods and the job do not.
        Value::Counters(_) | Value::Failures(_) | Value::Version(_) => None,
        // Text of a task's, which `netctl why` and `netctl events` show.
        Value::Ending(_) => None,
        Value::Job(record) => record.current().map(|job| job_fields(job)),
        Value::Deploy(deploy) => Some(deploy_fields(deploy)),
        Value::Node(node) => Some(flat(node)),
        Value::Pod(pod) => Some(flat(pod)),
        Value::Authorities(authorities) => Some(flat(authorities)),
        Value::Token(token) => Some(flat(token)),
        Value::Renewal(renewal) => Some(flat(renewal)),
        Value::Restored(mark) => Some(flat(mark)),
    }
}

/// What is seen in the place of a secret.
pub const HIDDEN: &str = "(hidden)";

/// Who may know what is in a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secrecy {
    /// Everybody who reads.
    Open,
    /// Those who may change jobs: it is often a password.
    Operators,
    /// Nobody: that it is there is all that is shown.
    Nobody,
}

/// Who may know what is in this field of this object. Fields that are not named here are for everybody.
#[must_use]
pub fn secrecy(key: &Key, field: &str) -> Secrecy {
    match key {
        // With it the ids of pods that are not made yet can be told.
        Key::Cluster if field == "id_key" => Secrecy::Nobody,
        // groups.GROUP.tasks.TASK.env.VARIABLE, and the same of hooks
        Key::Job(_) if field.split('.').nth(4) == Some("env") => Secrecy::Operators,
        _ => Secrecy::Open,
    }
}

/// The fields of a job's text.
#[must_use]
pub fn job_fields(job: &Job) -> Fields {
    flat(job)
}

/// How far a deploy is; its text is that of a version of its job.
fn deploy_fields(deploy: &Deploy) -> Fields {
    let mut fields = flat(deploy);
    fields.retain(|field, _| !field.starts_with("text."));
    fields
}

/// The fields that differ.
#[must_use]
pub fn diff_fields(old: &Fields, new: &Fields) -> Vec<FieldChange> {
    let mut paths: Vec<&String> = old.keys().chain(new.keys()).collect();
    paths.sort();
    paths.dedup();
    let change = |field: &String| FieldChange {
        field: field.clone(),
        old: old.get(field).cloned(),
        new: new.get(field).cloned(),
    };
    paths.into_iter().map(change).filter(|change| change.old != change.new).collect()
}

/// What one change means; `None` when people see no difference.
#[must_use]
pub fn object_change(change: &Change) -> Option<ObjectChange> {
    let (old, new) = (change.old.as_ref().and_then(fields), change.new.as_ref().and_then(fields));
    let fate = fate(old.is_some(), new.is_some())?;
    let fields = diff_fields(&old.unwrap_or_default(), &new.unwrap_or_default());
    let version = version(change);
    // A rollback to the text in force changes no field.
    let same = fields.is_empty() && version == change.old.as_ref().and_then(version_of);
    (fate != Fate::Changed || !same).then(|| ObjectChange { key: change.key.clone(), fate, fields, version })
}

fn fate(was: bool, is: bool) -> Option<Fate> {
    match (was, is) {
        (false, false) => None,
        (false, true) => Some(Fate::Created),
        (true, true) => Some(Fate::Changed),
        (true, false) => Some(Fate::Removed),
    }
}

fn version(change: &Change) -> Option<(u32, Option<u32>)> {
    change.new.as_ref().and_then(version_of)
}

fn version_of(value: &Value) -> Option<(u32, Option<u32>)> {
    match value {
        Value::Job(record) if !record.removed => Some((record.version, record.equals)),
        _ => None,
    }
}

impl Filter {
    /// Whether this changer is meant.
    #[must_use]
    pub fn selects(&self, changer: &str) -> bool {
        let one_of = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, changer));
        (self.by.is_empty() || one_of(&self.by)) && !one_of(&self.not_by)
    }
}

/// Whether `text` is as `pattern` says, in which `*` stands for any text.
#[must_use]
pub fn matches(pattern: &str, text: &str) -> bool {
    let Some((beginning, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut left) = text.strip_prefix(beginning) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let end = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    left.ends_with(end)
}

impl Net {
    /// Takes a revision that is older than all before it.
    pub fn add_older(&mut self, revision: &Revision) {
        for change in &revision.changes {
            self.add(change);
        }
    }

    fn add(&mut self, change: &Change) {
        let (old, new) = (change.old.as_ref().and_then(fields), change.new.as_ref().and_then(fields));
        let (was, is) = (old.is_some(), new.is_some());
        let differing = diff_fields(&old.unwrap_or_default(), &new.unwrap_or_default());
        if differing.is_empty() && was == is {
            return;
        }
        let fresh = || Before { was, is, fields: BTreeMap::new(), version: version(change) };
        let object = self.0.entry(change.key.clone()).or_insert_with(fresh);
        object.was = was;
        for FieldChange { field, old, new } in differing {
            object.fields.entry(field).and_modify(|known| known.0.clone_from(&old)).or_insert((old, new));
        }
        // It came and went.
        if !object.was && !object.is {
            self.0.remove(&change.key);
        }
    }

    /// How many objects were touched.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Nothing was touched.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What differs on the whole, by key. What came and went, and what was changed and changed back, is left out.
    #[must_use]
    pub fn finish(self) -> Vec<ObjectChange> {
        let objects = self.0.into_iter().filter_map(|(key, before)| {
            let fate = fate(before.was, before.is)?;
            let differs = |(field, (old, new)): (String, (Option<String>, Option<String>))| {
                (old != new).then_some(FieldChange { field, old, new })
            };
            let fields: Vec<FieldChange> = before.fields.into_iter().filter_map(differs).collect();
            let version = before.version;
            (fate != Fate::Changed || !fields.is_empty()).then_some(ObjectChange {
                key,
                fate,
                fields,
                version,
            })
        });
        objects.collect()
    }
}

fn flat(value: &impl Serialize) -> Fields {
    let mut fields = Fields::new();
    let json = serde_json::to_value(value).expect("keys are text and no value can fail to be written");
    flatten(String::new(), json, &mut fields);
    fields
}

/// Maps are entered; a list is one value.
fn flatten(path: String, json: Json, fields: &mut Fields) {
    match json {
        Json::Object(map) => {
            for (key, value) in map {
                let below = if path.is_empty() { key } else { format!("{path}.{key}") };
                flatten(below, value, fields);
            }
        }
        Json::Null => {}
        Json::String(text) => drop(fields.insert(path, text)),
        other => drop(fields.insert(path, other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{change::JobRecord, cluster::Cluster, time::WallTime};

    fn job(version: u32, count: u32, removed: bool) -> Option<Value> {
        let yaml =
            format!("{{job: a, groups: {{web: {{count: {count}, tasks: {{t: {{exec: [/x, b]}}}}}}}}}}");
        let job: Job = serde_norway::from_str(&yaml).unwrap();
        let versions = BTreeMap::from([(version, Arc::new(job))]);
        let (applied, changer) = (WallTime(0), "user:alice".to_owned());
        let record = JobRecord { version, versions, removed, applied, changer, equals: None };
        Some(Value::Job(Arc::new(record)))
    }

    fn change(old: Option<Value>, new: Option<Value>) -> Change {
        Change { key: Key::Job("a".to_owned()), old, new }
    }

    fn revision(changes: Vec<Change>) -> Revision {
        let (changer, message) = ("user:alice".to_owned(), String::new());
        Revision { revision: 1, time: WallTime(0), changer, message, changes }
    }

    fn count(old: &str, new: &str) -> FieldChange {
        let field = "groups.web.count".to_owned();
        FieldChange { field, old: Some(old.to_owned()), new: Some(new.to_owned()) }
    }

    #[test]
    fn a_job_changes_in_its_text_and_not_in_what_is_kept_of_old_ones() {
        let changed = object_change(&change(job(1, 3, false), job(2, 5, false))).unwrap();
        assert_eq!((changed.fate, changed.fields), (Fate::Changed, vec![count("3", "5")]));
        assert_eq!(changed.version, Some((2, None)));
        let removed = object_change(&change(job(2, 5, false), job(2, 5, true))).unwrap();
        assert_eq!((removed.fate, removed.version), (Fate::Removed, None));
        assert!(removed.fields.iter().any(|field| field.field == "groups.web.tasks.t.exec"));
        assert_eq!(object_change(&change(job(2, 5, true), job(2, 5, true))), None);
        let again = object_change(&change(job(1, 3, false), job(2, 3, false))).unwrap();
        assert_eq!(
            (again.fields, again.version),
            (vec![], Some((2, None))),
            "a version without another text"
        );
    }

    #[test]
    fn the_net_of_several_revisions_leaves_out_what_came_back() {
        let mut net = Net::default();
        net.add_older(&revision(vec![change(job(2, 5, false), job(3, 7, false))]));
        net.add_older(&revision(vec![change(job(1, 3, false), job(2, 5, false))]));
        assert_eq!(net.finish()[0].fields, [count("3", "7")]);

        let mut net = Net::default();
        net.add_older(&revision(vec![change(job(2, 5, false), job(3, 3, false))]));
        net.add_older(&revision(vec![change(job(1, 3, false), job(2, 5, false))]));
        assert_eq!((net.len(), net.finish()), (1, vec![]));

        let mut net = Net::default();
        net.add_older(&revision(vec![change(job(1, 3, false), job(1, 3, true))]));
        net.add_older(&revision(vec![change(None, job(1, 3, false))]));
        assert!(net.is_empty(), "what came and went takes no room");
        assert_eq!(net.finish(), []);
    }

    #[test]
    fn changers_are_chosen_by_patterns() {
        for (pattern, text, is) in [
            ("user:*", "user:alice", true),
            ("user:*", "scheduler", false),
            ("scheduler", "scheduler", true),
            ("scheduler", "schedulers", false),
            ("*", "", true),
            ("*:n*1", "node:n21", true),
            ("a*a", "a", false),
            ("a*b*b", "ab", false),
        ] {
            assert_eq!(matches(pattern, text), is, "{pattern} {text}");
        }
        let filter = Filter { by: vec![], not_by: vec!["scheduler".into(), "node:*".into()] };
        assert!(filter.selects("user:root") && !filter.selects("node:n1") && !filter.selects("scheduler"));
        assert!(is_external("user:root") && !is_external("scheduler") && !is_external("node:user:"));
    }

    /// Whoever adds a field to the cluster's record decides who may see it, here and in [`secrecy`].
    #[test]
    fn every_field_of_the_cluster_is_known_to_be_open_or_secret() {
        let cluster = Cluster {
            prefix: "fd12:3456:789a::/48".parse().unwrap(),
            pod_prefix: Some("2001:db8:1::/64".parse().unwrap()),
            pod_ipv4: "10.254.0.0/20".parse().unwrap(),
            id_key: 7,
            created: WallTime(0),
        };
        let known = fields(&Value::Cluster(Arc::new(cluster))).unwrap();
        let shown: Vec<(&str, Secrecy)> =
            known.keys().map(|field| (field.as_str(), secrecy(&Key::Cluster, field))).collect();
        let expected = [
            ("created", Secrecy::Open),
            ("id_key", Secrecy::Nobody),
            ("pod_ipv4", Secrecy::Open),
            ("pod_prefix", Secrecy::Open),
            ("prefix", Secrecy::Open),
        ];
        assert_eq!(shown, expected);
    }
}
