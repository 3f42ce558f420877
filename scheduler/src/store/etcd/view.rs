//! What follows from entries of the log: the last value of each key, and the addresses that were given.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
};

use scheduler_core::change::{Revision, Value};

use crate::{
    etcd::{self, pb},
    store::{codec, used_address},
};

/// What follows from one entry.
pub(super) struct View {
    /// By the key's text. None: it is gone.
    values: BTreeMap<String, Option<Vec<u8>>>,
    addresses: Vec<(Ipv6Addr, String)>,
}

impl View {
    pub(super) fn of(revisions: &[Revision]) -> View {
        let mut last: BTreeMap<String, Option<&Value>> = BTreeMap::new();
        for change in revisions.iter().flat_map(|revision| &revision.changes) {
            last.insert(change.key.to_string(), change.new.as_ref());
        }
        let values = last.into_iter().map(|(key, value)| (key, value.map(codec::encode))).collect();
        let given = revisions.iter().flat_map(|revision| &revision.changes).filter_map(used_address);
        let addresses = given.map(|(address, pod)| (address, pod.to_owned())).collect();
        View { values, addresses }
    }

    /// The addresses that are given, or the one that is given twice.
    pub(super) fn addresses(&self) -> Result<Vec<Ipv6Addr>, Ipv6Addr> {
        let mut seen = BTreeSet::new();
        match self.addresses.iter().find(|(address, _)| !seen.insert(*address)) {
            Some((address, _)) => Err(*address),
            None => Ok(seen.into_iter().collect()),
        }
    }

    /// The key with the largest value.
    pub(super) fn largest(&self) -> Option<(&str, usize)> {
        let lens = self.values.iter().filter_map(|(key, value)| Some((key.as_str(), value.as_ref()?.len())));
        lens.max_by_key(|(_, len)| *len)
    }

    /// What has to be written, and how large it is.
    pub(super) fn operations(&self, prefix: &str) -> impl Iterator<Item = (pb::RequestOp, usize)> {
        let values = self.values.iter().map(move |(key, value)| {
            let key = format!("{prefix}/current/{key}");
            let len = key.len() + value.as_ref().map_or(0, Vec::len);
            let operation = match value {
                Some(value) => etcd::put(key, value.clone(), 0),
                None => etcd::delete(key),
            };
            (operation, len)
        });
        let addresses = self.addresses.iter().map(move |(address, pod)| {
            let key = address_key(prefix, *address);
            let len = key.len() + pod.len();
            (etcd::put(key, pod.clone().into_bytes(), 0), len)
        });
        values.chain(addresses)
    }
}

pub(super) fn address_key(prefix: &str, address: Ipv6Addr) -> String {
    format!("{prefix}/address/{address}")
}
