//! The store over a real etcd.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU32},
};

use scheduler_core::state::State;

use super::*;
use crate::{
    election::{self, Leader, Outcome, Seat},
    etcd::Etcd,
    etcd_process::EtcdProcess,
    store::suite::{self, revision},
};

struct Rig {
    etcd: Etcd,
    /// Of every store that was opened, by its fence.
    seats: Mutex<BTreeMap<i64, Seat>>,
    _process: EtcdProcess,
}

impl Rig {
    fn start(test: &str) -> Option<Rig> {
        let process = EtcdProcess::start(test)?;
        let etcd = Etcd::new(&process.url().parse().unwrap()).unwrap();
        Some(Rig { etcd, seats: Mutex::default(), _process: process })
    }

    fn seat(&self, prefix: &str) -> Seat {
        let (etcd, prefix) = (self.etcd.clone(), prefix.to_owned());
        let leader = Leader { addresses: vec![] };
        self.etcd.wait(async move {
            match election::stand(&etcd, &prefix, &leader).await.unwrap() {
                Outcome::Leads(seat) => seat,
                Outcome::Follows(_) => panic!("another one leads"),
            }
        })
    }

    fn open(&self, prefix: &str) -> EtcdStore {
        let seat = self.seat(prefix);
        self.seats.lock().unwrap().insert(seat.fence(), seat.clone());
        EtcdStore::open(self.etcd.clone(), prefix, "e", seat).unwrap()
    }

    fn seat_of(&self, store: &EtcdStore) -> Seat {
        self.seats.lock().unwrap()[&store.seat.fence()].clone()
    }

    fn give_up(&self, store: &EtcdStore) {
        let seat = self.seat_of(store);
        self.etcd.wait(async move { seat.give_up().await });
    }
}

#[test]
fn a_value_that_does_not_read_is_named_and_nothing_is_shown() {
    let Some(rig) = Rig::start("a_value_that_does_not_read_is_named_and_nothing_is_shown") else { return };
    let store = rig.open("/damaged");
    store.commit(&[revision(1, None), revision(2, None)]).unwrap();
    let etcd = rig.etcd.clone();
    let success = vec![etcd::put("/damaged/current/pod/a-b-2".to_owned(), b"\x01gone".to_vec(), 0)];
    rig.etcd
        .wait(async move { etcd.txn(pb::TxnRequest { compare: vec![], success, failure: vec![] }).await })
        .unwrap();
    let error = store.load().unwrap_err().to_string();
    assert!(error.starts_with("the cluster in etcd below /damaged is damaged (pod/a-b-2: "), "{error}");
    assert!(error.ends_with("restore etcd from a snapshot of its own"), "{error}");
}

/// The suite that every store passes. Each opening is another leader's.
#[test]
fn what_every_store_must_do() {
    let Some(rig) = Rig::start("what_every_store_must_do") else { return };
    for (number, case) in suite::CASES.into_iter().enumerate() {
        let prefix = format!("/case-{number}");
        let seats: Mutex<Vec<Seat>> = Mutex::default();
        let count = AtomicU32::new(0);
        case(&|| {
            count.fetch_add(1, Ordering::Relaxed);
            if let Some(seat) = seats.lock().unwrap().pop() {
                rig.etcd.wait(async move { seat.give_up().await });
            }
            let store = rig.open(&prefix);
            seats.lock().unwrap().push(rig.seat_of(&store));
            std::sync::Arc::new(store)
        });
        assert!(count.into_inner() > 0);
    }
}

/// A leader that was paused and wakes up still believes that it leads: etcd does not.
#[test]
fn who_was_deposed_can_commit_nothing() {
    let Some(rig) = Rig::start("who_was_deposed_can_commit_nothing") else { return };
    let old = rig.open("/p");
    old.commit(&[revision(1, Some("fd00::1"))]).unwrap();
    // The lease ends behind its back: nobody tells the seat.
    let (etcd, lease) = (rig.etcd.clone(), rig.seat_of(&old).lease());
    rig.etcd.wait(async move { etcd.revoke(lease).await }).unwrap();
    let asked = old.transact(vec![], vec![etcd::put("/p/x".to_owned(), vec![], 0)]);
    assert!(!matches!(asked, Ok(Some(_))), "with nobody leading nobody writes");

    let new = rig.open("/p");
    new.commit(&[revision(2, None)]).unwrap();
    let refused = old.commit(&[revision(2, Some("fd00::2"))]);
    assert!(matches!(refused, Err(StoreError::Deposed)), "{refused:?}");
    assert!(matches!(old.recover(), Err(StoreError::Deposed)));
    assert_eq!(new.log_after(0, 10).unwrap(), [revision(1, Some("fd00::1")), revision(2, None)]);
}

