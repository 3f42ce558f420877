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
    os::unix::fs::OpenOptionsExt as _,
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
    pki::{Authority, Pki},
    remains,
    store::{Damage, Item, RedbStore, Store, StoreError, codec},
};

const FORMAT: &[u8] = b"hextet-backup-1\n";
/// Of a damaged store.
const FORMAT_INCOMPLETE: &[u8] = b"hextet-backup-1-incomplete\n";
/// A record is one value or one revision, compressed.
const RECORD_BYTES_MAX: u32 = 1 << 28;
/// Records that are written to a store at a time.
const CHUNK: usize = 1000;

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
    authority: Authority,
    lease_ms: u64,
    damage: Option<Damage>,
}

/// Gives the bytes of a backup in order, while commits go on. `lease` is how long leases are that the server grants.
///
/// # Errors
/// The store cannot be read, or `sink` has failed.
pub(crate) fn write(
    store: &dyn Store,
    authority: Authority,
    lease: Duration,
    sink: &mut dyn FnMut(Vec<u8>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let damage = store.damage().map(|damage| damage.as_ref().clone());
    sink(if damage.is_some() { FORMAT_INCOMPLETE } else { FORMAT }.to_vec())?;
    let (epoch, lease_ms) = (store.epoch().to_owned(), u64::try_from(lease.as_millis()).unwrap_or(u64::MAX));
    sink(framed(&Record::Begin { epoch, authority, lease_ms, damage }))?;
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
    founding::make(dir)?;
    let (path, pki) = (dir.join(founding::FILE), dir.join("pki"));
    let unfinished = dir.join(remains::UNFINISHED);
    ensure!(
        !path.exists(),
        "there is a cluster in {} already: move the directory away, or restore into another with --state-dir",
        dir.display()
    );
    // What a restore has left that was ended half-way.
    if unfinished.exists() {
        fs::remove_file(&unfinished).with_context(|| format!("cannot remove {}", unfinished.display()))?;
        if pki.exists() {
            fs::remove_dir_all(&pki).with_context(|| format!("cannot remove {}", pki.display()))?;
        }
    }
    ensure!(!pki.exists(), "{} is there already: move it away", pki.display());
    let missing = read(file, |_| Ok(()))?.damage;
    let missing = missing.map_or(Ok(Vec::new()), |damage| check_incomplete(file, &damage, incomplete))?;

    let store = RedbStore::open(&unfinished)?;
    let mut waiting = Vec::new();
    let mut items = 0;
    let Begun { authority, lease_ms, .. } = read(file, |item| {
        // A log with gaps would be a damaged one.
        if !missing.is_empty() && matches!(item, Item::Entry(_)) {
            return Ok(());
        }
        items += 1;
        waiting.push(item);
        if waiting.len() == CHUNK {
            store.fill(&std::mem::take(&mut waiting))?;
        }
        Ok(())
    })?;
    store.fill(&waiting)?;
    let clock = Clock::start();
    let revision = go_on(&store, lease_ms, clock)?;
    let epoch = store.epoch().to_owned();
    drop(store);
    Pki::open_shared(&pki, &epoch, &authority, clock.wall())?;
    fs::rename(&unfinished, &path).with_context(|| format!("cannot make {}", path.display()))?;
    fs::File::open(dir).and_then(|dir| dir.sync_all()).context("cannot sync the state directory")?;
    Ok(Restored { revision, items, epoch, missing })
}

/// The state is that of the backup, and nobody knows what came after it: the first revision of the restored store says
/// what follows from that. Gives the last one of the backup.
fn go_on(store: &dyn Store, lease_ms: u64, clock: Clock) -> anyhow::Result<u64> {
    let (revision, values) = store.load()?;
    let mut state = State::load(revision, values);
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

/// What the backup of a damaged store lacks, if it may be taken.
fn check_incomplete(file: &Path, damage: &Damage, incomplete: Incomplete) -> anyhow::Result<Vec<String>> {
    let missing: Vec<String> = damage.lines().collect();
    let (name, list) = (file.display(), missing.join("\n  "));
    // Without them the prefix would be another, and names of pods would be given a second time.
    for key in [Key::Cluster, Key::Counters] {
        ensure!(
            !damage.may_hide(&key),
            "{name} is of a damaged store and lacks the record `{key}`, without which a cluster cannot go on: restore a backup from before; it lacks:\n  {list}"
        );
    }
    ensure!(
        incomplete == Incomplete::Take,
        "{name} is not a whole backup, it is what could be read of a damaged store: restore one from before, or take what there is, without the history, with --incomplete; it lacks:\n  {list}"
    );
    Ok(missing)
}

/// Reads a whole backup.
fn read(file: &Path, mut each: impl FnMut(Item) -> anyhow::Result<()>) -> anyhow::Result<Begun> {
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
    let Record::Begin { authority, lease_ms, damage, .. } = record(&mut reader).with_context(damaged)? else {
        bail!("{}: it does not say whose it is", damaged());
    };
    let mut count = 0;
    loop {
        match record(&mut reader).with_context(damaged)? {
            Record::Item(item) => each(item)?,
            Record::End { items } if items == count => break,
            _ => bail!("{}: records are missing", damaged()),
        }
        count += 1;
    }
    ensure!(reader.read(&mut [0])? == 0, "{}: there is more behind its end", damaged());
    Ok(Begun { authority, lease_ms, damage })
}

fn record(reader: &mut impl Read) -> io::Result<Record> {
    let mut len = [0; 4];
    reader.read_exact(&mut len)?;
    let len = u32::from_be_bytes(len);
    if len > RECORD_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a record of {len} bytes")));
    }
    let mut bytes = vec![0; len as usize];
    reader.read_exact(&mut bytes)?;
    codec::decode(&bytes)
}

/// A file that gets its name when all of it is on the disk, and only if nothing has that name.
pub struct NewFile {
    path: PathBuf,
    unfinished: PathBuf,
    file: fs::File,
}

impl NewFile {
    /// Begins the file, for its owner alone.
    ///
    /// # Errors
    /// Something has that name, or it cannot be written.
    pub fn create(path: &Path) -> anyhow::Result<NewFile> {
        ensure!(!path.exists(), "{} is there already: give another name", path.display());
        let mut name = path.file_name().context("give the name of a file")?.to_owned();
        name.push(".unfinished");
        let unfinished = path.with_file_name(name);
        let file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished);
        let file = file.with_context(|| format!("cannot write {}", unfinished.display()))?;
        Ok(NewFile { path: path.to_owned(), unfinished, file })
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::Write::write_all(&mut self.file, bytes)
    }

    /// Syncs it and gives it its name.
    ///
    /// # Errors
    /// The disk failed, or something has that name by now.
    pub fn finish(self) -> anyhow::Result<()> {
        self.file.sync_all().with_context(|| format!("cannot sync {}", self.unfinished.display()))?;
        // Unlike a rename, a link never replaces.
        fs::hard_link(&self.unfinished, &self.path)
            .with_context(|| format!("cannot make {}", self.path.display()))?;
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        fs::File::open(parent.unwrap_or(Path::new("."))).and_then(|dir| dir.sync_all())?;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // Under its own name the file stays, if it has got one.
        let _ = fs::remove_file(&self.unfinished);
    }
}
