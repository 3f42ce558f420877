//! The agent's stream to the server: connects for ever, passes messages both ways.
//!
//! It decides nothing. The lease is held by a thread of its own ([`crate::lease`]).

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use hextet_api::{
    connect::mutual_tls,
    v1::{
        Assignment, DescribePod, LeaseHolder, NodeCommand, NodeHello, NodeLeaving, NodeReport, ReadLogs,
        agent_client::AgentClient, node_command::Command, node_report::Report,
    },
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, interval, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};
use tracing::{debug, info, warn};

use crate::{
    backoff::Backoff,
    certificates::Certificates,
    refusal::{Deleted, Pace, TakenForCopy},
};

const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Reports that wait for the network; who has more to say waits.
const REPORTS_MAX: usize = 16;
/// How often it is looked whether the certificate ends soon.
const RENEW_LOOK: Duration = Duration::from_secs(3600);
/// In this time all nodes ask for certificates of another CA.
const RENEW_SPREAD: Duration = Duration::from_secs(20);
/// After this time, and once more as long at most, a node asks again that got none.
const RENEW_AGAIN: Duration = Duration::from_secs(60);
/// A full assignment of 10,000 pods with long environments.
const MESSAGE_BYTES_MAX: usize = 256 * 1024 * 1024;

/// What the agent is told by its stream, in order.
#[derive(Debug)]
pub(crate) enum FromServer {
    /// A stream is there: reports go into it.
    Attached {
        reports: mpsc::Sender<NodeReport>,
        channel: Channel,
    },
    /// The node has another key: calls beside the stream are made with it.
    Renewed {
        channel: Channel,
    },
    /// What to run.
    Assignment(Assignment),
    /// Another machine speaks for the node, in the server's words.
    Refused(TakenForCopy),
    /// Somebody deleted the node.
    Deleted(Deleted),
    /// Somebody wants to read a log.
    ReadLogs(ReadLogs),
    DescribePod(DescribePod),
    /// The stream has ended: in order, when the server had no more to say.
    Detached {
        orderly: bool,
    },
}

/// What the server is told first; a change of the addresses makes a new stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Hello {
    /// The uplink; said to nobody.
    pub(crate) device: Option<String>,
    /// None: the uplink is not there yet.
    pub(crate) underlay: Option<Ipv6Addr>,
    pub(crate) underlay_v4: Option<Ipv4Addr>,
    pub(crate) rest: NodeHello,
    /// Counts what asks for a new stream besides a change of the addresses.
    pub(crate) resets: u64,
}

/// Attaches to the server, for ever.
pub(crate) async fn run(
    certificates: Arc<Certificates>,
    mut hello: watch::Receiver<Hello>,
    events: mpsc::Sender<FromServer>,
) {
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
    let mut pace = Pace::default();
    let mut last_error = String::new();
    loop {
        let has_uplink = hello.wait_for(|hello| hello.underlay.is_some()).await.is_ok();
        if !has_uplink {
            return;
        }
        let mut served = false;
        let result = attach(&certificates, &mut hello, &events, &mut served).await;
        let orderly = matches!(result, Ok(End::Server));
        let copy = result.as_ref().err().and_then(|error| error.downcast_ref::<TakenForCopy>()).cloned();
        let deleted = result.as_ref().err().and_then(|error| error.downcast_ref::<Deleted>()).cloned();
        let is_deleted = deleted.is_some();
        if let Some(deleted) = deleted
            && events.send(FromServer::Deleted(deleted)).await.is_err()
        {
            return;
        }
        if let Some(copy) = copy.clone()
            && events.send(FromServer::Refused(copy)).await.is_err()
        {
            return;
        }
        if events.send(FromServer::Detached { orderly }).await.is_err() {
            return;
        }
        if served {
            backoff.reset();
            last_error.clear();
        }
        let error =
            result.err().map_or_else(|| "the stream has ended".to_owned(), |error| format!("{error:#}"));
        if error == last_error {
            debug!(error, "still not attached to the server");
        } else {
            let what = if is_deleted { "its pods end" } else { "pods and traffic go on" };
            warn!(error, "not attached to the server; {what}, trying again");
            last_error = error;
        }
        let wait = match copy {
            Some(copy) => pace.refused(&copy, Instant::now()),
            None if is_deleted => pace.deleted(),
            None => {
                pace.reset();
                backoff.next(&mut rand::rng())
            }
        };
        sleep(wait).await;
    }
}

/// Who has ended a stream in which nothing was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Server,
    Agent,
}

