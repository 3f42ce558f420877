//! The node's own store: one redb file that holds all that a cold boot needs.
//!
//! Every commit is durable when it returns; the agent acts on an assignment only after that. Values are JSON,
//! so that a damaged or strange entry can be read by people.
//!
//! A file is looked at before it is opened ([`look`]); one that is not what was written is never opened.

use std::{
    collections::BTreeMap,
    fs::{OpenOptions, Permissions},
    io::{self, ErrorKind},
    net::Ipv6Addr,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use aside::sync_folder;
use dataplane_core::{Filtering, Ipv6Exit, MasqueradeBackend, NdpBackend};
use hextet_redb_check::guarded;
pub(crate) use look::{Found, look};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    sys::statvfs::statvfs,
};
use redb::{Builder, Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;
use tokio::time::{Instant, sleep};
use tracing::warn;

use crate::{
    assignment::{Assignment, Head, Peer, PodRecord},
    identity::Identity,
};

pub(crate) mod aside;
mod look;

type Table = TableDefinition<'static, &'static str, &'static [u8]>;

const META: Table = TableDefinition::new("meta");
const PEERS: Table = TableDefinition::new("peers");
const PODS: Table = TableDefinition::new("pods");

const IDENTITY: &str = "identity";
const JOINING: &str = "joining";
const SETTINGS: &str = "settings";
const HEAD: &str = "head";

/// The store is small; redb's own default is a share of the machine's memory.
const CACHE_BYTES: usize = 1024 * 1024;

/// Room that the file has on the disk for the ends of pods, when everything else is full. The end of a pod is a record
/// written anew, of 2 MB at most.
const RESERVE_BYTES: u64 = 4 * 1024 * 1024;

/// More than the pages that are written anew on the way to a value, or for one of the node's own.
const SMALL_BYTES: u64 = 128 * 1024;

/// How long one may read who shows a node without an agent: the agent that starts then waits for so long.
pub(crate) const READ_MAX: Duration = Duration::from_secs(5);
/// Between two looks whether it is free.
pub(crate) const RETRY: Duration = Duration::from_millis(20);

/// What is kept while the node joins: with the same key it may enroll again when it was interrupted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Joining {
    pub(crate) key_pkcs8_der: Vec<u8>,
    pub(crate) subnet_id: u16,
    pub(crate) group_id: u32,
}

/// How the agent was started last, so that a plan without an agent is the agent's plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) uplink: Option<String>,
    pub(crate) underlay: Option<Ipv6Addr>,
    pub(crate) ndp: NdpBackend,
    pub(crate) masquerade: MasqueradeBackend,
    #[serde(default)]
    pub(crate) filtering: Filtering,
    #[serde(default)]
    pub(crate) ipv6_exit: Ipv6Exit,
}

/// The open store.
#[derive(Debug)]
pub(crate) struct Store {
    /// None after a failed write, until the next use opens the file again: redb writes no more to one that
    /// has failed, as on a full disk.
    database: Mutex<Option<Database>>,
    path: PathBuf,
}

/// Why the store cannot be used.
#[derive(Debug, Error)]
pub(crate) enum StoreError {
    /// Another process holds it.
    #[error("{} is in use by another process", path.display())]
    InUse { path: PathBuf },
    /// It cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: Box<redb::Error>,
    },
    /// It is not what was written.
    #[error(
        "the node's store {} is damaged ({}): it is not changed, and pods that run go on; {}",
        path.display(), flaws.join("; "), way_back(*is_known)
    )]
    Damaged {
        path: PathBuf,
        flaws: Vec<String>,
        /// Whether the node's identity can be read.
        is_known: bool,
    },
    /// Reading failed.
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: Box<redb::Error>,
    },
    /// Writing failed.
    #[error("cannot write {}: is the disk full?", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: Box<redb::Error>,
    },
    /// An entry makes no sense.
    #[error(
        "{} holds a {what} that cannot be read; {}",
        path.display(), way_back(true)
    )]
    Entry {
        path: PathBuf,
        what: String,
        #[source]
        source: serde_json::Error,
    },
}

impl StoreError {
    /// Whether it is for want of room alone.
    fn is_full(&self) -> bool {
        let StoreError::Write { source, .. } = self else { return false };
        let redb::Error::Io(error) = source.as_ref() else { return false };
        matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
    }
}

