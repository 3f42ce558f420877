//! Power cuts: a disk that loses and tears what was not synced, thousands of times, also while the store recovers.

use std::{
    fmt, io,
    num::NonZero,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use redb::StorageBackend;
use scheduler_core::change::Key;

use super::*;
use crate::store::suite::revision;

const SEEDS: u64 = 120;
const CUTS_PER_SEED: usize = 20;
const SECTOR: usize = 512;
/// Operations of the disk before it fails.
const LIFE_MAX: u64 = 60;
/// The same, while the store is opened after a cut.
const LIFE_OF_RECOVERY_MAX: u64 = 12;

#[test]
fn no_power_cut_loses_what_was_acknowledged_or_shows_what_never_was() {
    let seeds = seeds();
    let (next, played) = (AtomicU64::new(seeds.start), Mutex::new([0; 3]));
    let play_some = || {
        while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| seeds.contains(seed))
        {
            let figures = play(seed);
            let mut played = played.lock().unwrap();
            *played = std::array::from_fn(|at| played[at] + figures[at]);
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(play_some))));
    let [cuts, second, in_flight] = played.into_inner().unwrap();
    println!(
        "seeds {seeds:?}: {cuts} power cuts, {second} of them during recovery; {in_flight} left what nobody had heard of"
    );
    let lives = (seeds.end - seeds.start) * CUTS_PER_SEED as u64;
    assert!(cuts > lives && second * 15 > lives && in_flight * 200 > lives, "{cuts} {second} {in_flight}");
}

/// Those of every day, or those that `cargo xtask crash` wants.
fn seeds() -> Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("HEXTET_CRASH_SEED").unwrap_or(0);
    first..first + number("HEXTET_CRASH_ROUNDS").unwrap_or(SEEDS)
}

/// Power cuts, those during recovery, and those that left what nobody had heard of.
fn play(seed: u64) -> [u64; 3] {
    let (mut run, mut in_flight) = (Run::new(seed), 0);
    for _ in 0..CUTS_PER_SEED {
        run.live_and_die();
        in_flight += u64::from(run.check());
    }
    [run.cuts, run.second, in_flight]
}

/// One disk through many lives.
struct Run {
    seed: u64,
    rng: StdRng,
    disk: Disk,
    is_made: bool,
    /// What was acknowledged, and after it what may be there too.
    acknowledged: Vec<Revision>,
    unheard: Vec<Revision>,
    cuts: u64,
    second: u64,
}

impl Run {
    fn new(seed: u64) -> Run {
        let rng = StdRng::seed_from_u64(seed);
        let (disk, is_made) = (Disk::default(), false);
        Run { seed, rng, disk, is_made, acknowledged: vec![], unheard: vec![], cuts: 0, second: 0 }
    }

    /// Commits until the power fails.
    fn live_and_die(&mut self) {
        self.disk.fail_after(self.rng.random_range(0..LIFE_MAX));
        if let Ok(store) = self.disk.open() {
            self.is_made = true;
            loop {
                let batch = self.batch();
                if store.commit(&batch).is_err() {
                    self.unheard = batch;
                    break;
                }
                self.acknowledged.extend(batch);
            }
            assert!(store.commit(&self.batch()).is_err(), "seed {}: a failed store took a commit", self.seed);
        }
        self.cut();
    }

    fn batch(&mut self) -> Vec<Revision> {
        let next = self.acknowledged.len() as u64 + 1;
        let count = self.rng.random_range(1..4);
        (next..next + count).map(|number| revision(number, Some(&format!("fd00::{number:x}")))).collect()
    }

    fn cut(&mut self) {
        self.disk = self.disk.after_a_cut(&mut self.rng);
        self.cuts += 1;
    }