/// A transaction that was given up may still be on its way when the next is sent.
#[test]
fn what_arrives_late_is_refused() {
    let Some(rig) = Rig::start("what_arrives_late_is_refused") else { return };
    let store = rig.open("/p");
    store.commit(&[revision(1, None)]).unwrap();
    let late = *store.lock();
    store.commit(&[revision(2, None)]).unwrap();
    let mut condition = late;
    let head = Head { revision: 2, ..late.head };
    let refused = store.write(&mut condition, head, vec![etcd::put("/p/late".to_owned(), vec![], 0)]);
    assert!(matches!(refused, Err(StoreError::Deposed)));
    assert_eq!(store.load().unwrap().0, 2);
}

/// Otherwise it would be in the log, and what follows from it could never be written.
#[test]
fn a_value_that_etcd_does_not_take_is_refused_before_it_is_in_the_log() {
    let test = "a_value_that_etcd_does_not_take_is_refused_before_it_is_in_the_log";
    let Some(rig) = Rig::start(test) else { return };
    let store = rig.open("/p");
    let mut large = revision(1, None);
    let Some(Value::Pod(pod)) = &mut large.changes[0].new else { panic!("it is a pod") };
    let noise: Vec<u8> = (0..2_000_000).map(|_| rand::random_range(b' '..=b'~')).collect();
    std::sync::Arc::make_mut(pod).message = String::from_utf8(noise).unwrap();
    let refused = store.commit(&[large]).unwrap_err().to_string();
    assert!(refused.starts_with("pod/a-b-1 takes 1") && refused.ends_with("make it smaller"), "{refused}");
    store.recover().unwrap();
    store.commit(&[revision(1, None)]).unwrap();
    assert_eq!(store.load().unwrap().0, 1);
}

/// A leader dies between the pieces of a large entry and the entry, or before what follows from it is written.
#[test]
fn a_large_commit_that_was_cut_off_is_there_or_not() {
    let Some(rig) = Rig::start("a_large_commit_that_was_cut_off_is_there_or_not") else { return };
    let mut large = revision(1, Some("fd00::1"));
    for number in 2..=2000 {
        large.changes.extend(revision(number, Some(&format!("fd00::{number:x}"))).changes);
    }
    let store = rig.open("/p");
    store.entries_of(std::slice::from_ref(&large)).unwrap();
    rig.give_up(&store);

    let store = rig.open("/p");
    assert_eq!(store.load().unwrap(), (0, vec![]));
    let etcd = rig.etcd.clone();
    let left = rig.etcd.wait(async move { etcd.all("/p/piece/", true, 100).await }).unwrap();
    assert!(left.is_empty(), "{} pieces", left.len());

    let (operations, bytes) = store.entries_of(std::slice::from_ref(&large)).unwrap();
    let head = Head { revision: 1, log_bytes: bytes.stored, ..Head::NEW };
    store.write(&mut store.lock(), head, operations).unwrap();
    rig.give_up(&store);

    let store = rig.open("/p");
    let (last, values) = store.load().unwrap();
    assert_eq!((last, values.len()), (1, 2000));
    let again = store.commit(&[Revision { revision: 2, ..revision(3000, Some("fd00::7d0")) }]);
    assert!(matches!(again, Err(StoreError::AddressUsed(_))), "{again:?}");
}

