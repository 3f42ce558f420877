//! What is in etcd, for whoever reads it: the server that leads, and those that follow.

use scheduler_core::change::{Key, Revision, Value};

use super::{PAGE, log::Entry};
use crate::{
    etcd::{self, Kv, pb},
    store::{Item, StoreError, codec},
};

/// Takes what is at one key.
type EachKey<'a> = dyn FnMut(&str, &[u8]) -> Result<(), StoreError> + 'a;

/// Reads what is below a prefix.
pub(super) struct Reading {
    pub(super) etcd: Box<dyn Kv>,
    pub(super) prefix: String,
}

impl Reading {
    pub(super) fn new(etcd: impl Kv, prefix: &str) -> Reading {
        Reading { etcd: Box::new(etcd), prefix: prefix.to_owned() }
    }

    pub(super) fn key(&self, rest: &str) -> String {
        format!("{}/{rest}", self.prefix)
    }

    pub(super) fn decode<T: serde::de::DeserializeOwned>(
        &self,
        what: &str,
        value: &[u8],
    ) -> Result<T, StoreError> {
        codec::decode(value).map_err(|error| self.damaged(format!("{what}: {error}")))
    }

    pub(super) fn damaged(&self, what: String) -> StoreError {
        StoreError::DamagedInEtcd { prefix: self.prefix.clone(), what }
    }

    /// The current values as of a revision of etcd, 0 for now.
    pub(super) fn values(
        &self,
        moment: i64,
        each: &mut dyn FnMut(Key, Value) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.pages("current/", moment, &mut |key, value| {
            let value = self.decode(key, value)?;
            each(key.parse::<Key>().map_err(|error| self.damaged(error.to_string()))?, value)
        })
    }

    pub(super) fn addresses(
        &self,
        moment: i64,
        each: &mut dyn FnMut(Item) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.pages("address/", moment, &mut |key, pod| {
            let address = key.parse().map_err(|_| self.damaged(format!("address {key:?}")))?;
            each(Item::Address(address, String::from_utf8_lossy(pod).into_owned()))
        })
    }

    /// What is below `folder`, page by page.
    pub(super) fn pages(&self, folder: &str, moment: i64, each: &mut EachKey<'_>) -> Result<(), StoreError> {
        let prefix = self.key(folder);
        let mut request = pb::RangeRequest {
            key: prefix.as_str().into(),
            range_end: etcd::after(&prefix),
            limit: PAGE,
            revision: moment,
            keys_only: false,
        };
        loop {
            let (found, more) = self.etcd.page(&mut request)?;
            for found in found {
                each(&String::from_utf8_lossy(&found.key[prefix.len()..]), &found.value)?;
            }
            if !more {
                return Ok(());
            }
        }
    }

    pub(super) fn log_key(&self, revision: u64) -> String {
        self.key(&format!("log/{revision:016x}"))
    }

    /// A page of the entries after revision `from` up to `to`, in order, as of a revision of etcd.
    pub(super) fn entries(
        &self,
        from: u64,
        to: u64,
        page: i64,
        moment: i64,
    ) -> Result<Vec<Vec<Revision>>, StoreError> {
        let found = self.log_page(from, to, page, moment)?;
        if found.is_empty() && from < to {
            return Err(self.damaged(format!("the log ends at revision {from}, the head is at {to}")));
        }
        found.iter().map(|found| self.read_entry(&found.value, moment)).collect()
    }

    pub(super) fn log_page(
        &self,
        from: u64,
        to: u64,
        page: i64,
        moment: i64,
    ) -> Result<Vec<pb::KeyValue>, StoreError> {
        let request = pb::RangeRequest {
            key: self.log_key(from.saturating_add(1)).into(),
            range_end: self.log_key(to.saturating_add(1)).into(),
            limit: page,
            revision: moment,
            keys_only: false,
        };
        Ok(self.etcd.range(request)?.kvs)
    }

    pub(super) fn read_entry(&self, value: &[u8], moment: i64) -> Result<Vec<Revision>, StoreError> {
        let (id, count) = match self.decode("log", value)? {
            Entry::Whole(revisions) => return Ok(revisions),
            Entry::Pieces(id, count, _) => (id, count),
        };
        let (mut pieces, mut whole) = (0, Vec::new());
        self.pages(&format!("piece/{id}/"), moment, &mut |_, piece| {
            pieces += 1;
            whole.extend_from_slice(piece);
            Ok(())
        })?;
        if pieces != count {
            return Err(self.damaged(format!("{pieces} of {count} pieces of the entry {id} are there")));
        }
        match self.decode("log", &whole)? {
            Entry::Whole(revisions) => Ok(revisions),
            Entry::Pieces(..) => Err(self.damaged(format!("the entry {id} is made of pieces twice"))),
        }
    }
}
