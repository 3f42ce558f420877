//! One named network namespace: looking into it and running things in it.
//!
//! A thread enters the namespace with `setns` and whatever it spawns is born there. `ip netns exec` is not
//! used: it mounts another /sys and so hides the bpf file system.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};

/// Where named namespaces are, for us and for `ip netns`.
pub const DIR: &str = "/run/netns";

/// What identifies a namespace among all of the machine: device and inode of its nsfs file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    dev: u64,
    inode: u64,
}

/// A network namespace that has, or may have, a name in [`DIR`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// The namespace called `name`; it need not exist.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file.
    pub fn path(&self) -> PathBuf {
        Path::new(DIR).join(&self.name)
    }

    /// Which namespace it is; none when the name is free or is a file without a namespace behind it.
    pub fn identity(&self) -> Option<Identity> {
        // A name whose mount is gone is a plain file and tells nothing; `File::open` of it can still work.
        let id = Identity::of(&self.path())?;
        let plain = std::fs::metadata(DIR).ok().map(|dir| dir.dev());
        (Some(id.dev) != plain).then_some(id)
    }

    /// Runs `f` in a thread that is inside the namespace.
    ///
    /// # Errors
    /// When the namespace cannot be opened or entered.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(self.path()).with_context(|| format!("cannot open namespace {}", self.name))?;
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || -> Result<T> {
                setns(&file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("cannot enter namespace {}", self.name))?;
                Ok(f())
            });
            inside.join().map_err(|_| anyhow!("a thread in namespace {} panicked", self.name))?
        })
    }

    /// Starts `command` inside the namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the program cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.run(|| command.spawn())?
            .with_context(|| format!("cannot start {program} in namespace {}", self.name))
    }

    /// Whether it has an interface called `link`.
    pub fn has_link(&self, link: &str) -> bool {
        self.run(|| nix::net::if_::if_nametoindex(link).is_ok()).unwrap_or(false)
    }

    /// Writes kernel settings (`net/ipv4/ip_forward`, value) of this namespace, in order.
    ///
    /// A setting that the kernel does not have is left out.
    ///
    /// # Errors
    /// Names the setting that cannot be written.
    pub fn set_sysctls(&self, settings: &[(String, &str)]) -> Result<()> {
        self.run(|| -> Result<()> {
            for (key, value) in settings {
                let path = Path::new("/proc/sys").join(key);
                // Writing what is there already is not nothing: `all.forwarding=0` takes `force_forwarding` off
                // every interface.
                if std::fs::read_to_string(&path).is_ok_and(|now| now.trim() == *value) {
                    continue;
                }
                match std::fs::write(&path, value) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    other => other.with_context(|| format!("cannot set {key} to {value}"))?,
                }
            }
            Ok(())
        })?
    }

    /// Takes the name away; the namespace ends with its last process. Done when there is none, too.
    ///
    /// # Errors
    /// When the file cannot be unmounted or removed.
    pub fn remove(&self) -> Result<()> {
        let path = self.path();
        // One unmount for each time that it was mounted over itself; EINVAL is "not a mount point".
        while umount2(&path, MntFlags::MNT_DETACH).is_ok() {}
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}

impl Identity {
    /// The identity behind an nsfs path, such as `/proc/1/ns/net`.
    pub fn of(path: &Path) -> Option<Self> {
        let meta = std::fs::metadata(path).ok()?;
        Some(Self { dev: meta.dev(), inode: meta.ino() })
    }
}

/// The names in [`DIR`], sorted; none when there is no such folder.
pub fn list() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(DIR) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
