//! The masquerade, for both of the uplink's programs: each has its direction's translation done.

use aya_ebpf::programs::TcContext;
use dataplane_common::masquerade::{Config, Verdict, linear_bytes};

use crate::{DROP, NEXT, maps::MASQUERADE, skb::Skb, tables::Maps};

/// Has an IPv4 packet translated, dropped or left to the host.
#[inline(always)]
pub(crate) fn run<'a>(
    ctx: &'a TcContext,
    skb: &mut Skb,
    translate: impl FnOnce(&mut Skb, &mut Maps<'a>, &Config) -> Verdict,
) -> i32 {
    let Some(config) = MASQUERADE.get(0) else { return NEXT };
    // Without memory to pull, the headers count as cut short: dropped out, left to the host in.
    let bytes = linear_bytes(skb);
    skb.pull(bytes);
    match translate(skb, &mut Maps { ctx }, config) {
        Verdict::Next => NEXT,
        Verdict::Drop => DROP,
    }
}
