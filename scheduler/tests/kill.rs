//! A server process that is killed at random moments, and what is there when it is started again.

mod support;

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hextet_api::{
    connect,
    v1::{self, cluster_client::ClusterClient},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use scheduler::{convert, server};
use support::{DEADLINE, config, socket};
use tokio::time::sleep;
use tonic::transport::Channel;

const KILLS: usize = 25;
/// A server is killed some moments after so many writes.
const WRITES_MAX: usize = 20;
const MOMENTS_MAX_US: u64 = 10_000;
/// Says to the process that runs only one "test" that it is the server, and where.
const DIR: &str = "HEXTET_TEST_KILLED_SERVER";

/// A revision and its message.
type Entry = (u64, String);

/// No test but the body of the process that the test below kills.
#[tokio::test]
async fn the_server_that_is_killed() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    server::run(config(Path::new(&dir)), std::future::pending(), |_| {}).await.unwrap();
}

fn start(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_server_that_is_killed"])
        .env(DIR, dir)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

async fn connected(dir: &Path) -> ClusterClient<Channel> {
    let begin = Instant::now();
    loop {
        if let Ok(channel) = connect::unix(&socket(dir)).await {
            let mut client = ClusterClient::new(channel);
            if client.get_status(v1::GetStatusRequest {}).await.is_ok() {
                return client;
            }
        }
        assert!(begin.elapsed() < DEADLINE, "the server did not come back");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Applies until the server is gone; gives what was acknowledged: revision and message.
async fn apply_until_it_dies(
    mut client: ClusterClient<Channel>,
    writer: usize,
    life: usize,
    done: Arc<AtomicUsize>,
) -> Vec<Entry> {
    let mut acknowledged = vec![];
    for number in 0.. {
        let yaml =
            format!("{{job: j{writer}, groups: {{g: {{tasks: {{t: {{exec: [/x, '{life}.{number}']}}}}}}}}}}");
        let job = Some(convert::job_to_message(&serde_norway::from_str(&yaml).unwrap()));
        let message = format!("{writer}.{life}.{number}");
        let request = v1::ApplyJobRequest { job, message: message.clone(), if_version: None };
        match client.apply_job(request).await {
            Ok(answer) => {
                acknowledged.push((answer.into_inner().revision, message));
                done.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => break,
        }
    }
    acknowledged
}

/// The whole log, oldest first.
async fn log(client: &mut ClusterClient<Channel>) -> Vec<Entry> {
    let (mut all, mut before) = (vec![], 0);
    loop {
        let request = v1::ListRevisionsRequest { before, limit: 1000, ..Default::default() };
        let page = client.list_revisions(request).await.unwrap().into_inner();
        all.extend(page.revisions.into_iter().map(|revision| (revision.revision, revision.message)));
        before = page.next_before;
        if before == 0 {
            all.reverse();
            return all;
        }
    }
}

async fn wait_for(done: &AtomicUsize, writes: usize) {
    let begin = Instant::now();
    while done.load(Ordering::Relaxed) < writes {
        assert!(begin.elapsed() < DEADLINE, "{writes} writes are not done");
        sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn no_kill_loses_what_was_acknowledged() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    // Those of every day, or those that `cargo xtask crash` wants.
    let (first, rounds) =
        (number("HEXTET_CRASH_SEED").unwrap_or(7), number("HEXTET_CRASH_ROUNDS").unwrap_or(1));
    for seed in first..first + rounds {
        let acknowledged = kill_again_and_again(seed).await;
        println!("seed {seed}: {KILLS} kills, {acknowledged} acknowledged writes, all there");
    }
}

/// One store through many lives of its server.
async fn kill_again_and_again(seed: u64) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut acknowledged, mut seen): (Vec<Entry>, Vec<Entry>) = Default::default();
    for life in 0..KILLS {
        let mut server = start(dir.path());
        let mut client = connected(dir.path()).await;
        let is = log(&mut client).await;
        assert_eq!(
            is.iter().map(|(number, _)| *number).collect::<Vec<_>>(),
            (1..=is.len() as u64).collect::<Vec<_>>()
        );
        assert_eq!(is[..seen.len()], seen, "seed {seed}: what was read once is read again");
        for entry in &acknowledged {
            assert_eq!(is[entry.0 as usize - 1], *entry, "seed {seed}, life {life}");
        }
        seen = is;
        let done = Arc::new(AtomicUsize::new(0));
        let write = |writer| tokio::spawn(apply_until_it_dies(client.clone(), writer, life, done.clone()));
        let writers: Vec<_> = (0..3).map(write).collect();
        wait_for(&done, rng.random_range(0..WRITES_MAX)).await;
        sleep(Duration::from_micros(rng.random_range(0..MOMENTS_MAX_US))).await;
        server.kill().unwrap();
        server.wait().unwrap();
        for writer in writers {
            acknowledged.extend(writer.await.unwrap());
        }
    }
    assert!(acknowledged.len() > KILLS * 5, "seed {seed}: {} acknowledged", acknowledged.len());
    acknowledged.len()
}
