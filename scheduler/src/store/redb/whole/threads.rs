//! Entries in batches, for several threads.

use std::{
    num::NonZero,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use crate::mutex::lock;

/// A batch is handed over when it is as large.
const BATCH_BYTES: usize = 256 << 10;
/// More than these would wait for the one that reads the pages.
const THREADS_MAX: usize = 8;
/// Batches that may wait.
const WAITING_MAX: usize = 8;

/// Keys and values one after the other.
#[derive(Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Where each key ends, and its value.
    ends: Vec<(usize, usize)>,
}

/// Takes entries, and hands over what is full.
pub(super) struct Batches {
    open: Batch,
    number: usize,
    full: SyncSender<(usize, Batch)>,
}

impl Batch {
    pub(super) fn entries(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let begins = std::iter::once(0).chain(self.ends.iter().map(|(_, end)| *end));
        begins
            .zip(&self.ends)
            .map(|(begin, (key, value))| (&self.bytes[begin..*key], &self.bytes[*key..*value]))
    }
}

impl Batches {
    pub(super) fn push(&mut self, key: &[u8], value: &[u8]) {
        self.open.bytes.extend_from_slice(key);
        let end = self.open.bytes.len();
        self.open.bytes.extend_from_slice(value);
        self.open.ends.push((end, self.open.bytes.len()));
        if self.open.bytes.len() >= BATCH_BYTES {
            self.hand_over();
        }
    }

    fn hand_over(&mut self) {
        // Without takers one of them has found a flaw.
        let _ = self.full.send((self.number, std::mem::take(&mut self.open)));
        self.number += 1;
    }
}

/// Gives what `work` makes of the entries that `feed` puts in, in their order. `None` when it is for a batch.
pub(super) fn in_threads<R: Send>(
    feed: impl FnOnce(&mut Batches),
    work: impl Fn(&Batch) -> Option<Vec<R>> + Sync,
) -> Option<Vec<R>> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
    let (full, waiting) = sync_channel(WAITING_MAX);
    let (waiting, done, is_flawed) = (Mutex::new(waiting), Mutex::new(Vec::new()), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((number, batch)) = next(&waiting) {
                    // After a flaw the rest is taken, so that nobody waits, and left.
                    if is_flawed.load(Ordering::Relaxed) {
                        continue;
                    }
                    match work(&batch) {
                        Some(made) => lock(&done).push((number, made)),
                        None => is_flawed.store(true, Ordering::Relaxed),
                    }
                }
            });
        }
        let mut batches = Batches { open: Batch::default(), number: 0, full };
        feed(&mut batches);
        batches.hand_over();
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_unstable_by_key(|(number, _)| *number);
    let all = || done.into_iter().flat_map(|(_, made)| made).collect();
    (!is_flawed.into_inner()).then(all)
}

fn next(waiting: &Mutex<Receiver<(usize, Batch)>>) -> Option<(usize, Batch)> {
    lock(waiting).recv().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Many batches of numbers, and what comes of those that `is_good`.
    fn read(is_good: impl Fn(u64) -> bool + Sync) -> Option<Vec<u64>> {
        let number = |key: &[u8]| u64::from_le_bytes(key.try_into().unwrap());
        in_threads(
            |batches| (0..500_u64).for_each(|number| batches.push(&number.to_le_bytes(), &[7; 10_000])),
            |batch| {
                let good = |(key, value): (&[u8], &[u8])| {
                    (is_good(number(key)) && *value == [7; 10_000]).then_some(number(key))
                };
                batch.entries().map(good).collect()
            },
        )
    }

    #[test]
    fn entries_come_back_in_their_order() {
        assert_eq!(read(|_| true), Some((0..500).collect()));
    }

    #[test]
    fn a_flaw_anywhere_ends_it_and_nobody_waits() {
        for flaw in [0, 250, 499] {
            assert_eq!(read(|number| number != flaw), None);
        }
    }
}
