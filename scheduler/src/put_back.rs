//! An etcd that was put back from a snapshot of its own (`etcdctl snapshot restore`) holds what was, and none of it says so.
//!
//! The server that takes the lead compares what etcd says of itself with what the leader before has kept in it
//! ([`Standing`]). When etcd has not come as far, the server goes on as after a restore of a backup: another epoch, numbers that leap, and
//! no place yet for what there may only be one of. The standing is kept after all of that: a server that dies half-way
//! leaves it for the next one to find.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::{error, warn};

use crate::{
    election::Seat,
    etcd::{self, Etcd, EtcdError, Right as _, Said, Standing, pb},
    store::StoreError,
};

/// Where in etcd a leader keeps how far that has come.
pub(crate) const KEY: &str = "standing";

/// What a leader keeps.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Kept {
    standing: Standing,
    /// How long leases are that it grants.
    lease_ms: u64,
}

/// What etcd says of itself, and what was kept.
pub(crate) struct Look {
    /// Unless it does not tell.
    said: Option<Said>,
    kept: Option<Kept>,
}

impl Look {
    /// Looks before anything that etcd holds is believed.
    pub(crate) async fn take(etcd: &Etcd, prefix: &str) -> Result<Look, EtcdError> {
        let said = match etcd.said(&key(prefix)).await {
            Err(EtcdError::Refused { cause, .. }) => {
                warn!(%cause, "etcd does not say how far it has come: a snapshot that is put back is not noticed");
                None
            }
            said => Some(said?),
        };
        let found = etcd.get(&key(prefix)).await?;
        // One that does not read is nobody's: it was put back, or damaged.
        let none = Kept { standing: Standing::NONE, lease_ms: 0 };
        let kept = found.map(|found| serde_json::from_slice(&found.value).unwrap_or(none));
        Ok(Look { said, kept })
    }

    /// If etcd was put back: how long leases were that may still run. Without anything kept nobody knows.
    pub(crate) fn lease_before(&self) -> Option<u64> {
        let (said, kept) = self.said.zip(self.kept)?;
        let why = said.put_back(&kept.standing)?;
        error!(
            why,
            "etcd was put back to what it once held: the cluster goes on as after a restore of a backup, with another epoch"
        );
        Some(kept.lease_ms)
    }

    /// Keeps how far etcd has come by now.
    pub(crate) async fn keep(
        &self,
        etcd: &Etcd,
        prefix: &str,
        seat: &Seat,
        lease: Duration,
    ) -> Result<(), StoreError> {
        let Some(said) = self.said else { return Ok(()) };
        let request = pb::RangeRequest { key: key(prefix).into(), ..pb::RangeRequest::default() };
        let revision = etcd.range(request).await?.header.map_or(i64::MAX, |header| header.revision);
        let lease_ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        write(etcd, prefix, seat, Kept { standing: said.standing(revision), lease_ms }).await
    }
}

/// The store holds less than this server had written to it: whoever leads next goes on as after a restore.
pub(crate) async fn tell(etcd: &Etcd, prefix: &str, seat: &Seat, lease: Duration) -> Result<(), StoreError> {
    let lease_ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
    write(etcd, prefix, seat, Kept { standing: Standing::NONE, lease_ms }).await
}

async fn write(etcd: &Etcd, prefix: &str, seat: &Seat, kept: Kept) -> Result<(), StoreError> {
    let value = serde_json::to_vec(&kept).expect("numbers are JSON");
    let compare = vec![etcd::created_at(seat.key(), seat.fence())];
    let request =
        pb::TxnRequest { compare, success: vec![etcd::put(key(prefix), value, 0)], failure: vec![] };
    if etcd.txn(request).await?.succeeded { Ok(()) } else { Err(StoreError::Deposed) }
}

fn key(prefix: &str) -> String {
    format!("{prefix}/{KEY}")
}
