//! What a testbed borrows from the machine: /run/netns, the bpf file system, the name of our route protocol.
//!
//! What was not there is noted *before* it is made, and taken away when the last testbed ends, so that a
//! crash in between leaves nothing that nobody knows of. One lock file guards the note.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use crate::netns;
use crate::topology::Prefix;
use crate::wait::wait_for;

/// Where all testbeds keep their files, each in a folder that has its prefix as its name.
pub const ROOT: &str = "/run/hextet-testbed";
/// Where the bpf file system belongs.
pub const BPFFS: &str = "/sys/fs/bpf";
/// The parent of all pins that belong to a testbed.
pub const PINS: &str = "/sys/fs/bpf/hextet";
const PROTOCOL_NAME: &str = "/etc/iproute2/rt_protos.d/hextet.conf";
const NOTE: &str = ".borrowed.json";
const LOCK: &str = ".lock";

/// What is to be taken away again with the last testbed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Borrowed {
    netns_dir: bool,
    netns_mount: bool,
    bpffs: bool,
    pins_dir: bool,
    protocol_name: bool,
    protocol_dir: bool,
}

/// An exclusive lock on a file in [`ROOT`]; it ends with this value, or with the process.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// The lock of one testbed: one `up` or `down` at a time.
    ///
    /// # Errors
    /// When another one holds it for long.
    pub fn of(prefix: &Prefix) -> Result<Self> {
        Self::take(&format!("{prefix}.lock"), &format!("the testbed {prefix}"))
    }

    fn take(name: &str, what: &str) -> Result<Self> {
        let path = Path::new(ROOT).join(name);
        let attempt = || match try_lock(&path) {
            Ok(Some(file)) => Ok(Ok(file)),
            Ok(None) => Err(String::new()),
            Err(e) => Ok(Err(e)),
        };
        let waited =
            wait_for(Duration::from_secs(60), &format!("another command lets go of {what}"), attempt);
        let (_, file) = waited?;
        let file = file.with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(Self { file, path })
    }

    /// One more handle of the lock: it is held until this one is closed, too.
    ///
    /// # Errors
    /// When there are no more file descriptors.
    pub fn share(&self) -> Result<File> {
        self.file.try_clone().context("cannot share a lock")
    }

    /// Ends the lock and removes its file; whoever waits for it makes a new one.
    pub fn remove(self) {
        std::fs::remove_file(&self.path).ok();
    }
}

/// Locks `path`, made when missing; none when another has it, or it was removed under us.
fn try_lock(path: &Path) -> io::Result<Option<File>> {
    std::fs::create_dir_all(ROOT)?;
    let file = match OpenOptions::new().create(true).truncate(false).write(true).open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => return Ok(None),
        Err(std::fs::TryLockError::Error(e)) => return Err(e),
    }
    let same = std::fs::metadata(path).is_ok_and(|now| file.metadata().is_ok_and(|m| m.ino() == now.ino()));
    Ok(same.then_some(file))
}

/// Makes sure that the machine has what a testbed needs. Any number of times.
///
/// # Errors
/// Says what cannot be made.
pub fn borrow(prefix: &Prefix) -> Result<()> {
    let lock = Lock::take(LOCK, "this machine's testbeds")?;
    std::fs::create_dir_all(dir(prefix)).with_context(|| format!("cannot make {}", dir(prefix).display()))?;
    let mut note = read_note();
    let first = other_testbeds(prefix).is_empty();
    note.netns_dir |= !Path::new(netns::DIR).exists();
    note.netns_mount |= !is_mount(netns::DIR);
    note.bpffs |= !is_mount(BPFFS) && Path::new(BPFFS).exists();
    note.pins_dir |= !Path::new(PINS).exists();
    note.protocol_dir |= first && !parent(PROTOCOL_NAME).exists();
    note.protocol_name |= first && !Path::new(PROTOCOL_NAME).exists();
    write_note(&note)?;
    mount_netns_dir()?;
    mount_bpffs()?;
    if note.protocol_name {
        name_protocol()?;
    }
    drop(lock);
    Ok(())
}

/// Names the nodes' route protocol for all of them: `netctl node down` on one of them must not take the name
/// from the others, and takes only what a node has written.
fn name_protocol() -> Result<()> {
    let text = "# for every node of the testbeds on this machine\n118 hextet\n";
    std::fs::create_dir_all(parent(PROTOCOL_NAME))
        .and_then(|()| std::fs::write(PROTOCOL_NAME, text))
        .with_context(|| format!("cannot write {PROTOCOL_NAME}"))
}

