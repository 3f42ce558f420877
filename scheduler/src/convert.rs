//! Between the messages of the contract and the types of `scheduler-core`.
//!
//! What comes from outside is checked here for its form alone; what it means is checked in the core.

use std::collections::BTreeMap;

use hextet_api::{address, v1};
use hextet_lifecycle::Ending;
use scheduler_core::{
    assignment::{Assigned, Diff},
    countable::Countables,
    ending::LastEnding,
    endpoint::{Endpoint, EndpointState},
    event::{Conflict, Mac, PodReport},
    job::{Availability, Group, Job, Task},
    node::{Hello, Node, NodePhase},
    pod::{Pod, PodId, PodPhase},
    quantity::{Cpu, Memory, Resources},
    state::State,
};

mod deploy;
mod hook;
mod placement;

pub(crate) use self::deploy::deploy;
pub use self::deploy::{schedule_from_message, schedule_to_message};

/// Why a message cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A part that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// Two of one name.
    #[error("{0} is there twice")]
    Twice(String),
    /// A number that the contract does not know.
    #[error("{field}: {value} is not known to this server")]
    Unknown {
        /// Where it is.
        field: &'static str,
        /// The number.
        value: i32,
    },
    /// Bytes that are not an Ethernet address.
    #[error("conflict.mac: it has 6 bytes")]
    Mac,
    /// Bytes that are not an address.
    #[error("{field}")]
    Address {
        /// Where they are.
        field: &'static str,
        /// What is wrong with them.
        source: address::AddressError,
    },
}

/// A job as a message.
#[must_use]
pub fn job_to_message(job: &Job) -> v1::Job {
    let groups = job.groups.iter().map(|(name, group)| group_to_message(name, group));
    v1::Job {
        name: job.job.clone(),
        groups: groups.collect(),
        priority: job.priority,
        preempts: job.preempts,
        preemptible: job.preemptible,
    }
}

/// A job from a message.
///
/// # Errors
/// Only what its form does not allow; [`Job::validate`] checks the rest.
pub fn job_from_message(message: v1::Job) -> Result<Job, ConvertError> {
    let mut groups = BTreeMap::new();
    for group in message.groups {
        let (name, group) = group_from_message(group)?;
        if groups.contains_key(&name) {
            return Err(ConvertError::Twice(format!("groups.{name}")));
        }
        groups.insert(name, Box::new(group));
    }
    let v1::Job { name: job, priority, preempts, preemptible, .. } = message;
    Ok(Job { job, priority, preempts, preemptible, groups })
}

fn group_to_message(name: &str, group: &Group) -> v1::Group {
    let availability = match group.availability {
        None => v1::Availability::Unspecified,
        Some(Availability::Ha) => v1::Availability::Ha,
        Some(Availability::Pet) => v1::Availability::Pet,
        Some(Availability::Singleton) => v1::Availability::Singleton,
    };
    let (spread, spread_label) = placement::spread_to_message(&group.spread);
    let (constraints, rules) = placement::constraints_to_message(&group.constraints);
    v1::Group {
        name: name.to_owned(),
        count: group.count,
        availability: availability.into(),
        spread: spread.into(),
        spread_label,
        constraints,
        rules,
        apart: group.apart.iter().map(placement::apart_to_message).collect(),
        countables: group.resources.0.clone(),
        rollout: group.rollout.map(placement::rollout_to_message),
        tasks: group.tasks.iter().map(|(name, task)| task_to_message(name, task)).collect(),
        hooks: group.hooks.iter().map(|(name, hook)| hook::to_message(name, hook)).collect(),
    }
}

