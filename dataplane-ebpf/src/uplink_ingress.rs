//! Uplink ingress: solicitations for pods are answered, replies to pods are handed to them.
//!
//! One program for both: on the way of every packet, entering a second one costs more than what either does
//! with most packets.

use aya_ebpf::{macros::classifier, programs::TcContext};
use dataplane_common::{ethernet, masquerade::ingress};

use crate::{masquerade, ndp_proxy, skb::Skb};

/// IPv4 goes to the masquerade, everything else to the NDP proxy.
#[classifier]
pub(crate) fn uplink_ingress(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    if skb.protocol() == ethernet::IPV4 {
        masquerade::run(&ctx, &mut skb, ingress)
    } else {
        ndp_proxy::run(&ctx, &mut skb)
    }
}
