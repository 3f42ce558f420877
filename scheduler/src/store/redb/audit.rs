//! What is wrong with a file, and what of it can be told. A good one is told by [`whole`](super::whole), and redb has not
//! opened it yet: redb writes when it opens.
//!
//! Every page has its checksum, every value and every entry of the log reads and is what its key says, the log has no gap,
//! and its last word on an object is the object. What the pages do not give any more is taken from the log where the log
//! has all revisions since then; nothing else is put in the place of what is missing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
};

use hextet_redb_check::{Bytes, Hole, Pages, Table};
use scheduler_core::change::{Key, Revision, Value};
use serde::{Deserialize, de::IgnoredAny};

use super::tables::{FORMAT, FORMAT_OF_PLAIN_JSON};
use crate::store::{Damage, codec, damage::Hidden, salvage::Salvage};

/// The tables of a store.
pub(super) const TABLES: [&str; 4] = ["meta", "current", "log", "addresses"];

/// Looks at the whole file. `None`: it is of another format or was never finished, which the opening tells.
///
/// # Errors
/// The header cannot be read: nothing can be.
pub(super) fn look(bytes: &dyn Bytes) -> Result<Option<Salvage>, String> {
    let pages = Pages::open(bytes)?;
    let mut holes = Vec::new();
    let tables = pages.tables(&mut holes);
    if tables.is_empty() && holes.is_empty() {
        return Ok(None);
    }
    let mut audit = Audit::default();
    pages.flaw().into_iter().for_each(|flaw| audit.damage.add(flaw.to_owned()));
    for table in &tables {
        audit.read(&pages, table, &mut holes);
    }
    let format = audit.meta.get("format");
    if format.is_some_and(|format| format != FORMAT && format != FORMAT_OF_PLAIN_JSON) {
        return Ok(None);
    }
    audit.tell_missing_tables(&tables, &holes);
    Ok(Some(audit.finish(&tables, &holes)))
}

#[derive(Default)]
struct Audit {
    meta: BTreeMap<String, String>,
    values: BTreeMap<Key, Value>,
    /// Those that are there and do not read, with the reason.
    broken: BTreeMap<Key, String>,
    /// Entries of `current`, good or bad.
    current: u64,
    addresses: Vec<(Ipv6Addr, String)>,
    entries: BTreeMap<u64, Vec<u8>>,
    log: Log,
    damage: Damage,
}

/// What the log says.
#[derive(Default)]
struct Log {
    first: Option<u64>,
    last: Option<u64>,
    /// The last revision that is missing between those that are there.
    gap: u64,
    /// What is missing, in words.
    missing: Vec<String>,
    /// The revision that changed an object last.
    said: BTreeMap<Key, u64>,
}

/// A revision without the values that it changed.
#[derive(Deserialize)]
struct Headline {
    revision: u64,
    #[serde(rename = "time")]
    _time: IgnoredAny,
    #[serde(rename = "changer")]
    _changer: IgnoredAny,
    #[serde(rename = "message")]
    _message: IgnoredAny,
    changes: Vec<Changed>,
}

#[derive(Deserialize)]
struct Changed {
    key: Key,
}

impl Audit {
    fn read(&mut self, pages: &Pages<'_>, table: &Table, holes: &mut Vec<Hole>) {
        match table.name.as_str() {
            "meta" => pages.entries(table, holes, &mut |key, text| {
                let owned = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                self.meta.insert(owned(key), owned(text));
            }),
            "current" => pages.entries(table, holes, &mut |key, value| self.value(key, value)),
            "log" => pages.entries(table, holes, &mut |key, entry| self.entry(key, entry)),
            "addresses" => pages.entries(table, holes, &mut |key, pod| self.address(key, pod)),
            // What redb keeps for itself: without it redb would write over what is in use.
            _ => pages.entries(table, holes, &mut |_, _| {}),
        }
    }

    fn value(&mut self, key: &[u8], value: &[u8]) {
        self.current += 1;
        let text = String::from_utf8_lossy(key);
        let Ok(key) = text.parse::<Key>() else {
            return self.damage.add(format!("current: `{text}` is not the key of anything"));
        };
        match codec::decode::<Value>(value) {
            Ok(value) if value.is_of(&key) => drop(self.values.insert(key, value)),
            Ok(_) => drop(self.broken.insert(key, "its record is another object's".to_owned())),
            Err(error) => drop(self.broken.insert(key, format!("its record does not read ({error})"))),
        }
    }

