//! Uplink egress, behind the others: the last look at what leaves. A pod's private source gets no further, also
//! while the program that should have translated it is not there.

use aya_ebpf::{macros::classifier, programs::TcContext};
use dataplane_common::{counter::Counter, ethernet, ipv4, packet::Packet as _};

use crate::{
    DROP, NEXT,
    log::event,
    maps::{MASQUERADE, count},
    skb::Skb,
};

/// Drops IPv4 of the pods' range.
#[classifier]
pub(crate) fn uplink_backstop(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    if skb.protocol() != ethernet::IPV4 {
        return NEXT;
    }
    let Some(config) = MASQUERADE.get(0) else { return NEXT };
    skb.pull(ethernet::HEADER_BYTES + ipv4::HEADER_BYTES_MIN);
    // An IPv4 header that is cut short before its source has no business out there either.
    if config.enabled == 0 || skb.wire32(ipv4::SOURCE).is_some_and(|source| !config.is_pod(source)) {
        count(Counter::BackstopPass);
        return NEXT;
    }
    count(Counter::BackstopDropPrivate);
    event!(&ctx, "uplink_backstop: a private source, dropped");
    DROP
}
