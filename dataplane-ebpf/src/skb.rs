//! The packet of a program: the one place that reads and writes packet memory.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::{bpf_csum_update, bpf_l4_csum_replace, bpf_skb_pull_data},
    programs::TcContext,
};
use dataplane_common::{
    ethernet,
    ipv4::{self, Address},
    masquerade::{Family, PacketMut},
    packet::Packet,
};

/// Two bytes of a port, as `bpf_l4_csum_replace` wants its size.
const PORT_BYTES: u64 = 2;
/// Four bytes of an address.
const ADDRESS_BYTES: u64 = 4;

/// Direct access to the packet's linear part.
///
/// The bounds are read anew for each access: a helper that changes the packet moves it. The compiler reads
/// them once between two helpers.
pub(crate) struct Skb {
    skb: *mut __sk_buff,
}

impl Skb {
    #[inline(always)]
    pub(crate) fn new(ctx: &TcContext) -> Skb {
        Skb { skb: ctx.skb.skb }
    }

    #[inline(always)]
    pub(crate) fn as_ptr(&self) -> *mut __sk_buff {
        self.skb
    }

    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        // SAFETY: `skb` is the context that the kernel gave to the program; it is valid throughout.
        unsafe { (*self.skb).ifindex }
    }

    /// The EtherType in wire order, as the kernel has read it: behind a VLAN tag that it took off.
    #[inline(always)]
    pub(crate) fn protocol(&self) -> u16 {
        // SAFETY: as for `ifindex`.
        unsafe { (*self.skb).protocol as u16 }
    }

    /// Whether the kernel took a VLAN tag off the frame, which then no longer shows it.
    #[inline(always)]
    pub(crate) fn has_vlan_tag(&self) -> bool {
        // SAFETY: as for `ifindex`.
        unsafe { (*self.skb).vlan_present != 0 }
    }

    /// Makes the first `bytes` of the packet, or all of a shorter one, directly readable. False if the
    /// kernel has no memory for it.
    #[inline(always)]
    pub(crate) fn pull(&mut self, bytes: usize) -> bool {
        let want = if self.length() < bytes { self.length() } else { bytes };
        // SAFETY: as for `ifindex`.
        let (data, end) = unsafe { ((*self.skb).data, (*self.skb).data_end) };
        if data as usize + want <= end as usize {
            return true;
        }
        // SAFETY: the context is valid, and no pointer into the packet is held across the call.
        unsafe { bpf_skb_pull_data(self.skb, want as u32) == 0 }
    }

    /// Makes what the masquerade wants to see of the packet directly readable, if the kernel has memory for it.
    #[inline(always)]
    pub(crate) fn pull_headers<F: Family>(&mut self) {
        let bytes = F::linear_bytes(self);
        self.pull(bytes);
    }

    #[inline(always)]
    fn mend_port(&mut self, offset: usize, (from, to): (u16, u16), mangled: u64) -> Option<()> {
        if from == to {
            return Some(());
        }
        let (from, to) = (from as u64, to as u64);
        // SAFETY: the context is valid, and no pointer into the packet is held across the call.
        let done = unsafe { bpf_l4_csum_replace(self.skb, offset as u32, from, to, mangled | PORT_BYTES) };
        (done == 0).then_some(())
    }

    /// Where `size` bytes at `offset` lie, if the linear part reaches so far.
    #[inline(always)]
    fn at(&self, offset: usize, size: usize) -> Option<usize> {
        // SAFETY: as for `ifindex`.
        let (data, end) = unsafe { ((*self.skb).data as usize, (*self.skb).data_end as usize) };
        let mut start = data + offset;
        if offset >= VARIABLE {
            start = opaque(start);
        }
        (start + size <= end).then_some(start)
    }
}

/// From here on offsets may be variable: behind an IPv4 header, which has no fixed length.
const VARIABLE: usize = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES_MIN;

/// Hides from the compiler how a number came about, so that it makes each comparison that is written. Left
/// to itself it concludes from one variable offset that another, or a fixed one, is in bounds too, or makes one comparison
/// of two; the verifier does not follow such reasoning and wants to see the comparison of the very register.
#[inline(always)]
pub(crate) fn opaque(number: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    {
        let mut hidden = number;
        // An empty statement would give two source lines to one instruction, which the kernel refuses.
        // SAFETY: moves a register onto itself.
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) hidden, options(pure, nomem, nostack)) };
        hidden
    }
    #[cfg(not(target_arch = "bpf"))]
    number
}

