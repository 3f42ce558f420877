//! How a cluster begins: [`init`] makes its state directory, and a server that finds none does the same with what
//! is usual. What is decided here is kept for ever.

use std::{fs, os::unix::fs::DirBuilderExt as _, path::Path, sync::Arc};

use anyhow::{Context as _, bail, ensure};
use hextet_address::{ClusterPrefix, NodePrefix};
use ipnetwork::Ipv4Network;
use rand::Rng as _;
use scheduler_core::{
    cluster::Cluster,
    event::Event,
    state::State,
    transition::{Context, Origin, handle},
};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tracing::warn;

use crate::{
    clock::Clock,
    election::Seat,
    etcd::{self, Etcd, Right as _, pb},
    hub::Hub,
    pki::{self, Authority, Keyring, Pki},
    remains,
    server::StoreChoice,
    several,
    store::{RedbStore, Store, StoreError},
};

/// The range that every node hands out to its pods, when nothing is said.
pub const POD_IPV4: &str = "10.254.0.0/20";

/// The store's name in the state directory.
pub(crate) const FILE: &str = "server.redb";

/// Where in etcd is what several servers share.
pub(crate) const KEY: &str = "founding";
/// Is in etcd while a restore goes on, or was ended half-way.
pub(crate) const RESTORING: &str = "restoring";

/// How what several servers share is written.
const SHARED_FORMAT: &str = "hextet-etcd-1";

/// What is decided when a cluster begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Founding {
    /// The /64 of a LAN: nodes on it give their pods addresses of it. None: each node has a /64 of its own.
    pub pod_prefix: Option<NodePrefix>,
    /// The private range that every node hands out to its own pods; none for [`POD_IPV4`].
    pub pod_ipv4: Option<Ipv4Network>,
}

/// An open state directory.
pub(crate) struct Opened {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) pki: Arc<Pki>,
    pub(crate) keeper: Keeper,
    pub(crate) state: State,
}

/// Makes a new cluster, for `netctl server` to go on with.
///
/// # Errors
/// There is a cluster already, a server has the directory, or it cannot be written.
pub async fn init(dir: &Path, store: &StoreChoice, founding: Founding) -> anyhow::Result<Arc<Cluster>> {
    founding.pod_ipv4.map_or(Ok(()), check_pod_ipv4)?;
    match store {
        StoreChoice::Local => init_local(dir, founding),
        StoreChoice::Etcd(location) => several::init(location, dir, founding).await,
    }
}

fn init_local(dir: &Path, founding: Founding) -> anyhow::Result<Arc<Cluster>> {
    let clock = Clock::start();
    remains::check(dir)?;
    make(dir)?;
    let (store, state) = load(Arc::new(RedbStore::open(&dir.join(FILE))?))?;
    if state.cluster().is_none() {
        Pki::open(&dir.join("pki"), store.epoch(), true, clock.wall())?;
    }
    only_first(state, store.as_ref(), founding, clock, &dir.display().to_string())
}

/// Opens or makes the store, the certificates and the cluster, in this order, so that a crash in between
/// leaves nothing that the next start does not finish. What is only a part of a cluster is left as it is.
pub(crate) async fn open(dir: &Path, pod_ipv4: Option<Ipv4Network>, clock: Clock) -> anyhow::Result<Opened> {
    remains::check(dir)?;
    make(dir)?;
    let pki_dir = dir.join("pki");
    let store = RedbStore::open_when_free(&dir.join(FILE), &pki::epoch(&pki_dir)).await?;
    let (store, mut state) = load(store)?;
    let is_new = state.cluster().is_none() && store.damage().is_none();
    let pki = Pki::open(&pki_dir, store.epoch(), is_new, clock.wall())?;
    if is_new {
        found(&mut state, store.as_ref(), Founding { pod_ipv4, ..Founding::default() }, clock)?;
    }
    tell_kept(&state, pod_ipv4);
    Ok(Opened { store, pki: Arc::new(pki), keeper: Keeper::Folder, state })
}

