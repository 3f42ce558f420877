//! `netctl node down` without what the store knows, because it is damaged or gone; and what becomes of the store then.
//!
//! What is not known is made up for by ending more: which pods may run on one node only is in the store, so all of them end
//! before the server hears that the node is down, and starts such pods elsewhere.

use std::fs;

use tokio::time::{Instant, sleep};

use crate::{
    config::NodePaths,
    farewell::{self, untold},
    identity::Identity,
    lease_file,
    lock::NodeLock,
    store::{Found, READ_MAX, RETRY, StoreError, aside, look},
    supervisor::LEASE_LOOK,
    teardown::{self, FAILED},
};

/// Ends every pod, then tells the server, if it is known which node this is. Says what was done.
pub(super) async fn end_pods_and_leave(paths: &NodePaths, lock: Option<&NodeLock>) -> Vec<String> {
    let found = look_when_free(paths).await;
    let mut lines = end_pods(paths).await;
    let has_failed = lines.iter().any(|line| line.starts_with(FAILED));
    let identity = found.and_then(Result::ok).and_then(|found| found.identity);
    lines.push(match (identity, lock) {
        (Some(identity), _) if has_failed => {
            untold(&identity.name, "a pod has not ended, and there may only be one of it")
        }
        (Some(identity), Some(lock)) => farewell::say(&identity, lock).await,
        _ => unnamed(paths),
    });
    lines
}

/// Also those of which there may only be one: they and their hooks end with the lease.
async fn end_pods(paths: &NodePaths) -> Vec<String> {
    let lease = lease_file::remove(&paths.run_dir.join(lease_file::LEASE_FILE));
    let mut lines = teardown::stop_pods(paths).await;
    lines.extend(lease.err().map(|error| format!("{FAILED}end the lease: {error}")));
    sleep(2 * LEASE_LOOK).await;
    lines
}

/// Nothing says which node this is.
fn unnamed(paths: &NodePaths) -> String {
    format!(
        "the server was not told, as {} does not say which node this is. If it was one, the server misses it when its \
         lease ends, and until then load balancers keep its pods; should `netctl nodes` show it as cut-off after that, \
         say `netctl node dead NAME`",
        paths.store().display()
    )
}

/// What becomes of the store when all else is done: a damaged one gives way to one that an agent can start with, if nothing
/// has failed. Says so.
pub(crate) async fn settle_store(paths: &NodePaths, done: &[String]) -> Vec<String> {
    let found = match look_when_free(paths).await {
        None => return Vec::new(),
        Some(Err(error)) => {
            return vec![format!("{FAILED}look at the node's store: {:#}", anyhow::anyhow!(error))];
        }
        Some(Ok(found)) => found,
    };
    let store = paths.store();
    if found.is_whole() {
        let is_joined = found.identity.is_some();
        let stays =
            || format!("the identity stays in {}; `netctl node` brings everything back", store.display());
        return is_joined.then(stays).into_iter().collect();
    }
    let mut lines: Vec<String> =
        found.lines().map(|flaw| format!("{} is damaged: {flaw}", store.display())).collect();
    if done.iter().any(|line| line.starts_with(FAILED)) {
        lines.push(format!("{} is left as it is until nothing fails", store.display()));
        return lines;
    }
    lines.push(match aside::set_aside(&store, &found) {
        Ok(()) => settled(paths, found.identity.as_ref()),
        Err(error) => format!("{FAILED}set the damaged store aside: {:#}", anyhow::anyhow!(error)),
    });
    lines
}

fn settled(paths: &NodePaths, identity: Option<&Identity>) -> String {
    let (store, aside) = (paths.store(), aside::path_of(&paths.store()));
    match identity {
        Some(identity) => format!(
            "it is kept as {}. The identity of node {} could be read and stays in {}; what ran here is not known any more: \
             `netctl node` asks the server",
            aside.display(),
            identity.name,
            store.display()
        ),
        None => format!(
            "it is kept as {}. Which node this is cannot be read: on the server `netctl rm node/NAME` once it is lost, and \
             here `netctl node --join` with a new token",
            aside.display()
        ),
    }
}

/// The store as it can be read. None: there is no file. An agent that ends has it for a moment longer than its lock.
async fn look_when_free(paths: &NodePaths) -> Option<Result<Found, StoreError>> {
    let (store, end) = (paths.store(), Instant::now() + READ_MAX);
    fs::symlink_metadata(&store).ok()?;
    loop {
        match look(&store) {
            Err(StoreError::InUse { .. }) if Instant::now() < end => sleep(RETRY).await,
            looked => return Some(looked),
        }
    }
}
