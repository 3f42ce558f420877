//! Tells the server how far the steps of a pod are.

use hextet_api::v1::{self, agent_client::AgentClient};
use hextet_lifecycle::StepStatus;
use tonic::transport::Channel;
use tracing::debug;

/// A step as a message, with the last lines of what its program said.
pub(crate) fn message(output: String, step: StepStatus) -> v1::StepStatus {
    v1::StepStatus {
        name: step.name,
        owner: step.owner,
        phase: step.phase.to_string(),
        optional: step.optional,
        at_ms: step.at_ms,
        took_ms: step.took_ms,
        ended_ms_ago: step.ended_ms_ago,
        retry_in_ms: step.retry_in_ms,
        attempts: step.attempts,
        error: step.error,
        follows: step.follows,
        waits_for: step.waits_for,
        output,
    }
}

/// Sends it; returns at once.
pub(crate) fn send(channel: Channel, answer: v1::SendDescriptionRequest) {
    tokio::spawn(async move {
        if let Err(status) = AgentClient::new(channel).send_description(answer).await {
            debug!(error = status.message(), "the server was not told how far a pod is");
        }
    });
}
