//! Events that wait together are brought about together: each is a revision of its own, and one commit makes all
//! of them durable or none.

use std::sync::Arc;

use crate::{
    change::Revision,
    event::{Event, Refusal},
    state::State,
    transition::{Context, Origin, handle},
};

/// How often addresses are drawn again because others had them before. One in 2^40 is a collision.
const DRAWS_MAX: usize = 8;

/// What came of an event; no revision when there was nothing to change.
pub type Outcome = Result<Option<Revision>, Refusal>;

/// What a batch needs to know besides the state.
pub struct Surroundings<'a> {
    /// What each transition needs.
    pub context: Context<'a>,
    /// Whether a node's lease runs now.
    pub lease_runs: &'a dyn Fn(&str) -> bool,
}

/// Why a commit did not take revisions. The state is then as it was.
pub trait CommitError {
    /// Only because an address was another pod's once: with others it would be taken.
    fn is_address_used(&self) -> bool;
}

impl<E: CommitError> CommitError for Arc<E> {
    fn is_address_used(&self) -> bool {
        E::is_address_used(self)
    }
}

/// Brings `events` about in order and makes what they change durable with `commit`. Nothing of it is to be shown
/// to anybody before this returns.
///
/// # Errors
/// The commit's. The state is then as it was found.
pub fn write<E: CommitError>(
    state: &mut State,
    events: &[(&Event, &Origin)],
    surroundings: &mut Surroundings<'_>,
    mut commit: impl FnMut(&[Revision]) -> Result<(), E>,
) -> Result<Vec<Outcome>, E> {
    let mut draws = 0;
    loop {
        let outcomes: Vec<Outcome> =
            events.iter().map(|(event, origin)| bring_about(state, event, origin, surroundings)).collect();
        let revisions: Vec<Revision> = outcomes.iter().flatten().flatten().cloned().collect();
        if revisions.is_empty() {
            return Ok(outcomes);
        }
        let Err(error) = commit(&revisions) else { return Ok(outcomes) };
        revisions.iter().rev().for_each(|revision| state.undo(revision));
        draws += 1;
        if !error.is_address_used() || draws == DRAWS_MAX {
            return Err(error);
        }
    }
}

fn bring_about(
    state: &mut State,
    event: &Event,
    origin: &Origin,
    surroundings: &mut Surroundings<'_>,
) -> Outcome {
    let event = still_so(event, surroundings.lease_runs);
    handle(state, &event, origin, &mut surroundings.context)
}

fn silent(nodes: &[String], lease_runs: &dyn Fn(&str) -> bool) -> Vec<String> {
    nodes.iter().filter(|node| !lease_runs(node)).cloned().collect()
}

/// A node that has reported while its end waited in the queue is not lost.
fn still_so(event: &Event, lease_runs: &dyn Fn(&str) -> bool) -> Event {
    match event {
        Event::LeaseEnded(nodes) => Event::LeaseEnded(silent(nodes, lease_runs)),
        Event::CutOff(nodes) => Event::CutOff(silent(nodes, lease_runs)),
        event => event.clone(),
    }
}