/// One stream, from hello to its end.
async fn attach(
    certificates: &Certificates,
    hello: &mut watch::Receiver<Hello>,
    events: &mpsc::Sender<FromServer>,
    served: &mut bool,
) -> Result<End> {
    let credentials = certificates.credentials();
    let mut channel = match mutual_tls(&credentials).await {
        Err(error) if error.is_another_ca() => {
            // A server that was put back from a backup may have the CA before this one.
            certificates.not_known();
            return Err(error.into());
        }
        connected => connected?,
    };
    if certificates.is_due() {
        channel = renew(certificates, &channel).await.unwrap_or(channel);
    }
    let mut client = AgentClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let (reports, receiver) = mpsc::channel(REPORTS_MAX);
    let said = hello.borrow_and_update().clone();
    reports.send(report(Report::Hello(said.message()))).await.context("the stream has ended")?;
    let mut commands = match client.attach(ReceiverStream::new(receiver)).await {
        Ok(response) => response.into_inner(),
        Err(status) => {
            seek_remedy(certificates, &channel, &status).await;
            return Err(refused(status));
        }
    };
    let attached = FromServer::Attached { reports, channel: channel.clone() };
    events.send(attached).await.context("the agent ends")?;
    let mut looks = interval(RENEW_LOOK);
    loop {
        tokio::select! {
            command = commands.message() => {
                let Some(command) = command.map_err(refused)? else { return Ok(End::Server) };
                if know(certificates, &command).await {
                    looks.reset_after(rand::random_range(Duration::ZERO..RENEW_SPREAD));
                }
                if let Some(event) = event(command) {
                    if !*served {
                        info!(server = credentials.servers.first(), "attached to the server");
                    }
                    *served = true;
                    events.send(event).await.context("the agent ends")?;
                }
            }
            _ = looks.tick() => {
                if certificates.is_due() {
                    match renew(certificates, &channel).await {
                        Some(renewed) => {
                            channel = renewed.clone();
                            events.send(FromServer::Renewed { channel: renewed }).await.context("the agent ends")?;
                        }
                        None => looks.reset_after(RENEW_AGAIN + rand::random_range(Duration::ZERO..RENEW_AGAIN)),
                    }
                }
            }
            changed = is_another(hello, &said) => {
                changed?;
                info!("attaching anew: the node has something else to say of itself, or must hear everything again");
                return Ok(End::Agent);
            }
        }
    }
}

/// A node that cannot keep the servers goes on with those that it knew. Whether another CA makes certificates.
async fn know(certificates: &Certificates, command: &NodeCommand) -> bool {
    let Some(Command::Assignment(assignment)) = &command.command else { return false };
    if let Err(error) = certificates.servers(&assignment.servers).await {
        warn!("the list of servers is not kept: {error:#}");
    }
    certificates.ca(&assignment.ca)
}

/// Another certificate before the present one ends, or one of another CA; without one the node goes on with that.
async fn renew(certificates: &Certificates, channel: &Channel) -> Option<Channel> {
    let renewed = certificates.renew(channel.clone()).await;
    renewed.inspect_err(|error| warn!("the node's certificate is not renewed: {error:#}")).ok()
}

/// What can be done about a refusal before the next attempt.
async fn seek_remedy(certificates: &Certificates, channel: &Channel, status: &Status) {
    match status.code() {
        // It has ended by the server's clock, whatever this machine's says.
        Code::Unauthenticated => drop(renew(certificates, channel).await),
        Code::PermissionDenied => certificates.not_known(),
        _ => {}
    }
}

/// Waits until the node has something else to say of itself than `said`.
async fn is_another(hello: &mut watch::Receiver<Hello>, said: &Hello) -> Result<()> {
    hello.wait_for(|now| !now.same_stream(said)).await.map(drop).context("the agent ends")
}

fn event(command: NodeCommand) -> Option<FromServer> {
    match command.command? {
        Command::Assignment(assignment) => Some(FromServer::Assignment(assignment)),
        Command::ReadLogs(request) => Some(FromServer::ReadLogs(request)),
        Command::DescribePod(request) => Some(FromServer::DescribePod(request)),
    }
}

pub(crate) fn report(report: Report) -> NodeReport {
    NodeReport { report: Some(report) }
}

fn refused(status: tonic::Status) -> anyhow::Error {
    if let Some(copy) = TakenForCopy::of(&status) {
        return copy.into();
    }
    if let Some(deleted) = Deleted::of(&status) {
        return deleted.into();
    }
    anyhow::anyhow!("{} ({:?})", status.message(), status.code())
}

impl Hello {
    fn message(&self) -> NodeHello {
        NodeHello {
            underlay: self.underlay.map(|address| address.octets().to_vec()).unwrap_or_default(),
            underlay_v4: self.underlay_v4.map(|address| address.octets().to_vec()).unwrap_or_default(),
            ..self.rest.clone()
        }
    }

    /// What a lease's stream begins with.
    pub(crate) fn lease_holder(&self) -> LeaseHolder {
        let NodeHello { machine, underlay, session, hardware, .. } = self.message();
        LeaseHolder { machine, underlay, session, hardware }
    }

    /// The last word of this agent.
    pub(crate) fn leaving(&self) -> NodeLeaving {
        NodeLeaving { machine: self.rest.machine.clone(), session: self.rest.session }
    }

    /// The last revision changes all the time and needs no new stream.
    fn same_stream(&self, other: &Hello) -> bool {
        (self.underlay, self.underlay_v4, self.resets) == (other.underlay, other.underlay_v4, other.resets)
    }
}
