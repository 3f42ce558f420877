//! Processes that a task left behind outside its process group, found in /proc.
//!
//! A stray is a child of the supervisor that is no task (orphans come to it, as to a subreaper), or any process
//! with the pod's user id in the pod's network namespace. Both conditions of the second matter: agents
//! that share a machine may use the same user id for pods of their own.

use std::io;

use crate::processes::{self, Process, netns_of};

/// Whose strays are looked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    /// The supervisor.
    pub(super) supervisor: i32,
    /// The pod's user and namespace, when it has its own.
    pub(super) owner: Option<(u32, u64)>,
}

/// The ids of all strays of `family`; a zombie is none.
pub(super) fn find(family: Family) -> io::Result<Vec<i32>> {
    let is_stray = |(pid, process): &(i32, Process)| {
        let owned = family.owner.is_some_and(|(uid, netns)| {
            process.uid == uid && netns_of(*pid).is_ok_and(|inode| inode == netns)
        });
        *pid != family.supervisor && (process.parent == family.supervisor || owned) && process.state != "Z"
    };
    Ok(processes::all()?.into_iter().filter(is_stray).map(|(pid, _)| pid).collect())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, id};

    use super::*;

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
