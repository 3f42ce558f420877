//! The map `NAT_PORTS` in this process's memory: the one place of the agent where memory is shared with the
//! programs. It exists because the map call has no compare-and-exchange.

use std::{
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU64, Ordering},
};

use dataplane_common::masquerade::{OWNER_FREE, PORTS_MAX};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const BYTES: usize = PORTS_MAX as usize * size_of::<u64>();

/// The owners of all outside ports.
pub(super) struct PortTable {
    start: NonNull<std::ffi::c_void>,
}

impl PortTable {
    pub(super) fn new(map: impl AsFd) -> nix::Result<PortTable> {
        let length = NonZeroUsize::new(BYTES).expect("the table has ports");
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        let start = unsafe {
            mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, map, 0)
        }?;
        Ok(PortTable { start })
    }

    fn ports(&self) -> &[AtomicU64] {
        // SAFETY: `start` is the page-aligned start of `BYTES` mapped bytes, which stay mapped as long as
        // `self`; the programs and this process change them by whole, aligned 64-bit accesses.
        unsafe { slice::from_raw_parts(self.start.as_ptr().cast(), PORTS_MAX as usize) }
    }

    /// The owner of a port.
    pub(super) fn owner(&self, index: u32) -> u64 {
        self.ports()[index as usize].load(Ordering::Acquire)
    }

    /// Frees the port, unless it was claimed anew since `owner` was read.
    pub(super) fn free(&self, index: u32, owner: u64) -> bool {
        self.ports()[index as usize]
            .compare_exchange(owner, OWNER_FREE, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}

impl Drop for PortTable {
    fn drop(&mut self) {
        // SAFETY: maps exactly what `new` mapped, and no slice of it outlives `self`.
        let _ = unsafe { munmap(self.start, BYTES) };
    }
}
