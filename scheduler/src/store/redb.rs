//! The store in one redb file.
//!
//! # Layout
//! | table | key | value |
//! | --- | --- | --- |
//! | `meta` | `format`, `epoch`, `revision`, `log_bytes` | text |
//! | `current` | [`Key`] as text | [`Value`], in the form of [`codec`](super::codec) |
//! | `log` | number | [`Revision`], in the same form |
//! | `addresses` | address as a number | the id of the pod that had it first |

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError, RwLock},
    time::Duration,
};

use rand::RngCore as _;
use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase as _};
use scheduler_core::change::{Key, Revision, Value};
use tokio::time::{Instant, sleep};
use tracing::{error, info};

use super::{
    Damage, Item, SalvagedStore, Store, StoreError,
    codec::{self, Decoder},
};
use about::About;
use opening::{Looked, Opening, look};
use tables::{FORMAT, FORMAT_OF_PLAIN_JSON, Meta};
use whole::Whole;

mod about;
mod audit;
mod opening;
mod tables;
mod whole;

const CACHE_BYTES: usize = 32 << 20;
/// Entries that a backup holds in memory at a time.
const DUMP_CHUNK: usize = 256;
/// How long a server that is ending is waited for: some seconds for its clients and its last write. A killed process holds
/// its files until its last thread, perhaps in `fsync`, has gone.
const ENDING_MAX: Duration = Duration::from_secs(10);
/// Between two tries.
const RETRY: Duration = Duration::from_millis(20);

