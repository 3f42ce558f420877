//! The masquerade's half of the uplink's ingress: hands replies to the pods they are for.

use aya_ebpf::programs::TcContext;
use dataplane_common::masquerade::{self, Verdict};

use crate::{DROP, NEXT, maps::MASQUERADE, skb::Skb, tables::Maps};

/// Translates what belongs to a flow; leaves the rest to the host.
#[inline(always)]
pub(crate) fn run(ctx: &TcContext, skb: &mut Skb) -> i32 {
    let Some(config) = MASQUERADE.get(0) else { return NEXT };
    // Without memory to pull, the headers count as cut short: dropped out, left to the host in.
    let linear_bytes = masquerade::linear_bytes(skb);
    skb.pull(linear_bytes);
    match masquerade::ingress(skb, &mut Maps { ctx }, config) {
        Verdict::Next => NEXT,
        Verdict::Drop => DROP,
    }
}
