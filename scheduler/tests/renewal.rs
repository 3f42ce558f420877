//! Keys and certificates are replaced while everything goes on, and one that has ended cuts no node off.

mod support;

use std::{fs, path::Path, time::SystemTime};

use hextet_api::{
    connect::{self, Credentials, Key, RENEW_BEFORE, RenewError, Wish},
    v1::{self, cluster_client::ClusterClient, node_report::Report},
};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType, date_time_ymd};
use support::{FakeNode, TestServer, code, enroll, is_running, try_enroll, try_enroll_with};
use tonic::{Code, Status};

#[tokio::test]
async fn a_nodes_key_is_replaced_under_its_stream_and_the_old_one_is_good_until_the_new_one_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    server.apply("hello", 2, "one").await;
    server.running(2).await;
    let old = node.credentials.clone();
    assert!(!old.is_due(SystemTime::now()), "a new certificate is good for a while");
    assert!(old.is_due(SystemTime::now() + 2 * RENEW_BEFORE + RENEW_BEFORE / 4));

    let given_up = renew(&old).await.unwrap();
    let new = renew(&old).await.unwrap();
    assert_ne!(new.key_pkcs8_der, old.key_pkcs8_der);
    assert_eq!(try_attach(&given_up).await.unwrap_err().code(), Code::PermissionDenied);
    try_attach(&old).await.expect("stopped before it was kept, a node has its old key");

    let node = FakeNode::attach(new.clone()).await;
    server.pods_when("as before", |pods| pods.len() == 2 && pods.iter().all(is_running)).await;
    let (refused, message) = code(try_attach(&old).await);
    assert_eq!(refused, Code::PermissionDenied);
    assert!(message.contains("another machine's now"), "{message}");
    let again = renew(&new).await.unwrap();
    // The stream was made with a key that is good no more, and goes on.
    connect::confirm(&again).await.unwrap();
    node.say(Report::Pods(v1::PodReports { pods: vec![] })).await;
    server.apply("hello", 3, "one").await;
    server.running(3).await;
    server.stop().await;
}

#[tokio::test]
async fn a_persons_key_is_replaced_and_a_copy_of_the_old_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let old = enroll(&server.token(v1::TokenRole::Viewer, "bob", "").await, "", 0).await;
    let path = dir.path().join("credentials.json");
    let live = connect::mutual_tls(&old).await.unwrap();
    let (new, _) = connect::renew_kept(&path, &old, live.clone()).await.unwrap();
    assert_eq!(Credentials::load(&path).unwrap(), new);
    assert!(status_of(&new).await.is_ok());
    let (refused, message) = code(status_of(&old).await);
    assert_eq!(refused, Code::Unauthenticated);
    assert!(message.contains("another key has taken the place"), "{message}");
    let error = connect::renew(&old, live, "").await.unwrap_err();
    assert!(matches!(error, RenewError::Refused { .. }), "{error:?}");
    server.stop().await;

    // It is so after a restart, too.
    let server = TestServer::start(dir.path()).await;
    let moved = |credentials: Credentials| Credentials {
        servers: vec![server.ready.addresses[0].to_string()],
        ..credentials
    };
    assert!(status_of(&moved(new)).await.is_ok());
    assert_eq!(status_of(&moved(old)).await.unwrap_err().code(), Code::Unauthenticated);
    server.stop().await;
}

#[tokio::test]
async fn a_certificate_that_has_ended_is_good_for_a_node_to_get_another_and_for_a_person_not() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await.kill().await;
    let ended = ended(dir.path(), &node, "hextet:node/n1");
    assert!(ended.is_due(SystemTime::now()));
    let (refused, message) = code(try_attach(&ended).await);
    assert_eq!(refused, Code::Unauthenticated);
    assert!(message.starts_with("the certificate has ended at 2021-01-01"), "{message}");
    let fresh = renew(&ended).await.unwrap();
    FakeNode::attach(fresh).await;

    // The key of nobody's node does not get one, whatever its certificate says.
    let stranger = enroll(&server.token(v1::TokenRole::Viewer, "eve", "").await, "", 0).await;
    let stranger = self::ended(dir.path(), &stranger, "hextet:node/n1");
    assert!(renew(&stranger).await.is_err());

    let alice = enroll(&server.token(v1::TokenRole::Admin, "alice", "").await, "", 0).await;
    let alice = self::ended(dir.path(), &alice, "hextet:admin/alice");
    let (refused, message) = code(status_of(&alice).await);
    assert_eq!(refused, Code::Unauthenticated);
    assert!(message.contains("netctl login TOKEN"), "{message}");
    assert!(renew(&alice).await.is_err());
    server.stop().await;
}

