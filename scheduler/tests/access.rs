//! Who gets a certificate, and what each can and cannot do with it.

mod support;

use std::time::Duration;

use hextet_api::{
    connect::{self, Credentials, Key, Wish},
    v1::{
        self, agent_client::AgentClient, cluster_client::ClusterClient, endpoints_client::EndpointsClient,
        enrollment_client::EnrollmentClient,
    },
};
use scheduler::backup::{self, Incomplete};
use support::{FakeNode, TestServer, Watch, code, enroll, subscribe, try_enroll, try_enroll_with};
use tonic::{Code, transport::Endpoint};

#[tokio::test]
async fn a_token_is_good_once_and_for_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let mut token = server.token(v1::TokenRole::Node, "", "").await;
    let key = Key::generate().unwrap();
    try_enroll(&token, &key, "n1", 1).await.unwrap();
    let again = try_enroll(&token, &key, "n1", 1).await;
    assert!(again.is_ok(), "the same key may ask again: it may not have got the answer");
    let (refused, message) = code(try_enroll(&token, &Key::generate().unwrap(), "n2", 2).await);
    assert_eq!(refused, Code::PermissionDenied);
    assert!(message.contains("used before"), "{message}");
    token.secret[0] ^= 1;
    let (refused, message) = code(try_enroll(&token, &key, "n3", 3).await);
    assert_eq!(refused, Code::PermissionDenied);
    assert!(message.contains("not known here"), "{message}");
    server.stop().await;
}

#[tokio::test]
async fn what_is_taken_is_told_apart_and_the_token_stays_good() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let first = server.token(v1::TokenRole::Node, "", "").await;
    enroll(&first, "n1", 1).await;
    let token = server.token(v1::TokenRole::Node, "", "").await;
    let key = Key::generate().unwrap();
    let wish = |name: &str, subnet_id, group_id| Wish {
        name: name.to_owned(),
        subnet_id,
        group_id,
        ..Wish::default()
    };
    let taken = [
        (wish("n1", 2, 9), "name"),
        (wish("n2", 1, 9), "subnet"),
        // The group that the first one has.
        (wish("n2", 2, 2), "group"),
    ];
    for (wish, reason) in taken {
        let status = try_enroll_with(&token, &key, wish).await.unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists);
        assert_eq!(status.metadata().get(hextet_api::TAKEN).unwrap(), reason);
        assert!(status.message().contains("n1"), "{status}");
    }
    try_enroll(&token, &key, "n2", 2).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn a_clock_that_is_off_and_a_request_without_proof_are_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let token = server.token(v1::TokenRole::Node, "", "").await;
    let (channel, _) = connect::enrollment(&token).await.unwrap();
    let mut client = EnrollmentClient::new(channel);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64;
    let request = v1::EnrollRequest {
        secret: token.secret.to_vec(),
        name: "n1".to_owned(),
        client_unix_ms: 946_684_800_000,
        ..v1::EnrollRequest::default()
    };
    let (refused, message) = code(client.enroll(request.clone()).await);
    assert_eq!(refused, Code::FailedPrecondition);
    assert!(message.starts_with("the clocks differ: it is 2000-01-01T00:00:00Z there and 20"), "{message}");
    let (refused, message) = code(client.enroll(v1::EnrollRequest { client_unix_ms: now, ..request }).await);
    assert_eq!(refused, Code::InvalidArgument);
    assert!(message.contains("signed with its own key"), "{message}");
    server.stop().await;
}

#[tokio::test]
async fn without_a_certificate_nothing_but_enrollment_answers() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let token = server.token(v1::TokenRole::Node, "", "").await;
    let (channel, _) = connect::enrollment(&token).await.unwrap();
    let status = ClusterClient::new(channel.clone()).get_status(v1::GetStatusRequest {}).await;
    let (refused, message) = code(status);
    assert_eq!(refused, Code::Unauthenticated);
    assert!(message.contains("netctl login"), "{message}");
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    assert_eq!(call(channel, path.clone()).await, Code::Unauthenticated, "health, too");
    let local = connect::unix(&server.ready.socket).await.unwrap();
    assert_eq!(call(local, path).await, Code::Ok);

    let address = server.ready.addresses[0];
    let plain = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let plain = plain.connect_timeout(Duration::from_secs(2)).timeout(Duration::from_secs(2));
    let answer = match plain.connect().await {
        Ok(channel) => ClusterClient::new(channel).get_status(v1::GetStatusRequest {}).await.map(drop),
        Err(_) => Err(tonic::Status::unavailable("refused")),
    };
    assert!(answer.is_err(), "plaintext is not answered");
    server.stop().await;
}