    /// Opens the store, through more cuts of the power, and compares. Says whether it holds what nobody had heard of.
    fn check(&mut self) -> bool {
        while self.rng.random_ratio(1, 4) {
            self.disk.fail_after(self.rng.random_range(0..LIFE_OF_RECOVERY_MAX));
            self.second += u64::from(self.disk.open().is_err());
            self.cut();
        }
        self.disk.heal();
        let seed = self.seed;
        // A cut is no damage.
        let found = audit::look(&self.disk);
        if self.is_made {
            let found = found.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            let damage = found.map(|found| found.damage.lines().collect::<Vec<_>>()).unwrap_or_default();
            assert!(damage.is_empty(), "seed {seed}: {damage:#?}");
            assert!(whole::read(&self.disk).is_some(), "seed {seed}: it is called damaged");
        }
        // A store gets its name when it is whole: until then the next start begins with another file.
        if !self.is_made && self.disk.open().is_err() {
            self.disk = Disk::default();
        }
        let store = self.disk.open().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        self.is_made = true;
        let (last, values) = store.load().unwrap();
        let all: Vec<Revision> = self.acknowledged.iter().chain(&self.unheard).cloned().collect();
        let allowed = [self.acknowledged.len(), all.len()];
        assert!(allowed.contains(&(last as usize)), "seed {seed}: {last} is not one of {allowed:?}");
        let held = &all[..last as usize];
        // A watcher that goes on from anywhere sees each revision once.
        let from = self.rng.random_range(0..=last);
        assert_eq!(store.log_after(from, all.len() + 1).unwrap(), held[from as usize..], "seed {seed}");
        let expected = held.iter().flat_map(|revision| &revision.changes);
        let expected = expected.map(|change| (change.key.clone(), change.new.clone().unwrap()));
        let expected: std::collections::BTreeMap<Key, Value> = expected.collect();
        assert_eq!(values.into_iter().collect::<std::collections::BTreeMap<_, _>>(), expected, "seed {seed}");
        if let Some(first) = held.first() {
            let again = Revision { revision: last + 1, ..first.clone() };
            assert!(matches!(store.commit(&[again]), Err(StoreError::AddressUsed(_))), "seed {seed}");
        }
        let has_unheard = last as usize > self.acknowledged.len();
        self.acknowledged.truncate(0);
        self.acknowledged.extend_from_slice(held);
        self.unheard.clear();
        has_unheard
    }
}

/// A disk with a cache that a cut empties.
#[derive(Clone, Default)]
struct Disk(Arc<Mutex<Platter>>);

#[derive(Default)]
struct Platter {
    durable: Vec<u8>,
    /// What the system sees: the same, with what is in the cache.
    seen: Vec<u8>,
    cache: Vec<Cached>,
    /// Operations until the power fails.
    left: Option<u64>,
}

enum Cached {
    Len(usize),
    Write(usize, Vec<u8>),
}

impl Disk {
    fn open(&self) -> Result<RedbStore, StoreError> {
        let disk = self.clone();
        RedbStore::with_opener(Path::new("test"), move || {
            Database::builder().create_with_backend(disk.clone())
        })
    }

    fn fail_after(&self, operations: u64) {
        self.0.lock().unwrap().left = Some(operations);
    }

    fn heal(&self) {
        self.0.lock().unwrap().left = None;
    }

    /// What is left when the power is back: of each write in the cache nothing, all, or some of its sectors.
    fn after_a_cut(&self, rng: &mut StdRng) -> Disk {
        let platter = self.0.lock().unwrap();
        let mut bytes = platter.durable.clone();
        for cached in &platter.cache {
            match (cached, rng.random_range(0..3)) {
                (_, 0) => {}
                (Cached::Len(len), _) => bytes.resize(*len, 0),
                (Cached::Write(offset, data), how) => {
                    for (number, sector) in data.chunks(SECTOR).enumerate() {
                        if how == 1 || rng.random() {
                            put(&mut bytes, offset + number * SECTOR, sector);
                        }
                    }
                }
            }
        }
        let platter = Platter { seen: bytes.clone(), durable: bytes, ..Platter::default() };
        Disk(Arc::new(Mutex::new(platter)))
    }
}

fn put(bytes: &mut Vec<u8>, offset: usize, data: &[u8]) {
    bytes.resize(bytes.len().max(offset + data.len()), 0);
    bytes[offset..offset + data.len()].copy_from_slice(data);
}

impl Platter {
    fn spend(&mut self) -> io::Result<()> {
        match &mut self.left {
            None => Ok(()),
            Some(0) => Err(io::Error::other("the power is off")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Disk")
    }
}

impl hextet_redb_check::Bytes for Disk {
    fn len(&self) -> io::Result<u64> {
        StorageBackend::len(self)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        StorageBackend::read(self, offset, out)
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().seen.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (platter, offset) = (self.0.lock().unwrap(), offset as usize);
        let bytes = platter.seen.get(offset..offset + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.spend()?;
        platter.seen.resize(len as usize, 0);
        platter.cache.push(Cached::Len(len as usize));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.spend()?;
        platter.cache.clear();
        platter.durable = platter.seen.clone();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.spend()?;
        put(&mut platter.seen, offset as usize, data);
        platter.cache.push(Cached::Write(offset as usize, data.to_vec()));
        Ok(())
    }
}
