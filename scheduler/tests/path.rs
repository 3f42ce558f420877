//! Jobs from apply to a pod's last report, over the Unix socket and mutual TLS.

mod support;

use std::{collections::BTreeSet, time::Duration};

use hextet_api::{
    connect::{self, Credentials},
    v1::{self, node_report::Report},
};
use scheduler::server::ServerConfig;
use support::{FakeNode, LEASE, TestServer, Watch, code, config, subscribe};
use tonic::Code;

#[tokio::test]
async fn a_job_is_placed_runs_is_changed_in_place_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    assert!(server.ready.join_token.as_ref().unwrap().starts_with("hx1-"));
    let n1 = FakeNode::join(&server, "n1", 1).await;
    let n2 = FakeNode::join(&server, "n2", 2).await;
    n1.when("peer", |told| told.peers.contains_key("n2").then_some(())).await;

    let applied = server.apply("hello", 4, "one").await;
    assert!(applied.changed && applied.version == 1);
    let pods = server.running(4).await;
    let on_n1 = pods.iter().filter(|pod| pod.node == "n1").count();
    assert_eq!(on_n1, 2, "spread");
    assert_eq!(n1.told.lock().unwrap().pods.len(), 2);
    assert!(pods.iter().all(|pod| pod.address.len() == 16));

    assert!(!server.apply("hello", 4, "one").await.changed, "the same again");

    let applied = server.apply("hello", 4, "two").await;
    assert_eq!(applied.version, 2);
    let after = server.pods_when("restarted", |pods| pods.iter().all(|pod| pod.job_version == 2)).await;
    let addresses = |pods: &[v1::Pod]| pods.iter().map(|pod| pod.address.clone()).collect::<BTreeSet<_>>();
    assert_eq!(addresses(&pods), addresses(&after), "a change of the tasks keeps the addresses");
    let exec = n2.when("version 2", |told| {
        let pod = told.pods.values().find(|pod| pod.job_version == 2)?;
        Some(pod.tasks[0].exec.clone())
    });
    assert_eq!(exec.await, ["/bin/server", "two"]);

    server.delete("hello").await;
    server.pods_when("gone", <[v1::Pod]>::is_empty).await;
    assert!(n1.told.lock().unwrap().pods.is_empty());
    server.stop().await;
}

#[tokio::test]
async fn a_hundred_pods_are_one_revision() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let _nodes = [FakeNode::join(&server, "n1", 1).await, FakeNode::join(&server, "n2", 2).await];
    let before = server.revision().await;
    let applied = server.apply("many", 100, "x").await;
    assert_eq!(applied.revision, before + 1);
    server.running(100).await;
    // Each node reports its pods together: the placement and a handful of reports, not hundreds.
    assert!(server.revision().await < before + 20);
    server.stop().await;
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_restart_and_sessions_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    server.apply("hello", 3, "one").await;
    let before = server.running(3).await;
    let port = server.ready.addresses[0];
    server.stop().await;
    let ended = node.when("the end", |told| told.ended.clone()).await;
    assert_eq!(ended.code(), Code::Unavailable);

    let mut config = config(dir.path());
    config.listen = vec![port];
    let server = TestServer::start_with(config.clone()).await;
    assert_eq!(server.ready.join_token, None, "a node has joined already");
    assert_eq!(server.pods().await, before);
    let node = FakeNode::attach(node.kill().await).await;
    node.when("its pods", |told| (told.pods.len() == 3).then_some(())).await;
    let again = server.running(3).await;
    assert_eq!(again, before, "nothing was placed anew");

    config.socket = dir.path().join("other.sock");
    config.listen = vec![];
    let second = scheduler::server::run(config, std::future::pending(), |_| {}).await;
    let error = format!("{:#}", second.unwrap_err());
    assert!(error.contains("another `netctl server` runs on this state directory"), "{error}");
    server.stop().await;
}

