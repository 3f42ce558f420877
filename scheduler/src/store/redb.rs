//! The store in one redb file.
//!
//! # Layout
//! | table | key | value |
//! | --- | --- | --- |
//! | `meta` | `format`, `epoch`, `revision` | text |
//! | `current` | [`Key`] as text | [`Value`] as JSON |
//! | `log` | number | [`Revision`] as JSON |
//! | `addresses` | address as a number | the id of the pod that had it first |

use std::{
    fs,
    net::Ipv6Addr,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock},
    time::Duration,
};

use rand::RngCore as _;
use redb::{
    Database, DatabaseError, Durability, ReadTransaction, ReadableDatabase as _, ReadableTable as _,
    TableDefinition, WriteTransaction,
};
use scheduler_core::change::{Change, Key, Revision, Value};
use tokio::time::{Instant, sleep};
use tracing::info;

use super::{Store, StoreError};

const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
const CURRENT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("current");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const ADDRESSES: TableDefinition<'_, u128, &str> = TableDefinition::new("addresses");

const FORMAT: &str = "hextet-server-1";
const CACHE_BYTES: usize = 32 << 20;
/// How long a server that is ending is waited for. A killed process holds its files until its last thread, perhaps
/// in `fsync`, has gone.
const ENDING_MAX: Duration = Duration::from_secs(5);
/// Between two tries.
const RETRY: Duration = Duration::from_millis(20);

/// The store in one redb file.
pub struct RedbStore {
    path: PathBuf,
    epoch: String,
    opener: Box<Opener>,
    database: RwLock<Condition>,
}

type Opener = dyn Fn() -> Result<Database, DatabaseError> + Send + Sync;

enum Condition {
    Good(Database),
    /// The disk was full: opening it anew shows what it holds.
    Full,
    /// A write failed in a way after which even what is read back proves nothing.
    Stopped(String),
}

impl RedbStore {
    /// Opens the file at `path`, or makes it. The second process that tries is told that it is in use.
    ///
    /// # Errors
    /// One sentence that says what is wrong with the file and what to do.
    pub fn open(path: &Path) -> Result<RedbStore, StoreError> {
        create_private(path).map_err(|source| StoreError::Open { path: path.to_owned(), source })?;
        let file = path.to_owned();
        let opener = move || Database::builder().set_cache_size(CACHE_BYTES).create(&file);
        RedbStore::with_opener(path, opener)
    }

    /// As [`RedbStore::open`]; a store that is in use is waited for a little, because its holder may be ending.
    ///
    /// # Errors
    /// As [`RedbStore::open`], [`StoreError::InUse`] only after a few seconds.
    pub async fn open_when_free(path: &Path) -> Result<RedbStore, StoreError> {
        RedbStore::open_within(path, ENDING_MAX).await
    }

    async fn open_within(path: &Path, wait_max: Duration) -> Result<RedbStore, StoreError> {
        let end = Instant::now() + wait_max;
        let mut is_told = false;
        loop {
            match RedbStore::open(path) {
                Err(StoreError::InUse(_)) if Instant::now() < end => {
                    if !is_told {
                        info!(store = %path.display(), ?wait_max, "the store is in use: waiting for its holder to end");
                        is_told = true;
                    }
                    sleep(RETRY).await;
                }
                result => return result,
            }
        }
    }

    /// As [`RedbStore::open`], with another way to open the file, for tests of failing disks.
    ///
    /// # Errors
    /// As [`RedbStore::open`].
    pub fn with_opener(
        path: &Path,
        opener: impl Fn() -> Result<Database, DatabaseError> + Send + Sync + 'static,
    ) -> Result<RedbStore, StoreError> {
        let database = open(path, &opener)?;
        let epoch = guarded(path, || read_or_make_epoch(path, &database))?;
        let (path, opener) = (path.to_owned(), Box::new(opener));
        Ok(RedbStore { path, epoch, opener, database: RwLock::new(Condition::Good(database)) })
    }

    fn read<T>(
        &self,
        with: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let condition = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let database = match &*condition {
            Condition::Good(database) => database,
            other => return Err(self.refusal(other)),
        };
        let result = database.begin_read().map_err(redb::Error::from).and_then(|txn| with(&txn));
        result.map_err(|error| read_error(&self.path, &error))
    }

    fn refusal(&self, condition: &Condition) -> StoreError {
        let path = self.path.clone();
        match condition {
            Condition::Stopped(cause) => StoreError::Stopped { path, cause: cause.clone() },
            _ => StoreError::Full { path, source: std::io::ErrorKind::StorageFull.into() },
        }
    }

