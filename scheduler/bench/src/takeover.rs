//! Two servers over one etcd with 5,000 nodes and 150,000 pods: the leader is killed, and a write is asked for at the
//! other until it is acknowledged.
//!
//! etcd is the machine's own (Debian: `etcd-server`), with its data in a temporary folder. No node is attached.

use std::{
    env, fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use hextet_api::{
    connect,
    v1::{self, cluster_client::ClusterClient},
};
use scheduler::{
    etcd::{self, Kv as _, Location, Right, claim, deposition},
    founding::{self, Founding},
    server::{self, StoreChoice},
    store::{EtcdStore, Store as _},
};
use scheduler_core::state::State;
use tokio::{runtime::Runtime, time::sleep};
use tonic::transport::Channel;

use crate::{
    server::{config, fill_store, one},
    speed::shown,
};

pub(crate) const MEMBER: &str = "serve-several";

const NODES: usize = 5_000;
const PODS: usize = 150_000;
/// How often the leader is killed, in each of both ways.
const ROUNDS: usize = 5;
const RETRY: Duration = Duration::from_millis(10);
const START_MAX: Duration = Duration::from_secs(60);
/// A call to a server that has gone hangs.
const CALL_MAX: Duration = Duration::from_millis(500);
/// The other server has a copy of the state by then.
const WARM: Duration = Duration::from_secs(15);

pub(crate) fn run() {
    println!("\nTwo servers over one etcd, 5,000 nodes and 150,000 pods: the leader is killed (kill -9)\n");
    let found = env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|folder| folder.join("etcd").exists()));
    if !found {
        return println!("left out: no etcd here (Debian: etcd-server)");
    }
    let measured =
        Runtime::new().map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(measure()));
    measured.expect("the servers answer");
}

/// A server of several, in a process of its own; `dir` says which etcd.
pub(crate) fn serve(dir: &Path) {
    let runtime = Runtime::new().expect("threads can be started");
    let store = StoreChoice::Etcd(location(dir));
    let config = server::ServerConfig { store, ..config(dir) };
    runtime.block_on(server::run(config, std::future::pending(), |_| {})).expect("the server runs");
}

fn location(dir: &Path) -> Location {
    let url = fs::read_to_string(dir.join("etcd")).expect("it was written");
    url.parse().expect("it is a location")
}

async fn measure() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let _etcd = start_etcd(dir.path(), port).await?;
    let folders = ["a", "b"].map(|name| dir.path().join(name));
    for folder in &folders {
        fs::create_dir(folder)?;
        fs::write(folder.join("etcd"), format!("etcd://127.0.0.1:{port}"))?;
    }
    let place = location(&folders[0]);
    founding::init(&folders[0].join("state"), &StoreChoice::Etcd(place.clone()), Founding::default()).await?;
    tokio::task::spawn_blocking(move || fill(&place)).await??;
    println!("| until a write is acknowledged | median | longest of {ROUNDS} |\n| --- | --- | --- |");
    let mut leader = Member::start(&folders[0]).await?;
    for (what, warm) in [
        ("a server that has just started takes over", Duration::ZERO),
        ("one with a copy of the state takes over", WARM),
    ] {
        let mut times = Vec::new();
        for round in 0..ROUNDS {
            let next = usize::from(leader.folder == folders[0]);
            let follower = Member::start(&folders[next]).await?;
            sleep(warm).await;
            let killed = Instant::now();
            drop(std::mem::replace(&mut leader, follower));
            leader.write(&format!("after{}x{round}", warm.as_secs())).await?;
            times.push(killed.elapsed());
        }
        times.sort();
        println!("| {what} | {} | {} |", shown(times[ROUNDS / 2]), shown(times[ROUNDS - 1]));
    }
    Ok(())
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn start_etcd(dir: &Path, port: u16) -> anyhow::Result<Ended> {
    let peer = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let [client, peer] = [port, peer].map(|port| format!("http://127.0.0.1:{port}"));
    let child = Command::new("etcd")
        .arg("--data-dir")
        .arg(dir.join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let (etcd, end) = (Ended(child), Instant::now() + START_MAX);
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        ensure!(Instant::now() < end, "etcd does not start");
        sleep(RETRY).await;
    }
    Ok(etcd)
}

/// The leader's key while the store is filled: no lease ends it.
struct Filler {
    key: String,
    fence: i64,
}

impl Right for Filler {
    fn key(&self) -> &str {
        &self.key
    }

    fn fence(&self) -> i64 {
        self.fence
    }

    fn is_lost(&self) -> bool {
        false
    }
}

fn fill(place: &Location) -> anyhow::Result<()> {
    let etcd = etcd::client(place)?;
    let key = format!("{}/leader", place.prefix);
    let taken = etcd.txn(claim(&key, b"{}".to_vec(), 0))?;
    ensure!(taken.succeeded, "somebody leads");
    let fence = taken.header.map_or(0, |header| header.revision);
    let store = EtcdStore::open(etcd.clone(), &place.prefix, "filled", Filler { key: key.clone(), fence })?;
    let (revision, values) = store.load()?;
    fill_store(&store, State::load(revision, values), NODES, PODS);
    etcd.txn(deposition(key, fence))?;
    Ok(())
}

struct Member {
    folder: PathBuf,
    _process: Ended,
    cluster: ClusterClient<Channel>,
}

impl Member {
    /// Starts it and waits until it answers, or somebody in its place.
    async fn start(folder: &Path) -> anyhow::Result<Member> {
        let process = Command::new(env::current_exe()?)
            .args([MEMBER.as_ref(), folder.as_os_str()])
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start a server")?;
        let (process, end) = (Ended(process), Instant::now() + START_MAX);
        loop {
            if let Ok(channel) = connect::unix(&folder.join("server.sock")).await {
                let mut cluster = ClusterClient::new(channel);
                if cluster.get_status(v1::GetStatusRequest {}).await.is_ok() {
                    return Ok(Member { folder: folder.to_owned(), _process: process, cluster });
                }
            }
            ensure!(Instant::now() < end, "a server does not start");
            sleep(RETRY).await;
        }
    }

    /// Asks for a job of one pod until it is there.
    async fn write(&mut self, name: &str) -> anyhow::Result<()> {
        let end = Instant::now() + START_MAX;
        loop {
            let request = v1::ApplyJobRequest { job: Some(one(name)), ..Default::default() };
            if let Ok(Ok(_)) = tokio::time::timeout(CALL_MAX, self.cluster.apply_job(request)).await {
                return Ok(());
            }
            ensure!(Instant::now() < end, "nobody leads");
            sleep(RETRY).await;
        }
    }
}
