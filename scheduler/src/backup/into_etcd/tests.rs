//! A restore into a real etcd that dies at each of its writes, before it and after it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use scheduler_core::change::{Revision, Value};

use super::*;
use crate::{etcd::EtcdError, etcd_process::EtcdProcess, store::suite::revision};

const REVISIONS: u64 = 400;

/// An etcd that does not answer any more after so many writes.
#[derive(Clone)]
struct Dying {
    etcd: Etcd,
    /// Writes that it still does.
    left: Arc<AtomicUsize>,
}

impl Dying {
    fn after(etcd: &Etcd, writes: usize) -> Dying {
        Dying { etcd: etcd.clone(), left: Arc::new(AtomicUsize::new(writes)) }
    }

    fn dead() -> EtcdError {
        EtcdError::Unreachable { endpoints: "a test".to_owned(), cause: "it was killed".to_owned() }
    }
}

impl Kv for Dying {
    fn txn(&self, request: pb::TxnRequest) -> Result<pb::TxnResponse, EtcdError> {
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return Err(Dying::dead());
        }
        self.left.store(left - 1, Ordering::Relaxed);
        Kv::txn(&self.etcd, request)
    }

    fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, EtcdError> {
        if self.left.load(Ordering::Relaxed) == 0 {
            Err(Dying::dead())
        } else {
            Kv::range(&self.etcd, request)
        }
    }
}

struct Rig {
    etcd: Etcd,
    file: PathBuf,
    log: Vec<Revision>,
    dir: tempfile::TempDir,
    _process: EtcdProcess,
}

impl Rig {
    fn start(test: &str) -> Option<Rig> {
        let process = EtcdProcess::start(test)?;
        let etcd = Etcd::new(&process.url().parse().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("backup");
        let log = back_up(&dir.path().join("source"), &file);
        Some(Rig { etcd, file, log, dir, _process: process })
    }

    fn seat(&self, prefix: &str) -> Seat {
        let (etcd, prefix) = (self.etcd.clone(), prefix.to_owned());
        self.etcd.wait(async move { take_seat(&etcd, &prefix).await.unwrap() })
    }

    fn give_up(&self, seat: Seat) {
        self.etcd.wait(async move { seat.give_up().await });
    }

    /// Restores until so many writes were done; gives how many were.
    fn restore(&self, prefix: &str, writes: usize) -> (anyhow::Result<Restored>, usize) {
        let backup = Checked::read(&self.file, Incomplete::Refuse, EtcdStore::takes).unwrap();
        let (kv, seat) = (Dying::after(&self.etcd, writes), self.seat(prefix));
        let below = Below { etcd: kv.clone(), prefix: prefix.to_owned(), seat: seat.clone() };
        let made = below.restore(&backup, Clock::start());
        self.give_up(seat);
        (made, writes - kv.left.load(Ordering::Relaxed))
    }

    fn has(&self, prefix: &str, key: &str) -> bool {
        Kv::get(&self.etcd, &format!("{prefix}/{key}")).unwrap().is_some()
    }

    /// Starts as a server does, until it has what servers share.
    fn share(&self, prefix: &str) -> anyhow::Result<String> {
        let (etcd, dir, prefix) =
            (self.etcd.clone(), self.dir.path().join(prefix.trim_matches('/')), prefix.to_owned());
        self.etcd.wait(async move {
            let shared = founding::share(&etcd, &prefix, &dir, Clock::start()).await?;
            Ok(shared.0.epoch().to_owned())
        })
    }

    fn check_whole(&self, prefix: &str) {
        let epoch = self.share(prefix).unwrap();
        let seat = self.seat(prefix);
        let store = EtcdStore::open(self.etcd.clone(), prefix, &epoch, seat.clone()).unwrap();
        let (last, values) = store.load().unwrap();
        assert_eq!(last, REVISIONS + 1, "one more says that it was restored");
        let (log, old) = (store.log_after(0, usize::MAX).unwrap(), self.log.as_slice());
        assert_eq!(log[..log.len() - 1], *old);
        assert!(log.last().unwrap().message.starts_with("restored from a backup"), "{:?}", log.last());
        let mut expected: BTreeMap<Key, Value> = BTreeMap::new();
        for change in log.iter().flat_map(|revision| &revision.changes) {
            match &change.new {
                Some(value) => drop(expected.insert(change.key.clone(), value.clone())),
                None => drop(expected.remove(&change.key)),
            }
        }
        assert!(values.into_iter().collect::<BTreeMap<_, _>>() == expected);
        assert_eq!(store.oldest().unwrap(), 1);
        let again = revision(last + 1, Some("fd00::7"));
        assert!(matches!(store.commit(&[again]), Err(StoreError::AddressUsed(_))), "addresses are known");
        self.give_up(seat);
    }
}

/// A store with revisions of every size, and its backup.
fn back_up(dir: &Path, file: &Path) -> Vec<Revision> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let opened = runtime.block_on(founding::open(dir, None, Clock::start())).unwrap();
    for number in 2..=REVISIONS {
        let mut made = revision(number, Some(&format!("fd00::{number:x}")));
        if number % 100 == 0 {
            let noise: Vec<u8> = (0..700_000).map(|_| rand::random_range(b' '..=b'~')).collect();
            made.message = String::from_utf8(noise).unwrap();
        }
        opened.store.commit(&[made]).unwrap();
    }
    let mut whole = NewFile::create(file).unwrap();
    write(opened.store.as_ref(), opened.pki.keyring(), Duration::from_secs(5), &mut |bytes| {
        whole.append(&bytes).unwrap();
        Ok(())
    })
    .unwrap();
    whole.finish().unwrap();
    opened.store.log_after(0, usize::MAX).unwrap()
}

