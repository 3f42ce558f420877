//! The masquerade, for both of the uplink's programs and both families: each has its direction's translation done.

use aya_ebpf::programs::TcContext;
use dataplane_common::masquerade::{Config, Family, TAIL_FRAGMENT_EGRESS, Verdict};

use crate::{
    DROP, NEXT,
    maps::{MASQUERADE, NAT_TAILS},
    skb::Skb,
    tables::Maps,
};

/// What is translated, and to what.
#[inline(always)]
pub(crate) fn config() -> Option<&'static Config> {
    MASQUERADE.get(0)
}

/// Has a packet translated, dropped or left to the host. Fragments that need more are for the program `tail`.
#[inline(always)]
pub(crate) fn run<'a, F: Family>(
    ctx: &'a TcContext,
    skb: &mut Skb,
    config: &Config,
    tail: u32,
    translate: impl FnOnce(&mut Skb, &mut Maps<'a>, &Config) -> Verdict,
) -> i32 {
    // Without memory to pull, the headers count as cut short: dropped out, left to the host in.
    skb.pull_headers::<F>();
    match translate(skb, &mut Maps { ctx }, config) {
        Verdict::Next => NEXT,
        Verdict::Drop => DROP,
        Verdict::Fragment => {
            // SAFETY: nothing is left to be done here. It comes back if there is no such program.
            unsafe { NAT_TAILS.tail_call(ctx, tail) };
            if tail == TAIL_FRAGMENT_EGRESS { DROP } else { NEXT }
        }
    }
}