#[tokio::test]
async fn a_node_that_is_cut_off_loses_its_ha_pods_and_returns_without_them() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let n1 = FakeNode::join(&server, "n1", 1).await;
    let n2 = FakeNode::join(&server, "n2", 2).await;
    server.apply("hello", 2, "one").await;
    let before = server.running(2).await;
    let credentials = n1.kill().await;
    let after = server
        .pods_when("moved", |pods| {
            pods.len() == 2 && pods.iter().all(|pod| pod.node == "n2" && support::is_running(pod))
        })
        .await;
    let addresses: BTreeSet<_> = before.iter().chain(&after).map(|pod| pod.address.clone()).collect();
    assert_eq!(addresses.len(), 3, "a pod that moves is a new one with a new address");
    let phase = |nodes: Vec<v1::Node>| nodes.iter().find(|node| node.name == "n1").unwrap().phase();
    assert_eq!(phase(server.nodes().await), v1::NodePhase::Lost);
    assert!(n2.told.lock().unwrap().peers.contains_key("n1"), "routes to a lost node stay");

    let n1 = FakeNode::attach(credentials).await;
    n1.when("an assignment", |told| (told.full == 1 && told.pods.is_empty()).then_some(())).await;
    assert_eq!(phase(server.nodes().await), v1::NodePhase::Ready);
    server.stop().await;
}

#[tokio::test]
async fn a_node_that_says_that_it_leaves_is_lost_at_once_and_may_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let lease = Duration::from_secs(3600);
    let server = TestServer::start_with(ServerConfig { lease, ..config(dir.path()) }).await;
    let n1 = FakeNode::join(&server, "n1", 1).await;
    let _n2 = FakeNode::join(&server, "n2", 2).await;
    server.apply("hello", 2, "one").await;
    server.running(2).await;
    let credentials = n1.leave().await;
    let phase = |nodes: Vec<v1::Node>| nodes.iter().find(|node| node.name == "n1").unwrap().phase();
    assert_eq!(phase(server.nodes().await), v1::NodePhase::Lost, "before the stream has ended");
    server
        .pods_when("moved", |pods| {
            pods.len() == 2 && pods.iter().all(|pod| pod.node == "n2" && support::is_running(pod))
        })
        .await;
    let _n1 = FakeNode::attach(credentials).await;
    assert_eq!(phase(server.nodes().await), v1::NodePhase::Ready);
    server.stop().await;
}

/// Somebody takes a node down whose agent does not run. A copy of its disk has the same certificate.
#[tokio::test]
async fn without_an_agent_the_machine_that_was_served_may_say_that_its_node_leaves_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let lease = Duration::from_secs(3600);
    let server = TestServer::start_with(ServerConfig { lease, ..config(dir.path()) }).await;
    let token = server.token(v1::TokenRole::Node, "", "").await;
    let credentials = support::enroll(&token, "n1", 1).await;
    let agent = |session| v1::NodeHello { machine: "first".into(), session, ..support::hello_of("n1") };
    let say = |report| first_word(&credentials, report);
    let leaving =
        |machine: &str, session| Report::Leaving(v1::NodeLeaving { machine: machine.into(), session });
    say(Report::Hello(agent(7))).await.expect("it is told what to run");
    let phase = |nodes: Vec<v1::Node>| nodes[0].phase();

    let (refused, why) = support::code(say(leaving("copy", 9)).await);
    assert_eq!(
        (refused, phase(server.nodes().await)),
        (Code::FailedPrecondition, v1::NodePhase::Ready),
        "{why}"
    );
    assert!(why.contains("last served on another machine") && why.contains("netctl node dead n1"), "{why}");
    say(leaving("first", 8)).await.expect("the stream ends in order");
    assert_eq!(phase(server.nodes().await), v1::NodePhase::Lost);
    let (refused, why) = support::code(say(Report::Hello(agent(7))).await);
    assert_eq!(
        (refused, phase(server.nodes().await)),
        (Code::FailedPrecondition, v1::NodePhase::Lost),
        "{why}"
    );
    say(Report::Hello(agent(9))).await.expect("another agent has started");
    assert_eq!(phase(server.nodes().await), v1::NodePhase::Ready);
    server.stop().await;
}

