//! A backup: everything that the store holds as of one revision, and the cluster's CA with its key.
//!
//! # Layout
//! The line `FORMAT`, then records: a length (4 bytes, big endian) and so many bytes in the form of the store's
//! codec, which has a checksum. The first record says whose backup it is, the last one how many came before it: a
//! file that ends early is told from a whole one.
//!
//! What a damaged store can still give has another first line and says in its first record what is missing: nobody
//! takes it for a whole backup.
//!
//! Whoever has the file can be the cluster: it is for root alone.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use scheduler_core::{
    batch::{self, Surroundings},
    change::Key,
    event::Event,
    restore::Restored as Mark,
    state::State,
    transition::{Context, Origin},
};
use serde::{Deserialize, Serialize};

use crate::{
    clock::Clock,
    founding,
    pki::{Authority, Keyring, Pki},
    remains,
    store::{Damage, Item, RedbStore, Store, StoreError, codec},
};

mod into_etcd;
mod new_file;

pub use into_etcd::restore_into_etcd;
pub use new_file::NewFile;

const FORMAT: &[u8] = b"hextet-backup-1\n";
/// Of a damaged store.
const FORMAT_INCOMPLETE: &[u8] = b"hextet-backup-1-incomplete\n";
/// A record is one value or one revision, compressed.
const RECORD_BYTES_MAX: u32 = 1 << 28;
/// Records that are written to a store at a time, and their bytes in the file: what is read before more is written.
const CHUNK: usize = 1000;
const CHUNK_BYTES: usize = 1 << 20;

/// One record of a backup.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Record {
    Begin {
        epoch: String,
        authority: Authority,
        /// How long leases are that the server grants; 0 in backups from before there was this.
        #[serde(default)]
        lease_ms: u64,
        /// CAs besides the one that makes certificates.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        others: Vec<Authority>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        damage: Option<Damage>,
    },
    Item(Item),
    End {
        items: u64,
    },
}

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Restored {
    /// The last revision of the backup; the cluster goes on from the next, which says that it was restored.
    pub revision: u64,
    /// How many values, addresses and revisions came back.
    pub items: u64,
    /// The store's new name: whoever watched the old one lists anew.
    pub epoch: String,
    /// What the backup of a damaged store lacks, a line each; none for a whole one.
    pub missing: Vec<String>,
}

/// What is to be done with the backup of a damaged store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incomplete {
    /// It is refused, and what it lacks is said.
    Refuse,
    /// What it has is taken, but for the history, which has gaps.
    Take,
}

/// What a backup says of itself.
struct Begun {
    keyring: Keyring,
    lease_ms: u64,
    damage: Option<Damage>,
}

