//! Host side of a pod's veth, ingress: lets through what the pod may send.

use aya_ebpf::{macros::classifier, programs::TcContext};
use dataplane_common::{
    counter::Counter,
    ethernet,
    guard::{self, HEADERS_BYTES, Verdict},
    masquerade::{Ipv4, Ipv6, TAIL_HAIRPIN_IPV4, TAIL_HAIRPIN_IPV6},
    ndp::{self, SOLICITATION_BYTES_MAX},
};

use crate::{
    DROP, NEXT, answer, hairpin,
    log::event,
    maps::{GUARD, count},
    skb::Skb,
};

/// Passes, drops, or answers for the gateway.
#[classifier]
#[inline(always)]
pub(crate) fn pod_guard(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    if skb.has_vlan_tag() {
        return drop(&ctx, Counter::GuardDropVlan);
    }
    // SAFETY: the entry is read before the program ends; the agent replaces it as a whole.
    let Some(entry) = (unsafe { GUARD.get(skb.ifindex()) }) else {
        return drop(&ctx, Counter::GuardDropNoEntry);
    };
    let mut verdict = guard::check(&skb, entry);
    // Too short to judge may mean: not linear. That is rare, so it is looked at again, not before.
    if let Verdict::Drop(Counter::GuardDropHeader | Counter::GuardDropSolicitation) = verdict {
        let bytes = if ndp::target(&skb).is_some() { SOLICITATION_BYTES_MAX } else { HEADERS_BYTES };
        if skb.pull(bytes) {
            verdict = guard::check(&skb, entry);
        }
    }
    match verdict {
        Verdict::Pass => {
            count(Counter::GuardPass);
            match skb.protocol() {
                ethernet::IPV4 => hairpin::hand_over::<Ipv4>(&ctx, &skb, TAIL_HAIRPIN_IPV4),
                ethernet::IPV6 => hairpin::hand_over::<Ipv6>(&ctx, &skb, TAIL_HAIRPIN_IPV6),
                _ => NEXT,
            }
        }
        Verdict::Drop(reason) => drop(&ctx, reason),
        Verdict::Answer(answer) => match answer::send(&skb, &answer) {
            Some(verdict) => {
                count(Counter::GuardAnswered);
                verdict
            }
            None => drop(&ctx, Counter::GuardDropError),
        },
    }
}

#[inline(always)]
fn drop(ctx: &TcContext, reason: Counter) -> i32 {
    count(reason);
    event!(ctx, "pod_guard: packet dropped, reason {}", reason as u32);
    DROP
}