    fn entry(&mut self, key: &[u8], entry: &[u8]) {
        let Ok(number) = key.try_into().map(u64::from_le_bytes) else {
            return self.damage.add("log: a key is not a number".to_owned());
        };
        match codec::decode::<Headline>(entry) {
            Ok(revision) if revision.revision == number => {
                self.log.add(revision);
                self.entries.insert(number, entry.to_vec());
            }
            Ok(other) => {
                self.damage.add(format!("log: revision {number} says that it is {}", other.revision))
            }
            Err(error) => self.damage.add(format!("log: revision {number} does not read ({error})")),
        }
    }

    fn address(&mut self, key: &[u8], pod: &[u8]) {
        if let Ok(bits) = key.try_into().map(u128::from_le_bytes) {
            self.addresses.push((Ipv6Addr::from_bits(bits), String::from_utf8_lossy(pod).into_owned()));
        }
    }

    fn tell_missing_tables(&mut self, tables: &[Table], holes: &[Hole]) {
        for name in TABLES {
            let is_there = tables.iter().any(|table| table.name == name);
            if !is_there && !has_hole(holes, name) {
                self.damage.add(format!("{name}: the table is not there"));
            }
        }
    }

    fn finish(mut self, tables: &[Table], holes: &[Hole]) -> Salvage {
        for hole in holes {
            let is_of_objects = hole.table.as_deref() == Some("current");
            let add = if is_of_objects { Damage::add_at_objects } else { Damage::add };
            add(&mut self.damage, hole_text(hole));
        }
        let of = |name: &str| tables.iter().find(|table| table.name == name);
        let is_whole = |name: &str| of(name).is_some() && !has_hole(holes, name);
        let revision = self.last_revision(is_whole("log"));
        let is_current_whole = is_whole("current");
        let found = self.compare(is_current_whole);
        let lost = of("current").map(|table| table.len.saturating_sub(self.current));
        if !is_current_whole && lost.is_none_or(|lost| lost > found) {
            self.damage.set_hidden(hidden(of("current").is_some(), holes));
        }
        // The log has no gap when it is good, and always ends with the last revision.
        let oldest = of("log").map_or(1, |table| (revision + 1).saturating_sub(table.len));
        let (addresses, log) = (self.addresses, self.entries);
        let epoch = self.meta.remove("epoch");
        Salvage { epoch, revision, oldest, values: self.values, addresses, log, damage: self.damage }
    }

    /// The number of the last revision; the log has a gap up to it unless it is there.
    fn last_revision(&mut self, is_log_whole: bool) -> u64 {
        let last = self.log.last.unwrap_or_default();
        let said = self.said_revision();
        match said {
            Some(said) if said < last => {
                self.damage.add(format!("meta: the last revision is said to be {said}, and {last} is there"));
            }
            Some(said) if said > last && self.log.last.is_some() => self.log.miss(last + 1, said),
            // All of the log may be compacted.
            Some(said) if said > last && !is_log_whole => self.log.gap = said,
            None if !is_log_whole => self.log.gap = u64::MAX,
            _ => {}
        }
        std::mem::take(&mut self.log.missing).into_iter().for_each(|text| self.damage.add(text));
        said.unwrap_or(last).max(last)
    }

    /// What the file says that the last revision is.
    fn said_revision(&mut self) -> Option<u64> {
        let said = self.meta.get("revision").and_then(|text| text.parse::<u64>().ok());
        if said.is_none() {
            self.damage.add("meta: the number of the last revision cannot be read".to_owned());
        }
        said
    }

