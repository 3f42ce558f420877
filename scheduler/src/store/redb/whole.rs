//! Is a file whole? It is read once, by as many threads as there are processors, and its values come with the answer.
//!
//! What is asked of it is what [`audit`](super::audit) asks: every page has its checksum, every value and every entry of
//! the log reads and is what its key says, the log has no gap, and its last word on an object is the object. Here the
//! answer is yes or no: what is wrong with a file, and what of it can be told, only the audit says.
//!
//! The log's last word is compared with the object without reading either as more than text: both were written from one
//! value, and so are the same text. Where they are not, the audit decides.

use std::collections::{BTreeMap, HashMap};

use hextet_redb_check::{Bytes, Hole, Pages, Table};
use scheduler_core::change::{Key, Value};
use serde::Deserialize;
use serde_json::value::RawValue;
use twox_hash::XxHash3_128;

use super::{
    about::{self, About},
    audit::TABLES,
    tables::{FORMAT, FORMAT_OF_PLAIN_JSON},
};
use crate::store::codec::{self, Decoder};
use threads::{Batch, in_threads};

mod threads;

/// What a whole file holds.
pub(super) struct Whole {
    pub(super) revision: u64,
    pub(super) values: Vec<(Key, Value)>,
    /// How many entries each table has.
    pub(super) lens: BTreeMap<String, u64>,
    /// Which revisions are about which object.
    pub(super) about: About,
}

/// Reads all of it. `None`: something is wrong with it, or it is of another format, or was never finished.
pub(super) fn read(bytes: &(dyn Bytes + Sync)) -> Option<Whole> {
    let pages = Pages::open(bytes).ok().filter(|pages| pages.flaw().is_none())?;
    let mut holes = Vec::new();
    let tables = pages.tables(&mut holes);
    let of = |name: &str| tables.iter().find(|table| table.name == name);
    let is_complete = TABLES.iter().all(|name| of(name).is_some()) && holes.is_empty();
    let reader = Reader { pages: &pages, holes: is_complete.then_some(holes)? };
    reader.read(of("current")?, of("log")?, of("meta")?, &tables)
}

struct Reader<'a> {
    pages: &'a Pages<'a>,
    holes: Vec<Hole>,
}

/// A value, and what its text and its key's come to.
struct Found {
    key: Key,
    value: Value,
    name: u128,
    text: u128,
}

/// An entry of the log: what each key that it changes comes to, and the new value's text.
struct Said {
    revision: u64,
    changes: Vec<(u128, Option<u128>)>,
    /// Those of the keys that [`About`] knows.
    names: Vec<u128>,
}

/// What is read of a revision.
#[derive(Deserialize)]
struct Headline<'a> {
    revision: u64,
    #[serde(borrow)]
    changes: Vec<Changed<'a>>,
}

#[derive(Deserialize)]
struct Changed<'a> {
    key: &'a str,
    #[serde(borrow, default)]
    new: Option<&'a RawValue>,
}

impl Reader<'_> {
    fn read(mut self, current: &Table, log: &Table, meta: &Table, tables: &[Table]) -> Option<Whole> {
        let mut texts = BTreeMap::new();
        self.pages.entries(meta, &mut self.holes, &mut |key, text| {
            texts.insert(key.to_vec(), String::from_utf8_lossy(text).into_owned());
        });
        let format = texts.get("format".as_bytes())?;
        let revision = texts.get("revision".as_bytes())?.parse().ok()?;
        if format != FORMAT && format != FORMAT_OF_PLAIN_JSON {
            return None;
        }
        for table in tables.iter().filter(|table| !["meta", "current", "log"].contains(&table.name.as_str()))
        {
            self.pages.entries(table, &mut self.holes, &mut |_, _| {});
        }
        let found = self.table(current, value)?;
        let said = self.table(log, entry)?;
        let agrees = follows(&said, revision) && agrees(&found, &said);
        let values = || found.into_iter().map(|found| (found.key, found.value)).collect();
        let lens = || tables.iter().map(|table| (table.name.clone(), table.len)).collect();
        let about = || {
            let mut about = About::default();
            said.iter().for_each(|said| about.add_names(said.revision, said.names.iter().copied()));
            about
        };
        agrees.then(|| Whole { revision, about: about(), values: values(), lens: lens() })
    }

    /// Reads the entries of a table, and gives what they are in order.
    fn table<R: Send>(
        &mut self,
        table: &Table,
        read: impl Fn(&mut Decoder, &[u8], &[u8]) -> Option<R> + Sync,
    ) -> Option<Vec<R>> {
        let (pages, holes) = (self.pages, &mut self.holes);
        let all = in_threads(
            |batches| pages.entries(table, holes, &mut |key, value| batches.push(key, value)),
            |batch: &Batch| {
                let mut decoder = Decoder::new();
                batch.entries().map(|(key, value)| read(&mut decoder, key, value)).collect::<Option<Vec<R>>>()
            },
        )?;
        let is_all = self.holes.is_empty() && all.len() as u64 == table.len;
        is_all.then_some(all)
    }
}

fn value(decoder: &mut Decoder, name: &[u8], value: &[u8]) -> Option<Found> {
    let json = decoder.json(value).ok()?;
    let key: Key = std::str::from_utf8(name).ok()?.parse().ok()?;
    let value: Value = codec::parse(json).ok()?;
    let (name, text) = (XxHash3_128::oneshot(name), XxHash3_128::oneshot(json));
    value.is_of(&key).then_some(Found { key, value, name, text })
}

fn entry(decoder: &mut Decoder, number: &[u8], entry: &[u8]) -> Option<Said> {
    let headline: Headline<'_> = codec::parse(decoder.json(entry).ok()?).ok()?;
    let revision = u64::from_le_bytes(number.try_into().ok()?);
    let text = |value: &RawValue| XxHash3_128::oneshot(value.get().as_bytes());
    let change = |change: &Changed<'_>| (about::name(change.key), change.new.map(text));
    let changes = headline.changes.iter().map(change).collect();
    let known = headline.changes.iter().filter(|change| about::knows(change.key));
    let names = known.map(|change| about::name(change.key)).collect();
    (headline.revision == revision).then_some(Said { revision, changes, names })
}

/// The log has no gap and ends with the last revision, unless all of it was compacted.
fn follows(log: &[Said], last: u64) -> bool {
    log.windows(2).all(|pair| pair[0].revision + 1 == pair[1].revision)
        && log.last().is_none_or(|said| said.revision == last)
}

/// The last word on each object is what is there; a log that was never compacted has a word on every object.
fn agrees(found: &[Found], log: &[Said]) -> bool {
    // None: the last word on it was heard.
    let mut open: HashMap<u128, Option<u128>> =
        found.iter().map(|found| (found.name, Some(found.text))).collect();
    let mut unheard = found.len();
    for (name, said) in log.iter().rev().flat_map(|said| &said.changes) {
        match (open.insert(*name, None), said) {
            (Some(Some(text)), Some(said)) if text == *said => unheard -= 1,
            (Some(None), _) | (None, None) => {}
            _ => return false,
        }
    }
    unheard == 0 || log.first().is_none_or(|said| said.revision != 1)
}