#[tokio::test]
async fn the_servers_own_certificate_is_replaced_and_its_end_cuts_nobody_off() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let alice = enroll(&server.token(v1::TokenRole::Admin, "alice", "").await, "", 0).await;
    server.stop().await;
    let pki = dir.path().join("state/pki");
    let (certificate, key) = issue(&pki, &KeyPair::generate().unwrap(), server_name());
    fs::write(pki.join("server.crt"), certificate.pem()).unwrap();
    fs::write(pki.join("server.key"), key).unwrap();
    fs::remove_file(pki.join("server.pem")).unwrap();

    let server = TestServer::start(dir.path()).await;
    let alice = Credentials { servers: vec![server.ready.addresses[0].to_string()], ..alice };
    assert!(status_of(&alice).await.is_ok());
    let wait = async {
        while !pki.join("server.pem").exists() || pki.join("server.key").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(support::DEADLINE, wait).await.expect("it is replaced");
    assert!(status_of(&alice).await.is_ok());
    server.stop().await;
}

#[tokio::test]
async fn a_key_an_address_and_a_name_have_one_node() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let key = Key::generate().unwrap();
    let token = server.token(v1::TokenRole::Node, "", "").await;
    let first = FakeNode::attach(try_enroll(&token, &key, "n1", 1).await.unwrap()).await;
    server.apply("hello", 1, "one").await;
    let before = server.running(1).await;

    let token = server.token(v1::TokenRole::Node, "", "").await;
    let wish = Wish { name: "n2".to_owned(), subnet_id: 2, group_id: 7, ..Wish::default() };
    let status = try_enroll_with(&token, &key, wish).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(status.metadata().get(hextet_api::TAKEN).unwrap(), "key");
    let status = try_enroll(&token, &Key::generate().unwrap(), "n1", 3).await.unwrap_err();
    assert_eq!(status.metadata().get(hextet_api::TAKEN).unwrap(), "name");

    let second = try_enroll(&token, &Key::generate().unwrap(), "n2", 2).await.unwrap();
    let (refused, message) = code(hello_with(&second, support::hello_of("n1")).await);
    assert_eq!(refused, Code::AlreadyExists);
    assert!(message.contains("is that of node `n1`, which is not lost"), "{message}");
    let nodes = server.nodes().await;
    assert_eq!(
        nodes.iter().map(|node| node.phase()).collect::<Vec<_>>(),
        [v1::NodePhase::Ready, v1::NodePhase::Joined]
    );
    assert_eq!(server.running(1).await, before, "the first is unharmed");
    first.say(Report::Pods(v1::PodReports { pods: vec![] })).await;

    // A machine that is gone gives its address to the one after it.
    first.leave().await;
    hello_with(&second, support::hello_of("n1")).await.unwrap();
    server.stop().await;
}

async fn renew(credentials: &Credentials) -> Result<Credentials, RenewError> {
    let channel = connect::mutual_tls(credentials).await.unwrap();
    connect::renew(credentials, channel, "").await
}

async fn status_of(credentials: &Credentials) -> Result<(), Status> {
    let channel = connect::mutual_tls(credentials).await.unwrap();
    ClusterClient::new(channel).get_status(v1::GetStatusRequest {}).await.map(drop)
}

/// Whether the node gets as far as a stream; it says nothing there.
async fn try_attach(credentials: &Credentials) -> Result<(), Status> {
    let channel = connect::mutual_tls(credentials).await.unwrap();
    v1::agent_client::AgentClient::new(channel).attach(tokio_stream::pending()).await.map(drop)
}

/// Says hello, and gives what comes first.
async fn hello_with(credentials: &Credentials, hello: v1::NodeHello) -> Result<(), Status> {
    let channel = connect::mutual_tls(credentials).await.unwrap();
    let report = v1::NodeReport { report: Some(Report::Hello(hello)) };
    let said = tokio_stream::StreamExt::chain(tokio_stream::once(report), tokio_stream::pending());
    let mut answers = v1::agent_client::AgentClient::new(channel).attach(said).await?.into_inner();
    answers.message().await.map(drop)
}

/// The same credentials with a certificate that has ended.
fn ended(dir: &Path, credentials: &Credentials, uri: &str) -> Credentials {
    let key = KeyPair::try_from(credentials.key_pkcs8_der.as_slice()).unwrap();
    let name = SanType::URI(uri.to_owned().try_into().unwrap());
    let (certificate, _) = issue(&dir.join("state/pki"), &key, (name, ExtendedKeyUsagePurpose::ClientAuth));
    Credentials { certificate_der: certificate.der().to_vec(), ..credentials.clone() }
}

fn server_name() -> (SanType, ExtendedKeyUsagePurpose) {
    let name = SanType::DnsName("hextet-server".to_owned().try_into().unwrap());
    (name, ExtendedKeyUsagePurpose::ServerAuth)
}

/// What the CA would have signed years ago.
fn issue(
    pki: &Path,
    key: &KeyPair,
    (name, usage): (SanType, ExtendedKeyUsagePurpose),
) -> (rcgen::Certificate, String) {
    let read = |name: &str| fs::read_to_string(pki.join(name)).unwrap();
    let ca_key = KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("ca.crt"), ca_key).unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.subject_alt_names = vec![name];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2021, 1, 1);
    (params.signed_by(key, &issuer).unwrap(), key.serialize_pem())
}
