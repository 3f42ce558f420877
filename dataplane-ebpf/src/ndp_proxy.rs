//! The NDP proxy's half of the uplink's ingress: answers neighbour solicitations for the node's pods.

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    counter::Counter,
    ndp::{self, SOLICITATION_BYTES_MAX, Verdict},
};

use crate::{
    DROP, NEXT, answer,
    log::event,
    maps::{NDP_PODS, count},
    skb::Skb,
};

/// Answers, drops what is malformed, leaves the rest to the kernel.
#[inline(always)]
pub(crate) fn run(ctx: &TcContext, skb: &mut Skb) -> i32 {
    // Drivers may leave a message in fragments; its start is always linear.
    if ndp::target(skb).is_none() || !skb.pull(SOLICITATION_BYTES_MAX) {
        count(Counter::NdpPass);
        return NEXT;
    }
    // SAFETY: the entry is copied at once; an update of it replaces the whole entry.
    let verdict = ndp::proxy(skb, |target| unsafe { NDP_PODS.get(target) }.map(|pod| pod.mac));
    match verdict {
        Verdict::Pass => {
            count(Counter::NdpPass);
            NEXT
        }
        Verdict::Drop(reason) => {
            count(reason);
            event!(ctx, "ndp_proxy: solicitation dropped, reason {}", reason as u32);
            DROP
        }
        Verdict::Answer(answer, counter) => match answer::send(skb, &answer) {
            Some(verdict) => {
                count(counter);
                event!(ctx, "ndp_proxy: {:i} is here, to {:i}", answer.target.octets(), answer.to.octets());
                verdict
            }
            None => {
                count(Counter::NdpDropError);
                DROP
            }
        },
    }
}