    /// Closes the file after a failed commit.
    fn fail(&self, error: redb::Error) -> StoreError {
        let (condition, answer) = match error {
            redb::Error::Io(source) if is_full(&source) => {
                (Condition::Full, StoreError::Full { path: self.path.clone(), source })
            }
            other => {
                let cause = other.to_string();
                let answer = StoreError::Stopped { path: self.path.clone(), cause: cause.clone() };
                (Condition::Stopped(cause), answer)
            }
        };
        *self.database.write().unwrap_or_else(PoisonError::into_inner) = condition;
        answer
    }
}

impl Store for RedbStore {
    fn epoch(&self) -> &str {
        &self.epoch
    }

    fn load(&self) -> Result<(u64, Vec<(Key, Value)>), StoreError> {
        let (revision, values) = guarded(&self.path, || self.read(read_current))?;
        let damaged = |what: String| StoreError::Damaged { path: self.path.clone(), what };
        let parse = |(key, json): (String, Vec<u8>)| {
            let value = serde_json::from_slice(&json).map_err(|error| damaged(format!("{key}: {error}")))?;
            Ok((key.parse::<Key>().map_err(|error| damaged(error.to_string()))?, value))
        };
        let revision = revision.parse().map_err(|_| damaged(format!("revision {revision:?}")))?;
        Ok((revision, values.into_iter().map(parse).collect::<Result<_, _>>()?))
    }

    fn commit(&self, revisions: &[Revision]) -> Result<(), StoreError> {
        let result = {
            let condition = self.database.read().unwrap_or_else(PoisonError::into_inner);
            match &*condition {
                Condition::Good(database) => write(database, revisions),
                other => return Err(self.refusal(other)),
            }
        };
        match result {
            Ok(None) => Ok(()),
            Ok(Some(address)) => Err(StoreError::AddressUsed(address)),
            Err(error) => Err(self.fail(error)),
        }
    }

    fn log_after(&self, revision: u64, max: usize) -> Result<Vec<Revision>, StoreError> {
        let entries = self.read(|txn| {
            let table = txn.open_table(LOG)?;
            let range = table.range(revision.saturating_add(1)..)?.take(max);
            range.map(|entry| Ok(entry?.1.value().to_vec())).collect::<Result<Vec<_>, redb::Error>>()
        })?;
        let damaged = |error: serde_json::Error| StoreError::Damaged {
            path: self.path.clone(),
            what: format!("log: {error}"),
        };
        entries.iter().map(|json| serde_json::from_slice(json).map_err(damaged)).collect()
    }

    fn oldest(&self) -> Result<u64, StoreError> {
        self.read(|txn| Ok(txn.open_table(LOG)?.first()?.map_or(0, |(revision, _)| revision.value())))
    }

    fn recover(&self) -> Result<(), StoreError> {
        let mut condition = self.database.write().unwrap_or_else(PoisonError::into_inner);
        match &*condition {
            Condition::Good(_) => return Ok(()),
            Condition::Stopped(_) => return Err(self.refusal(&condition)),
            Condition::Full => {}
        }
        let database = open(&self.path, &self.opener)?;
        let epoch = read_or_make_epoch(&self.path, &database)?;
        if epoch != self.epoch {
            let what = format!("it was {} and is {epoch} now", self.epoch);
            return Err(StoreError::Damaged { path: self.path.clone(), what });
        }
        *condition = Condition::Good(database);
        Ok(())
    }
}

/// Nobody but the owner may read it: it holds the hashes of tokens and the environment of tasks.
fn create_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}

fn open(path: &Path, opener: &Opener) -> Result<Database, StoreError> {
    let path = path.to_owned();
    guarded(&path, || {
        opener().map_err(|error| match redb::Error::from(error) {
            redb::Error::DatabaseAlreadyOpen => StoreError::InUse(path.clone()),
            redb::Error::UpgradeRequired(version) => {
                StoreError::Format { path: path.clone(), found: format!("redb {version}"), expected: FORMAT }
            }
            redb::Error::Io(source) if is_full(&source) => StoreError::Full { path: path.clone(), source },
            // redb says so of a file that does not begin with its magic number, or ends too early.
            redb::Error::Io(source) if is_damage(&source) => {
                StoreError::Damaged { path: path.clone(), what: source.to_string() }
            }
            redb::Error::Io(source) => StoreError::Open { path: path.clone(), source },
            other => StoreError::Damaged { path: path.clone(), what: other.to_string() },
        })
    })
}

/// redb checks what it reads, yet some kinds of damage make it panic rather than answer.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    panic::catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        Err(StoreError::Damaged { path: path.to_owned(), what: "its pages do not fit together".to_owned() })
    })
}

fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
}

fn is_damage(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof)
}

