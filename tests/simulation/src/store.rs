//! The server's disk: what is on it survives every crash, and nothing else does.

use std::{collections::BTreeMap, net::Ipv6Addr};

use scheduler_core::{
    batch::CommitError,
    change::{Revision, Value},
    pod::PodId,
    state::State,
};

/// The log, what it adds up to, and every address that was ever given.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    log: BTreeMap<u64, Revision>,
    state: State,
    given: BTreeMap<Ipv6Addr, PodId>,
    oldest: u64,
}

/// Why a commit is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskError {
    Full,
    AddressUsed,
}

impl CommitError for DiskError {
    fn is_address_used(&self) -> bool {
        *self == DiskError::AddressUsed
    }
}

impl Disk {
    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    pub(crate) fn revision(&self) -> u64 {
        self.state.revision()
    }

    pub(crate) fn get(&self, revision: u64) -> Option<&Revision> {
        self.log.get(&revision)
    }

    /// The oldest revision that can still be read.
    pub(crate) fn oldest(&self) -> u64 {
        self.oldest.max(1)
    }

    /// Older revisions can be read no more.
    pub(crate) fn compact(&mut self, oldest: u64) {
        self.oldest = self.oldest.max(oldest);
    }

    pub(crate) fn log_after(&self, revision: u64) -> impl Iterator<Item = &Revision> {
        self.log.range(revision.max(self.oldest() - 1) + 1..).map(|(_, revision)| revision)
    }

    /// Whether an address is new, or one that its pod has already.
    pub(crate) fn takes(&self, revisions: &[Revision]) -> bool {
        revisions.iter().flat_map(new_addresses).all(|(address, _)| !self.given.contains_key(&address))
    }

    /// Makes them durable; an address that was given before, if one is, comes back.
    pub(crate) fn append(&mut self, revisions: &[Revision]) -> Option<Ipv6Addr> {
        let mut again = None;
        for revision in revisions {
            self.state.advance(revision);
            for (address, pod) in new_addresses(revision) {
                if self.given.insert(address, pod).is_some() {
                    again = Some(address);
                }
            }
            self.log.insert(revision.revision, revision.clone());
        }
        again
    }
}

/// Addresses that a revision gives to pods that did not have them.
fn new_addresses(revision: &Revision) -> impl Iterator<Item = (Ipv6Addr, PodId)> {
    let of = |value: &Option<Value>| match value {
        Some(Value::Pod(pod)) => Some((pod.address?, pod.id.clone())),
        _ => None,
    };
    revision
        .changes
        .iter()
        .filter_map(move |change| of(&change.new).filter(|new| of(&change.old).as_ref() != Some(new)))
}