/// The store in one redb file.
pub struct RedbStore {
    path: PathBuf,
    epoch: String,
    opener: Box<Opener>,
    database: RwLock<Condition>,
    /// What was read before it was opened, until somebody wants it or it changes.
    read: Mutex<Option<Whole>>,
    /// `None` when nobody knows what the log says: all of it is read then.
    about: RwLock<Option<About>>,
    /// Damage that a read has met since then.
    met: OnceLock<Arc<Damage>>,
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
        match RedbStore::open_or_salvage(path)? {
            Opening::Whole(store) => Ok(store),
            Opening::Damaged(found, _) => {
                let what = found.damage.lines().next().unwrap_or_default();
                Err(StoreError::Damaged { path: path.to_owned(), what })
            }
        }
    }

    /// redb writes when it opens a file, and a damaged one is not to be touched: all of it is looked at before.
    fn open_or_salvage(path: &Path) -> Result<Opening, StoreError> {
        // redb makes a file in several steps, and calls one that is half-way damaged.
        if fs::metadata(path).map_or(true, |file| file.len() == 0) {
            make_whole(path)?;
        }
        let read = match look(path)? {
            Looked::Whole(whole) => Some(whole),
            Looked::Other => None,
            Looked::Damaged(found, held) => return Ok(Opening::Damaged(found, held)),
        };
        let store = RedbStore::open_file(path)?;
        *store.read.lock().unwrap_or_else(PoisonError::into_inner) = read;
        Ok(Opening::Whole(store))
    }

    fn open_file(path: &Path) -> Result<RedbStore, StoreError> {
        create_private(path).map_err(|source| StoreError::Open { path: path.to_owned(), source })?;
        let file = path.to_owned();
        let opener = move || Database::builder().set_cache_size(CACHE_BYTES).create(&file);
        RedbStore::with_opener(path, opener)
    }

    /// As [`RedbStore::open`], and of a damaged file what can be read ([`Store::damage`]); it is never written to. A store
    /// that is in use is waited for a little, because its holder may be ending. `epoch` is the store's name for a file
    /// that does not know it any more.
    ///
    /// # Errors
    /// As [`RedbStore::open`], [`StoreError::InUse`] only after a few seconds; [`StoreError::Damaged`] when nothing can be
    /// read.
    pub async fn open_when_free(path: &Path, epoch: &str) -> Result<Arc<dyn Store>, StoreError> {
        RedbStore::open_within(path, epoch, ENDING_MAX).await
    }

    async fn open_within(path: &Path, epoch: &str, wait_max: Duration) -> Result<Arc<dyn Store>, StoreError> {
        let end = Instant::now() + wait_max;
        let mut is_told = false;
        loop {
            match RedbStore::open_or_salvage(path) {
                Err(StoreError::InUse(_)) if Instant::now() < end => {
                    if !is_told {
                        info!(store = %path.display(), ?wait_max, "the store is in use: waiting for its holder to end");
                        is_told = true;
                    }
                    sleep(RETRY).await;
                }
                Err(error) => return Err(error),
                Ok(Opening::Whole(store)) => return Ok(Arc::new(store)),
                Ok(Opening::Damaged(found, held)) => {
                    return Ok(Arc::new(SalvagedStore::new(path.to_owned(), epoch.to_owned(), found, held)));
                }
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
        let (database, read) = (RwLock::new(Condition::Good(database)), Mutex::default());
        let about = RwLock::default();
        Ok(RedbStore { path, epoch, opener, database, read, about, met: OnceLock::new() })
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

    /// Writes one transaction; a failure closes the file.
    fn change<T>(&self, with: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, StoreError> {
        drop(self.take_read());
        if let Some(damage) = self.met.get() {
            return Err(StoreError::read_only(&self.path, damage));
        }
        let result = {
            let condition = self.database.read().unwrap_or_else(PoisonError::into_inner);
            match &*condition {
                Condition::Good(database) => self.noted(guarded(&self.path, || Ok(with(database)))),
                other => return Err(self.refusal(other)),
            }
        };
        result?.map_err(|error| self.fail(error))
    }

    /// Damage that a running server meets makes its store one that is only read, as damage that it starts with does.
    fn noted<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Damaged { what, .. }) = &result {
            let flaw = format!("met while the server ran: {what}; the next start looks at all of the file");
            let mut damage = Damage::default();
            damage.add(flaw.clone());
            if self.met.set(Arc::new(damage)).is_ok() {
                error!("the store is damaged: {flaw}");
            }
        }
        result
    }

    /// A read that notes damage, also if redb panics of it.
    fn looked<T>(&self, read: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.noted(guarded(&self.path, read))
    }

    fn take_read(&self) -> Option<Whole> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn change_about(&self, change: impl FnOnce(&mut About)) {
        self.about.write().unwrap_or_else(PoisonError::into_inner).as_mut().map(change);
    }

    fn raw_log(&self, after: u64, max: usize) -> Result<tables::Entries, StoreError> {
        guarded(&self.path, || self.read(|txn| tables::read_log(txn, after, max)))
    }

    /// What [`Store::log_about`] gives, if it is known which revisions that are.
    fn log_known(&self, key: &Key, after: u64, max: usize) -> Result<Option<Vec<Revision>>, StoreError> {
        let mut entries = self.raw_log(after, max.min(1))?;
        let Some((first, _)) = entries.first() else { return Ok(Some(vec![])) };
        let range = first + 1..first.saturating_add(max as u64);
        let about = self.about.read().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = about.as_ref().and_then(|about| about.within(&key.to_string(), range)) else {
            return Ok(None);
        };
        drop(about);
        for number in known {
            // It may have been compacted since.
            let next = self.raw_log(number - 1, 1)?;
            entries.extend(next.into_iter().filter(|(found, _)| *found == number));
        }
        entries.iter().map(|(number, bytes)| self.entry(*number, bytes)).collect::<Result<_, _>>().map(Some)
    }

    /// Says so when redb shows another commit than what was read.
    fn agrees(&self, whole: &Whole) -> Result<(), StoreError> {
        let (revision, lens) = self.read(tables::read_shape)?;
        let differs = lens.iter().find(|(table, len)| whole.lens.get(*table) != Some(len));
        match differs {
            Some((table, len)) => Err(self.damaged(format!("it shows {len} entries of {table}"))),
            None if revision != whole.revision.to_string() => {
                Err(self.damaged(format!("it shows revision {revision}")))
            }
            None => Ok(()),
        }
    }

    /// What the file holds now, for as long as it is looked at.
    fn snapshot(&self) -> Result<ReadTransaction, StoreError> {
        match &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            Condition::Good(database) => {
                database.begin_read().map_err(|error| read_error(&self.path, &error.into()))
            }
            other => Err(self.refusal(other)),
        }
    }

    fn parse_current(&self, raw: tables::Raw) -> Result<(u64, Vec<(Key, Value)>), StoreError> {
        let (revision, values) = raw;
        let parse = |(key, bytes): (String, Vec<u8>)| {
            let value = codec::decode(&bytes).map_err(|error| self.damaged(format!("{key}: {error}")))?;
            Ok((key.parse::<Key>().map_err(|error| self.damaged(error.to_string()))?, value))
        };
        Ok((
            self.number("revision", &revision)?,
            values.into_iter().map(parse).collect::<Result<_, StoreError>>()?,
        ))
    }

    fn entry(&self, number: u64, bytes: &[u8]) -> Result<Revision, StoreError> {
        codec::decode(bytes).map_err(|error| self.damaged(format!("revision {number}: {error}")))
    }

    /// Where nobody knows which revisions are about the key, the text of each tells whether it may be: most of a reader's
    /// time goes into reading the values.
    fn entries_about(&self, key: &Key, entries: &[(u64, Vec<u8>)]) -> Result<Vec<Revision>, StoreError> {
        let name = serde_json::to_string(key).expect("keys are text");
        let (mut decoder, mut found) = (Decoder::new(), Vec::new());
        for (number, bytes) in entries {
            let damaged = |error| self.damaged(format!("revision {number}: {error}"));
            let json = decoder.json(bytes).map_err(damaged)?;
            let is_about = std::str::from_utf8(json).is_ok_and(|text| text.contains(&name));
            if is_about || found.is_empty() {
                found.push(codec::parse(json).map_err(damaged)?);
            }
        }
        Ok(found)
    }

    fn dump_all(&self, each: &mut dyn FnMut(Item) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let txn = self.snapshot()?;
        let read = |error| read_error(&self.path, &error);
        let (revision, values) = self.parse_current(tables::read_current(&txn).map_err(read)?)?;
        each(Item::Last(revision))?;
        values.into_iter().try_for_each(|(key, value)| each(Item::Value(key, value)))?;
        let mut last = None;
        loop {
            let addresses = tables::read_addresses(&txn, last, DUMP_CHUNK).map_err(read)?;
            let Some((end, _)) = addresses.last() else { break };
            last = Some(*end);
            addresses.into_iter().try_for_each(|(address, pod)| each(Item::Address(address, pod)))?;
        }
        let mut at = 0;
        while at < revision {
            let entries = tables::read_log(&txn, at, DUMP_CHUNK).map_err(read)?;
            let Some((end, _)) = entries.last() else { break };
            at = *end;
            for (number, bytes) in &entries {
                each(Item::Entry(self.entry(*number, bytes)?))?;
            }
        }
        Ok(())
    }

    fn number(&self, name: &str, text: &str) -> Result<u64, StoreError> {
        text.parse().map_err(|_| self.damaged(format!("{name} {text:?}")))
    }

    fn damaged(&self, what: String) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), what }
    }

    /// Takes over what another store held. A backup's items come in the order in which a dump gives them, and the
    /// store counts for nothing until all of them have come.
    pub(crate) fn fill(&self, items: &[Item]) -> Result<(), StoreError> {
        self.change(|database| tables::fill(database, items))
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
        // What failed may be in the log.
        *self.about.write().unwrap_or_else(PoisonError::into_inner) = None;
        answer
    }
}

