//! Damage of every kind at many places: what is shown is what was written, and what is missing is told.

use std::collections::BTreeMap;

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use scheduler_core::change::{Change, Key, Revision, Value};

use super::*;
use crate::store::suite::{self, revision};

const SEEDS: u64 = 240;
/// Where the header and its two commit slots end.
const HEADER_LEN: usize = 320;

/// What a file was made of.
struct Written {
    bytes: Vec<u8>,
    revision: u64,
    values: BTreeMap<Key, Value>,
    log: Vec<Revision>,
}

/// A store in which pods come and go. `clean`: its server has ended; or else it was killed.
fn written(compacted: u64, clean: bool) -> Written {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let store = RedbStore::open(&path).unwrap();
    for number in 1..=150 {
        let mut made = revision(number, Some(&format!("fd00::{number:x}")));
        if number > 100 {
            // One of the pods of before changes, or goes.
            let first = revision(number - 100, Some(&format!("fd00::{:x}", number - 100)));
            let (key, old) = (first.changes[0].key.clone(), first.changes[0].new.clone());
            let new = match old.clone() {
                Some(Value::Pod(pod)) if number % 2 == 0 => {
                    let restarts = pod.restarts + 1;
                    Some(Value::Pod(Arc::new(scheduler_core::pod::Pod { restarts, ..(*pod).clone() })))
                }
                _ => None,
            };
            made.changes.push(Change { key, old, new });
        }
        store.commit(&[made]).unwrap();
    }
    store.compact(compacted, 1000).unwrap();
    let (revision, values) = store.load().unwrap();
    let log = store.log_after(0, 1000).unwrap();
    let killed = fs::read(&path).unwrap();
    drop(store);
    let bytes = if clean { fs::read(&path).unwrap() } else { killed };
    Written { bytes, revision, values: values.into_iter().collect(), log }
}

/// Damage of one kind; gives where it begins.
fn hurt(bytes: &mut Vec<u8>, rng: &mut StdRng) -> usize {
    // One in twelve is in the header; the others are in what was ever written.
    let used = |rng: &mut StdRng| match rng.random_range(0..12) {
        0 => rng.random_range(0..HEADER_LEN.min(bytes.len())),
        _ => rng.random_range(0..bytes.len()),
    };
    let at = (0..1000).map(|_| used(rng)).find(|at| bytes[*at] != 0).unwrap_or_default();
    let mut fill = |at: usize, len: usize, with: u8| {
        let end = (at + len).min(bytes.len());
        bytes[at..end].fill(with);
        at
    };
    match rng.random_range(0..6) {
        0 => fill(at, 4096, 0),
        1 => fill(at / 4096 * 4096, 4096, 0),
        2 => fill(at / 512 * 512, 512, 0),
        3 => fill(at, 2000, 0xA5),
        4 => {
            bytes.truncate(at);
            at
        }
        _ => {
            bytes[at] ^= 1 << rng.random_range(0..8);
            at
        }
    }
}

fn open(path: &Path) -> Result<Arc<dyn Store>, StoreError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(RedbStore::open_when_free(path, "known elsewhere"))
}

#[test]
fn whatever_is_damaged_what_is_shown_is_true_and_what_is_missing_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let (mut whole, mut damaged, mut refused, mut shown) = (0, 0, 0, 0);
    for (compacted, clean) in [(1, true), (1, false), (60, true), (60, false)] {
        let written = written(compacted, clean);
        for seed in 0..SEEDS / 4 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut bytes = written.bytes.clone();
            let mut at = hurt(&mut bytes, &mut rng);
            if rng.random_ratio(1, 4) && !bytes.is_empty() {
                at = at.min(hurt(&mut bytes, &mut rng));
            }
            if bytes.is_empty() {
                continue;
            }
            fs::write(&path, &bytes).unwrap();
            agree(&path);
            let name = format!("compacted {compacted}, clean {clean}, seed {seed}, byte {at}");
            match open(&path) {
                Err(StoreError::Damaged { .. }) if at < HEADER_LEN || bytes.len() < written.bytes.len() => {
                    refused += 1
                }
                Err(error) => panic!("{name}: {error}"),
                Ok(store) if store.damage().is_none() => {
                    assert_eq!(
                        store.load().unwrap().1.into_iter().collect::<BTreeMap<_, _>>(),
                        written.values,
                        "{name}"
                    );
                    assert_eq!(store.log_after(0, 1000).unwrap(), written.log, "{name}");
                    whole += 1;
                    continue;
                }
                Ok(store) => {
                    shown += check_true(&*store, &written, &name);
                    damaged += 1;
                }
            }
            assert!(fs::read(&path).unwrap() == bytes, "{name}: the file was changed");
        }
    }
    println!("{whole} harmless, {damaged} served read-only with {shown} objects, {refused} refused");
    assert!(
        whole > 20 && damaged > 80 && refused > 5 && shown > 4_000,
        "{whole} {damaged} {refused} {shown}"
    );
}

