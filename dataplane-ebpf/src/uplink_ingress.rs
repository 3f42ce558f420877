//! Uplink ingress: solicitations for pods are answered, replies to pods are handed to them.
//!
//! One program for both: on the way of every packet, entering a second one costs more than what either does
//! with most packets.

use aya_ebpf::{macros::classifier, programs::TcContext};
use dataplane_common::{
    ethernet,
    masquerade::{Config, Family, Ipv4, Ipv6, TAIL_FRAGMENT_INGRESS, ingress},
};

use crate::{NEXT, masquerade, ndp_proxy, skb::Skb};

/// IPv4 goes to the masquerade, everything else to the NDP proxy, and IPv6 for the address that pods leave with
/// from there to the masquerade.
#[classifier]
#[inline(always)]
pub(crate) fn uplink_ingress(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let Some(config) = masquerade::config() else { return NEXT };
    if skb.protocol() == ethernet::IPV4 {
        return masquerade::run::<Ipv4>(&ctx, &mut skb, config, TAIL_FRAGMENT_INGRESS, ingress::<Ipv4, _, _>);
    }
    let verdict = ndp_proxy::run(&ctx, &mut skb);
    if verdict == NEXT && config.exit != 0 && is_for_node(&skb, config) {
        return masquerade::run::<Ipv6>(&ctx, &mut skb, config, TAIL_FRAGMENT_INGRESS, ingress::<Ipv6, _, _>);
    }
    verdict
}

#[inline(always)]
fn is_for_node(skb: &Skb, config: &Config) -> bool {
    Ipv6::address(skb, Ipv6::DESTINATION).is_some_and(|to| Ipv6::is_node(config, to))
}
