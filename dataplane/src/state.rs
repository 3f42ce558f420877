//! What the dataplane must remember across restarts because the kernel does not: how sysctls were before, which
//! network namespaces this node made, and which folders.
//!
//! One small JSON file, replaced atomically before the kernel is changed. Facts of an earlier boot are dropped, so that it may be
//! where a reboot empties, and not on a disk that may be full.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

const FILE_NAME: &str = "dataplane.json";

/// Why the state cannot be kept.
#[derive(Debug, Error)]
pub enum StateError {
    /// The file cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The file holds something else.
    #[error(
        "{} is damaged: remove it to go on; sysctls then cannot be put back by a later teardown",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// The remembered facts and where they are kept.
#[derive(Debug)]
pub(crate) struct State {
    path: PathBuf,
    saved: Facts,
    pub(crate) facts: Facts,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    boot_id: String,
    /// Inode of the node's network namespace, whose sysctls these are.
    netns_inode: u64,
    pub(crate) sysctls: BTreeMap<String, String>,
    pub(crate) namespaces: BTreeSet<String>,
    pub(crate) folders: BTreeSet<PathBuf>,
}

impl State {
    /// Loads what an earlier agent saved, as far as it still holds.
    pub(crate) fn load(dir: &Path) -> Result<Self, StateError> {
        let path = dir.join(FILE_NAME);
        let now = Facts { boot_id: boot_id(), netns_inode: netns_inode(), ..Facts::default() };
        let saved = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|source| StateError::Damaged { path: path.clone(), source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Facts::default(),
            Err(source) => return Err(StateError::Io { action: "read", path, source }),
        };
        let facts = carry_over(&saved, now);
        Ok(Self { path, saved, facts })
    }

    /// Writes the facts if they have changed.
    pub(crate) fn save(&mut self) -> Result<(), StateError> {
        if self.saved == self.facts {
            return Ok(());
        }
        let error = |action| {
            let path = self.path.clone();
            move |source| StateError::Io { action, path, source }
        };
        let dir = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).map_err(error("make the folder of"))?;
        let new = self.path.with_extension("json.new");
        write_synced(&new, &self.facts).map_err(error("write"))?;
        fs::rename(&new, &self.path).map_err(error("replace"))?;
        self.saved = self.facts.clone();
        Ok(())
    }

    /// Writes what is only right to forget, or can be seen in the kernel again: it may be written another time.
    pub(crate) fn save_later(&mut self) {
        if let Err(error) = self.save() {
            tracing::warn!(error = &error as &dyn std::error::Error, "state not saved");
        }
    }

    /// Removes the file of a node that left nothing behind.
    pub(crate) fn remove(&mut self) -> Result<(), StateError> {
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(StateError::Io { action: "remove", path: self.path.clone(), source })
            }
            _ => {
                self.saved = Facts::default();
                Ok(())
            }
        }
    }
}

/// Namespaces and folders end with the boot; sysctls end with the network namespace that they belong to.
fn carry_over(saved: &Facts, now: Facts) -> Facts {
    if saved.boot_id != now.boot_id {
        return now;
    }
    let sysctls = if saved.netns_inode == now.netns_inode { saved.sysctls.clone() } else { BTreeMap::new() };
    Facts { sysctls, namespaces: saved.namespaces.clone(), folders: saved.folders.clone(), ..now }
}

fn write_synced(path: &Path, facts: &Facts) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(&serde_json::to_vec_pretty(facts).map_err(io::Error::other)?)?;
    file.sync_data()
}

fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

fn netns_inode() -> u64 {
    fs::metadata("/proc/thread-self/ns/net").map_or(0, |metadata| metadata.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(boot_id: &str, netns_inode: u64) -> Facts {
        Facts {
            boot_id: boot_id.to_owned(),
            netns_inode,
            sysctls: [("net/x".to_owned(), "1".to_owned())].into(),
            namespaces: ["web-1".to_owned()].into(),
            folders: BTreeSet::new(),
        }
    }

    fn empty(boot_id: &str, netns_inode: u64) -> Facts {
        Facts { boot_id: boot_id.to_owned(), netns_inode, ..Facts::default() }
    }

    #[test]
    fn facts_last_within_a_boot_and_a_namespace() {
        assert_eq!(carry_over(&facts("a", 1), empty("a", 1)), facts("a", 1));
    }

    #[test]
    fn sysctls_of_another_network_namespace_are_not_restored_here() {
        let carried = carry_over(&facts("a", 1), empty("a", 2));
        assert!(carried.sysctls.is_empty());
        assert_eq!(carried.namespaces, facts("a", 1).namespaces);
    }

    #[test]
    fn reboot_forgets_all() {
        assert_eq!(carry_over(&facts("a", 1), empty("b", 1)), empty("b", 1));
    }

    #[test]
    fn saved_facts_are_loaded_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::load(dir.path()).unwrap();
        state.facts.namespaces.insert("web-1".to_owned());
        state.save().unwrap();
        assert_eq!(State::load(dir.path()).unwrap().facts, state.facts);

        fs::write(dir.path().join(FILE_NAME), "{").unwrap();
        let error = State::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("dataplane.json is damaged: remove it to go on"), "{error}");

        state.remove().unwrap();
        state.remove().unwrap();
        assert!(!dir.path().join(FILE_NAME).exists());
    }
}