/// What reads a file in one go calls it whole if the audit finds nothing.
fn agree(path: &Path) {
    let file = fs::File::open(path).unwrap();
    let audited = audit::look(&file);
    let is_good = audited.is_ok_and(|found| found.is_some_and(|found| found.damage.count() == 0));
    assert_eq!(whole::read(&file).is_some(), is_good);
}

/// Gives how many objects are shown.
fn check_true(store: &dyn Store, written: &Written, name: &str) -> usize {
    let damage = store.damage().unwrap();
    let lines: Vec<String> = damage.lines().collect();
    assert!(!lines.is_empty(), "{name}");
    let (revision, values) = store.load().unwrap();
    assert!(revision <= written.revision, "{name}: {revision}");
    let values: BTreeMap<Key, Value> = values.into_iter().collect();
    for (key, value) in &values {
        assert_eq!(written.values.get(key), Some(value), "{name}: {key} is shown: {lines:#?}");
    }
    for key in written.values.keys().filter(|key| !values.contains_key(key)) {
        assert!(damage.may_hide(key), "{name}: {key} is left out: {lines:#?}");
    }
    let log = store.log_after(0, 1000).unwrap();
    for entry in &log {
        assert!(written.log.contains(entry), "{name}: revision {}", entry.revision);
    }
    let oldest = store.oldest().unwrap();
    for entry in written.log.iter().filter(|entry| !log.contains(entry)) {
        let is_told = entry.revision >= oldest || lines.iter().any(|line| line.starts_with("log: "));
        assert!(is_told, "{name}: revision {} of {oldest}: {lines:#?}", entry.revision);
    }
    let refused = store.commit(&[suite::revision(written.revision + 1, None)]).unwrap_err().to_string();
    assert!(refused.contains("is damaged and is only read") && refused.contains("restore"), "{refused}");
    assert!(store.compact(10, 10).is_err() && store.recover().is_err());
    values.len()
}

/// Opens a good file after a change that redb itself takes for good.
fn spoiled(spoil: impl FnOnce(&Database)) -> (Arc<dyn Store>, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    fs::write(&path, written(60, true).bytes).unwrap();
    spoil(&Database::open(&path).unwrap());
    agree(&path);
    let store = open(&path).unwrap();
    let lines = store.damage().map(|damage| damage.lines().collect()).unwrap_or_default();
    (store, lines)
}

fn pod(number: u64) -> Key {
    revision(number, None).changes[0].key.clone()
}

/// With the slot of the last commit nothing could be found any more.
#[test]
fn a_bit_that_is_wrong_in_the_slot_of_the_last_commit_is_told_and_hides_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let written = written(60, true);
    let slot = 64 + 128 * usize::from(written.bytes[9] & 1);
    // The first one makes the slot one of an older redb.
    for bit in (0..128 * 8).step_by(37) {
        let mut bytes = written.bytes.clone();
        bytes[slot + bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bytes).unwrap();
        agree(&path);
        let store = open(&path).unwrap_or_else(|error| panic!("bit {bit}: {error}"));
        let lines: Vec<String> = store.damage().unwrap().lines().collect();
        assert!(lines[0].starts_with("the header: bit"), "{lines:?}");
        assert_eq!(check_true(&*store, &written, &format!("bit {bit}")), written.values.len());
        drop(store);
        assert!(fs::read(&path).unwrap() == bytes, "bit {bit}: the file was changed");
    }
    let mut bytes = written.bytes.clone();
    bytes[slot + 20] ^= 0xFF;
    fs::write(&path, &bytes).unwrap();
    let refused = open(&path).map(drop).unwrap_err().to_string();
    assert!(refused.contains("netctl server restore"), "{refused}");
}

#[test]
fn a_value_that_does_not_read_is_taken_from_the_log_or_told() {
    let (in_log, compacted) = (pod(120), pod(55));
    for key in [&in_log, &compacted] {
        let (store, lines) = spoiled(|database| tables::put(database, &key.to_string(), b"\x01nonsense"));
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].starts_with(&format!("current: {key}: its record does not read")), "{lines:?}");
        let is_shown = store.load().unwrap().1.iter().any(|(shown, _)| shown == key);
        assert_eq!(is_shown, *key == in_log);
        assert_eq!(store.damage().unwrap().may_hide(key), *key == compacted);
    }
}

