//! Uplink egress: packets of pods get the node's IPv4 address.

use aya_ebpf::{macros::classifier, programs::TcContext};
use dataplane_common::{
    counter::Counter,
    ethernet,
    masquerade::{self, Verdict},
};

use crate::{
    DROP, NEXT,
    maps::{MASQUERADE, count},
    skb::Skb,
    tables::Maps,
};

/// Translates or drops what pods send; leaves the rest as it is.
#[classifier]
pub(crate) fn uplink_egress(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    // Known without a look at the packet, and most packets are IPv6.
    if skb.protocol() != ethernet::IPV4 {
        count(Counter::EgressPass);
        return NEXT;
    }
    let Some(config) = MASQUERADE.get(0) else { return NEXT };
    // Without memory to pull, the headers count as cut short: dropped out, left to the host in.
    let linear_bytes = masquerade::linear_bytes(&skb);
    skb.pull(linear_bytes);
    match masquerade::egress(&mut skb, &mut Maps { ctx: &ctx }, config) {
        Verdict::Next => NEXT,
        Verdict::Drop => DROP,
    }
}
