//! Files under `/proc/sys` of the calling thread's network namespace.

use std::{fs, io, path::PathBuf};

/// The value of a key such as `net/ipv4/conf/eth0/forwarding`, with single spaces; `None` when there is no such
/// key on this kernel or for this device.
pub(crate) fn read(key: &str) -> Option<String> {
    let text = fs::read_to_string(file(key)).ok()?;
    Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Sets a key.
pub(crate) fn write(key: &str, value: &str) -> io::Result<()> {
    fs::write(file(key), value)
}

/// Whether a key exists.
pub(crate) fn exists(key: &str) -> bool {
    file(key).exists()
}

/// The `forwarding` keys of every device, which writing `all/forwarding` changes with it.
pub(crate) fn ipv6_forwarding_keys() -> io::Result<Vec<String>> {
    let devices = fs::read_dir(file("net/ipv6/conf"))?;
    devices
        .map(|entry| Ok(format!("net/ipv6/conf/{}/forwarding", entry?.file_name().to_string_lossy())))
        .collect()
}

fn file(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(key)
}
