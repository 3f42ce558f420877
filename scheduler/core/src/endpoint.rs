//! What load balancers see of pods: an address and whether to send it connections.

use std::{collections::BTreeMap, fmt, net::Ipv6Addr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    change::{Key, Revision, Value},
    name::{self, JOB_NAME_LEN_MAX, NameError},
    pod::{Pod, PodId, PodPhase},
    state::State,
};

/// `job` or `job/group`: whose addresses are read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Selector {
    /// The job.
    pub job: String,
    /// The group; without it, every group of the job.
    pub group: Option<String>,
}

/// A pod's address and whether to send it connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The pod.
    pub pod: PodId,
    /// Its group.
    pub group: String,
    /// Its node.
    pub node: String,
    /// Its address, never another pod's.
    pub address: Ipv6Addr,
    /// Whether to send it connections.
    pub state: EndpointState,
}

/// Whether to send connections to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointState {
    /// Not known to run: it is being made, a task of it has ended, or its node's lease has ended.
    Starting,
    /// Every task runs.
    Ready,
    /// It is about to be stopped.
    Terminating,
}

/// Pods of a selection by id.
pub type Selection = BTreeMap<PodId, Endpoint>;

/// The difference between two selections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointDiff {
    /// New or changed.
    pub upserts: Vec<Endpoint>,
    /// No longer there.
    pub removals: Vec<PodId>,
}

impl Selector {
    /// Whether the pod is of this job and group.
    #[must_use]
    pub fn selects(&self, pod: &Pod) -> bool {
        self.job == pod.job && self.group.as_ref().is_none_or(|group| *group == pod.group)
    }

    /// Whether everything that `other` selects is selected by this too.
    #[must_use]
    pub fn covers(&self, other: &Selector) -> bool {
        self.job == other.job && (self.group.is_none() || self.group == other.group)
    }
}

impl FromStr for Selector {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Selector, NameError> {
        let (job, group) = match text.split_once('/') {
            Some((job, group)) => (job, Some(group)),
            None => (text, None),
        };
        name::check(job, JOB_NAME_LEN_MAX)?;
        group.map_or(Ok(()), |group| name::check(group, JOB_NAME_LEN_MAX))?;
        Ok(Selector { job: job.to_owned(), group: group.map(str::to_owned) })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.job)?;
        self.group.as_ref().map_or(Ok(()), |group| write!(f, "/{group}"))
    }
}

impl fmt::Display for EndpointState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EndpointState::Starting => "starting",
            EndpointState::Ready => "ready",
            EndpointState::Terminating => "terminating",
        })
    }
}

/// What load balancers see of `pod`: nothing while it has no address or stands by.
#[must_use]
pub fn endpoint(pod: &Pod) -> Option<Endpoint> {
    if pod.standby {
        return None;
    }
    let state = match pod.phase {
        PodPhase::Pending => return None,
        PodPhase::Starting | PodPhase::Failed | PodPhase::Lost => EndpointState::Starting,
        PodPhase::Running => EndpointState::Ready,
        PodPhase::Terminating => EndpointState::Terminating,
    };
    let (address, node) = (pod.address?, pod.node.clone()?);
    Some(Endpoint { pod: pod.id.clone(), group: pod.group.clone(), node, address, state })
}

/// Everything that is selected now.
#[must_use]
pub fn select(state: &State, selector: &Selector) -> Selection {
    let pods = state.pods_of_job(&selector.job).filter(|pod| selector.selects(pod));
    pods.filter_map(|pod| endpoint(pod)).map(|endpoint| (endpoint.pod.clone(), endpoint)).collect()
}

/// What `revision` changed in a selection.
#[must_use]
pub fn changed_by(revision: &Revision, selector: &Selector) -> EndpointDiff {
    let mut diff = EndpointDiff::default();
    for change in &revision.changes {
        let Key::Pod(id) = &change.key else { continue };
        let seen = |value: &Option<Value>| match value {
            Some(Value::Pod(pod)) if selector.selects(pod) => endpoint(pod),
            _ => None,
        };
        let (old, new) = (seen(&change.old), seen(&change.new));
        match (old, new) {
            (old, Some(new)) if old.as_ref() != Some(&new) => diff.upserts.push(new),
            (Some(_), None) => diff.removals.push(id.clone()),
            _ => {}
        }
    }
    diff
}

/// The net change from one selection to another.
#[must_use]
pub fn diff(old: &Selection, new: &Selection) -> EndpointDiff {
    let changed = |endpoint: &&Endpoint| old.get(&endpoint.pod) != Some(endpoint);
    EndpointDiff {
        upserts: new.values().filter(changed).cloned().collect(),
        removals: old.keys().filter(|id| !new.contains_key(id)).cloned().collect(),
    }
}

impl EndpointDiff {
    /// Nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.removals.is_empty()
    }

    /// How many pods it names.
    #[must_use]
    pub fn len(&self) -> usize {
        self.upserts.len() + self.removals.len()
    }

    /// Brings `selection` up to date.
    pub fn apply(&self, selection: &mut Selection) {
        for endpoint in &self.upserts {
            selection.insert(endpoint.pod.clone(), endpoint.clone());
        }
        for id in &self.removals {
            selection.remove(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_of_a_job_covers_its_groups_and_not_the_other_way() {
        let [job, group, other] = ["a", "a/b", "a/c"].map(|text| text.parse::<Selector>().unwrap());
        assert!(job.covers(&group) && job.covers(&job) && group.covers(&group));
        assert!(!group.covers(&job) && !group.covers(&other));
        assert_eq!(group.to_string(), "a/b");
        assert!("a/b/c".parse::<Selector>().is_err() && "".parse::<Selector>().is_err());
    }

    #[test]
    fn applying_a_diff_makes_the_selections_equal() {
        let one = |pod: &str, state| {
            let pod = PodId(pod.to_owned());
            (
                pod.clone(),
                Endpoint {
                    pod,
                    group: "g".into(),
                    node: "n".into(),
                    address: "fd00::1".parse().unwrap(),
                    state,
                },
            )
        };
        let old = Selection::from([one("a", EndpointState::Ready), one("b", EndpointState::Ready)]);
        let new = Selection::from([one("b", EndpointState::Terminating), one("c", EndpointState::Starting)]);
        let change = diff(&old, &new);
        assert_eq!((change.upserts.len(), change.removals.len()), (2, 1));
        let mut applied = old.clone();
        change.apply(&mut applied);
        assert_eq!(applied, new);
        assert!(diff(&new, &new).is_empty());
    }
}
