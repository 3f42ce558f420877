//! A small server with a real CA, met by the client over sockets.

use std::{
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    sync::{Arc, Mutex},
};

use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::{
    Request, Response, Status,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};

use super::*;
use crate::{
    token::Role,
    v1::{
        EnrollRequest, EnrollResponse,
        enrollment_client::EnrollmentClient,
        enrollment_server::{Enrollment, EnrollmentServer},
    },
};

const SECRET: [u8; 16] = [3; 16];

struct Ca {
    params: CertificateParams,
    key: KeyPair,
    der: Vec<u8>,
    pem: String,
}

impl Ca {
    fn new() -> Arc<Ca> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Arc::new(Ca { der: certificate.der().to_vec(), pem: certificate.pem(), params, key })
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    /// A certificate for `name`, the chain sent by a server.
    fn identity(&self, name: &str) -> Identity {
        let key = KeyPair::generate().unwrap();
        let leaf =
            CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.issuer()).unwrap();
        Identity::from_pem(format!("{}{}", leaf.pem(), self.pem), key.serialize_pem())
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.der)
    }
}

/// Signs what has the secret; remembers the certificates that callers showed.
#[derive(Clone)]
struct Enroller {
    ca: Arc<Ca>,
    answer_ca: Vec<u8>,
    shown: Arc<Mutex<Vec<usize>>>,
}

#[tonic::async_trait]
impl Enrollment for Enroller {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        self.shown.lock().unwrap().push(request.peer_certs().map_or(0, |chain| chain.len()));
        let request = request.into_inner();
        if request.secret != SECRET {
            return Err(Status::permission_denied("the token was used before: make a new one"));
        }
        let csr = CertificateSigningRequestParams::from_der(&request.csr_der.into()).unwrap();
        let certificate = csr.signed_by(&self.ca.issuer()).unwrap();
        Ok(Response::new(EnrollResponse {
            name: request.name,
            certificate_der: certificate.der().to_vec(),
            ca_der: self.answer_ca.clone(),
            ..Default::default()
        }))
    }
}

impl Enroller {
    fn new(ca: &Arc<Ca>) -> Enroller {
        Enroller { ca: ca.clone(), answer_ca: ca.der.clone(), shown: Arc::default() }
    }
}

/// Serves on a free port until the test's runtime ends.
async fn serve(listen: &str, name: &str, enroller: Enroller) -> SocketAddr {
    let listener = TcpListener::bind(listen).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let tls = ServerTlsConfig::new()
        .identity(enroller.ca.identity(name))
        .client_ca_root(Certificate::from_pem(&enroller.ca.pem))
        .client_auth_optional(true);
    let server = Server::builder().tls_config(tls).unwrap().add_service(EnrollmentServer::new(enroller));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    addr
}

fn token(ca: &Ca, servers: &[&str]) -> Token {
    let servers = servers.iter().map(|server| (*server).to_owned()).collect();
    Token { role: Role::User, fingerprint: ca.fingerprint(), secret: SECRET, servers }
}

fn wish(name: &str) -> Wish {
    Wish { name: name.into(), ..Wish::default() }
}

#[tokio::test]
async fn a_token_becomes_credentials_that_connect() {
    let ca = Ca::new();
    let enroller = Enroller::new(&ca);
    let addr = serve("127.0.0.1:0", SERVER_NAME, enroller.clone()).await.to_string();
    let enrolled = enroll(&token(&ca, &[&addr]), &Key::generate().unwrap(), wish("alice")).await.unwrap();
    assert_eq!(enrolled.credentials.name, "alice");

    let channel = mutual_tls(&enrolled.credentials).await.unwrap();
    let status = EnrollmentClient::new(channel).enroll(EnrollRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied);
    assert_eq!(*enroller.shown.lock().unwrap(), [0, 2], "a certificate is shown once there is one");
}

