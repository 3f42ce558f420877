//! Why a pod has no place, node by node, and the smallest change that would give it one.

use std::fmt;

use super::{Candidate, Demand, Reason, reason::obstacles, survey};
use crate::{
    job::Constraint,
    node::{NODE_LABEL, NodePhase},
    pod::Pod,
    quantity::{Cpu, Memory},
    rollout,
    state::State,
    time::WallTime,
};

/// How many nodes a pod's message names before it counts the rest.
pub const REASONS_SHOWN_MAX: usize = 8;

/// Why the pods of a demand fit nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explanation {
    /// Every node that does not fit, by name.
    pub nodes: Vec<Verdict>,
    /// The node of `nodes` with the smallest change, if any change there would help.
    pub smallest: Option<usize>,
    /// Nodes that are asked for by name and that there are none of.
    pub absent: Vec<String>,
}

/// Why a pod does not fit on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The node.
    pub node: String,
    /// The first thing that keeps the pod off it.
    pub reason: Reason,
    /// What would have to change for it to fit: all of these.
    pub fixes: Vec<Fix>,
}

/// One thing that would have to change on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fix {
    /// That much processor time is to become free, in thousandths.
    FreeCpu(u64),
    /// That much memory is to become free.
    FreeMemory(Memory),
    /// So many of something are to become free.
    Free(u32, String),
    /// So many pods are to go.
    FreePods(u32),
    /// The node is to have this label.
    Label(String, String),
    /// The node is to lose or change this label, so that this holds.
    Relabel(String),
    /// These pods are to go elsewhere.
    Move(String),
    /// Pods of the group itself are in the way: another node is to join, with another value of this label.
    Join(String),
    /// The node is to attach.
    Attach(NodePhase),
    /// The group is not to ask for this of its node's name.
    Unpin(String),
    /// The node is too small even when empty: that much more processor time, or a pod that asks for less.
    AddCpu(u64),
    /// The node is too small even when empty: that much more memory or a pod that asks for less.
    AddMemory(Memory),
    /// The node has too few even when empty.
    Add(u32, String),
}

/// Says of each candidate why no pod of `demand` fits there.
#[must_use]
pub fn explain(demand: &Demand<'_>, candidates: &[Candidate<'_>]) -> Explanation {
    let mut nodes: Vec<Verdict> =
        candidates.iter().filter_map(|candidate| verdict(demand, candidate)).collect();
    nodes.sort_by(|a, b| a.node.cmp(&b.node));
    let smallest = (0..nodes.len()).min_by_key(|at| nodes[*at].cost());
    Explanation { nodes, smallest, absent: absent(demand, candidates) }
}

/// Why `pod` has no place in this state, as `netctl why` prints it. Empty for a pod whose job is gone.
#[must_use]
pub fn why_not(state: &State, pod: &Pod, now: WallTime) -> Explanation {
    let job = state.job(&pod.job);
    let Some(wanted) = job.and_then(|job| job.group(&pod.group)) else { return Explanation::default() };
    let side = state.job_record(&pod.job).and_then(|record| {
        let sides = rollout::sides(record, &pod.group, wanted)?;
        Some(sides[rollout::side_of(record, &sides, pod).unwrap_or(0)].text.clone())
    });
    let wanted = side.as_ref().unwrap_or(wanted);
    let survey = survey(state, (&pod.job, &pod.group), wanted, now);
    explain(&survey.demand(1), &survey.all())
}

/// Nodes that the demand names and that are no candidates.
fn absent(demand: &Demand<'_>, candidates: &[Candidate<'_>]) -> Vec<String> {
    let names = demand.constraints.get(NODE_LABEL).map(Constraint::alternatives).unwrap_or_default();
    let is_absent = |name: &&String| !candidates.iter().any(|candidate| candidate.node.name == **name);
    names.iter().filter(is_absent).cloned().collect()
}

fn verdict(demand: &Demand<'_>, candidate: &Candidate<'_>) -> Option<Verdict> {
    let mut all = obstacles(demand, candidate);
    let reason = all.next()?;
    let fixes = std::iter::once(Fix::of(&reason)).chain(all.map(|reason| Fix::of(&reason))).collect();
    Some(Verdict { node: candidate.node.name.clone(), reason, fixes })
}

impl Explanation {
    /// In short, for the message of a pod.
    #[must_use]
    pub fn short(&self) -> String {
        if self.nodes.is_empty() {
            return "no node has joined yet; `netctl token --for node` makes the line to join one".to_owned();
        }
        let mut text = "no node fits".to_owned();
        text.extend(self.no_such_node().map(|no_such| format!(": {no_such}")));
        if let Some(smallest) = self.smallest_change() {
            text.push_str(&format!(", the smallest change is to {smallest}"));
        }
        for verdict in self.nodes.iter().take(REASONS_SHOWN_MAX) {
            text.push_str(&format!("; {}: {}", verdict.node, verdict.reason));
        }
        let rest = self.nodes.len().saturating_sub(REASONS_SHOWN_MAX);
        if rest > 0 {
            text.push_str(&format!("; and {rest} more nodes"));
        }
        text
    }

