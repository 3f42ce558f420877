//! Turns the packet at hand into an advertisement and sends it back.

use aya_ebpf::{
    bindings::BPF_F_RECOMPUTE_CSUM,
    helpers::{bpf_redirect, bpf_skb_change_tail, bpf_skb_store_bytes},
};
use dataplane_common::{
    ndp::{ADVERTISEMENT_BYTES, Advertisement},
    packet::Packet as _,
};

use crate::skb::Skb;

/// Writes the answer over the packet and redirects it out of the interface it came from. `None` if the
/// kernel refuses.
#[inline(always)]
pub(crate) fn send(skb: &Skb, answer: &Advertisement) -> Option<i32> {
    let frame = answer.frame();
    let at = skb.as_ptr();
    // A solicitation without option, or with several, is of another length than the answer.
    if skb.length() != ADVERTISEMENT_BYTES {
        // SAFETY: the context is valid, and no pointer into the packet is held across the call.
        let resized = unsafe { bpf_skb_change_tail(at, ADVERTISEMENT_BYTES as u32, 0) };
        if resized != 0 {
            return None;
        }
    }
    let flags = BPF_F_RECOMPUTE_CSUM as u64;
    // SAFETY: `frame` has `ADVERTISEMENT_BYTES` bytes; the context is as above.
    if unsafe { bpf_skb_store_bytes(at, 0, frame.as_ptr().cast(), ADVERTISEMENT_BYTES as u32, flags) } != 0 {
        return None;
    }
    // SAFETY: takes numbers only.
    Some(unsafe { bpf_redirect(skb.ifindex(), 0) } as i32)
}
