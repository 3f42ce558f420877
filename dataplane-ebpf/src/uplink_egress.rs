//! Uplink egress: packets of pods get the node's address.

use aya_ebpf::{macros::classifier, programs::TcContext};
use dataplane_common::{
    counter::Counter,
    ethernet,
    masquerade::{Family, Ipv4, Ipv6, TAIL_FRAGMENT_EGRESS, egress},
};

use crate::{NEXT, maps::count, masquerade, skb::Skb};

/// Translates or drops what pods send; leaves the rest as it is.
#[classifier]
#[inline(always)]
pub(crate) fn uplink_egress(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let Some(config) = masquerade::config() else { return NEXT };
    match skb.protocol() {
        ethernet::IPV4 => {
            masquerade::run::<Ipv4>(&ctx, &mut skb, config, TAIL_FRAGMENT_EGRESS, egress::<Ipv4, _, _>)
        }
        // Most packets go to pods, which is seen at once.
        ethernet::IPV6 if config.exit != 0 && !is_near(&skb) => {
            masquerade::run::<Ipv6>(&ctx, &mut skb, config, TAIL_FRAGMENT_EGRESS, egress::<Ipv6, _, _>)
        }
        _ => {
            count(Counter::EgressPass);
            NEXT
        }
    }
}

/// Whether the packet goes to where pods' addresses are good.
#[inline(always)]
pub(crate) fn is_near(skb: &Skb) -> bool {
    Ipv6::address(skb, Ipv6::DESTINATION).is_some_and(Ipv6::is_near)
}
