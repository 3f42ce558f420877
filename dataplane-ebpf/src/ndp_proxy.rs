//! The NDP proxy's half of the uplink's ingress: answers neighbour solicitations for the node's pods.

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    counter::Counter,
    ethernet::Mac,
    ipv6::Address,
    ndp::{self, SOLICITATION_BYTES_MAX, Verdict},
};

use crate::{
    DROP, NEXT, answer,
    log::event,
    maps::{NDP_PODS, count},
    skb::Skb,
};

/// The MAC address to answer with for a local pod.
#[inline(always)]
fn mac(target: &Address) -> Option<Mac> {
    // SAFETY: the entry is copied at once; an update of it replaces the whole entry.
    unsafe { NDP_PODS.get(target) }.map(|pod| pod.mac)
}

/// Answers, drops what is malformed, leaves the rest to the kernel.
#[inline(always)]
pub(crate) fn run(ctx: &TcContext, skb: &mut Skb) -> i32 {
    let hidden = ndp::may_hide(skb);
    // Drivers may leave a message in fragments; its start is always linear.
    if !hidden && ndp::target(skb).is_none() || !skb.pull(SOLICITATION_BYTES_MAX) {
        count(Counter::NdpPass);
        return NEXT;
    }
    match if hidden { ndp::hidden(skb, mac) } else { ndp::proxy(skb, mac) } {
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
