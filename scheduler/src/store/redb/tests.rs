//! The store over files that are full, torn or damaged.

use std::{
    fmt, io,
    ops::ControlFlow,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

use super::*;
use crate::{
    history::{self, Seen},
    store::suite::{self, revision},
};
use redb::StorageBackend;
use scheduler_core::{
    change::Change,
    time::WallTime,
    token::{Role, Token},
};

/// The suite that every store passes, over a file.
#[test]
fn what_every_store_must_do() {
    for case in suite::CASES {
        let dir = tempfile::tempdir().unwrap();
        case(&|| Arc::new(RedbStore::open(&dir.path().join("store.redb")).unwrap()));
    }
}

/// A file of the first format held plain JSON and no count of its log.
#[test]
fn a_file_of_the_first_format_is_read_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let (first, second) = (revision(1, Some("fd00::1")), revision(2, None));
    tables::make_first_format(&path, "e", &first);
    let store = RedbStore::open(&path).unwrap();
    assert_eq!((store.epoch(), store.oldest().unwrap()), ("e", 1));
    assert!(store.log_bytes().unwrap() > 500);
    store.commit(std::slice::from_ref(&second)).unwrap();
    drop(store);
    let store = RedbStore::open(&path).unwrap();
    assert_eq!(store.log_after(0, 10).unwrap(), [first, second]);
    assert_eq!(store.load().unwrap().1.len(), 2);
    assert!(matches!(store.commit(&[revision(3, Some("fd00::1"))]), Err(StoreError::AddressUsed(_))));
}

/// The history of one object is found by an index, which goes along with what is committed, compacted and read anew.
#[test]
fn revisions_about_an_object_are_the_same_with_and_without_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let about = |store: &RedbStore, key: &str| -> Vec<u64> {
        let key: Key = key.parse().unwrap();
        let (mut found, mut after) = (vec![], store.oldest().unwrap() - 1);
        let is_about = |revision: &Revision| revision.changes.iter().any(|change| change.key == key);
        loop {
            let all = store.log_after(after, 64).unwrap();
            let some = store.log_about(&key, after, 64).unwrap();
            assert_eq!(some.first(), all.first());
            let those = |all: Vec<Revision>| all.into_iter().filter(is_about).collect::<Vec<_>>();
            let last = all.last().map(|last| last.revision);
            let some = those(some);
            assert_eq!(some, those(all));
            found.extend(some.iter().map(|revision| revision.revision));
            let Some(last) = last else { return found };
            after = last;
        }
    };
    let with_token = |number: u64| {
        let mut revision = revision(number, None);
        if number.is_multiple_of(50) {
            let expires = WallTime(number);
            let token = Token { role: Role::Node, name: None, expires, used_by: None };
            let (key, new) = (Key::Token("t".to_owned()), Some(Value::Token(Arc::new(token))));
            revision.changes.push(Change { key, old: None, new });
        }
        revision
    };
    let commit = |store: &RedbStore, range: std::ops::RangeInclusive<u64>| {
        store.commit(&range.map(with_token).collect::<Vec<_>>()).unwrap();
    };
    let is_known = |store: &RedbStore| store.about.read().unwrap().is_some();

    let store = RedbStore::open(&path).unwrap();
    store.load().unwrap();
    commit(&store, 1..=170);
    assert!(is_known(&store));
    assert_eq!((about(&store, "token/t"), about(&store, "pod/a-b-7")), (vec![50, 100, 150], vec![7]));
    assert_eq!(about(&store, "token/other"), [0; 0]);
    store.compact(100, 1000).unwrap();
    assert_eq!(about(&store, "token/t"), [100, 150]);
    drop(store);
    let store = RedbStore::open(&path).unwrap();
    assert!(!is_known(&store), "not before its values were read");
    assert_eq!(about(&store, "token/t"), [100, 150]);
    store.load().unwrap();
    assert!(is_known(&store));
    commit(&store, 171..=230);
    assert_eq!(about(&store, "token/t"), [100, 150, 200]);
    drop(store);
    // What was committed before the values were read is in no index.
    let store = RedbStore::open(&path).unwrap();
    commit(&store, 231..=260);
    store.load().unwrap();
    assert!(!is_known(&store));
    assert_eq!(about(&store, "token/t"), [100, 150, 200, 250]);
}

