//! What placement has to know of a state: the demand of a group, and the nodes that are worth looking at.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Candidate, Demand, Occupied,
    board::{Pool, Pools, by_value},
};
use crate::{
    failure::Failures,
    job::{Constraint, Group, Spread},
    node::NODE_LABEL,
    pod::{Pod, PodPhase},
    state::{Seat, State, Values},
    time::WallTime,
};

/// A group and where its pods are and have failed.
pub struct Survey<'a> {
    state: &'a State,
    wanted: &'a Group,
    group_pods: BTreeMap<&'a str, u32>,
    failures: Option<&'a Failures>,
    occupied: Vec<Occupied>,
    now: WallTime,
}

/// Looks at the group `group` of `job`, whose text is `wanted`.
#[must_use]
pub fn survey<'a>(
    state: &'a State,
    (job, group): (&str, &str),
    wanted: &'a Group,
    now: WallTime,
) -> Survey<'a> {
    let mut group_pods: BTreeMap<&str, u32> = BTreeMap::new();
    for pod in state.pods_of_group(job, group).filter(|pod| pod.is_wanted()) {
        if let Some(node) = &pod.node {
            *group_pods.entry(node).or_default() += 1;
        }
    }
    let failures = state.failures(job, group).map(AsRef::as_ref);
    let mut occupied = kept_by_itself(state, (job, group), wanted);
    occupied.extend(kept_by_others(state, (job, group)));
    Survey { state, wanted, group_pods, failures, occupied, now }
}

impl<'a> Survey<'a> {
    /// `count` more pods of the group.
    #[must_use]
    pub fn demand(&self, count: usize) -> Demand<'a> {
        let pods_per_node_max = self.state.cluster().map_or(u32::MAX, |cluster| cluster.pods_per_node_max());
        Demand {
            resources: self.wanted.resources(),
            countables: self.wanted.countables(),
            constraints: &self.wanted.constraints,
            spread: &self.wanted.spread,
            occupied: self.occupied.clone(),
            count,
            pods_per_node_max,
        }
    }

    /// Every node, by how much of it is used.
    #[must_use]
    pub fn all(&self) -> Vec<Candidate<'a>> {
        self.state.seats().iter().map(|seat| self.candidate(seat)).collect()
    }

    /// The nodes for [`place`](super::place), in the order in which the state keeps them where that is the one wanted:
    /// so it is among nodes on which the group has neither pods nor failures.
    #[must_use]
    pub fn pools(&self, demand: &Demand<'_>) -> Pools<'_> {
        if let Some(pinned) = self.pinned() {
            return Pools::of(demand, pinned);
        }
        let seats = self.state.seats().with_room(demand.resources);
        let one = |pool| Pools::new(vec![pool], std::iter::empty());
        match demand.spread {
            Spread::Label(label) => match self.state.seats_by(label) {
                Some(values) => self.pools_by(demand, values),
                None => Pools::of(demand, self.all()),
            },
            Spread::Node => one(Pool::new(demand, self.known(), self.untouched(seats))),
            Spread::Pack => one(Pool::new(demand, self.known(), self.untouched(seats.rev()))),
        }
    }

    /// A pool for each value of the label.
    fn pools_by(&self, demand: &Demand<'_>, values: &'a Values) -> Pools<'_> {
        let needs = demand.resources;
        let known = by_value(demand, self.known());
        let names: BTreeSet<Option<String>> = known.keys().cloned().collect();
        let pools = known.into_iter().filter_map(|(value, known)| {
            let seats = values.get(&value)?.with_room(needs);
            Some(Pool::new(demand, known, self.untouched(seats)))
        });
        let pools = pools.collect();
        let others = values.least_used_first().filter(move |(value, _)| !names.contains(*value));
        let others = others.filter_map(move |(_, seats)| {
            Some(Pool::untouched(seats.iter().next()?, self.untouched(seats.with_room(needs))))
        });
        Pools::new(pools, others)
    }

    /// Those on which the group has neither pods nor failures.
    fn untouched(&self, seats: impl Iterator<Item = &'a Seat>) -> impl Iterator<Item = Candidate<'a>> {
        let all = seats.map(|seat| self.candidate(seat));
        all.filter(|candidate| candidate.group_pods == 0 && candidate.failures == 0)
    }

    /// The nodes on which the group has pods or failures.
    fn known(&self) -> Vec<Candidate<'a>> {
        let failed = self.failures.into_iter().flat_map(|failures| failures.nodes(self.now));
        let names: BTreeSet<&str> =
            self.group_pods.keys().copied().chain(failed.map(String::as_str)).collect();
        let all = names.into_iter().filter_map(|name| self.state.seat(name)).map(|seat| self.candidate(seat));
        all.filter(|candidate| candidate.group_pods > 0 || candidate.failures > 0).collect()
    }

    /// The nodes that the constraints name, when they do.
    fn pinned(&self) -> Option<Vec<Candidate<'a>>> {
        let names: BTreeSet<&String> = match self.wanted.constraints.get(NODE_LABEL)? {
            Constraint::Is(name) => BTreeSet::from([name]),
            Constraint::OneOf(names) => names.iter().collect(),
            Constraint::All(_) => return None,
        };
        let seats = names.into_iter().filter_map(|name| self.state.seat(name));
        Some(seats.map(|seat| self.candidate(seat)).collect())
    }

    fn candidate(&self, seat: &'a Seat) -> Candidate<'a> {
        let name = seat.node.name.as_str();
        let group_pods = match self.group_pods.is_empty() {
            true => 0,
            false => self.group_pods.get(name).copied().unwrap_or(0),
        };
        let failures = self.failures.map_or(0, |failures| failures.pods(name, self.now));
        Candidate { node: &seat.node, usage: seat.usage.clone(), group_pods, failures }
    }
}

