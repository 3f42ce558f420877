//! A damaged store gives way to one that holds no more than who the node is.
//!
//! Only for a node of which nothing runs any more: what was to run here is not in the new store, and an agent that knew of no
//! pods would end those that it finds.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use super::{Found, IDENTITY, SETTINGS, StoreError, make, open_failed};

/// Where a damaged store is kept, for people to look at; one that is there already gives way.
pub(crate) fn path_of(store: &Path) -> PathBuf {
    store.with_extension("redb.damaged")
}

/// Keeps the damaged file under another name. Where the identity can be read a store takes its place that holds that and how
/// the agent was started last; or else none does. An end half-way leaves the damaged store where it was.
pub(crate) fn set_aside(path: &Path, found: &Found) -> Result<(), StoreError> {
    let failed = |error: io::Error| open_failed(path, error.into());
    let aside = path_of(path);
    let Some(identity) = &found.identity else {
        return fs::rename(path, &aside).and_then(|()| sync_folder(path)).map_err(failed);
    };
    let new = make(path, |tables| {
        tables.set_meta(IDENTITY, identity)?;
        found.settings.iter().try_for_each(|settings| tables.set_meta(SETTINGS, settings))
    })?;
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    fs::hard_link(path, &aside).map_err(failed)?;
    fs::rename(&new, path).and_then(|()| sync_folder(path)).map_err(failed)
}

/// Makes what was done to names in the store's folder durable.
pub(super) fn sync_folder(store: &Path) -> io::Result<()> {
    store.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}
