//! Which server leads: the one whose lease holds the leader's key in etcd.
//!
//! Whoever writes names the revision at which that key was made ([`Seat::fence`]), and etcd refuses the write
//! when another key has taken its place. A leader that does not know yet that it was deposed can therefore
//! do no harm; the clock only decides how soon it knows.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use scheduler_core::{tenure::Tenure, time::Moment};

use crate::etcd::{self, Etcd, EtcdError, Right, pb};

/// The shortest lease that etcd gives with its usual settings: one and a half election timeouts, in whole seconds.
const LEASE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(100);
/// How often a follower looks by itself, should a watch be silent.
const LOOK: Duration = Duration::from_secs(1);

/// The leader's entry: who it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leader {
    /// Where it is reached, `host:port`.
    pub(crate) addresses: Vec<String>,
}

/// The right to write, for as long as the lease lives.
#[derive(Clone)]
pub(crate) struct Seat(Arc<Inner>);

struct Inner {
    etcd: Etcd,
    key: String,
    lease: i64,
    fence: i64,
    lost: watch::Receiver<bool>,
    keeper: AbortHandle,
}

/// What came of standing for election.
pub(crate) enum Outcome {
    Leads(Seat),
    Follows(Followed),
}

/// Another server leads.
#[derive(Clone, Debug)]
pub(crate) struct Followed {
    pub(crate) leader: Leader,
    fence: i64,
    /// Of etcd, when that was read.
    revision: i64,
}

/// Takes the leader's key for this server if it is free.
pub(crate) async fn stand(etcd: &Etcd, prefix: &str, leader: &Leader) -> Result<Outcome, EtcdError> {
    let key = format!("{prefix}/leader");
    if let Some(followed) = look(etcd, &key).await? {
        return Ok(Outcome::Follows(followed));
    }
    let asked = Instant::now();
    let (lease, ttl) = etcd.grant(LEASE).await?;
    let value = serde_json::to_vec(leader).expect("addresses are text");
    let taken = etcd.txn(etcd::claim(&key, value, lease)).await;
    match taken {
        Ok(response) if response.succeeded => {
            let fence = response.header.map_or(0, |header| header.revision);
            Ok(Outcome::Leads(Seat::new(etcd, key, lease, fence, asked + ttl)))
        }
        // Another was faster, or nobody knows: the lease takes the key with it.
        other => {
            let _ = etcd.revoke(lease).await;
            other?;
            let followed = look(etcd, &key).await?;
            followed.map(Outcome::Follows).ok_or_else(|| EtcdError::Unreachable {
                endpoints: etcd.endpoints().to_owned(),
                cause: "the leader's key is being taken".to_owned(),
            })
        }
    }
}

/// Who leads.
async fn look(etcd: &Etcd, key: &str) -> Result<Option<Followed>, EtcdError> {
    let request = pb::RangeRequest { key: key.into(), ..pb::RangeRequest::default() };
    let mut answer = etcd.range(request).await?;
    let revision = answer.header.map_or(0, |header| header.revision);
    Ok(answer.kvs.pop().map(|found| Followed {
        leader: serde_json::from_slice(&found.value).unwrap_or(Leader { addresses: vec![] }),
        fence: found.create_revision,
        revision,
    }))
}

/// Returns when the leader has changed or gone. An etcd that does not answer changes nothing.
pub(crate) async fn deposed(etcd: &Etcd, prefix: &str, followed: &Followed) {
    gone(etcd, &format!("{prefix}/leader"), followed).await;
}

/// Takes the lead from a leader whose process has died, before its lease ends. Should it live after all, it can
/// write no more.
pub(crate) async fn depose(etcd: &Etcd, prefix: &str, followed: &Followed) -> Result<(), EtcdError> {
    let key = format!("{prefix}/leader");
    etcd.txn(etcd::deposition(key, followed.fence)).await.map(drop)
}

async fn gone(etcd: &Etcd, key: &str, followed: &Followed) {
    let mut revision = followed.revision;
    loop {
        let watched = timeout(LOOK, etcd.deleted(key, revision)).await;
        match look(etcd, key).await {
            Ok(Some(now)) if now.fence == followed.fence => revision = now.revision,
            Ok(_) => return,
            Err(error) => debug!(%error, "cannot see who leads"),
        }
        if !matches!(watched, Err(_) | Ok(Ok(()))) {
            sleep(RETRY).await;
        }
    }
}

impl Seat {
    fn new(etcd: &Etcd, key: String, lease: i64, fence: i64, until: Instant) -> Seat {
        let (lost, is_lost) = watch::channel(false);
        let keeper = {
            let (own, key) = (etcd.clone(), key.clone());
            etcd.spawn(async move {
                let mine = Followed { leader: Leader { addresses: vec![] }, fence, revision: fence };
                tokio::select! {
                    () = keep(&own, lease, until) => {}
                    () = gone(&own, &key, &mine) => warn!("the lead is lost: the leader's key has gone from etcd"),
                }
                lost.send_replace(true);
            })
        };
        let keeper = keeper.abort_handle();
        Seat(Arc::new(Inner { etcd: etcd.clone(), key, lease, fence, lost: is_lost, keeper }))
    }

    #[cfg(test)]
    pub(crate) fn lease(&self) -> i64 {
        self.0.lease
    }

    /// Resolves when the lease has ended, as far as this server knows.
    pub(crate) async fn lost(&self) {
        let mut lost = self.0.lost.clone();
        // The keeper has gone: nobody keeps the lease.
        let _ = lost.wait_for(|lost| *lost).await;
    }

    /// Lets the next server lead at once.
    pub(crate) async fn give_up(&self) {
        self.0.keeper.abort();
        if let Err(error) = self.0.etcd.revoke(self.0.lease).await {
            warn!(%error, "cannot give the lead up: it ends with its lease");
        }
    }
}

impl Right for Seat {
    fn key(&self) -> &str {
        &self.0.key
    }

    fn fence(&self) -> i64 {
        self.0.fence
    }

    fn is_lost(&self) -> bool {
        *self.0.lost.borrow()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// Keeps the lease alive until it has ended.
async fn keep(etcd: &Etcd, lease: i64, until: Instant) {
    let begun = Instant::now();
    let now = || Moment(begun.elapsed());
    let mut tenure = Tenure::new(Moment::default(), until - begun);
    loop {
        let asked = now();
        let Some(left) = tenure.left(asked) else {
            warn!("the lead is lost: etcd was not reached for the time of a lease");
            return;
        };
        match timeout(left, etcd.keep_alive(lease)).await {
            Ok(Ok(Duration::ZERO)) => {
                warn!("the lead is lost: etcd has ended its lease");
                return;
            }
            Ok(Ok(length)) => {
                tenure.kept(asked, length, now());
                sleep(Tenure::pause(length)).await;
            }
            Ok(Err(error)) => {
                debug!(%error, "a lease was not kept alive");
                sleep(RETRY).await;
            }
            Err(_) => {}
        }
    }
}
