//! The node's lease as a file in the run folder: until when, by the clock that also counts while the machine sleeps.
//!
//! Written by the agent's lease thread, read by the supervisors of pods of which there may only be one: they outlive the
//! agent, and must end their tasks without it. A file that is missing, of an earlier boot, or not readable is no lease.
//!
//! # Layout
//! One line: the kernel's boot id, a space, nanoseconds of `CLOCK_BOOTTIME` in decimal.

use std::{fs, io, path::Path, time::Duration};

use nix::time::{ClockId, clock_gettime};

/// The file's name in the run folder.
pub(crate) const LEASE_FILE: &str = "lease";

/// How long the machine has run, with the time for which it slept.
pub(crate) fn boot_time() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::MAX, Duration::from)
}

/// A number for an agent that starts now: greater than that of any before it in this boot.
pub(crate) fn session() -> u64 {
    u64::try_from(boot_time().as_nanos()).unwrap_or(u64::MAX)
}

/// Says that the lease runs until then.
pub(crate) fn write(path: &Path, until: Duration) -> io::Result<()> {
    let temporary = path.with_extension("new");
    fs::write(&temporary, format!("{} {}\n", boot_id()?, until.as_nanos()))?;
    fs::rename(&temporary, path)
}

/// There is no lease.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// How long the lease runs yet; zero when there is none.
pub(crate) fn remaining(path: &Path) -> Duration {
    until(path).unwrap_or_default().saturating_sub(boot_time())
}

fn until(path: &Path) -> Option<Duration> {
    let text = fs::read_to_string(path).ok()?;
    let (boot, until) = text.trim_end().split_once(' ')?;
    if boot != boot_id().ok()? {
        return None;
    }
    Some(Duration::from_nanos(until.parse().ok()?))
}

/// Names this boot of the machine.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_runs_until_its_end_and_not_without_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LEASE_FILE);
        assert_eq!(remaining(&path), Duration::ZERO);
        write(&path, boot_time() + Duration::from_secs(60)).unwrap();
        assert!(remaining(&path) > Duration::from_secs(59));
        write(&path, boot_time()).unwrap();
        assert_eq!(remaining(&path), Duration::ZERO);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(remaining(&path), Duration::ZERO);
    }

    #[test]
    fn what_is_of_another_boot_or_damaged_is_no_lease() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LEASE_FILE);
        let far = Duration::from_secs(1 << 40).as_nanos();
        for text in [format!("another-boot {far}\n"), boot_id().unwrap(), String::new(), "a b c".to_owned()] {
            fs::write(&path, text).unwrap();
            assert_eq!(remaining(&path), Duration::ZERO);
        }
    }
}