/// What to do about a damaged store.
fn way_back(is_known: bool) -> &'static str {
    if is_known {
        "run `netctl node down`, which keeps the node's identity, and then `netctl node`: the server tells it what to run"
    } else {
        "which node this is cannot be read: run `netctl node down`, on the server `netctl rm node/NAME`, and join again with a new \
         token"
    }
}

fn open_failed(path: &Path, error: redb::Error) -> StoreError {
    StoreError::Open { path: path.to_owned(), source: Box::new(error) }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

/// Opens a store that is there and whole.
fn open_whole(path: &Path) -> Result<Database, StoreError> {
    let found = look(path)?;
    if !found.is_whole() {
        let is_known = found.identity.is_some();
        return Err(StoreError::Damaged { path: path.to_owned(), flaws: found.lines().collect(), is_known });
    }
    open_database(path)
}

/// Makes a store under another name, as redb calls one that is made half-way damaged; gives that name.
fn make(
    path: &Path,
    fill: impl FnOnce(&mut Tables<'_>) -> Result<(), redb::Error>,
) -> Result<PathBuf, StoreError> {
    let new = path.with_extension("redb.new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(open_failed(&new, error.into())),
        _ => {}
    }
    try_write(&open_database(&new)?, fill)
        .map_err(|source| StoreError::Write { path: new.clone(), source: Box::new(source) })?;
    Ok(new)
}

/// Opens the file, which holds the node's key and is root's alone.
fn open_database(path: &Path) -> Result<Database, StoreError> {
    let failed = |error: redb::Error| open_failed(path, error);
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .and_then(|file| file.set_permissions(Permissions::from_mode(0o600)))
        .map_err(|error| failed(error.into()))?;
    let opened = guarded(|| builder().create(path)).map_err(|what| panicked(path, what))?;
    opened.map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
        error => failed(error.into()),
    })
}

/// redb met with something that cannot be.
fn panicked(path: &Path, what: String) -> StoreError {
    let is_known = look(path).is_ok_and(|found| found.identity.is_some());
    StoreError::Damaged { path: path.to_owned(), flaws: vec![what], is_known }
}

impl Store {
    /// Opens the store, or makes an empty one; one that another process reads is waited for.
    pub(crate) async fn open_within(path: &Path, max: Duration) -> Result<Store, StoreError> {
        let end = Instant::now() + max;
        loop {
            match Store::open(path) {
                Err(StoreError::InUse { .. }) if Instant::now() < end => sleep(RETRY).await,
                opened => return opened,
            }
        }
    }

    /// Opens the store, or makes an empty one.
    pub(crate) fn open(path: &Path) -> Result<Store, StoreError> {
        if !path.exists() {
            let new = make(path, |_| Ok(()))?;
            std::fs::rename(&new, path)
                .and_then(|()| sync_folder(path))
                .map_err(|error| open_failed(path, error.into()))?;
        }
        let store = Store { database: Mutex::new(Some(open_whole(path)?)), path: path.to_owned() };
        match store.write(|_| Ok(())) {
            // What is in it is read all the same: pods run on, and a reboot starts them.
            Err(error) if error.is_full() && store.identity()?.is_some() => {
                let why = anyhow::Error::from(error);
                warn!("{why:#}; what the server says is followed once there is room");
            }
            result => result?,
        }
        Ok(store)
    }

    pub(crate) fn identity(&self) -> Result<Option<Identity>, StoreError> {
        self.meta(IDENTITY)
    }

    /// How the agent was started last.
    pub(crate) fn settings(&self) -> Result<Option<Settings>, StoreError> {
        self.meta(SETTINGS)
    }

    pub(crate) fn save_settings(&self, settings: &Settings) -> Result<(), StoreError> {
        if self.settings()?.as_ref() == Some(settings) {
            return Ok(());
        }
        self.write(|tables| tables.set_meta(SETTINGS, settings))
    }

    pub(crate) fn joining(&self) -> Result<Option<Joining>, StoreError> {
        self.meta(JOINING)
    }

    pub(crate) fn save_joining(&self, joining: &Joining) -> Result<(), StoreError> {
        self.write(|tables| tables.set_meta(JOINING, joining))
    }

