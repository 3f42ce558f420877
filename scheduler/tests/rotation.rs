//! The cluster's CA is replaced while everything goes on, and nobody is locked out who is not left out by word.

mod support;

use std::{fs, path::Path, time::Duration};

use hextet_api::{
    connect::{self, Credentials, Key, RenewError},
    token::Fingerprint,
    v1::{self, CaTurn, cluster_client::ClusterClient},
};
use support::{DEADLINE, FakeNode, TestServer, Watch, code, enroll, is_running, subscribe, try_enroll};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

#[tokio::test]
async fn nodes_people_and_balancers_move_to_another_ca_and_nothing_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let (mut n1, mut n2) = (FakeNode::join(&server, "n1", 1).await, FakeNode::join(&server, "n2", 2).await);
    let bob = enroll(&server.token(v1::TokenRole::Viewer, "bob", "").await, "", 0).await;
    let edge = enroll(&server.token(v1::TokenRole::Lb, "edge", "hello").await, "", 0).await;
    let unused = server.token(v1::TokenRole::Viewer, "eve", "").await;
    server.apply("hello", 2, "one").await;
    server.running(2).await;
    let carol = enroll(&server.token(v1::TokenRole::Viewer, "carol", "").await, "", 0).await;
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let calls = tokio::spawn(call_again_and_again(dir.path().join("carol.json"), carol, stopped));
    let mut watch = watch(&edge).await;
    watch.snapshot().await;
    let old = n1.credentials.ca_fingerprint();

    turn(&server, CaTurn::Rotate).await.unwrap();
    let new = ca(&server).await;
    assert_eq!((new.leaving.as_str(), new.compromised), (old.to_string().as_str(), false));
    assert_ne!(new.issuing, new.leaving);
    let of_ca = v1::ListRevisionsRequest { key: "authorities".to_owned(), ..Default::default() };
    let told = server.local().await.list_revisions(of_ca).await.unwrap().into_inner().revisions;
    assert!(told.iter().any(|revision| revision.message.contains("takes the place of")), "{told:?}");
    assert_eq!(who(&new)[..2], ["node/n1", "node/n2"]);
    let told = |told: &support::Told| (told.ca == new.issuing).then_some(());
    n1.when("told of the other CA", told).await;
    n2.when("told of the other CA", told).await;
    let error = code(turn(&server, CaTurn::Rotate).await);
    assert_eq!(error.0, Code::FailedPrecondition);
    assert!(error.1.starts_with("a rotation of the CA is under way"), "{}", error.1);

    // Also who has but a stream from before.
    missing_when(&server, |who| who.contains(&"lb/edge?select=hello".to_owned())).await;
    // Whoever has the old CA is believed, believes the server, and is written down.
    assert!(status_of(&bob).await.is_ok());
    assert!(has_moved(&bob).await);
    missing_when(&server, |who| who.contains(&"viewer/bob".to_owned())).await;
    let (refused, message) = code(turn(&server, CaTurn::Retire).await);
    assert_eq!(refused, Code::FailedPrecondition);
    assert!(
        message.contains("node/n1, node/n2") && message.contains("netctl ca retire --force"),
        "{message}"
    );
    // A token of before is good, and gives a certificate of the new CA.
    let eve = enroll(&unused, "", 0).await;
    assert_eq!((unused.fingerprint, eve.ca_fingerprint().to_string()), (old, new.issuing.clone()));
    assert!(status_of(&eve).await.is_ok() && !has_moved(&eve).await);

    // Everybody gets another, while the streams that they had go on.
    for node in [&mut n1, &mut n2] {
        node.credentials = renew(&node.credentials).await.unwrap();
        connect::confirm(&node.credentials).await.unwrap();
        assert_eq!(node.credentials.ca_fingerprint().to_string(), new.issuing);
    }
    let bob = renewed(dir.path(), &bob).await;
    let edge = renewed(dir.path(), &edge).await;
    missing_when(&server, <[String]>::is_empty).await;
    server.apply("hello", 3, "one").await;
    server.running(3).await;
    watch.event().await;

    turn(&server, CaTurn::Retire).await.unwrap();
    let done = ca(&server).await;
    assert_eq!((done.issuing, done.leaving), (new.issuing, String::new()));
    for credentials in [&bob, &eve, &edge, &n1.credentials] {
        assert!(!has_moved(credentials).await, "{credentials:?}");
    }
    assert!(status_of(&bob).await.is_ok());
    // The streams of nodes were made with certificates of the old CA, and go on.
    server.apply("hello", 4, "one").await;
    server.pods_when("four", |pods| pods.len() == 4 && pods.iter().all(is_running)).await;
    assert_eq!((n1.told.lock().unwrap().full, n2.told.lock().unwrap().full), (2, 2));
    assert!(n1.told.lock().unwrap().ended.is_none() && n2.told.lock().unwrap().ended.is_none());
    // A balancer begins another stream with the certificate that it has by now.
    self::watch(&edge).await.snapshot().await;

    stop.send(()).unwrap();
    assert!(calls.await.unwrap() > 10, "calls went on through all of it");

    let log = server.history("authorities").await;
    let messages: Vec<_> = log.iter().map(|revision| revision.message.as_str()).collect();
    assert!(messages[0].ends_with("is the only one"), "{messages:?}");
    assert!(log.iter().all(|revision| {
        ["user:root", "scheduler", "user:bob", "user:carol", "lb:edge"].contains(&revision.changer.as_str())
    }));
    let audit = fs::read_to_string(dir.path().join("state/audit.log")).unwrap();
    assert_eq!(audit.matches("Cluster/TurnCa").count(), 4, "also what was refused: {audit}");
    server.stop().await;
}