#[tokio::test]
async fn an_ipv6_literal_is_a_server() {
    let Ok(probe) = TcpListener::bind("[::1]:0").await else {
        eprintln!("skipped: no IPv6 loopback here");
        return;
    };
    drop(probe);
    let ca = Ca::new();
    let addr = serve("[::1]:0", SERVER_NAME, Enroller::new(&ca)).await.to_string();
    assert!(addr.starts_with("[::1]:"));
    let (_, server) = enrollment(&token(&ca, &[&addr])).await.unwrap();
    assert_eq!(server, addr);
}

#[tokio::test]
async fn a_server_of_another_cluster_is_named() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let addr = serve("127.0.0.1:0", SERVER_NAME, Enroller::new(&theirs)).await.to_string();
    let error = enrollment(&token(&ours, &[&addr])).await.unwrap_err();
    let ConnectError::AnotherCluster { found, expected, .. } = &error else { panic!("{error:?}") };
    assert_eq!((*found, *expected), (theirs.fingerprint(), ours.fingerprint()));
}

#[tokio::test]
async fn the_ca_alone_does_not_make_a_server() {
    let ca = Ca::new();
    let addr = serve("127.0.0.1:0", "node-n1", Enroller::new(&ca)).await.to_string();
    let error = enrollment(&token(&ca, &[&addr])).await.unwrap_err();
    assert!(matches!(error, ConnectError::Tls { .. }), "{error:?}");
}

/// A liar sends the right CA behind a certificate that another CA signed.
#[tokio::test]
async fn a_chain_that_only_carries_the_ca_is_refused() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let mixed = Arc::new(Ca {
        params: theirs.params.clone(),
        key: KeyPair::from_pem(&theirs.key.serialize_pem()).unwrap(),
        der: ours.der.clone(),
        pem: ours.pem.clone(),
    });
    let addr = serve("127.0.0.1:0", SERVER_NAME, Enroller::new(&mixed)).await.to_string();
    let error = enrollment(&token(&ours, &[&addr])).await.unwrap_err();
    assert!(matches!(error, ConnectError::Tls { .. }), "{error:?}");
}

#[tokio::test]
async fn the_first_server_that_answers_is_used_and_kept_in_front() {
    let ca = Ca::new();
    let closed = closed_port().await;
    let addr = serve("127.0.0.1:0", SERVER_NAME, Enroller::new(&ca)).await.to_string();
    let token = token(&ca, &[&closed, &addr]);
    let enrolled = enroll(&token, &Key::generate().unwrap(), wish("a")).await.unwrap();
    assert_eq!(enrolled.credentials.servers, [addr, closed]);
}

/// A machine that is gone, or a process that hangs, refuses nothing.
#[tokio::test]
async fn a_server_that_is_silent_holds_nobody_up() {
    let ca = Ca::new();
    // The kernel accepts, and nobody ever answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = (silent.local_addr().unwrap().to_string(), silent);
    let addr = serve("127.0.0.1:0", SERVER_NAME, Enroller::new(&ca)).await.to_string();
    let start = std::time::Instant::now();
    let (_, server) = enrollment(&token(&ca, &[&silent.0, &addr])).await.unwrap();
    assert_eq!(server, addr);
    assert!(start.elapsed() < CONNECT_TIMEOUT, "{:?}", start.elapsed());
}

#[tokio::test]
async fn every_server_that_failed_is_reported() {
    let ca = Ca::new();
    let (a, b) = (closed_port().await, closed_port().await);
    let text = enrollment(&token(&ca, &[&a, &b])).await.unwrap_err().to_string();
    assert!(text.contains(&a) && text.contains(&b) && text.contains("refused"), "{text}");
    let error = enrollment(&token(&ca, &[])).await.unwrap_err();
    assert!(matches!(error, ConnectError::NoServers), "{error:?}");
}