    /// `there is no node n9`, when one that is asked for by name is not there.
    #[must_use]
    pub fn no_such_node(&self) -> Option<String> {
        let mut names: Vec<&str> = self.absent.iter().take(REASONS_SHOWN_MAX).map(String::as_str).collect();
        if self.absent.len() > names.len() {
            names.push("others that are asked for");
        }
        (!names.is_empty()).then(|| format!("there is no node {}", names.join(" or ")))
    }

    /// The smallest change at all: `free 500m CPU on n3`.
    #[must_use]
    pub fn smallest_change(&self) -> Option<String> {
        let verdict = self.nodes.get(self.smallest?)?;
        let elsewhere = verdict.fixes.iter().find(|fix| matches!(fix, Fix::Join(_)));
        Some(elsewhere.map_or_else(|| format!("{} on {}", verdict.change(), verdict.node), Fix::to_string))
    }
}

impl Verdict {
    /// What would have to change here: `free 500m CPU and label rack=a`.
    #[must_use]
    pub fn change(&self) -> String {
        self.fixes.iter().map(Fix::to_string).collect::<Vec<_>>().join(" and ")
    }

    /// Fewer changes are smaller, then those that take less effort, then smaller amounts.
    fn cost(&self) -> (usize, u32, u64) {
        let effort = self.fixes.iter().map(Fix::effort).max().unwrap_or(0);
        (self.fixes.len(), effort, self.fixes.iter().map(Fix::amount).sum())
    }
}

impl Fix {
    fn of(reason: &Reason) -> Fix {
        match reason {
            Reason::NotReady(phase) => Fix::Attach(*phase),
            Reason::Label { key, wanted, .. } if key == NODE_LABEL => Fix::Unpin(wanted.of(key)),
            Reason::Label { key, wanted, .. } => match wanted.example() {
                Some(value) => Fix::Label(key.clone(), value),
                None => Fix::Relabel(wanted.of(key)),
            },
            Reason::Apart { by, own: true, .. } => Fix::Join(by.clone()),
            Reason::Apart { whom, .. } => Fix::Move(whom.clone()),
            Reason::Cpu { needs, has, .. } if needs > has => Fix::AddCpu(u64::from(needs.0 - has.0)),
            Reason::Cpu { needs, free, .. } => Fix::FreeCpu(u64::from(needs.0) - free),
            Reason::Memory { needs, has, .. } if needs > has => Fix::AddMemory(Memory(needs.0 - has.0)),
            Reason::Memory { needs, free, .. } => Fix::FreeMemory(Memory(needs.0 - free.0)),
            Reason::Countable { name, needs, has, .. } if needs > has => Fix::Add(needs - has, name.clone()),
            Reason::Countable { name, needs, free, .. } => Fix::Free(needs - free, name.clone()),
            Reason::Full(_) => Fix::FreePods(1),
        }
    }

    fn effort(&self) -> u32 {
        match self {
            Fix::FreeCpu(_) | Fix::FreeMemory(_) | Fix::Free(..) | Fix::FreePods(_) => 1,
            Fix::Label(..) | Fix::Relabel(_) => 2,
            Fix::Move(_) => 3,
            Fix::Attach(_) | Fix::Join(_) => 4,
            Fix::Unpin(_) => 5,
            Fix::AddCpu(_) | Fix::AddMemory(_) | Fix::Add(..) => 6,
        }
    }

    /// To compare fixes of equal effort: thousandths of a CPU, of a thing or of a pod, and mebibytes.
    fn amount(&self) -> u64 {
        match self {
            Fix::FreeCpu(millis) | Fix::AddCpu(millis) => *millis,
            Fix::FreeMemory(memory) | Fix::AddMemory(memory) => memory.0 >> 20,
            Fix::Free(number, _) | Fix::Add(number, _) | Fix::FreePods(number) => u64::from(*number) * 1_000,
            _ => 0,
        }
    }
}

impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpu = |millis: &u64| Cpu(u32::try_from(*millis).unwrap_or(u32::MAX));
        match self {
            Fix::FreeCpu(millis) => write!(f, "free {} CPU", cpu(millis)),
            Fix::FreeMemory(memory) => write!(f, "free {} memory", memory.rounded_up()),
            Fix::Free(number, name) => write!(f, "free {number} {name}"),
            Fix::FreePods(number) => write!(f, "stop {number} pod"),
            Fix::Label(key, value) => write!(f, "label {key}={value}"),
            Fix::Relabel(wanted) => write!(f, "have {wanted}"),
            Fix::Move(whom) => write!(f, "move {whom} away"),
            Fix::Join(by) if by == NODE_LABEL => f.write_str("join another node"),
            Fix::Join(by) => write!(f, "join a node with another {by}"),
            Fix::Attach(NodePhase::Joined) => f.write_str("start the agent"),
            Fix::Attach(NodePhase::CutOff) => f.write_str("mend its path to the server"),
            Fix::Attach(_) => f.write_str("bring the agent back"),
            Fix::Unpin(wanted) => write!(f, "allow it without {wanted}"),
            Fix::AddCpu(millis) => write!(f, "have {} more CPU or ask for less", cpu(millis)),
            Fix::AddMemory(memory) => write!(f, "have {} more memory or ask for less", memory.rounded_up()),
            Fix::Add(number, name) => write!(f, "have {number} more {name} or ask for less"),
        }
    }
}
