//! The store in etcd, written by the one server that has its seat (the one that leads).
//!
//! # Layout
//! Every key begins with the location's prefix.
//!
//! | key | value |
//! | --- | --- |
//! | `/head` | [`Head`] as JSON |
//! | `/log/NUMBER`, 16 hex digits: its last revision | an [`Entry`] |
//! | `/piece/NUMBER.RANDOM/PART` | a piece of a large entry |
//! | `/current/KEY` | a [`Value`] |
//! | `/address/ADDRESS` | the id of the pod that had it first |
//!
//! # A commit
//! is one transaction that writes its entries and moves the head. It says on what it relies: the leader's key
//! is this server's, and nobody has written the head since it was last read. Whatever arrives late, from
//! this server or from one that led before it, is therefore refused by etcd. A commit that is larger than
//! one transaction writes its pieces first, under keys that nobody reads before the entry names them.
//!
//! The current values and the used addresses follow from the log. They are written with the entry where
//! they fit, and after it where they do not; [`Head::applied`] says how far they have come.

use std::{
    net::Ipv6Addr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rand::RngCore as _;
use scheduler_core::change::{Key, Revision, Value};
use serde::{Deserialize, Serialize};
use tracing::warn;

use self::{reading::Reading, view::View};
use super::{Item, Store, StoreError, codec};
use crate::etcd::{self, EtcdError, Kv, Right, pb};

mod copy;
mod fill;
mod log;
mod reading;
mod view;

pub use copy::{Copy, Went};

/// etcd takes 128 operations in a transaction (`--max-txn-ops`).
const OPERATIONS_MAX: usize = 120;
/// etcd takes 1.5 MiB in a request (`--max-request-bytes`).
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// The largest value that fits into a request with what comes along.
const VALUE_BYTES_MAX: usize = 1400 << 10;
/// Entries of one commit. One that has more revisions puts several into an entry.
const ENTRIES_MAX: usize = 64;
/// Current values read at a time.
const PAGE: i64 = 2000;
/// Entries of the log read at a time.
const LOG_PAGE: i64 = 64;

/// The store in etcd.
pub struct EtcdStore {
    reading: Reading,
    epoch: String,
    seat: Box<dyn Right>,
    condition: Mutex<Condition>,
    /// The last and the oldest revision, for readers, who do not wait for a commit.
    revision: AtomicU64,
    oldest: AtomicU64,
    log_bytes: AtomicU64,
}

/// What is known of the head.
#[derive(Clone, Copy, Debug)]
struct Condition {
    head: Head,
    /// When etcd last wrote it, in its own revisions.
    written: i64,
    /// A transaction has failed: nobody knows whether it was taken.
    unknown: bool,
}

/// How far the store has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    /// The last revision.
    revision: u64,
    /// The revision that the current values and the used addresses are of.
    applied: u64,
    /// The oldest revision in the log, or the one that will be.
    oldest: u64,
    /// What the log takes.
    log_bytes: u64,
}

impl Head {
    /// Of a store in which nothing was ever written.
    const NEW: Head = Head { revision: 0, applied: 0, oldest: 1, log_bytes: 0 };
}

impl EtcdStore {
    /// Takes the store over for the server that has `seat`: from here on nothing that an earlier leader sends is
    /// taken. Blocks.
    ///
    /// # Errors
    /// etcd does not answer, or the seat is lost.
    pub fn open(etcd: impl Kv, prefix: &str, epoch: &str, seat: impl Right) -> Result<EtcdStore, StoreError> {
        let condition = Condition { head: Head::NEW, written: 0, unknown: true };
        let store = EtcdStore {
            reading: Reading::new(etcd, prefix),
            epoch: epoch.to_owned(),
            seat: Box::new(seat),
            condition: Mutex::new(condition),
            revision: AtomicU64::new(0),
            oldest: AtomicU64::new(0),
            log_bytes: AtomicU64::new(0),
        };
        let mut condition = store.lock();
        store.read_head(&mut condition)?;
        let head = condition.head;
        store.write(&mut condition, head, vec![])?;
        store.remove_strays(&mut condition)?;
        store.settle(&mut condition)?;
        drop(condition);
        Ok(store)
    }

