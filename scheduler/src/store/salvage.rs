//! A damaged store: what of it can be read, and nothing is ever written to it.

use std::{collections::BTreeMap, fs::File, net::Ipv6Addr, path::PathBuf, sync::Arc};

use scheduler_core::change::{Key, Revision, Value};

use super::{Damage, Item, Store, StoreError, codec};

/// What was found in a damaged file.
pub(super) struct Salvage {
    /// Unless that cannot be read.
    pub(super) epoch: Option<String>,
    /// The last revision, as far as that is known.
    pub(super) revision: u64,
    /// The oldest revision that the log has, whether it reads or not; one more than the last when there is none.
    pub(super) oldest: u64,
    pub(super) values: BTreeMap<Key, Value>,
    pub(super) addresses: Vec<(Ipv6Addr, String)>,
    /// Entries that read, as they are stored.
    pub(super) log: BTreeMap<u64, Vec<u8>>,
    pub(super) damage: Damage,
}

/// A damaged store in memory. Its file is held, so that no other server takes it.
pub struct SalvagedStore {
    path: PathBuf,
    epoch: String,
    found: Salvage,
    damage: Arc<Damage>,
    _held: File,
}

impl SalvagedStore {
    /// `epoch` is its name, should the store not know it any more.
    pub(super) fn new(path: PathBuf, epoch: String, found: Salvage, held: File) -> SalvagedStore {
        let damage = Arc::new(found.damage.clone());
        let epoch = found.epoch.clone().unwrap_or(epoch);
        SalvagedStore { path, epoch, found, damage, _held: held }
    }

    fn refusal(&self) -> StoreError {
        StoreError::read_only(&self.path, &self.damage)
    }
}

impl Store for SalvagedStore {
    fn epoch(&self) -> &str {
        &self.epoch
    }

    fn load(&self) -> Result<(u64, Vec<(Key, Value)>), StoreError> {
        let values = self.found.values.iter().map(|(key, value)| (key.clone(), value.clone()));
        Ok((self.found.revision, values.collect()))
    }

    fn commit(&self, _: &[Revision]) -> Result<(), StoreError> {
        Err(self.refusal())
    }

    /// What cannot be read is left out: the numbers tell.
    fn log_after(&self, revision: u64, max: usize) -> Result<Vec<Revision>, StoreError> {
        let entries = self.found.log.range(revision.saturating_add(1)..).take(max);
        let damaged = |number: u64, error: std::io::Error| StoreError::Damaged {
            path: self.path.clone(),
            what: format!("revision {number}: {error}"),
        };
        entries.map(|(number, entry)| codec::decode(entry).map_err(|error| damaged(*number, error))).collect()
    }

    fn oldest(&self) -> Result<u64, StoreError> {
        Ok(self.found.oldest)
    }

    fn log_bytes(&self) -> Result<u64, StoreError> {
        Ok(self.found.log.values().map(|entry| entry.len() as u64).sum())
    }

    fn compact(&self, _: u64, _: usize) -> Result<(), StoreError> {
        Err(self.refusal())
    }

    fn dump(&self, each: &mut dyn FnMut(Item) -> Result<(), StoreError>) -> Result<(), StoreError> {
        each(Item::Last(self.found.revision))?;
        let values = self.found.values.iter();
        values.map(|(key, value)| Item::Value(key.clone(), value.clone())).try_for_each(&mut *each)?;
        let addresses = self.found.addresses.iter();
        addresses.map(|(address, pod)| Item::Address(*address, pod.clone())).try_for_each(&mut *each)?;
        let mut at = 0;
        while let Some(entry) = self.log_after(at, 1)?.pop() {
            at = entry.revision;
            each(Item::Entry(entry))?;
        }
        Ok(())
    }

    fn recover(&self) -> Result<(), StoreError> {
        Err(self.refusal())
    }

    fn damage(&self) -> Option<&Arc<Damage>> {
        Some(&self.damage)
    }
}
