//! A server with 5,000 nodes and 150,000 pods, and with 10,000 and 2,000,000: what it takes, and how long it takes over
//! its start and one pod more.
//!
//! It is the server of `netctl server` with its store on the disk, in a process of its own, asked over its socket. No
//! node is attached and no load balancer reads: what each of them takes comes on top.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use hextet_api::{
    connect,
    v1::{self, cluster_client::ClusterClient},
};
use scheduler::{
    convert,
    founding::{self, Founding},
    server::{self, ServerConfig, StoreChoice},
    store::{RedbStore, Store},
};
use scheduler_core::{event::Event, job::Spread, state::State};
use tokio::{runtime::Runtime, sync::oneshot};
use tonic::transport::Channel;

use crate::{
    fleet::{Fleet, job},
    memory::{CAPACITY, COUNT, NODES, PODS},
    process::{peak_bytes, resident_bytes, run as run_self},
    speed::shown,
};

pub(crate) const FILL: &str = "fill-store";
pub(crate) const SERVE: &str = "serve-store";

/// How often one pod more is applied.
const SAMPLES: usize = 300;
/// How many plans go on meanwhile, one after the other.
const PLANS: usize = 20;
/// Revisions in one commit of the preparation.
const COMMIT_LEN: usize = 64;

/// Nodes and pods: what users have, and the bounds.
const SIZES: [(usize, usize); 2] = [(5_000, 150_000), (NODES, PODS)];
/// How large a store is, beside it.
const SIZE: &str = "size";

pub(crate) fn run() {
    for (nodes, pods) in SIZES {
        println!("\nA server with {nodes} nodes and {pods} pods in jobs of 1,000, its store on the disk\n");
        let dir = tempfile::tempdir().expect("there is room for temporary files");
        fs::write(dir.path().join(SIZE), format!("{nodes} {pods}")).expect("the disk has room");
        for stage in [FILL, SERVE] {
            run_self(&[stage.as_ref(), dir.path().as_os_str()]);
        }
    }
}

/// Makes the store, as large as `size` says.
pub(crate) fn fill(dir: &Path) {
    let size = fs::read_to_string(dir.join(SIZE)).unwrap_or_default();
    let mut numbers = size.split_whitespace().filter_map(|word| word.parse().ok());
    let (nodes, pods) = (numbers.next().unwrap_or(NODES), numbers.next().unwrap_or(PODS));
    let made = Runtime::new().map_err(anyhow::Error::from).and_then(|runtime| {
        runtime.block_on(founding::init(&dir.join("state"), &StoreChoice::Local, Founding::default()))
    });
    made.expect("an empty folder takes a cluster");
    let store = RedbStore::open(&dir.join("state/server.redb")).expect("it was made");
    let (revision, values) = store.load().expect("it is good");
    fill_store(&store, State::load(revision, values), nodes, pods);
}

/// Commits nodes and jobs of 1,000 pods.
pub(crate) fn fill_store(store: &dyn Store, state: State, nodes: usize, pods: usize) {
    let mut fleet = Fleet::go_on(state);
    let mut waiting = Vec::new();
    for number in 0..nodes {
        waiting.extend(fleet.join(number, CAPACITY));
        commit(store, &mut waiting, COMMIT_LEN);
    }
    commit(store, &mut waiting, 1);
    for number in 0..pods / COUNT as usize {
        waiting.extend(fleet.revision(job(format!("j{number}"), COUNT, 1_000, Spread::Node)).0);
        commit(store, &mut waiting, 1);
    }
}

fn commit(store: &dyn Store, waiting: &mut Vec<scheduler_core::change::Revision>, at_least: usize) {
    if waiting.len() >= at_least {
        store.commit(waiting).expect("the disk has room");
        waiting.clear();
    }
}

/// Runs the server and asks it.
pub(crate) fn serve(dir: &Path) {
    let measured =
        Runtime::new().map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(measure(dir)));
    measured.expect("the server answers");
}

async fn measure(dir: &Path) -> anyhow::Result<()> {
    let start = Instant::now();
    let (stop, stopped) = oneshot::channel::<()>();
    let (ready, is_ready) = oneshot::channel();
    let until = async { drop(stopped.await) };
    let server = tokio::spawn(server::run(config(dir), until, move |_| {
        let _ = ready.send(());
    }));
    is_ready.await.context("the server did not start")?;
    println!("| | | memory | most so far |\n| --- | --- | --- | --- |");
    row("start", &shown(start.elapsed()));
    let cluster = ClusterClient::new(connect::unix(&dir.join("server.sock")).await?);
    make_room(cluster.clone()).await?;
    let [median, p99] = apply(&cluster, "alone").await?;
    row("one pod more", &format!("median {}, p99 {}", shown(median), shown(p99)));
    let planning = tokio::spawn(plan(cluster.clone()));
    let [median, p99] = apply(&cluster, "beside").await?;
    let plan = planning.await??;
    row("a plan", &format!("median {}", shown(plan)));
    row("one pod more beside plans", &format!("median {}, p99 {}", shown(median), shown(p99)));
    let _ = stop.send(());
    server.await?
}

/// There are as many pods as there may be.
async fn make_room(mut cluster: ClusterClient<Channel>) -> anyhow::Result<()> {
    let request = v1::DeleteJobRequest { name: "j0".to_owned(), ..Default::default() };
    cluster.delete_job(request).await?;
    Ok(())
}

pub(crate) fn config(dir: &Path) -> ServerConfig {
    ServerConfig {
        state_dir: dir.join("state"),
        store: StoreChoice::Local,
        listen: vec!["[::1]:0".parse().expect("it is an address")],
        socket: dir.join("server.sock"),
        advertise: vec![],
        // No node is there to renew it, and none is to be found lost.
        lease: Duration::from_secs(24 * 3600),
        history_bytes: 64 << 20,
        pod_ipv4: None,
    }
}

fn row(what: &str, value: &str) {
    println!("| {what} | {value} | {} MiB | {} MiB |", resident_bytes() >> 20, peak_bytes() >> 20);
}

/// Applies jobs of one pod one after the other: the median time until it is durable, and the 99th percentile.
async fn apply(cluster: &ClusterClient<Channel>, name: &str) -> anyhow::Result<[Duration; 2]> {
    let mut times = Vec::new();
    for number in 0..SAMPLES {
        let request =
            v1::ApplyJobRequest { job: Some(one(&format!("{name}{number}"))), ..Default::default() };
        let start = Instant::now();
        cluster.clone().apply_job(request).await?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok([times[SAMPLES / 2], times[SAMPLES * 99 / 100]])
}

/// Asks what applies would do: the median time.
async fn plan(mut cluster: ClusterClient<Channel>) -> anyhow::Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..PLANS {
        let request = v1::PlanJobsRequest { jobs: vec![one("planned")] };
        let start = Instant::now();
        cluster.plan_jobs(request).await?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[PLANS / 2])
}

pub(crate) fn one(name: &str) -> v1::Job {
    match job(name.to_owned(), 1, 1_000, Spread::Node) {
        Event::ApplyJob(job, _) => convert::job_to_message(&job),
        other => unreachable!("a job is applied, not {other:?}"),
    }
}