#[tokio::test]
async fn a_certificate_of_another_cluster_gets_no_connection() {
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = TestServer::start(dir.path()).await;
    let other = TestServer::start(other_dir.path()).await;
    let token = server.token(v1::TokenRole::User, "alice", "").await;
    let ours = enroll(&token, "", 0).await;
    let foreign = enroll(&other.token(v1::TokenRole::User, "alice", "").await, "", 0).await;
    assert!(status_of(&ours).await.is_ok());
    // It trusts our CA, so that it is the server that refuses.
    let forged = Credentials { ca_der: ours.ca_der.clone(), servers: ours.servers.clone(), ..foreign };
    assert!(status_of(&forged).await.is_err());
    server.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn each_role_does_its_own_and_a_refusal_names_the_one_that_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    let refused = status_of(&node.credentials).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(refused.message(), "this needs the role viewer; hextet:node/n1 has the role node");

    let token = server.token(v1::TokenRole::Lb, "edge", "hello/web").await;
    let lb = enroll(&token, "", 0).await;
    assert_eq!(status_of(&lb).await.unwrap_err().code(), Code::PermissionDenied);
    server.apply("hello", 1, "one").await;
    server.running(1).await;
    let client = EndpointsClient::new(connect::mutual_tls(&lb).await.unwrap());
    let own = v1::Subscribe { group: "web".to_owned(), ..subscribe("hello") };
    let mut watch = Watch::start(client.clone(), own).await;
    assert_eq!(watch.snapshot().await.endpoints.len(), 1);
    for other in [subscribe("hello"), subscribe("other")] {
        let refused = Watch::start(client.clone(), other).await.next().await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().contains("reads the addresses of hello/web, not of"), "{refused}");
    }

    let token = server.token(v1::TokenRole::User, "alice", "").await;
    let alice = enroll(&token, "", 0).await;
    let mut client = ClusterClient::new(connect::mutual_tls(&alice).await.unwrap());
    client
        .delete_job(v1::DeleteJobRequest { name: "hello".to_owned(), message: String::new() })
        .await
        .unwrap();
    let mut agent = v1::agent_client::AgentClient::new(connect::mutual_tls(&alice).await.unwrap());
    let (refused, message) = code(agent.attach(tokio_stream::empty()).await.map(drop));
    assert_eq!(refused, Code::PermissionDenied);
    assert!(message.starts_with("this needs the role node"), "{message}");
    server.stop().await;
}

#[tokio::test]
async fn a_load_balancer_needs_a_selector_and_a_person_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let mut client = server.local().await;
    let mut make = async |role: v1::TokenRole, name: &str, selector: &str| {
        let (name, selector) = (name.to_owned(), selector.to_owned());
        let request = v1::CreateTokenRequest { role: role.into(), name, selector, valid_seconds: 0 };
        code(client.create_token(request).await)
    };
    assert_eq!(make(v1::TokenRole::Lb, "edge", "a/b/c").await.0, Code::InvalidArgument);
    assert_eq!(make(v1::TokenRole::Lb, "edge", "").await.0, Code::InvalidArgument);
    assert_eq!(make(v1::TokenRole::User, "", "").await.0, Code::InvalidArgument);
    assert_eq!(make(v1::TokenRole::Unspecified, "x", "").await.0, Code::InvalidArgument);
    server.stop().await;
}