fn group_from_message(message: v1::Group) -> Result<(String, Group), ConvertError> {
    let unknown = |field, value| ConvertError::Unknown { field, value };
    let availability = match v1::Availability::try_from(message.availability) {
        Ok(v1::Availability::Unspecified) => None,
        Ok(v1::Availability::Ha) => Some(Availability::Ha),
        Ok(v1::Availability::Pet) => Some(Availability::Pet),
        Ok(v1::Availability::Singleton) => Some(Availability::Singleton),
        Err(_) => return Err(unknown("availability", message.availability)),
    };
    let spread = placement::spread_from_message(message.spread, message.spread_label)?;
    let constraints = placement::constraints_from_message(message.constraints, message.rules)?;
    let mut tasks = BTreeMap::new();
    for task in message.tasks {
        if tasks.contains_key(&task.name) {
            return Err(ConvertError::Twice(format!("groups.{}.tasks.{}", message.name, task.name)));
        }
        tasks.insert(task.name.clone(), Box::new(task_from_message(task)));
    }
    let apart = message.apart.into_iter().map(placement::apart_from_message).collect();
    let rollout = message.rollout.map(placement::rollout_from_message);
    let (count, resources) = (message.count, Countables(message.countables));
    let hooks = hook::from_messages(&message.name, message.hooks)?;
    let name = message.name;
    Ok((name, Group { count, availability, spread, constraints, apart, resources, rollout, hooks, tasks }))
}

fn task_to_message(name: &str, task: &Task) -> v1::Task {
    let resources = Resources { cpu: task.cpu, memory: task.memory };
    let (exec, env) = (task.exec.clone(), task.env.clone());
    let resources = Some(resources_to_message(resources, &task.resources));
    v1::Task { name: name.to_owned(), exec, env, resources }
}

/// A task that asks for nothing gets what one in a file gets.
fn task_from_message(message: v1::Task) -> Task {
    let default = Resources { cpu: Cpu(100), memory: Memory(64 << 20) };
    let none = || (default, Countables::default());
    let (Resources { cpu, memory }, resources) = message.resources.map_or_else(none, resources_from_message);
    Task { exec: message.exec, env: message.env, cpu, memory, resources }
}

fn resources_to_message(resources: Resources, countables: &Countables) -> v1::Resources {
    v1::Resources {
        cpu_millis: resources.cpu.0,
        memory_bytes: resources.memory.0,
        countables: countables.0.clone(),
    }
}

fn resources_from_message(message: v1::Resources) -> (Resources, Countables) {
    let resources = Resources { cpu: Cpu(message.cpu_millis), memory: Memory(message.memory_bytes) };
    (resources, Countables(message.countables))
}

/// A job and how far it is.
#[must_use]
pub fn job_status(state: &State, name: &str) -> Option<v1::JobStatus> {
    let record = state.job_record(name)?;
    let job = record.current()?;
    let running = state.pods_of_job(name).filter(|pod| pod.phase == PodPhase::Running).count();
    Some(v1::JobStatus {
        job: Some(job_to_message(job)),
        version: record.version,
        pods_wanted: u32::try_from(job.pods_wanted()).unwrap_or(u32::MAX),
        pods_running: u32::try_from(running).unwrap_or(u32::MAX),
        applied_unix_ms: record.applied.0,
        changer: record.changer.clone(),
        equals: record.equals.unwrap_or_default(),
    })
}

/// A pod as a message.
#[must_use]
pub fn pod(pod: &Pod) -> v1::Pod {
    let phase = match pod.phase {
        PodPhase::Pending => v1::PodPhase::Pending,
        PodPhase::Starting => v1::PodPhase::Starting,
        PodPhase::Running => v1::PodPhase::Running,
        PodPhase::Failed => v1::PodPhase::Failed,
        PodPhase::Terminating => v1::PodPhase::Terminating,
        PodPhase::Lost => v1::PodPhase::Lost,
    };
    v1::Pod {
        id: pod.id.to_string(),
        job: pod.job.clone(),
        group: pod.group.clone(),
        job_version: pod.job_version,
        node: pod.node.clone().unwrap_or_default(),
        address: pod.address.map(|address| address.octets().to_vec()).unwrap_or_default(),
        phase: phase.into(),
        message: pod.message.clone(),
        created_unix_ms: pod.created.0,
        restarts: pod.restarts,
        standby: pod.standby,
    }
}

/// How a pod failed last.
#[must_use]
pub fn ending(ending: &LastEnding) -> v1::LastEnding {
    v1::LastEnding {
        what: ending.what.clone(),
        output: ending.output.clone(),
        unix_ms: ending.time.0,
        job_version: ending.job_version,
    }
}