/// What a group's own rules keep it from.
fn kept_by_itself(state: &State, own: (&str, &str), wanted: &Group) -> Vec<Occupied> {
    let occupied = |apart: &crate::job::Apart| {
        let (job, group) = match apart.from.as_deref() {
            None => (own.0, Some(own.1)),
            Some(from) => from.split_once('/').map_or((from, None), |(job, group)| (job, Some(group))),
        };
        let pods = state.pods_of_job(job).filter(|pod| group.is_none_or(|group| pod.group == group));
        Occupied {
            whom: apart.from.clone().unwrap_or_else(|| format!("{}/{}", own.0, own.1)),
            by: apart.by.clone(),
            values: values(state, pods.map(AsRef::as_ref), &apart.by),
            own: apart.means(own, own),
        }
    };
    wanted.apart.iter().map(occupied).collect()
}

/// What the rules of other groups keep it from: a rule is kept whichever of the two comes first.
fn kept_by_others(state: &State, own: (&str, &str)) -> Vec<Occupied> {
    let mut all = Vec::new();
    for job in state.jobs_that_keep_apart(own.0) {
        for (name, group) in job.groups.iter().filter(|(name, _)| (job.job.as_str(), name.as_str()) != own) {
            let other = (job.job.as_str(), name.as_str());
            for apart in group.apart.iter().filter(|apart| apart.means(other, own)) {
                let pods = state.pods_of_group(other.0, other.1).map(AsRef::as_ref);
                let values = values(state, pods, &apart.by);
                let whom = format!("{}/{}", other.0, other.1);
                all.push(Occupied { whom, by: apart.by.clone(), values, own: false });
            }
        }
    }
    all
}

/// The values of a label at which pods are, also those that are being stopped. Pods that are lost with their node
/// hold nobody off: another may have to take their place.
fn values<'a>(state: &State, pods: impl Iterator<Item = &'a Pod>, by: &str) -> BTreeSet<Option<String>> {
    let there = pods.filter(|pod| pod.phase != PodPhase::Lost);
    let nodes = there.filter_map(|pod| state.nodes().get(pod.node.as_ref()?));
    nodes.map(|node| node.label(by).map(str::to_owned)).collect()
}