/// What several servers share from the first one's start: who they are. It is in etcd, and whoever can read
/// that can be any of them.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Shared {
    format: String,
    epoch: String,
    authority: Authority,
    /// CAs besides the one that makes certificates, as in [`Keyring`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    others: Vec<Authority>,
    /// The revision of etcd at which it was written.
    #[serde(skip)]
    written: i64,
}

impl Shared {
    pub(crate) fn new(epoch: &str, keyring: Keyring) -> Shared {
        let Keyring { issuing: authority, others } = keyring;
        Shared { format: SHARED_FORMAT.to_owned(), epoch: epoch.to_owned(), authority, others, written: 0 }
    }

    pub(crate) fn epoch(&self) -> &str {
        &self.epoch
    }

    /// This server's certificates, in the folder `dir`.
    pub(crate) fn pki(&self, dir: &Path, clock: Clock) -> anyhow::Result<Arc<Pki>> {
        let pki =
            Pki::open_shared(&dir.join("pki"), &self.epoch, &self.keyring(), self.written, clock.wall())?;
        Ok(Arc::new(pki))
    }

    /// Uses the CAs that are there by now.
    pub(crate) fn tell(&self, pki: &Pki, clock: Clock) {
        if let Err(error) = pki.take(self.keyring(), self.written, clock.wall()) {
            warn!("the CAs in etcd cannot be used: {:#}", anyhow::Error::from(error));
        }
    }

    fn keyring(&self) -> Keyring {
        Keyring { issuing: self.authority.clone(), others: self.others.clone() }
    }

    fn of(found: &pb::KeyValue, key: &str) -> anyhow::Result<Shared> {
        let mut shared: Shared =
            serde_json::from_slice(&found.value).with_context(|| format!("{key} in etcd is damaged"))?;
        ensure!(
            shared.format == SHARED_FORMAT,
            "{key} in etcd has format {:?}, this program reads {SHARED_FORMAT:?}: use the version of netctl that wrote it",
            shared.format
        );
        shared.written = found.mod_revision;
        Ok(shared)
    }
}

/// Where the keys of the CAs are kept.
pub(crate) enum Keeper {
    /// In the folder of the one server.
    Folder,
    /// In etcd, for all servers, as long as this one leads.
    Etcd(Etcd, String, Seat),
}

impl Keeper {
    /// Keeps the keys, and uses them from then on.
    pub(crate) async fn keep(&self, hub: &Hub, keyring: Keyring) -> anyhow::Result<()> {
        let (pki, now) = (hub.pki.clone(), hub.clock.wall());
        let version = match self {
            Keeper::Folder => pki.loaded().version + 1,
            Keeper::Etcd(etcd, prefix, seat) => keep_in_etcd(etcd, prefix, seat, keyring.clone()).await?,
        };
        let is_copy = matches!(self, Keeper::Etcd(..));
        spawn_blocking(move || {
            match pki.keep(&keyring) {
                // What is in etcd counts.
                Err(error) if is_copy => warn!("the keys of the CAs are not kept here, too: {error}"),
                kept => kept?,
            }
            Ok(pki.take(keyring, version, now)?)
        })
        .await?
    }
}

/// Gives the revision of etcd. A server that does not lead any more changes nothing.
async fn keep_in_etcd(etcd: &Etcd, prefix: &str, seat: &Seat, keyring: Keyring) -> anyhow::Result<i64> {
    let key = founding_key(prefix);
    let found = etcd.get(&key).await?.with_context(|| format!("{key} has gone from etcd"))?;
    let Keyring { issuing, others } = keyring;
    let next = Shared { authority: issuing, others, ..Shared::of(&found, &key)? };
    let compare =
        vec![etcd::created_at(seat.key(), seat.fence()), etcd::written_at(&key, found.mod_revision)];
    let success = vec![etcd::put(key, serde_json::to_vec(&next)?, 0)];
    let answer = etcd.txn(pb::TxnRequest { compare, success, failure: vec![] }).await?;
    ensure!(answer.succeeded, "another server leads by now: ask it");
    Ok(answer.header.map_or(0, |header| header.revision))
}

fn founding_key(prefix: &str) -> String {
    format!("{prefix}/{KEY}")
}

