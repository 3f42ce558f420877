//! How a cluster begins: [`init`] makes its state directory, and a server that finds none does the same with what
//! is usual. What is decided here is kept for ever.

use std::{
    fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

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
use tracing::warn;

use crate::{
    clock::Clock,
    etcd::{self, Etcd},
    pki::{self, Authority, Pki},
    remains,
    server::StoreChoice,
    several,
    store::{RedbStore, Store},
};

/// The range that every node hands out to its pods, when nothing is said.
pub const POD_IPV4: &str = "10.254.0.0/20";

/// The store's name in the state directory.
pub(crate) const FILE: &str = "server.redb";

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
    pub(crate) pki: Pki,
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
    Ok(Opened { store, pki, state })
}

/// What several servers share from the first one's start: who they are. It is in etcd, and whoever can read
/// that can be any of them.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Shared {
    format: String,
    epoch: String,
    authority: Authority,
    /// The folder of this server's certificates.
    #[serde(skip)]
    dir: PathBuf,
}

impl Shared {
    pub(crate) fn epoch(&self) -> &str {
        &self.epoch
    }

    /// This server's certificates.
    pub(crate) fn pki(&self, clock: Clock) -> anyhow::Result<Pki> {
        Ok(Pki::open_shared(&self.dir, &self.epoch, &self.authority, clock.wall())?)
    }
}

/// What the first server has left in etcd; the first one makes it.
pub(crate) async fn share(etcd: &Etcd, prefix: &str, dir: &Path, clock: Clock) -> anyhow::Result<Shared> {
    make(dir)?;
    let key = format!("{prefix}/founding");
    if etcd.get(&key).await?.is_none() {
        let epoch = random_epoch();
        let (format, authority) = (SHARED_FORMAT.to_owned(), Authority::make(&epoch)?);
        let drawn = Shared { format, epoch, authority, dir: PathBuf::new() };
        let success = vec![etcd::put(key.clone(), serde_json::to_vec(&drawn)?, 0)];
        let compare = vec![etcd::created_at(&key, 0)];
        // Whoever was first: what is there then is read.
        etcd.txn(etcd::pb::TxnRequest { compare, success, failure: vec![] }).await?;
    }
    let found = etcd.get(&key).await?.with_context(|| format!("{key} has gone from etcd"))?;
    let mut shared: Shared =
        serde_json::from_slice(&found.value).with_context(|| format!("{key} in etcd is damaged"))?;
    ensure!(
        shared.format == SHARED_FORMAT,
        "{key} in etcd has format {:?}, this program reads {SHARED_FORMAT:?}: use the version of netctl that wrote it",
        shared.format
    );
    shared.dir = dir.join("pki");
    shared.pki(clock)?;
    Ok(shared)
}

/// Goes on with what is in the store of several servers; the first one makes the cluster.
pub(crate) fn begin(
    store: Arc<dyn Store>,
    mut state: State,
    shared: &Shared,
    pod_ipv4: Option<Ipv4Network>,
    clock: Clock,
) -> anyhow::Result<Opened> {
    if state.cluster().is_none() {
        found(&mut state, store.as_ref(), Founding { pod_ipv4, ..Founding::default() }, clock)?;
    }
    tell_kept(&state, pod_ipv4);
    Ok(Opened { store, pki: shared.pki(clock)?, state })
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

fn random_epoch() -> String {
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