/// Removes the testbed's folder and lock and, when it was the last one, all that [`borrow`] made.
///
/// Goes on after a failure and returns them all.
pub fn give_back(prefix: &Prefix, ours: Lock) -> Vec<anyhow::Error> {
    let lock = match Lock::take(LOCK, "this machine's testbeds") {
        Ok(lock) => lock,
        Err(e) => return vec![e],
    };
    let mut failures = Vec::new();
    let mut note_failure = |result: io::Result<()>, what: &str| match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            failures.push(anyhow::Error::new(e).context(format!("cannot remove {what}")));
        }
        _ => {}
    };
    let dir = dir(prefix);
    note_failure(std::fs::remove_dir_all(&dir), &dir.display().to_string());
    ours.remove();
    if !other_testbeds(prefix).is_empty() {
        return failures;
    }
    let note = read_note();
    if note.protocol_name {
        note_failure(std::fs::remove_file(PROTOCOL_NAME), PROTOCOL_NAME);
    }
    if note.protocol_dir {
        // Others may have put their names there meanwhile: then it stays.
        std::fs::remove_dir(parent(PROTOCOL_NAME)).ok();
    }
    if note.pins_dir {
        std::fs::remove_dir(PINS).ok();
    }
    if note.bpffs && no_pins() {
        unmount(BPFFS);
    }
    if note.netns_mount && netns::list().is_empty() {
        unmount(netns::DIR);
        if note.netns_dir {
            note_failure(std::fs::remove_dir(netns::DIR), netns::DIR);
        }
    }
    note_failure(std::fs::remove_file(Path::new(ROOT).join(NOTE)), NOTE);
    lock.remove();
    // Locks of testbeds that are coming up keep it; they see to it themselves.
    std::fs::remove_dir(ROOT).ok();
    failures
}

/// The folder of a testbed's files.
pub fn dir(prefix: &Prefix) -> PathBuf {
    Path::new(ROOT).join(prefix.as_str())
}

/// Prefixes of all testbeds of this machine.
pub fn testbeds() -> Vec<Prefix> {
    let Ok(entries) = std::fs::read_dir(ROOT) else { return Vec::new() };
    let dirs = entries.flatten().filter(|entry| entry.path().is_dir());
    let mut all: Vec<Prefix> =
        dirs.filter_map(|entry| Prefix::new(&entry.file_name().to_string_lossy()).ok()).collect();
    all.sort();
    all
}

/// Whether something is mounted exactly at `path`.
pub fn is_mount(path: &str) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(path))
}

fn other_testbeds(prefix: &Prefix) -> Vec<Prefix> {
    testbeds().into_iter().filter(|other| other != prefix).collect()
}

fn mount_netns_dir() -> Result<()> {
    std::fs::create_dir_all(netns::DIR).with_context(|| format!("cannot make {}", netns::DIR))?;
    if is_mount(netns::DIR) {
        return Ok(());
    }
    // As `ip netns add` does it: a mount of its own that is shared, so that names which are taken away here
    // vanish in every mount namespace.
    let none: Option<&str> = None;
    mount(Some(netns::DIR), netns::DIR, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .and_then(|()| mount(none, netns::DIR, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none))
        .with_context(|| format!("cannot mount {}", netns::DIR))
}

fn mount_bpffs() -> Result<()> {
    // A kernel without BPF has no such folder; a network without a cluster does not need it.
    if is_mount(BPFFS) || !Path::new(BPFFS).exists() {
        return Ok(());
    }
    let none: Option<&str> = None;
    mount(Some("bpffs"), BPFFS, Some("bpf"), MsFlags::empty(), none)
        .with_context(|| format!("cannot mount the bpf file system at {BPFFS}"))
}

fn unmount(path: &str) {
    // A busy mount is somebody's: it stays.
    umount2(path, MntFlags::empty()).ok();
}

/// Whether the bpf file system holds nothing but what the kernel puts there.
fn no_pins() -> bool {
    let of_the_kernel = |name: &std::ffi::OsStr| name == "maps.debug" || name == "progs.debug";
    std::fs::read_dir(BPFFS).is_ok_and(|entries| entries.flatten().all(|e| of_the_kernel(&e.file_name())))
}

fn parent(path: &str) -> &Path {
    Path::new(path).parent().expect("an absolute path of a file has a parent")
}

fn read_note() -> Borrowed {
    let text = std::fs::read_to_string(Path::new(ROOT).join(NOTE)).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

fn write_note(note: &Borrowed) -> Result<()> {
    let path = Path::new(ROOT).join(NOTE);
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, serde_json::to_vec(note)?)
        .and_then(|()| std::fs::rename(&fresh, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Not left to the file's own end: a process that we just started may still share it until its exec.
        self.file.unlock().ok();
    }
}