/// A node and what is asked of it.
#[must_use]
pub fn node(state: &State, node: &Node) -> v1::Node {
    let usage = state.usage(&node.name);
    let phase = match node.phase {
        NodePhase::Joined => v1::NodePhase::Joined,
        NodePhase::Ready => v1::NodePhase::Ready,
        NodePhase::CutOff => v1::NodePhase::CutOff,
        NodePhase::Lost => v1::NodePhase::Lost,
        NodePhase::Dead => v1::NodePhase::Dead,
    };
    v1::Node {
        name: node.name.clone(),
        prefix: Some(node.prefix.network().into()),
        underlay: node.underlay.map(|address| address.octets().to_vec()).unwrap_or_default(),
        underlay_v4: node.underlay_v4.map(|address| address.octets().to_vec()).unwrap_or_default(),
        group_id: node.group_id.bits(),
        labels: node.labels.clone(),
        capacity: Some(resources_to_message(node.capacity, &node.countables)),
        used: Some(v1::Resources {
            cpu_millis: u32::try_from(usage.cpu_millis).unwrap_or(u32::MAX),
            memory_bytes: usage.memory_bytes,
            countables: usage.countables.0,
        }),
        phase: phase.into(),
        pods: usage.pods,
        joined_unix_ms: node.joined.0,
        agent_version: node.agent_version.clone(),
    }
}

/// What a node says of itself.
///
/// # Errors
/// A part is missing, or bytes are not an address.
pub fn hello(message: v1::NodeHello) -> Result<Hello, ConvertError> {
    let underlay = address::ipv6(&message.underlay)
        .map_err(|source| ConvertError::Address { field: "underlay", source })?;
    let v4 = Some(&message.underlay_v4).filter(|bytes| !bytes.is_empty());
    let underlay_v4 = v4
        .map(|bytes| address::ipv4(bytes))
        .transpose()
        .map_err(|source| ConvertError::Address { field: "underlay_v4", source })?;
    let capacity = message.capacity.ok_or(ConvertError::Missing("capacity"))?;
    let (capacity, countables) = resources_from_message(capacity);
    Ok(Hello {
        underlay,
        underlay_v4,
        labels: message.labels,
        capacity,
        countables,
        agent_version: message.agent_version,
        machine: message.machine,
        hardware: message.hardware,
        session: message.session,
    })
}

/// How a pod is, in the words of its node.
///
/// # Errors
/// A phase that nodes do not report.
pub fn pod_report(message: v1::PodReport) -> Result<PodReport, ConvertError> {
    let phase = match v1::PodPhase::try_from(message.phase) {
        Ok(v1::PodPhase::Starting) => PodPhase::Starting,
        Ok(v1::PodPhase::Running) => PodPhase::Running,
        Ok(v1::PodPhase::Failed) => PodPhase::Failed,
        // Of a pod that is gone there is no phase left to tell.
        _ if message.gone => PodPhase::Terminating,
        _ => return Err(ConvertError::Unknown { field: "phase", value: message.phase }),
    };
    let ending = message.ending.map(|ending| Ending {
        for_good: ending.for_good,
        ..Ending::new(&ending.what, ending.output.as_bytes())
    });
    Ok(PodReport {
        id: PodId(message.id),
        phase,
        message: message.message,
        restarts: message.restarts,
        gone: message.gone,
        ending,
        version: Some(message.job_version).filter(|version| *version > 0),
    })
}

/// Another machine has the address of a pod.
///
/// # Errors
/// Bytes that are not an address.
pub fn conflict(message: v1::AddressConflict) -> Result<Conflict, ConvertError> {
    let address = address::ipv6(&message.address)
        .map_err(|source| ConvertError::Address { field: "conflict.address", source })?;
    let mac = message.mac.try_into().map_err(|_| ConvertError::Mac)?;
    Ok(Conflict { pod: PodId(message.pod), address, mac: Mac(mac) })
}

