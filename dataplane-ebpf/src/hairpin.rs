//! The guard's half of hairpinning: a packet to an outside port of this node is handed to the pod behind it.

use aya_ebpf::{
    helpers::{bpf_redirect, bpf_skb_store_bytes},
    programs::TcContext,
};
use dataplane_common::{
    counter::Counter,
    ethernet,
    ipv4::Address,
    masquerade::{self, Family, Hairpin, Tables},
};

use crate::{
    DROP, NEXT,
    maps::{PODS, count},
    skb::Skb,
    tables::Maps,
};

/// What is not for a pod's outside port goes its way.
#[inline(always)]
pub(crate) fn run<'a, F: Family>(ctx: &'a TcContext, skb: &mut Skb) -> i32
where
    Maps<'a>: Tables<F>,
{
    let Some(config) = crate::masquerade::config() else { return NEXT };
    let Some(destination) = F::address(skb, F::DESTINATION) else { return NEXT };
    if !F::is_on(config) || !F::is_node(config, destination) {
        return NEXT;
    }
    let bytes = F::linear_bytes(skb);
    skb.pull(bytes);
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
