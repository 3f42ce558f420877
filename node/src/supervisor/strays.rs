//! Processes that a task left behind outside its process group, found in /proc.
//!
//! A stray is a child of the supervisor that is no task (orphans come to it, as to a subreaper), or any process
//! with the pod's user id in the pod's network namespace. Both conditions of the second matter: agents
//! that share a machine may use the same user id for pods of their own.

use std::{fs, io, os::unix::fs::MetadataExt as _};

/// Whose strays are looked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    /// The supervisor.
    pub(super) supervisor: i32,
    /// The pod's user and namespace, when it has its own.
    pub(super) owner: Option<(u32, u64)>,
}

/// The ids of all strays of `family`.
pub(super) fn find(family: Family) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if pid != family.supervisor && is_stray(pid, family) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// A process that ends meanwhile is none.
fn is_stray(pid: i32, family: Family) -> bool {
    let Some(process) = fs::read_to_string(format!("/proc/{pid}/status")).ok().and_then(|text| parse(&text))
    else {
        return false;
    };
    let owned = family
        .owner
        .is_some_and(|(uid, netns)| process.uid == uid && netns_of(pid).is_ok_and(|inode| inode == netns));
    (process.parent == family.supervisor || owned) && !process.zombie
}

/// The inode of the network namespace of `pid`.
pub(super) fn netns_of(pid: i32) -> io::Result<u64> {
    Ok(fs::metadata(format!("/proc/{pid}/ns/net"))?.ino())
}

#[derive(Debug, PartialEq, Eq)]
struct Process {
    parent: i32,
    uid: u32,
    zombie: bool,
}

/// Reads `/proc/PID/status` (proc_pid_status(5)).
fn parse(status: &str) -> Option<Process> {
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    Some(Process {
        parent: field("PPid:")?.parse().ok()?,
        uid: field("Uid:")?.parse().ok()?,
        zombie: field("State:")? == "Z",
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, id};

    use super::*;

    #[test]
    fn status_lines_are_read() {
        let text = "Name:\tsh\nState:\tS (sleeping)\nPPid:\t12\nUid:\t1879048193\t0\t0\t0\n";
        assert_eq!(parse(text), Some(Process { parent: 12, uid: 1_879_048_193, zombie: false }));
        assert_eq!(parse("Name:\tsh\n"), None);
    }

    #[test]
    fn a_child_is_found_until_it_ends() {
        let mut child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let family = Family { supervisor: id().cast_signed(), owner: None };
        let pid = child.id().cast_signed();
        assert!(find(family).unwrap().contains(&pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!find(family).unwrap().contains(&pid));
    }

    #[test]
    fn the_same_user_in_another_namespace_is_none() {
        let family = Family { supervisor: -1, owner: Some((nix::unistd::getuid().as_raw(), 0)) };
        assert_eq!(find(family).unwrap(), Vec::<i32>::new());
    }
}