    pub(crate) fn save_identity(&self, identity: &Identity) -> Result<(), StoreError> {
        self.write(|tables| {
            tables.set_meta(IDENTITY, identity)?;
            tables.meta.remove(JOINING)?;
            Ok(())
        })
    }

    /// The last assignment that was committed.
    pub(crate) fn assignment(&self) -> Result<Assignment, StoreError> {
        Ok(Assignment {
            head: self.meta::<Head>(HEAD)?.unwrap_or_default(),
            peers: self.all::<Peer>(PEERS, "peer")?,
            pods: self.all::<PodRecord>(PODS, "pod")?,
        })
    }

    /// Makes `new` of `old`, which is what the store holds; all of it or nothing.
    pub(crate) fn commit(&self, old: &Assignment, new: &Assignment) -> Result<(), StoreError> {
        let (peers, pods) = (changes(&old.peers, &new.peers), changes(&old.pods, &new.pods));
        let write = |tables: &mut Tables<'_>| {
            if old.head != new.head {
                tables.set_meta(HEAD, &new.head)?;
            }
            put(&mut tables.peers, &peers)?;
            put(&mut tables.pods, &pods)
        };
        // What ends may be what fills the disk.
        if only_ends(old, new) {
            return self.write_into_reserve(write);
        }
        let bytes =
            peers.iter().chain(&pods).filter_map(|(_, value)| Some(value.as_ref()?.len() as u64)).sum();
        self.write_of(bytes, write)
    }

    fn meta<Value: DeserializeOwned>(&self, key: &str) -> Result<Option<Value>, StoreError> {
        let text = self.read(|transaction| {
            Ok(transaction.open_table(META)?.get(key)?.map(|value| value.value().to_vec()))
        })?;
        text.map(|text| self.parse(&text, key)).transpose()
    }

    fn all<Value: DeserializeOwned>(
        &self,
        table: Table,
        what: &str,
    ) -> Result<BTreeMap<String, Value>, StoreError> {
        let entries = self.read(|transaction| {
            let table = transaction.open_table(table)?;
            let mut entries = Vec::new();
            for entry in table.iter()? {
                let (key, value) = entry?;
                entries.push((key.value().to_owned(), value.value().to_vec()));
            }
            Ok(entries)
        })?;
        entries
            .into_iter()
            .map(|(key, text)| {
                let value = self.parse(&text, &format!("{what} {key}"))?;
                Ok((key, value))
            })
            .collect()
    }

    fn parse<Value: DeserializeOwned>(&self, text: &[u8], what: &str) -> Result<Value, StoreError> {
        let path = self.path.clone();
        serde_json::from_slice(text).map_err(|source| StoreError::Entry {
            path,
            what: what.to_owned(),
            source,
        })
    }

    fn read<Value>(
        &self,
        work: impl FnOnce(&redb::ReadTransaction) -> Result<Value, redb::Error>,
    ) -> Result<Value, StoreError> {
        let read = |database: &Database| {
            database.begin_read().map_err(redb::Error::from).and_then(|read| work(&read))
        };
        self.with_database(read)?
            .map_err(|source| StoreError::Read { path: self.path.clone(), source: Box::new(source) })
    }

    /// Lends the database, opened again if the last write failed; after a failure it is closed.
    fn with_database<Value>(
        &self,
        work: impl FnOnce(&Database) -> Result<Value, redb::Error>,
    ) -> Result<Result<Value, redb::Error>, StoreError> {
        let mut open = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match open.take() {
            Some(database) => database,
            None => open_whole(&self.path)?,
        };
        let lent = guarded(|| (work(&database), database));
        let (result, database) = lent.map_err(|what| panicked(&self.path, what))?;
        if !matches!(result, Err(redb::Error::Io(_) | redb::Error::PreviousIo)) {
            *open = Some(database);
        }
        Ok(result)
    }

    fn write(&self, work: impl FnOnce(&mut Tables<'_>) -> Result<(), redb::Error>) -> Result<(), StoreError> {
        self.write_of(SMALL_BYTES, work)
    }

    /// Writes values of so many bytes, if the reserve is there still when they are in it.
    fn write_of(
        &self,
        bytes: u64,
        work: impl FnOnce(&mut Tables<'_>) -> Result<(), redb::Error>,
    ) -> Result<(), StoreError> {
        // redb gives a large value up to twice its size.
        let more = bytes.saturating_mul(2).saturating_add(SMALL_BYTES);
        reserve(&self.path)
            .and_then(|()| look_for_room(&self.path, more))
            .map_err(|error| self.write_failed(error.into()))?;
        self.write_into_reserve(work)
    }

    fn write_into_reserve(
        &self,
        work: impl FnOnce(&mut Tables<'_>) -> Result<(), redb::Error>,
    ) -> Result<(), StoreError> {
        let written = self.with_database(|database| try_write(database, work))?;
        // Without it there is room for less; the next write says so.
        let _ = reserve(&self.path);
        written.map_err(|source| self.write_failed(source))
    }

    fn write_failed(&self, source: redb::Error) -> StoreError {
        StoreError::Write { path: self.path.clone(), source: Box::new(source) }
    }
}

/// Takes disk for the whole file and [`RESERVE_BYTES`] behind its end, which nobody else can fill then.
fn reserve(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let bytes = file.metadata()?.len().saturating_add(RESERVE_BYTES);
    let bytes = bytes.try_into().map_err(|_| ErrorKind::FileTooLarge)?;
    match fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, bytes) {
        // A file system that cannot, such as NFS before 4.2: its nodes end nothing while the disk is full.
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
        taken => Ok(taken?),
    }
}

/// Whether the disk of the file has room for so many bytes. Somebody else may take it: there is the reserve.
fn look_for_room(path: &Path, bytes: u64) -> io::Result<()> {
    let disk = statvfs(path)?;
    let free = disk.blocks_free().saturating_mul(disk.fragment_size());
    if bytes <= free { Ok(()) } else { Err(ErrorKind::StorageFull.into()) }
}

/// Whether pods end or are gone in the new one, and no other is new. An IPv4 address may go from one to another.
fn only_ends(old: &Assignment, new: &Assignment) -> bool {
    let is_like = |before: &PodRecord, pod: &PodRecord| {
        PodRecord { removing: pod.removing, ipv4: pod.ipv4, ..before.clone() } == *pod
    };
    let was_there =
        |id: &String, pod: &PodRecord| old.pods.get(id).is_some_and(|before| is_like(before, pod));
    old.peers == new.peers && new.pods.iter().all(|(id, pod)| was_there(id, pod))
}

fn try_write(
    database: &Database,
    work: impl FnOnce(&mut Tables<'_>) -> Result<(), redb::Error>,
) -> Result<(), redb::Error> {
    let mut transaction = database.begin_write()?;
    // Without it the next open after a kill reads the whole file.
    transaction.set_quick_repair(true);
    {
        let mut tables = Tables {
            meta: transaction.open_table(META)?,
            peers: transaction.open_table(PEERS)?,
            pods: transaction.open_table(PODS)?,
        };
        work(&mut tables)?;
    }
    transaction.commit()?;
    Ok(())
}

type OpenTable<'a> = redb::Table<'a, &'static str, &'static [u8]>;

struct Tables<'a> {
    meta: OpenTable<'a>,
    peers: OpenTable<'a>,
    pods: OpenTable<'a>,
}

impl Tables<'_> {
    fn set_meta(&mut self, key: &str, value: &impl Serialize) -> Result<(), redb::Error> {
        self.meta.insert(key, json(value).as_slice())?;
        Ok(())
    }
}

