//! Is a redb file what was written? Found out without changing a byte of it, for the server's store and a node's.
//!
//! redb writes when it opens a file, believes most of what it reads, and panics at some kinds of damage. So a file is read
//! here first, each page against its checksum ([`Pages`]); then redb may open a copy that it can write to ([`Overlay`]),
//! where a panic is an answer ([`guarded`]). What the tables mean is their owners' to know.
#![forbid(unsafe_code)]

mod overlay;
mod pages;

use std::{
    fs::{File, TryLockError},
    io,
    panic::{self, AssertUnwindSafe},
    path::Path,
};

pub use overlay::Overlay;
pub use pages::{Bytes, Each, Hole, Pages, Table};

/// Opens a file to look at it, and keeps redb from it for as long as it is held. `None`: somebody has it open.
///
/// # Errors
/// The file cannot be opened.
pub fn hold(path: &Path) -> io::Result<Option<File>> {
    let file = File::open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// redb checks what it reads, yet some kinds of damage make it panic rather than answer.
///
/// # Errors
/// It panicked; in words that can stand for what is wrong with the file.
pub fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(work)).map_err(|_| "its pages do not fit together".to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use redb::{Database, TableDefinition};

    use super::*;

    const TABLE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("things");

    /// Values of up to three pages, in a tree that is three levels deep.
    fn written(path: &Path) -> (Database, BTreeMap<Vec<u8>, Vec<u8>>) {
        let things: BTreeMap<String, Vec<u8>> =
            (0..3000_usize).map(|n| (format!("{n:030}"), vec![n as u8; n * 4 + 1])).collect();
        let database = Database::create(path).unwrap();
        let transaction = database.begin_write().unwrap();
        {
            let mut table = transaction.open_table(TABLE).unwrap();
            for (key, value) in &things {
                table.insert(key.as_str(), value.as_slice()).unwrap();
            }
        }
        transaction.commit().unwrap();
        (database, things.into_iter().map(|(key, value)| (key.into_bytes(), value)).collect())
    }

    #[test]
    fn what_redb_wrote_is_read_and_a_wrong_bit_is_a_hole_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.redb");
        let (database, things) = written(&path);
        drop(database);
        let read = |path: &Path| {
            let file = File::open(path).unwrap();
            let pages = Pages::open(&file).unwrap();
            let (mut holes, mut read) = (Vec::new(), BTreeMap::new());
            let tables = pages.tables(&mut holes);
            let table = tables.iter().find(|table| table.name == "things").unwrap();
            assert_eq!(table.len, things.len() as u64);
            pages.entries(table, &mut holes, &mut |key, value| {
                read.insert(key.to_vec(), value.to_vec());
            });
            (read, holes)
        };
        assert_eq!(read(&path), (things.clone(), Vec::new()));
        let mut bytes = std::fs::read(&path).unwrap();
        let lost = format!("{:030}", 1234).into_bytes();
        let at = bytes.windows(lost.len() + 9).position(|window| window.ends_with(&[210; 9])).unwrap();
        bytes[at + lost.len() + 8] ^= 4;
        std::fs::write(&path, &bytes).unwrap();
        let (found, holes) = read(&path);
        assert!(
            found.iter().all(|(key, value)| things.get(key) == Some(value)) && found.len() < things.len()
        );
        let [hole] = holes.as_slice() else { panic!("{holes:?}") };
        let lies = |key: &Vec<u8>| {
            hole.after.as_ref().is_none_or(|after| after < key)
                && hole.up_to.as_ref().is_none_or(|end| key <= end)
        };
        assert!(things.keys().all(|key| found.contains_key(key) != lies(key)), "{hole:?}");
        assert!((hole.at..hole.at + (16 << 12)).contains(&(at as u64)), "{hole:?} and {at}");
    }

    #[test]
    fn a_file_that_redb_has_open_is_not_held_and_one_that_is_held_is_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.redb");
        let (database, _) = written(&path);
        assert!(hold(&path).unwrap().is_none());
        drop(database);
        let held = hold(&path).unwrap();
        assert!(held.is_some() && Database::open(&path).is_err());
        drop(held);
        Database::open(&path).unwrap();
        assert!(hold(&folder.path().join("missing")).is_err());
    }

    #[test]
    fn a_panic_is_an_answer() {
        assert_eq!(guarded(|| 7), Ok(7));
        assert!(guarded(|| panic!("as redb does")).is_err());
    }
}