/// Gives the bytes of a backup in order, while commits go on. `lease` is how long leases are that the server grants.
///
/// # Errors
/// The store cannot be read, or `sink` has failed.
pub(crate) fn write(
    store: &dyn Store,
    keyring: Keyring,
    lease: Duration,
    sink: &mut dyn FnMut(Vec<u8>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let damage = store.damage().map(|damage| damage.as_ref().clone());
    sink(if damage.is_some() { FORMAT_INCOMPLETE } else { FORMAT }.to_vec())?;
    let (epoch, lease_ms) = (store.epoch().to_owned(), u64::try_from(lease.as_millis()).unwrap_or(u64::MAX));
    let Keyring { issuing: authority, others } = keyring;
    sink(framed(&Record::Begin { epoch, authority, lease_ms, others, damage }))?;
    let mut items = 0;
    store.dump(&mut |item| {
        items += 1;
        sink(framed(&Record::Item(item)))
    })?;
    sink(framed(&Record::End { items }))
}

fn framed(record: &Record) -> Vec<u8> {
    let bytes = codec::encode(record);
    let len = u32::try_from(bytes.len()).expect("a record is far below 4 GiB");
    [&len.to_be_bytes(), bytes.as_slice()].concat()
}

/// Makes the state directory `dir` of a backup, for `netctl server` to go on with. The whole file is checked before
/// anything is made.
///
/// # Errors
/// There is a cluster in the directory, the file is not a whole backup or one of a damaged store that is not to be
/// taken, or something cannot be written.
pub fn restore(file: &Path, dir: &Path, incomplete: Incomplete) -> anyhow::Result<Restored> {
    let (path, pki) = (dir.join(founding::FILE), dir.join("pki"));
    let unfinished = dir.join(remains::UNFINISHED);
    ensure!(
        !path.exists(),
        "there is a cluster in {} already: move the directory away, or restore into another with --state-dir",
        dir.display()
    );
    // What a restore has left that was ended half-way.
    let left = remains::of_restore(dir);
    if !left.is_empty() {
        for file in left {
            fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
        }
        if pki.exists() {
            fs::remove_dir_all(&pki).with_context(|| format!("cannot remove {}", pki.display()))?;
        }
    }
    ensure!(!pki.exists(), "{} is there already: move it away", pki.display());
    let backup = Checked::read(file, incomplete, |_| Ok(()))?;

    founding::make(dir)?;
    let store = RedbStore::open(&unfinished)?;
    let items = backup.fill(&mut |items| store.fill(items))?;
    let clock = Clock::start();
    let revision = go_on(&store, backup.begun.lease_ms, clock)?;
    let epoch = store.epoch().to_owned();
    drop(store);
    Pki::open_shared(&pki, &epoch, &backup.begun.keyring, 0, clock.wall())?;
    fs::rename(&unfinished, &path).with_context(|| format!("cannot make {}", path.display()))?;
    fs::File::open(dir).and_then(|dir| dir.sync_all()).context("cannot sync the state directory")?;
    Ok(Restored { revision, items, epoch, missing: backup.missing() })
}

/// A backup that was read from its beginning to its end, and may be restored.
struct Checked {
    file: PathBuf,
    begun: Begun,
}

impl Checked {
    /// Reads all of it; `look` is shown each item.
    fn read(
        file: &Path,
        incomplete: Incomplete,
        look: impl Fn(&Item) -> Result<(), StoreError>,
    ) -> anyhow::Result<Checked> {
        let begun = read(file, |item, _| Ok(look(&item)?))?;
        if let Some(damage) = &begun.damage {
            check_incomplete(file, damage, incomplete)?;
        }
        Ok(Checked { file: file.to_owned(), begun })
    }

    /// What it lacks, a line each.
    fn missing(&self) -> Vec<String> {
        self.begun.damage.iter().flat_map(Damage::missing).collect()
    }

    /// Puts its items into a store, some at a time; gives how many there are.
    fn fill(&self, put: &mut dyn FnMut(&[Item]) -> Result<(), StoreError>) -> anyhow::Result<u64> {
        let (mut waiting, mut bytes, mut items) = (Vec::new(), 0, 0);
        read(&self.file, |item, len| {
            // A log with gaps would be a damaged one.
            if self.begun.damage.is_some() && matches!(item, Item::Entry(_)) {
                return Ok(());
            }
            (items, bytes) = (items + 1, bytes + len);
            waiting.push(item);
            if waiting.len() == CHUNK || bytes >= CHUNK_BYTES {
                bytes = 0;
                put(&std::mem::take(&mut waiting))?;
            }
            Ok(())
        })?;
        put(&waiting)?;
        Ok(items)
    }
}

/// The state is that of the backup, and nobody knows what came after it: the first revision of the restored store says
/// what follows from that. Gives the last one of the backup. A store without a cluster goes on as it is.
pub(crate) fn go_on(store: &dyn Store, lease_ms: u64, clock: Clock) -> anyhow::Result<u64> {
    let (revision, values) = store.load()?;
    let mut state = State::load(revision, values);
    if state.cluster().is_none() {
        return Ok(revision);
    }
    let (time, mut rng) = (clock.wall(), rand::rng());
    let event = Event::Restored(Mark { revision, time, lease_ms });
    let origin = Origin { changer: "user:root".to_owned(), message: String::new() };
    let context = Context { wall: time, rng: &mut rng, is_watched: &|_| false };
    let mut surroundings = Surroundings { context, lease_runs: &|_| false };
    let events = [(&event, &origin)];
    let outcomes = batch::write(&mut state, &events, &mut surroundings, |revisions| store.commit(revisions))?;
    outcomes.into_iter().try_for_each(|outcome| outcome.map(drop))?;
    Ok(revision)
}

/// Refuses what is not to be taken of a damaged store.
fn check_incomplete(file: &Path, damage: &Damage, incomplete: Incomplete) -> anyhow::Result<()> {
    let name = file.display();
    let missing: Vec<String> = damage.missing().collect();
    let lacks = match missing.is_empty() {
        true => "the history has the newest state of every object that it lacks".to_owned(),
        false => format!("it lacks:\n  {}", missing.join("\n  ")),
    };
    // Without them the prefix would be another, and names of pods would be given a second time.
    for key in [Key::Cluster, Key::Counters] {
        ensure!(
            !damage.may_hide(&key),
            "{name} is of a damaged store and lacks the record `{key}`, without which a cluster cannot go on: restore a backup from before; {lacks}"
        );
    }
    ensure!(
        incomplete == Incomplete::Take,
        "{name} is not a whole backup, it is what could be read of a damaged store: restore one from before, or take what there is, without the history, with --incomplete; {lacks}"
    );
    Ok(())
}

/// Reads a whole backup.
///
/// `each` is given the items and how many bytes they take in the file.
fn read(file: &Path, mut each: impl FnMut(Item, usize) -> anyhow::Result<()>) -> anyhow::Result<Begun> {
    let damaged = || format!("{} is not a whole backup", file.display());
    let opened = fs::File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    let mut reader = BufReader::new(opened);
    let mut format = Vec::new();
    (&mut reader)
        .take(FORMAT_INCOMPLETE.len() as u64)
        .read_until(b'\n', &mut format)
        .with_context(damaged)?;
    let known = format == FORMAT || format == FORMAT_INCOMPLETE;
    ensure!(known, "{}: it does not begin as a backup of this version does", damaged());
    let (Record::Begin { authority, lease_ms, others, damage, .. }, _) =
        record(&mut reader).with_context(damaged)?
    else {
        bail!("{}: it does not say whose it is", damaged());
    };
    let mut count = 0;
    loop {
        match record(&mut reader).with_context(damaged)? {
            (Record::Item(item), len) => each(item, len)?,
            (Record::End { items }, _) if items == count => break,
            _ => bail!("{}: records are missing", damaged()),
        }
        count += 1;
    }
    ensure!(reader.read(&mut [0])? == 0, "{}: there is more behind its end", damaged());
    Ok(Begun { keyring: Keyring { issuing: authority, others }, lease_ms, damage })
}

/// A record and its length.
fn record(reader: &mut impl Read) -> io::Result<(Record, usize)> {
    let mut len = [0; 4];
    reader.read_exact(&mut len)?;
    let len = u32::from_be_bytes(len);
    if len > RECORD_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a record of {len} bytes")));
    }
    let mut bytes = vec![0; len as usize];
    reader.read_exact(&mut bytes)?;
    Ok((codec::decode(&bytes)?, bytes.len()))
}