/// A key and what is written for it; nothing: it goes.
type Put<'a> = (&'a str, Option<Vec<u8>>);

fn changes<'a, Value: Serialize + PartialEq>(
    old: &'a BTreeMap<String, Value>,
    new: &'a BTreeMap<String, Value>,
) -> Vec<Put<'a>> {
    let gone = old.keys().filter(|key| !new.contains_key(*key)).map(|key| (key.as_str(), None));
    let other = new.iter().filter(|(key, value)| old.get(*key) != Some(value));
    gone.chain(other.map(|(key, value)| (key.as_str(), Some(json(value))))).collect()
}

fn put(table: &mut OpenTable<'_>, changes: &[Put<'_>]) -> Result<(), redb::Error> {
    for (key, value) in changes {
        match value {
            Some(value) => drop(table.insert(*key, value.as_slice())?),
            None => drop(table.remove(*key)?),
        }
    }
    Ok(())
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("entries have text keys and no failing parts")
}

#[cfg(test)]
mod damaged;
#[cfg(test)]
mod tests {
    use std::fs;

    use hextet_api::v1;

    use super::*;
    use crate::{
        assignment::{merge, tests::pod},
        identity::tests::identity,
    };

    fn assigned(pods: Vec<v1::PodAssignment>) -> Assignment {
        let message =
            v1::Assignment { revision: 3, epoch: "e".into(), full: true, pods, ..v1::Assignment::default() };
        merge(&identity(), &Assignment::default(), message).next
    }

