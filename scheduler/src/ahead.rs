//! Nodes that have heard more of this store than it holds: somebody has put an older copy of it back.
//!
//! Nothing in the copy says so, and what such a node runs may be unknown to it. The node is refused as by a server that is
//! away: it keeps its pods, and holds no lease. Its word counts for itself alone, as it may be wrong, or lie: of no
//! other is anything kept back.

use std::{collections::BTreeSet, sync::Mutex};

use tonic::Status;
use tracing::error;

use crate::{hub::Hub, mutex::lock};

/// Their names.
#[derive(Default)]
pub(crate) struct Ahead(Mutex<BTreeSet<String>>);

impl Ahead {
    /// Whether this node is refused.
    pub(crate) fn has(&self, node: &str) -> bool {
        lock(&self.0).contains(node)
    }
}

/// Refuses a node that has heard of a later revision of this store than there is.
pub(crate) fn check(hub: &Hub, node: &str, epoch: &str, revision: u64) -> Result<(), Status> {
    let last = hub.state().revision();
    if epoch != hub.store.epoch() || revision <= last {
        lock(&hub.ahead.0).remove(node);
        return Ok(());
    }
    let refusal = format!(
        "node {node} has heard of revision {revision} of this store, which ends at {last}: it is a copy from before that \
         was put back. Put back a later one; or make a backup of it (`netctl server backup`), end the server, and restore \
         that into an empty place (`netctl server restore`): the cluster then knows that it is from before"
    );
    // A lease that the node has asked for meanwhile ends, too.
    hub.lease_streams.end(node);
    if lock(&hub.ahead.0).insert(node.to_owned()) {
        error!("{refusal}");
    }
    Err(Status::unavailable(refusal))
}
