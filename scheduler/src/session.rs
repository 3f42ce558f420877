//! One attached node: its reports come in, what it must run goes out.
//!
//! Three things go on at once and none waits for another: reading reports, which are signs of life; writing them down, which may wait for the disk; and telling the node what has changed.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hextet_api::v1::{self, node_command::Command, node_report::Report};
use scheduler_core::{
    claim::Claimant,
    event::{Event, Refusal},
    pod::PodId,
    session::{Inbox as Waiting, InboxFull, Telling, Told as Known},
    transition::Origin,
};
use tokio::{
    sync::{Notify, broadcast::error::RecvError, mpsc, oneshot},
    time,
};
use tonic::{Code, Status, Streaming};
use tracing::{debug, info};

use crate::{ahead, claim, convert, hub::Hub, lease_stream::is_over, service, writer::WriteError};

/// How long a node may take to say hello.
pub(crate) const HELLO_MAX: Duration = Duration::from_secs(10);
/// How long a node may take to read what it is told.
const SEND_MAX: Duration = Duration::from_secs(30);
/// Commands that wait for their node.
const COMMANDS_MAX: usize = 64;
/// After the store took nothing.
const RETRY: Duration = Duration::from_secs(1);

/// Where a node reads its commands.
pub(crate) type Out = mpsc::Sender<Result<v1::NodeCommand, Status>>;

/// The attached nodes by name.
#[derive(Default)]
pub(crate) struct Sessions(Mutex<Attached>);

#[derive(Default)]
struct Attached {
    last: u64,
    nodes: BTreeMap<String, Handle>,
}

struct Handle {
    number: u64,
    commands: mpsc::Sender<Command>,
    /// Dropped when another stream takes over, the node is lost, or deleted.
    _end: oneshot::Sender<()>,
}

/// One stream's place among [`Sessions`]; it is given up on drop.
struct Place {
    hub: Arc<Hub>,
    node: String,
    number: u64,
    commands: mpsc::Receiver<Command>,
    end: oneshot::Receiver<()>,
}

impl Sessions {
    /// Sends `node` a command if it is attached and keeps up.
    pub(crate) fn send(&self, node: &str, command: Command) -> bool {
        self.lock().nodes.get(node).is_some_and(|handle| handle.commands.try_send(command).is_ok())
    }

    /// Ends the stream of `node`, if there is one.
    pub(crate) fn end(&self, node: &str) {
        self.lock().nodes.remove(node);
    }

    /// A stream that ends in its own way is ended by nobody else while the handle is kept.
    fn let_go(&self, node: &str) -> Option<Handle> {
        self.lock().nodes.remove(node)
    }

    fn lock(&self) -> MutexGuard<'_, Attached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    fn take(hub: &Arc<Hub>, node: &str) -> Place {
        let (sender, commands) = mpsc::channel(COMMANDS_MAX);
        let (ends, end) = oneshot::channel();
        let mut attached = hub.sessions.lock();
        attached.last += 1;
        let number = attached.last;
        attached.nodes.insert(node.to_owned(), Handle { number, commands: sender, _end: ends });
        drop(attached);
        Place { hub: hub.clone(), node: node.to_owned(), number, commands, end }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut attached = self.hub.sessions.lock();
        if attached.nodes.get(&self.node).is_some_and(|handle| handle.number == self.number) {
            attached.nodes.remove(&self.node);
        }
    }
}

/// Serves a node's stream until it ends, and says why.
pub(crate) async fn run(hub: Arc<Hub>, node: String, reports: Streaming<v1::NodeReport>, out: Out) {
    let status = tokio::select! {
        status = serve(&hub, &node, reports, &out) => status,
        () = hub.closed() => Status::unavailable("the server is stopping"),
        () = out.closed() => return,
    };
    match status.code() {
        // A copy of the node asks again and again.
        Code::AlreadyExists => debug!(%node, reason = status.message(), "a stream is refused"),
        _ => info!(%node, reason = status.message(), "node detached"),
    }
    let _ = time::timeout(SEND_MAX, out.send(Err(status))).await;
}

async fn serve(hub: &Arc<Hub>, node: &str, mut reports: Streaming<v1::NodeReport>, out: &Out) -> Status {
    match greet(hub, node, &mut reports).await {
        Ok(None) => {}
        Ok(Some(leaving)) => return leave_without_agent(hub, node, &leaving).await,
        Err(status) => return status,
    }
    let mut place = Place::take(hub, node);
    let inbox = Inbox::default();
    let end = async {
        let (commands, end) = (&mut place.commands, &mut place.end);
        tokio::select! {
            status = read_reports(hub, node, reports, &inbox) => status,
            status = tell(hub, node, commands, out) => status,
            status = write_down(hub, node, &inbox) => status,
            _ = end => Status::aborted(format!("another stream of node {node} took over, its lease ended, or it was deleted")),
        }
    };
    end.await
}