/// Gives the cluster another epoch: what is in etcd was put back. A server that does not lead any more changes nothing.
pub(crate) async fn rename(etcd: &Etcd, prefix: &str, seat: &Seat, shared: Shared) -> anyhow::Result<Shared> {
    let next = Shared { epoch: random_epoch(), ..shared };
    let key = founding_key(prefix);
    let compare = vec![etcd::created_at(seat.key(), seat.fence()), etcd::written_at(&key, next.written)];
    let success = vec![etcd::put(key, serde_json::to_vec(&next)?, 0)];
    let answer = etcd.txn(pb::TxnRequest { compare, success, failure: vec![] }).await?;
    if !answer.succeeded {
        return Err(StoreError::Deposed.into());
    }
    Ok(Shared { written: answer.header.map_or(0, |header| header.revision), ..next })
}

/// What servers share now.
pub(crate) async fn shared(etcd: &Etcd, prefix: &str) -> anyhow::Result<Shared> {
    let key = founding_key(prefix);
    let found = etcd.get(&key).await?.with_context(|| format!("{key} has gone from etcd"))?;
    Shared::of(&found, &key)
}

/// What the first server has left in etcd; the first one makes it.
pub(crate) async fn share(
    etcd: &Etcd,
    prefix: &str,
    dir: &Path,
    clock: Clock,
) -> anyhow::Result<(Shared, Arc<Pki>)> {
    make(dir)?;
    let key = founding_key(prefix);
    if etcd.get(&key).await?.is_none() {
        let restoring = format!("{prefix}/{RESTORING}");
        check_begins(etcd, prefix, &restoring, dir).await?;
        let epoch = random_epoch();
        let drawn = Shared::new(&epoch, Keyring::of(Authority::make(&epoch)?));
        let success = vec![etcd::put(key.clone(), serde_json::to_vec(&drawn)?, 0)];
        let compare = vec![etcd::created_at(&key, 0), etcd::created_at(&restoring, 0)];
        // Whoever was first: what is there then is read.
        etcd.txn(etcd::pb::TxnRequest { compare, success, failure: vec![] }).await?;
    }
    let shared = shared(etcd, prefix).await?;
    let pki = shared.pki(dir, clock)?;
    Ok((shared, pki))
}

/// Whether a cluster may begin below a prefix of etcd that has none.
async fn check_begins(etcd: &Etcd, prefix: &str, restoring: &str, dir: &Path) -> anyhow::Result<()> {
    let place = format!("etcd at {} below {prefix}", etcd.endpoints());
    if etcd.get(restoring).await?.is_some() {
        bail!(
            "{place} holds a restore that goes on or was ended half-way: wait for it, or run `netctl server restore` again; \
             nothing was changed"
        );
    }
    if dir.join("pki").exists() {
        bail!(
            "{} holds the certificates of a cluster (pki), and {place} has none: check --store, or restore a backup of it with \
             `netctl server restore FILE --store etcd://...`; a new cluster begins with an empty state directory. Nothing \
             was changed",
            dir.display()
        );
    }
    Ok(())
}

/// Goes on with what is in the store of several servers; the first one makes the cluster.
pub(crate) fn begin(
    store: Arc<dyn Store>,
    mut state: State,
    pki: Arc<Pki>,
    keeper: Keeper,
    pod_ipv4: Option<Ipv4Network>,
    clock: Clock,
) -> anyhow::Result<Opened> {
    if state.cluster().is_none() {
        found(&mut state, store.as_ref(), Founding { pod_ipv4, ..Founding::default() }, clock)?;
    }
    tell_kept(&state, pod_ipv4);
    Ok(Opened { store, pki, keeper, state })
}

/// Makes the cluster of a store that has none.
pub(crate) fn only_first(
    mut state: State,
    store: &dyn Store,
    founding: Founding,
    clock: Clock,
    place: &str,
) -> anyhow::Result<Arc<Cluster>> {
    if let Some(cluster) = state.cluster() {
        bail!(
            "there is a cluster in {place} already, {}: `netctl server` runs it; its prefixes are kept for ever",
            cluster.prefix
        );
    }
    found(&mut state, store, founding, clock)?;
    state.cluster().cloned().context("a new cluster is a change")
}