#[tokio::test]
async fn a_channel_finds_the_other_server_when_the_first_goes_away() {
    let ca = Ca::new();
    let enroller = Enroller::new(&ca);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let first = listener.local_addr().unwrap().to_string();
    let tls = ServerTlsConfig::new().identity(ca.identity(SERVER_NAME));
    let server =
        Server::builder().tls_config(tls).unwrap().add_service(EnrollmentServer::new(enroller.clone()));
    let task = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let second = serve("127.0.0.1:0", SERVER_NAME, enroller.clone()).await.to_string();

    let (channel, server) = enrollment(&token(&ca, &[&first, &second])).await.unwrap();
    assert_eq!(server, first);
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    let mut client = EnrollmentClient::new(channel);
    // A call that was under way when the connection ended fails; the next one finds the second server.
    let moved = async {
        while client.enroll(EnrollRequest::default()).await.unwrap_err().code()
            != tonic::Code::PermissionDenied
        {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), moved).await.expect("the second server answers");
}

#[tokio::test]
async fn a_refusal_keeps_the_words_of_the_server() {
    let ca = Ca::new();
    let addr = serve("127.0.0.1:0", SERVER_NAME, Enroller::new(&ca)).await.to_string();
    let token = Token { secret: [0; 16], ..token(&ca, &[&addr]) };
    let error = enroll(&token, &Key::generate().unwrap(), wish("a")).await.unwrap_err();
    assert_eq!(error.to_string(), "the token was used before: make a new one");
}

#[tokio::test]
async fn an_answer_with_another_ca_is_refused() {
    let ca = Ca::new();
    let enroller = Enroller { answer_ca: Ca::new().der.clone(), ..Enroller::new(&ca) };
    let addr = serve("127.0.0.1:0", SERVER_NAME, enroller).await.to_string();
    let error = enroll(&token(&ca, &[&addr]), &Key::generate().unwrap(), wish("a")).await.unwrap_err();
    assert!(
        matches!(error, EnrollError::Answer { what: "a certificate of another CA than it names", .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn the_unix_socket_serves_and_its_absence_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server.sock");
    let error = unix(&path).await.unwrap_err();
    assert!(matches!(error, ConnectError::Socket { .. }), "{error:?}");

    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::builder().add_service(EnrollmentServer::new(Enroller::new(&Ca::new())));
    tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    let status =
        EnrollmentClient::new(unix(&path).await.unwrap()).enroll(EnrollRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied);
}

#[test]
fn credentials_come_back_from_their_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/credentials.json");
    let credentials = Credentials {
        name: "alice".into(),
        servers: vec!["[::1]:4679".into()],
        ca_der: vec![1, 2],
        certificate_der: vec![3],
        key_pkcs8_der: vec![4; 100],
    };
    credentials.save(&path).unwrap();
    credentials.save(&path).unwrap();
    assert_eq!(Credentials::load(&path).unwrap(), credentials);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    let files = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
    assert_eq!(files, 1, "nothing is left beside the file");
    assert!(!format!("{credentials:?}").contains("4, 4"));
}

#[test]
fn damaged_credentials_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("credentials.json");
    assert!(matches!(Credentials::load(&path), Err(CredentialsError::Read { .. })));
    std::fs::write(&path, "{").unwrap();
    assert!(matches!(Credentials::load(&path), Err(CredentialsError::Format { .. })));
    std::fs::write(&path, "x".repeat(100_000)).unwrap();
    assert!(matches!(Credentials::load(&path), Err(CredentialsError::Read { .. })));
}

#[test]
fn a_kept_key_is_the_same_machine() {
    let key = Key::generate().unwrap();
    let kept = Key::from_pkcs8_der(key.pkcs8_der().to_vec()).unwrap();
    assert_eq!(kept.machine_key().unwrap(), key.machine_key().unwrap());
    assert!(Key::from_pkcs8_der(vec![1, 2, 3]).is_err());

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key.der");
    assert!(Key::kept_in(&path).unwrap() == Key::kept_in(&path).unwrap());
    std::fs::write(&path, "x").unwrap();
    assert!(Key::kept_in(&path).is_err(), "a damaged key is not replaced");
}

async fn closed_port() -> String {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string()
}
