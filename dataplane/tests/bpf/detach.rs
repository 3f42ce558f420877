//! Takes a TCX link off its interface while its pin stays, as `bpftool link detach` does.

use std::{ffi::CString, io, os::unix::ffi::OsStrExt as _, path::Path};

const BPF_OBJ_GET: i32 = 7;
const BPF_LINK_DETACH: i32 = 34;

/// The beginning of `union bpf_attr` for both commands; the kernel takes the rest as zero.
#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Detaches the link behind `pin`.
pub(crate) fn detach(pin: &Path) {
    let path = CString::new(pin.as_os_str().as_bytes()).expect("a path holds no NUL");
    let mut get = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    let fd = bpf(BPF_OBJ_GET, &mut get);
    let mut link = u32::try_from(fd).expect("a descriptor is not negative");
    bpf(BPF_LINK_DETACH, &mut link);
    nix::unistd::close(fd).expect("the descriptor is open");
}

fn bpf<T>(command: i32, attr: &mut T) -> i32 {
    // SAFETY: `attr` is a live value of the size that is told, and what it points to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    assert!(result >= 0, "bpf command {command}: {}", io::Error::last_os_error());
    i32::try_from(result).expect("a descriptor fits")
}
