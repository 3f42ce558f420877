//! What happens before redb opens a file: redb writes when it does, and a damaged file is not to be touched.

use std::{
    fs, io,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hextet_redb_check::{Bytes, Overlay, hold};
use redb::{Database, DatabaseError};
use tracing::info;

use super::{
    CACHE_BYTES, RedbStore, Store as _, StoreError, audit, guarded,
    whole::{self, Whole},
};
use crate::store::salvage::Salvage;

/// How often it is said how far a file is read.
const TELL: Duration = Duration::from_secs(2);

/// What came of opening a file that is there.
pub(super) enum Opening {
    Whole(RedbStore),
    /// What can be read of it, and the file, held.
    Damaged(Salvage, fs::File),
}

/// What came of looking at a file.
pub(super) enum Looked {
    Whole(Whole),
    /// It holds nothing yet, or is of another format: the opening tells.
    Other,
    Damaged(Salvage, fs::File),
}

/// Looks at a file without changing it, while no server has it.
pub(super) fn look(path: &Path) -> Result<Looked, StoreError> {
    let failed = |source| StoreError::Open { path: path.to_owned(), source };
    let damaged = |what| StoreError::Damaged { path: path.to_owned(), what };
    let file = hold(path).map_err(failed)?.ok_or_else(|| StoreError::InUse(path.to_owned()))?;
    let refused = match whole::read(&Watched::new(&file, path)) {
        Some(whole) => match try_to_open(path, Some(&whole))? {
            None => return Ok(Looked::Whole(whole)),
            refused => refused,
        },
        None => None,
    };
    let Some(mut found) = audit::look(&file).map_err(damaged)? else { return Ok(Looked::Other) };
    let refused =
        if found.damage.count() == 0 && refused.is_none() { try_to_open(path, None)? } else { refused };
    if found.damage.count() == 0 && refused.is_none() {
        return Ok(Looked::Other);
    }
    refused.into_iter().for_each(|why| found.damage.add(format!("redb does not take the file: {why}")));
    Ok(Looked::Damaged(found, file))
}

/// What redb finds wrong with a file whose pages are good. It opens a copy that it may change.
fn try_to_open(path: &Path, whole: Option<&Whole>) -> Result<Option<String>, StoreError> {
    let overlay = fs::File::open(path).and_then(Overlay::new);
    let overlay = overlay.map_err(|source| StoreError::Open { path: path.to_owned(), source })?;
    let overlay = Mutex::new(Some(overlay));
    let opener = move || {
        let overlay = overlay.lock().unwrap_or_else(PoisonError::into_inner).take();
        let overlay = overlay.ok_or(DatabaseError::DatabaseAlreadyOpen)?;
        Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(overlay)
    };
    let tried = guarded(path, || {
        let store = RedbStore::with_opener(path, opener)?;
        match whole {
            Some(whole) => store.agrees(whole),
            None => store.load().map(drop),
        }
    });
    match tried {
        Err(StoreError::Damaged { what, .. }) => Ok(Some(what)),
        _ => Ok(None),
    }
}

/// A file of which somebody waits for the end: says how far it is read when that takes long.
struct Watched<'a> {
    file: &'a fs::File,
    path: &'a Path,
    read: AtomicU64,
    told: Mutex<Instant>,
}

impl<'a> Watched<'a> {
    fn new(file: &'a fs::File, path: &'a Path) -> Watched<'a> {
        Watched { file, path, read: AtomicU64::new(0), told: Mutex::new(Instant::now()) }
    }
}

impl Bytes for Watched<'_> {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let read = self.read.fetch_add(out.len() as u64, Ordering::Relaxed);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.elapsed() >= TELL {
            *told = Instant::now();
            let [read_mib, of_mib] = [read, self.len()?].map(|bytes| bytes >> 20);
            info!(store = %self.path.display(), read_mib, of_mib, "the store is read and checked before it is opened");
        }
        self.file.read(offset, out)
    }
}
