//! What a server with a damaged store answers. It reads what can be read, and changes nothing.
//!
//! Nodes are not served at all: to a node the server is away, and it goes on with what it last heard
//! (docs/node-states.md, `cut-off`). Told of a part of its pods it would stop the others. Load balancers
//! are served only when every record that an address can come from is readable; or else they keep the addresses that they
//! have.

use hextet_api::v1;
use scheduler_core::change::Key;
use tonic::{Code, Status, body::Body, codegen::http::Response};

use crate::{
    access::{Access, Effect},
    identity::Identity,
    store::{Damage, Store, StoreError},
    writer::chain,
};

const BACKUP: &str = "/hextet.v1.Cluster/Backup";
const PLAN: &str = "/hextet.v1.Cluster/PlanJobs";
const WATCH: &str = "/hextet.v1.Endpoints/Watch";

/// What the store says to every change, if it is damaged.
pub(crate) fn check(store: &dyn Store) -> Result<(), StoreError> {
    if store.damage().is_some() { store.commit(&[]) } else { Ok(()) }
}

/// The answer to a call that a damaged store cannot serve.
pub(crate) fn refusal(
    store: &dyn Store,
    path: &str,
    (access, effect): (Access, Effect),
    caller: &Identity,
) -> Option<Status> {
    let damage = store.damage()?;
    let why = check(store).err().map(|error| chain(&error)).unwrap_or_default();
    let hides = |kinds: &[&str]| kinds.iter().any(|kind| damage.may_hide_kind(kind));
    match access {
        Access::Node | Access::Anybody | Access::Enrolled => Some(Status::unavailable(why)),
        _ if path == WATCH && hides(&["job", "node", "pod"]) => {
            Some(Status::unavailable(format!("not every address can be read, so that none are sent: {why}")))
        }
        // A plan of a part would be wrong.
        _ if path == PLAN || effect == Effect::Changes && path != BACKUP => {
            Some(Status::failed_precondition(why))
        }
        _ if *caller != Identity::Local && (hides(&["renewal"]) || damage.may_hide(&Key::Authorities)) => {
            Some(Status::failed_precondition(format!(
                "which keys or CAs were replaced cannot be read, so that only the Unix socket of the server's machine is served: {why}"
            )))
        }
        _ => None,
    }
}

/// What is not found may be there and unreadable.
pub(crate) fn doubt(answer: Response<Body>, damage: &Damage) -> Response<Body> {
    match Status::from_header_map(answer.headers()) {
        Some(status) if status.code() == Code::NotFound => {
            let first = damage.lines().next().unwrap_or_default();
            let text = format!(
                "{}; but the store is damaged, and it may be there and unreadable ({first}; `netctl server status` lists all {})",
                status.message(),
                damage.count()
            );
            Status::data_loss(text).into_http()
        }
        _ => answer,
    }
}

/// What a list of this kind cannot show.
pub(crate) fn unreadable(store: &dyn Store, kind: &str) -> Vec<v1::Unreadable> {
    let lost = store.damage().map(|damage| damage.of_kind(kind)).unwrap_or_default();
    lost.into_iter().map(|lost| v1::Unreadable { key: lost.key, why: lost.why }).collect()
}