/// Begins a stream with this, and gives what comes first.
async fn first_word(credentials: &Credentials, report: Report) -> Result<(), tonic::Status> {
    let channel = connect::mutual_tls(credentials).await.unwrap();
    let report = v1::NodeReport { report: Some(report) };
    let said = tokio_stream::StreamExt::chain(tokio_stream::once(report), tokio_stream::pending());
    let mut answers = v1::agent_client::AgentClient::new(channel).attach(said).await?.into_inner();
    answers.message().await.map(drop)
}

#[tokio::test]
async fn a_node_that_reports_keeps_its_lease_and_a_second_stream_ends_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let first = FakeNode::join(&server, "n1", 1).await;
    tokio::time::sleep(LEASE * 2).await;
    assert_eq!(server.nodes().await[0].phase(), v1::NodePhase::Ready);
    let second = FakeNode::attach(first.credentials.clone()).await;
    let ended = first.when("the end", |told| told.ended.clone()).await;
    assert_eq!(ended.code(), Code::Aborted, "{ended}");
    second.when("an assignment", |told| (told.full == 1).then_some(())).await;

    let request = v1::DeleteNodeRequest { name: "n1".to_owned(), message: "a dead board".to_owned() };
    let refused = server.local().await.delete_node(request.clone()).await;
    assert_eq!(code(refused).0, Code::FailedPrecondition);
    let credentials = second.kill().await;
    loop {
        if server.nodes().await[0].phase() == v1::NodePhase::Lost {
            break;
        }
        tokio::time::sleep(LEASE / 8).await;
    }
    server.local().await.delete_node(request).await.unwrap();
    assert_eq!(server.history("node/n1").await[0].message, "a dead board");
    let refused = async || {
        let channel = hextet_api::connect::mutual_tls(&credentials).await.unwrap();
        let mut client = hextet_api::v1::agent_client::AgentClient::new(channel);
        code(client.attach(tokio_stream::empty()).await.map(drop))
    };
    let (denied, message) = refused().await;
    assert_eq!(denied, Code::PermissionDenied);
    assert!(message.contains("join again with a new token"), "{message}");
    let _successor = FakeNode::join(&server, "n1", 2).await;
    assert_eq!(refused().await.0, Code::PermissionDenied, "the name is another key's now");
    server.stop().await;
}

#[tokio::test]
async fn a_pod_is_stopped_when_its_load_balancer_has_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    server.apply("hello", 2, "one").await;
    server.running(2).await;
    let mut watch = Watch::start(server.watcher().await, subscribe("hello")).await;
    let snapshot = watch.snapshot().await;
    assert!(snapshot.last && snapshot.endpoints.len() == 2);
    assert!(snapshot.endpoints.iter().all(|endpoint| endpoint.state() == v1::EndpointState::Ready));
    watch.ack(snapshot.revision).await;

    server.apply("hello", 1, "one").await;
    let event = watch.event().await;
    assert_eq!(event.upserts.len(), 1);
    assert_eq!(event.upserts[0].state(), v1::EndpointState::Terminating);
    // An acknowledgement of what was before is none.
    watch.ack(snapshot.revision).await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(node.told.lock().unwrap().pods.len(), 2, "it runs until the balancer has answered");
    let answered = std::time::Instant::now();
    watch.ack(event.revision).await;
    let gone = watch.event().await;
    assert_eq!(gone.removals, [event.upserts[0].pod.clone()]);
    assert!(answered.elapsed() < std::time::Duration::from_secs(1), "it was the answer, not the deadline");
    assert_eq!(node.told.lock().unwrap().pods.len(), 1);

    // A balancer that keeps silent holds nothing up for ever.
    server.delete("hello").await;
    let event = watch.event().await;
    assert_eq!(event.upserts[0].state(), v1::EndpointState::Terminating);
    server.pods_when("gone", <[v1::Pod]>::is_empty).await;
    server.stop().await;
}

