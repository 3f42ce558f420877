//! The writer over stores that fail.

use std::{
    collections::BTreeMap,
    net::Ipv6Addr,
    sync::{Mutex, PoisonError},
};

use hextet_address::{ClusterPrefix, GroupId, SubnetId};
use scheduler_core::{
    change::{Key, Value},
    cluster::Cluster,
    event::{Claim, Enroll, PrefixChoice, Texts},
    job::{Group, Job, Task},
    lease::Leases,
    node::{Hello, NodePhase},
    quantity::{Cpu, Memory, Resources},
    time::WallTime,
    token::{Role, Token},
    transition::handle,
};

use super::*;
use crate::{
    clock::Clock,
    hub::{Parts, scheduler},
    pki::Pki,
    store::{Item, Store},
};

const LEASE: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_failed_commit_changes_nothing_and_later_ones_work_when_the_store_does() {
    let (hub, store) = hub();
    apply(&hub, "a").await.unwrap();
    let before = hub.state();
    store.next(Next::Fails { written: false });
    let error = apply(&hub, "b").await.unwrap_err();
    assert!(error.to_string().contains("disk of the store"), "{error}");
    assert_eq!(*hub.state(), *before);
    let error = apply(&hub, "c").await.unwrap_err();
    assert!(matches!(error, WriteError::Store(_)), "it is left alone for a while: {error}");

    tokio::time::sleep(RECOVER_INTERVAL).await;
    assert!(!apply(&hub, "a").await.unwrap().changed(), "what changes nothing needs no disk");
    apply(&hub, "d").await.unwrap();
    assert_eq!(jobs(&hub), ["a", "d"]);
    assert_eq!(store.load().unwrap().0, hub.state().revision());
}

#[tokio::test]
async fn a_revision_that_reached_the_store_although_its_commit_failed_is_taken_over() {
    let (hub, store) = hub();
    let mut revisions = hub.revisions();
    store.next(Next::Fails { written: true });
    apply(&hub, "a").await.unwrap_err();
    assert_eq!(jobs(&hub), Vec::<String>::new());
    tokio::time::sleep(RECOVER_INTERVAL).await;
    apply(&hub, "b").await.unwrap();
    assert_eq!(jobs(&hub), ["a", "b"]);
    let seen = [revisions.recv().await.unwrap().revision, revisions.recv().await.unwrap().revision];
    assert_eq!(seen, [2, 3], "watchers miss none");
    assert_eq!(store.load().unwrap().0, 3);
}

#[tokio::test]
async fn what_seems_to_change_nothing_is_not_answered_while_a_failed_commit_may_have_reached_the_store() {
    let (hub, store) = hub();
    apply(&hub, "a").await.unwrap();
    store.next(Next::Fails { written: true });
    hub.write(scheduler(), Event::DeleteJob("a".to_owned())).await.unwrap_err();
    let error = apply(&hub, "a").await.unwrap_err();
    assert!(matches!(error, WriteError::Store(_)), "the store may have deleted it: {error}");
    tokio::time::sleep(RECOVER_INTERVAL).await;
    assert!(apply(&hub, "a").await.unwrap().changed(), "it had");
    assert_eq!(jobs(&hub), ["a"]);
}

#[tokio::test]
async fn a_store_that_lost_what_it_acknowledged_is_never_written_again() {
    let (hub, store) = hub();
    apply(&hub, "a").await.unwrap();
    store.next(Next::Fails { written: false });
    apply(&hub, "b").await.unwrap_err();
    store.lock().lose_last();
    tokio::time::sleep(RECOVER_INTERVAL).await;
    let error = apply(&hub, "c").await.unwrap_err().to_string();
    assert!(error.contains("is at revision 1, but 2 was acknowledged"), "{error}");
    assert_eq!(store.load().unwrap().0, 1);
}

#[tokio::test]
async fn an_address_that_was_used_before_is_drawn_again() {
    let (hub, store) = hub();
    join(&hub).await;
    store.next(Next::AddressUsed);
    apply(&hub, "a").await.unwrap();
    let drawn = store.lock().refused.clone();
    let given: Vec<Ipv6Addr> = hub.state().pods().values().filter_map(|pod| pod.address).collect();
    assert_eq!((drawn.len(), given.len()), (1, 1));
    assert_ne!(drawn, given);
}