#[tokio::test]
async fn a_node_that_was_away_moves_when_it_is_back_and_one_that_was_left_out_is_told_the_way_in() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let away = FakeNode::join(&server, "n1", 1).await.kill().await;
    let longer = FakeNode::join(&server, "n2", 2).await.kill().await;
    turn(&server, CaTurn::Rotate).await.unwrap();
    // It knows the old CA alone, and comes back in the middle.
    let back = FakeNode::attach(away).await;
    let fresh = renew(&back.credentials).await.unwrap();
    connect::confirm(&fresh).await.unwrap();
    assert_eq!(who(&ca(&server).await), ["node/n2"]);

    assert!(turn(&server, CaTurn::Retire).await.is_err());
    let forced = v1::TurnCaRequest { force: true, ..wanted(CaTurn::Retire) };
    server.local().await.turn_ca(forced).await.unwrap();
    let error = connect::mutual_tls(&longer).await.unwrap_err();
    assert!(error.is_another_ca(), "{error:?}");
    assert!(error.to_string().contains("its cluster has replaced its CA since"), "{error}");

    // A new token and its own key: it is the node that it was.
    let token = server.token(v1::TokenRole::Node, "", "").await;
    let key = Key::from_pkcs8_der(longer.key_pkcs8_der.clone()).unwrap();
    let again = try_enroll(&token, &key, "n2", 2).await.unwrap();
    FakeNode::attach(again).await;
    assert_eq!(server.nodes().await.len(), 2);
    server.stop().await;
}

#[tokio::test]
async fn the_way_back_is_open_until_the_old_ca_is_retired() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    let old = node.credentials.ca_fingerprint().to_string();
    assert_eq!(code(turn(&server, CaTurn::Undo).await).0, Code::FailedPrecondition);
    turn(&server, CaTurn::Rotate).await.unwrap();
    let moved = renew(&node.credentials).await.unwrap();
    connect::confirm(&moved).await.unwrap();
    turn(&server, CaTurn::Undo).await.unwrap();
    let back = ca(&server).await;
    assert_eq!((&back.issuing, who(&back)), (&old, vec!["node/n1".to_owned()]));
    // Who has moved believes the server, and moves back.
    let again = renew(&moved).await.unwrap();
    connect::confirm(&again).await.unwrap();
    assert_eq!(again.ca_fingerprint().to_string(), old);
    turn(&server, CaTurn::Retire).await.unwrap();
    assert_eq!(ca(&server).await.issuing, old);
    server.stop().await;

    let server = TestServer::start(dir.path()).await;
    let again = at(&server, again);
    FakeNode::attach(again).await;
    assert!(connect::mutual_tls(&at(&server, moved)).await.is_err(), "that CA was retired");
    server.stop().await;
}

