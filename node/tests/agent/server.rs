//! A server that does what a test tells it to: enrolls one cluster's nodes and speaks to one agent.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    net::{Ipv6Addr, SocketAddr},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};

use hextet_api::{
    token::{Fingerprint, Role, Token},
    v1::{
        AddressConflict, Assignment, DescribePod, EnrollRequest, EnrollResponse, Ipv4Prefix, Ipv6Prefix,
        LeaseAnswer, LeaseGrant, LeaseHolder, LeaseRenewal, LookFor, NeighbourSeen, NodeCommand, NodeHello,
        NodeReport, PodAssignment, PodEvent, PodReport, ReadLogs, SendDescriptionRequest,
        SendDescriptionResponse, SendLogsRequest, SendLogsResponse,
        agent_server::{Agent, AgentServer},
        enrollment_server::{Enrollment, EnrollmentServer},
        lease_answer::Answer,
        lease_renewal::Renewal,
        node_command::Command,
        node_report::Report,
    },
};
use nix::sched::{CloneFlags, setns};
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{TcpListenerStream, UnboundedReceiverStream},
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};

use super::net::SERVER_ADDRESS;

pub(crate) const SECRET: [u8; 16] = [3; 16];
pub(crate) const CLUSTER: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 2, 0, 0, 0, 0, 0);
/// The prefix of the link between server and node.
const LAN: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, 0);
const PORT: u16 = 4679;
/// How long a grant is good.
pub(crate) const LEASE_MS: u32 = 2000;

/// The cluster's CA; it outlives the servers.
pub(crate) struct Ca {
    params: CertificateParams,
    key: KeyPair,
    der: Vec<u8>,
    pem: String,
}

impl Ca {
    pub(crate) fn new() -> Arc<Ca> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Arc::new(Ca { der: certificate.der().to_vec(), pem: certificate.pem(), params, key })
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    fn identity(&self) -> Identity {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["hextet-server".to_owned()]).unwrap();
        let leaf = params.signed_by(&key, &self.issuer()).unwrap();
        Identity::from_pem(format!("{}{}", leaf.pem(), self.pem), key.serialize_pem())
    }

    pub(crate) fn token(&self) -> Token {
        Token {
            role: Role::Node,
            fingerprint: Fingerprint::of(&self.der),
            secret: SECRET,
            servers: vec![format!("[{SERVER_ADDRESS}]:{PORT}")],
        }
    }
}

/// What the server has heard, and what it says.
#[derive(Default)]
pub(crate) struct Talk {
    pub(crate) enrolled: Option<EnrollRequest>,
    /// The /64 of the node's pods.
    pub(crate) subnet: u128,
    /// Nodes share the LAN's prefix.
    pub(crate) lan: bool,
    /// Subnets to refuse, whatever they are.
    pub(crate) refuse_subnets: u32,
    pub(crate) hellos: Vec<NodeHello>,
    pub(crate) renewals: u32,
    /// Another machine is served: why this one is not.
    pub(crate) taken: Option<String>,
    /// Somebody deleted the node: what it is told.
    pub(crate) deleted: Option<String>,
    /// Streams that were refused for that.
    pub(crate) refusals: u32,
    /// About whom the node is asked next, and what it has said.
    pub(crate) look_for: Vec<LookFor>,
    pub(crate) seen: Vec<NeighbourSeen>,
    /// What the streams of leases began with.
    pub(crate) holders: Vec<LeaseHolder>,
    /// The term of grants and assignments; none: nothing is granted.
    pub(crate) granted: Option<u64>,
    pub(crate) term: u64,
    pub(crate) reports: Vec<PodReport>,
    pub(crate) conflicts: Vec<AddressConflict>,
    pub(crate) logs: BTreeMap<u64, (Vec<u8>, String)>,
    /// What the next stream is told first.
    pub(crate) pods: Vec<PodAssignment>,
    /// And what is to end, until it is told to be gone.
    ending: BTreeSet<String>,
    revision: u64,
    pub(crate) events: Vec<PodEvent>,
    pub(crate) described: BTreeMap<u64, SendDescriptionRequest>,
    streams: Vec<mpsc::UnboundedSender<Result<NodeCommand, Status>>>,
}

