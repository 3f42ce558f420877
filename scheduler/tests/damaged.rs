//! A server whose store is damaged: it shows what it can read, and changes nothing.

mod support;

use std::{fs, path::Path};

use hextet_api::{
    connect::{self, Key},
    v1::{self, agent_client::AgentClient, watch_response::Response},
};
use redb::{Database, TableDefinition};
use scheduler::backup::{self, Incomplete};
use support::{FakeNode, TestServer, Watch, code, is_running, subscribe, try_enroll};
use tonic::Code;

const CURRENT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("current");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");

/// Changes the closed store in a way that redb takes for good; gives the file as it is then.
fn spoil(dir: &Path, spoil: impl FnOnce(&redb::WriteTransaction)) -> Vec<u8> {
    let path = file(dir);
    let database = Database::open(&path).unwrap();
    let txn = database.begin_write().unwrap();
    spoil(&txn);
    txn.commit().unwrap();
    drop(database);
    fs::read(&path).unwrap()
}

fn file(dir: &Path) -> std::path::PathBuf {
    dir.join("state/server.redb")
}

/// Every call that changes something is refused with the same words.
async fn is_refused(server: &TestServer) {
    let token = v1::CreateTokenRequest { role: v1::TokenRole::Node.into(), ..Default::default() };
    let delete = v1::DeleteJobRequest { name: "blog".to_owned(), message: String::new() };
    let compact = v1::CompactHistoryRequest { keep_revisions: 1, ..Default::default() };
    let rollback = v1::RollbackJobRequest { name: "blog".to_owned(), to: 1, message: String::new() };
    let dead = v1::DeclareDeadRequest { name: "n1".to_owned(), message: String::new() };
    let mut local = server.local().await;
    let refusals = [
        code(server.try_apply("blog", 3, "x").await),
        code(local.create_token(token).await),
        code(local.delete_job(delete).await),
        code(local.compact_history(compact).await),
        code(local.rollback_job(rollback).await),
        code(local.declare_dead(dead).await),
        code(local.plan_jobs(v1::PlanJobsRequest { jobs: vec![] }).await),
    ];
    for (code, text) in refusals {
        assert_eq!(code, Code::FailedPrecondition, "{text}");
        assert!(
            text.contains("is damaged and is only read") && text.contains("netctl server restore"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_gap_in_the_history_leaves_every_object_readable_and_nothing_changeable() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let n1 = FakeNode::join(&server, "n1", 1).await;
    let spare = server.token(v1::TokenRole::Node, "", "").await;
    server.apply("blog", 2, "one").await;
    server.running(2).await;
    server.apply("other", 1, "one").await;
    let before =
        server.pods_when("three run", |pods| pods.iter().filter(|pod| is_running(pod)).count() == 3).await;
    let (revision, address) = (server.revision().await, server.ready.addresses[0]);
    let lost = server.history("job/blog").await[0].revision;
    let credentials = n1.kill().await;
    server.stop().await;
    let bytes = spoil(dir.path(), |txn| drop(txn.open_table(LOG).unwrap().remove(lost).unwrap()));

    let server = TestServer::start_at(dir.path(), address).await;
    assert_eq!(server.ready.join_token, None);
    let said = server.status().await;
    assert_eq!(said.damage, [format!("log: revision {lost} is missing")]);
    assert_eq!(said.revision, revision);
    assert_eq!(server.pods().await, before);
    let jobs = server.local().await.list_jobs(v1::ListJobsRequest {}).await.unwrap().into_inner();
    assert_eq!((jobs.jobs.len(), jobs.unreadable.len()), (2, 0));
    let gaps: Vec<u64> =
        server.history("").await.iter().map(|line| line.unreadable_from).filter(|from| *from > 0).collect();
    assert_eq!(gaps, [lost]);
    assert_eq!(
        server.history("job/other").await.len(),
        2,
        "the job's own revision, and the one that may be about it"
    );
    is_refused(&server).await;

    // Every address is known: a load balancer gets them.
    let mut watch = Watch::start(server.watcher().await, subscribe("blog")).await;
    assert_eq!(watch.snapshot().await.endpoints.len(), 2);
    let resume =
        v1::Subscribe { epoch: said.epoch.clone(), from_revision: revision - 1, ..subscribe("blog") };
    let mut watch = Watch::start(server.watcher().await, resume).await;
    assert!(matches!(watch.next().await.unwrap(), Response::Compacted(_)), "what was missed is not known");

    // A node hears that the server is away, and nothing of its pods.
    let mut agent = AgentClient::new(connect::mutual_tls(&credentials).await.unwrap());
    let refusals = [
        code(agent.attach(tokio_stream::pending()).await),
        code(agent.hold_lease(tokio_stream::pending()).await),
        code(try_enroll(&spare, &Key::generate().unwrap(), "n2", 2).await),
    ];
    for (code, text) in refusals {
        assert_eq!(code, Code::Unavailable, "{text}");
        assert!(text.contains("is damaged and is only read"), "{text}");
    }

    let backup = dir.path().join("backup");
    server.back_up(&backup).await;
    server.stop().await;
    assert!(fs::read(file(dir.path())).unwrap() == bytes, "the file was changed");

    let other = tempfile::tempdir().unwrap();
    let refused = backup::restore(&backup, &other.path().join("state"), Incomplete::Refuse).unwrap_err();
    assert!(
        format!("{refused:#}")
            .contains(&format!("--incomplete; it lacks:\n  log: revision {lost} is missing"))
    );
    let restored = backup::restore(&backup, &other.path().join("state"), Incomplete::Take).unwrap();
    assert_eq!((restored.revision, restored.missing), (revision, said.damage));
    let server = TestServer::start_at(other.path(), address).await;
    assert_eq!(server.pods().await.len(), 3);
    let _n1 = FakeNode::attach(credentials).await;
    server.apply("blog", 3, "on we go").await;
    server.running(4).await;
    server.stop().await;
}

#[tokio::test]
async fn what_cannot_be_read_has_a_line_in_every_list_and_is_never_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let n1 = FakeNode::join(&server, "n1", 1).await;
    server.apply("blog", 2, "one").await;
    let pods = server.running(2).await;
    // The history is not long enough to help.
    server.apply("other", 1, "one").await;
    let compact = v1::CompactHistoryRequest { keep_revisions: 1, ..Default::default() };
    server.running(3).await;
    server.local().await.compact_history(compact).await.unwrap();
    drop(n1);
    server.stop().await;
    let lost = pods[0].id.clone();
    let bytes = spoil(dir.path(), |txn| {
        let mut current = txn.open_table(CURRENT).unwrap();
        for key in [format!("pod/{lost}"), "job/blog".to_owned(), "node/n1".to_owned()] {
            current.insert(key.as_str(), b"\x01gone".as_slice()).unwrap();
        }
    });
    let server = TestServer::start(dir.path()).await;
    assert_eq!(server.status().await.damage.len(), 3);
    let mut local = server.local().await;
    let listed = local.list_pods(v1::ListPodsRequest::default()).await.unwrap().into_inner();
    assert_eq!((listed.pods.len(), listed.unreadable[0].key.as_str()), (2, format!("pod/{lost}").as_str()));
    let jobs = local.list_jobs(v1::ListJobsRequest {}).await.unwrap().into_inner();
    assert_eq!((jobs.jobs.len(), jobs.unreadable[0].key.as_str()), (1, "job/blog"));
    let nodes = local.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner();
    assert_eq!((nodes.nodes.len(), nodes.unreadable[0].key.as_str()), (0, "node/n1"));
    let answers = [
        code(local.get_job(v1::GetJobRequest { name: "blog".to_owned() }).await),
        code(local.get_job_version(v1::GetJobVersionRequest { name: "blog".to_owned(), version: 1 }).await),
        code(local.explain_pod(v1::ExplainPodRequest { pod: lost }).await),
    ];
    for (code, text) in answers {
        assert_eq!(code, Code::DataLoss, "{text}");
        assert!(text.contains("it may be there and unreadable"), "{text}");
    }
    // Some addresses would be missing: a balancer keeps those that it has.
    let (refused, text) = code(server.watcher().await.watch(tokio_stream::pending()).await);
    assert_eq!(refused, Code::Unavailable, "{text}");
    is_refused(&server).await;
    server.stop().await;
    assert!(fs::read(file(dir.path())).unwrap() == bytes, "the file was changed");
}