#[test]
fn a_value_that_is_not_the_logs_or_another_objects_is_not_shown() {
    let other = codec::encode(revision(119, Some("fd00::77")).changes[0].new.as_ref().unwrap());
    let (_, lines) = spoiled(|database| tables::put(database, &pod(55).to_string(), &other));
    assert_eq!(lines, [format!("current: {}: its record is another object's", pod(55))]);

    let Some(Value::Pod(pod_55)) = revision(120, Some("fd00::78")).changes.remove(0).new else { panic!() };
    let changed = scheduler_core::pod::Pod { restarts: 7, ..(*pod_55).clone() };
    let changed = codec::encode(&Value::Pod(Arc::new(changed)));
    let (store, lines) = spoiled(|database| tables::put(database, &pod(120).to_string(), &changed));
    assert!(
        lines[0].contains("its record is not what revision 120, the last that changed it, says"),
        "{lines:?}"
    );
    assert!(store.damage().unwrap().may_hide(&pod(120)));
    assert!(store.load().unwrap().1.iter().all(|(key, _)| *key != pod(120)));
}

#[test]
fn a_revision_that_does_not_read_or_is_not_there_is_told_by_its_number() {
    let (store, lines) = spoiled(|database| tables::put_entry(database, 130, Some(b"{\"revision\":130}")));
    assert!(lines[0].starts_with("log: revision 130 does not read"), "{lines:?}");
    assert_eq!((store.oldest().unwrap(), store.log_after(129, 1).unwrap()[0].revision), (60, 131));

    let (store, lines) = spoiled(|database| {
        (100..=110).chain([150]).for_each(|number| tables::put_entry(database, number, None));
    });
    assert_eq!(lines[0], "log: revisions 100 to 110 are missing", "{lines:?}");
    assert_eq!(lines[1], "log: revision 150 is missing", "{lines:?}");
    assert_eq!(store.load().unwrap().0, 150);
    let right = codec::encode(&revision(99, None));
    let (_, lines) = spoiled(|database| tables::put_entry(database, 101, Some(&right)));
    assert!(lines.contains(&"log: revision 101 says that it is 99".to_owned()), "{lines:?}");
}

#[test]
fn a_good_store_is_called_damaged_by_nobody() {
    for (compacted, clean) in [(1, true), (1, false), (1000, true), (1000, false)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        fs::write(&path, written(compacted, clean).bytes).unwrap();
        let store = open(&path).unwrap();
        assert_eq!(store.damage().map(|damage| damage.lines().collect::<Vec<_>>()), None);
        agree(&path);
        let (before_it_was_opened, from_redb) = (store.load().unwrap(), store.load().unwrap());
        assert_eq!(before_it_was_opened, from_redb);
        store.commit(&[revision(151, None)]).unwrap();
    }
}

/// Until the next start nobody was told, and the server went on writing beside the damage.
#[test]
fn damage_that_a_running_server_meets_makes_its_store_read_only() {
    let dir = tempfile::tempdir().unwrap();
    let written = written(1, true);
    let (mut met, mut unseen) = (0, 0);
    for seed in 0..60 {
        let path = dir.path().join(format!("{seed}.redb"));
        fs::write(&path, &written.bytes).unwrap();
        // What redb keeps in memory would hide it.
        let file = path.clone();
        let opener = move || Database::builder().set_cache_size(0).create(&file);
        let store = RedbStore::with_opener(&path, opener).unwrap();
        let mut rng = StdRng::seed_from_u64(seed);
        let len = written.bytes.len();
        for _ in 0..len / 4096 / 2 {
            let at = rng.random_range(1..len / 4096) * 4096;
            let noise: Vec<u8> = (0..4096).map(|_| rng.random()).collect();
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &noise, at as u64).unwrap();
        }
        let reads = [
            store.log_after(0, 1000).map(|log| assert_eq!(log, written.log)),
            store.oldest().map(drop),
            store.dump(&mut |_| Ok(())),
        ];
        let is_met = reads.iter().any(|read| matches!(read, Err(StoreError::Damaged { .. })));
        assert_eq!(store.damage().is_some(), is_met, "seed {seed}");
        if !is_met {
            unseen += 1;
            continue;
        }
        met += 1;
        let refused = store.commit(&[revision(151, None)]).unwrap_err().to_string();
        assert!(refused.contains("is damaged and is only read (met while the server ran: "), "{refused}");
        assert!(store.compact(10, 10).is_err() && store.recover().is_err());
    }
    println!("{met} met, {unseen} not read");
    assert!(met > 30, "{met}");
}
