//! The tables of the file: made, read and written. What an error means is decided a level above.

use std::net::Ipv6Addr;

use redb::{
    Database, Durability, ReadTransaction, ReadableDatabase as _, ReadableTable as _,
    ReadableTableMetadata as _, Table, TableDefinition, TableError, WriteTransaction,
};
use scheduler_core::change::{Change, Revision};

use crate::store::{Item, codec, used_address};

const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
const CURRENT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("current");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const ADDRESSES: TableDefinition<'_, u128, &str> = TableDefinition::new("addresses");

/// Entries and values that begin with other bytes than JSON's are new in it.
pub(super) const FORMAT: &str = "hextet-server-2";
/// Everything in it is plain JSON, and nobody has counted the log. It becomes [`FORMAT`] when it is opened.
pub(super) const FORMAT_OF_PLAIN_JSON: &str = "hextet-server-1";

/// What a file says of itself.
pub(super) struct Meta {
    pub(super) format: String,
    pub(super) epoch: String,
}

/// The revision and the current values, as they are in the file.
pub(super) type Raw = (String, Vec<(String, Vec<u8>)>);

pub(super) fn read_meta(database: &Database) -> Result<Option<Meta>, redb::Error> {
    let txn = database.begin_read()?;
    match txn.open_table(META) {
        Ok(_) => Ok(Some(Meta { format: text(&txn, "format")?, epoch: text(&txn, "epoch")? })),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn make(database: &Database, epoch: &str) -> Result<(), redb::Error> {
    let txn = begin(database)?;
    {
        let mut meta = txn.open_table(META)?;
        for (key, value) in [("format", FORMAT), ("epoch", epoch), ("revision", "0"), ("log_bytes", "0")] {
            meta.insert(key, value)?;
        }
        txn.open_table(CURRENT)?;
        txn.open_table(LOG)?;
        txn.open_table(ADDRESSES)?;
    }
    Ok(txn.commit()?)
}

/// Counts the log once. Its old entries stay as they are: each says how it is to be read.
pub(super) fn upgrade(database: &Database) -> Result<(), redb::Error> {
    let txn = begin(database)?;
    {
        let mut bytes = 0;
        for entry in txn.open_table(LOG)?.iter()? {
            bytes += size(entry?.1.value());
        }
        let mut meta = txn.open_table(META)?;
        meta.insert("log_bytes", bytes.to_string().as_str())?;
        meta.insert("format", FORMAT)?;
    }
    Ok(txn.commit()?)
}

fn begin(database: &Database) -> Result<WriteTransaction, redb::Error> {
    let mut txn = database.begin_write()?;
    txn.set_durability(Durability::Immediate)?;
    // A crash then needs no scan of the file at the next start.
    txn.set_quick_repair(true);
    Ok(txn)
}

/// A text of the `meta` table; empty when it is not there.
pub(super) fn text(txn: &ReadTransaction, key: &str) -> Result<String, redb::Error> {
    Ok(txn.open_table(META)?.get(key)?.map(|text| text.value().to_owned()).unwrap_or_default())
}

pub(super) fn read_current(txn: &ReadTransaction) -> Result<Raw, redb::Error> {
    let mut values = Vec::new();
    for entry in txn.open_table(CURRENT)?.iter()? {
        let (key, value) = entry?;
        values.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok((text(txn, "revision")?, values))
}

/// The revision, and how many entries each large table has.
pub(super) type Shape = (String, [(&'static str, u64); 3]);

pub(super) fn read_shape(txn: &ReadTransaction) -> Result<Shape, redb::Error> {
    let lens = [
        ("current", txn.open_table(CURRENT)?.len()?),
        ("log", txn.open_table(LOG)?.len()?),
        ("addresses", txn.open_table(ADDRESSES)?.len()?),
    ];
    Ok((text(txn, "revision")?, lens))
}

/// Entries of the log by their numbers, as they are in the file.
pub(super) type Entries = Vec<(u64, Vec<u8>)>;

pub(super) fn read_log(txn: &ReadTransaction, after: u64, max: usize) -> Result<Entries, redb::Error> {
    let table = txn.open_table(LOG)?;
    let range = table.range(after.saturating_add(1)..)?.take(max);
    range
        .map(|entry| {
            let (revision, bytes) = entry?;
            Ok((revision.value(), bytes.value().to_vec()))
        })
        .collect()
}

pub(super) fn read_oldest(txn: &ReadTransaction) -> Result<Option<u64>, redb::Error> {
    Ok(txn.open_table(LOG)?.first()?.map(|(revision, _)| revision.value()))
}

/// At most `max` addresses after `after`, each with its first pod.
pub(super) fn read_addresses(
    txn: &ReadTransaction,
    after: Option<Ipv6Addr>,
    max: usize,
) -> Result<Vec<(Ipv6Addr, String)>, redb::Error> {
    let table = txn.open_table(ADDRESSES)?;
    let from = after.map_or(0, |address| address.to_bits().saturating_add(1));
    let range = table.range(from..)?.take(max);
    range
        .map(|entry| {
            let (address, pod) = entry?;
            Ok((Ipv6Addr::from_bits(address.value()), pod.value().to_owned()))
        })
        .collect()
}

/// Gives the first address that a pod had before, if there is one; nothing is written then.
pub(super) fn write(database: &Database, revisions: &[Revision]) -> Result<Option<Ipv6Addr>, redb::Error> {
    let txn = begin(database)?;
    let used = write_tables(&txn, revisions)?;
    if used.is_some() {
        txn.abort()?;
        return Ok(used);
    }
    txn.commit()?;
    Ok(None)
}

fn write_tables(txn: &WriteTransaction, revisions: &[Revision]) -> Result<Option<Ipv6Addr>, redb::Error> {
    let mut current = txn.open_table(CURRENT)?;
    let mut log = txn.open_table(LOG)?;
    let mut addresses = txn.open_table(ADDRESSES)?;
    let mut bytes = 0;
    for revision in revisions {
        let entry = codec::encode(revision);
        log.insert(revision.revision, entry.as_slice())?;
        bytes += size(&entry);
        for change in &revision.changes {
            write_value(&mut current, change)?;
            if let Some((address, pod)) = used_address(change)
                && addresses.insert(address.to_bits(), pod)?.is_some()
            {
                return Ok(Some(address));
            }
        }
    }
    if let Some(last) = revisions.last() {
        let mut meta = txn.open_table(META)?;
        meta.insert("revision", last.revision.to_string().as_str())?;
        count(&mut meta, |before| before + bytes)?;
    }
    Ok(None)
}

/// Puts down what another store held.
pub(super) fn fill(database: &Database, items: &[Item]) -> Result<(), redb::Error> {
    let txn = begin(database)?;
    {
        let (mut meta, mut current) = (txn.open_table(META)?, txn.open_table(CURRENT)?);
        let (mut log, mut addresses) = (txn.open_table(LOG)?, txn.open_table(ADDRESSES)?);
        let mut bytes = 0;
        for item in items {
            match item {
                Item::Last(revision) => drop(meta.insert("revision", revision.to_string().as_str())?),
                Item::Value(key, value) => {
                    drop(current.insert(key.to_string().as_str(), codec::encode(value).as_slice())?);
                }
                Item::Address(address, pod) => drop(addresses.insert(address.to_bits(), pod.as_str())?),
                Item::Entry(revision) => {
                    let entry = codec::encode(revision);
                    bytes += size(&entry);
                    log.insert(revision.revision, entry.as_slice())?;
                }
            }
        }
        count(&mut meta, |before| before + bytes)?;
    }
    Ok(txn.commit()?)
}

fn write_value(current: &mut Table<'_, &str, &[u8]>, change: &Change) -> Result<(), redb::Error> {
    let key = change.key.to_string();
    match &change.new {
        Some(value) => drop(current.insert(key.as_str(), codec::encode(value).as_slice())?),
        None => drop(current.remove(key.as_str())?),
    }
    Ok(())
}

/// Removes at most `max` entries that are older than `before`.
pub(super) fn compact(database: &Database, before: u64, max: usize) -> Result<(), redb::Error> {
    let txn = begin(database)?;
    {
        let (mut bytes, mut log) = (0, txn.open_table(LOG)?);
        for _ in 0..max {
            let Some((revision, entry)) = log.first()?.map(|(key, entry)| (key.value(), size(entry.value())))
            else {
                break;
            };
            if revision >= before {
                break;
            }
            log.remove(revision)?;
            bytes += entry;
        }
        count(&mut txn.open_table(META)?, |before| before.saturating_sub(bytes))?;
    }
    Ok(txn.commit()?)
}

fn count(meta: &mut Table<'_, &str, &str>, change: impl FnOnce(u64) -> u64) -> Result<(), redb::Error> {
    let before = meta.get("log_bytes")?.and_then(|text| text.value().parse().ok()).unwrap_or(0);
    meta.insert("log_bytes", change(before).to_string().as_str())?;
    Ok(())
}

/// An entry with its key and its place in the page.
fn size(entry: &[u8]) -> u64 {
    entry.len() as u64 + 16
}

/// Puts bytes in the place of a value.
#[cfg(test)]
pub(super) fn put(database: &Database, key: &str, value: &[u8]) {
    let txn = begin(database).unwrap();
    txn.open_table(CURRENT).unwrap().insert(key, value).unwrap();
    txn.commit().unwrap();
}

/// Puts bytes in the place of a revision, or takes it away.
#[cfg(test)]
pub(super) fn put_entry(database: &Database, revision: u64, entry: Option<&[u8]>) {
    let txn = begin(database).unwrap();
    {
        let mut log = txn.open_table(LOG).unwrap();
        match entry {
            Some(entry) => drop(log.insert(revision, entry).unwrap()),
            None => drop(log.remove(revision).unwrap()),
        }
    }
    txn.commit().unwrap();
}

/// A file as the first stores made it.
#[cfg(test)]
pub(super) fn make_first_format(path: &std::path::Path, epoch: &str, first: &Revision) {
    let database = Database::create(path).unwrap();
    let txn = begin(&database).unwrap();
    {
        let mut meta = txn.open_table(META).unwrap();
        for (key, value) in [("format", FORMAT_OF_PLAIN_JSON), ("epoch", epoch), ("revision", "1")] {
            meta.insert(key, value).unwrap();
        }
        let entry = serde_json::to_vec(first).unwrap();
        txn.open_table(LOG).unwrap().insert(first.revision, entry.as_slice()).unwrap();
        let (mut current, mut addresses) =
            (txn.open_table(CURRENT).unwrap(), txn.open_table(ADDRESSES).unwrap());
        for change in &first.changes {
            let value = serde_json::to_vec(change.new.as_ref().unwrap()).unwrap();
            current.insert(change.key.to_string().as_str(), value.as_slice()).unwrap();
            let (address, pod) = used_address(change).unwrap();
            addresses.insert(address.to_bits(), pod).unwrap();
        }
    }
    txn.commit().unwrap();
}
