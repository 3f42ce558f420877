//! Hairpinning: a packet to an outside port of this node is handed to the pod behind it. Programs of their own, to which
//! the guard hands over (`NAT_TAILS`): the verifier sees all of the masquerade for each.

use aya_ebpf::{
    helpers::{bpf_redirect, bpf_skb_store_bytes},
    macros::classifier,
    programs::TcContext,
};
use dataplane_common::{
    counter::Counter,
    ethernet,
    ipv4::Address,
    masquerade::{self, Family, Hairpin, Ipv4, Ipv6, Tables},
};

use crate::{
    DROP, NEXT,
    maps::{NAT_TAILS, PODS, count},
    skb::Skb,
    tables::Maps,
};

/// What is not for the node's outside address goes its way.
#[inline(always)]
pub(crate) fn hand_over<F: Family>(ctx: &TcContext, skb: &Skb, tail: u32) -> i32 {
    let Some(config) = crate::masquerade::config() else { return NEXT };
    if F::is_on(config) && F::address(skb, F::DESTINATION).is_some_and(|to| F::is_node(config, to)) {
        // SAFETY: nothing is left to be done here. It comes back if there is no such program.
        unsafe { NAT_TAILS.tail_call(ctx, tail) };
    }
    NEXT
}

/// What a pod sends to the node's IPv4 address.
#[classifier]
#[inline(always)]
pub(crate) fn hairpin_ipv4(ctx: TcContext) -> i32 {
    run::<Ipv4>(&ctx)
}

/// What a pod sends to the node's address for the IPv6 internet.
#[classifier]
#[inline(always)]
pub(crate) fn hairpin_ipv6(ctx: TcContext) -> i32 {
    run::<Ipv6>(&ctx)
}

/// What is not for a pod's outside port goes its way.
#[inline(always)]
fn run<'a, F: Family>(ctx: &'a TcContext) -> i32
where
    Maps<'a>: Tables<F>,
{
    let Some(config) = crate::masquerade::config() else { return NEXT };
    let skb = &mut Skb::new(ctx);
    skb.pull_headers::<F>();
    match masquerade::hairpin::<F, _, _>(skb, &mut Maps { ctx }, config) {
        Hairpin::Host => NEXT,
        Hairpin::Drop(reason) => {
            count(reason);
            DROP
        }
        Hairpin::Deliver(inside) => match deliver(skb, inside) {
            Some(verdict) => {
                count(Counter::HairpinDelivered);
                verdict
            }
            None => {
                count(Counter::HairpinDropError);
                DROP
            }
        },
    }
}

/// Sends the packet out of the host side of the other pod's link.
#[inline(always)]
fn deliver(skb: &Skb, inside: Address) -> Option<i32> {
    // SAFETY: the entry is copied at once; an update of it replaces the whole entry.
    let link = unsafe { PODS.get(inside) }.copied()?;
    let [[a, b, c, d, e, f], [g, h, i, j, k, l]] = [link.pod_mac, link.host_mac];
    let macs = [a, b, c, d, e, f, g, h, i, j, k, l];
    let at = ethernet::DESTINATION as u32;
    // SAFETY: the context is valid, and no pointer into the packet is held across the call; `macs` has 12 bytes.
    if unsafe { bpf_skb_store_bytes(skb.as_ptr(), at, macs.as_ptr().cast(), 12, 0) } != 0 {
        return None;
    }
    // SAFETY: takes numbers only.
    Some(unsafe { bpf_redirect(link.ifindex, 0) } as i32)
}
