//! The machine's processes, as /proc shows them.
//!
//! What a process is to somebody is not said here: see [`crate::leftovers`] and the supervisor's strays.

use std::{collections::BTreeMap, fs, io, os::unix::fs::MetadataExt as _};

/// What `/proc/PID/status` says of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) name: String,
    /// One letter; Z has ended and waits for its parent, X is gone.
    pub(crate) state: String,
    pub(crate) parent: i32,
    /// The real one.
    pub(crate) uid: u32,
}

/// Every process of the machine by its id; one that ends meanwhile is none.
pub(crate) fn all() -> io::Result<BTreeMap<i32, Process>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // A process may give itself a name that is not UTF-8.
        let status = fs::read(format!("/proc/{pid}/status")).unwrap_or_default();
        if let Some(process) = parse(&String::from_utf8_lossy(&status)) {
            all.insert(pid, process);
        }
    }
    Ok(all)
}

/// The inode of the network namespace of `pid`.
pub(crate) fn netns_of(pid: i32) -> io::Result<u64> {
    Ok(fs::metadata(format!("/proc/{pid}/ns/net"))?.ino())
}

/// Reads `/proc/PID/status` (proc_pid_status(5)).
fn parse(status: &str) -> Option<Process> {
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let field = |name: &str| line(name)?.split_whitespace().next();
    Some(Process {
        name: line("Name:")?.to_owned(),
        state: field("State:")?.to_owned(),
        parent: field("PPid:")?.parse().ok()?,
        uid: field("Uid:")?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, id};

    use super::*;

    #[test]
    fn status_lines_are_read() {
        let text = "Name:\ta (b)\nState:\tD (disk sleep)\nPPid:\t12\nUid:\t1879048193\t0\t0\t0\n";
        let process = parse(text).unwrap();
        assert_eq!((process.name.as_str(), process.state.as_str()), ("a (b)", "D"));
        assert_eq!((process.parent, process.uid), (12, 1_879_048_193));
        assert!(parse("Name:\tsh\n").is_none());
    }

    /// The name of a process is what its program's file is called.
    #[test]
    fn a_process_whose_name_is_not_text_is_found() {
        use std::os::unix::ffi::OsStrExt as _;
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join(std::ffi::OsStr::from_bytes(b"\xFF\xFE"));
        fs::copy("/bin/sleep", &program).unwrap();
        let mut child = Command::new(program).arg("60").spawn().unwrap();
        let found = all().unwrap().remove(&child.id().cast_signed());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.unwrap().parent, id().cast_signed());
    }
}