#[tokio::test]
async fn a_lease_that_was_renewed_during_a_slow_commit_has_not_ended() {
    let (hub, store) = hub();
    join(&hub).await;
    let silence = hub.leases().silence_max();
    tokio::time::sleep(silence).await;
    store.next(Next::Slow(Duration::from_millis(300)));
    let slow = tokio::spawn({
        let hub = hub.clone();
        async move { apply(&hub, "a").await.unwrap() }
    });
    while !store.is_busy() {
        tokio::task::yield_now().await;
    }
    let ended = tokio::spawn({
        let hub = hub.clone();
        async move { hub.write(scheduler(), Event::LeaseEnded(vec!["n1".to_owned()])).await.unwrap() }
    });
    // The report comes while the writer waits for the disk.
    tokio::task::yield_now().await;
    hub.leases().renew("n1", hub.clock.now());
    assert!(store.is_busy(), "the renewal did not wait for the disk");
    slow.await.unwrap();
    assert!(!ended.await.unwrap().changed());
    assert_eq!(hub.state().nodes()["n1"].phase, NodePhase::Ready);

    tokio::time::sleep(silence).await;
    assert!(hub.write(scheduler(), Event::LeaseEnded(vec!["n1".to_owned()])).await.unwrap().changed());
}

#[tokio::test]
async fn events_that_wait_together_are_committed_together() {
    let (hub, store) = hub();
    store.next(Next::Slow(Duration::from_millis(200)));
    let all: Vec<_> = (0..20)
        .map(|number| {
            let hub = hub.clone();
            tokio::spawn(async move { apply(&hub, &format!("j{number}")).await.unwrap().revision })
        })
        .collect();
    let mut revisions = vec![];
    for one in all {
        revisions.push(one.await.unwrap());
    }
    revisions.sort_unstable();
    assert_eq!(revisions, (2..22).collect::<Vec<_>>(), "each has its own revision");
    assert!(store.lock().commits < 6, "{} syncs", store.lock().commits);
}

#[derive(Default)]
pub(crate) struct FakeStore(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    log: Vec<Revision>,
    last: u64,
    next: Option<Next>,
    failed: bool,
    busy: bool,
    commits: u32,
    /// Addresses that were said to be used.
    refused: Vec<Ipv6Addr>,
}

/// What the next commit does.
pub(crate) enum Next {
    Fails { written: bool },
    AddressUsed,
    Slow(Duration),
}

impl Inner {
    fn append(&mut self, revisions: &[Revision]) {
        self.last = revisions.last().map_or(self.last, |last| last.revision);
        self.log.extend_from_slice(revisions);
    }

    fn lose_last(&mut self) {
        self.log.pop();
        self.last -= 1;
    }
}

impl FakeStore {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn next(&self, next: Next) {
        self.lock().next = Some(next);
    }

    fn is_busy(&self) -> bool {
        self.lock().busy
    }
}

fn full() -> StoreError {
    StoreError::Full { path: "fake".into(), source: std::io::ErrorKind::StorageFull.into() }
}

impl Store for FakeStore {
    fn epoch(&self) -> &str {
        "00000000000000000000000000000000"
    }

    fn load(&self) -> Result<(u64, Vec<(Key, Value)>), StoreError> {
        Ok((self.lock().last, vec![]))
    }

    fn commit(&self, revisions: &[Revision]) -> Result<(), StoreError> {
        let mut inner = self.lock();
        assert!(!inner.failed, "a failed store is recovered before the next commit");
        inner.commits += 1;
        match inner.next.take() {
            Some(Next::Fails { written }) => {
                inner.failed = true;
                inner.append(if written { revisions } else { &[] });
                return Err(full());
            }
            Some(Next::AddressUsed) => {
                let address = revisions.iter().flat_map(|revision| &revision.changes).find_map(|change| {
                    let Some(Value::Pod(pod)) = &change.new else { return None };
                    pod.address
                });
                inner.refused.extend(address);
                return Err(StoreError::AddressUsed(address.unwrap()));
            }
            Some(Next::Slow(time)) => {
                inner.busy = true;
                drop(inner);
                thread::sleep(time);
                inner = self.lock();
                inner.busy = false;
            }
            None => {}
        }
        inner.append(revisions);
        Ok(())
    }

    fn log_after(&self, revision: u64, max: usize) -> Result<Vec<Revision>, StoreError> {
        Ok(self.lock().log.iter().filter(|entry| entry.revision > revision).take(max).cloned().collect())
    }

    fn oldest(&self) -> Result<u64, StoreError> {
        let inner = self.lock();
        if inner.failed {
            return Err(full());
        }
        let next = inner.last + 1;
        Ok(inner.log.first().map_or(next, |entry| entry.revision))
    }

    fn log_bytes(&self) -> Result<u64, StoreError> {
        Ok(self.lock().log.len() as u64)
    }

    fn compact(&self, before: u64, max: usize) -> Result<(), StoreError> {
        let mut inner = self.lock();
        let old = inner.log.iter().take(max).take_while(|entry| entry.revision < before).count();
        inner.log.drain(..old);
        Ok(())
    }

    fn dump(&self, each: &mut dyn FnMut(Item) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let inner = self.lock();
        each(Item::Last(inner.last))?;
        inner.log.iter().try_for_each(|entry| each(Item::Entry(entry.clone())))
    }

    fn recover(&self) -> Result<(), StoreError> {
        self.lock().failed = false;
        Ok(())
    }
}

