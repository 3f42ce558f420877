//! A rollout in peace, judged by the processes that live and not by what anybody says of them.

use std::collections::BTreeMap;

use scheduler_core::{
    job::{Availability, Group, Job},
    pod::PodPhase,
    state::State,
};

use crate::{machine::Machine, operator::rolled};

/// What the tasks of pods are told that are of the next version.
const NEXT: u32 = 7;

/// The next step of a rollout: of a job of which no pod gives way to others, and all that are wanted run.
pub(crate) fn chosen(state: &State, percent_next: u32) -> Option<Job> {
    let mut records = state.jobs().map(|(_, record)| record).filter(|record| !record.removed);
    let record = records.find(|record| {
        record.current().is_some_and(|job| {
            let mut pods = state.pods_of_job(&job.job);
            !job.preemptible && job.pods_wanted() > 0 && pods.all(|pod| pod.phase == PodPhase::Running)
        })
    })?;
    rolled(record, percent_next, NEXT, false)
}

/// By job and group how many pods live, of those that a rollout changes, and are wanted.
pub(crate) fn floor(job: &Job, machines: &[Machine]) -> BTreeMap<String, usize> {
    let rolled = job.groups.iter().filter(|(_, group)| group.rollout.is_some());
    let floor = rolled.map(|(name, group)| {
        let name = format!("{}/{name}", job.job);
        let floor = alive(&name, machines).min(group.count as usize);
        (name, floor)
    });
    floor.collect()
}

/// The same of all groups, of which there may be two versions.
pub(crate) fn alive_of(job: &Job, machines: &[Machine]) -> BTreeMap<String, usize> {
    let is_single = |group: &Group| group.availability() == Availability::Singleton;
    let groups = job.groups.iter().filter(|(_, group)| !is_single(group));
    let floor = groups.map(|(name, group)| {
        let name = format!("{}/{name}", job.job);
        let floor = alive(&name, machines).min(group.count as usize);
        (name, floor)
    });
    floor.collect()
}

pub(crate) fn holds(floor: &BTreeMap<String, usize>, machines: &[Machine]) -> Result<(), String> {
    for (group, floor) in floor {
        let now = alive(group, machines);
        if now < *floor {
            return Err(format!("in a rollout {now} pods of {group} live, and {floor} did before"));
        }
    }
    Ok(())
}

fn alive(group: &str, machines: &[Machine]) -> usize {
    let processes = machines.iter().flat_map(|machine| machine.processes.values());
    processes.filter(|process| process.lives && process.group == group).count()
}
