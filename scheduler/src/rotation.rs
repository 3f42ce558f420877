//! Brings the keys of CAs to what the state says of them.
//!
//! The order is what makes a crash harmless: a new key is kept before the state names it, the state names it before it
//! makes certificates, and the state gives the old one up before its key is forgotten. Whatever was left half-way, the
//! next look finishes. [`scheduler_core::authority`] decides.

use std::{convert::Infallible, future::pending, sync::Arc, time::Duration};

use anyhow::Context as _;
use scheduler_core::{
    authority::{Authorities, LATE_MAX, Turn},
    change::Key,
    event::{Enrolled, Event},
    node::Node,
    state::State,
    token::Role,
    transition::Origin,
};
use tokio::{sync::broadcast::error::RecvError, time::sleep};
use tonic::Status;
use tracing::{info, warn};

use crate::{
    hub::{self, Hub},
    identity::Identity,
    pki::{Authority, Keyring},
    service,
    writer::{Committed, chain},
};

/// Between two tries to keep the keys.
const RETRY: Duration = Duration::from_secs(1);

/// What an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Another CA.
    Rotate {
        /// Somebody else may have the key of the present one.
        compromised: bool,
    },
    /// The one before.
    Undo,
    /// The end of the old one.
    Retire {
        /// Also when somebody has no other certificate.
        force: bool,
    },
}

/// The CA with which a cluster began that has replaced it.
pub(crate) fn first(state: &State) -> Option<&str> {
    state.authorities().map(|authorities| authorities.first.as_str())
}

/// Refuses to start without the key of a CA that the state names.
pub(crate) fn check(hub: &Hub) -> anyhow::Result<()> {
    let state = hub.state();
    let Some(wanted) = state.authorities() else { return Ok(()) };
    let keyring = hub.pki.keyring();
    let named = std::iter::once(&wanted.issuing).chain(wanted.leaving.iter().map(|leaving| &leaving.ca));
    for ca in named {
        if !keyring.all().any(|authority| authority.fingerprint() == *ca) {
            return Err(hub.pki.no_key(ca).into());
        }
    }
    Ok(())
}

/// Does what is asked, and gives the revision. When this returns, the CA that the state names makes certificates.
pub(crate) async fn turn(hub: &Arc<Hub>, origin: Origin, asked: Asked) -> Result<Committed, Status> {
    let _rotating = hub.rotating.lock().await;
    // What the turn before this one has left comes first: from here on the keys are those of the state.
    settle(hub).await.map_err(not_kept)?;
    let turn = match asked {
        Asked::Undo => Turn::Undo,
        Asked::Retire { force } => Turn::Retire { force },
        Asked::Rotate { compromised } => prepare(hub, compromised).await?,
    };
    let written = hub.write(origin, Event::TurnCa(turn)).await.map_err(service::status);
    // Without a revision the new key is forgotten by this.
    if let Err(error) = settle(hub).await {
        warn!("the keys of the CAs are not as they should be yet: {error:#}");
    }
    written
}

/// Keeps the key of another CA.
async fn prepare(hub: &Arc<Hub>, compromised: bool) -> Result<Turn, Status> {
    let begun = hub.state().authorities().is_some_and(|authorities| authorities.leaving.is_some());
    let present = hub.pki.keyring();
    let (present_ca, next) = (present.issuing.fingerprint(), Authority::make_next(hub.store.epoch()));
    let next = next.map_err(|error| Status::internal(chain(&error)))?;
    let turn = Turn::Rotate { present: present_ca, next: next.fingerprint(), compromised };
    if begun {
        // It is refused, in the core's words.
        return Ok(turn);
    }
    hub.keeper.keep(hub, present.with(next)).await.map_err(not_kept)?;
    Ok(turn)
}

fn not_kept(error: anyhow::Error) -> Status {
    Status::unavailable(format!("the CA is not replaced, its key cannot be kept: {error:#}"))
}

/// Keeps the keys as the state wants them, for ever.
pub(crate) async fn follow(hub: Arc<Hub>) {
    let mut revisions = hub.revisions();
    loop {
        let settled = {
            let _rotating = hub.rotating.lock().await;
            settle(&hub).await
        };
        if let Err(error) = settled {
            warn!("the keys of the CAs are not as they should be yet: {error:#}");
            sleep(RETRY).await;
            continue;
        }
        loop {
            match revisions.recv().await {
                Ok(revision) if !revision.changes.iter().any(|change| change.key == Key::Authorities) => {}
                Ok(_) | Err(RecvError::Lagged(_)) => break,
                Err(RecvError::Closed) => return,
            }
        }
    }
}

/// Brings the keys to what the state says.
async fn settle(hub: &Arc<Hub>) -> anyhow::Result<()> {
    // What a damaged store does not show may be there.
    if hub.store.damage().is_some() {
        return Ok(());
    }
    let state = hub.state();
    let present = hub.pki.keyring();
    let wanted = match state.authorities() {
        Some(wanted) => {
            present.as_wanted(wanted).with_context(|| hub.pki.no_key(&wanted.issuing).to_string())?
        }
        None => Keyring::of(present.issuing.clone()),
    };
    if wanted != present {
        hub.keeper.keep(hub, wanted).await?;
    }
    let Some(authorities) = state.authorities() else { return Ok(()) };
    let compromised = authorities.leaving.as_ref().filter(|leaving| leaving.compromised);
    hub.pki.distrust(compromised.map(|leaving| leaving.ca.clone()));
    if authorities.leaving.is_none() {
        end_left_out(hub, &state, authorities);
    }
    Ok(())
}

/// Nodes that stayed behind speak no more.
fn end_left_out(hub: &Hub, state: &State, authorities: &Authorities) {
    let behind = |node: &&Arc<Node>| authorities.of_node(node) != authorities.issuing;
    for node in state.nodes().values().filter(behind) {
        info!(node = %node.name, "its certificate is of a CA that is not believed any more");
        hub.sessions.end(&node.name);
        hub.lease_streams.end(&node.name);
    }
}

/// Remembers it of one with a stream that was there before the rotation; never resolves.
pub(crate) async fn note_when_late(hub: &Arc<Hub>, caller: &Identity, signer: Option<Vec<u8>>) -> Infallible {
    let Some(signer) = signer else { return pending().await };
    let mut issuing = hub.pki.issuing();
    while issuing.changed().await.is_ok() {
        let state = hub.state();
        if let (Some(authorities), Some(ca)) = (state.authorities(), hub.pki.ca_with_key(&signer)) {
            note_late(hub, authorities, caller, &ca);
        }
    }
    pending().await
}

/// Remembers that a person or load balancer has no other certificate than that of the CA that goes out of use.
pub(crate) fn note_late(hub: &Arc<Hub>, authorities: &Authorities, caller: &Identity, ca: &str) {
    let Identity::Enrolled { enrolled, key, ends } = caller else { return };
    // After a compromise nobody but a node is believed: they log in anew, and nothing waits for them.
    let leaving = authorities.leaving.as_ref().filter(|leaving| leaving.ca == ca && !leaving.compromised);
    let Some(leaving) = leaving else { return };
    let is_noted = leaving.late.contains_key(key) || leaving.late.len() >= LATE_MAX;
    if enrolled.role == Role::Node || is_noted || hub.state().is_replaced(key) {
        return;
    }
    let (hub, enrolled, key, ends): (_, Enrolled, _, _) = (hub.clone(), enrolled.clone(), key.clone(), *ends);
    tokio::spawn(async move {
        // Whoever comes again is written down then.
        let _ = hub.write(hub::scheduler(), Event::LateCa(enrolled, key, ends)).await;
    });
}
