//! A copy of the state that a server keeps while it follows, so that it need not read everything when it leads.
//!
//! It goes along with the log: what comes next is read where the last entry that was read is still what it was, and is
//! one revision further. Where it is not (a compaction was faster, somebody put back a snapshot of etcd) everything
//! is read again. Whoever watches etcd only says when to look: an entry is never missed because nobody said so.
//!
//! In memory are the state and one entry of the log at a time.

use std::sync::atomic::{AtomicBool, Ordering};

use scheduler_core::state::State;
use twox_hash::XxHash3_128;

use super::{EtcdStore, Head, LOG_PAGE, StoreError, reading::Reading};
use crate::etcd::{Kv, pb};

/// The state as of a revision, and what the log had then.
pub struct Copy {
    reading: Reading,
    state: State,
    last: Option<Mark>,
}

/// An entry of the log, told apart from every other: its last revision, when etcd wrote it, and its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    revision: u64,
    written: i64,
    checksum: u128,
}

/// What came of going along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Went {
    /// There was nothing more.
    Nowhere,
    /// There may be more.
    On,
    /// The log does not go on from here: the copy is of no use any more.
    Astray,
}

impl Mark {
    fn of(revision: u64, found: &pb::KeyValue) -> Mark {
        Mark { revision, written: found.mod_revision, checksum: XxHash3_128::oneshot(&found.value) }
    }
}

impl Copy {
    /// Reads everything as of one moment, unless `stop` is set meanwhile.
    ///
    /// # Errors
    /// etcd does not answer, or what it holds does not read.
    pub fn read(etcd: impl Kv, prefix: &str, stop: &AtomicBool) -> Result<Option<Copy>, StoreError> {
        let reading = Reading::new(etcd, prefix);
        let (head, moment) = reading.head()?;
        let mut values = Vec::new();
        let read = reading.values(moment, &mut |key, value| {
            values.push((key, value));
            if stop.load(Ordering::Relaxed) { Err(StoreError::Deposed) } else { Ok(()) }
        });
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        read?;
        // Values that the log is ahead of may be there or not: each is put down again.
        let mut copy = Copy { reading, state: State::load(head.applied, values), last: None };
        copy.last = copy.mark(head.applied, moment)?;
        while copy.state.revision() < head.revision && copy.go_on(moment)? == Went::On {}
        Ok((copy.state.revision() == head.revision).then_some(copy))
    }

    /// The revision that it is of.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.state.revision()
    }

    /// Goes along with the log by a page.
    ///
    /// # Errors
    /// etcd does not answer.
    pub fn follow(&mut self) -> Result<Went, StoreError> {
        self.go_on(0)
    }

    /// The mark of the entry that ends with a revision, unless it was compacted.
    fn mark(&self, revision: u64, moment: i64) -> Result<Option<Mark>, StoreError> {
        let found = self.reading.log_page(revision.saturating_sub(1), revision, 1, moment)?;
        Ok(found.first().map(|found| Mark::of(revision, found)))
    }

    fn go_on(&mut self, moment: i64) -> Result<Went, StoreError> {
        let from = self.state.revision();
        let mut found =
            self.reading.log_page(from.saturating_sub(1), u64::MAX - 1, LOG_PAGE, moment)?.into_iter();
        if let Some(last) = self.last {
            match found.next() {
                Some(first) if Mark::of(from, &first) == last => {}
                // All of the log may be compacted: whoever takes over looks at the head.
                None => return Ok(Went::Nowhere),
                Some(_) => return Ok(Went::Astray),
            }
        }
        let mut went = Went::Nowhere;
        for entry in found {
            if !self.take(&entry, moment) {
                return Ok(Went::Astray);
            }
            went = Went::On;
        }
        Ok(went)
    }

    /// Takes an entry over. It does not follow on what is here, or its pieces were compacted meanwhile: false.
    fn take(&mut self, entry: &pb::KeyValue, moment: i64) -> bool {
        let Ok(revisions) = self.reading.read_entry(&entry.value, moment) else { return false };
        for revision in revisions {
            if revision.revision != self.state.revision() + 1 {
                return false;
            }
            self.state.advance(&revision);
        }
        self.last = Some(Mark::of(self.state.revision(), entry));
        true
    }

    /// Whether the last entry that it has read is in the log.
    fn is_of_this_log(&self) -> Result<bool, StoreError> {
        let revision = self.state.revision();
        Ok(self.last.is_some() && self.mark(revision, 0)? == self.last)
    }
}

impl EtcdStore {
    /// The state, from a copy that was kept until now and the entries that it lacks; `None` when it is of no use.
    ///
    /// # Errors
    /// etcd does not answer.
    pub fn go_on_from(&self, mut copy: Copy) -> Result<Option<State>, StoreError> {
        let mut condition = self.lock();
        self.settle(&mut condition)?;
        if !copy.is_of_this_log()? {
            return Ok(None);
        }
        while copy.follow()? == Went::On {}
        Ok((copy.revision() == condition.head.revision).then_some(copy.state))
    }
}

impl Reading {
    /// The head as etcd has it, and the revision of etcd at which that was so.
    fn head(&self) -> Result<(Head, i64), StoreError> {
        let request = pb::RangeRequest { key: self.key("head").into(), ..pb::RangeRequest::default() };
        let answer = self.etcd.range(request)?;
        let moment = answer.header.map_or(0, |header| header.revision);
        let head = answer.kvs.first().map(|found| self.decode("head", &found.value));
        Ok((head.transpose()?.unwrap_or(Head::NEW), moment))
    }
}
