//! What the kernel says of this process, and processes of this program.

use std::{env, ffi::OsStr, fs, process::Command, time::Duration};

/// Runs this program with these arguments to its end.
pub(crate) fn run<S: AsRef<OsStr>>(args: &[S]) {
    let program = env::current_exe().expect("a program that runs has a path");
    let status = Command::new(program).args(args).status().expect("it starts");
    assert!(status.success(), "a part of the benchmark has failed");
}

/// What it has in memory (`VmRSS`), in bytes.
pub(crate) fn resident_bytes() -> u64 {
    status_bytes("VmRSS:")
}

/// The most that it ever had in memory (`VmHWM`), in bytes.
pub(crate) fn peak_bytes() -> u64 {
    status_bytes("VmHWM:")
}

/// How long this thread has been on a processor, to a few milliseconds.
pub(crate) fn busy() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text.split_whitespace().next().and_then(|word| word.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}

fn status_bytes(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kibibytes =
        line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|text| text.parse::<u64>().ok());
    kibibytes.unwrap_or(0) << 10
}
