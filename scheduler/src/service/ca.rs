//! Shows which CA makes certificates, and replaces it.

use std::sync::Arc;

use hextet_api::{token::Fingerprint, v1};
use scheduler_core::{
    authority::{Authorities, LATE_MAX},
    node::{Node, NodePhase},
    state::State,
    time::WallTime,
    transition::Origin,
};
use tonic::Status;

use crate::{
    hub::Hub,
    rotation::{self, Asked},
};

/// The most that are named.
const MISSING_MAX: usize = 1000;

pub(super) fn show(hub: &Hub) -> v1::GetCaResponse {
    let state = hub.state();
    let nodes_count = count(state.nodes().len());
    let Some(authorities) = state.authorities() else {
        let issuing = Fingerprint(hub.pki.fingerprint()).to_string();
        return v1::GetCaResponse { issuing, nodes_count, ..v1::GetCaResponse::default() };
    };
    let leaving = authorities.leaving.as_ref();
    let missing = missing(&state, authorities, hub.clock.wall());
    v1::GetCaResponse {
        issuing: authorities.issuing.clone(),
        leaving: leaving.map(|leaving| leaving.ca.clone()).unwrap_or_default(),
        since_unix_ms: leaving.map_or(0, |leaving| leaving.since.0),
        compromised: leaving.is_some_and(|leaving| leaving.compromised),
        missing_count: count(missing.len()),
        missing: missing.into_iter().take(MISSING_MAX).collect(),
        nodes_count,
    }
}

/// The CA that goes out of use, and how many have no other; empty and 0 when none does.
pub(super) fn leaving(state: &State, now: WallTime) -> (String, u32) {
    let Some(authorities) = state.authorities() else { return Default::default() };
    let Some(leaving) = &authorities.leaving else { return Default::default() };
    let nodes = state.nodes().values().map(AsRef::<Node>::as_ref);
    (leaving.ca.clone(), count(authorities.missing(nodes, now).len()))
}

pub(super) async fn turn(
    hub: &Arc<Hub>,
    origin: Origin,
    request: &v1::TurnCaRequest,
) -> Result<v1::TurnCaResponse, Status> {
    let asked = match request.turn() {
        v1::CaTurn::Rotate => Asked::Rotate { compromised: request.compromised },
        v1::CaTurn::Undo => Asked::Undo,
        v1::CaTurn::Retire => Asked::Retire { force: request.force },
        v1::CaTurn::Unspecified => {
            return Err(Status::invalid_argument("turn is missing: rotate, undo or retire"));
        }
    };
    let committed = rotation::turn(hub, origin, asked).await?;
    let v1::GetCaResponse { issuing, leaving, .. } = show(hub);
    Ok(v1::TurnCaResponse { revision: committed.revision, issuing, leaving })
}

/// Who would be locked out by the end of the old CA, and why.
fn missing(state: &State, authorities: &Authorities, now: WallTime) -> Vec<v1::MissingHolder> {
    let nodes = state.nodes().values().map(AsRef::<Node>::as_ref);
    let missing = authorities.missing(nodes, now).into_iter();
    let is_full = authorities.leaving.as_ref().is_some_and(|leaving| leaving.late.len() >= LATE_MAX);
    missing
        .map(|who| {
            let node = who.strip_prefix("node/").and_then(|name| state.nodes().get(name));
            let how = match node {
                Some(node) => why(node),
                None if is_full => {
                    "came with a certificate of the old CA, and others may have, too".to_owned()
                }
                None => "came with a certificate of the old CA".to_owned(),
            };
            v1::MissingHolder { who, how }
        })
        .collect()
}

fn why(node: &Node) -> String {
    match node.phase {
        NodePhase::Ready => {
            format!("attached, and gets one within a minute; its agent is of version {}", node.agent_version)
        }
        NodePhase::Joined => "has never attached".to_owned(),
        phase => format!("{phase}: gets one when it is back"),
    }
}

fn count(many: usize) -> u32 {
    u32::try_from(many).unwrap_or(u32::MAX)
}
