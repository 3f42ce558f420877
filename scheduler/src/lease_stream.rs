//! One node's lease: its numbers renew it, grants answer them, and questions about silent neighbours go the same way.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hextet_api::{
    address,
    v1::{
        LeaseAnswer, LeaseGrant, LeaseHolder, LeaseRenewal, LookFor, NeighbourSeen, lease_answer::Answer,
        lease_renewal::Renewal,
    },
};
use scheduler_core::{
    claim::Claimant,
    event::{Event, Refusal},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time,
};
use tonic::{Status, Streaming};
use tracing::debug;

use crate::{
    claim,
    hub::Hub,
    service,
    session::{self, HELLO_MAX},
    writer::WriteError,
};

/// A node renews its lease this often in the time after which a silent one is asked about.
const RENEWALS_PER_SILENCE: u32 = 4;

/// Where a node reads its grants.
pub(crate) type Out = mpsc::Sender<Result<LeaseAnswer, Status>>;

/// The streams of the nodes that hold a lease, by name.
#[derive(Default)]
pub(crate) struct LeaseStreams(Mutex<BTreeMap<String, Handle>>);

pub(crate) struct Handle {
    out: Out,
    /// Dropped when another stream takes over, or the node leaves.
    _end: oneshot::Sender<()>,
}

impl LeaseStreams {
    /// Asks `node` about another, if it listens. One that does not keep up is not asked: its neighbours are.
    pub(crate) fn ask(&self, node: &str, look_for: LookFor) {
        if let Some(handle) = self.lock().get(node) {
            let _ = handle.out.try_send(Ok(LeaseAnswer { answer: Some(Answer::LookFor(look_for)) }));
        }
    }

    /// Ends the stream of `node`: renewals that are on their way would bring it back.
    pub(crate) fn end(&self, node: &str) {
        self.lock().remove(node);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Handle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves a node's lease until its stream ends. A later stream of the same machine takes its place.
pub(crate) async fn run(hub: Arc<Hub>, node: String, mut renewals: Streaming<LeaseRenewal>, out: Out) {
    if let Err(status) = greet(&hub, &node, &mut renewals).await {
        // Who has gone need not hear it.
        let _ = out.try_send(Err(status));
        return;
    }
    let (ends, end) = oneshot::channel();
    hub.lease_streams.lock().insert(node.clone(), Handle { out: out.clone(), _end: ends });
    let mut holder = Holder { hub: hub.clone(), node: node.clone(), out: out.clone(), returning: None };
    tokio::select! {
        () = holder.read(&mut renewals) => {}
        () = hub.closed() => {}
        () = out.closed() => {}
        _ = end => return,
    }
    hub.leases().ended(&node, hub.clock.now());
    let mut streams = hub.lease_streams.lock();
    if streams.get(&node).is_some_and(|last| last.out.same_channel(&out)) {
        streams.remove(&node);
    }
}

/// The first message says which machine it is; an agent that does not know how begins with a number.
async fn greet(hub: &Hub, node: &str, renewals: &mut Streaming<LeaseRenewal>) -> Result<(), Status> {
    let first = time::timeout(HELLO_MAX, renewals.message()).await;
    let first =
        first.map_err(|_| Status::deadline_exceeded("the node did not say which machine it is"))??;
    let holder = match first.and_then(|first| first.renewal) {
        Some(Renewal::Holder(holder)) => holder,
        _ => LeaseHolder::default(),
    };
    if is_over(hub, node, &holder.machine, holder.session) {
        return Err(service::status(WriteError::Refused(Refusal::TakenDown(node.to_owned()))));
    }
    let LeaseHolder { machine, hardware, underlay, .. } = &holder;
    claim::claim(hub, node, Claimant { machine, hardware, underlay: address::ipv6(underlay).ok() })
}

/// Whether this agent was taken down, and what it said before comes late.
pub(crate) fn is_over(hub: &Hub, node: &str, machine: &str, session: u64) -> bool {
    hub.state().nodes().get(node).is_some_and(|node| node.is_over(machine, session))
}

struct Holder {
    hub: Arc<Hub>,
    node: String,
    out: Out,
    /// The state is being told that the node reports again.
    returning: Option<JoinHandle<()>>,
}

impl Holder {
    async fn read(&mut self, renewals: &mut Streaming<LeaseRenewal>) {
        while let Ok(Some(renewal)) = renewals.message().await {
            match renewal.renewal {
                Some(Renewal::Number(number)) => self.renew(number),
                Some(Renewal::Seen(NeighbourSeen { node, is_there })) => {
                    self.hub.leases().answered(&self.node, &node, is_there);
                }
                Some(Renewal::Holder(_)) | None => {}
            }
        }
    }

    fn renew(&mut self, number: u64) {
        // Its silence is that of a server that is away.
        if self.hub.ahead.has(&self.node) {
            return;
        }
        let mut leases = self.hub.leases();
        let now = self.hub.clock.now();
        leases.renew(&self.node, now);
        let granted = leases.grant(&self.node, now);
        let renew = leases.silence_max() / RENEWALS_PER_SILENCE;
        drop(leases);
        let Some(lease) = granted else { return self.returns() };
        let term = self.hub.state().nodes().get(&self.node).map_or(0, |node| node.term);
        let grant = LeaseGrant { number, lease_ms: ms(lease), renew_ms: ms(renew), term };
        // A node that does not read its grants holds no lease.
        let _ = self.out.try_send(Ok(LeaseAnswer { answer: Some(Answer::Grant(grant)) }));
    }

    /// The state holds that the node does not report. Renewals go on being read while that is put right. A node that was
    /// taken down comes back by a hello alone.
    fn returns(&mut self) {
        if self.hub.state().nodes().get(&self.node).is_some_and(|node| node.taken_down.is_some()) {
            return;
        }
        if self.returning.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let (hub, node) = (self.hub.clone(), self.node.clone());
        self.returning = Some(tokio::spawn(async move {
            if let Err(error) = hub.write(session::origin(&node), Event::NodeReturned(node.clone())).await {
                debug!(%node, %error, "its return waits for the store");
            }
        }));
    }
}

fn ms(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}
