//! The BPF file system that the tests pin on.

use std::{path::Path, sync::Once};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Where it belongs.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";

/// As systemd does at boot; it stays, because tests of other processes may use it by now. One test mounts for
/// all of a binary: a second mount would lie over the first and hide what is pinned there.
pub(crate) fn mount_bpffs() {
    static MOUNTED: Once = Once::new();
    MOUNTED.call_once(|| {
        let top = Path::new(BPFFS);
        if !statfs(top).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC) {
            mount(Some("bpf"), top, Some("bpf"), MsFlags::empty(), None::<&str>)
                .expect("bpffs can be mounted");
        }
    });
}