fn read_error(path: &Path, error: &redb::Error) -> StoreError {
    let (path, cause) = (path.to_owned(), error.to_string());
    match error {
        redb::Error::Io(source) if is_damage(source) => StoreError::Damaged { path, what: cause },
        redb::Error::Io(_) | redb::Error::PreviousIo => StoreError::Read { path, cause },
        _ => StoreError::Damaged { path, what: cause },
    }
}

/// A file that was just made gets its format and epoch; another must have them.
fn read_or_make_epoch(path: &Path, database: &Database) -> Result<String, StoreError> {
    let failed = |error| read_error(path, &error);
    if let Some((format, epoch)) = read_meta(database).map_err(failed)? {
        return if format == FORMAT {
            Ok(epoch)
        } else {
            Err(StoreError::Format { path: path.to_owned(), found: format, expected: FORMAT })
        };
    }
    let mut bits = [0; 16];
    rand::rng().fill_bytes(&mut bits);
    let epoch = format!("{:032x}", u128::from_be_bytes(bits));
    make(database, &epoch).map_err(|error| match error {
        redb::Error::Io(source) if is_full(&source) => StoreError::Full { path: path.to_owned(), source },
        other => read_error(path, &other),
    })?;
    Ok(epoch)
}

fn read_meta(database: &Database) -> Result<Option<(String, String)>, redb::Error> {
    let txn = database.begin_read()?;
    let meta = match txn.open_table(META) {
        Ok(meta) => meta,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let get = |key| -> Result<String, redb::Error> {
        Ok(meta.get(key)?.map(|text| text.value().to_owned()).unwrap_or_default())
    };
    Ok(Some((get("format")?, get("epoch")?)))
}

fn make(database: &Database, epoch: &str) -> Result<(), redb::Error> {
    let txn = begin(database)?;
    {
        let mut meta = txn.open_table(META)?;
        for (key, value) in [("format", FORMAT), ("epoch", epoch), ("revision", "0")] {
            meta.insert(key, value)?;
        }
        txn.open_table(CURRENT)?;
        txn.open_table(LOG)?;
        txn.open_table(ADDRESSES)?;
    }
    Ok(txn.commit()?)
}

fn begin(database: &Database) -> Result<WriteTransaction, redb::Error> {
    let mut txn = database.begin_write()?;
    txn.set_durability(Durability::Immediate)?;
    // A crash then needs no scan of the file at the next start.
    txn.set_quick_repair(true);
    Ok(txn)
}

/// The revision and the current values, as they are in the file.
type Raw = (String, Vec<(String, Vec<u8>)>);

fn read_current(txn: &ReadTransaction) -> Result<Raw, redb::Error> {
    let revision = txn.open_table(META)?.get("revision")?.map(|text| text.value().to_owned());
    let current = txn.open_table(CURRENT)?;
    let mut values = Vec::new();
    for entry in current.iter()? {
        let (key, value) = entry?;
        values.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok((revision.unwrap_or_default(), values))
}

/// Gives the first address that a pod had before, if there is one; nothing is written then.
fn write(database: &Database, revisions: &[Revision]) -> Result<Option<Ipv6Addr>, redb::Error> {
    let txn = begin(database)?;
    let used = write_tables(&txn, revisions)?;
    if used.is_some() {
        txn.abort()?;
        return Ok(used);
    }
    txn.commit()?;
    Ok(None)
}

fn write_tables(txn: &WriteTransaction, revisions: &[Revision]) -> Result<Option<Ipv6Addr>, redb::Error> {
    let mut current = txn.open_table(CURRENT)?;
    let mut log = txn.open_table(LOG)?;
    let mut addresses = txn.open_table(ADDRESSES)?;
    for revision in revisions {
        log.insert(revision.revision, json(revision).as_slice())?;
        for change in &revision.changes {
            let key = change.key.to_string();
            match &change.new {
                Some(value) => drop(current.insert(key.as_str(), json(value).as_slice())?),
                None => drop(current.remove(key.as_str())?),
            }
            if let Some((address, pod)) = address(change)
                && addresses.insert(address.to_bits(), pod)?.is_some()
            {
                return Ok(Some(address));
            }
        }
    }
    if let Some(last) = revisions.last() {
        txn.open_table(META)?.insert("revision", last.revision.to_string().as_str())?;
    }
    Ok(None)
}

fn json<T: serde::Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("keys are text and no value can fail to be written")
}

/// The address that a pod has got, unless it had it before.
fn address(change: &Change) -> Option<(Ipv6Addr, &str)> {
    let of = |value: &Option<Value>| match value {
        Some(Value::Pod(pod)) => pod.address,
        _ => None,
    };
    match (&change.key, of(&change.new)) {
        (Key::Pod(id), Some(address)) if of(&change.old) != Some(address) => Some((address, id.as_str())),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