/// The first word. That the node leaves is said by somebody who takes it down while its agent does not run.
async fn greet(
    hub: &Hub,
    node: &str,
    reports: &mut Streaming<v1::NodeReport>,
) -> Result<Option<v1::NodeLeaving>, Status> {
    let first = time::timeout(HELLO_MAX, reports.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("the node did not say hello"))??;
    match first.and_then(|report| report.report) {
        Some(Report::Hello(hello)) => hear_hello(hub, node, hello).await.map(|()| None),
        Some(Report::Leaving(leaving)) => Ok(Some(leaving)),
        _ => Err(Status::invalid_argument("a node says hello first")),
    }
}

async fn hear_hello(hub: &Hub, node: &str, hello: v1::NodeHello) -> Result<(), Status> {
    ahead::check(hub, node, &hello.epoch, hello.revision)?;
    let hello = convert::hello(hello).map_err(service::malformed)?;
    if is_over(hub, node, &hello.machine, hello.session) {
        return Err(service::status(WriteError::Refused(Refusal::TakenDown(node.to_owned()))));
    }
    let (machine, hardware) = (&hello.machine, &hello.hardware);
    claim::claim(hub, node, Claimant { machine, hardware, underlay: Some(hello.underlay) })?;
    hub.leases().renew(node, hub.clock.now());
    let event = Event::NodeHello(node.to_owned(), hello);
    hub.write(origin(node), event).await.map_err(service::status)?;
    info!(%node, "node attached");
    Ok(())
}

/// A node as the origin of an event.
pub(crate) fn origin(node: &str) -> Origin {
    Origin { changer: format!("node:{node}"), message: String::new() }
}

/// What a node has reported and is not written down yet.
#[derive(Default)]
struct Inbox {
    waiting: Mutex<Waiting>,
    came: Notify,
    /// The node is taken down: what it has said before would bring it back.
    is_over: AtomicBool,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, put: impl FnOnce(&mut Waiting) -> Result<(), InboxFull>) -> Result<(), Status> {
        put(&mut self.lock()).map_err(|full| Status::resource_exhausted(full.to_string()))?;
        self.came.notify_one();
        Ok(())
    }
}

async fn read_reports(
    hub: &Hub,
    node: &str,
    mut reports: Streaming<v1::NodeReport>,
    inbox: &Inbox,
) -> Status {
    loop {
        let report = match reports.message().await {
            Ok(Some(report)) => report,
            Ok(None) => return Status::cancelled("the node has ended its stream"),
            Err(status) => return status,
        };
        if let Some(Report::Leaving(v1::NodeLeaving { session, .. })) = report.report {
            return leave(hub, node, inbox, session).await;
        }
        if let Err(status) = take_report(hub, node, report, inbox) {
            return status;
        }
    }
}

/// The stream's end, without an error, tells the node that its leaving is durable.
async fn leave(hub: &Hub, node: &str, inbox: &Inbox, session: u64) -> Status {
    inbox.is_over.store(true, Ordering::Relaxed);
    let _handle = hub.sessions.let_go(node);
    write_leaving(hub, node, session).await
}

async fn write_leaving(hub: &Hub, node: &str, session: u64) -> Status {
    hub.lease_streams.end(node);
    match hub.write(origin(node), Event::NodeLeaving(node.to_owned(), session)).await {
        Ok(_) => Status::ok("the node was taken down"),
        Err(error) => service::status(error),
    }
}

/// A copy of the node's disk could say so, too: only the machine that the node was last served on is believed.
async fn leave_without_agent(hub: &Hub, node: &str, leaving: &v1::NodeLeaving) -> Status {
    let known = hub.state().nodes().get(node).map(|node| node.machine.clone());
    match known {
        Some(machine) if !machine.is_empty() && machine == leaving.machine => {
            hub.sessions.end(node);
            write_leaving(hub, node, leaving.session).await
        }
        Some(_) => Status::failed_precondition(format!(
            "node {node} was last served on another machine, or in another boot of this one; if it is dead: \
             `netctl node dead {node}`"
        )),
        None => Status::not_found(format!("there is no node {node}")),
    }
}

fn is_own(hub: &Hub, node: &str, pod: &PodId, what: &'static str) -> bool {
    hub.happenings.is_own(&hub.state(), node, pod, what)
}