/// A server in a network namespace; ends when dropped.
pub(crate) struct TestServer {
    pub(crate) talk: Arc<Mutex<Talk>>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestServer {
    pub(crate) fn start(netns: &str, ca: &Arc<Ca>) -> TestServer {
        let talk = Arc::new(Mutex::new(Talk::default()));
        let (end, ended) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let service = Service { ca: ca.clone(), talk: talk.clone() };
        let netns = File::open(Path::new("/run/netns").join(netns)).unwrap();
        let thread = thread::spawn(move || {
            setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(serve(service, ready, ended));
        });
        is_ready.recv().unwrap();
        TestServer { talk, end: Some(end), thread: Some(thread) }
    }

    /// Changes what the agent must run, and tells it the difference.
    pub(crate) fn assign(&self, upserts: Vec<PodAssignment>, removed_pods: Vec<String>) {
        let mut talk = self.talk.lock().unwrap();
        let named = |pod: &PodAssignment| {
            upserts.iter().any(|new| new.id == pod.id) || removed_pods.contains(&pod.id)
        };
        talk.pods.retain(|pod| !named(pod));
        talk.pods.extend(upserts.clone());
        talk.ending.extend(removed_pods.iter().cloned());
        talk.revision += 1;
        let message = Assignment { pods: upserts, removed_pods, ..talk.assignment() };
        talk.say(Command::Assignment(message));
    }

    pub(crate) fn describe(&self, request_id: u64, pod: &str) {
        let request = DescribePod { request_id, pod: pod.to_owned(), retry: false };
        self.talk.lock().unwrap().say(Command::DescribePod(request));
    }

    pub(crate) fn read_logs(&self, request: ReadLogs) {
        self.talk.lock().unwrap().say(Command::ReadLogs(request));
    }

    /// The last report of a pod.
    pub(crate) fn report(&self, pod: &str) -> Option<PodReport> {
        self.talk.lock().unwrap().reports.iter().rev().find(|report| report.id == pod).cloned()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Talk {
    fn assignment(&self) -> Assignment {
        Assignment { revision: self.revision, epoch: "e".into(), term: self.term, ..Assignment::default() }
    }

    fn say(&mut self, command: Command) {
        let command = NodeCommand { command: Some(command) };
        self.streams.retain(|stream| stream.send(Ok(command.clone())).is_ok());
    }
}

async fn serve(service: Service, ready: std::sync::mpsc::Sender<()>, ended: oneshot::Receiver<()>) {
    let address: SocketAddr = format!("[::]:{PORT}").parse().unwrap();
    let socket = tokio::net::TcpSocket::new_v6().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    let listener = socket.listen(16).unwrap();
    let tls = ServerTlsConfig::new()
        .identity(service.ca.identity())
        .client_ca_root(Certificate::from_pem(&service.ca.pem))
        .client_auth_optional(true);
    let server = Server::builder()
        .tls_config(tls)
        .unwrap()
        .add_service(EnrollmentServer::new(service.clone()))
        .add_service(AgentServer::new(service))
        .serve_with_incoming(TcpListenerStream::new(listener));
    ready.send(()).unwrap();
    // Ends at once, streams and all.
    tokio::select! { result = server => result.unwrap(), _ = ended => {} }
}

#[derive(Clone)]
struct Service {
    ca: Arc<Ca>,
    talk: Arc<Mutex<Talk>>,
}

#[tonic::async_trait]
impl Enrollment for Service {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        let request = request.into_inner();
        let mut talk = self.talk.lock().unwrap();
        if request.secret != SECRET {
            return Err(Status::permission_denied("the token was used before: make a new one"));
        }
        if request.name.is_empty() {
            return Err(Status::invalid_argument("the name is empty"));
        }
        if talk.refuse_subnets > 0 {
            talk.refuse_subnets -= 1;
            let mut status =
                Status::already_exists("the subnet fd00::/64 is taken by node `n9`; draw another");
            status.metadata_mut().insert(hextet_api::TAKEN, "subnet".parse().unwrap());
            return Err(status);
        }
        let csr = CertificateSigningRequestParams::from_der(&request.csr_der.clone().into()).unwrap();
        let certificate = csr.signed_by(&self.ca.issuer()).unwrap();
        let prefix =
            |bits: u128, length_bits| Ipv6Prefix { address: bits.to_be_bytes().to_vec(), length_bits };
        let subnet = match talk.lan {
            true => LAN.to_bits(),
            false => CLUSTER.to_bits() | u128::from(request.subnet_id) << 64,
        };
        let response = EnrollResponse {
            name: request.name.clone(),
            certificate_der: certificate.der().to_vec(),
            ca_der: self.ca.der.clone(),
            epoch: "e".into(),
            cluster_prefix: Some(prefix(CLUSTER.to_bits(), 48)),
            pod_ipv4: Some(Ipv4Prefix { address: vec![10, 254, 0, 0], length_bits: 20 }),
            node_prefix: Some(prefix(subnet, 64)),
        };
        talk.subnet = subnet;
        talk.enrolled = Some(request);
        Ok(Response::new(response))
    }
}

#[tonic::async_trait]
impl Agent for Service {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<NodeCommand, Status>> + Send>>;
    type HoldLeaseStream = Pin<Box<dyn Stream<Item = Result<LeaseAnswer, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<NodeReport>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        if request.peer_certs().is_none_or(|chain| chain.is_empty()) {
            return Err(Status::unauthenticated("a node shows its certificate"));
        }
        let (stream, commands) = mpsc::unbounded_channel();
        let mut reports = request.into_inner();
        {
            let mut talk = self.talk.lock().unwrap();
            talk.refuse_copy()?;
            let removed_pods = talk.ending.iter().cloned().collect();
            let message =
                Assignment { full: true, pods: talk.pods.clone(), removed_pods, ..talk.assignment() };
            talk.streams.push(stream);
            talk.say(Command::Assignment(message));
        }
        let talk = self.talk.clone();
        tokio::spawn(async move {
            while let Some(Ok(report)) = reports.next().await {
                talk.lock().unwrap().hear(report);
            }
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(commands))))
    }

