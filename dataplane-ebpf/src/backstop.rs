//! Uplink egress, behind the others: the last look at what leaves. A pod's private source gets no further, also
//! while the program that should have translated it is not there.

use aya_ebpf::{macros::classifier, programs::TcContext};
use dataplane_common::{
    counter::Counter,
    ethernet, ipv4, ipv6,
    masquerade::{Config, Family, Ipv4, Ipv6, is_direct},
};

use crate::{
    DROP, NEXT, log::event, maps::count, masquerade, skb::Skb, tables::Maps, uplink_egress::is_near,
};

/// Drops IPv4 of the pods' range, and IPv6 of pods to where their addresses are no good.
#[classifier]
#[inline(always)]
pub(crate) fn uplink_backstop(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let Some(config) = masquerade::config() else { return NEXT };
    let is_fine = match skb.protocol() {
        ethernet::IPV4 => {
            skb.pull(ethernet::HEADER_BYTES + ipv4::HEADER_BYTES_MIN);
            is_of_no_pod::<Ipv4>(&skb, config)
        }
        ethernet::IPV6 if config.exit != 0 && !is_near(&skb) => {
            skb.pull(ipv6::PAYLOAD + 1);
            is_of_no_pod::<Ipv6>(&skb, config) || is_direct::<Ipv6, _, _>(&skb, &mut Maps { ctx: &ctx })
        }
        _ => return NEXT,
    };
    if is_fine {
        count(Counter::BackstopPass);
        return NEXT;
    }
    count(Counter::BackstopDropPrivate);
    event!(&ctx, "uplink_backstop: a private source, dropped");
    DROP
}

/// A header that is cut short before its source has no business out there either.
#[inline(always)]
fn is_of_no_pod<F: Family>(skb: &Skb, config: &Config) -> bool {
    !F::is_on(config) || F::address(skb, F::SOURCE).is_some_and(|source| !F::is_pod(config, source))
}