fn take_report(hub: &Hub, node: &str, report: v1::NodeReport, inbox: &Inbox) -> Result<(), Status> {
    hub.leases().renew(node, hub.clock.now());
    match report.report {
        Some(Report::Pods(pods)) => {
            for pod in pods.pods {
                let report = convert::pod_report(pod).map_err(service::malformed)?;
                if !is_own(hub, node, &report.id, "phase, message and restarts") {
                    continue;
                }
                inbox.put(|waiting| waiting.report(report))?;
            }
        }
        Some(Report::Conflict(conflict)) => {
            let conflict = convert::conflict(conflict).map_err(service::malformed)?;
            if is_own(hub, node, &conflict.pod, "an address conflict") {
                inbox.put(|waiting| waiting.conflict(conflict))?;
            }
        }
        Some(Report::Events(events)) => hub.happenings.heard(node, &hub.state(), events),
        Some(Report::Hello(_) | Report::Leaving(_)) | None => {
            return Err(Status::invalid_argument("a node says hello once, first"));
        }
    }
    if hub.state().nodes().get(node).is_some_and(|node| !node.phase.reports()) {
        inbox.lock().returned();
        inbox.came.notify_one();
    }
    Ok(())
}

async fn write_down(hub: &Hub, node: &str, inbox: &Inbox) -> Status {
    loop {
        inbox.came.notified().await;
        let Some(waiting) = inbox.lock().take() else { continue };
        match write_all(hub, node, waiting.clone(), inbox).await {
            Ok(()) => {}
            Err(WriteError::Refused(refusal)) => return service::status(WriteError::Refused(refusal)),
            Err(error) => {
                debug!(%node, %error, "reports wait for the store");
                inbox.lock().put_back(waiting);
                inbox.came.notify_one();
                time::sleep(RETRY).await;
            }
        }
    }
}

async fn write_all(hub: &Hub, node: &str, waiting: Waiting, inbox: &Inbox) -> Result<(), WriteError> {
    for event in waiting.events(node) {
        if inbox.is_over.load(Ordering::Relaxed) {
            return Ok(());
        }
        hub.write(origin(node), event).await?;
    }
    Ok(())
}

async fn tell(hub: &Hub, node: &str, commands: &mut mpsc::Receiver<Command>, out: &Out) -> Status {
    let (mut revisions, mut servers, mut ca) = (hub.revisions(), hub.servers.clone(), hub.pki.issuing());
    let mut told = Told { hub, known: Known::new(node), out };
    let mut result = told.all().await;
    while result.is_ok() {
        result = tokio::select! {
            revision = revisions.recv() => match revision {
                Ok(revision) if !told.known.is_news(&revision) => Ok(()),
                Ok(_) | Err(RecvError::Lagged(_)) => told.what_changed().await,
                Err(RecvError::Closed) => Err(Status::unavailable("the server is stopping")),
            },
            Some(command) = commands.recv() => told.send(command).await,
            // Another server has come, or one has gone for good.
            Ok(()) = servers.changed() => told.all().await,
            // Another CA makes certificates.
            Ok(()) = ca.changed() => told.all().await,
        };
    }
    result.expect_err("the loop ends with an error")
}

/// What the node knows.
struct Told<'a> {
    hub: &'a Hub,
    known: Known,
    out: &'a Out,
}

/// Each lets go of the state before anything is sent: a snapshot that is held keeps old values in memory.
impl Told<'_> {
    async fn all(&mut self) -> Result<(), Status> {
        let telling = self.known.all(&self.hub.state());
        self.tell(telling).await
    }

    async fn what_changed(&mut self) -> Result<(), Status> {
        let telling = self.known.what_changed(&self.hub.state());
        match telling {
            Some(telling) => self.tell(telling).await,
            None => Ok(()),
        }
    }

    async fn tell(&self, Telling { diff, revision, full }: Telling) -> Result<(), Status> {
        let mut assignment = convert::assignment(diff, revision, self.hub.store.epoch(), full);
        if full {
            assignment.servers = self.hub.servers.borrow().clone();
            assignment.ca = self.hub.pki.fingerprint().to_vec();
        }
        self.send(Command::Assignment(assignment)).await
    }

    async fn send(&self, command: Command) -> Result<(), Status> {
        let sent = self.out.send(Ok(v1::NodeCommand { command: Some(command) }));
        match time::timeout(SEND_MAX, sent).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::cancelled("the node has gone")),
            Err(_) => Err(Status::deadline_exceeded("the node does not read what it is told")),
        }
    }
}

#[cfg(test)]
mod tests;