    async fn hold_lease(
        &self,
        request: Request<Streaming<LeaseRenewal>>,
    ) -> Result<Response<Self::HoldLeaseStream>, Status> {
        let (answers, stream) = mpsc::unbounded_channel();
        let (mut renewals, talk) = (request.into_inner(), self.talk.clone());
        talk.lock().unwrap().refuse_copy()?;
        tokio::spawn(async move {
            while let Some(Ok(renewal)) = renewals.next().await {
                let mut talk = talk.lock().unwrap();
                let number = match renewal.renewal {
                    Some(Renewal::Number(number)) => number,
                    Some(Renewal::Holder(holder)) => {
                        talk.holders.push(holder);
                        continue;
                    }
                    Some(Renewal::Seen(seen)) => {
                        talk.seen.push(seen);
                        continue;
                    }
                    None => continue,
                };
                talk.renewals += 1;
                for look_for in talk.look_for.drain(..) {
                    let _ = answers.send(Ok(LeaseAnswer { answer: Some(Answer::LookFor(look_for)) }));
                }
                if let Some(term) = talk.granted {
                    let grant = LeaseGrant { number, lease_ms: LEASE_MS, renew_ms: LEASE_MS / 20, term };
                    let _ = answers.send(Ok(LeaseAnswer { answer: Some(Answer::Grant(grant)) }));
                }
            }
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(stream))))
    }

    async fn send_description(
        &self,
        request: Request<SendDescriptionRequest>,
    ) -> Result<Response<SendDescriptionResponse>, Status> {
        let answer = request.into_inner();
        self.talk.lock().unwrap().described.insert(answer.request_id, answer);
        Ok(Response::new(SendDescriptionResponse {}))
    }

    async fn send_logs(
        &self,
        request: Request<Streaming<SendLogsRequest>>,
    ) -> Result<Response<SendLogsResponse>, Status> {
        let mut messages = request.into_inner();
        while let Some(Ok(message)) = messages.next().await {
            assert!(message.data.len() <= 64 * 1024);
            let mut talk = self.talk.lock().unwrap();
            let log = talk.logs.entry(message.request_id).or_default();
            log.0.extend(message.data);
            log.1.push_str(&message.error);
        }
        Ok(Response::new(SendLogsResponse {}))
    }
}

impl Talk {
    fn refuse_copy(&mut self) -> Result<(), Status> {
        if let Some(why) = &self.deleted {
            let mut status = Status::permission_denied(why.clone());
            status.metadata_mut().insert(hextet_api::DELETED, "node".parse().unwrap());
            self.refusals += 1;
            return Err(status);
        }
        let Some(why) = &self.taken else { return Ok(()) };
        let mut status = Status::already_exists(why.clone());
        status.metadata_mut().insert(hextet_api::TAKEN, hextet_api::TAKEN_MACHINE.parse().unwrap());
        status.metadata_mut().insert(hextet_api::TAKEN_FOR_MS, 1000.into());
        self.refusals += 1;
        Err(status)
    }

    fn hear(&mut self, report: NodeReport) {
        match report.report {
            Some(Report::Hello(hello)) => self.hellos.push(hello),
            Some(Report::Pods(pods)) => {
                self.ending.retain(|id| !pods.pods.iter().any(|pod| pod.gone && pod.id == *id));
                self.reports.extend(pods.pods);
            }
            Some(Report::Events(events)) => self.events.extend(events.events),
            Some(Report::Conflict(conflict)) => self.conflicts.push(conflict),
            // The end of the stream tells that it was heard.
            Some(Report::Leaving(_)) => self.streams.clear(),
            None => panic!("an empty report"),
        }
    }
}
