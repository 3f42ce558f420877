//! Fragments that need more than a packet in one piece: those that came before their first are copied away, and sent
//! again when it comes. Programs of their own, to which the uplink's hand over (`NAT_TAILS`).

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM},
    helpers::{bpf_clone_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes},
    macros::classifier,
    programs::TcContext,
};
use dataplane_common::{
    counter::Counter,
    ethernet,
    masquerade::{
        Common as _, Family, Ipv4, Ipv6, Kept, KeptKey, Tables,
        fragment::{self, KEPT_BYTES_MAX, KEPT_OF_DATAGRAM_MAX, Sent, is_too_old},
    },
    packet::Packet as _,
};

use crate::{
    DROP, NEXT,
    maps::{NAT_KEEPING, NAT_KEPT, NAT6_KEPT, count},
    masquerade,
    skb::{Skb, opaque},
    tables::Maps,
};

/// Fragments on their way out.
#[classifier]
#[inline(always)]
pub(crate) fn fragment_egress(ctx: TcContext) -> i32 {
    match Skb::new(&ctx).protocol() {
        ethernet::IPV4 => out::<Ipv4>(&ctx),
        _ => out::<Ipv6>(&ctx),
    }
}

/// Fragments on their way in.
#[classifier]
#[inline(always)]
pub(crate) fn fragment_ingress(ctx: TcContext) -> i32 {
    match Skb::new(&ctx).protocol() {
        ethernet::IPV4 => inward::<Ipv4>(&ctx),
        _ => inward::<Ipv6>(&ctx),
    }
}

#[inline(always)]
fn out<'a, F: KeptMap>(ctx: &'a TcContext) -> i32
where
    Maps<'a>: Tables<F>,
{
    let (mut skb, maps) = (Skb::new(ctx), &mut Maps { ctx });
    skb.pull_headers::<F>();
    match fragment::egress::<F, _, _>(&mut skb, maps) {
        Sent::Next => NEXT,
        Sent::Drop => DROP,
        Sent::Release(key) => release(maps, &skb, key, 0, Counter::EgressReleased),
    }
}

#[inline(always)]
fn inward<'a, F: KeptMap>(ctx: &'a TcContext) -> i32
where
    Maps<'a>: Tables<F>,
{
    let Some(config) = masquerade::config() else { return NEXT };
    let (mut skb, maps) = (Skb::new(ctx), &mut Maps { ctx });
    skb.pull_headers::<F>();
    match fragment::ingress::<F, _, _>(&mut skb, maps, config) {
        Sent::Next => NEXT,
        Sent::Drop => DROP,
        Sent::Release(key) => release(maps, &skb, key, BPF_F_INGRESS as u64, Counter::IngressReleased),
    }
}

/// A family's fragments that came before their first.
pub(crate) trait KeptMap: Family {
    /// The fragment in its place.
    fn kept(key: &KeptKey<Self>) -> Option<&Kept>;
}

macro_rules! kept_in {
    ($family:ty, $map:ident) => {
        impl KeptMap for $family {
            #[inline(always)]
            fn kept(key: &KeptKey<Self>) -> Option<&Kept> {
                // SAFETY: one that is forgotten meanwhile may hold another's bytes by the time they are read: such a
                // packet is judged by its own header as any other, or has a wrong checksum.
                unsafe { $map.get(key) }
            }
        }
    };
}

kept_in!(Ipv4, NAT_KEPT);
kept_in!(Ipv6, NAT6_KEPT);

/// Element of `NAT_KEEPING` for a packet that is about to be kept.
const LATER: u32 = 0;
/// Element of `NAT_KEEPING` for a first fragment, while its packet carries others.
const FIRST: u32 = 1;

/// The packet at hand as it is kept. `None`: too long, or the kernel refuses.
#[inline(always)]
pub(crate) fn copy_later(skb: &Skb, now_ns: u64) -> Option<&'static Kept> {
    copy(skb, LATER, now_ns)
}

#[inline(always)]
fn copy(skb: &Skb, element: u32, now_ns: u64) -> Option<&'static Kept> {
    let bytes = bounded(skb.length())?;
    let kept = NAT_KEEPING.get_ptr_mut(element)?;
    // SAFETY: this CPU's element. Programs of both directions run with bottom halves off, so that one run ends before
    // the next begins, but for those that `release` starts by sending: they are of later fragments, and have the other
    // element. `frame` has room for `bytes`.
    let loaded = unsafe {
        (*kept).came_ns = now_ns;
        (*kept).bytes = bytes as u32;
        bpf_skb_load_bytes(skb.as_ptr().cast(), 0, (*kept).frame.as_mut_ptr().cast(), bytes as u32)
    };
    // SAFETY: written just above.
    (loaded == 0).then(|| unsafe { &*kept })
}

/// Sends what is kept from the side of the interface that `redirect` (flags of `bpf_redirect`) names, where the programs
/// see it as if it had come just now; then the packet at hand goes on.
///
/// The kernel lets a program send no packet but clones of its own: so that one is written over and over, and at last
/// with what it was.
#[inline(always)]
fn release<'a, F: KeptMap>(
    maps: &mut Maps<'a>,
    skb: &Skb,
    mut key: KeptKey<F>,
    redirect: u64,
    counter: Counter,
) -> i32
where
    Maps<'a>: Tables<F>,
{
    if F::kept(&key).is_none() {
        return NEXT;
    }
    let now_ns = maps.now_ns();
    // A first fragment that cannot be copied goes on alone.
    let Some(first) = copy(skb, FIRST, now_ns) else { return NEXT };
    for number in 0..KEPT_OF_DATAGRAM_MAX {
        key.number = number;
        let Some(kept) = F::kept(&key) else { break };
        if !is_too_old(now_ns, kept.came_ns) && write(skb, kept) && send(skb, redirect) {
            count(counter);
        }
        maps.remove_kept(&key);
    }
    if write(skb, first) { NEXT } else { DROP }
}

/// The length of a frame that is kept.
#[inline(always)]
fn bounded(bytes: usize) -> Option<usize> {
    if bytes > KEPT_BYTES_MAX {
        return None;
    }
    let bytes = opaque(bytes);
    (bytes >= ethernet::HEADER_BYTES).then_some(bytes)
}

/// Sends a clone of the packet.
#[inline(always)]
fn send(skb: &Skb, flags: u64) -> bool {
    // SAFETY: the context is valid, and no pointer into the packet is held across the call.
    unsafe { bpf_clone_redirect(skb.as_ptr(), skb.ifindex(), flags) == 0 }
}

/// Makes the packet the one that was kept.
#[inline(always)]
fn write(skb: &Skb, kept: &Kept) -> bool {
    let Some(bytes) = bounded(kept.bytes as usize) else { return false };
    let bytes = bytes as u32;
    // SAFETY: as for `send`.
    if unsafe { bpf_skb_change_tail(skb.as_ptr(), bytes, 0) } != 0 {
        return false;
    }
    let flags = BPF_F_RECOMPUTE_CSUM as u64;
    // SAFETY: as for `send`; `frame` has at least `bytes` bytes.
    unsafe { bpf_skb_store_bytes(skb.as_ptr(), 0, kept.frame.as_ptr().cast(), bytes, flags) == 0 }
}
