//! Where revisions are made durable.
//!
//! A store holds the newest revisions (the log, from the first one until it is compacted) and what all of them
//! add up to (the current values). It knows nothing of what the values mean, but for one thing: an address that
//! was given to a pod is never given again, and only the store remembers all of them, also after a compaction.

use std::{
    io,
    net::Ipv6Addr,
    path::{Path, PathBuf},
    sync::Arc,
};

use scheduler_core::change::{Change, Key, Revision, Value};
use serde::{Deserialize, Serialize};

use crate::etcd::EtcdError;

pub(crate) mod codec;
#[cfg(test)]
mod cost;
pub(crate) mod damage;
mod etcd;
mod redb;
mod salvage;

pub(crate) use self::redb::unnamed;
pub use self::{
    damage::Damage,
    etcd::{Copy, EtcdStore, Went},
    redb::RedbStore,
    salvage::SalvagedStore,
};

/// Where revisions are made durable.
pub trait Store: Send + Sync + 'static {
    /// Names this store for ever: 128 random bits in hex, drawn when it was made.
    fn epoch(&self) -> &str;

    /// The current values, and the revision that they are of.
    ///
    /// # Errors
    /// They cannot be read.
    fn load(&self) -> Result<(u64, Vec<(Key, Value)>), StoreError>;

    /// Makes revisions durable, all or none: when it returns, no crash can undo them. They must follow the
    /// last one that is stored.
    ///
    /// # Errors
    /// [`StoreError::AddressUsed`] leaves the store as it was and usable. After any other error it takes no
    /// more commits until [`Store::recover`] has succeeded.
    fn commit(&self, revisions: &[Revision]) -> Result<(), StoreError>;

    /// At most `max` revisions after `revision`, in order.
    ///
    /// # Errors
    /// They cannot be read.
    fn log_after(&self, revision: u64, max: usize) -> Result<Vec<Revision>, StoreError>;

    /// Of what [`Store::log_after`] gives, the first revision and those that change `key`; of the others any may be left out.
    ///
    /// # Errors
    /// They cannot be read.
    fn log_about(&self, key: &Key, revision: u64, max: usize) -> Result<Vec<Revision>, StoreError> {
        let _every_one_is_given = key;
        self.log_after(revision, max)
    }

    /// The oldest revision that is in the log; one more than the last when there is none.
    ///
    /// # Errors
    /// It cannot be read.
    fn oldest(&self) -> Result<u64, StoreError>;

    /// What the log takes, in bytes as they are stored.
    ///
    /// # Errors
    /// It cannot be read.
    fn log_bytes(&self) -> Result<u64, StoreError>;

    /// Removes at most `max` revisions from the log, the oldest first and none from `before` on. The current
    /// values and the addresses stay.
    ///
    /// # Errors
    /// As [`Store::commit`].
    fn compact(&self, before: u64, max: usize) -> Result<(), StoreError>;

    /// Gives everything that it holds as of one revision, while commits go on: the revision first, then the
    /// values, the addresses, and the log in order.
    ///
    /// # Errors
    /// It cannot be read, or `each` has failed.
    fn dump(&self, each: &mut dyn FnMut(Item) -> Result<(), StoreError>) -> Result<(), StoreError>;

    /// After a failed commit: opens the store anew and finds out what it holds. The failed revisions may
    /// have reached it; the caller reads the log to know.
    ///
    /// # Errors
    /// It is still unusable.
    fn recover(&self) -> Result<(), StoreError>;

    /// What is wrong with it, if it is damaged: it then shows what can be read and takes nothing.
    fn damage(&self) -> Option<&Arc<Damage>> {
        None
    }
}

/// One thing that a store holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Item {
    /// The number of the last revision.
    Last(u64),
    /// A current value.
    Value(Key, Value),
    /// An address that was given to a pod, and to which first.
    Address(Ipv6Addr, String),
    /// A revision of the log.
    Entry(Revision),
}

/// Why a store does not do what it should; each says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened or made.
    #[error("cannot open the store {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another process has it.
    #[error("the store {0} is in use: another `netctl server` runs on this state directory")]
    InUse(PathBuf),
    /// The file is not what was written.
    #[error(
        "the store {path} is damaged ({what}): put back a copy of the file, or move the state directory away and restore what `netctl server backup` wrote last with `netctl server restore`"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// A damaged store that is served takes nothing.
    #[error(
        "the store {path} is damaged and is only read ({first}; `netctl server status` lists all {count}): nothing is changed; end the server, then restore a backup with `netctl server restore` or put back a copy of the file"
    )]
    ReadOnly {
        /// The file.
        path: PathBuf,
        /// The first thing that was found.
        first: String,
        /// How many there are.
        count: usize,
    },
    /// The file is of another program or a later version.
    #[error(
        "the store {path} has format {found:?}, this program reads {expected:?}: use the version of netctl that wrote it"
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What it should say.
        expected: &'static str,
    },
    /// No room. Writing is tried again once there may be some.
    #[error("the disk of the store {path} is full: free some space and try again")]
    Full {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The disk failed. What it holds is not known, and a second try would not tell.
    #[error(
        "writing the store {path} failed ({cause}): nothing is written any more; check the disk, then start the server again"
    )]
    Stopped {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: String,
    },
    /// Reading failed.
    #[error("reading the store {path} failed ({cause})")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: String,
    },
    /// The store has lost what it had acknowledged.
    #[error(
        "the store is at revision {stored}, but {acknowledged} was acknowledged: nothing is written any more; check the disk and put back a copy of the store"
    )]
    GoneBack {
        /// The last revision that it holds.
        stored: u64,
        /// The last revision that it had said it holds.
        acknowledged: u64,
    },
    /// What is in etcd is not what was written.
    #[error(
        "the cluster in etcd below {prefix} is damaged ({what}): restore etcd from a snapshot of its own"
    )]
    DamagedInEtcd {
        /// Where its keys begin.
        prefix: String,
        /// What was found.
        what: String,
    },
    /// etcd has not done it, or nobody knows whether it has.
    #[error("nothing is written until etcd does")]
    Etcd(#[source] EtcdError),
    /// etcd does not take a value of this size.
    #[error("{key} takes {len} bytes, and etcd takes {max}: make it smaller")]
    TooLarge {
        /// What it is the value of.
        key: String,
        /// Its size.
        len: usize,
        /// The bound.
        max: usize,
    },
    /// Another server may write now.
    #[error("this server does not lead any more: try again")]
    Deposed,
    /// A backup's reader does not read.
    #[error("the backup is not read by whoever asked for it")]
    Reader,
    /// A pod had the address once. The caller draws another.
    #[error("the address {0} was given before")]
    AddressUsed(Ipv6Addr),
}

impl StoreError {
    /// What a damaged store says to every change.
    fn read_only(path: &Path, damage: &Damage) -> StoreError {
        let first = damage.lines().next().unwrap_or_default();
        StoreError::ReadOnly { path: path.to_owned(), first, count: damage.count() }
    }
}

/// The address that a pod has got, unless it had it before.
fn used_address(change: &Change) -> Option<(Ipv6Addr, &str)> {
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
pub(crate) mod suite;