    #[test]
    fn what_was_committed_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.redb");
        let (one, two) = (assigned(vec![pod("a", 1), pod("b", 2)]), assigned(vec![pod("b", 2)]));
        let store = Store::open(&path).unwrap();
        store.save_identity(&identity()).unwrap();
        store.commit(&Assignment::default(), &one).unwrap();
        store.commit(&one, &two).unwrap();
        drop(store);
        let store = Store::open(&path).unwrap();
        assert_eq!(store.identity().unwrap(), Some(identity()));
        assert_eq!(store.assignment().unwrap(), two);
    }

    /// Tasks of every pod can walk through the folder; the file holds the node's key.
    #[test]
    fn the_file_is_its_owners_alone_also_when_it_was_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.redb");
        for _ in 0..2 {
            drop(Store::open(&path).unwrap());
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        }
    }

    /// A full disk fails a write; redb then writes no more to the open file, with space or without.
    #[test]
    fn a_store_whose_write_failed_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("node.redb")).unwrap();
        store.save_identity(&identity()).unwrap();
        let full = store.write(|_| Err(redb::Error::PreviousIo));
        assert!(matches!(full, Err(StoreError::Write { .. })));
        assert!(store.database.lock().unwrap().is_none());
        assert_eq!(store.identity().unwrap(), Some(identity()));
        store.save_identity(&identity()).unwrap();
    }

    #[test]
    fn an_empty_store_holds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("node.redb")).unwrap();
        assert_eq!(store.identity().unwrap(), None);
        assert_eq!(store.assignment().unwrap(), Assignment::default());
    }

    #[test]
    fn the_key_is_kept_until_the_node_has_joined() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("node.redb")).unwrap();
        let joining = Joining { key_pkcs8_der: vec![1, 2], subnet_id: 7, group_id: 9 };
        store.save_joining(&joining).unwrap();
        assert_eq!(store.joining().unwrap(), Some(joining));
        store.save_identity(&identity()).unwrap();
        assert_eq!(store.joining().unwrap(), None);
    }

    #[test]
    fn a_second_opener_is_told_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.redb");
        let _store = Store::open(&path).unwrap();
        let error = Store::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    }

    /// `netctl node show` read the store when the agent started, which then ended with "in use".
    #[tokio::test]
    async fn an_agent_that_starts_waits_for_one_who_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.redb");
        let reader = Store::open(&path).unwrap();
        let agent = tokio::spawn(async move { Store::open_within(&path, READ_MAX).await.map(drop) });
        sleep(RETRY * 3).await;
        assert!(!agent.is_finished());
        drop(reader);
        agent.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_store_that_is_never_free_is_waited_for_a_bounded_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.redb");
        let _reader = Store::open(&path).unwrap();
        let error = Store::open_within(&path, 2 * RETRY).await.unwrap_err();
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    }

    #[test]
    fn a_file_that_is_no_store_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.redb");
        fs::write(&path, "x".repeat(8192)).unwrap();
        let text = Store::open(&path).unwrap_err().to_string();
        assert!(text.contains("node.redb") && text.contains("join again with a new token"), "{text}");
    }

    #[test]
    fn an_entry_that_cannot_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("node.redb")).unwrap();
        let damage = |tables: &mut Tables<'_>| {
            tables.pods.insert("a", b"{".as_slice())?;
            Ok(())
        };
        store.write(damage).unwrap();
        let text = store.assignment().unwrap_err().to_string();
        assert!(text.contains("holds a pod a that cannot be read"), "{text}");
    }
}
