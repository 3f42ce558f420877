//! From a state and an event to one revision, or to a refusal that changes nothing.
//!
//! Each event makes at most one revision, however many pods it touches. What the event itself means is in
//! the modules below; afterwards, when nodes or room have changed, pods without a place are tried again.

use rand::RngCore;

use crate::{
    change::{Key, Revision, Value},
    cluster::Cluster,
    draft::Draft,
    event::{Event, Refusal},
    pod::Pod,
    state::State,
    time::WallTime,
};

mod address;
mod authority;
mod deploy;
mod enroll;
mod group;
mod job;
mod node;
mod place;
mod preempt;
mod renew;
mod restore;
mod rollout;
mod version;

/// The most pods of all jobs together.
pub const PODS_MAX: u64 = 2_000_000;

/// What a transition needs to know besides the state.
pub struct Context<'a> {
    /// For people to read, and for how long tokens are good.
    pub wall: WallTime,
    /// For addresses.
    pub rng: &'a mut dyn RngCore,
    /// Whether a load balancer has to be told before this pod is stopped.
    pub is_watched: &'a dyn Fn(&Pod) -> bool,
}

/// Who wants an event, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// `user:alice`, `scheduler`, `node:n1`.
    pub changer: String,
    /// Why, in their words; empty to take the scheduler's.
    pub message: String,
}

/// What a module below did.
struct Step {
    /// In words, for the log.
    message: String,
    /// Nodes or room have changed: pods without a place are tried again.
    replan: bool,
}

impl Step {
    /// There was nothing to change.
    fn nothing() -> Step {
        Step { message: String::new(), replan: false }
    }
}

/// Brings `event` about: the state is one revision further, or, when there is nothing to change, as it was.
///
/// # Errors
/// The state is then as it was.
pub fn handle(
    state: &mut State,
    event: &Event,
    origin: &Origin,
    context: &mut Context<'_>,
) -> Result<Option<Revision>, Refusal> {
    let mut draft = Draft::new(state);
    let step = match dispatch(&mut draft, event, origin, context) {
        Ok(step) => step,
        Err(refusal) => {
            draft.abandon();
            return Err(refusal);
        }
    };
    if step.replan {
        place::place_all(&mut draft, context);
    }
    let message = if origin.message.is_empty() { step.message } else { origin.message.clone() };
    version::keep(&mut draft, &message);
    Ok(draft.finish(context.wall, &origin.changer, message))
}

fn dispatch(
    draft: &mut Draft<'_>,
    event: &Event,
    origin: &Origin,
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    match event {
        Event::ClusterCreated(cluster) => create_cluster(draft, cluster),
        Event::ApplyJob(job, texts) => job::apply(draft, (job, None), texts, &origin.changer, context),
        Event::ApplyJobAt(version, job, texts) => {
            job::check_version(draft, &job.job, *version)?;
            job::apply(draft, (job, None), texts, &origin.changer, context)
        }
        Event::RollbackJob(job, to, texts) => {
            job::apply(draft, (job, Some(*to)), texts, &origin.changer, context)
        }
        Event::DeleteJob(name) => job::delete(draft, name, &origin.changer, context),
        Event::Deploy(job, schedule) => deploy::begin(draft, job, schedule, &origin.changer, context),
        Event::DeployMoved(id, moves, decided) => {
            Ok(deploy::advance(draft, (id, *moves), decided, &origin.changer, context))
        }
        Event::DeployOrder(id, order) => deploy::order(draft, id, *order, &origin.changer, context),
        Event::CreateToken(id, token) => enroll::create_token(draft, id, token, context.wall),
        Event::Enroll(enroll) => enroll::enroll(draft, enroll, context.wall),
        Event::Renew(renewal) => renew::renew(draft, renewal, context.wall),
        Event::KeyUsed(holder, key) => Ok(renew::confirm(draft, holder, key)),
        Event::TurnCa(turn) => authority::turn(draft, turn, context.wall),
        Event::LateCa(holder, key, ends) => Ok(authority::late(draft, holder, key, *ends)),
        Event::NodeHello(name, hello) => node::hello(draft, name, hello, context),
        Event::NodeReturned(name) => node::returned(draft, name, context),
        Event::PodReports(name, reports) => node::reports(draft, name, reports, context),
        Event::AddressConflict(name, conflict) => address::conflict(draft, name, conflict, context),
        Event::LeaseEnded(names) => Ok(node::lease_ended(draft, names)),
        Event::CutOff(names) => Ok(node::cut_off(draft, names)),
        Event::Fenced(names) => Ok(node::fenced(draft, names)),
        Event::NodeDead(name) => node::dead(draft, name),
        Event::NodeLeaving(name, session) => Ok(node::leaving(draft, name, *session)),
        Event::Drained(pods) => Ok(group::drained(draft, pods)),
        Event::DeleteNode(name) => node::delete(draft, name, context),
        Event::Restored(mark) => Ok(restore::restored(draft, mark, context)),
        Event::RestoreSettled => Ok(restore::settled(draft)),
    }
}

fn create_cluster(draft: &mut Draft<'_>, cluster: &Cluster) -> Result<Step, Refusal> {
    if draft.cluster().is_some() {
        return Err(Refusal::ClusterExists);
    }
    if let Some(prefix) = cluster.pod_prefix {
        enroll::check_lan(cluster.prefix, prefix)?;
    }
    draft.put(Key::Cluster, Some(Value::Cluster(cluster.clone().into())));
    Ok(Step { message: format!("cluster {} created", cluster.prefix), replan: false })
}
