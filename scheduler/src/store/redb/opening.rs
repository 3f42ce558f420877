//! What happens before redb opens a file: redb writes when it does, and a damaged file is not to be touched.

use std::{
    fs,
    path::Path,
    sync::{Mutex, PoisonError},
};

use redb::{Database, DatabaseError};

use super::{CACHE_BYTES, RedbStore, Store as _, StoreError, audit, guarded, overlay::Overlay};
use crate::store::salvage::Salvage;

/// What came of opening a file that is there.
pub(super) enum Opening {
    Whole(RedbStore),
    /// What can be read of it, and the file, held.
    Damaged(Salvage, fs::File),
}

/// Looks at a file without changing it, while no server has it. `None`: it is good, or of another format.
pub(super) fn find_damage(path: &Path) -> Result<Option<(Salvage, fs::File)>, StoreError> {
    let failed = |source| StoreError::Open { path: path.to_owned(), source };
    let damaged = |what| StoreError::Damaged { path: path.to_owned(), what };
    let file = fs::File::open(path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Err(StoreError::InUse(path.to_owned())),
        Err(fs::TryLockError::Error(source)) => return Err(failed(source)),
    }
    let Some(mut found) = audit::look(&file, false).map_err(damaged)? else { return Ok(None) };
    let refused = if found.damage.count() == 0 { try_to_open(path)? } else { None };
    if found.damage.count() == 0 && refused.is_none() {
        return Ok(None);
    }
    if let Some(again) = audit::look(&file, true).map_err(damaged)? {
        found = again;
    }
    refused.into_iter().for_each(|why| found.damage.add(format!("redb does not take the file: {why}")));
    Ok(Some((found, file)))
}

/// What redb finds wrong with a file whose pages are good. It opens a copy that it may change.
fn try_to_open(path: &Path) -> Result<Option<String>, StoreError> {
    let overlay = fs::File::open(path).and_then(Overlay::new);
    let overlay = overlay.map_err(|source| StoreError::Open { path: path.to_owned(), source })?;
    let overlay = Mutex::new(Some(overlay));
    let opener = move || {
        let overlay = overlay.lock().unwrap_or_else(PoisonError::into_inner).take();
        let overlay = overlay.ok_or(DatabaseError::DatabaseAlreadyOpen)?;
        Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(overlay)
    };
    let tried = guarded(path, || RedbStore::with_opener(path, opener)?.load().map(drop));
    match tried {
        Err(StoreError::Damaged { what, .. }) => Ok(Some(what)),
        _ => Ok(None),
    }
}
