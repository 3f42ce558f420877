//! Whether the pods that a deploy has made do well, as far as their nodes say.

use std::{collections::BTreeMap, sync::Arc};

use super::{Deploy, Fault};
use crate::{
    ending::LastEnding,
    job::Group,
    node::NodePhase,
    pod::{Pod, PodId, PodPhase},
    rollout,
    state::State,
};

/// How the pods of the next version do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// All that are wanted run, and those that are not are gone.
    Good,
    /// Not yet all of them, and what is waited for.
    NotYet(String),
    /// One of them has failed.
    Bad(Fault),
}

/// How often a pod has failed: a task that ended counts at once, and its next start does not count again. A hook that is
/// given up counts also in a pod that runs.
fn faults(state: &State, pod: &Pod) -> u32 {
    known_of_others(pod).max(pod.restarts.saturating_add(u32::from(lost_hook(state, pod).is_some())))
}

/// The same, of a pod that may become one of the next version, of which its hooks have failed in none.
fn known_of_others(pod: &Pod) -> u32 {
    pod.restarts.saturating_add(u32::from(pod.phase == PodPhase::Failed))
}

/// How a hook ended that nobody tries again.
fn lost_hook<'a>(state: &'a State, pod: &Pod) -> Option<&'a Arc<LastEnding>> {
    state.ending(&pod.id).filter(|ending| ending.for_good && ending.job_version == pod.job_version)
}

/// How often the pods have failed until now, of those that have: it is not held against them again. Also of those that
/// are of another version as yet, as they may become new ones.
#[must_use]
pub fn known_faults(state: &State, deploy: &Deploy) -> BTreeMap<PodId, u32> {
    let mut known = BTreeMap::new();
    for side in sides(state, deploy) {
        known.extend(side.new.iter().map(|pod| (pod.id.clone(), faults(state, pod))));
        known.extend(side.others.iter().map(|pod| (pod.id.clone(), known_of_others(pod))));
    }
    known.retain(|_, faults| *faults > 0);
    known
}

/// How the pods of the next version do.
#[must_use]
pub fn health(state: &State, deploy: &Deploy) -> Health {
    let sides = sides(state, deploy);
    let new = || sides.iter().flat_map(|side| &side.new);
    let known = |pod: &Pod| deploy.faults.get(&pod.id).copied().unwrap_or(0);
    if let Some(pod) = new().find(|pod| faults(state, pod) > known(pod)) {
        return Health::Bad(fault(state, pod));
    }
    match sides.iter().find_map(|side| side.waits_for(state, deploy)) {
        Some(what) => Health::NotYet(what),
        None => Health::Good,
    }
}

/// Whether no pod of the next version is left beside those of the previous one.
#[must_use]
pub fn is_back(state: &State, deploy: &Deploy) -> bool {
    let both = |side: &Side<'_>| deploy.groups.contains(side.group);
    sides(state, deploy).iter().filter(|side| both(side)).all(|side| side.new.is_empty())
}

/// How many pods there are of each version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Of the next version that run.
    pub running: usize,
    /// Of the next version that are wanted at this step.
    pub wanted: usize,
    /// Of the others, in the groups of which there are both.
    pub others: usize,
}

/// Counts the pods of both versions.
#[must_use]
pub fn tally(state: &State, deploy: &Deploy) -> Tally {
    let mut tally = Tally::default();
    for side in sides(state, deploy) {
        tally.running += side.running(state);
        tally.wanted += side.wanted;
        tally.others += side.others.len();
    }
    tally
}

fn fault(state: &State, pod: &Pod) -> Fault {
    let node = pod.node.as_deref().unwrap_or_default();
    let ending = state.ending(&pod.id).filter(|ending| ending.is_why(pod));
    let why = match (pod.phase, ending) {
        (PodPhase::Failed, _) => format!("pod {} failed on {node}: {}", pod.id, pod.message),
        (_, Some(ending)) if ending.for_good => {
            format!("pod {} runs on {node}, and its {} (nobody tries again)", pod.id, ending.what)
        }
        (_, None) => format!("a task of pod {} ended on {node} and was started again", pod.id),
        (_, Some(ending)) => {
            format!("pod {} failed on {node} and was started again: {}", pod.id, ending.what)
        }
    };
    Fault { why, output: ending.map(|ending| ending.output.clone()).unwrap_or_default() }
}

