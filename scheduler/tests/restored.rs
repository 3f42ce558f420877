//! A server that goes on from a backup that is older than the world: what there may only be one of waits, and no number
//! is given twice.

mod support;

use std::{path::Path, time::Duration};

use hextet_api::{
    connect,
    v1::{self, agent_client::AgentClient, lease_renewal::Renewal, node_report::Report},
};
use scheduler::{
    backup::{self, Incomplete},
    convert,
};
use support::{DEADLINE, FakeNode, LEASE, TestServer};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::StreamExt as _;

/// Leases of the server before run for so long at most.
const WAIT: Duration = Duration::from_millis(1875);

#[tokio::test]
async fn nothing_that_there_may_only_be_one_of_lives_while_leases_from_before_may_run() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let (n1, n2) = (FakeNode::join(&server, "n1", 1).await, FakeNode::join(&server, "n2", 2).await);
    apply(&server, "queue").await;
    let first = server.running(1).await.remove(0);
    let file = dir.path().join("backup");
    server.back_up(&file).await;
    let token = server.token(v1::TokenRole::Node, "", "").await;

    // After the backup the pod moves, and the server makes others.
    let (here, there) = if first.node == "n1" { (n1, n2) } else { (n2, n1) };
    let old_term = term(&here);
    let here = here.leave().await;
    let moved = there.when("the pod has moved", single).await;
    assert!(moved.serial > serial(&server, &first).await);
    server.apply("late", 3, "one").await;
    let known: Vec<String> = server.running(4).await.into_iter().map(|pod| pod.id).collect();
    let address = server.ready.addresses[0];
    server.stop().await;

    let other = tempfile::tempdir().unwrap();
    backup::restore(&file, &other.path().join("state"), Incomplete::Refuse).unwrap();
    let server = TestServer::start_at(other.path(), address).await;
    let there = there.kill().await;
    let (here, there) = (FakeNode::attach(here).await, FakeNode::attach(there).await);
    assert!(single(&here.told.lock().unwrap()).is_none(), "the node that the backup names");
    assert!(single(&there.told.lock().unwrap()).is_none(), "the node that has it");
    assert!(term(&here) > old_term && term(&there) > old_term);
    is_told_to_wait(&server).await;
    let used = support::try_enroll(&token, &hextet_api::connect::Key::generate().unwrap(), "n3", 3).await;
    assert!(support::code(used).1.contains("token"), "it may have been used since");
    // Others go on, under names that no pod has had.
    server.apply("late", 1, "one").await;
    let new = server.pods_when("placed", |pods| pods.len() == 2).await;
    assert!(new.iter().all(|pod| !known.contains(&pod.id)), "{known:?} {new:?}");

    // Half of the wait does not count for the server that comes after this one.
    sleep(WAIT / 2).await;
    let (here, there) = (here.kill().await, there.kill().await);
    server.stop().await;
    let begun = Instant::now();
    let server = TestServer::start_at(other.path(), address).await;
    let (here, there) = (FakeNode::attach(here).await, FakeNode::attach(there).await);
    let now = first_told([&here, &there]).await;
    assert!(begun.elapsed() >= WAIT, "{:?}", begun.elapsed());
    assert!(now.serial > moved.serial, "{} is no later than {}", now.serial, moved.serial);
    assert!(!known.contains(&now.id));
    server.running(2).await;
    assert_eq!(server.status().await.restored, None);
    let log = server.history("").await;
    let message = |what: &str| log.iter().any(|revision| revision.message.contains(what));
    assert!(message("restored from a backup of revision") && message("no lease from before the restore"));
    server.stop().await;

    // It is over for good.
    let server = TestServer::start_at(other.path(), address).await;
    assert_eq!(server.status().await.restored, None);
    server.stop().await;
}

#[tokio::test]
async fn a_backup_says_how_long_its_leases_were() {
    let dir = tempfile::tempdir().unwrap();
    let long = support::config(dir.path());
    let server = TestServer::start_with(scheduler::server::ServerConfig { lease: LEASE * 10, ..long }).await;
    let file = dir.path().join("backup");
    server.back_up(&file).await;
    server.stop().await;
    for _ in 0..2 {
        let other = tempfile::tempdir().unwrap();
        let epoch = restored_wait(&file, other.path()).await;
        assert_ne!(epoch, restored_wait(&file, tempfile::tempdir().unwrap().path()).await);
    }
}

/// Restores, and says the epoch of the server that waits for the leases of the one before, which were longer.
async fn restored_wait(file: &Path, dir: &Path) -> String {
    backup::restore(file, &dir.join("state"), Incomplete::Refuse).unwrap();
    let server = TestServer::start(dir).await;
    let status = server.status().await;
    let wait = Duration::from_millis(status.restored.unwrap().wait_ms.into());
    assert!(wait > WAIT * 9 && wait <= WAIT * 10, "{wait:?}");
    server.stop().await;
    status.epoch
}

