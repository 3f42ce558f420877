//! Several servers, each a process, with one store in etcd: leaders are killed and paused again and again.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hextet_api::{
    connect::{self, Credentials},
    v1::{self, cluster_client::ClusterClient, watch_response::Response},
};
use scheduler::{
    backup::{self, Incomplete, NewFile},
    convert,
    server::{self, ServerConfig, StoreChoice},
};
use support::{FakeNode, Watch, etcd::EtcdProcess, subscribe};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status, transport::Channel};

/// When the leader is killed, no write waits longer.
const INTERRUPTION_MAX: Duration = Duration::from_secs(3);
/// When it is stopped, its lease has to end, and calls to it hang: a bound that a busy machine keeps, too.
const PAUSE_MAX: Duration = Duration::from_secs(6);
/// A call to a server that was paused hangs: another is asked.
const CALL_MAX: Duration = Duration::from_millis(500);
const DEADLINE: Duration = Duration::from_secs(30);
const FOLDER: &str = "HEXTET_TEST_SERVER_FOLDER";
const URL: &str = "HEXTET_TEST_SERVER_STORE";

/// Not a test by itself: the others start this program anew with it, as a server of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it is a server, for the other tests"]
async fn process() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let url = std::env::var(URL).unwrap();
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let config = ServerConfig {
        store: StoreChoice::Etcd(url.parse().unwrap()),
        lease: Duration::from_secs(5),
        ..support::config(&folder)
    };
    server::run(config, std::future::pending(), |ready| {
        let text = ready.addresses[0].to_string();
        std::fs::write(folder.join("ready.new"), text).unwrap();
        std::fs::rename(folder.join("ready.new"), folder.join("ready")).unwrap();
    })
    .await
    .unwrap();
}

struct ServerProcess {
    child: Child,
    folder: PathBuf,
}