#[test]
fn killed_at_any_write_it_leaves_nothing_that_a_server_begins_with_or_all_of_it() {
    let test = "killed_at_any_write_it_leaves_nothing_that_a_server_begins_with_or_all_of_it";
    let Some(rig) = Rig::start(test) else { return };
    let (made, writes) = rig.restore("/whole", usize::MAX);
    assert_eq!(made.unwrap().revision, REVISIONS);
    assert!(writes > 15, "{writes} writes: there is little to be killed at");
    rig.check_whole("/whole");

    let (mut nothing, mut half) = (0, 0);
    for at in 0..=writes {
        let prefix = format!("/killed-{at}");
        let (made, _) = rig.restore(&prefix, at);
        if rig.has(&prefix, founding::KEY) {
            assert!(at == writes, "the cluster begins with the last write, not with {at} of {writes}");
            rig.check_whole(&prefix);
            continue;
        }
        assert!(made.is_err());
        if rig.has(&prefix, founding::RESTORING) {
            let refused = rig.share(&prefix).unwrap_err().to_string();
            assert!(refused.contains("goes on or was ended half-way"), "{refused}");
            half += 1;
        } else {
            assert!(!rig.has(&prefix, "head"));
            nothing += 1;
        }
        // And killed once more, while it removes what is there.
        assert!(rig.restore(&prefix, 2).0.is_err());
        rig.restore(&prefix, usize::MAX).0.unwrap();
        rig.check_whole(&prefix);
    }
    println!("{writes} writes: {nothing} times nothing was left, {half} times a half");
    assert!(half > 10, "{half}");
}

#[test]
fn a_prefix_that_is_in_use_is_refused_and_left_as_it_is() {
    let Some(rig) = Rig::start("a_prefix_that_is_in_use_is_refused_and_left_as_it_is") else { return };
    rig.share("/used").unwrap();
    let before = Kv::keys(&rig.etcd, "/used/", 100).unwrap();
    let refused = rig.restore("/used", usize::MAX).0.unwrap_err().to_string();
    assert!(refused.contains("there is a cluster in etcd below /used already (/used/founding)"), "{refused}");
    assert!(refused.contains("etcdctl del --prefix /used/"), "{refused}");
    assert_eq!(Kv::keys(&rig.etcd, "/used/", 100).unwrap(), before);

    // Somebody leads: a server, or another restore.
    let seat = rig.seat("/led");
    let (etcd, file) = (rig.etcd.clone(), rig.file.clone());
    let refused = rig.etcd.wait(async move { take_seat(&etcd, "/led").await.map(drop) });
    assert!(refused.unwrap_err().to_string().contains("another restore runs on it"));
    rig.give_up(seat);
    assert!(file.exists());

    // Certificates of a cluster that etcd does not have begin no other.
    rig.restore("/moved", usize::MAX).0.unwrap();
    rig.share("/moved").unwrap();
    for key in Kv::keys(&rig.etcd, "/moved/", 10_000).unwrap() {
        let gone = etcd::delete(String::from_utf8(key.key).unwrap());
        Kv::txn(&rig.etcd, pb::TxnRequest { compare: vec![], success: vec![gone], failure: vec![] }).unwrap();
    }
    let refused = rig.share("/moved").unwrap_err().to_string();
    assert!(
        refused.contains("holds the certificates of a cluster") && refused.contains("--store"),
        "{refused}"
    );
    assert!(!rig.has("/moved", founding::KEY));
    // Those of the cluster that is restored are taken up, under another epoch.
    rig.restore("/moved", usize::MAX).0.unwrap();
    rig.check_whole("/moved");
}

/// After the marker was written every try would fail in the same way.
#[test]
fn a_value_that_etcd_does_not_take_is_refused_before_anything_is_written() {
    let noise: Vec<u8> = (0..2_000_000).map(|_| rand::random_range(b' '..=b'~')).collect();
    let made = revision(2, None);
    let Some(Value::Pod(mut pod)) = made.changes[0].new.clone() else { panic!("it is a pod") };
    Arc::make_mut(&mut pod).message = String::from_utf8(noise).unwrap();
    let item = Item::Value(made.changes[0].key.clone(), Value::Pod(pod));
    assert!(matches!(EtcdStore::takes(&item), Err(StoreError::TooLarge { .. })));
}