#[tokio::test]
async fn after_a_compromise_only_nodes_are_believed_with_the_old_ca() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    let alice = enroll(&server.token(v1::TokenRole::Admin, "alice", "").await, "", 0).await;
    let edge = enroll(&server.token(v1::TokenRole::Lb, "edge", "hello").await, "", 0).await;
    let unused = server.token(v1::TokenRole::Admin, "eve", "").await;
    let mut watch = watch(&edge).await;
    watch.snapshot().await;

    let rotate = v1::TurnCaRequest { compromised: true, ..wanted(CaTurn::Rotate) };
    server.local().await.turn_ca(rotate).await.unwrap();
    let (refused, message) = code(status_of(&alice).await);
    assert_eq!(refused, Code::Unauthenticated);
    assert!(message.contains("was compromised") && message.contains("netctl login TOKEN"), "{message}");
    assert!(matches!(renew(&alice).await, Err(RenewError::Refused { .. })), "a forged one gets no real one");
    let error = try_enroll(&unused, &Key::generate().unwrap(), "", 0).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    // A stream that somebody may have begun with a forged certificate ends.
    let ended = async { while watch.next().await.is_ok() {} };
    timeout(2 * DEADLINE, ended).await.expect("it ends");
    assert_eq!(code(turn(&server, CaTurn::Undo).await).0, Code::FailedPrecondition);

    // The node's key is known: it moves. People log in anew.
    let moved = renew(&node.credentials).await.unwrap();
    connect::confirm(&moved).await.unwrap();
    turn(&server, CaTurn::Retire).await.unwrap();
    let alice = enroll(&server.token(v1::TokenRole::Admin, "alice", "").await, "", 0).await;
    assert!(status_of(&alice).await.is_ok());
    server.stop().await;
}