    fn lock(&self) -> MutexGuard<'_, Condition> {
        self.condition.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a transaction that relies on the seat, and on the head when it is to be moved.
    fn transact(
        &self,
        mut compare: Vec<pb::Compare>,
        success: Vec<pb::RequestOp>,
    ) -> Result<Option<pb::TxnResponse>, StoreError> {
        if self.seat.is_lost() {
            return Err(StoreError::Deposed);
        }
        compare.push(etcd::created_at(self.seat.key(), self.seat.fence()));
        let request = pb::TxnRequest { compare, success, failure: vec![] };
        let response = self.reading.etcd.txn(request)?;
        Ok(Some(response).filter(|response| response.succeeded))
    }

    /// Moves the head, together with `operations`.
    fn write(
        &self,
        condition: &mut Condition,
        head: Head,
        mut operations: Vec<pb::RequestOp>,
    ) -> Result<(), StoreError> {
        let key = self.reading.key("head");
        let compare = vec![etcd::written_at(&key, condition.written)];
        operations.push(etcd::put(key, codec::encode(&head), 0));
        // Unless etcd answers, nobody knows.
        condition.unknown = true;
        let Some(response) = self.transact(compare, operations)? else { return Err(StoreError::Deposed) };
        let written = response.header.map_or(0, |header| header.revision);
        self.know(condition, head, written);
        Ok(())
    }

    /// What etcd holds, as of a moment in which the seat was this server's.
    fn read_head(&self, condition: &mut Condition) -> Result<(), StoreError> {
        let key = self.reading.key("head");
        let Some(response) = self.transact(vec![], vec![etcd::read(&key)])? else {
            return Err(StoreError::Deposed);
        };
        let (head, written) = match etcd::found(response).next().flatten() {
            Some(found) => (self.reading.decode::<Head>("head", &found.value)?, found.mod_revision),
            None => (Head::NEW, 0),
        };
        self.know(condition, head, written);
        Ok(())
    }

    fn know(&self, condition: &mut Condition, head: Head, written: i64) {
        *condition = Condition { head, written, unknown: false };
        self.oldest.store(head.oldest, Ordering::Release);
        self.log_bytes.store(head.log_bytes, Ordering::Release);
        self.revision.store(head.revision, Ordering::Release);
    }

    /// Brings the current values and used addresses up to the head.
    fn settle(&self, condition: &mut Condition) -> Result<(), StoreError> {
        while condition.head.applied < condition.head.revision {
            let (from, to) = (condition.head.applied, condition.head.revision);
            for entry in self.reading.entries(from, to, LOG_PAGE, 0)? {
                let applied = entry.last().map_or(to, |last| last.revision);
                self.apply(condition, &View::of(&entry), applied)?;
            }
        }
        Ok(())
    }

    /// Writes what follows from an entry that is in the log, up to revision `applied`. What is written twice is
    /// the same.
    fn apply(&self, condition: &mut Condition, view: &View, applied: u64) -> Result<(), StoreError> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        for (operation, len) in view.operations(&self.reading.prefix) {
            if batch.len() == OPERATIONS_MAX || bytes + len > REQUEST_BYTES_MAX {
                let head = condition.head;
                self.write(condition, head, std::mem::take(&mut batch))?;
                bytes = 0;
            }
            bytes += len;
            batch.push(operation);
        }
        let head = Head { applied, ..condition.head };
        self.write(condition, head, batch)
    }

    /// The first of these addresses that a pod had before.
    fn used(&self, addresses: &[Ipv6Addr]) -> Result<Option<Ipv6Addr>, StoreError> {
        for some in addresses.chunks(OPERATIONS_MAX) {
            let reads =
                some.iter().map(|address| etcd::read(&view::address_key(&self.reading.prefix, *address)));
            let Some(response) = self.transact(vec![], reads.collect())? else {
                return Err(StoreError::Deposed);
            };
            let known = some.iter().zip(etcd::found(response)).find(|(_, found)| found.is_some());
            if let Some((address, _)) = known {
                return Ok(Some(*address));
            }
        }
        Ok(None)
    }

    fn try_commit(&self, condition: &mut Condition, revisions: &[Revision]) -> Result<(), StoreError> {
        let Some(last) = revisions.last().map(|last| last.revision) else { return Ok(()) };
        if condition.unknown {
            self.reread(condition)?;
        }
        self.settle(condition)?;
        let view = View::of(revisions);
        let addresses = view.addresses().map_err(StoreError::AddressUsed)?;
        if let Some((key, len)) = view.largest().filter(|(_, len)| *len > VALUE_BYTES_MAX) {
            return Err(StoreError::TooLarge { key: key.to_owned(), len, max: VALUE_BYTES_MAX });
        }
        if let Some(address) = self.used(&addresses)? {
            return Err(StoreError::AddressUsed(address));
        }
        let (mut operations, mut bytes) = self.entries_of(revisions)?;
        let log_bytes = condition.head.log_bytes + bytes.stored;
        let head = Head { revision: last, log_bytes, ..condition.head };
        let entries = operations.len();
        let fits = view.operations(&self.reading.prefix).all(|(operation, len)| {
            bytes.sent += len;
            operations.push(operation);
            operations.len() <= OPERATIONS_MAX && bytes.sent <= REQUEST_BYTES_MAX
        });
        if fits {
            return self.write(condition, Head { applied: last, ..head }, operations);
        }
        operations.truncate(entries);
        self.write(condition, head, operations)?;
        // The commit is durable. What follows from it is written now, or before the next one.
        if let Err(error) = self.apply(condition, &view, last) {
            warn!(%error, revision = last, "the current values follow later");
        }
        Ok(())
    }

    /// After a failure behind a commit, which changes nothing that was acknowledged.
    fn reread(&self, condition: &mut Condition) -> Result<(), StoreError> {
        let acknowledged = condition.head.revision;
        self.read_head(condition)?;
        let stored = condition.head.revision;
        if stored == acknowledged {
            return Ok(());
        }
        condition.unknown = true;
        Err(StoreError::GoneBack { stored, acknowledged })
    }
}

