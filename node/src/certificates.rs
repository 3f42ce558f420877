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
use hextet_api::connect::{self, Credentials};
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
    present: Mutex<Present>,
}

struct Present {
    identity: Identity,
    renewed: Option<Instant>,
}

impl Certificates {
    pub(crate) fn new(store: Arc<Store>, identity: Identity) -> Certificates {
        Certificates { store, present: Mutex::new(Present { identity, renewed: None }) }
    }

    /// What the next connection is made with.
    pub(crate) fn credentials(&self) -> Credentials {
        self.lock().identity.credentials.clone()
    }

    /// Whether the certificate ends soon by this machine's clock.
    pub(crate) fn is_due(&self) -> bool {
        let present = self.lock();
        let rests = present.renewed.is_some_and(|renewed| renewed.elapsed() < RENEW_PAUSE);
        !rests && present.identity.credentials.is_due(SystemTime::now())
    }

    /// Asks for another key and certificate over `channel`; gives a connection that was made with them.
    pub(crate) async fn renew(&self, channel: Channel) -> Result<Channel> {
        let renewing = async {
            let old = self.credentials();
            let new = connect::renew(&old, channel).await?;
            self.keep(&old, &new).await?;
            info!("the node has a new certificate");
            Ok(connect::confirm(&new).await?)
        };
        timeout(RENEW_MAX, renewing).await.context("the server does not answer")?
    }

    async fn keep(&self, old: &Credentials, new: &Credentials) -> Result<()> {
        let (store, mut identity) = (self.store.clone(), self.lock().identity.clone());
        (identity.credentials, identity.previous) = (new.clone(), Some(old.clone()));
        let kept = identity.clone();
        tokio::task::spawn_blocking(move || store.save_identity(&kept)).await??;
        let mut present = self.lock();
        (present.identity, present.renewed) = (identity, Some(Instant::now()));
        Ok(())
    }

    /// The server does not know the key: the next connection is made with the one before it, and the one after that with
    /// this one again.
    pub(crate) fn not_known(&self) {
        let Identity { credentials, previous: Some(previous), .. } = &mut self.lock().identity else {
            return;
        };
        std::mem::swap(credentials, previous);
        debug!("the server does not know this node's key: trying the one before it");
    }

    fn lock(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
