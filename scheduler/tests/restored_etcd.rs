//! A backup becomes a cluster in etcd and back, and an etcd that was put back from its own snapshot is not taken for the present.

mod support;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hextet_api::v1::{self, watch_response::Response};
use scheduler::{
    backup::{self, Incomplete},
    convert,
    etcd::Location,
    server::{ServerConfig, StoreChoice},
};
use support::{FakeNode, LEASE, TestServer, Watch, etcd::EtcdProcess, subscribe};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::sleep,
};

/// Leases of the server before run for so long at most.
const WAIT: Duration = LEASE.saturating_add(LEASE.checked_div(4).unwrap());
/// For the program that is killed while it restores.
const FILE: &str = "HEXTET_TEST_RESTORE_FILE";
const URL: &str = "HEXTET_TEST_RESTORE_STORE";

/// Where a cluster goes on.
enum Place {
    File(tempfile::TempDir),
    Etcd(tempfile::TempDir, Location),
}

impl Place {
    fn file() -> Place {
        Place::File(tempfile::tempdir().unwrap())
    }

    fn etcd(etcd: &EtcdProcess, prefix: &str) -> Place {
        let location = format!("{}/{prefix}", etcd.url()).parse().unwrap();
        Place::Etcd(tempfile::tempdir().unwrap(), location)
    }

    fn dir(&self) -> &Path {
        match self {
            Place::File(dir) | Place::Etcd(dir, _) => dir.path(),
        }
    }

    fn config(&self, address: SocketAddr) -> ServerConfig {
        let store = match self {
            Place::File(_) => StoreChoice::Local,
            Place::Etcd(_, location) => StoreChoice::Etcd(location.clone()),
        };
        ServerConfig { store, listen: vec![address], ..support::config(self.dir()) }
    }

    async fn restore(&self, file: &Path) -> anyhow::Result<backup::Restored> {
        match self {
            Place::File(dir) => backup::restore(file, &dir.path().join("state"), Incomplete::Refuse),
            Place::Etcd(_, location) => backup::restore_into_etcd(file, location, Incomplete::Refuse).await,
        }
    }

    async fn start(&self, address: SocketAddr) -> TestServer {
        TestServer::start_with(self.config(address)).await
    }
}