/// Why a pod that is to run in the next version does not, as far as is known.
fn late(pod: &Pod) -> String {
    match (pod.phase, &pod.node) {
        (PodPhase::Running, Some(node)) => format!("{node}, with {}, does not report", pod.id),
        _ if pod.message.is_empty() => format!("{} is {}", pod.id, pod.phase),
        _ => format!("{} is {}: {}", pod.id, pod.phase, pod.message),
    }
}

/// Of a pod that stays as it is until its node hears of the next version.
fn unheard(state: &State, pod: &Pod) -> Option<String> {
    let node = state.node_of(pod)?;
    (node.phase != NodePhase::Ready).then(|| format!("{}, with {}, does not report", node.name, pod.id))
}

/// Whether it runs, by the word of a node that reports: what was said before a cut is no sign of doing well.
fn runs(state: &State, pod: &Pod) -> bool {
    pod.phase == PodPhase::Running && state.node_of(pod).is_some_and(|node| node.phase == NodePhase::Ready)
}

/// The pods of one group.
struct Side<'a> {
    group: &'a str,
    /// How many of the next version there are to be.
    wanted: usize,
    /// And how many others.
    others_wanted: usize,
    new: Vec<&'a Arc<Pod>>,
    others: Vec<&'a Arc<Pod>>,
}

/// Every group of which the deploy has made pods: those of two versions, and those that the previous text had not.
fn sides<'a>(state: &'a State, deploy: &'a Deploy) -> Vec<Side<'a>> {
    let Some(text) = state.job(&deploy.id.job) else { return Vec::new() };
    let record = state.job_record(&deploy.id.job);
    let before = record.and_then(|record| deploy.before(record));
    let is_new = |name: &String| before.is_none_or(|before| !before.groups.contains_key(name));
    let groups = text.groups.iter();
    let made = groups.filter(|(name, _)| deploy.groups.contains(*name) || is_new(name));
    made.map(|(name, group)| side(state, deploy, name, group)).collect()
}

fn side<'a>(state: &'a State, deploy: &Deploy, name: &'a str, group: &Group) -> Side<'a> {
    let job = &deploy.id.job;
    let live: Vec<&Arc<Pod>> = state.pods_of_group(job, name).filter(|pod| pod.is_wanted()).collect();
    let record = state.job_record(job);
    let sides = record.and_then(|record| Some((record, rollout::sides(record, name, group)?)));
    let Some((record, sides)) = sides else {
        return Side {
            group: name,
            wanted: group.count as usize,
            others_wanted: 0,
            new: live,
            others: Vec::new(),
        };
    };
    let new_is = usize::from(sides[1].version == deploy.id.version);
    let (new, others): (Vec<_>, Vec<_>) =
        live.into_iter().partition(|pod| rollout::side_of(record, &sides, pod) == Some(new_is));
    let [wanted, others_wanted] = [new_is, 1 - new_is].map(|which| sides[which].text.count as usize);
    Side { group: name, wanted, others_wanted, new, others }
}

impl Side<'_> {
    fn running(&self, state: &State) -> usize {
        self.new.iter().filter(|pod| runs(state, pod)).count()
    }

    /// What is not yet as it should be. That the others are all there is not asked: the next version may be the cure.
    fn waits_for(&self, state: &State, deploy: &Deploy) -> Option<String> {
        let (running, version) = (self.running(state), deploy.id.version);
        if running < self.wanted {
            let (group, wanted) = (self.group, self.wanted);
            let late = self.new.iter().find(|pod| !runs(state, pod)).map(|pod| late(pod));
            let unheard = || self.others.iter().find_map(|pod| unheard(state, pod));
            let late = late.or_else(unheard).map_or(String::new(), |late| format!("; {late}"));
            return Some(format!("{running} of {wanted} pods of {group} run in version {version}{late}"));
        }
        let surplus = self.others.len().saturating_sub(self.others_wanted) + self.new.len() - self.wanted;
        (surplus > 0).then(|| format!("{surplus} pods of {} have yet to stop", self.group))
    }
}
