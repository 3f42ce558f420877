//! A backup becomes a cluster in etcd, below a prefix that no cluster has.
//!
//! # What a restore leaves that was ended half-way
//! The key `/restoring`. It is written before anything else, and one last transaction takes it away and writes `/founding`,
//! which every server begins with. Whoever finds `/restoring` begins nothing; the next restore removes what is there and
//! starts anew. Each transaction relies on the leader's key: what is left on its way of another restore is refused.

use std::time::{Duration, Instant};

use anyhow::bail;
use tokio::{task::spawn_blocking, time::sleep};

use super::*;
use crate::{
    election::{self, Leader, Outcome, Seat},
    etcd::{self, Etcd, Kv, Location, Right, pb},
    put_back,
    store::EtcdStore,
};

/// How long the leader's key is waited for: that of a server or a restore that was killed ends with its lease.
const SEAT_MAX: Duration = Duration::from_secs(5);
/// Between two tries.
const RETRY: Duration = Duration::from_millis(100);
/// Keys that are removed at a time.
const REMOVED_AT_A_TIME: i64 = 100;
/// Where a cluster has its keys, but for who leads, which servers there are, and `/restoring`.
const FOLDERS: [&str; 4] = ["current/", "address/", "log/", "piece/"];
const KEYS: [&str; 3] = [founding::KEY, "head", put_back::KEY];

/// Makes a cluster in etcd of a backup, for `netctl server --store` to go on with. The whole file is checked before anything is
/// written.
///
/// # Errors
/// A server runs on it, or there is a cluster; the file is not a whole backup or one of a damaged store that is not to be
/// taken; etcd does not answer, is full, or does not take a value of that size.
pub async fn restore_into_etcd(
    file: &Path,
    location: &Location,
    incomplete: Incomplete,
) -> anyhow::Result<Restored> {
    let backup = Checked::read(file, incomplete, EtcdStore::takes)?;
    let etcd = Etcd::new(location)?;
    let seat = take_seat(&etcd, &location.prefix).await?;
    let below = Below { etcd, prefix: location.prefix.clone(), seat: seat.clone() };
    let made = spawn_blocking(move || below.restore(&backup, Clock::start())).await;
    seat.give_up().await;
    made.context("the thread that restores has ended")?
}

async fn take_seat(etcd: &Etcd, prefix: &str) -> anyhow::Result<Seat> {
    let end = Instant::now() + SEAT_MAX;
    loop {
        let followed = match election::stand(etcd, prefix, &Leader { addresses: vec![] }).await? {
            Outcome::Leads(seat) => return Ok(seat),
            Outcome::Follows(followed) => followed,
        };
        if Instant::now() > end {
            let who = match followed.leader.addresses.first() {
                Some(address) => format!("a server runs on it, reached at {address}: end every server"),
                None => "another restore runs on it: wait for it".to_owned(),
            };
            bail!(
                "nothing is restored below {prefix} of etcd at {}: {who}, or give another prefix with --store etcd://HOST:PORT/PREFIX",
                etcd.endpoints()
            );
        }
        sleep(RETRY).await;
    }
}

/// A part of etcd, for who has its leader's key.
pub(super) struct Below<K, S> {
    pub(super) etcd: K,
    pub(super) prefix: String,
    pub(super) seat: S,
}

impl<K: Kv + Clone, S: Right + Clone> Below<K, S> {
    pub(super) fn restore(&self, backup: &Checked, clock: Clock) -> anyhow::Result<Restored> {
        self.claim()?;
        let epoch = founding::random_epoch();
        let store = EtcdStore::open(self.etcd.clone(), &self.prefix, &epoch, self.seat.clone())?;
        let items = backup.fill(&mut |items| store.fill(items))?;
        let revision = go_on(&store, backup.begun.lease_ms, clock)?;
        self.finish(&founding::Shared::new(&epoch, backup.begun.keyring.clone()))?;
        Ok(Restored { revision, items, epoch, missing: backup.missing() })
    }

    fn key(&self, rest: &str) -> String {
        format!("{}/{rest}", self.prefix)
    }

    /// From here on no server begins here, until the restore has come to its end.
    fn claim(&self) -> anyhow::Result<()> {
        if self.etcd.get(&self.key(founding::RESTORING))?.is_some() {
            return self.remove_unfinished();
        }
        if let Some(found) = self.first_key()? {
            bail!(
                "there is a cluster in etcd below {0} already ({found}): restore below another prefix with --store \
                 etcd://HOST:PORT/PREFIX, or, if nobody needs it any more, remove it first: `etcdctl del --prefix {0}/`",
                self.prefix
            );
        }
        let absent =
            [founding::RESTORING, founding::KEY, "head"].map(|key| etcd::created_at(&self.key(key), 0));
        self.write(absent.to_vec(), vec![etcd::put(self.key(founding::RESTORING), vec![], 0)])
    }

    /// A key of a cluster.
    fn first_key(&self) -> anyhow::Result<Option<String>> {
        for key in KEYS.map(|key| self.key(key)) {
            if self.etcd.get(&key)?.is_some() {
                return Ok(Some(key));
            }
        }
        for folder in FOLDERS {
            let (found, _) = self.etcd.page(&mut self.keys_of(folder, 1))?;
            if let Some(found) = found.first() {
                return Ok(Some(String::from_utf8_lossy(&found.key).into_owned()));
            }
        }
        Ok(None)
    }

    fn keys_of(&self, folder: &str, limit: i64) -> pb::RangeRequest {
        let prefix = self.key(folder);
        let (key, range_end) = (prefix.as_str().into(), etcd::after(&prefix));
        pb::RangeRequest { key, range_end, limit, revision: 0, keys_only: true }
    }

    fn remove_unfinished(&self) -> anyhow::Result<()> {
        for folder in FOLDERS {
            let mut request = self.keys_of(folder, REMOVED_AT_A_TIME);
            loop {
                let (found, more) = self.etcd.page(&mut request)?;
                let keys = found.iter().map(|found| String::from_utf8_lossy(&found.key).into_owned());
                self.write(vec![], keys.map(etcd::delete).collect())?;
                if !more {
                    break;
                }
            }
        }
        self.write(vec![], KEYS.map(|key| etcd::delete(self.key(key))).to_vec())
    }

    /// All of it is there: the cluster begins.
    fn finish(&self, shared: &founding::Shared) -> anyhow::Result<()> {
        let (founding, restoring) = (self.key(founding::KEY), self.key(founding::RESTORING));
        let value = serde_json::to_vec(shared)?;
        let operations = vec![etcd::put(founding.clone(), value.clone(), 0), etcd::delete(restoring)];
        let written = self.write(vec![etcd::created_at(&founding, 0)], operations);
        // It may be there although nobody has said so.
        match self.etcd.get(&founding) {
            Ok(Some(found)) if found.value == value => Ok(()),
            _ => written,
        }
    }

    fn write(&self, mut compare: Vec<pb::Compare>, success: Vec<pb::RequestOp>) -> anyhow::Result<()> {
        compare.push(etcd::created_at(self.seat.key(), self.seat.fence()));
        let answer = self.etcd.txn(pb::TxnRequest { compare, success, failure: vec![] })?;
        ensure!(
            answer.succeeded,
            "a server or another restore has begun on etcd below {} meanwhile: end it and restore again",
            self.prefix
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests;
