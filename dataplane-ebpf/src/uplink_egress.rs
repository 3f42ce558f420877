//! Uplink egress: packets of pods get the node's IPv4 address.

use aya_ebpf::{macros::classifier, programs::TcContext};
use dataplane_common::{counter::Counter, ethernet, masquerade::egress};

use crate::{NEXT, maps::count, masquerade, skb::Skb};

/// Translates or drops what pods send; leaves the rest as it is.
#[classifier]
pub(crate) fn uplink_egress(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    // Known without a look at the packet, and most packets are IPv6.
    if skb.protocol() != ethernet::IPV4 {
        count(Counter::EgressPass);
        return NEXT;
    }
    masquerade::run(&ctx, &mut skb, egress)
}