impl Packet for Skb {
    #[inline(always)]
    fn byte(&self, offset: usize) -> Option<u8> {
        // SAFETY: `at` has compared the access with the packet's end, which the verifier demands too.
        self.at(offset, 1).map(|p| unsafe { *(p as *const u8) })
    }

    // The kernel loads BPF for x86-64 and arm64 without alignment rules for packets, and one load is a
    // quarter of the work of four.
    #[inline(always)]
    fn wire16(&self, offset: usize) -> Option<u16> {
        // SAFETY: in bounds by `at`; the target has unaligned loads.
        self.at(offset, 2).map(|p| unsafe { *(p as *const u16) })
    }

    #[inline(always)]
    fn wire32(&self, offset: usize) -> Option<u32> {
        // SAFETY: in bounds by `at`; the target has unaligned loads.
        self.at(offset, 4).map(|p| unsafe { *(p as *const u32) })
    }

    #[inline(always)]
    fn wire64(&self, offset: usize) -> Option<u64> {
        // SAFETY: in bounds by `at`; the target has unaligned loads.
        self.at(offset, 8).map(|p| unsafe { *(p as *const u64) })
    }

    #[inline(always)]
    fn length(&self) -> usize {
        // SAFETY: as for `ifindex`.
        unsafe { (*self.skb).len as usize }
    }
}

impl PacketMut for Skb {
    #[inline(always)]
    fn set16(&mut self, offset: usize, wire: u16) -> Option<()> {
        let start = self.at(offset, 2)?;
        // SAFETY: in bounds by `at`; the kernel has made the linear part this program's own.
        unsafe { *(start as *mut u16) = wire };
        Some(())
    }

    #[inline(always)]
    fn set32(&mut self, offset: usize, wire: u32) -> Option<()> {
        let start = self.at(offset, 4)?;
        // SAFETY: in bounds by `at`; the kernel has made the linear part this program's own.
        unsafe { *(start as *mut u32) = wire };
        Some(())
    }

    #[inline(always)]
    fn set64(&mut self, offset: usize, wire: u64) -> Option<()> {
        let start = self.at(offset, 8)?;
        // SAFETY: in bounds by `at`; the kernel has made the linear part this program's own.
        unsafe { *(start as *mut u64) = wire };
        Some(())
    }

    #[inline(always)]
    fn mend_transport(
        &mut self,
        offset: usize,
        address: (Address, Address),
        port: (u16, u16),
        udp: bool,
    ) -> Option<()> {
        // Only the kernel knows whether the device is to finish the checksum, so it must do this.
        let mangled = if udp { BPF_F_MARK_MANGLED_0 as u64 } else { 0 };
        let pseudo = BPF_F_PSEUDO_HDR as u64 | mangled | ADDRESS_BYTES;
        let (from, to) = (address.0 as u64, address.1 as u64);
        // SAFETY: the context is valid, and no pointer into the packet is held across the call.
        if unsafe { bpf_l4_csum_replace(self.skb, offset as u32, from, to, pseudo) } != 0 {
            return None;
        }
        self.mend_port(offset, port, mangled)
    }

    #[inline(always)]
    fn mend_transport_by(&mut self, offset: usize, address: u16, port: (u16, u16), udp: bool) -> Option<()> {
        let mangled = if udp { BPF_F_MARK_MANGLED_0 as u64 } else { 0 };
        // No size: what is given is the difference.
        let pseudo = BPF_F_PSEUDO_HDR as u64 | mangled;
        // SAFETY: the context is valid, and no pointer into the packet is held across the call.
        if unsafe { bpf_l4_csum_replace(self.skb, offset as u32, 0, address as u64, pseudo) } != 0 {
            return None;
        }
        // Where the device has summed the whole packet, the kernel takes it that a header's checksum balances the
        // address, as in IPv4, and corrects the device's sum. Over IPv6 the transport's checksum balances it, so
        // this is undone (6.16 has a flag for it). A UDP checksum of zero is left alone by all this, and so the
        // device's sum changes with the address: by the same number.
        self.sum_changed(address);
        self.mend_port(offset, port, mangled)
    }

    #[inline(always)]
    fn sum_changed(&mut self, change: u16) {
        // Fails where the device has not summed the packet, and then there is nothing to correct.
        // SAFETY: the context is valid, and no pointer into the packet is held across the call.
        let _ = unsafe { bpf_csum_update(self.skb, change as u32) };
    }
}
