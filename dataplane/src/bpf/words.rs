//! Arrays of the programs in this process's memory: the one place of the agent where memory is shared with
//! them. It exists because the map calls have no compare-and-exchange.

use std::{
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// An array map as its 64-bit words.
pub(super) struct Words {
    start: NonNull<std::ffi::c_void>,
    length: usize,
}

impl Words {
    /// Maps the first `length` words of an array with `BPF_F_MMAPABLE`.
    pub(super) fn map(array: impl AsFd, length: u32) -> nix::Result<Words> {
        let length = length as usize;
        let bytes = NonZeroUsize::new(length * size_of::<u64>()).ok_or(nix::Error::EINVAL)?;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        let start = unsafe {
            mmap(None, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, array, 0)
        }?;
        Ok(Words { start, length })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is the page-aligned start of `length` mapped words, which stay mapped as long as
        // `self`; the programs and this process change them by whole, aligned 64-bit accesses.
        unsafe { slice::from_raw_parts(self.start.as_ptr().cast(), self.length) }
    }

    /// The word with that index.
    pub(super) fn get(&self, index: u32) -> u64 {
        self.words()[index as usize].load(Ordering::Acquire)
    }

    /// Replaces the word, unless it was changed since `from` was read.
    pub(super) fn replace(&self, index: u32, from: u64, to: u64) -> bool {
        self.words()[index as usize].compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped, and no slice of it outlives `self`.
        let _ = unsafe { munmap(self.start, self.length * size_of::<u64>()) };
    }
}
