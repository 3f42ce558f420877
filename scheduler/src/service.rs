//! The gRPC services. They read messages, ask the core or the writer, and answer; they decide nothing.

use std::sync::Arc;

use scheduler_core::{deploy::DeployError, event::Refusal};
use tokio::task;
use tonic::Status;

use crate::{
    convert::ConvertError,
    hub::Hub,
    writer::{WriteError, chain},
};

mod agent;
mod backup;
mod ca;
mod cluster;
mod deploy;
mod endpoints;
mod enrollment;
mod events;
mod explain;
mod gone;
mod history;
mod plan;
mod renewal;

pub(crate) use self::{
    agent::AgentService,
    cluster::{ClusterService, make_token},
    endpoints::EndpointsService,
    enrollment::EnrollmentService,
    renewal::RenewalService,
};

/// Why a write failed, as a client sees it.
pub(crate) fn status(error: WriteError) -> Status {
    match error {
        WriteError::Refused(refusal) => refused(&refusal),
        WriteError::Store(error) => Status::unavailable(chain(&error)),
        WriteError::Closed => Status::unavailable(error.to_string()),
    }
}

fn refused(refusal: &Refusal) -> Status {
    let text = refusal.to_string();
    match refusal {
        Refusal::Job(_)
        | Refusal::Hello(_)
        | Refusal::Name(_)
        | Refusal::Claim
        | Refusal::Deploy(DeployError::Schedule(_) | DeployError::RolloutInText(_)) => {
            Status::invalid_argument(text)
        }
        Refusal::NoJob(_) | Refusal::NoNode(_) | Refusal::Deploy(DeployError::NoDeploy(_)) => {
            Status::not_found(text)
        }
        Refusal::NodeReports(_)
        | Refusal::Deploy(_)
        | Refusal::NodeCutOff(_)
        | Refusal::NotFenced(_)
        | Refusal::TakenDown(_)
        | Refusal::Turn(_)
        | Refusal::NoVersion { .. }
        | Refusal::OtherVersion { .. }
        | Refusal::PodPrefix { .. } => Status::failed_precondition(text),
        Refusal::KeyReplaced => Status::unauthenticated(text),
        Refusal::Token(_) => Status::permission_denied(text),
        Refusal::NameTaken(_) => with_reason(Status::already_exists(text), "name"),
        Refusal::SubnetTaken { .. } => with_reason(Status::already_exists(text), "subnet"),
        Refusal::GroupTaken { .. } => with_reason(Status::already_exists(text), "group"),
        Refusal::KeyTaken => with_reason(Status::already_exists(text), "key"),
        Refusal::UnderlayTaken { .. } => with_reason(Status::already_exists(text), "underlay"),
        Refusal::TooManyPods { .. } | Refusal::TooManyTokens(_) | Refusal::TooManyRenewals => {
            Status::resource_exhausted(text)
        }
        Refusal::ClusterExists => Status::internal(text),
    }
}

/// Runs what may block for long in a thread that may.
async fn in_thread<T: Send + 'static, E: Send + 'static>(
    hub: &Arc<Hub>,
    run: impl FnOnce(&Hub) -> Result<T, E> + Send + 'static,
    failed: impl FnOnce(E) -> Status,
) -> Result<T, Status> {
    let hub = hub.clone();
    let ran = task::spawn_blocking(move || run(&hub)).await;
    ran.map_err(|error| Status::internal(error.to_string()))?.map_err(failed)
}

pub(crate) fn with_reason(mut status: Status, reason: &'static str) -> Status {
    status.metadata_mut().insert(hextet_api::TAKEN, tonic::metadata::MetadataValue::from_static(reason));
    status
}

/// What a machine is told that comes with the key of a node that somebody deleted: this much is certain, and it gives up
/// its pods. One that is only not known here keeps them: the server may have been put back from a backup.
pub(crate) fn deleted(node: &str) -> Status {
    let mut status =
        Status::permission_denied(format!("node {node} was deleted here: join again with a new token"));
    status.metadata_mut().insert(hextet_api::DELETED, tonic::metadata::MetadataValue::from_static("node"));
    status
}

/// A message that breaks the contract.
pub(crate) fn malformed(error: ConvertError) -> Status {
    Status::invalid_argument(chain(&error))
}