impl Store for RedbStore {
    fn epoch(&self) -> &str {
        &self.epoch
    }

    fn load(&self) -> Result<(u64, Vec<(Key, Value)>), StoreError> {
        // Another server may have changed it between the look and the opening.
        if let Some(whole) = self.take_read().filter(|whole| self.agrees(whole).is_ok()) {
            *self.about.write().unwrap_or_else(PoisonError::into_inner) = Some(whole.about);
            return Ok((whole.revision, whole.values));
        }
        self.looked(|| self.parse_current(self.read(tables::read_current)?))
    }

    fn commit(&self, revisions: &[Revision]) -> Result<(), StoreError> {
        match self.change(|database| tables::write(database, revisions))? {
            None => {
                self.change_about(|about| about.add(revisions));
                Ok(())
            }
            Some(address) => Err(StoreError::AddressUsed(address)),
        }
    }

    fn log_after(&self, revision: u64, max: usize) -> Result<Vec<Revision>, StoreError> {
        self.looked(|| {
            let entries = self.raw_log(revision, max)?;
            entries.iter().map(|(revision, bytes)| self.entry(*revision, bytes)).collect()
        })
    }

    fn log_about(&self, key: &Key, revision: u64, max: usize) -> Result<Vec<Revision>, StoreError> {
        self.looked(|| match self.log_known(key, revision, max)? {
            Some(found) => Ok(found),
            None => self.entries_about(key, &self.raw_log(revision, max)?),
        })
    }