#[test]
fn an_etcd_that_is_away_is_named_and_waited_for() {
    let Some(mut rig) = Rig::start("an_etcd_that_is_away_is_named_and_waited_for") else { return };
    let store = rig.open("/p");
    store.commit(&[revision(1, None)]).unwrap();
    rig._process.kill();
    let error = store.commit(&[revision(2, None)]).unwrap_err();
    let text = crate::writer::chain(&error);
    assert!(text.contains("etcd at 127.0.0.1:") && text.contains("does not answer"), "{text}");
    rig._process.restart();
    // The lease is etcd's, and may have outlived it or not.
    drop(store);
    rig.seats.lock().unwrap().clear();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let stood = loop {
        let (etcd, leader) = (rig.etcd.clone(), Leader { addresses: vec![] });
        match rig.etcd.wait(async move { election::stand(&etcd, "/p", &leader).await }) {
            Ok(Outcome::Leads(seat)) => break seat,
            _ => assert!(std::time::Instant::now() < end, "nobody leads"),
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    let store = EtcdStore::open(rig.etcd.clone(), "/p", "e", stood).unwrap();
    assert_eq!(store.load().unwrap().0, 1);
    store.commit(&[revision(2, None)]).unwrap();
}

/// Everything as a leader reads it that has no copy.
fn read_anew(store: &EtcdStore) -> State {
    let (revision, values) = store.load().unwrap();
    State::load(revision, values)
}

fn copy(rig: &Rig) -> Copy {
    Copy::read(rig.etcd.clone(), "/p", &AtomicBool::new(false)).unwrap().unwrap()
}

fn large(first: u64) -> Revision {
    let mut large = revision(first, None);
    let more = (1..2000).flat_map(|number| revision(1_000_000 + number, None).changes);
    large.changes.extend(more);
    large
}

#[test]
fn a_copy_goes_along_with_the_log_and_is_what_a_leader_would_read() {
    let Some(rig) = Rig::start("a_copy_goes_along_with_the_log_and_is_what_a_leader_would_read") else {
        return;
    };
    let store = rig.open("/p");
    let mut begun_with_nothing = copy(&rig);
    store.commit(&[revision(1, None), revision(2, None)]).unwrap();
    let mut copy = copy(&rig);
    assert_eq!((copy.revision(), copy.follow().unwrap()), (2, Went::Nowhere));
    store.commit(&[large(3)]).unwrap();
    (4..200).for_each(|number| store.commit(&[revision(number, None)]).unwrap());
    for copy in [&mut copy, &mut begun_with_nothing] {
        while copy.follow().unwrap() == Went::On {}
        assert_eq!(copy.revision(), 199);
    }
    // The last entries of a leader that dies.
    store.commit(&[revision(200, None)]).unwrap();
    rig.give_up(&store);
    let store = rig.open("/p");
    let expected = Some(read_anew(&store));
    for copy in [copy, begun_with_nothing] {
        assert!(store.go_on_from(copy).unwrap() == expected);
    }
}

#[test]
fn a_copy_is_whole_although_the_values_are_behind_the_log() {
    let Some(rig) = Rig::start("a_copy_is_whole_although_the_values_are_behind_the_log") else { return };
    let store = rig.open("/p");
    store.commit(&[revision(1, None)]).unwrap();
    let (operations, bytes) = store.entries_of(&[large(2)]).unwrap();
    let head = Head { revision: 2, applied: 1, log_bytes: bytes.stored, ..Head::NEW };
    store.write(&mut store.lock(), head, operations).unwrap();
    let copy = copy(&rig);
    assert_eq!(copy.revision(), 2);
    rig.give_up(&store);
    let store = rig.open("/p");
    let expected = read_anew(&store);
    assert!(store.go_on_from(copy).unwrap() == Some(expected));
}

#[test]
fn a_copy_that_a_compaction_left_behind_is_of_no_use() {
    let Some(rig) = Rig::start("a_copy_that_a_compaction_left_behind_is_of_no_use") else { return };
    let store = rig.open("/p");
    store.commit(&[revision(1, None)]).unwrap();
    let (mut behind, not_at_the_log) = (copy(&rig), copy(&rig));
    (2..10).for_each(|number| store.commit(&[revision(number, None)]).unwrap());
    store.compact(5, 100).unwrap();
    assert_eq!(behind.follow().unwrap(), Went::Astray);
    assert!(store.go_on_from(not_at_the_log).unwrap().is_none());
    // All of the log is gone: nothing says any more that the log is another.
    let (mut last, at_takeover) = (copy(&rig), copy(&rig));
    store.compact(10, 100).unwrap();
    assert_eq!((last.follow().unwrap(), last.revision()), (Went::Nowhere, 9));
    assert!(store.go_on_from(at_takeover).unwrap().is_none());
    store.commit(&[revision(10, None)]).unwrap();
    assert_eq!(last.follow().unwrap(), Went::Astray);
}

/// A snapshot of etcd is put back while servers run, and the cluster goes another way from there.
#[test]
fn a_copy_of_another_log_is_of_no_use() {
    let Some(rig) = Rig::start("a_copy_of_another_log_is_of_no_use") else { return };
    let store = rig.open("/p");
    store.commit(&[revision(1, None)]).unwrap();
    store.commit(&[revision(2, None)]).unwrap();
    let (mut copy, at_takeover) = (copy(&rig), copy(&rig));
    let other = Revision { message: "another way".to_owned(), ..revision(2, None) };
    let (operations, _) = store.entries_of(&[other]).unwrap();
    let head = store.lock().head;
    store.write(&mut store.lock(), head, operations).unwrap();
    store.commit(&[revision(3, None)]).unwrap();
    assert_eq!((copy.follow().unwrap(), copy.revision()), (Went::Astray, 2));
    assert!(store.go_on_from(at_takeover).unwrap().is_none());
}
