//! The folder of what survives a restart: credentials, and the pods as of the last revision in effect.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use hextet_api::endpoints::EndpointSet;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::select::Selector;

/// A set of 200,000 endpoints fits.
const FILE_LEN_MAX: u64 = 128 * 1024 * 1024;

/// An open state folder.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    select: Selector,
    set: EndpointSet,
}

impl StateDir {
    pub(crate) fn open(path: &Path) -> anyhow::Result<StateDir> {
        // Others may pass through, for nginx's workers; each file says for itself who may read it.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(path)
            .with_context(|| format!("cannot make the state directory {}", path.display()))?;
        let path = path
            .canonicalize()
            .with_context(|| format!("cannot open the state directory {}", path.display()))?;
        if !path.to_str().is_some_and(|text| text.chars().all(fits_in_a_configuration)) {
            bail!("nginx cannot be given the path {}: use letters, digits and - _ . /", path.display());
        }
        Ok(StateDir { path })
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// What was saved for `select`; empty when there is nothing that can be used.
    pub(crate) fn load(&self, select: &Selector) -> EndpointSet {
        match self.read() {
            Ok(Some(saved)) if saved.select == *select => saved.set,
            Ok(Some(saved)) => {
                warn!("the saved pods are of {}: starting without pods", saved.select);
                EndpointSet::default()
            }
            Ok(None) => EndpointSet::default(),
            Err(error) => {
                warn!("{error:#}: starting without pods");
                EndpointSet::default()
            }
        }
    }

    pub(crate) fn save(&self, select: &Selector, set: &EndpointSet) -> anyhow::Result<()> {
        let saved = Saved { select: select.clone(), set: set.clone() };
        let path = self.endpoints();
        replace(&path, &serde_json::to_vec(&saved)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    fn endpoints(&self) -> PathBuf {
        self.file("endpoints.json")
    }

    fn read(&self) -> anyhow::Result<Option<Saved>> {
        let path = self.endpoints();
        let bytes = match read_bounded(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        serde_json::from_slice(&bytes).map(Some).with_context(|| format!("{} is damaged", path.display()))
    }
}

fn fits_in_a_configuration(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_./".contains(c)
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(FILE_LEN_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes beside the file, syncs, renames: a crash leaves the old file or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let mut file = fs::File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use hextet_api::v1;

    use super::*;

    fn set() -> EndpointSet {
        let endpoint = v1::Endpoint {
            pod: "hello-web-aaaaa".into(),
            address: vec![0xfd; 16],
            state: v1::EndpointState::Ready.into(),
            ..Default::default()
        };
        let snapshot = v1::Snapshot { epoch: "e".into(), revision: 7, endpoints: vec![endpoint], last: true };
        let mut set = EndpointSet::default();
        set.apply(v1::watch_response::Response::Snapshot(snapshot)).unwrap();
        set
    }

    fn select(text: &str) -> Selector {
        text.parse().unwrap()
    }

    #[test]
    fn pods_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(&folder.path().join("a/b")).unwrap();
        assert_eq!(state.load(&select("hello/web")), EndpointSet::default());
        state.save(&select("hello/web"), &set()).unwrap();
        assert_eq!(state.load(&select("hello/web")), set());
        assert_eq!(state.load(&select("other")), EndpointSet::default());
    }

    #[test]
    fn a_damaged_file_is_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        fs::write(state.endpoints(), "{").unwrap();
        assert_eq!(state.load(&select("hello/web")), EndpointSet::default());
    }

    #[test]
    fn paths_that_nginx_would_read_as_code_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(StateDir::open(&folder.path().join("a;b")).is_err());
    }
}