/// A copy of the file that was put back looks as if it were the present; a node that was told more knows better.
#[tokio::test]
async fn a_node_that_has_heard_more_than_the_store_holds_is_refused_and_holds_no_lease() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let (n1, n2) = (FakeNode::join(&server, "n1", 1).await, FakeNode::join(&server, "n2", 2).await);
    server.apply("blog", 2, "one").await;
    let (status, credentials) = (server.status().await, n1.kill().await);
    let mut agent = AgentClient::new(connect::mutual_tls(&credentials).await.unwrap());
    let mut say = async |epoch: &str, revision| {
        let (epoch, hello) = (epoch.to_owned(), support::hello_of("n1"));
        let hello =
            v1::NodeReport { report: Some(Report::Hello(v1::NodeHello { epoch, revision, ..hello })) };
        let stream = tokio_stream::once(hello).chain(tokio_stream::pending());
        agent.attach(stream).await.unwrap().into_inner().message().await
    };
    let refused = support::code(say(&status.epoch, status.revision + 100).await);
    assert_eq!(refused.0, tonic::Code::Unavailable);
    assert!(
        refused.1.contains("it is a copy from before") && refused.1.contains("server backup"),
        "{refused:?}"
    );

    let mut agent = AgentClient::new(connect::mutual_tls(&credentials).await.unwrap());
    let renewal = |number| v1::LeaseRenewal { renewal: Some(Renewal::Number(number)) };
    let renewals = tokio_stream::iter([renewal(1), renewal(2)]).chain(tokio_stream::pending());
    let mut answers = agent.hold_lease(renewals).await.unwrap().into_inner();
    assert!(timeout(LEASE / 3, answers.message()).await.is_err(), "no grant");
    // Its word is about itself alone; and of another store everybody hears everything anew.
    n2.when("a grant", |told| told.grant).await;
    assert!(say("of another store", status.revision + 100).await.unwrap().is_some());
    assert!(say(&status.epoch, status.revision).await.unwrap().is_some());
    let renewals = tokio_stream::iter([renewal(1), renewal(2)]).chain(tokio_stream::pending());
    let mut answers = agent.hold_lease(renewals).await.unwrap().into_inner();
    assert!(timeout(support::DEADLINE, answers.message()).await.unwrap().unwrap().is_some());
    server.stop().await;
}

async fn is_told_to_wait(server: &TestServer) {
    let status = server.status().await;
    let restored = status.restored.expect("the cluster was restored");
    assert!(restored.wait_ms <= 1875 && restored.revision < status.revision, "{restored:?}");
    let pods = server.pods().await;
    let [waits] = pods.as_slice() else { panic!("{pods:?}") };
    assert!(waits.message.contains("restored from a backup: waits until no lease"), "{}", waits.message);
    let question = v1::ExplainPodRequest { pod: waits.id.clone() };
    let why = server.local().await.explain_pod(question).await.unwrap().into_inner();
    assert!(why.reasons[0].contains("the last lease from before the restore is over in"), "{why:?}");
}

async fn apply(server: &TestServer, job: &str) {
    let yaml = format!(
        "{{job: {job}, groups: {{boss: {{count: 1, availability: singleton, tasks: \
         {{server: {{exec: [/bin/server], cpu: 10m, memory: 1Mi}}}}}}}}}}"
    );
    let job = convert::job_to_message(&serde_norway::from_str(&yaml).unwrap());
    let request = v1::ApplyJobRequest { job: Some(job), ..Default::default() };
    server.local().await.apply_job(request).await.unwrap();
}

/// The pod of which there may only be one, if the node is to run it.
fn single(told: &support::Told) -> Option<v1::PodAssignment> {
    told.pods.values().find(|pod| pod.singleton).cloned()
}

fn term(node: &FakeNode) -> u64 {
    node.told.lock().unwrap().term
}

async fn serial(server: &TestServer, pod: &v1::Pod) -> u64 {
    let made = server.history(&format!("pod/{}", pod.id)).await;
    let fields = made.iter().flat_map(|revision| &revision.objects).flat_map(|object| &object.fields);
    let serial = fields.filter(|field| field.field == "serial").find_map(|field| field.new.clone());
    serial.unwrap().parse().unwrap()
}

/// What the first of them is told to run of which there may only be one, and may: it holds a lease of its term.
async fn first_told(nodes: [&FakeNode; 2]) -> v1::PodAssignment {
    let deadline = Instant::now() + DEADLINE;
    loop {
        for node in nodes {
            let told = node.told.lock().unwrap();
            let lives = told.grant.as_ref().is_some_and(|grant| grant.term == told.term);
            if let Some(pod) = single(&told).filter(|_| lives) {
                return pod;
            }
        }
        assert!(Instant::now() < deadline, "nobody is told to run it");
        sleep(Duration::from_millis(5)).await;
    }
}