pub(crate) fn random_epoch() -> String {
    format!("{:032x}", rand::rng().random::<u128>())
}

fn tell_kept(state: &State, pod_ipv4: Option<Ipv4Network>) {
    let kept = state.cluster().map(|cluster| cluster.pod_ipv4);
    if let (Some(kept), Some(asked)) = (kept, pod_ipv4.filter(|asked| Some(*asked) != kept)) {
        warn!(%kept, %asked, "the cluster keeps the --pod-ipv4 that it began with");
    }
}

/// Refuses a range that pods cannot have.
pub(crate) fn check_pod_ipv4(range: Ipv4Network) -> anyhow::Result<()> {
    let (bits, network) = (range.prefix(), range.network());
    ensure!((8..=28).contains(&bits), "--pod-ipv4 is a network of /8 to /28, such as {POD_IPV4}");
    ensure!(network == range.ip(), "--pod-ipv4: did you mean {network}/{bits}?");
    ensure!(network.is_private(), "--pod-ipv4 is a private network (RFC 1918), such as {POD_IPV4}");
    Ok(())
}

pub(crate) fn make(dir: &Path) -> anyhow::Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| format!("cannot make {}", dir.display()))
}

fn load(store: Arc<dyn Store>) -> anyhow::Result<(Arc<dyn Store>, State)> {
    let (revision, values) = store.load()?;
    Ok((store, State::load(revision, values)))
}

fn found(state: &mut State, store: &dyn Store, founding: Founding, clock: Clock) -> anyhow::Result<()> {
    let mut rng = rand::rng();
    let usual = POD_IPV4.parse().expect("the usual range is one");
    let cluster = Cluster {
        prefix: ClusterPrefix::generate(&mut rng),
        pod_prefix: founding.pod_prefix,
        pod_ipv4: founding.pod_ipv4.unwrap_or(usual),
        id_key: rng.random(),
        created: clock.wall(),
    };
    let origin = Origin { changer: "scheduler".to_owned(), message: String::new() };
    let mut context = Context { wall: clock.wall(), rng: &mut rng, is_watched: &|_| false };
    let revision = handle(state, &Event::ClusterCreated(cluster), &origin, &mut context)?;
    let revision = revision.context("a new cluster is a change")?;
    Ok(store.commit(&[revision])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_cluster_begins_once_and_its_server_goes_on_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let lan: NodePrefix = "2001:db8:1::/64".parse().unwrap();
        let founding = Founding { pod_prefix: Some(lan), pod_ipv4: Some("10.1.0.0/16".parse().unwrap()) };
        let made = init_local(dir.path(), founding).unwrap();
        assert_eq!(made.pod_prefix, Some(lan));

        let again = init_local(dir.path(), Founding::default()).unwrap_err().to_string();
        assert!(again.contains("there is a cluster in"), "{again}");
        let opened = open(dir.path(), None, Clock::start()).await.unwrap();
        assert_eq!(opened.state.cluster(), Some(&made));
        let running = init_local(dir.path(), Founding::default()).unwrap_err().to_string();
        assert!(running.contains("another `netctl server` runs on this state directory"), "{running}");
    }

    #[tokio::test]
    async fn a_server_that_finds_nothing_begins_a_cluster_without_a_lan() {
        let dir = tempfile::tempdir().unwrap();
        let opened = open(dir.path(), None, Clock::start()).await.unwrap();
        let cluster = opened.state.cluster().unwrap();
        assert_eq!((cluster.pod_prefix, cluster.pod_ipv4), (None, POD_IPV4.parse().unwrap()));
    }

    #[tokio::test]
    async fn a_range_that_pods_cannot_have_is_refused_before_anything_is_made() {
        for (range, why) in [("10.0.0.0/30", "/8 to /28"), ("192.0.2.0/24", "a private network")] {
            let dir = tempfile::tempdir().unwrap();
            let founding = Founding { pod_ipv4: Some(range.parse().unwrap()), ..Founding::default() };
            let error =
                init(&dir.path().join("state"), &StoreChoice::Local, founding).await.unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
            assert!(!dir.path().join("state").exists());
        }
    }
}
