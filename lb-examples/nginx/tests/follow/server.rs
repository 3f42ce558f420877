//! A server whose every word a test says: it enrolls who comes, and hands each stream to the test.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use hextet_api::{
    connect::SERVER_NAME,
    token::{Fingerprint, Role, Token},
    v1::{
        EnrollRequest, EnrollResponse, Subscribe, WatchRequest, WatchResponse,
        endpoints_server::{Endpoints, EndpointsServer},
        enrollment_server::{Enrollment, EnrollmentServer},
        watch_request, watch_response,
    },
};
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Certificate, Identity, ServerTlsConfig},
};

const SECRET: [u8; 16] = [3; 16];

pub(crate) struct Server {
    token: Token,
    sessions: mpsc::Receiver<Session>,
    enrollments: Arc<AtomicUsize>,
}

/// One stream of a balancer.
pub(crate) struct Session {
    pub(crate) subscribe: Subscribe,
    pub(crate) answers: mpsc::Receiver<WatchRequest>,
    words: mpsc::Sender<Result<WatchResponse, Status>>,
}

struct Ca {
    params: CertificateParams,
    key: KeyPair,
    der: Vec<u8>,
    pem: String,
}

#[derive(Clone)]
struct Service {
    ca: Arc<Ca>,
    sessions: mpsc::Sender<Session>,
    enrollments: Arc<AtomicUsize>,
}

impl Server {
    pub(crate) async fn start() -> Server {
        let ca = Arc::new(Ca::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let token = Token {
            role: Role::Lb,
            fingerprint: Fingerprint::of(&ca.der),
            secret: SECRET,
            servers: vec![listener.local_addr().unwrap().to_string()],
        };
        let (send, sessions) = mpsc::channel(8);
        let enrollments = Arc::new(AtomicUsize::new(0));
        let service = Service { ca: ca.clone(), sessions: send, enrollments: enrollments.clone() };
        let tls = ServerTlsConfig::new()
            .identity(ca.identity())
            .client_ca_root(Certificate::from_pem(&ca.pem))
            .client_auth_optional(true);
        let router = tonic::transport::Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(EnrollmentServer::new(service.clone()))
            .add_service(EndpointsServer::new(service));
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        Server { token, sessions, enrollments }
    }

    pub(crate) fn token(&self) -> String {
        self.token.to_string()
    }

    pub(crate) fn enrollments(&self) -> usize {
        self.enrollments.load(Ordering::SeqCst)
    }

    /// The next stream that a balancer opens.
    pub(crate) async fn session(&mut self) -> Session {
        timeout(crate::DEADLINE, self.sessions.recv()).await.expect("a balancer comes").unwrap()
    }
}

impl Session {
    pub(crate) async fn send(&self, response: watch_response::Response) {
        let message = WatchResponse { response: Some(response) };
        self.words.send(Ok(message)).await.expect("the balancer listens");
    }
}

impl Ca {
    fn new() -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Ca { der: certificate.der().to_vec(), pem: certificate.pem(), params, key }
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    fn identity(&self) -> Identity {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([SERVER_NAME.to_owned()]).unwrap();
        let leaf = params.signed_by(&key, &self.issuer()).unwrap();
        Identity::from_pem(format!("{}{}", leaf.pem(), self.pem), key.serialize_pem())
    }
}

#[tonic::async_trait]
impl Enrollment for Service {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        self.enrollments.fetch_add(1, Ordering::SeqCst);
        let request = request.into_inner();
        if request.secret != SECRET {
            return Err(Status::permission_denied("the token is unknown"));
        }
        let request = CertificateSigningRequestParams::from_der(&request.csr_der.into()).unwrap();
        let certificate = request.signed_by(&self.ca.issuer()).unwrap();
        Ok(Response::new(EnrollResponse {
            name: "edge".into(),
            certificate_der: certificate.der().to_vec(),
            ca_der: self.ca.der.clone(),
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl Endpoints for Service {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        if request.peer_certs().is_none() {
            return Err(Status::unauthenticated("show a certificate"));
        }
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|message| message.request);
        let Some(watch_request::Request::Subscribe(subscribe)) = first else {
            return Err(Status::invalid_argument("subscribe first"));
        };
        let (words, said) = mpsc::channel(128);
        let (send, answers) = mpsc::channel(128);
        self.sessions.send(Session { subscribe, answers, words }).await.unwrap();
        tokio::spawn(async move {
            while let Ok(Some(message)) = requests.message().await {
                if send.send(message).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(said)))
    }
}
