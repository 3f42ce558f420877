//! A server in this process, and a node that runs nothing but answers as an agent does.
#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod etcd;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use hextet_api::{
    connect::{self, Credentials, Enrolled, Key, Wish},
    token::Token,
    v1::{
        self, agent_client::AgentClient, cluster_client::ClusterClient, endpoints_client::EndpointsClient,
        lease_answer::Answer, lease_renewal::Renewal, node_command::Command, node_report::Report,
        watch_request::Request, watch_response::Response,
    },
};
use scheduler::{
    backup::NewFile,
    convert,
    server::{self, Ready, ServerConfig},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

/// No condition takes longer than this, also on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);
pub(crate) const LEASE: Duration = Duration::from_millis(1500);

pub(crate) struct TestServer {
    pub(crate) ready: Ready,
    stop: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

pub(crate) fn config(dir: &Path) -> ServerConfig {
    ServerConfig {
        state_dir: dir.join("state"),
        store: server::StoreChoice::Local,
        listen: vec!["[::1]:0".parse().unwrap()],
        socket: dir.join("server.sock"),
        advertise: vec![],
        lease: LEASE,
        history_bytes: 64 << 20,
        pod_ipv4: None,
    }
}

impl TestServer {
    pub(crate) async fn start(dir: &Path) -> TestServer {
        TestServer::start_with(config(dir)).await
    }

    pub(crate) async fn start_with(config: ServerConfig) -> TestServer {
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, is_ready) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(server::run(config, shutdown, move |state| {
            ready.send(state.clone()).unwrap();
        }));
        match timeout(DEADLINE, is_ready).await.unwrap() {
            Ok(ready) => TestServer { ready, stop, task },
            Err(_) => panic!("the server did not start: {:?}", task.await),
        }
    }

    /// Another server where one was, with the state in `dir`.
    pub(crate) async fn start_at(dir: &Path, address: SocketAddr) -> TestServer {
        TestServer::start_with(ServerConfig { listen: vec![address], ..config(dir) }).await
    }

    pub(crate) async fn back_up(&self, path: &Path) {
        let mut file = NewFile::create(path).unwrap();
        let mut chunks = self.local().await.backup(v1::BackupRequest {}).await.unwrap().into_inner();
        while let Some(chunk) = chunks.message().await.unwrap() {
            file.append(&chunk.data).unwrap();
        }
        file.finish().unwrap();
    }

    /// What happened to an object, or to all of them; the newest first.
    pub(crate) async fn history(&self, key: &str) -> Vec<v1::Revision> {
        let request = v1::ListRevisionsRequest { limit: 1000, key: key.to_owned(), ..Default::default() };
        self.local().await.list_revisions(request).await.unwrap().into_inner().revisions
    }

    pub(crate) async fn status(&self) -> v1::GetStatusResponse {
        self.local().await.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner()
    }

    pub(crate) async fn stop(self) {
        self.stop.send(()).unwrap();
        timeout(DEADLINE, self.task).await.unwrap().unwrap().unwrap();
    }

    pub(crate) async fn local(&self) -> ClusterClient<Channel> {
        ClusterClient::new(connect::unix(&self.ready.socket).await.unwrap())
    }

    pub(crate) async fn watcher(&self) -> EndpointsClient<Channel> {
        EndpointsClient::new(connect::unix(&self.ready.socket).await.unwrap())
    }

    pub(crate) async fn token(&self, role: v1::TokenRole, name: &str, selector: &str) -> Token {
        let request = v1::CreateTokenRequest {
            role: role.into(),
            name: name.to_owned(),
            valid_seconds: 60,
            selector: selector.to_owned(),
        };
        let token = self.local().await.create_token(request).await.unwrap().into_inner().token;
        token.parse().unwrap()
    }

    /// Applies a job of one group `web`.
    pub(crate) async fn apply(&self, job: &str, count: u32, argument: &str) -> v1::ApplyJobResponse {
        self.try_apply(job, count, argument).await.unwrap()
    }

    pub(crate) async fn try_apply(
        &self,
        job: &str,
        count: u32,
        argument: &str,
    ) -> Result<v1::ApplyJobResponse, Status> {
        self.apply_job(self.job(job, count, argument)).await
    }

    pub(crate) async fn apply_job(&self, job: v1::Job) -> Result<v1::ApplyJobResponse, Status> {
        let request = v1::ApplyJobRequest { job: Some(job), message: "a test".to_owned(), if_version: None };
        Ok(self.local().await.apply_job(request).await?.into_inner())
    }

    /// A job of one group `web`.
    pub(crate) fn job(&self, job: &str, count: u32, argument: &str) -> v1::Job {
        let yaml = format!(
            "{{job: {job}, groups: {{web: {{count: {count}, availability: ha, tasks: \
             {{server: {{exec: [/bin/server, {argument}], cpu: 10m, memory: 1Mi}}}}}}}}}}"
        );
        convert::job_to_message(&serde_norway::from_str(&yaml).unwrap())
    }

    /// Keeps so many revisions in the history.
    #[allow(dead_code, reason = "each test binary has a copy of this module")]
    pub(crate) async fn compact(&self, keep_revisions: u64) -> v1::CompactHistoryResponse {
        let request = v1::CompactHistoryRequest { keep_revisions, ..Default::default() };
        self.local().await.compact_history(request).await.unwrap().into_inner()
    }

    pub(crate) async fn delete(&self, job: &str) {
        let request = v1::DeleteJobRequest { name: job.to_owned(), message: String::new() };
        self.local().await.delete_job(request).await.unwrap();
    }

    pub(crate) async fn pods(&self) -> Vec<v1::Pod> {
        self.local().await.list_pods(v1::ListPodsRequest::default()).await.unwrap().into_inner().pods
    }

    pub(crate) async fn revision(&self) -> u64 {
        self.local().await.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner().revision
    }

    pub(crate) async fn nodes(&self) -> Vec<v1::Node> {
        self.local().await.list_nodes(v1::ListNodesRequest::default()).await.unwrap().into_inner().nodes
    }

    /// Waits until the pods are so, and gives them.
    pub(crate) async fn pods_when(&self, what: &str, so: impl Fn(&[v1::Pod]) -> bool) -> Vec<v1::Pod> {
        let mut pods = vec![];
        let wait = async {
            loop {
                pods = self.pods().await;
                if so(&pods) {
                    return;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        if timeout(DEADLINE, wait).await.is_err() {
            panic!("never {what}: {pods:#?}");
        }
        pods
    }

    pub(crate) async fn running(&self, count: usize) -> Vec<v1::Pod> {
        self.pods_when("running", |pods| pods.len() == count && pods.iter().all(is_running)).await
    }
}

pub(crate) fn is_running(pod: &v1::Pod) -> bool {
    pod.phase() == v1::PodPhase::Running
}

pub(crate) async fn enroll(token: &Token, name: &str, subnet_id: u16) -> Credentials {
    try_enroll(token, &Key::generate().unwrap(), name, subnet_id).await.unwrap()
}

pub(crate) async fn try_enroll(
    token: &Token,
    key: &Key,
    name: &str,
    subnet_id: u16,
) -> Result<Credentials, Status> {
    let group_id = u32::from(subnet_id) + 1;
    let wish = Wish { name: name.to_owned(), subnet_id, group_id, ..Wish::default() };
    try_enroll_with(token, key, wish).await.map(|enrolled| enrolled.credentials)
}

pub(crate) async fn try_enroll_with(token: &Token, key: &Key, wish: Wish) -> Result<Enrolled, Status> {
    match connect::enroll(token, key, wish).await {
        Ok(enrolled) => Ok(enrolled),
        Err(connect::EnrollError::Refused { status }) => Err(status),
        Err(other) => panic!("{other}"),
    }
}

/// What a fake node was told, and how it answers.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) pods: BTreeMap<String, v1::PodAssignment>,
    pub(crate) peers: BTreeMap<String, v1::Peer>,
    /// Where all servers are.
    pub(crate) servers: Vec<String>,
    /// The CA that makes certificates, in hex.
    pub(crate) ca: String,
    /// How many full assignments came.
    pub(crate) full: u32,
    /// What it was asked of its pods.
    pub(crate) questions: Vec<v1::DescribePod>,
    /// Why the stream ended.
    pub(crate) ended: Option<Status>,
    /// It does not renew its lease, and its connections stay, as when somebody cuts its cable.
    pub(crate) is_silent: bool,
    /// Who is not there, when it is asked.
    pub(crate) gone: BTreeSet<String>,
    /// The last grant.
    pub(crate) grant: Option<v1::LeaseGrant>,
    /// The term of the last assignment.
    pub(crate) term: u64,
}

pub(crate) struct FakeNode {
    pub(crate) credentials: Credentials,
    pub(crate) told: Arc<Mutex<Told>>,
    reports: mpsc::Sender<v1::NodeReport>,
    task: JoinHandle<()>,
}

impl FakeNode {
    /// Gets a certificate and attaches.
    pub(crate) async fn join(server: &TestServer, name: &str, subnet_id: u16) -> FakeNode {
        let token = server.token(v1::TokenRole::Node, "", "").await;
        FakeNode::attach(enroll(&token, name, subnet_id).await).await
    }

    /// Attaches with a certificate that it has, and waits until it is told everything.
    pub(crate) async fn attach(credentials: Credentials) -> FakeNode {
        let mut client = AgentClient::new(connect::mutual_tls(&credentials).await.unwrap());
        let (reports, stream) = mpsc::channel(64);
        reports.send(report(Report::Hello(hello_of(&credentials.name)))).await.unwrap();
        let commands = client.attach(ReceiverStream::new(stream)).await.unwrap().into_inner();
        let told = Arc::new(Mutex::new(Told::default()));
        let (renewals, stream) = mpsc::channel(64);
        let answers = client.hold_lease(ReceiverStream::new(stream)).await.unwrap().into_inner();
        let (alive, holding) = (live(client, reports.clone(), commands, told.clone()), told.clone());
        let task = tokio::spawn(async move {
            tokio::select! {
                () = alive => {}
                () = hold(renewals, answers, holding) => {}
            }
        });
        let node = FakeNode { credentials, told, reports, task };
        node.when("an assignment", |told| (told.full > 0).then_some(())).await;
        node
    }

    /// Says something in its stream.
    pub(crate) async fn say(&self, what: Report) {
        self.reports.send(report(what)).await.unwrap();
    }

    /// Says that it is being taken down, and waits until the server has ended the stream.
    pub(crate) async fn leave(self) -> Credentials {
        self.say(Report::Leaving(v1::NodeLeaving::default())).await;
        timeout(DEADLINE, self.task).await.expect("the stream ends").unwrap();
        assert!(self.told.lock().unwrap().ended.is_none(), "without an error");
        self.credentials
    }

    /// Goes on running and is not heard any more, as when somebody cuts its cable.
    pub(crate) fn fall_silent(&self, silent: bool) {
        self.told.lock().unwrap().is_silent = silent;
    }

    /// Says of another node that it is not there.
    pub(crate) fn miss(&self, node: &str) {
        self.told.lock().unwrap().gone.insert(node.to_owned());
    }

    /// Stops at once, as a machine that loses its power does.
    pub(crate) async fn kill(self) -> Credentials {
        self.task.abort();
        let _ = self.task.await;
        self.credentials
    }

    pub(crate) async fn when<T>(&self, what: &str, so: impl Fn(&Told) -> Option<T>) -> T {
        let wait = async {
            loop {
                if let Some(found) = so(&self.told.lock().unwrap()) {
                    return found;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        match timeout(DEADLINE, wait).await {
            Ok(found) => found,
            Err(_) => panic!("never {what}: {:?}", self.told.lock().unwrap().pods.keys()),
        }
    }
}

fn report(report: Report) -> v1::NodeReport {
    v1::NodeReport { report: Some(report) }
}

/// Each node has an underlay address of its own.
pub(crate) fn hello_of(name: &str) -> v1::NodeHello {
    let mut hello = hello();
    let sum = name.bytes().fold(0_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    hello.underlay[12..].copy_from_slice(&sum.to_be_bytes());
    hello
}

pub(crate) fn hello() -> v1::NodeHello {
    v1::NodeHello {
        underlay: "2001:db8:1::11".parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec(),
        capacity: Some(v1::Resources { cpu_millis: 4000, memory_bytes: 8 << 30, ..v1::Resources::default() }),
        agent_version: "test".to_owned(),
        ..v1::NodeHello::default()
    }
}

/// Starts what it is told to run, stops what it is told to stop, and says so.
async fn live(
    client: AgentClient<Channel>,
    reports: mpsc::Sender<v1::NodeReport>,
    mut commands: Streaming<v1::NodeCommand>,
    told: Arc<Mutex<Told>>,
) {
    loop {
        match commands.message().await {
            Ok(Some(v1::NodeCommand { command: Some(Command::Assignment(assignment)) })) => {
                let pods = take(&mut told.lock().unwrap(), assignment);
                let _ = reports.send(report(Report::Pods(v1::PodReports { pods }))).await;
            }
            Ok(Some(v1::NodeCommand { command: Some(Command::ReadLogs(ask)) })) => {
                tokio::spawn(send_logs(client.clone(), ask));
            }
            Ok(Some(v1::NodeCommand { command: Some(Command::DescribePod(question)) })) => {
                told.lock().unwrap().questions.push(question);
            }
            Ok(_) => return,
            Err(status) => {
                told.lock().unwrap().ended = Some(status);
                return;
            }
        }
    }
}

/// Renews the lease, and says of others what it was given to say. A stream that ends leaves the other to end.
async fn hold(
    renewals: mpsc::Sender<v1::LeaseRenewal>,
    mut answers: Streaming<v1::LeaseAnswer>,
    told: Arc<Mutex<Told>>,
) {
    let mut beats = tokio::time::interval(LEASE / 25);
    let mut number = 0;
    loop {
        let renewal = tokio::select! {
            _ = beats.tick() => {
                number += 1;
                if told.lock().unwrap().is_silent { None } else { Some(Renewal::Number(number)) }
            }
            answer = answers.message() => match answer {
                Ok(Some(v1::LeaseAnswer { answer: Some(Answer::LookFor(v1::LookFor { node, .. })) })) => {
                    let is_there = !told.lock().unwrap().gone.contains(&node);
                    Some(Renewal::Seen(v1::NeighbourSeen { node, is_there }))
                }
                Ok(Some(v1::LeaseAnswer { answer: Some(Answer::Grant(grant)) })) => {
                    told.lock().unwrap().grant = Some(grant);
                    None
                }
                _ => return std::future::pending().await,
            },
        };
        if let Some(renewal) = renewal {
            let _ = renewals.send(v1::LeaseRenewal { renewal: Some(renewal) }).await;
        }
    }
}

fn take(told: &mut Told, assignment: v1::Assignment) -> Vec<v1::PodReport> {
    if assignment.full {
        told.full += 1;
        told.servers = assignment.servers;
        told.ca = assignment.ca.iter().map(|byte| format!("{byte:02x}")).collect();
        told.pods.clear();
        told.peers.clear();
    }
    told.term = assignment.term;
    let mut reports = vec![];
    for peer in assignment.peers {
        told.peers.insert(peer.name.clone(), peer);
    }
    for pod in assignment.pods {
        let (id, phase) = (pod.id.clone(), v1::PodPhase::Running.into());
        reports.push(v1::PodReport { id, phase, ..v1::PodReport::default() });
        told.pods.insert(pod.id.clone(), pod);
    }
    for id in assignment.removed_pods {
        told.pods.remove(&id);
        reports.push(v1::PodReport { id, gone: true, ..v1::PodReport::default() });
    }
    reports
}

async fn send_logs(mut client: AgentClient<Channel>, ask: v1::ReadLogs) {
    let request_id = ask.request_id;
    let chunk = |data: String| v1::SendLogsRequest { request_id, data: data.into(), ..Default::default() };
    let chunks = vec![chunk(format!("{} of {}: ", ask.task, ask.pod)), chunk("hello\n".to_owned())];
    client.send_logs(tokio_stream::iter(chunks)).await.unwrap();
}

/// A load balancer that answers when it is told to.
pub(crate) struct Watch {
    pub(crate) answers: mpsc::Sender<v1::WatchRequest>,
    pub(crate) messages: Streaming<v1::WatchResponse>,
}

impl Watch {
    pub(crate) async fn start(mut client: EndpointsClient<Channel>, subscribe: v1::Subscribe) -> Watch {
        let (answers, stream) = mpsc::channel(64);
        answers.send(request(Request::Subscribe(subscribe))).await.unwrap();
        let messages = client.watch(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Watch { answers, messages }
    }

    pub(crate) async fn next(&mut self) -> Result<Response, Status> {
        let message = timeout(DEADLINE, self.messages.message()).await.expect("a message in time")?;
        Ok(message.expect("the stream goes on").response.expect("known"))
    }

    pub(crate) async fn snapshot(&mut self) -> v1::Snapshot {
        match self.next().await.unwrap() {
            Response::Snapshot(snapshot) => snapshot,
            other => panic!("not a snapshot: {other:?}"),
        }
    }

    /// The next event; bookmarks in between say nothing new.
    pub(crate) async fn event(&mut self) -> v1::Event {
        loop {
            match self.next().await.unwrap() {
                Response::Event(event) => return event,
                Response::Bookmark(_) => {}
                other => panic!("not an event: {other:?}"),
            }
        }
    }

    pub(crate) async fn ack(&self, revision: u64) {
        self.answers.send(request(Request::Ack(v1::Ack { revision }))).await.unwrap();
    }
}

fn request(request: Request) -> v1::WatchRequest {
    v1::WatchRequest { request: Some(request) }
}

pub(crate) fn subscribe(job: &str) -> v1::Subscribe {
    v1::Subscribe { job: job.to_owned(), client: "test".to_owned(), ..v1::Subscribe::default() }
}

pub(crate) fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, String) {
    let status = result.unwrap_err();
    (status.code(), status.message().to_owned())
}

pub(crate) fn socket(dir: &Path) -> PathBuf {
    dir.join("server.sock")
}
