//! The node's key and certificate, and how others take their place while it is attached.
//!
//! What is new is kept before it is used, and the server takes the old until then: whenever the node is stopped, what its
//! store holds is good. The key before the present one is kept, too: a server that was put back from a backup may know
//! no other.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use hextet_api::{
    connect::{self, Credentials},
    token::{Fingerprint, SERVERS_MAX, is_host_and_port},
};
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tracing::{debug, info};

use crate::{identity::Identity, store::Store};

/// How long a renewal may take.
const RENEW_MAX: Duration = Duration::from_secs(10);
/// The least time between two renewals: a clock that is far ahead makes every certificate look old.
const RENEW_PAUSE: Duration = Duration::from_secs(24 * 3600);

/// What the node shows to servers, from the next connection on.
pub(crate) struct Certificates {
    store: Arc<Store>,
    /// Which machine this is, for a server that knows of another.
    machine: String,
    present: Mutex<Present>,
}

struct Present {
    identity: Identity,
    renewed: Option<Instant>,
    /// The CA that makes certificates, as the server says.
    issuing: Option<Fingerprint>,
}

impl Certificates {
    pub(crate) fn new(store: Arc<Store>, identity: Identity, machine: String) -> Certificates {
        Certificates {
            store,
            machine,
            present: Mutex::new(Present { identity, renewed: None, issuing: None }),
        }
    }

    /// What the next connection is made with.
    pub(crate) fn credentials(&self) -> Credentials {
        self.lock().identity.credentials.clone()
    }

    /// The server says which CA makes certificates. Whether it is another than that of this node's.
    pub(crate) fn ca(&self, told: &[u8]) -> bool {
        let Ok(told) = told.try_into().map(Fingerprint) else { return false };
        let mut present = self.lock();
        present.issuing = Some(told);
        present.has_another_ca()
    }

    /// Whether the certificate ends soon by this machine's clock, or is of a CA that goes out of use.
    pub(crate) fn is_due(&self) -> bool {
        let present = self.lock();
        if present.has_another_ca() {
            return true;
        }
        let rests = present.renewed.is_some_and(|renewed| renewed.elapsed() < RENEW_PAUSE);
        !rests && present.identity.credentials.is_due(SystemTime::now())
    }

    /// Asks for another key and certificate over `channel`; gives a connection that was made with them.
    pub(crate) async fn renew(&self, channel: Channel) -> Result<Channel> {
        let renewing = async {
            let old = self.credentials();
            let new = connect::renew(&old, channel, &self.machine).await?;
            self.keep(&old, &new).await?;
            info!("the node has a new certificate");
            Ok(connect::confirm(&new).await?)
        };
        timeout(RENEW_MAX, renewing).await.context("the server does not answer")?
    }

    async fn keep(&self, old: &Credentials, new: &Credentials) -> Result<()> {
        let (store, mut identity) = (self.store.clone(), self.lock().identity.clone());
        (identity.credentials, identity.previous) = (new.clone(), Some(old.clone()));
        identity.remember_ca(old.ca_fingerprint());
        let kept = identity.clone();
        tokio::task::spawn_blocking(move || store.save_identity(&kept)).await??;
        let mut present = self.lock();
        (present.identity, present.renewed) = (identity, Some(Instant::now()));
        Ok(())
    }

    /// The server says where all servers are: from the next connection on these are tried.
    pub(crate) async fn servers(&self, told: &[String]) -> Result<()> {
        let mut identity = self.lock().identity.clone();
        let Some(servers) = merged(&identity.credentials.servers, told) else { return Ok(()) };
        identity.name_servers(&servers);
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || store.save_identity(&identity)).await??;
        info!(?servers, "there are other servers than before");
        self.lock().identity.name_servers(&servers);
        Ok(())
    }

    /// The server does not know the key, or its CA is not the one that this node knows: the next connection is made with the one before it, and the one after that with
    /// this one again.
    pub(crate) fn not_known(&self) {
        let Identity { credentials, previous: Some(previous), .. } = &mut self.lock().identity else {
            return;
        };
        std::mem::swap(credentials, previous);
        debug!("the server does not know this node's key or CA: trying those before them");
    }

    fn lock(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Present {
    fn has_another_ca(&self) -> bool {
        self.issuing.is_some_and(|issuing| issuing != self.identity.credentials.ca_fingerprint())
    }
}

/// The servers that a node knows from now on; none when they are the same. The first that it knew stays, whatever it is
/// told: it was reached from here.
fn merged(known: &[String], told: &[String]) -> Option<Vec<String>> {
    let told: Vec<&String> = told.iter().filter(|server| is_host_and_port(server)).collect();
    if told.is_empty() {
        return None;
    }
    let stay = known.iter().enumerate().filter(|(number, server)| *number == 0 || told.contains(server));
    let come = told.iter().copied().filter(|server| !known.contains(server));
    let all: Vec<String> =
        stay.map(|(_, server)| server).chain(come).take(SERVERS_MAX + 1).cloned().collect();
    (all != known).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those that it had are remembered, so that a token of before is told from one of another cluster.
    #[test]
    fn a_certificate_is_due_when_another_ca_makes_them() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&dir.path().join("node.redb")).unwrap());
        let identity = crate::identity::tests::identity();
        let own = identity.credentials.ca_fingerprint();
        let mut certificates = Certificates::new(store, identity, String::new());
        assert!(!certificates.ca(&[]) && !certificates.ca(&own.0) && !certificates.is_due());
        assert!(certificates.ca(&[7; 32]) && certificates.is_due());
        // It was renewed a moment ago, and the CA is replaced again.
        certificates.present.get_mut().unwrap().renewed = Some(Instant::now());
        assert!(certificates.is_due());
        assert!(!certificates.ca(&own.0) && !certificates.is_due(), "the way back was taken");
    }

    #[test]
    fn servers_come_and_go_and_the_first_stays() {
        let list = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let merged = |known, told| merged(&list(known), &list(told)).map(|all| all.join(" "));
        assert_eq!(merged("a:1 b:1", ""), None, "nothing new");
        assert_eq!(merged("a:1 b:1", "b:1 a:1"), None, "the same");
        assert_eq!(merged("a:1 b:1", "a:1 c:1"), Some("a:1 c:1".to_owned()));
        assert_eq!(merged("a:1", "c:1 b:1"), Some("a:1 c:1 b:1".to_owned()));
        assert_eq!(merged("a:1", "no-port"), None, "a server that lies");
        let many = (1..100).map(|port| format!("s:{port}")).collect::<Vec<_>>().join(" ");
        assert_eq!(merged("a:1", &many).unwrap().split(' ').count(), SERVERS_MAX + 1);
    }
}
