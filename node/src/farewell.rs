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

use crate::{attach::report, identity::Identity, lease_file, lock::NodeLock};

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

/// Tells the server; says how it went.
pub(crate) async fn say(identity: &Identity, lock: &NodeLock) -> String {
    let told = async {
        let machine = lock.machine().context("cannot tell which machine this is")?;
        tell(identity, NodeLeaving { machine, session: lease_file::session() }).await
    };
    told.await.map_or_else(|error| untold(&identity.name, &format!("{error:#}")), |()| TOLD.to_owned())
}

/// Tells the server; why that was not possible.
///
/// # Errors
/// No server can be reached in [`LEAVE_MAX`], or it does not take the word.
async fn tell(identity: &Identity, leaving: NodeLeaving) -> Result<()> {
    let telling = async {
        // A server that was put back from a backup may know no other key than the one before.
        for credentials in std::iter::once(&identity.credentials).chain(&identity.previous) {
            if tell_with(credentials, leaving.clone()).await? {
                return Ok(());
            }
        }
        bail!("it does not know this node's key")
    };
    timeout(LEAVE_MAX, telling).await.with_context(|| format!("no answer in {} s", LEAVE_MAX.as_secs()))?
}

/// One attempt: true when it is done, false when the key is not known.
async fn tell_with(credentials: &Credentials, leaving: NodeLeaving) -> Result<bool> {
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
        Ok(()) => Ok(true),
        Err(status) if status.code() == Code::PermissionDenied => Ok(false),
        Err(status) => bail!("{} ({:?})", status.message(), status.code()),
    }
}