/// A hub with a running writer and a cluster without nodes, at revision 1.
pub(crate) fn hub() -> (Arc<Hub>, Arc<FakeStore>) {
    hub_with_history(1 << 20)
}

pub(crate) fn hub_with_history(history_bytes: u64) -> (Arc<Hub>, Arc<FakeStore>) {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::start();
    let store = Arc::new(FakeStore::default());
    let pki = Pki::open(&dir.path().join("pki"), store.epoch(), true, clock.wall()).unwrap();
    let prefix = ClusterPrefix::generate(&mut rand::rng());
    let pod_ipv4 = "10.254.0.0/20".parse().unwrap();
    let cluster = Cluster { prefix, pod_prefix: None, pod_ipv4, id_key: 1, created: WallTime(0) };
    let mut state = State::default();
    let mut rng = StdRng::seed_from_u64(1);
    let mut context = Context { wall: WallTime(0), rng: &mut rng, is_watched: &|_| false };
    let created =
        handle(&mut state, &Event::ClusterCreated(cluster.clone()), &scheduler(), &mut context).unwrap();
    store.commit(&[created.unwrap()]).unwrap();
    let (requests, queue) = mpsc::channel(QUEUE_MAX);
    let leases = Leases::new(LEASE, clock.now());
    let (cluster, shared) = (Arc::new(cluster), store.clone());
    let parts = Parts {
        clock,
        store: shared,
        pki: Arc::new(pki),
        keeper: crate::founding::Keeper::Folder,
        cluster: Some(cluster),
        servers: tokio::sync::watch::channel(vec![]).1,
        history_bytes,
        state: state.clone(),
        leases,
        writer: requests,
    };
    let hub = Arc::new(Hub::new(parts));
    let (ends, _) = oneshot::channel();
    start(hub.clone(), state, queue, ends).unwrap();
    (hub, store)
}

pub(crate) async fn apply(hub: &Hub, name: &str) -> Result<Committed, WriteError> {
    let task = Task {
        exec: vec!["/x".to_owned()],
        env: BTreeMap::new(),
        cpu: Cpu(1),
        memory: Memory(1),
        resources: Default::default(),
    };
    let group = Group {
        apart: Vec::new(),
        rollout: None,
        hooks: BTreeMap::new(),
        resources: Default::default(),
        count: 1,
        availability: None,
        spread: Default::default(),
        constraints: BTreeMap::new(),
        tasks: BTreeMap::from([("t".to_owned(), Box::new(task))]),
    };
    let groups = BTreeMap::from([("g".to_owned(), Box::new(group))]);
    let job = Job { job: name.to_owned(), groups, ..Job::default() };
    hub.write(scheduler(), Event::ApplyJob(job, Texts::new())).await
}

pub(crate) fn cluster() -> Cluster {
    let (prefix, pod_ipv4) =
        (ClusterPrefix::generate(&mut StdRng::seed_from_u64(1)), "10.254.0.0/20".parse().unwrap());
    Cluster { prefix, pod_prefix: None, pod_ipv4, id_key: 1, created: WallTime(0) }
}

/// What a node of this name claims with the token of the same name.
pub(crate) fn claim(name: &str, number: u16) -> Enroll {
    let (subnet, group_id) = (SubnetId(number), GroupId::new(number.into()).unwrap());
    let claim = Claim { prefix: PrefixChoice::Own, subnet, group_id };
    Enroll { token: name.to_owned(), name: Some(name.to_owned()), key: name.to_owned(), node: Some(claim) }
}

pub(crate) async fn join(hub: &Hub) {
    let expires = hub.clock.wall() + Duration::from_secs(60);
    let token = Token { role: Role::Node, name: None, expires, used_by: None };
    hub.write(scheduler(), Event::CreateToken("t".to_owned(), token)).await.unwrap();
    let (subnet, group_id) = (SubnetId(1), GroupId::new(1).unwrap());
    let claim = Claim { prefix: PrefixChoice::Own, subnet, group_id };
    let (token, name) = ("t".to_owned(), Some("n1".to_owned()));
    let enroll = Enroll { token, name, key: "k".to_owned(), node: Some(claim) };
    hub.write(scheduler(), Event::Enroll(enroll)).await.unwrap();
    let hello = Hello {
        countables: Default::default(),
        underlay: "2001:db8::1".parse().unwrap(),
        underlay_v4: None,
        labels: BTreeMap::new(),
        capacity: Resources { cpu: Cpu(1000), memory: Memory(1 << 30) },
        agent_version: String::new(),
        machine: String::new(),
        hardware: String::new(),
        session: 0,
    };
    hub.write(scheduler(), Event::NodeHello("n1".to_owned(), hello)).await.unwrap();
}

fn jobs(hub: &Hub) -> Vec<String> {
    hub.state().jobs().map(|(name, _)| name.clone()).collect()
}