#[test]
fn a_backup_sees_one_revision_whatever_is_committed_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let store = RedbStore::open(&dir.path().join("store.redb")).unwrap();
    let made: Vec<Revision> =
        (1..=600).map(|number| revision(number, Some(&format!("fd00::{number:x}")))).collect();
    store.commit(&made).unwrap();
    store.compact(101, 100).unwrap();
    let (mut items, mut next) = (vec![], 601);
    store
        .dump(&mut |item| {
            items.push(item);
            if items.len().is_multiple_of(100) {
                store.commit(&[revision(next, None)])?;
                next += 1;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(items[0], Item::Last(600));
    let count = |so: fn(&Item) -> bool| items.iter().filter(|item| so(item)).count();
    assert_eq!(count(|item| matches!(item, Item::Value(..))), 600);
    assert_eq!(count(|item| matches!(item, Item::Address(..))), 600);
    let entries =
        items.iter().filter_map(|item| if let Item::Entry(entry) = item { Some(entry) } else { None });
    assert!(entries.eq(&made[100..]));
}

/// A power cut while redb made the file left one that the next start called damaged, though nothing was ever in it.
#[test]
fn a_file_that_was_made_half_way_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    fs::write(dir.path().join("store.redb.new"), [0; 5000]).unwrap();
    fs::write(&path, []).unwrap();
    let store = RedbStore::open(&path).unwrap();
    store.commit(&[revision(1, None)]).unwrap();
    assert!(!dir.path().join("store.redb.new").exists());
    // One that has its name is never replaced.
    drop(store);
    fs::write(&path, [0; 5000]).unwrap();
    assert!(matches!(RedbStore::open(&path), Err(StoreError::Damaged { .. })));
}

#[test]
fn a_second_server_is_told_that_the_store_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let _first = RedbStore::open(&path).unwrap();
    let error = RedbStore::open(&path).err().unwrap().to_string();
    assert!(error.ends_with("is in use: another `netctl server` runs on this state directory"), "{error}");
}

/// A server that was started right after `kill -9` of the one before said that its store was in use, and ended.
#[tokio::test]
async fn a_store_whose_holder_is_ending_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let dying = RedbStore::open(&path).unwrap();
    // The first try is before the end, and fails.
    let (opened, ()) = tokio::join!(RedbStore::open_when_free(&path, ""), async move { drop(dying) });
    opened.unwrap();
}

#[tokio::test]
async fn a_store_whose_holder_lives_is_not_waited_for_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let _first = RedbStore::open(&path).unwrap();
    let (start, wait_max) = (Instant::now(), RETRY * 3);
    let error = RedbStore::open_within(&path, "", wait_max).await.err().unwrap();
    assert!(matches!(error, StoreError::InUse(_)), "{error}");
    assert!(start.elapsed() >= wait_max);
}

#[test]
fn damage_is_named_and_nothing_is_invented() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let store = RedbStore::open(&path).unwrap();
    (1..200)
        .for_each(|number| store.commit(&[revision(number, Some(&format!("fd00::{number:x}")))]).unwrap());
    let whole = store.load().unwrap();
    drop(store);
    let good = fs::read(&path).unwrap();

    let mut texts = vec![];
    let mut hurt = |what: &str, bytes: Vec<u8>| {
        fs::write(&path, bytes).unwrap();
        match RedbStore::open(&path).and_then(|store| store.load()) {
            // Damage to pages that are not in use is none.
            Ok(read) => assert_eq!(read, whole, "{what}"),
            Err(error @ (StoreError::Damaged { .. } | StoreError::Format { .. })) => {
                texts.push(error.to_string())
            }
            Err(other) => panic!("{what}: {other}"),
        }
    };
    hurt("not a store", b"hello, this is a text".repeat(400));
    hurt("cut off", good[..good.len() / 2].to_vec());
    for at in (0..good.len()).step_by(good.len() / 60) {
        let mut bytes = good.clone();
        let end = (at + 2000).min(bytes.len());
        bytes[at..end].fill(0xA5);
        hurt(&format!("overwritten at {at}"), bytes);
    }
    assert!(texts.len() > 3, "{texts:#?}");
    assert!(texts.iter().all(|text| text.contains("put back a copy of the file") || text.contains("format")));
}