impl ServerProcess {
    fn start(folder: &Path, url: &str) -> ServerProcess {
        std::fs::create_dir_all(folder).unwrap();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("log")).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process", "--ignored", "--nocapture"])
            .env(FOLDER, folder)
            .env(URL, url)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        ServerProcess { child, folder: folder.to_owned() }
    }

    async fn ready(&self) -> String {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Ok(text) = std::fs::read_to_string(self.folder.join("ready")) {
                return text;
            }
            assert!(Instant::now() < end, "{}: {}", self.folder.display(), self.log());
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    fn socket(&self) -> PathBuf {
        support::socket(&self.folder)
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let _ = std::fs::remove_file(self.folder.join("ready"));
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An etcd and servers.
struct Rig {
    etcd: EtcdProcess,
    servers: Vec<ServerProcess>,
    dir: tempfile::TempDir,
}

impl Rig {
    async fn start(test: &str, count: usize) -> Option<Rig> {
        let etcd = EtcdProcess::start(test)?;
        let dir = tempfile::tempdir().unwrap();
        let start = |number| ServerProcess::start(&dir.path().join(format!("s{number}")), &etcd.url());
        let servers: Vec<_> = (0..count).map(start).collect();
        for server in &servers {
            server.ready().await;
        }
        Some(Rig { etcd, servers, dir })
    }

    /// Which server leads, by what it says in etcd.
    async fn leader(&self) -> usize {
        let end = Instant::now() + DEADLINE;
        loop {
            let found = self.etcd.get("/hextet/leader");
            for (number, server) in self.servers.iter().enumerate() {
                let address = std::fs::read_to_string(server.folder.join("ready")).unwrap_or_default();
                if !address.is_empty() && found.contains(&format!("\"{address}\"")) {
                    return number;
                }
            }
            assert!(Instant::now() < end, "nobody leads: {found}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn restart(&mut self, number: usize) {
        let folder = self.servers[number].folder.clone();
        self.servers[number] = ServerProcess::start(&folder, &self.etcd.url());
    }
}

/// Of two servers with one etcd, through the one that follows; the cluster goes on in a file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_from_etcd_makes_a_cluster_of_one_server() {
    let Some(rig) = Rig::start("a_backup_from_etcd_makes_a_cluster_of_one_server", 2).await else { return };
    let leader = rig.leader().await;
    let mut client = local(&rig.servers[leader].socket()).await.unwrap();
    // More than one page and one chunk of each kind.
    let mut last = 0;
    for number in 0..150 {
        last = apply(&mut client, &format!("j{number}")).await.unwrap().revision;
    }
    let expected = jobs(&mut client).await.unwrap();
    let list = v1::ListRevisionsRequest { limit: 1000, ..Default::default() };
    let log = client.list_revisions(list.clone()).await.unwrap().into_inner().revisions;
    let status = client.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();

    let file = rig.dir.path().join("backup");
    let mut whole = NewFile::create(&file).unwrap();
    let mut chunks = client.backup(v1::BackupRequest {}).await.unwrap().into_inner();
    let mut meanwhile = local(&rig.servers[1 - leader].socket()).await.unwrap();
    let mut number = 0;
    while let Some(chunk) = chunks.message().await.unwrap() {
        // Through the server that follows, and not in the backup.
        apply(&mut meanwhile, &format!("late-{number}")).await.unwrap();
        whole.append(&chunk.data).unwrap();
        number += 1;
    }
    whole.finish().unwrap();
    assert!(number > 0);

    let folder = rig.dir.path().join("restored");
    let restored = backup::restore(&file, &folder.join("state"), Incomplete::Refuse).unwrap();
    assert!(restored.revision >= last && restored.missing.is_empty(), "{restored:?}");
    let server = support::TestServer::start(&folder).await;
    let mut client = server.local().await;
    let now = client.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(now.prefix, status.prefix);
    assert_ne!(now.epoch, status.epoch);
    assert!(jobs(&mut client).await.unwrap().is_superset(&expected));
    let kept = client.list_revisions(list).await.unwrap().into_inner().revisions;
    assert!(kept.ends_with(&log), "the history is there");
    let made = apply(&mut client, "after").await.unwrap();
    assert!(made.changed && made.revision > restored.revision);
    server.stop().await;
}

async fn local(socket: &Path) -> Result<ClusterClient<Channel>, Status> {
    match connect::unix(socket).await {
        Ok(channel) => Ok(ClusterClient::new(channel)),
        Err(error) => Err(Status::unavailable(error.to_string())),
    }
}

async fn apply(client: &mut ClusterClient<Channel>, job: &str) -> Result<v1::ApplyJobResponse, Status> {
    let yaml = format!(
        "{{job: {job}, groups: {{web: {{count: 1, availability: ha, tasks: {{server: {{exec: [/bin/x], cpu: 10m, \
         memory: 1Mi}}}}}}}}}}"
    );
    let job = convert::job_to_message(&serde_norway::from_str(&yaml).unwrap());
    let mut request = tonic::Request::new(v1::ApplyJobRequest { job: Some(job), ..Default::default() });
    request.set_timeout(Duration::from_secs(5));
    Ok(client.apply_job(request).await?.into_inner())
}

async fn jobs(client: &mut ClusterClient<Channel>) -> Result<BTreeSet<String>, Status> {
    let mut request = tonic::Request::new(v1::ListJobsRequest::default());
    request.set_timeout(Duration::from_secs(5));
    let list = client.list_jobs(request).await?.into_inner().jobs;
    Ok(list.into_iter().filter_map(|status| Some(status.job?.name)).collect())
}

/// Who writes again and again, and what was acknowledged.
#[derive(Default)]
struct Written {
    jobs: BTreeSet<String>,
    /// The job that each revision changed.
    revisions: BTreeMap<u64, String>,
    last: Option<Instant>,
    longest: Duration,
}

/// Writes through the servers in turn, starting with one that is not killed now.
async fn write(writer: usize, sockets: Vec<PathBuf>, written: Arc<Mutex<Written>>, stop: Arc<AtomicBool>) {
    let (mut number, mut at) = (0, writer);
    let mut client = None;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let job = format!("w{writer}-{number}");
        loop {
            if client.is_none() {
                at += 1;
                client = local(&sockets[at % sockets.len()]).await.ok();
            }
            let result = match &mut client {
                Some(client) => timeout(CALL_MAX, apply(client, &job)).await,
                None => Ok(Err(Status::unavailable("no socket"))),
            };
            match result {
                Ok(Ok(applied)) => {
                    let mut written = written.lock().unwrap();
                    written.jobs.insert(job.clone());
                    // A write that is repeated, because its answer was lost, may change nothing any more.
                    if applied.changed {
                        let other = written.revisions.insert(applied.revision, job.clone());
                        assert_eq!(other, None, "revision {} was given twice", applied.revision);
                    }
                    let now = Instant::now();
                    let gap = written.last.map_or(Duration::ZERO, |last| now - last);
                    written.longest = written.longest.max(gap);
                    written.last = Some(now);
                    break;
                }
                Ok(Err(status)) if status.code() == Code::InvalidArgument => panic!("{status}"),
                _ => client = None,
            }
            if stop.load(Ordering::Relaxed) {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// Each third time the leader is stopped, and goes on when another leads.
fn is_pause(round: usize) -> bool {
    round % 3 == 2
}

/// Kills or pauses the leader; gives how long nobody could write.
async fn without_a_leader(rig: &mut Rig, pause: bool, written: &Arc<Mutex<Written>>) -> Duration {
    let leader = rig.leader().await;
    written.lock().unwrap().longest = Duration::ZERO;
    let before = written.lock().unwrap().jobs.len();
    let killed = Instant::now();
    if pause {
        rig.servers[leader].signal("STOP");
    } else {
        rig.servers[leader].kill();
    }
    let end = Instant::now() + DEADLINE;
    loop {
        sleep(Duration::from_millis(50)).await;
        let now = written.lock().unwrap();
        if now.jobs.len() > before + 20
            && killed.elapsed() > INTERRUPTION_MAX
            && now.last.is_some_and(|last| last.elapsed() < CALL_MAX)
        {
            break;
        }
        assert!(Instant::now() < end, "nobody writes: {}", rig.servers[(leader + 1) % 3].log());
    }
    let longest = written.lock().unwrap().longest;
    if pause {
        rig.servers[leader].signal("CONT");
    } else {
        rig.restart(leader);
        rig.servers[leader].ready().await;
    }
    longest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_when_leaders_are_killed_and_paused() {
    let Some(mut rig) =
        Rig::start("no_acknowledged_write_is_lost_when_leaders_are_killed_and_paused", 3).await
    else {
        return;
    };
    let (written, stop) = (Arc::new(Mutex::new(Written::default())), Arc::new(AtomicBool::new(false)));
    let sockets: Vec<_> = rig.servers.iter().map(ServerProcess::socket).collect();
    let writers: Vec<_> = (0..3)
        .map(|writer| tokio::spawn(write(writer, sockets.clone(), written.clone(), stop.clone())))
        .collect();
    sleep(Duration::from_millis(500)).await;
    let mut interruptions = vec![];
    for round in 0..6 {
        interruptions.push(without_a_leader(&mut rig, is_pause(round), &written).await);
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let leader = rig.leader().await;
    let mut client = local(&rig.servers[leader].socket()).await.unwrap();
    let there = jobs(&mut client).await.unwrap();
    let acknowledged = written.lock().unwrap().jobs.clone();
    println!(
        "{} writes acknowledged, writes interrupted for (ms) {:?}",
        acknowledged.len(),
        interruptions.iter().map(Duration::as_millis).collect::<Vec<_>>()
    );
    let lost: Vec<_> = acknowledged.difference(&there).collect();
    assert!(lost.is_empty(), "{lost:?}");
    for (round, time) in interruptions.iter().enumerate() {
        let max = if is_pause(round) { PAUSE_MAX } else { INTERRUPTION_MAX };
        assert!(*time < max, "{interruptions:?}");
    }
    // Each server answers as the leader does.
    for server in &rig.servers {
        let mut client = local(&server.socket()).await.unwrap();
        assert_eq!(jobs(&mut client).await.unwrap().len(), there.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_and_balancers_go_on_with_the_next_leader() {
    let Some(mut rig) = Rig::start("nodes_and_balancers_go_on_with_the_next_leader", 2).await else { return };
    let leader = rig.leader().await;
    let mut client = local(&rig.servers[1 - leader].socket()).await.unwrap();
    let token = token_of_all(&mut client, 2).await;
    let credentials = support::enroll(&token, "n1", 1).await;
    assert_eq!(credentials.servers.len(), 2, "a node knows both servers");
    // The first server in the list does not answer: agents and `netctl login` try the next.
    let mut first_gone = credentials.clone();
    first_gone.servers.insert(0, "127.0.0.1:1".to_owned());
    let node = FakeNode::attach(first_gone).await;
    apply(&mut client, "hello").await.unwrap();
    node.when("its pod", |told| (told.pods.len() == 1).then_some(())).await;
    // A server that comes later is told to the nodes that are attached.
    let third = ServerProcess::start(&rig.dir.path().join("s2"), &rig.etcd.url());
    let address = third.ready().await;
    node.when("the third server", |told| told.servers.contains(&address).then_some(())).await;
    drop(third);

    let mut watch = watch(&rig.servers[1 - leader].socket(), subscribe("hello")).await;
    let snapshot = watch.snapshot().await;
    rig.servers[leader].kill();
    node.when("the end", |told| told.ended.clone()).await;

    let seen = snapshot.revision;
    let end = Instant::now() + DEADLINE;
    let node = loop {
        assert!(Instant::now() < end, "the node does not come back");
        if let Ok(node) = timeout(Duration::from_secs(3), try_attach(credentials.clone())).await
            && let Some(node) = node
        {
            break node;
        }
        sleep(Duration::from_millis(50)).await;
    };
    let resume = v1::Subscribe { epoch: snapshot.epoch.clone(), from_revision: seen, ..subscribe("hello") };
    let mut watch = self::watch(&rig.servers[1 - leader].socket(), resume).await;
    let mut client = local(&rig.servers[1 - leader].socket()).await.unwrap();
    let list = client.list_pods(v1::ListPodsRequest::default()).await.unwrap().into_inner().pods;
    assert_eq!(list.len(), 1, "the pod was not placed anew: {list:?}");
    drop(node);
    let mut delete =
        tonic::Request::new(v1::DeleteJobRequest { name: "hello".to_owned(), ..Default::default() });
    delete.set_timeout(Duration::from_secs(5));
    client.delete_job(delete).await.unwrap();
    // Events go on where they ended: no snapshot, no revision that was seen.
    loop {
        match watch.next().await.unwrap() {
            Response::Event(event) => {
                assert!(event.revision > seen, "{} twice", event.revision);
                break;
            }
            Response::Bookmark(_) => {}
            other => panic!("not resumed: {other:?}"),
        }
    }
    rig.restart(leader);
    rig.servers[leader].ready().await;
}

/// The list of servers in a token grows as servers come.
async fn token_of_all(client: &mut ClusterClient<Channel>, count: usize) -> hextet_api::token::Token {
    let end = Instant::now() + DEADLINE;
    loop {
        let request = v1::CreateTokenRequest {
            role: v1::TokenRole::Node.into(),
            valid_seconds: 60,
            ..v1::CreateTokenRequest::default()
        };
        let token = client.create_token(request).await.unwrap().into_inner().token;
        let token: hextet_api::token::Token = token.parse().unwrap();
        if token.servers.len() >= count {
            return token;
        }
        assert!(Instant::now() < end, "{:?}", token.servers);
        sleep(Duration::from_millis(200)).await;
    }
}

async fn try_attach(credentials: Credentials) -> Option<FakeNode> {
    connect::mutual_tls(&credentials).await.ok()?;
    Some(FakeNode::attach(credentials).await)
}

async fn watch(socket: &Path, subscribe: v1::Subscribe) -> Watch {
    let channel = connect::unix(socket).await.unwrap();
    Watch::start(v1::endpoints_client::EndpointsClient::new(channel), subscribe).await
}

/// Asked through the one that follows; the one that leads is killed in the middle, and the other takes the new CA up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ca_is_replaced_and_the_next_leader_goes_on_with_the_new_one() {
    let Some(mut rig) =
        Rig::start("the_ca_is_replaced_and_the_next_leader_goes_on_with_the_new_one", 2).await
    else {
        return;
    };
    let leader = rig.leader().await;
    let other = rig.servers[1 - leader].socket();
    let mut client = local(&other).await.unwrap();
    let token = token_of_all(&mut client, 2).await;
    let unused = token_of_all(&mut client, 2).await;
    let old = support::enroll(&token, "n1", 1).await;
    turn(&mut client, v1::CaTurn::Rotate).await.unwrap();
    // A follower's socket is its own machine's root, with a certificate of whichever CA it knows.
    let mut client = local(&other).await.unwrap();
    let moving = client.get_ca(v1::GetCaRequest {}).await.unwrap().into_inner();
    assert_eq!(moving.leaving, old.ca_fingerprint().to_string());

    rig.servers[leader].kill();
    assert_eq!(rig.leader().await, 1 - leader);
    let end = Instant::now() + DEADLINE;
    let (found, mut client) = loop {
        let mut client = local(&other).await.unwrap();
        if let Ok(found) = client.get_ca(v1::GetCaRequest {}).await {
            break (found.into_inner(), client);
        }
        assert!(Instant::now() < end, "{}", rig.servers[1 - leader].log());
    };
    assert_eq!((&found.issuing, &found.leaving), (&moving.issuing, &moving.leaving));
    // A node and a token that know the old CA alone.
    let channel = connect::mutual_tls(&old).await.unwrap();
    let fresh = connect::renew(&old, channel, "").await.unwrap();
    connect::confirm(&fresh).await.unwrap();
    assert_eq!(fresh.ca_fingerprint().to_string(), moving.issuing);
    let second = support::enroll(&unused, "n2", 2).await;
    assert_eq!(second.ca_fingerprint(), fresh.ca_fingerprint());

    // The server that comes back follows, and reads what there is from etcd.
    rig.restart(leader);
    let back = rig.servers[leader].ready().await;
    turn(&mut client, v1::CaTurn::Retire).await.unwrap();
    let through = Credentials { servers: vec![back], ..fresh.clone() };
    FakeNode::attach(through).await;
    let socket = rig.servers[leader].socket();
    let end = Instant::now() + DEADLINE;
    while local(&socket).await.unwrap().get_ca(v1::GetCaRequest {}).await.is_err() {
        assert!(Instant::now() < end, "{}", rig.servers[leader].log());
    }
    assert!(connect::mutual_tls(&old).await.unwrap_err().is_another_ca());
    // And leads with the one CA that there is.
    rig.servers[1 - leader].kill();
    assert_eq!(rig.leader().await, leader);
    let node = try_attach(Credentials { servers: vec![rig.servers[leader].ready().await], ..second }).await;
    assert!(node.is_some());
}

async fn turn(client: &mut ClusterClient<Channel>, turn: v1::CaTurn) -> Result<(), Status> {
    let wanted = v1::TurnCaRequest { turn: turn.into(), ..v1::TurnCaRequest::default() };
    client.turn_ca(wanted).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcd_calls_are_answered_and_with_it_they_succeed() {
    let Some(mut rig) = Rig::start("without_etcd_calls_are_answered_and_with_it_they_succeed", 2).await
    else {
        return;
    };
    let mut client = local(&rig.servers[0].socket()).await.unwrap();
    apply(&mut client, "before").await.unwrap();
    rig.etcd.kill();
    let end = Instant::now() + DEADLINE;
    let why = loop {
        let answered = match local(&rig.servers[0].socket()).await {
            Ok(mut client) => apply(&mut client, "meanwhile").await,
            Err(status) => Err(status),
        };
        let status = answered.expect_err("etcd is away");
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        if status.message().starts_with("no server leads now") {
            break status.message().to_owned();
        }
        assert!(Instant::now() < end, "{status:?}");
        sleep(Duration::from_millis(100)).await;
    };
    assert!(why.contains("does not answer"), "{why}");
    rig.etcd.restart();
    let end = Instant::now() + DEADLINE;
    while let Err(error) = match local(&rig.servers[1].socket()).await {
        Ok(mut client) => apply(&mut client, "after").await,
        Err(status) => Err(status),
    } {
        assert!(Instant::now() < end, "{error:?}: {}", rig.servers[1].log());
        sleep(Duration::from_millis(100)).await;
    }
    let mut client = local(&rig.servers[0].socket()).await.unwrap();
    let there = jobs(&mut client).await.unwrap();
    assert!(there.contains("before") && there.contains("after"), "{there:?}");
}