impl Store for EtcdStore {
    fn epoch(&self) -> &str {
        &self.epoch
    }

    fn load(&self) -> Result<(u64, Vec<(Key, Value)>), StoreError> {
        let mut condition = self.lock();
        self.settle(&mut condition)?;
        let mut values = Vec::new();
        self.reading.values(0, &mut |key, value| {
            values.push((key, value));
            Ok(())
        })?;
        Ok((condition.head.revision, values))
    }

    fn commit(&self, revisions: &[Revision]) -> Result<(), StoreError> {
        self.try_commit(&mut self.lock(), revisions)
    }

    fn log_after(&self, revision: u64, max: usize) -> Result<Vec<Revision>, StoreError> {
        let to = self.revision.load(Ordering::Acquire);
        let mut found: Vec<Revision> = Vec::new();
        let mut from = revision.max(self.oldest.load(Ordering::Acquire).saturating_sub(1));
        while from < to && found.len() < max {
            let entries =
                self.reading.entries(from, to, LOG_PAGE.min(i64::try_from(max).unwrap_or(LOG_PAGE)), 0)?;
            found.extend(entries.into_iter().flatten().filter(|entry| entry.revision > revision));
            from = found.last().map_or(to, |last| last.revision);
        }
        found.truncate(max);
        Ok(found)
    }

    fn oldest(&self) -> Result<u64, StoreError> {
        Ok(self.oldest.load(Ordering::Acquire))
    }

    fn log_bytes(&self) -> Result<u64, StoreError> {
        Ok(self.log_bytes.load(Ordering::Acquire))
    }

    fn compact(&self, before: u64, max: usize) -> Result<(), StoreError> {
        let mut condition = self.lock();
        if condition.unknown {
            self.reread(&mut condition)?;
        }
        self.remove_oldest(&mut condition, before, max)
    }

    fn dump(&self, each: &mut dyn FnMut(Item) -> Result<(), StoreError>) -> Result<(), StoreError> {
        // etcd remembers what was there when the head was written last: commits go on meanwhile.
        let (head, moment) = {
            let mut condition = self.lock();
            self.settle(&mut condition)?;
            (condition.head, condition.written)
        };
        each(Item::Last(head.revision))?;
        self.reading.values(moment, &mut |key, value| each(Item::Value(key, value)))?;
        self.reading.addresses(moment, each)?;
        let mut from = head.oldest.saturating_sub(1);
        while from < head.revision {
            for revision in self.reading.entries(from, head.revision, LOG_PAGE, moment)?.into_iter().flatten()
            {
                from = revision.revision;
                each(Item::Entry(revision))?;
            }
        }
        Ok(())
    }

    fn recover(&self) -> Result<(), StoreError> {
        let mut condition = self.lock();
        self.read_head(&mut condition)?;
        self.settle(&mut condition)
    }
}

impl From<EtcdError> for StoreError {
    fn from(error: EtcdError) -> StoreError {
        StoreError::Etcd(error)
    }
}

#[cfg(test)]
mod tests;