#[test]
fn a_disk_that_fails_at_the_nth_write_loses_nothing_that_was_acknowledged() {
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for nth in 0..60 {
            fail_at(nth, kind);
        }
    }
}

/// Commits until the disk fails, then checks what is left.
fn fail_at(nth: u64, kind: io::ErrorKind) {
    let disk = Disk::default();
    let opener = {
        let disk = disk.clone();
        move || Database::builder().create_with_backend(disk.clone())
    };
    let store = RedbStore::with_opener(Path::new("test"), opener.clone()).unwrap();
    disk.fail_after(nth, kind);
    let mut acknowledged = 0;
    let error = loop {
        let number = acknowledged + 1;
        match store.commit(&[revision(number, Some(&format!("fd00::{number:x}")))]) {
            Ok(()) => acknowledged = number,
            Err(error) => break error,
        }
        assert!(acknowledged < 1000, "the disk never failed");
    };
    let full = kind == io::ErrorKind::StorageFull;
    assert_eq!(matches!(error, StoreError::Full { .. }), full, "{nth}: {error}");
    assert!(
        store.commit(&[revision(acknowledged + 1, None)]).is_err(),
        "{nth}: a failed store took a commit"
    );

    disk.heal();
    if full {
        store.recover().unwrap();
        check_whole(&store, acknowledged, nth);
        let next = store.load().unwrap().0 + 1;
        store.commit(&[revision(next, None)]).unwrap();
        assert_eq!(store.load().unwrap().0, next);
    } else {
        let error = store.recover().unwrap_err().to_string();
        assert!(error.contains("then start the server again"), "{error}");
        drop(store);
        check_whole(&RedbStore::with_opener(Path::new("test"), opener).unwrap(), acknowledged, nth);
    }
}

/// Whether the kernel has kept what a failed sync was about, nobody knows: a second sync that succeeds would say so falsely.
#[test]
fn a_failed_sync_stops_writing_and_is_never_tried_again() {
    for nth in 0..12 {
        let disk = Disk::default();
        let opener = {
            let disk = disk.clone();
            move || Database::builder().create_with_backend(disk.clone())
        };
        let store = RedbStore::with_opener(Path::new("test"), opener.clone()).unwrap();
        disk.fail_one_sync(nth);
        let mut acknowledged = 0;
        let error = loop {
            match store.commit(&[revision(acknowledged + 1, None)]) {
                Ok(()) => acknowledged += 1,
                Err(error) => break error,
            }
            assert!(acknowledged < 100, "no sync has failed");
        };
        assert!(matches!(error, StoreError::Stopped { .. }), "{nth}: {error}");
        // The disk is good again, and the store does not find out.
        for _ in 0..3 {
            assert!(matches!(
                store.commit(&[revision(acknowledged + 1, None)]),
                Err(StoreError::Stopped { .. })
            ));
            assert!(matches!(store.recover(), Err(StoreError::Stopped { .. })));
            assert!(matches!(store.compact(1, 1), Err(StoreError::Stopped { .. })));
        }
        drop(store);
        assert_eq!(
            disk.touched_after_the_failure(),
            0,
            "{nth}: it was written or synced after a sync had failed"
        );
        check_whole(&RedbStore::with_opener(Path::new("test"), opener).unwrap(), acknowledged, nth);
    }
}

