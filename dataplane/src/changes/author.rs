//! Who changed something, as far as the kernel lets it be known.

use std::{fmt, fs};

/// A process that changed something.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Author {
    /// Its process id.
    pub pid: u32,
    /// Its name; none when it had ended before it could be asked.
    pub name: Option<String>,
}

impl Author {
    /// The process that most probably has a netlink socket on this port: the kernel gives a process's first socket
    /// the process's number, and further ones numbers that no process can have.
    pub(super) fn of_port(port: u32) -> Option<Author> {
        let is_process = i32::try_from(port).is_ok_and(|pid| pid > 0) && port != std::process::id();
        is_process.then(|| Author { pid: port, name: name(port) })
    }
}

/// The process's name. What had ended has none.
fn name(pid: u32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}

impl fmt::Display for Author {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} (process {})", self.pid),
            None => write!(f, "process {}, which has ended", self.pid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_no_process_can_have_names_none() {
        assert_eq!(Author::of_port(0xffff_f000), None);
        assert_eq!(Author::of_port(std::process::id()), None, "this process is not another");
        let parent = Author::of_port(std::os::unix::process::parent_id()).unwrap();
        assert!(parent.name.is_some());
        assert_eq!(Author { pid: 7, name: Some("nft".to_owned()) }.to_string(), "nft (process 7)");
        assert_eq!(Author { pid: 7, name: None }.to_string(), "process 7, which has ended");
    }
}
