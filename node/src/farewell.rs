//! The node's last word to the server, said by `netctl node down` when no agent runs: that the node is taken down.
//!
//! It is said after everything has ended of which there may only be one: the server starts it elsewhere as soon as it hears.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hextet_api::{
    connect::{Credentials, mutual_tls},
    v1::{NodeLeaving, agent_client::AgentClient, node_report::Report},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::{attach::report, identity::Identity};

/// How long the server may take to write down that the node leaves.
pub(crate) const LEAVE_MAX: Duration = Duration::from_secs(3);

/// What `netctl node down` says when the server knows.
pub(crate) const TOLD: &str = "the server knows that the node is down";

/// What it says otherwise, and what follows from that.
pub(crate) fn untold(node: &str, why: &str) -> String {
    format!(
        "the server was not told: {why}. It misses the node when its lease ends, and until then load balancers keep its \
         pods; should `netctl nodes` show it as cut-off after that, say `netctl node dead {node}`"
    )
}

/// Tells the server; why that was not possible.
///
/// # Errors
/// No server can be reached in [`LEAVE_MAX`], or it does not take the word.
pub(crate) async fn tell(identity: &Identity, leaving: NodeLeaving) -> Result<()> {
    let telling = async {
        match tell_with(&identity.credentials, leaving.clone()).await? {
            Code::Ok => Ok(()),
            // A server that was put back from a backup may know no other key than the one before.
            Code::PermissionDenied if let Some(previous) = &identity.previous => {
                match tell_with(previous, leaving).await? {
                    Code::Ok => Ok(()),
                    _ => bail!("it does not know this node's key"),
                }
            }
            _ => bail!("it does not know this node's key"),
        }
    };
    timeout(LEAVE_MAX, telling).await.with_context(|| format!("no answer in {} s", LEAVE_MAX.as_secs()))?
}

/// One attempt: done, or the key is not known.
async fn tell_with(credentials: &Credentials, leaving: NodeLeaving) -> Result<Code> {
    let mut client = AgentClient::new(mutual_tls(credentials).await?);
    let (reports, receiver) = mpsc::channel(1);
    reports.send(report(Report::Leaving(leaving))).await.context("the stream has ended")?;
    let told = match client.attach(ReceiverStream::new(receiver)).await {
        // It ends the stream, in order, when it has written that down.
        Ok(answer) => answer.into_inner().message().await.map(drop),
        Err(status) => Err(status),
    };
    drop(reports);
    match told {
        Ok(()) => Ok(Code::Ok),
        Err(status) if status.code() == Code::PermissionDenied => Ok(Code::PermissionDenied),
        Err(status) => bail!("{} ({:?})", status.message(), status.code()),
    }
}