#[tokio::test]
async fn a_watch_resumes_where_it_was_and_starts_anew_where_it_cannot() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let _node = FakeNode::join(&server, "n1", 1).await;
    server.apply("hello", 1, "one").await;
    server.running(1).await;
    let mut watch = Watch::start(server.watcher().await, subscribe("hello")).await;
    let snapshot = watch.snapshot().await;
    drop(watch);
    server.apply("other", 2, "one").await;
    server.apply("hello", 3, "one").await;
    let pods = server.running(5).await;

    let resume = v1::Subscribe {
        epoch: snapshot.epoch.clone(),
        from_revision: snapshot.revision,
        ..subscribe("hello")
    };
    let mut watch = Watch::start(server.watcher().await, resume.clone()).await;
    let mut known: BTreeSet<String> =
        snapshot.endpoints.iter().map(|endpoint| endpoint.pod.clone()).collect();
    let mut last = snapshot.revision;
    while known.len() < 3 {
        let event = watch.event().await;
        assert!(event.revision > last, "in order, none twice");
        last = event.revision;
        assert!(event.upserts.len() >= 2, "each event is whole: {event:?}");
        known.extend(event.upserts.into_iter().map(|endpoint| endpoint.pod));
    }
    let hello = pods.iter().filter(|pod| pod.job == "hello").map(|pod| pod.id.clone());
    assert_eq!(known, hello.collect());

    let newest = v1::Subscribe { from_revision: server.revision().await, ..resume.clone() };
    let mut watch = Watch::start(server.watcher().await, newest.clone()).await;
    let first = watch.next().await.unwrap();
    let bookmark = v1::Bookmark { epoch: snapshot.epoch.clone(), revision: newest.from_revision };
    assert_eq!(first, v1::watch_response::Response::Bookmark(bookmark), "nothing was missed");

    for unknown in [
        v1::Subscribe { epoch: "of another store".to_owned(), ..resume.clone() },
        v1::Subscribe { from_revision: 1_000_000, ..resume },
    ] {
        let mut watch = Watch::start(server.watcher().await, unknown).await;
        let first = watch.next().await.unwrap();
        let compacted = v1::Compacted { epoch: snapshot.epoch.clone(), oldest_revision: 1 };
        assert_eq!(first, v1::watch_response::Response::Compacted(compacted));
        assert_eq!(watch.snapshot().await.endpoints.len(), 3);
    }
    server.stop().await;
}

#[tokio::test]
async fn logs_come_from_the_node_that_has_the_pod() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    server.apply("hello", 1, "one").await;
    let pod = server.running(1).await.remove(0).id;
    let ask = |pod: &str, task: &str| v1::ReadLogsRequest {
        pod: pod.to_owned(),
        task: task.to_owned(),
        ..v1::ReadLogsRequest::default()
    };
    let mut client = server.local().await;
    let mut chunks = client.read_logs(ask(&pod, "")).await.unwrap().into_inner();
    let mut text = String::new();
    while let Some(chunk) = chunks.message().await.unwrap() {
        text.push_str(std::str::from_utf8(&chunk.data).unwrap());
    }
    assert_eq!(text, format!("server of {pod}: hello\n"));

    let error = client.read_logs(ask("none", "")).await.map(drop);
    assert_eq!(code(error).0, Code::NotFound);
    let (refused, message) = code(client.read_logs(ask(&pod, "other")).await.map(drop));
    assert_eq!(refused, Code::InvalidArgument);
    assert!(message.ends_with("has no task `other`; it has: server"), "{message}");
    node.kill().await;
    let refused = loop {
        // The server notices the cut connection a moment later.
        match client.read_logs(ask(&pod, "")).await {
            Ok(_) => tokio::time::sleep(LEASE / 20).await,
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(refused.message().contains("node n1 is not attached"), "{refused}");
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_a_job_is_refused_by_the_field() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let (refused, message) = code(server.try_apply("Hello", 1, "x").await);
    assert_eq!(refused, Code::InvalidArgument);
    assert!(message.starts_with("job: the name `Hello` is not of a-z"), "{message}");
    let mut client = server.local().await;
    let missing = v1::DeleteJobRequest { name: "none".to_owned(), message: String::new() };
    assert_eq!(code(client.delete_job(missing).await).0, Code::NotFound);
    let empty = v1::ApplyJobRequest::default();
    assert_eq!(code(client.apply_job(empty).await), (Code::InvalidArgument, "job is missing".to_owned()));
    server.stop().await;
}
