//! Reads a whole hash map with few system calls. aya takes one call for a key and one for its value: with a
//! full table of flows that is a second in which the agent does nothing else.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr,
};

use aya::Pod;

/// `BPF_MAP_LOOKUP_BATCH` of `enum bpf_cmd`.
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
/// Entries per call.
const ROOM: usize = 4_096;
/// A call gives whole buckets; one with more entries than this is no hash table any more.
const ROOM_MAX: usize = 1 << 20;

/// `batch` of `union bpf_attr`.
#[repr(C)]
struct Attr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

const _: () = assert!(size_of::<Attr>() == 56);

/// What one call gave.
enum Part {
    /// There is more.
    Some(usize),
    /// These were the last.
    Last(usize),
    /// The next bucket needs more room.
    NoRoom,
}

/// All entries of a hash map; one that comes or goes meanwhile may be among them or not.
///
/// # Kernel
/// 5.6 or later, for `BPF_MAP_LOOKUP_BATCH`.
pub(super) fn entries<K: Pod, V: Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut found = Vec::new();
    let (mut keys, mut values) = (Box::new_uninit_slice(ROOM), Box::new_uninit_slice(ROOM));
    let mut place = None;
    loop {
        let (count, last) = match read(map, &mut place, &mut keys, &mut values)? {
            Part::Some(count) => (count, false),
            Part::Last(count) => (count, true),
            Part::NoRoom if keys.len() < ROOM_MAX => {
                let room = keys.len() * 2;
                (keys, values) = (Box::new_uninit_slice(room), Box::new_uninit_slice(room));
                continue;
            }
            Part::NoRoom => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        };
        // SAFETY: the kernel has written the first `count` keys and values, and any bytes are a `Pod`.
        let read =
            keys.iter().zip(&values).take(count).map(|(k, v)| unsafe { (k.assume_init(), v.assume_init()) });
        found.extend(read);
        if last {
            return Ok(found);
        }
    }
}

/// One call. `place` is where the walk is: none before the first.
fn read<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    place: &mut Option<u32>,
    keys: &mut [MaybeUninit<K>],
    values: &mut [MaybeUninit<V>],
) -> io::Result<Part> {
    let (from, mut to) = (*place, 0_u32);
    let mut attr = Attr {
        in_batch: from.as_ref().map_or(0, |from| ptr::from_ref(from) as u64),
        out_batch: &raw mut to as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: u32::try_from(keys.len().min(values.len())).expect("ROOM_MAX is small"),
        map_fd: u32::try_from(map.as_raw_fd()).expect("a borrowed descriptor is not negative"),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: `attr` is the whole of what this command reads. `keys` and `values` have room for `count` entries
    // of the map's key and value sizes, which the caller's types are; `from` and `to` are four bytes, what hash
    // maps use. All of them live through the call.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut attr, size_of::<Attr>()) };
    let count = attr.count as usize;
    let part = match io::Error::last_os_error() {
        _ if done == 0 => Part::Some(count),
        error if error.raw_os_error() == Some(libc::ENOENT) => Part::Last(count),
        error if error.raw_os_error() == Some(libc::ENOSPC) => return Ok(Part::NoRoom),
        error => return Err(error),
    };
    *place = Some(to);
    Ok(part)
}