fn any_address() -> SocketAddr {
    "[::1]:0".parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_moves_from_a_file_into_etcd_to_another_and_back_with_its_nodes() {
    let test = "a_cluster_moves_from_a_file_into_etcd_to_another_and_back_with_its_nodes";
    let Some(etcd) = EtcdProcess::start(test) else { return };
    let places = [Place::file(), Place::etcd(&etcd, "one"), Place::etcd(&etcd, "two"), Place::file()];
    let mut server = places[0].start(any_address()).await;
    let address = server.ready.addresses[0];
    let mut n1 = FakeNode::join(&server, "n1", 1).await;
    server.apply("blog", 2, "one").await;
    apply_singleton(&server).await;
    server.running(3).await;
    for (number, place) in places.iter().enumerate().skip(1) {
        let (before, log) = (server.status().await, server.history("").await);
        let pods = of_job(&server, "blog").await;
        let file = place.dir().join("backup");
        server.back_up(&file).await;
        server.apply("late", 1, "after the backup").await;
        let refused = place_of(&places[number - 1], &file).await;
        assert!(refused.is_none_or(|error| error.contains("a server runs on it")), "while it runs");
        server.stop().await;
        let known = n1.kill().await;

        let restored = place.restore(&file).await.unwrap();
        assert_eq!(restored.revision, before.revision);
        if let Place::Etcd(..) = place {
            let again = place.restore(&file).await.unwrap_err().to_string();
            assert!(again.contains("there is a cluster in etcd below"), "{again}");
        }
        let begun = Instant::now();
        server = place.start(address).await;
        let now = server.status().await;
        assert_eq!((now.prefix, now.epoch != before.epoch), (before.prefix, true));
        assert_eq!(server.history("").await[1..], log[..], "the history is there");
        is_listed_anew(&server, &before.epoch, before.revision, 2).await;
        // The node comes back with the certificate that it has, to the pods that it has.
        n1 = FakeNode::attach(known).await;
        assert_eq!(of_job(&server, "blog").await, pods);
        let told: Vec<String> = n1.told.lock().unwrap().pods.keys().cloned().collect();
        assert!(pods.iter().all(|(pod, ..)| told.contains(pod)), "{told:?}");
        waits(&server, begun).await;
        server.running(3).await;
    }
    server.stop().await;
}

/// A restore to where a server runs; none for a file, which is refused in other words.
async fn place_of(place: &Place, file: &Path) -> Option<String> {
    match place {
        Place::File(_) => None,
        Place::Etcd(..) => Some(place.restore(file).await.unwrap_err().to_string()),
    }
}

/// What they are, and where.
async fn of_job(server: &TestServer, job: &str) -> Vec<(String, String, Vec<u8>, u32)> {
    let pods = server.pods().await.into_iter().filter(|pod| pod.job == job);
    pods.map(|pod| (pod.id, pod.node, pod.address, pod.restarts)).collect()
}

async fn is_listed_anew(server: &TestServer, epoch: &str, revision: u64, count: usize) {
    let resume = v1::Subscribe { epoch: epoch.to_owned(), from_revision: revision, ..subscribe("blog") };
    let mut watch = Watch::start(server.watcher().await, resume).await;
    assert!(matches!(watch.next().await.unwrap(), Response::Compacted(_)));
    assert_eq!(watch.snapshot().await.endpoints.len(), count);
}

/// What there may only be one of has no place until no lease of the server before can run.
async fn waits(server: &TestServer, begun: Instant) {
    assert!(server.status().await.restored.is_some());
    let placed = server
        .pods_when("placed", |pods| pods.iter().any(|pod| pod.job == "queue" && !pod.node.is_empty()))
        .await;
    assert!(begun.elapsed() >= WAIT, "{:?}: {placed:?}", begun.elapsed());
}

async fn apply_singleton(server: &TestServer) {
    let yaml = "{job: queue, groups: {boss: {count: 1, availability: singleton, tasks: \
                {server: {exec: [/bin/server], cpu: 10m, memory: 1Mi}}}}}";
    server.apply_job(convert::job_to_message(&serde_norway::from_str(yaml).unwrap())).await.unwrap();
}

/// Not a test by itself: another starts this program anew with it, and kills it.
#[tokio::test]
#[ignore = "it is a restore, for another test"]
async fn restoring() {
    let Some(file) = std::env::var_os(FILE).map(PathBuf::from) else { return };
    let location: Location = std::env::var(URL).unwrap().parse().unwrap();
    backup::restore_into_etcd(&file, &location, Incomplete::Refuse).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_was_killed_is_repaired_by_the_next() {
    let Some(etcd) = EtcdProcess::start("a_restore_that_was_killed_is_repaired_by_the_next") else { return };
    let source = Place::file();
    let server = source.start(any_address()).await;
    for number in 0..300 {
        server.apply(&format!("j{number}"), 3, "one").await;
    }
    let (file, pods) = (source.dir().join("backup"), server.pods().await.len());
    server.back_up(&file).await;
    server.stop().await;

    let whole = Cut::start(&etcd, u64::MAX).await;
    let mut child = restore_by(&whole, &file, "whole");
    assert!(child.wait().unwrap().success());
    let bytes = whole.passed();
    // Where it is cut off counts bytes and no time: it is the same on every machine.
    for fifths in 1..5 {
        let prefix = format!("cut-{fifths}");
        let place = Place::etcd(&etcd, &prefix);
        let cut = Cut::start(&etcd, bytes * fifths / 5).await;
        let mut child = restore_by(&cut, &file, &prefix);
        let end = Instant::now() + support::DEADLINE;
        while !cut.is_over() {
            assert!(Instant::now() < end, "it sends less than one that was whole: {}", cut.passed());
            sleep(Duration::from_millis(1)).await;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_ne!(etcd.get(&format!("/{prefix}/head")), "", "it had begun");
        assert_eq!(etcd.get(&format!("/{prefix}/founding")), "", "it was not done");
        // Its lease still runs: it is waited for.
        place.restore(&file).await.unwrap();
        let server = place.start(any_address()).await;
        assert_eq!(server.pods().await.len(), pods);
        server.apply("after", 1, "one").await;
        server.stop().await;
    }
}

/// A way to etcd that carries so many bytes to it and then none: to etcd, its other end hangs.
struct Cut {
    port: u16,
    bytes: u64,
    passed: Arc<AtomicU64>,
}

impl Cut {
    async fn start(etcd: &EtcdProcess, bytes: u64) -> Cut {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cut = Cut { port: listener.local_addr().unwrap().port(), bytes, passed: Arc::default() };
        let (address, passed) = (etcd.url().replace("etcd://", ""), cut.passed.clone());
        tokio::spawn(async move {
            while let Ok((here, _)) = listener.accept().await {
                tokio::spawn(carry(here, address.clone(), bytes, passed.clone()));
            }
        });
        cut
    }

    fn url(&self) -> String {
        format!("etcd://127.0.0.1:{}", self.port)
    }

    fn passed(&self) -> u64 {
        self.passed.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.passed() > self.bytes
    }
}

async fn carry(mut here: TcpStream, etcd: String, bytes: u64, passed: Arc<AtomicU64>) {
    let mut there = TcpStream::connect(etcd).await.unwrap();
    let ((mut from, mut back), (mut answers, mut to)) = (here.split(), there.split());
    let carried = async {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            if passed.fetch_add(count as u64, Ordering::SeqCst) + count as u64 > bytes {
                std::future::pending().await
            }
            if to.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    let _ = tokio::join!(carried, tokio::io::copy(&mut answers, &mut back));
}

/// A restore as a process, which reaches etcd through `cut`.
fn restore_by(cut: &Cut, file: &Path, prefix: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "restoring", "--ignored", "--nocapture"])
        .env(FILE, file)
        .env(URL, format!("{}/{prefix}", cut.url()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Nothing in the snapshot says that it is from before: nodes may run what it does not know of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_was_put_back_is_gone_on_with_as_a_restored_one() {
    let test = "an_etcd_that_was_put_back_is_gone_on_with_as_a_restored_one";
    let Some(mut etcd) = EtcdProcess::start(test) else { return };
    let place = Place::etcd(&etcd, "one");
    let server = place.start(any_address()).await;
    let address = server.ready.addresses[0];
    let n1 = FakeNode::join(&server, "n1", 1).await;
    server.apply("blog", 2, "one").await;
    apply_singleton(&server).await;
    let known: Vec<String> = server.running(3).await.into_iter().map(|pod| pod.id).collect();
    let snapshot = place.dir().join("snapshot");
    if !etcd.snapshot(&snapshot) {
        return;
    }
    server.apply("late", 3, "after the snapshot").await;
    server.running(6).await;
    let (before, known_term) = (server.status().await, n1.told.lock().unwrap().term);
    server.stop().await;
    let mut credentials = n1.kill().await;

    // A start of the same etcd, with the same data, is no restore.
    etcd.kill();
    etcd.restart();
    let server = place.start(address).await;
    let now = server.status().await;
    assert_eq!((now.epoch, now.restored), (before.epoch.clone(), None));
    server.stop().await;

    let (mut epochs, mut term) = (vec![before.epoch.clone()], known_term);
    // Under its own name, and under another; and the same snapshot once more.
    for token in ["etcd-cluster", "another", "etcd-cluster"] {
        etcd.put_back(&snapshot, token);
        let begun = Instant::now();
        let server = place.start(address).await;
        let status = server.status().await;
        assert!(!epochs.contains(&status.epoch), "{token}: {epochs:?}");
        is_listed_anew(&server, epochs.last().unwrap(), before.revision, 2).await;
        epochs.push(status.epoch.clone());
        let n1 = FakeNode::attach(credentials).await;
        let told = n1.told.lock().unwrap().term;
        assert!(told > term, "terms rise: {told} {term}");
        term = told;
        waits(&server, begun).await;
        let pods = server.running(3).await;
        let single = pods.iter().find(|pod| pod.job == "queue").unwrap();
        assert!(!known.contains(&single.id), "{known:?} {single:?}");
        server.stop().await;
        credentials = n1.kill().await;
        // It is over: the next start goes on.
        let server = place.start(address).await;
        let now = server.status().await;
        assert_eq!((now.epoch, now.restored), (status.epoch, None));
        server.stop().await;
    }
}

/// An etcd that is put back faster than a lease ends leaves the leader its key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_etcd_is_put_back_under_it_gives_up_what_it_knew() {
    let test = "a_leader_whose_etcd_is_put_back_under_it_gives_up_what_it_knew";
    let Some(mut etcd) = EtcdProcess::start(test) else { return };
    let place = Place::etcd(&etcd, "one");
    let server = place.start(any_address()).await;
    server.apply("blog", 1, "one").await;
    let snapshot = place.dir().join("snapshot");
    if !etcd.snapshot(&snapshot) {
        return;
    }
    server.apply("late", 1, "after the snapshot").await;
    let before = server.status().await;
    etcd.put_back(&snapshot, "etcd-cluster");
    let end = Instant::now() + support::DEADLINE * 2;
    let status = loop {
        // A write makes it look.
        let _ = server.try_apply("next", 1, "one").await;
        let status = server.local().await.get_status(v1::GetStatusRequest {}).await;
        match status.map(tonic::Response::into_inner) {
            Ok(status) if status.epoch != before.epoch => break status,
            _ => assert!(Instant::now() < end, "it goes on as if nothing had happened"),
        }
        sleep(Duration::from_millis(50)).await;
    };
    assert!(status.restored.is_some());
    server.pods_when("there", |pods| pods.iter().all(|pod| pod.job != "late")).await;
    server.stop().await;
}
