//! What every store must do, whatever it is made of: one suite for all.

use std::sync::Arc;

use scheduler_core::{
    change::{Change, Key, Revision, Value},
    pod::{Pod, PodId, PodPhase},
    quantity::Resources,
    time::WallTime,
    version::{JobVersion, Text},
};

use super::{Item, Store, StoreError};

/// Gives the same store again, as after a restart of the server.
pub(super) type Open<'a> = dyn Fn() -> Arc<dyn Store> + 'a;

/// Each begins with a store in which nothing was ever written.
pub(super) const CASES: [fn(&Open<'_>); 6] = [
    what_was_committed_is_there_after_opening_again,
    an_address_is_never_given_again,
    a_revision_of_ten_thousand_pods_is_one,
    what_is_compacted_is_gone_from_the_log_and_from_nothing_else,
    a_dump_holds_everything_as_of_one_revision,
    a_version_of_a_job_outlives_the_log,
];

fn what_was_committed_is_there_after_opening_again(open: &Open<'_>) {
    let store = open();
    assert_eq!(store.load().unwrap(), (0, vec![]));
    store.commit(&[revision(1, Some("fd00::1")), revision(2, None)]).unwrap();
    store.commit(&[revision(3, Some("fd00::3"))]).unwrap();
    let epoch = store.epoch().to_owned();
    drop(store);

    let store = open();
    assert_eq!(store.epoch(), epoch);
    let (last, values) = store.load().unwrap();
    assert_eq!((last, values.len()), (3, 3));
    assert_eq!(store.log_after(1, 10).unwrap(), [revision(2, None), revision(3, Some("fd00::3"))]);
    assert_eq!(store.log_after(0, 1).unwrap(), [revision(1, Some("fd00::1"))]);
    assert_eq!(store.oldest().unwrap(), 1);
}

fn an_address_is_never_given_again(open: &Open<'_>) {
    let store = open();
    store.commit(&[revision(1, Some("fd00::1"))]).unwrap();
    let mut gone = revision(2, None);
    gone.changes[0] = Change { key: Key::Pod(id(1)), old: None, new: None };
    store.commit(&[gone]).unwrap();
    assert_eq!(refused(&*store, &[revision(3, Some("fd00::1"))]), "fd00::1");
    assert_eq!(refused(&*store, &[revision(3, Some("fd00::9")), revision(4, Some("fd00::9"))]), "fd00::9");
    assert_eq!(store.load().unwrap(), (2, vec![]));
    store.commit(&[revision(3, Some("fd00::2"))]).unwrap();
    assert_eq!(store.load().unwrap().0, 3);

    // Nor to the pod that had it and moved.
    let moves = |number, from: &str, to: &str| {
        let pod = |address| revision(3, Some(address)).changes.remove(0).new;
        let mut moved = revision(number, None);
        moved.changes[0] = Change { key: Key::Pod(id(3)), old: pod(from), new: pod(to) };
        moved
    };
    store.commit(&[moves(4, "fd00::2", "fd00::4")]).unwrap();
    assert_eq!(refused(&*store, &[moves(5, "fd00::4", "fd00::2")]), "fd00::2");
}

/// A job of ten thousand pods is one revision, and is there as a whole or not at all.
fn a_revision_of_ten_thousand_pods_is_one(open: &Open<'_>) {
    let store = open();
    let mut large = revision(1, Some("fd00::1"));
    for number in 2..=10_000 {
        large.changes.extend(revision(number, Some(&format!("fd00::{number:x}"))).changes);
    }
    store.commit(std::slice::from_ref(&large)).unwrap();
    store.commit(&[revision(20_000, None)].map(|revision| Revision { revision: 2, ..revision })).unwrap();
    drop(store);
    let store = open();
    let (last, values) = store.load().unwrap();
    assert_eq!((last, values.len()), (2, 10_001));
    assert_eq!(store.log_after(0, 1).unwrap(), [large]);
    let again = Revision { revision: 3, ..revision(30_000, Some("fd00::2710")) };
    assert_eq!(refused(&*store, &[again]), "fd00::2710");
}

fn what_is_compacted_is_gone_from_the_log_and_from_nothing_else(open: &Open<'_>) {
    let store = open();
    assert_eq!((store.oldest().unwrap(), store.log_bytes().unwrap()), (1, 0));
    let all: Vec<Revision> =
        (1..=20).map(|number| revision(number, Some(&format!("fd00::{number:x}")))).collect();
    store.commit(&all).unwrap();
    let (whole, bytes) = (store.load().unwrap(), store.log_bytes().unwrap());
    assert!(bytes > 0);

    store.compact(11, 7).unwrap();
    assert_eq!(store.oldest().unwrap(), 8, "no more than asked at a time");
    store.compact(11, 7).unwrap();
    store.compact(5, 7).unwrap();
    assert_eq!((store.oldest().unwrap(), store.log_after(0, 100).unwrap().len()), (11, 10));
    assert!(store.log_bytes().unwrap() < bytes * 6 / 10);
    assert_eq!(store.load().unwrap(), whole);
    assert!(matches!(store.commit(&[revision(21, Some("fd00::1"))]), Err(StoreError::AddressUsed(_))));

    store.compact(u64::MAX, 100).unwrap();
    assert_eq!((store.oldest().unwrap(), store.log_bytes().unwrap()), (21, 0));
    store.commit(&[revision(21, None)]).unwrap();
    assert_eq!(store.oldest().unwrap(), 21);
}

fn a_dump_holds_everything_as_of_one_revision(open: &Open<'_>) {
    let store = open();
    let all: Vec<Revision> =
        (1..=5).map(|number| revision(number, Some(&format!("fd00::{number:x}")))).collect();
    store.commit(&all).unwrap();
    let mut gone = revision(6, None);
    gone.changes[0] = Change { key: Key::Pod(id(1)), old: None, new: None };
    store.commit(std::slice::from_ref(&gone)).unwrap();
    store.compact(3, 100).unwrap();
    let mut items = vec![];
    store
        .dump(&mut |item| {
            if items.is_empty() {
                store.commit(&[revision(7, Some("fd00::7"))])?;
            }
            items.push(item);
            Ok(())
        })
        .unwrap();
    assert_eq!(items[0], Item::Last(6));
    let count = |so: &dyn Fn(&Item) -> bool| items.iter().filter(|item| so(item)).count();
    assert_eq!(count(&|item| matches!(item, Item::Value(..))), 4);
    assert_eq!(count(&|item| matches!(item, Item::Address(..))), 5);
    let log = items.iter().filter_map(|item| match item {
        Item::Entry(revision) => Some(revision.clone()),
        _ => None,
    });
    assert_eq!(log.collect::<Vec<_>>(), [&all[2..], &[gone]].concat());
}

fn a_version_of_a_job_outlives_the_log(open: &Open<'_>) {
    let store = open();
    let yaml = "{job: a, groups: {b: {tasks: {t: {exec: [/x, \"it's \\\"so\\\"\"]}}}}}";
    let text = Text::of(&serde_norway::from_str(yaml).unwrap());
    let (changer, message) = ("user:alice".to_owned(), "why".to_owned());
    let version =
        JobVersion { text, made: 1, kept: 1, applied: WallTime(1), changer, message, equals: Some(7) };
    let (key, value) = (Key::Version("a@8".parse().unwrap()), Value::Version(Arc::new(version)));
    let mut made = revision(1, None);
    made.changes.push(Change { key: key.clone(), old: None, new: Some(value.clone()) });
    store.commit(&[made.clone(), revision(2, None)]).unwrap();
    assert_eq!(store.log_after(0, 1).unwrap(), [made]);
    store.compact(2, 100).unwrap();
    drop(store);
    let store = open();
    assert!(store.load().unwrap().1.contains(&(key.clone(), value.clone())));
    let mut items = vec![];
    store
        .dump(&mut |item| {
            items.push(item);
            Ok(())
        })
        .unwrap();
    assert!(items.contains(&Item::Value(key, value)));
}

fn refused(store: &dyn Store, revisions: &[Revision]) -> String {
    match store.commit(revisions) {
        Err(StoreError::AddressUsed(address)) => address.to_string(),
        other => panic!("not refused: {other:?}"),
    }
}

fn id(number: u64) -> PodId {
    PodId(format!("a-b-{number}"))
}

/// Makes the pod of that number.
pub(crate) fn revision(number: u64, address: Option<&str>) -> Revision {
    let pod = Pod {
        countables: Default::default(),
        id: id(number),
        job: "a".to_owned(),
        group: "b".to_owned(),
        job_version: 1,
        serial: number,
        resources: Resources::default(),
        node: None,
        address: address.map(|address| address.parse().unwrap()),
        phase: PodPhase::Starting,
        message: "text that fills a page sooner".repeat(20),
        created: WallTime(0),
        restarts: 0,
        stop: false,
        standby: false,
    };
    let change = Change { key: Key::Pod(id(number)), old: None, new: Some(Value::Pod(Arc::new(pod))) };
    let (changer, message) = ("test".to_owned(), "a test".to_owned());
    Revision { revision: number, time: WallTime(number), changer, message, changes: vec![change] }
}