/// All that was acknowledged is there, and the one that was not is there whole or not at all.
fn check_whole(store: &RedbStore, acknowledged: u64, nth: u64) {
    let (last, values) = store.load().unwrap();
    assert!(last == acknowledged || last == acknowledged + 1, "{nth}: {last}, not {acknowledged}");
    assert_eq!(values.len() as u64, last, "{nth}");
    let log: Vec<u64> = store.log_after(0, 2000).unwrap().iter().map(|entry| entry.revision).collect();
    assert_eq!(log, (1..=last).collect::<Vec<_>>(), "{nth}");
}

/// A disk in memory whose writes and syncs fail from the n-th on, until it is healed.
#[derive(Clone, Default)]
struct Disk {
    bytes: Arc<Mutex<Vec<u8>>>,
    left: Arc<AtomicU64>,
    kind: Arc<AtomicU8>,
    sync: Arc<Mutex<Sync>>,
}

/// One sync that fails.
#[derive(Clone, Copy, Debug, Default)]
enum Sync {
    #[default]
    Never,
    /// After so many others.
    In(u64),
    /// It has; so many writes and syncs came after it.
    Failed(u64),
}

const HEALTHY: u8 = 0;
const FULL: u8 = 1;
const BROKEN: u8 = 2;

impl Disk {
    fn fail_after(&self, writes: u64, kind: io::ErrorKind) {
        self.left.store(writes, Ordering::SeqCst);
        self.kind.store(if kind == io::ErrorKind::StorageFull { FULL } else { BROKEN }, Ordering::SeqCst);
    }

    fn fail_one_sync(&self, nth: u64) {
        *self.sync.lock().unwrap() = Sync::In(nth);
    }

    fn touched_after_the_failure(&self) -> u64 {
        match *self.sync.lock().unwrap() {
            Sync::Failed(touched) => touched,
            other => panic!("{other:?}"),
        }
    }

    fn touch(&self) {
        if let Sync::Failed(touched) = &mut *self.sync.lock().unwrap() {
            *touched += 1;
        }
    }

    fn heal(&self) {
        self.kind.store(HEALTHY, Ordering::SeqCst);
    }

    fn spend(&self) -> io::Result<()> {
        let kind = self.kind.load(Ordering::SeqCst);
        if kind == HEALTHY {
            return Ok(());
        }
        let one_less = |left: u64| left.checked_sub(1);
        match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less) {
            Ok(_) => Ok(()),
            Err(_) if kind == FULL => Err(io::ErrorKind::StorageFull.into()),
            Err(_) => Err(io::Error::other("the cable is out")),
        }
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Disk")
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let offset = offset as usize;
        out.copy_from_slice(bytes.get(offset..offset + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.touch();
        self.spend()?;
        self.bytes.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.touch();
        let mut sync = self.sync.lock().unwrap();
        if let Sync::In(left) = &mut *sync {
            if *left == 0 {
                *sync = Sync::Failed(0);
                return Err(io::Error::other("the cable is out"));
            }
            *left -= 1;
        }
        self.spend()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.touch();
        self.spend()?;
        let offset = offset as usize;
        self.bytes.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }
}

#[test]
fn a_reader_of_one_object_misses_none_of_its_revisions_and_is_spared_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let store = RedbStore::open(&dir.path().join("store.redb")).unwrap();
    let revisions: Vec<Revision> = (1..=600).map(|number| revision(number, None)).collect();
    store.commit(&revisions).unwrap();
    let key = &revisions[299].changes[0].key;
    let (mut found, mut passed_over) = (vec![], 0);
    history::back(&store, Some(key), 601, |seen| {
        match seen {
            Seen::Revision(revision) => found.push(revision.revision),
            Seen::Other => passed_over += 1,
            Seen::Unreadable(number) => panic!("{number}"),
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    // The first of each chunk tells a reader when it was.
    assert!(found.contains(&300) && found.len() <= 4 && found.len() + passed_over == 600, "{found:?}");
}