    /// Compares the objects with the last word of the log, and takes what is lost from it; gives how many of the lost
    /// ones are known by name.
    fn compare(&mut self, is_whole: bool) -> u64 {
        let mut named = 0;
        let mut told = BTreeSet::new();
        for (key, number, said) in self.last_words() {
            told.insert(key.clone());
            let (is_last, is_broken) = (number > self.log.gap, self.broken.contains_key(&key));
            let here = self.values.get(&key);
            if here == said.as_ref() && !is_broken {
                continue;
            }
            let lost = here.is_none() && !is_whole && !is_broken;
            match said {
                Some(value) if is_last && (lost || is_broken) => {
                    let why = self.broken.remove(&key).unwrap_or_else(|| "its record is lost".to_owned());
                    self.damage
                        .add_at_objects(format!("current: {key}: {why}; shown as revision {number} has it"));
                    self.values.insert(key, value);
                    named += u64::from(lost);
                }
                Some(_) if lost => {
                    named += 1;
                    self.lose(
                        key,
                        format!(
                            "its record is lost; revision {number} is the last that is known to change it"
                        ),
                    );
                }
                _ if is_last && !is_broken => {
                    self.lose(
                        key,
                        format!("its record is not what revision {number}, the last that changed it, says"),
                    );
                }
                _ => {}
            }
        }
        for (key, why) in std::mem::take(&mut self.broken) {
            self.lose(key, why);
        }
        if self.log.first == Some(1) && self.log.gap == 0 {
            let unheard: Vec<Key> = self.values.keys().filter(|key| !told.contains(*key)).cloned().collect();
            unheard.into_iter().for_each(|key| self.lose(key, "no revision has made it".to_owned()));
        }
        named
    }

    /// What the log says last of each object, and in which revision.
    fn last_words(&mut self) -> Vec<(Key, u64, Option<Value>)> {
        let mut by_revision: BTreeMap<u64, BTreeSet<Key>> = BTreeMap::new();
        for (key, number) in std::mem::take(&mut self.log.said) {
            by_revision.entry(number).or_default().insert(key);
        }
        let mut words = Vec::new();
        for (number, keys) in by_revision {
            let read = self.entries.get(&number).map(|entry| codec::decode::<Revision>(entry));
            match read {
                Some(Ok(revision)) => {
                    let last = revision.changes.into_iter().filter(|change| keys.contains(&change.key));
                    words.extend(last.map(|change| (change.key, number, change.new)));
                }
                Some(Err(error)) => {
                    self.log.gap = self.log.gap.max(number);
                    self.entries.remove(&number);
                    self.damage.add(format!("log: revision {number} does not read ({error})"));
                }
                None => {}
            }
        }
        words
    }

    fn lose(&mut self, key: Key, why: String) {
        self.values.remove(&key);
        self.damage.add_at_objects(format!("current: {key}: {why}"));
        self.damage.add_unreadable(key, why);
    }
}

impl Log {
    fn add(&mut self, revision: Headline) {
        let number = revision.revision;
        match self.last {
            Some(last) if number != last + 1 => self.miss(last + 1, number - 1),
            _ => {}
        }
        self.first.get_or_insert(number);
        self.last = Some(number);
        for change in revision.changes {
            self.said.insert(change.key, number);
        }
    }

    fn miss(&mut self, from: u64, to: u64) {
        self.gap = to;
        self.missing.push(if from == to {
            format!("log: revision {from} is missing")
        } else {
            format!("log: revisions {from} to {to} are missing")
        });
    }
}

fn has_hole(holes: &[Hole], table: &str) -> bool {
    holes.iter().any(|hole| hole.table.as_deref() == Some(table))
}

fn hole_text(hole: &Hole) -> String {
    hole.text(|key| match hole.table.as_deref() {
        Some("log") => {
            key.try_into().map_or_else(|_| "?".to_owned(), |key| u64::from_le_bytes(key).to_string())
        }
        Some("addresses") => key
            .try_into()
            .map_or_else(|_| "?".to_owned(), |key| Ipv6Addr::from_bits(u128::from_le_bytes(key)).to_string()),
        Some("current" | "meta") => format!("`{}`", String::from_utf8_lossy(key)),
        _ => format!("{key:02x?}"),
    })
}

/// Between which keys objects are lost.
fn hidden(is_table: bool, holes: &[Hole]) -> Vec<Hidden> {
    if !is_table {
        return vec![Hidden { after: None, up_to: None }];
    }
    let text = |key: &Option<Vec<u8>>| key.as_ref().map(|key| String::from_utf8_lossy(key).into_owned());
    let of_current = holes.iter().filter(|hole| hole.table.as_deref() == Some("current"));
    of_current.map(|hole| Hidden { after: text(&hole.after), up_to: text(&hole.up_to) }).collect()
}
