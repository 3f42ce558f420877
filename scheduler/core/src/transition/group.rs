//! Makes the pods of a group what its job says, and takes pods away in order.

use crate::{
    change::JobRecord,
    draft::Draft,
    job::{Availability, Group},
    node::NodePhase,
    placement,
    pod::{Pod, PodId, PodPhase},
    transition::{Context, Step, rollout},
};

/// Makes the pods of one group what `wanted` says; `None` is none at all.
pub(super) fn reconcile(
    draft: &mut Draft<'_>,
    job: &str,
    group: &str,
    wanted: Option<&Group>,
    context: &mut Context<'_>,
) {
    let Some(wanted) = wanted else {
        let why = "its group is no longer wanted";
        return live(draft, job, group).into_iter().for_each(|pod| stop(draft, pod, why, context));
    };
    if let Some(sides) = rollout::sides(draft, job, group, wanted) {
        return rollout::reconcile(draft, (job, group), wanted, &sides, context);
    }
    end_standby(draft, live(draft, job, group), wanted.count as usize, context);
    let version = draft.job_record(job).map_or(0, |record| record.version);
    for pod in live(draft, job, group) {
        give(draft, pod, (wanted, version), context);
    }
    scale(draft, job, group, wanted, context);
}

/// Gives a pod another text, or stops it if that cannot be where it is.
pub(super) fn give(draft: &mut Draft<'_>, pod: Pod, (wanted, version): (&Group, u32), context: &Context<'_>) {
    match fate(draft, &pod, wanted) {
        Fate::IsSame | Fate::Waits => {}
        Fate::Goes(on) => renew(draft, pod, (wanted, version), on),
        Fate::IsReplaced(why) => stop(draft, pod, &why, context),
    }
}

/// What a new text of its job means to a pod.
pub(super) enum Fate {
    /// It is what is wanted.
    IsSame,
    /// What becomes of it is decided when its node is back.
    Waits,
    /// It goes on at the same place and address.
    Goes(On),
    /// It cannot stay where it is.
    IsReplaced(String),
}

/// How a pod goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum On {
    /// Only what is kept free for it has changed, or its hooks: its tasks go on.
    Unharmed,
    /// Its node starts other programs.
    Restarted,
}

pub(super) fn fate(draft: &Draft<'_>, pod: &Pod, wanted: &Group) -> Fate {
    let node = draft.node_of(pod);
    if let Some(reason) = node.and_then(|node| placement::unmet(&wanted.constraints, node)) {
        return Fate::IsReplaced(format!("its node no longer fits: {reason}"));
    }
    if wanted.availability() == Availability::Singleton && is_from_before(draft, pod) {
        return Fate::IsReplaced("pods from before the restore may be later ones than it".to_owned());
    }
    let now = draft.group_of(pod);
    let same = |now: &Group| {
        now.tasks == wanted.tasks && now.resources == wanted.resources && now.hooks == wanted.hooks
    };
    if now.is_some_and(same) {
        return Fate::IsSame;
    }
    match node {
        Some(node) if !fits(draft, pod, wanted) => match node.phase {
            NodePhase::Ready => Fate::IsReplaced("its node has no room for its new requests".to_owned()),
            _ => Fate::Waits,
        },
        _ if now.is_some_and(|now| same_programs(now, wanted)) => Fate::Goes(On::Unharmed),
        // It goes on as it is, and serves, until its node hears of it.
        Some(node) if node.phase != NodePhase::Ready => Fate::Waits,
        _ => Fate::Goes(On::Restarted),
    }
}

/// Whether this is not surely later than all of its group that a restored cluster does not know of, or one of these may
/// still live.
fn is_from_before(draft: &Draft<'_>, pod: &Pod) -> bool {
    pod.serial < draft.counters().restored_from || (draft.restored().is_some() && pod.node.is_some())
}

/// Whether both run the same programs in the same environment.
fn same_programs(now: &Group, wanted: &Group) -> bool {
    let programs = |group: &Group| -> Vec<_> {
        group.tasks.iter().map(|(name, task)| (name.clone(), task.exec.clone(), task.env.clone())).collect()
    };
    programs(now) == programs(wanted)
}

/// Whether the node of `pod` has room for what `wanted` asks for in its place.
fn fits(draft: &Draft<'_>, pod: &Pod, wanted: &Group) -> bool {
    let Some(node) = draft.node_of(pod) else { return true };
    let (usage, needs, has) = (draft.usage(&node.name), wanted.resources(), pod.resources);
    let countables = wanted.countables();
    let counted = countables.0.iter().all(|(name, number)| {
        let others = usage.countables.get(name) - pod.countables.get(name);
        *number <= pod.countables.get(name) || others.saturating_add(*number) <= node.countables.get(name)
    });
    let cpu = usage.cpu_millis - u64::from(has.cpu.0) + u64::from(needs.cpu.0);
    let memory = usage.memory_bytes.saturating_sub(has.memory.0).saturating_add(needs.memory.0);
    // Less of both always fits, also on a node that has shrunk.
    let no_more = needs.cpu <= has.cpu && needs.memory <= has.memory;
    counted && (no_more || (cpu <= u64::from(node.capacity.cpu.0) && memory <= node.capacity.memory.0))
}

pub(super) fn renew(draft: &mut Draft<'_>, pod: Pod, (wanted, version): (&Group, u32), on: On) {
    let restarts =
        on == On::Restarted && matches!(pod.phase, PodPhase::Starting | PodPhase::Running | PodPhase::Failed);
    let (phase, message) = match restarts {
        true => (PodPhase::Starting, format!("its tasks are of version {version} now")),
        false => (pod.phase, pod.message.clone()),
    };
    let (resources, countables) = (wanted.resources(), wanted.countables());
    draft.put_pod(Pod { job_version: version, resources, countables, phase, message, ..pod });
}