#[tokio::test]
async fn each_level_of_people_may_what_it_says_and_not_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    server.apply("hello", 1, "one").await;
    let mut people = vec![];
    for role in [v1::TokenRole::Viewer, v1::TokenRole::Operator, v1::TokenRole::Admin, v1::TokenRole::User] {
        let token = server.token(role, "alice", "").await;
        let credentials = enroll(&token, "", 0).await;
        people.push(ClusterClient::new(connect::mutual_tls(&credentials).await.unwrap()));
    }
    let [viewer, operator, admin, user] = &mut people[..] else { unreachable!() };

    viewer.list_pods(v1::ListPodsRequest::default()).await.unwrap();
    let delete = || v1::DeleteJobRequest { name: "hello".to_owned(), message: String::new() };
    let (refused, message) = code(viewer.delete_job(delete()).await);
    assert_eq!(refused, Code::PermissionDenied);
    assert_eq!(message, "this needs the role operator; hextet:viewer/alice has the role viewer");
    operator.delete_job(delete()).await.unwrap();

    let token = || v1::CreateTokenRequest { role: v1::TokenRole::Node.into(), ..Default::default() };
    let (refused, message) = code(operator.create_token(token()).await);
    assert_eq!(refused, Code::PermissionDenied);
    assert_eq!(message, "this needs the role admin; hextet:operator/alice has the role operator");
    admin.create_token(token()).await.unwrap();
    user.create_token(token()).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn changes_and_refusals_are_in_the_audit_and_secrets_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    server.apply("hello", 1, "hush-hush").await;
    let token = server.token(v1::TokenRole::Viewer, "bob", "").await;
    let bob = enroll(&token, "", 0).await;
    let mut client = ClusterClient::new(connect::mutual_tls(&bob).await.unwrap());
    client.list_pods(v1::ListPodsRequest::default()).await.unwrap();
    let delete = v1::DeleteJobRequest { name: "hello".to_owned(), message: String::new() };
    client.delete_job(delete).await.unwrap_err();
    try_enroll(&token, &Key::generate().unwrap(), "", 0).await.unwrap_err();
    server.stop().await;

    let text = std::fs::read_to_string(dir.path().join("state/audit.log")).unwrap();
    assert!(!text.contains("hush-hush") && !text.contains(&token.to_string()), "{text}");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<String> = lines
        .iter()
        .map(|line| {
            let word = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
            let subject = line["subjects"][0].as_str().unwrap_or_default();
            format!(
                "{} {} {} {}",
                word("caller"),
                word("method").replace("hextet.v1.", ""),
                subject,
                word("outcome")
            )
        })
        .collect();
    let key = |line: &serde_json::Value| line["subjects"][0].as_str().unwrap().to_owned();
    assert_eq!(
        told,
        [
            "the Unix socket Cluster/ApplyJob job/hello done".to_owned(),
            "the Unix socket Cluster/CreateToken token for viewer bob done".to_owned(),
            format!("nobody Enrollment/Enroll {} done", key(&lines[2])),
            "hextet:viewer/bob Cluster/DeleteJob  refused".to_owned(),
            format!("nobody Enrollment/Enroll {} refused", key(&lines[4])),
        ]
    );
    assert!(lines[3]["from"].as_str().unwrap().starts_with("[::1]:"), "{}", lines[3]);
    assert!(lines[0]["from"].as_str().unwrap().starts_with("process "), "{}", lines[0]);
    assert!(lines[0]["revision"].as_u64().is_some());
}

/// Job `j`, with a secret in the environment of its one task.
/// A node that was deleted while it was lost came back and ran its pods without end, and nobody was told.
#[tokio::test]
async fn a_deleted_node_is_told_so_and_its_refusals_are_in_the_audit_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n3", 3).await;
    let credentials = node.leave().await;
    let mut local = server.local().await;
    let delete = v1::DeleteNodeRequest { name: "n3".to_owned(), ..Default::default() };
    local.delete_node(delete).await.unwrap();

    let attach = || async {
        let mut client = AgentClient::new(connect::mutual_tls(&credentials).await.unwrap());
        client.attach(tokio_stream::empty()).await.unwrap_err()
    };
    for _ in 0..3 {
        let status = attach().await;
        assert_eq!(status.code(), Code::PermissionDenied);
        assert!(status.metadata().get(hextet_api::DELETED).is_some(), "{status:?}");
        assert!(status.message().contains("node n3 was deleted here"), "{status:?}");
    }
    server.stop().await;
    let text = std::fs::read_to_string(dir.path().join("state/audit.log")).unwrap();
    let refused: Vec<&str> = text.lines().filter(|line| line.contains("Agent/Attach")).collect();
    assert_eq!(refused.len(), 1, "{text}");
    assert!(refused[0].contains("hextet:node/n3") && refused[0].contains("was deleted here"), "{text}");
}

/// A server that is put back from a backup of before a node joined does not know it, and must not make it end its pods.
#[tokio::test]
async fn a_node_that_is_only_not_known_is_not_told_that_it_was_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let backup = dir.path().join("before.bak");
    server.back_up(&backup).await;
    let credentials = FakeNode::join(&server, "n3", 3).await.kill().await;
    let address = server.ready.addresses[0];
    server.stop().await;

    let other = tempfile::tempdir().unwrap();
    backup::restore(&backup, &other.path().join("state"), Incomplete::Refuse).unwrap();
    let server = TestServer::start_at(other.path(), address).await;
    let mut client = AgentClient::new(connect::mutual_tls(&credentials).await.unwrap());
    let status = client.attach(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.metadata().get(hextet_api::DELETED).is_none(), "{status:?}");
    assert!(status.message().contains("knows no node n3 with this key"), "{status:?}");
    server.stop().await;
}

