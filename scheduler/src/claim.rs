//! One machine speaks for a node: others with its name and key are refused, and what it said before another came is over.

use scheduler_core::claim::{Claimant, IsCopy, Taken};
use tonic::Status;
use tracing::{info, warn};

use crate::{hub::Hub, service};

/// Lets the machine speak for `node`, or says who does.
pub(crate) fn claim(hub: &Hub, node: &str, by: Claimant<'_>) -> Result<(), Status> {
    let taken = hub.leases().claim(node, by, hub.clock.now());
    match taken {
        Ok(Taken::Again) => {}
        Ok(Taken::Anew) => {
            info!(%node, machine = by.machine, "this machine speaks for the node from now on");
            hub.sessions.end(node);
            hub.lease_streams.end(node);
        }
        Err(copy) => {
            if !copy.again {
                warn!(%node, machine = by.machine, underlay = ?by.underlay, served = ?copy.served, "a copy of a node is refused");
            }
            return Err(refused(node, copy));
        }
    }
    Ok(())
}

/// Whether the machine could speak for `node`.
pub(crate) fn check(hub: &Hub, node: &str, machine: &str) -> Result<(), Status> {
    let may =
        hub.leases().may_claim(node, Claimant { machine, hardware: "", underlay: None }, hub.clock.now());
    may.map_err(|copy| refused(node, copy))
}

/// What a machine is told that comes with a key that is not the node's any more.
pub(crate) fn with_old_key(hub: &Hub, node: &str) -> Option<Status> {
    let copy = hub.leases().claimed(node, hub.clock.now())?;
    Some(refused(node, copy))
}

fn refused(node: &str, copy: IsCopy) -> Status {
    let status = Status::already_exists(format!("node {node}: {copy}"));
    let mut status = service::with_reason(status, hextet_api::TAKEN_MACHINE);
    let wait_ms = u64::try_from(copy.wait.as_millis()).unwrap_or(u64::MAX);
    status.metadata_mut().insert(hextet_api::TAKEN_FOR_MS, wait_ms.into());
    status
}
