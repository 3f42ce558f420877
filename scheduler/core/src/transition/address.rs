//! Draws the addresses of pods, and draws again when another machine has one already.

use std::net::Ipv6Addr;

use hextet_address::pod_address;

use crate::{
    draft::Draft,
    event::{Conflict, Refusal},
    pod::{Pod, PodPhase},
    transition::{Context, Step, node},
};

/// An address that no pod has now. That none ever had it is checked where the history is: in the store.
pub(super) fn draw(draft: &Draft<'_>, node: &str, context: &mut Context<'_>) -> Option<Ipv6Addr> {
    let node = draft.nodes().get(node)?;
    loop {
        let address = pod_address(node.prefix, node.group_id, context.rng);
        if !draft.has_address(&address) {
            return Some(address);
        }
    }
}

/// The pod gets another address, and its node starts it anew. A pod that goes away, or that has another
/// address by now, is left alone. How often that happens in a row is the node's to bound, which knows the time.
pub(super) fn conflict(
    draft: &mut Draft<'_>,
    name: &str,
    conflict: &Conflict,
    context: &mut Context<'_>,
) -> Result<Step, Refusal> {
    let alive = node::returned(draft, name, context)?;
    let pod = draft.pods().get(&conflict.pod).filter(|pod| {
        pod.is_wanted() && pod.node.as_deref() == Some(name) && pod.address == Some(conflict.address)
    });
    let Some(pod) = pod.cloned() else { return Ok(alive) };
    let Some(new) = draw(draft, name, context) else { return Ok(alive) };
    let Conflict { pod: id, address, mac } = conflict;
    let message = format!("the host with MAC {mac} has its address {address} too; it moves to {new}");
    draft.put_pod(Pod { address: Some(new), phase: PodPhase::Starting, message, ..Pod::clone(&pod) });
    let message = format!("pod {id} moves to {new}: the host with MAC {mac} has {address} too");
    Ok(Step { message, replan: alive.replan })
}