async fn apply_with_password(server: &TestServer, group: &str) {
    let task = v1::Task {
        name: "t".to_owned(),
        exec: vec!["/bin/t".to_owned()],
        env: [("PASSWORD".to_owned(), "open sesame".to_owned())].into(),
        ..v1::Task::default()
    };
    let group = v1::Group { name: group.to_owned(), count: 1, tasks: vec![task], ..v1::Group::default() };
    let job = v1::Job { name: "j".to_owned(), groups: vec![group], ..v1::Job::default() };
    let request = v1::ApplyJobRequest { job: Some(job), ..Default::default() };
    server.local().await.apply_job(request).await.unwrap();
}

#[tokio::test]
async fn a_viewer_sees_which_environment_variables_there_are_and_not_what_they_hold() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    apply_with_password(&server, "g").await;
    for (role, sees) in [(v1::TokenRole::Viewer, "(hidden)"), (v1::TokenRole::Operator, "open sesame")] {
        let credentials = enroll(&server.token(role, "bob", "").await, "", 0).await;
        let mut client = ClusterClient::new(connect::mutual_tls(&credentials).await.unwrap());
        let one = client.get_job(v1::GetJobRequest { name: "j".to_owned() }).await.unwrap().into_inner().job;
        let all = client.list_jobs(v1::ListJobsRequest {}).await.unwrap().into_inner().jobs;
        for status in one.into_iter().chain(all) {
            let env = status.job.unwrap().groups[0].tasks[0].env.clone();
            assert_eq!(env, [("PASSWORD".to_owned(), sees.to_owned())].into());
        }
    }
    server.stop().await;
}

/// The first revision of a cluster shows the key with which the ids of its pods are made; viewers could read it.
#[tokio::test]
async fn no_secret_is_in_the_history_that_one_reads_who_may_not_know_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    apply_with_password(&server, "env").await;
    let mut clients = vec![(true, server.local().await)];
    for (sees, role) in
        [(false, v1::TokenRole::Viewer), (true, v1::TokenRole::Operator), (true, v1::TokenRole::Admin)]
    {
        let credentials = enroll(&server.token(role, "bob", "").await, "", 0).await;
        clients.push((sees, ClusterClient::new(connect::mutual_tls(&credentials).await.unwrap())));
    }
    for (sees, mut client) in clients {
        let request = v1::ListRevisionsRequest { limit: 1000, ..Default::default() };
        let history = client.list_revisions(request).await.unwrap().into_inner().revisions;
        let diff = client.diff_revisions(v1::DiffRevisionsRequest::default()).await.unwrap().into_inner();
        for objects in [history.into_iter().flat_map(|revision| revision.objects).collect(), diff.objects] {
            let value = |key: &str, field: &str| {
                let object = objects.iter().find(|object: &&v1::ObjectChange| object.key == key).unwrap();
                let found = object.fields.iter().find(|change| change.field == field);
                found.unwrap_or_else(|| panic!("{key} has no {field}")).new.clone().unwrap()
            };
            assert_eq!(value("cluster", "id_key"), "(hidden)");
            assert!(value("cluster", "prefix").ends_with("/48"));
            let password = if sees { "open sesame" } else { "(hidden)" };
            assert_eq!(value("job/j", "groups.env.tasks.t.env.PASSWORD"), password);
            assert_eq!(value("job/j", "groups.env.count"), "1");
        }
        let version = v1::GetJobVersionRequest { name: "j".to_owned(), version: 1 };
        let text = client.get_job_version(version).await.unwrap().into_inner().job.unwrap();
        assert_eq!(text.groups[0].tasks[0].env["PASSWORD"] == "open sesame", sees);
    }
    server.stop().await;
}

async fn status_of(credentials: &Credentials) -> Result<(), tonic::Status> {
    let channel = connect::mutual_tls(credentials).await;
    let channel = channel.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    ClusterClient::new(channel).get_status(v1::GetStatusRequest {}).await.map(drop)
}

/// Calls a method with an empty message and reads nothing but how it ended.
async fn call(channel: tonic::transport::Channel, path: tonic::codegen::http::uri::PathAndQuery) -> Code {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<v1::GetStatusRequest, v1::GetStatusRequest>::default();
    match client.unary(tonic::Request::new(v1::GetStatusRequest {}), path, codec).await {
        Ok(_) => Code::Ok,
        Err(status) => status.code(),
    }
}