/// Makes as many pods as are missing, or stops those that are too many: pending ones first, then lost ones,
/// then the newest.
fn scale(draft: &mut Draft<'_>, job: &str, group: &str, wanted: &Group, context: &mut Context<'_>) {
    let mut pods = live(draft, job, group);
    let count = wanted.count as usize;
    for _ in pods.len()..count {
        create(draft, job, group, wanted, context);
    }
    if pods.len() <= count {
        return;
    }
    let order = |pod: &Pod| match pod.phase {
        PodPhase::Pending => 0,
        PodPhase::Lost => 1,
        _ => 2,
    };
    pods.sort_by_key(|pod| (order(pod), u64::MAX - pod.serial));
    let too_many = pods.len() - count;
    pods.into_iter().take(too_many).for_each(|pod| stop(draft, pod, "fewer pods are wanted", context));
}

/// A new pod of the version in force that waits for a place.
fn create(draft: &mut Draft<'_>, job: &str, group: &str, wanted: &Group, context: &Context<'_>) -> Pod {
    let version = draft.job_record(job).map_or(0, |record| record.version);
    create_of(draft, job, group, wanted, version, context)
}

/// A serial number that no pod has had, and the id that follows from it.
pub(super) fn next_id(draft: &mut Draft<'_>, job: &str, group: &str) -> (u64, PodId) {
    let serial = draft.next_serial();
    let id_key = draft.cluster().map_or(0, |cluster| cluster.id_key);
    (serial, PodId::of(job, group, serial, id_key))
}

/// A new pod that waits for a place.
pub(super) fn create_of(
    draft: &mut Draft<'_>,
    job: &str,
    group: &str,
    wanted: &Group,
    job_version: u32,
    context: &Context<'_>,
) -> Pod {
    let (serial, id) = next_id(draft, job, group);
    let pod = Pod {
        id,
        job: job.to_owned(),
        group: group.to_owned(),
        job_version,
        serial,
        resources: wanted.resources(),
        countables: wanted.countables(),
        node: None,
        address: None,
        phase: PodPhase::Pending,
        message: String::new(),
        created: context.wall,
        restarts: 0,
        stop: false,
        standby: false,
    };
    draft.put_pod(pod.clone());
    pod
}

/// Without a rollout nothing stands by: such pods serve, as far as they are wanted.
fn end_standby(draft: &mut Draft<'_>, pods: Vec<Pod>, count: usize, context: &Context<'_>) {
    let surplus = pods.len().saturating_sub(count);
    let mut standing: Vec<Pod> = pods.into_iter().filter(|pod| pod.standby).collect();
    let serving = standing.split_off(surplus.min(standing.len()));
    standing.into_iter().for_each(|pod| stop(draft, pod, "fewer pods are wanted", context));
    set_standby(draft, serving, false);
}

/// Shows pods to load balancers, or keeps them back.
pub(super) fn set_standby(draft: &mut Draft<'_>, pods: Vec<Pod>, standby: bool) {
    for pod in pods.into_iter().filter(|pod| pod.standby != standby) {
        draft.put_pod(Pod { standby, ..pod });
    }
}

/// Takes a pod away: at once when nothing of it runs; otherwise load balancers are told first, if there are
/// any, and then its node.
pub(super) fn stop(draft: &mut Draft<'_>, pod: Pod, why: &str, context: &Context<'_>) {
    if !may_live(draft, &pod) {
        return forget(draft, &pod);
    }
    let stop = pod.standby || !(context.is_watched)(&pod);
    draft.put_pod(Pod { phase: PodPhase::Terminating, message: why.to_owned(), stop, ..pod });
}

/// Load balancers know that these pods terminate, or have had the time to.
pub(super) fn drained(draft: &mut Draft<'_>, pods: &[PodId]) -> Step {
    let mut stopped = 0;
    for id in pods {
        let Some(pod) = draft.pods().get(id).map(|pod| Pod::clone(pod)) else { continue };
        if pod.phase == PodPhase::Terminating && !pod.stop {
            stopped += 1;
            draft.put_pod(Pod { stop: true, ..pod });
        }
    }
    Step { message: format!("{stopped} pods drained"), replan: false }
}

/// The record of a pod of which nothing is left. With the last pod of a deleted job goes its text.
pub(super) fn forget(draft: &mut Draft<'_>, pod: &Pod) {
    draft.forget_pod(&pod.id);
    let Some(record) = draft.job_record(&pod.job).cloned() else { return };
    if record.removed && !record.versions.is_empty() && draft.pods_of_job(&pod.job).next().is_none() {
        draft.put_job(&pod.job, JobRecord { versions: Default::default(), ..JobRecord::clone(&record) });
    }
}

/// Whether something of a pod may run somewhere. What runs on a node that is lost does not count, unless there may
/// only be one.
pub(super) fn may_live(draft: &Draft<'_>, pod: &Pod) -> bool {
    let node = draft.node_of(pod);
    node.is_some_and(|node| match is_singleton(draft, pod) {
        true => !node.fenced,
        false => node.phase.has_pods(),
    })
}

/// Whether there may never be two that live.
pub(super) fn is_singleton(draft: &Draft<'_>, pod: &Pod) -> bool {
    let group = draft.group_of(pod);
    group.is_some_and(|group| group.availability() == Availability::Singleton)
}

/// Pods that count towards the group's `count`, in the order in which they were made.
pub(super) fn live(draft: &Draft<'_>, job: &str, group: &str) -> Vec<Pod> {
    let wanted = draft.pods_of_group(job, group).filter(|pod| pod.is_wanted());
    wanted.map(|pod| Pod::clone(pod)).collect()
}
