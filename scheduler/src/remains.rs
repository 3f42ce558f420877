//! What is left of a state directory, looked at before anything is written into it: only an empty one begins a cluster.
//!
//! A store gets its name, on the disk, before the certificates are made: however a first start was ended, certificates
//! without a store are those of a cluster that has lost it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use crate::{founding, pki, store};

/// What is there of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Store {
    Missing,
    Empty,
    There,
}

/// Where a restore writes until it has come to its end.
pub(crate) const UNFINISHED: &str = "server.redb.restoring";

/// The files of a restore that was ended half-way.
pub(crate) fn of_restore(dir: &Path) -> Vec<PathBuf> {
    let unfinished = dir.join(UNFINISHED);
    let files = [store::unnamed(&unfinished), unfinished];
    files.into_iter().filter(|file| file.exists()).collect()
}

/// Whether a server may go on with `dir`, or begin a cluster in it.
///
/// # Errors
/// It holds a part of a cluster; what is there, what is missing, and what to do.
pub(crate) fn check(dir: &Path) -> anyhow::Result<()> {
    let (place, file) = (dir.display(), founding::FILE);
    let store = store(&dir.join(file)).with_context(|| format!("cannot look at {place}/{file}"))?;
    if store != Store::There
        && let Some(file) = of_restore(dir).first()
    {
        let file = file.file_name().unwrap_or_default().display();
        bail!(
            "{place} holds a restore that was ended half-way ({file}): run `netctl server restore` again; nothing was changed"
        );
    }
    let certificates = dir.join("pki");
    let what = match store {
        Store::Missing if certificates.exists() => "is missing",
        Store::Empty if certificates.exists() => "is empty",
        _ => return Ok(()),
    };
    let epoch = pki::epoch(&certificates);
    bail!(
        "{place} holds the certificates of a cluster (pki, of epoch {epoch:?}), and its store {file} {what}: put back a copy of \
         the file, or move the directory away and restore a backup with `netctl server restore`; without either, a new \
         cluster begins in an empty directory. A server whose cluster is in etcd is started with --store etcd://... \
         Nothing was changed"
    )
}

fn store(file: &Path) -> io::Result<Store> {
    match fs::metadata(file) {
        Ok(found) if found.len() == 0 => Ok(Store::Empty),
        Ok(_) => Ok(Store::There),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Store::Missing),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{clock::Clock, founding::Founding, server::StoreChoice};

    /// A store that was emptied got a new cluster's header, and was refused only then.
    #[tokio::test]
    async fn certificates_without_their_store_begin_nothing_and_stay_as_they_are() {
        for what in ["is missing", "is empty"] {
            let dir = tempfile::tempdir().unwrap();
            founding::open(dir.path(), None, Clock::start()).await.unwrap();
            let store = dir.path().join(founding::FILE);
            fs::remove_file(&store).unwrap();
            if what == "is empty" {
                fs::File::create(&store).unwrap();
            }
            let before = content(dir.path());
            let opened = founding::open(dir.path(), None, Clock::start()).await.map(drop);
            let init = founding::init(dir.path(), &StoreChoice::Local, Founding::default()).await.map(drop);
            for refused in [opened, init] {
                let text = refused.unwrap_err().to_string();
                assert!(text.contains("server.redb") && text.contains(what), "{text}");
                assert!(text.contains("netctl server restore"), "{text}");
            }
            assert_eq!(content(dir.path()), before);
        }
    }

    #[tokio::test]
    async fn a_restore_that_was_ended_half_way_is_no_new_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let unfinished = dir.path().join(UNFINISHED);
        for file in [store::unnamed(&unfinished), unfinished] {
            fs::write(&file, b"half").unwrap();
            let refused = founding::open(dir.path(), None, Clock::start()).await.map(drop).unwrap_err();
            assert!(refused.to_string().contains("run `netctl server restore` again"), "{refused}");
            assert_eq!(content(dir.path()).len(), 1);
            fs::remove_file(file).unwrap();
        }
    }

    /// Every file below, with what is in it.
    fn content(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                all.extend(content(&entry));
            } else {
                all.insert(entry.display().to_string(), fs::read(&entry).unwrap());
            }
        }
        all
    }
}
