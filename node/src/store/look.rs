//! What a store's file holds, read without opening it: redb writes when it opens a file, and a damaged one is not to be
//! touched.
//!
//! A page counts if it has its checksum, an entry if it reads, and all of it if redb, on a copy, shows the same and can write.
//! What passes is what was committed last; nothing is put in the place of the rest.

use std::{collections::BTreeMap, fs::File, io, path::Path};

use hextet_redb_check::{Overlay, Pages, guarded, hold};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableHandle as _};
use serde::de::DeserializeOwned;

use super::{
    HEAD, IDENTITY, JOINING, Joining, META, PEERS, PODS, SETTINGS, Settings, StoreError, builder,
    open_failed, try_write,
};
use crate::{
    assignment::{Head, Peer, PodRecord},
    identity::Identity,
};

/// Flaws that are told one by one.
const FLAWS_MAX: usize = 20;

/// What can be read of a store.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) identity: Option<Identity>,
    pub(crate) settings: Option<Settings>,
    /// What is wrong with the file, a line each; none when it is whole.
    pub(crate) flaws: Vec<String>,
    /// How many more flaws there are.
    more: usize,
}

type Entries = BTreeMap<String, Vec<u8>>;
/// The store's tables that are there, with those of their entries that can be read.
type Tables = BTreeMap<String, Entries>;

/// Looks at the file, which nobody may have open.
///
/// # Errors
/// [`StoreError::InUse`], and [`StoreError::Open`] when there is no file that can be read.
pub(crate) fn look(path: &Path) -> Result<Found, StoreError> {
    let failed = |error: io::Error| open_failed(path, error.into());
    let file = hold(path).map_err(failed)?.ok_or_else(|| StoreError::InUse { path: path.to_owned() })?;
    let mut found = Found::default();
    if file.metadata().map_err(failed)?.len() == 0 {
        found.flaw("it has no bytes".to_owned());
        return Ok(found);
    }
    match Pages::open(&file) {
        Ok(pages) => {
            pages.flaw().into_iter().for_each(|flaw| found.flaw(flaw.to_owned()));
            let tables = found.read(&pages);
            if found.is_whole()
                && let Err(why) = redb_shows(&file, &tables)
            {
                found.flaw(format!("redb does not take the file: {why}"));
            }
        }
        Err(why) => found.flaw(why),
    }
    Ok(found)
}

impl Found {
    pub(crate) fn is_whole(&self) -> bool {
        self.flaws.is_empty()
    }

    /// What is wrong with the file, a line each.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let more = (self.more > 0).then(|| format!("and {} more", self.more));
        self.flaws.iter().cloned().chain(more)
    }

    fn flaw(&mut self, flaw: String) {
        if self.flaws.len() < FLAWS_MAX { self.flaws.push(flaw) } else { self.more += 1 }
    }

    fn read(&mut self, pages: &Pages<'_>) -> Tables {
        let tables = self.tables(pages);
        let meta = tables.get(META.name()).cloned().unwrap_or_default();
        self.identity = self.entry(&meta, IDENTITY);
        self.settings = self.entry(&meta, SETTINGS);
        self.entry::<Joining>(&meta, JOINING);
        self.entry::<Head>(&meta, HEAD);
        self.all::<Peer>(&tables, PEERS);
        self.all::<PodRecord>(&tables, PODS);
        tables
    }

    /// Reads every page of every table, also of those that redb keeps for itself: without them it would write over what is
    /// in use.
    fn tables(&mut self, pages: &Pages<'_>) -> Tables {
        let (mut holes, mut tables) = (Vec::new(), Tables::new());
        for table in pages.tables(&mut holes) {
            let mut entries = Entries::new();
            let is_ours = names().contains(&table.name);
            pages.entries(&table, &mut holes, &mut |key, value| {
                if is_ours {
                    entries.insert(String::from_utf8_lossy(key).into_owned(), value.to_vec());
                }
            });
            if is_ours {
                tables.insert(table.name, entries);
            }
        }
        holes.iter().for_each(|hole| {
            self.flaw(hole.text(|key| format!("`{}`", String::from_utf8_lossy(key))));
        });
        // One that was just made has none.
        let is_begun = !tables.is_empty();
        let is_whole = holes.is_empty();
        names().iter().filter(|name| is_begun && is_whole && !tables.contains_key(*name)).for_each(|name| {
            self.flaw(format!("{name}: the table is not there"));
        });
        tables
    }

    fn entry<Value: DeserializeOwned>(&mut self, meta: &Entries, key: &str) -> Option<Value> {
        meta.get(key).and_then(|text| self.parse(META.name(), key, text))
    }

    fn all<Value: DeserializeOwned>(&mut self, tables: &Tables, table: super::Table) {
        for (key, text) in tables.get(table.name()).into_iter().flatten() {
            self.parse::<Value>(table.name(), key, text);
        }
    }

    fn parse<Value: DeserializeOwned>(&mut self, table: &str, key: &str, text: &[u8]) -> Option<Value> {
        match serde_json::from_slice(text) {
            Ok(value) => Some(value),
            Err(error) => {
                self.flaw(format!("{table}: the entry of `{key}` does not read ({error})"));
                None
            }
        }
    }
}

fn names() -> [String; 3] {
    [META, PEERS, PODS].map(|table| table.name().to_owned())
}

/// Whether redb shows the same, and can write: it opens a copy of the file that it may change.
fn redb_shows(file: &File, tables: &Tables) -> Result<(), String> {
    let overlay = file.try_clone().and_then(Overlay::new).map_err(|error| error.to_string())?;
    let shown = guarded(|| -> Result<Tables, redb::Error> {
        let database = builder().create_with_backend(overlay)?;
        try_write(&database, |_| Ok(()))?;
        let shown = |table: super::Table| Ok((table.name().to_owned(), entries(&database, table)?));
        [META, PEERS, PODS].into_iter().map(shown).collect()
    })?;
    let shown = shown.map_err(|error| error.to_string())?;
    let empty = Entries::new();
    let other = shown.iter().find(|(name, entries)| tables.get(*name).unwrap_or(&empty) != *entries);
    other.map_or(Ok(()), |(name, _)| Err(format!("it shows other {name} than were written last")))
}

fn entries(database: &Database, table: super::Table) -> Result<Entries, redb::Error> {
    let transaction = database.begin_read()?;
    let table = transaction.open_table(table)?;
    let entry = |entry: Result<(redb::AccessGuard<'_, &str>, redb::AccessGuard<'_, &[u8]>), _>| {
        let (key, value) = entry?;
        Ok((key.value().to_owned(), value.value().to_vec()))
    };
    table.iter()?.map(entry).collect()
}