/// What a node is told.
#[must_use]
pub fn assignment(diff: Diff, revision: u64, epoch: &str, full: bool) -> v1::Assignment {
    let peers = diff.peers.into_iter().map(|(name, peer)| v1::Peer {
        name,
        prefix: Some(peer.prefix.network().into()),
        underlay: peer.underlay.octets().to_vec(),
        lost: peer.lost,
        left: peer.left.iter().map(|address| address.octets().to_vec()).collect(),
    });
    v1::Assignment {
        revision,
        epoch: epoch.to_owned(),
        full,
        peers: peers.collect(),
        removed_peers: diff.removed_peers,
        pods: diff.pods.iter().map(|(id, pod)| pod_assignment(id, pod)).collect(),
        removed_pods: diff.removed_pods.into_iter().map(|id| id.0).collect(),
        term: diff.term,
        servers: vec![],
        ca: vec![],
    }
}

fn pod_assignment(id: &PodId, pod: &Assigned) -> v1::PodAssignment {
    let tasks = pod.spec().map(|group| &group.tasks).into_iter().flatten();
    let hooks = pod.spec().map(|group| &group.hooks).into_iter().flatten();
    v1::PodAssignment {
        id: id.to_string(),
        job: pod.job.job.clone(),
        group: pod.group.clone(),
        address: pod.address.octets().to_vec(),
        tasks: tasks.map(|(name, task)| task_to_message(name, task)).collect(),
        job_version: pod.job_version,
        singleton: pod.spec().is_some_and(|group| group.availability() == Availability::Singleton),
        serial: pod.serial,
        hooks: hooks.map(|(name, hook)| hook::to_message(name, hook)).collect(),
    }
}

/// A pod's address as load balancers see it.
#[must_use]
pub fn endpoint(endpoint: &Endpoint) -> v1::Endpoint {
    let state = match endpoint.state {
        EndpointState::Starting => v1::EndpointState::Starting,
        EndpointState::Ready => v1::EndpointState::Ready,
        EndpointState::Terminating => v1::EndpointState::Terminating,
    };
    v1::Endpoint {
        pod: endpoint.pod.to_string(),
        group: endpoint.group.clone(),
        node: endpoint.node.clone(),
        address: endpoint.address.octets().to_vec(),
        state: state.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "
job: hello
priority: -3
preempts: true
preemptible: true
groups:
  web: {count: 3, hooks: {m: {exec: [/bin/m], undo: [/bin/u], env: {PGPASSWORD: hush}, before: [running], timeout: 5m, attempts: 2, optional: true}, e: {exec: [/bin/e], on: [pod-failed]}}, availability: pet, spread: pack, constraints: {disk: fast, rack: [a, b], cores: {at-least: 4, not: [5]}}, resources: {gpu: 1}, apart: [{by: rack}, {from: other/db}], tasks: {a: {exec: [/bin/a, b], env: {K: v}, cpu: 2, memory: 1Gi, resources: {gpu: 2}}}}
  db: {spread: rack, rollout: {previous: 3, next: 4, percent-next: 20}, tasks: {a: {exec: [/bin/a]}}}
";

    #[test]
    fn a_job_survives_the_contract() {
        let job: Job = serde_norway::from_str(JOB).unwrap();
        assert_eq!(job_from_message(job_to_message(&job)), Ok(job));
    }

    #[test]
    fn a_message_with_two_of_a_name_or_an_unknown_number_is_refused() {
        let job: Job = serde_norway::from_str(JOB).unwrap();
        let change = |with: fn(&mut v1::Job)| {
            let mut message = job_to_message(&job);
            with(&mut message);
            job_from_message(message).unwrap_err().to_string()
        };
        assert_eq!(change(|job| job.groups.push(job.groups[0].clone())), "groups.db is there twice");
        assert_eq!(change(|job| job.groups[0].spread = 9), "spread: 9 is not known to this server");
        let twice: fn(&mut v1::Job) = |job| {
            let task = job.groups[1].tasks[0].clone();
            job.groups[1].tasks.push(task);
        };
        assert_eq!(change(twice), "groups.web.tasks.a is there twice");
    }

    #[test]
    fn a_task_without_requests_gets_those_of_a_file() {
        let message = v1::Task { name: "t".into(), exec: vec!["/x".into()], ..v1::Task::default() };
        assert_eq!(task_from_message(message).cpu, Cpu(100));
    }
}
