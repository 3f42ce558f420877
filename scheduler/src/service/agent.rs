//! What node agents call. A node speaks for itself alone.

use std::sync::Arc;

use hextet_api::v1::{
    LeaseAnswer, LeaseRenewal, NodeCommand, NodeReport, SendDescriptionRequest, SendDescriptionResponse,
    SendLogsRequest, SendLogsResponse, agent_server::Agent,
};
use scheduler_core::{event::Event, token::Role, transition::Origin};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{deleted, status};
use crate::{auth, claim, hub::Hub, identity::Identity, lease_stream, logs, session};

/// Commands between the session and the connection.
const OUT_MAX: usize = 16;

pub(crate) struct AgentService(pub(crate) Arc<Hub>);

#[tonic::async_trait]
impl Agent for AgentService {
    type AttachStream = ReceiverStream<Result<NodeCommand, Status>>;
    type HoldLeaseStream = ReceiverStream<Result<LeaseAnswer, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<NodeReport>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let caller = auth::caller(&request);
        let node = self.node(&caller)?;
        self.settle_key(&node, &caller).await?;
        let (out, commands) = mpsc::channel(OUT_MAX);
        tokio::spawn(session::run(self.0.clone(), node, request.into_inner(), out));
        Ok(Response::new(ReceiverStream::new(commands)))
    }

    async fn hold_lease(
        &self,
        request: Request<Streaming<LeaseRenewal>>,
    ) -> Result<Response<Self::HoldLeaseStream>, Status> {
        let node = self.node(&auth::caller(&request))?;
        let (out, answers) = mpsc::channel(OUT_MAX);
        tokio::spawn(lease_stream::run(self.0.clone(), node, request.into_inner(), out));
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn send_description(
        &self,
        request: Request<SendDescriptionRequest>,
    ) -> Result<Response<SendDescriptionResponse>, Status> {
        let node = self.node(&auth::caller(&request))?;
        self.0.questions.answer(&node, request.into_inner())?;
        Ok(Response::new(SendDescriptionResponse {}))
    }

    async fn send_logs(
        &self,
        request: Request<Streaming<SendLogsRequest>>,
    ) -> Result<Response<SendLogsResponse>, Status> {
        let node = self.node(&auth::caller(&request))?;
        let mut chunks = request.into_inner();
        let first =
            chunks.message().await?.ok_or_else(|| Status::invalid_argument("the first chunk is missing"))?;
        let reader = self.0.relays.answer(first.request_id, &node);
        let reader = reader.ok_or_else(|| Status::not_found("nobody waits for these logs any more"))?;
        logs::carry(reader, first, chunks).await?;
        Ok(Response::new(SendLogsResponse {}))
    }
}

impl AgentService {
    /// A node that comes with the key that it asked for needs the one before it no more.
    async fn settle_key(&self, node: &str, caller: &Identity) -> Result<(), Status> {
        let Identity::Enrolled { enrolled, key, .. } = caller else { return Ok(()) };
        if self.0.state().nodes().get(node).is_none_or(|node| node.key == *key) {
            return Ok(());
        }
        let origin = Origin { changer: caller.changer(), message: String::new() };
        let event = Event::KeyUsed(enrolled.clone(), key.clone());
        self.0.write(origin, event).await.map(drop).map_err(status)
    }

    /// The name of the node that calls. A certificate is good for a name as long as the name is its key's.
    fn node(&self, caller: &Identity) -> Result<String, Status> {
        let Identity::Enrolled { enrolled, key, .. } = caller else {
            return Err(Status::permission_denied("this needs the role node"));
        };
        let state = self.0.state();
        match state.nodes().get(&enrolled.name) {
            Some(node) if enrolled.role == Role::Node && state.is_key_of(node, key) => Ok(node.name.clone()),
            _ if enrolled.role == Role::Node && state.is_deleted(key) => Err(deleted(&enrolled.name)),
            Some(node) if let Some(status) = claim::with_old_key(&self.0, &node.name) => Err(status),
            Some(_) => Err(Status::permission_denied(format!(
                "node {} has another key here: its name is another machine's now, or this key was replaced; to have \
                 this machine here, join again with a new token",
                enrolled.name
            ))),
            None => Err(Status::permission_denied(format!(
                "this server knows no node {} with this key: was it put back from a backup of before the node joined? \
                 Its pods go on; to have it here, join again with a new token",
                enrolled.name
            ))),
        }
    }
}