/// A server that is killed at any step goes on where it was: each step is what the disk holds between two writes.
#[tokio::test]
async fn a_server_that_ended_between_two_steps_finishes_them() {
    let dir = tempfile::tempdir().unwrap();
    let pki = dir.path().join("state/pki");
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await.kill().await;
    server.stop().await;
    let before = copy(&pki, dir.path(), "before");

    let server = TestServer::start(dir.path()).await;
    turn(&server, CaTurn::Rotate).await.unwrap();
    let moving = ca(&server).await;
    server.stop().await;
    let after = copy(&pki, dir.path(), "after");

    // The key is kept, and the revision was never written: the key is forgotten.
    let other = tempfile::tempdir().unwrap();
    let server = TestServer::start(other.path()).await;
    server.stop().await;
    let keyring = other.path().join("state/pki/authorities.json");
    let own = fs::read_to_string(other.path().join("state/pki/ca.crt")).unwrap();
    let key = fs::read_to_string(other.path().join("state/pki/ca.key")).unwrap();
    let own = serde_json::json!({ "certificate_pem": own, "key_pem": key });
    let rotated: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(after.join("authorities.json")).unwrap()).unwrap();
    let prepared = serde_json::json!({ "issuing": own, "others": [rotated["issuing"]] });
    fs::write(&keyring, prepared.to_string()).unwrap();
    let server = TestServer::start(other.path()).await;
    assert_eq!(ca(&server).await.leaving, "");
    let forgotten = async {
        while fs::read_to_string(&keyring).unwrap().contains("others") {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, forgotten).await.expect("the key that nobody named is forgotten");
    server.stop().await;

    // The revision is written, and the old CA makes certificates as far as the keyring says.
    let swapped = serde_json::json!({ "issuing": rotated["others"][0], "others": [rotated["issuing"]] });
    fs::write(pki.join("authorities.json"), swapped.to_string()).unwrap();
    let server = TestServer::start(dir.path()).await;
    let fresh = renew(&at(&server, node)).await.unwrap();
    assert_eq!(fresh.ca_fingerprint().to_string(), moving.issuing);
    connect::confirm(&fresh).await.unwrap();
    turn(&server, CaTurn::Retire).await.unwrap();
    server.stop().await;

    // The old CA was given up, and its key is there as yet.
    fs::copy(after.join("authorities.json"), pki.join("authorities.json")).unwrap();
    let server = TestServer::start(dir.path()).await;
    FakeNode::attach(at(&server, fresh)).await;
    let forgotten = async {
        while fs::read_to_string(pki.join("authorities.json")).unwrap().contains("others") {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, forgotten).await.expect("the old key is forgotten");
    server.stop().await;

    // A folder from before does not go with the store: it is said, and nothing is made anew.
    fs::remove_dir_all(&pki).unwrap();
    fs::rename(before, &pki).unwrap();
    let started = scheduler::server::run(support::config(dir.path()), std::future::pending(), |_| ()).await;
    let error = started.unwrap_err().to_string();
    assert!(error.contains(&moving.issuing) && error.contains("its key is not there"), "{error}");
}

#[tokio::test]
async fn a_key_that_cannot_be_kept_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let revision = server.revision().await;
    // Root writes anywhere: a folder in the file's place stands for the full disk.
    let file = dir.path().join("state/pki/authorities.json");
    fs::create_dir(&file).unwrap();
    let (refused, message) = code(turn(&server, CaTurn::Rotate).await);
    assert_eq!(refused, Code::Unavailable);
    assert!(message.starts_with("the CA is not replaced, its key cannot be kept"), "{message}");
    assert_eq!((server.revision().await, ca(&server).await.leaving), (revision, String::new()));
    fs::remove_dir(&file).unwrap();
    turn(&server, CaTurn::Rotate).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn two_who_rotate_at_once_make_one_rotation() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let turns = futures_of(&server).await;
    assert_eq!(turns.iter().filter(|turn| turn.is_ok()).count(), 1, "{turns:?}");
    let rotated = ca(&server).await;
    assert!(!rotated.leaving.is_empty());
    server.stop().await;
}

async fn futures_of(server: &TestServer) -> Vec<Result<v1::TurnCaResponse, Status>> {
    let mut clients = vec![];
    for _ in 0..4 {
        clients.push(server.local().await);
    }
    let tasks: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            tokio::spawn(async move {
                client.turn_ca(wanted(CaTurn::Rotate)).await.map(tonic::Response::into_inner)
            })
        })
        .collect();
    let mut turns = vec![];
    for task in tasks {
        turns.push(task.await.unwrap());
    }
    turns
}

/// In the middle of a rotation both keys are in a backup, and nodes of either CA come to what was restored.
#[tokio::test]
async fn a_backup_holds_both_keys() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let old = FakeNode::join(&server, "n1", 1).await.kill().await;
    turn(&server, CaTurn::Rotate).await.unwrap();
    let new = FakeNode::join(&server, "n2", 2).await.kill().await;
    server.back_up(&dir.path().join("file")).await;
    let expected = ca(&server).await;
    server.stop().await;

    let other = tempfile::tempdir().unwrap();
    let (file, state) = (dir.path().join("file"), other.path().join("state"));
    scheduler::backup::restore(&file, &state, scheduler::backup::Incomplete::Refuse).unwrap();
    let server = TestServer::start(other.path()).await;
    let found = ca(&server).await;
    assert_eq!((found.issuing, found.leaving), (expected.issuing, expected.leaving));
    FakeNode::attach(at(&server, old)).await;
    FakeNode::attach(at(&server, new)).await;
    server.stop().await;
}