    fn oldest(&self) -> Result<u64, StoreError> {
        self.looked(|| {
            let (oldest, last) =
                self.read(|txn| Ok((tables::read_oldest(txn)?, tables::text(txn, "revision")?)))?;
            oldest.map_or_else(|| Ok(self.number("revision", &last)? + 1), Ok)
        })
    }

    fn log_bytes(&self) -> Result<u64, StoreError> {
        self.looked(|| {
            let text = self.read(|txn| tables::text(txn, "log_bytes"))?;
            self.number("log_bytes", &text)
        })
    }

    fn compact(&self, before: u64, max: usize) -> Result<(), StoreError> {
        self.change(|database| tables::compact(database, before, max))?;
        let oldest = self.oldest()?;
        self.change_about(|about| about.forget_before(oldest));
        Ok(())
    }

    fn dump(&self, each: &mut dyn FnMut(Item) -> Result<(), StoreError>) -> Result<(), StoreError> {
        self.looked(|| self.dump_all(each))
    }

    fn recover(&self) -> Result<(), StoreError> {
        if let Some(damage) = self.met.get() {
            return Err(StoreError::read_only(&self.path, damage));
        }
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

    fn damage(&self) -> Option<&Arc<Damage>> {
        self.met.get()
    }
}

/// redb writes when it closes a file. A damaged one is not to be touched: it closes with the process.
impl Drop for RedbStore {
    fn drop(&mut self) {
        let condition = self.database.get_mut().unwrap_or_else(PoisonError::into_inner);
        let condition = std::mem::replace(condition, Condition::Full);
        if self.met.get().is_some() {
            std::mem::forget(condition);
            return;
        }
        let close = || {
            drop(condition);
            Ok(())
        };
        if let Err(error) = guarded(&self.path, close) {
            error!("{error}");
        }
    }
}

/// Where a store is until all of it is on the disk.
pub(crate) fn unnamed(path: &Path) -> PathBuf {
    path.with_extension("redb.new")
}

/// A file gets its name when all of it is on the disk. What an end half-way left under the other name holds nothing.
fn make_whole(path: &Path) -> Result<(), StoreError> {
    let failed = |source| StoreError::Open { path: path.to_owned(), source };
    let new = unnamed(path);
    match RedbStore::open_file(&new) {
        Err(StoreError::Damaged { .. }) => {
            fs::remove_file(&new).map_err(failed)?;
            RedbStore::open_file(&new)?;
        }
        made => drop(made?),
    }
    fs::rename(&new, path).map_err(failed)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    fs::File::open(parent.unwrap_or(Path::new("."))).and_then(|dir| dir.sync_all()).map_err(failed)
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
    hextet_redb_check::guarded(read)
        .unwrap_or_else(|what| Err(StoreError::Damaged { path: path.to_owned(), what }))
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
    let failed = |error| match error {
        redb::Error::Io(source) if is_full(&source) => StoreError::Full { path: path.to_owned(), source },
        other => read_error(path, &other),
    };
    if let Some(Meta { format, epoch }) = tables::read_meta(database).map_err(failed)? {
        match format.as_str() {
            FORMAT => {}
            FORMAT_OF_PLAIN_JSON => tables::upgrade(database).map_err(failed)?,
            _ => {
                return Err(StoreError::Format { path: path.to_owned(), found: format, expected: FORMAT });
            }
        }
        return Ok(epoch);
    }
    let mut bits = [0; 16];
    rand::rng().fill_bytes(&mut bits);
    let epoch = format!("{:032x}", u128::from_be_bytes(bits));
    tables::make(database, &epoch).map_err(failed)?;
    Ok(epoch)
}

#[cfg(test)]
mod damaged;
#[cfg(test)]
mod power;
#[cfg(test)]
mod tests;