/// A node of before this version does not keep a CA: it stays with the old one, and is named.
#[tokio::test]
async fn an_agent_that_cannot_keep_another_ca_is_not_locked_out_unseen() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    turn(&server, CaTurn::Rotate).await.unwrap();
    let channel = connect::mutual_tls(&node.credentials).await.unwrap();
    let request = v1::RenewRequest { csr_der: csr(), ..v1::RenewRequest::default() };
    let mut client = v1::renewal_client::RenewalClient::new(channel);
    let answer = client.renew(request).await.unwrap().into_inner();
    assert_eq!(Fingerprint::of(&answer.ca_der), node.credentials.ca_fingerprint());
    assert_eq!(who(&ca(&server).await), ["node/n1"]);
    server.stop().await;
}

/// What a node of before sends: nothing but its key.
fn csr() -> Vec<u8> {
    let key = rcgen::KeyPair::generate().unwrap();
    rcgen::CertificateParams::default().serialize_request(&key).unwrap().der().to_vec()
}

/// As `netctl` does it, each time with a connection of its own; none fails. How many there were.
async fn call_again_and_again(
    path: std::path::PathBuf,
    credentials: Credentials,
    mut stopped: tokio::sync::oneshot::Receiver<()>,
) -> u32 {
    credentials.save(&path).unwrap();
    let mut calls = 0;
    while stopped.try_recv().is_err() {
        let credentials = Credentials::load(&path).unwrap();
        let (mut channel, has_moved) = connect::mutual_tls_and_ca(&credentials).await.unwrap();
        if has_moved {
            channel = connect::renew_kept(&path, &credentials, channel).await.unwrap().1;
        }
        ClusterClient::new(channel).get_status(v1::GetStatusRequest {}).await.unwrap();
        calls += 1;
    }
    calls
}

fn wanted(turn: CaTurn) -> v1::TurnCaRequest {
    v1::TurnCaRequest { turn: turn.into(), ..v1::TurnCaRequest::default() }
}

async fn turn(server: &TestServer, turn: CaTurn) -> Result<v1::TurnCaResponse, Status> {
    server.local().await.turn_ca(wanted(turn)).await.map(tonic::Response::into_inner)
}

async fn ca(server: &TestServer) -> v1::GetCaResponse {
    server.local().await.get_ca(v1::GetCaRequest {}).await.unwrap().into_inner()
}

fn who(ca: &v1::GetCaResponse) -> Vec<String> {
    ca.missing.iter().map(|missing| missing.who.clone()).collect()
}

async fn missing_when(server: &TestServer, so: impl Fn(&[String]) -> bool) -> Vec<String> {
    let wait = async {
        loop {
            let missing = who(&ca(server).await);
            if so(&missing) {
                return missing;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, wait).await.expect("they are so")
}

async fn renew(credentials: &Credentials) -> Result<Credentials, RenewError> {
    let channel = connect::mutual_tls(credentials).await?;
    connect::renew(credentials, channel, "").await
}

async fn renewed(dir: &Path, credentials: &Credentials) -> Credentials {
    let (channel, has_moved) = connect::mutual_tls_and_ca(credentials).await.unwrap();
    assert!(has_moved);
    let path = dir.join(&credentials.name);
    connect::renew_kept(&path, credentials, channel).await.unwrap();
    Credentials::load(&path).unwrap()
}

async fn has_moved(credentials: &Credentials) -> bool {
    connect::mutual_tls_and_ca(credentials).await.unwrap().1
}

async fn status_of(credentials: &Credentials) -> Result<(), Status> {
    let channel = connect::mutual_tls(credentials).await.unwrap();
    ClusterClient::new(channel).get_status(v1::GetStatusRequest {}).await.map(drop)
}

async fn watch(credentials: &Credentials) -> Watch {
    let channel = connect::mutual_tls(credentials).await.unwrap();
    Watch::start(v1::endpoints_client::EndpointsClient::new(channel), subscribe("hello")).await
}

fn at(server: &TestServer, credentials: Credentials) -> Credentials {
    Credentials { servers: vec![server.ready.addresses[0].to_string()], ..credentials }
}

fn copy(from: &Path, dir: &Path, name: &str) -> std::path::PathBuf {
    let to = dir.join(name);
    fs::create_dir(&to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    to
}
