//! Why a pod is as it is and what happened to it, over the Unix socket, with a node that a test plays.

mod support;

use hextet_api::{
    connect,
    v1::{self, agent_client::AgentClient, node_report::Report},
};
use support::{FakeNode, TestServer, code};
use tonic::Code;

async fn explain(server: &TestServer, pod: &str) -> Result<v1::ExplainPodResponse, tonic::Status> {
    let request = v1::ExplainPodRequest { pod: pod.to_owned() };
    Ok(server.local().await.explain_pod(request).await?.into_inner())
}

fn phase<'a>(answer: &'a v1::ExplainPodResponse, step: &str) -> &'a str {
    answer.steps.iter().find(|other| other.name == step).map_or("-", |step| &step.phase)
}

async fn events(server: &TestServer, pod: &str) -> Vec<v1::ClusterEvent> {
    let request = v1::WatchEventsRequest { pod: pod.to_owned(), ..Default::default() };
    let mut stream = server.local().await.watch_events(request).await.unwrap().into_inner();
    let mut events = vec![];
    while let Some(event) = stream.message().await.unwrap() {
        events.push(event);
    }
    events
}

/// Answers as agents do, with one step.
async fn answer(node: &FakeNode, request_id: u64) -> Result<(), tonic::Status> {
    answer_retried(node, request_id, Vec::new()).await
}

async fn answer_retried(node: &FakeNode, request_id: u64, retried: Vec<String>) -> Result<(), tonic::Status> {
    let mut client = AgentClient::new(connect::mutual_tls(&node.credentials).await.unwrap());
    let step = v1::StepStatus { name: "tasks".into(), phase: "done".into(), ..Default::default() };
    let request = v1::SendDescriptionRequest { request_id, steps: vec![step], retried, ..Default::default() };
    client.send_description(request).await.map(drop)
}

#[tokio::test]
async fn what_failed_for_good_is_tried_again_by_the_pods_node() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    server.apply("blog", 1, "one").await;
    let pod = server.running(1).await.remove(0).id;
    let asked = async {
        let question = node.when("the question", |told| told.questions.first().cloned()).await;
        assert_eq!((question.pod.as_str(), question.retry), (pod.as_str(), true));
        answer_retried(&node, question.request_id, vec!["migrate".into()]).await.unwrap();
    };
    let retry = v1::RetryPodRequest { pod: pod.clone() };
    let mut client = server.local().await;
    let (retried, ()) = tokio::join!(client.retry_pod(retry), asked);
    assert_eq!(retried.unwrap().into_inner().steps, ["migrate"]);
    let none = server.local().await.retry_pod(v1::RetryPodRequest { pod: "none".into() }).await.unwrap_err();
    assert_eq!(none.code(), Code::NotFound);
    server.stop().await;
}

#[tokio::test]
async fn a_pod_is_explained_by_its_node_and_by_the_server_when_that_is_silent() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    server.apply("blog", 1, "one").await;
    let pod = server.pods_when("a pod", |pods| pods.len() == 1).await.remove(0).id;
    let nowhere = explain(&server, &pod).await.unwrap();
    assert_eq!((phase(&nowhere, "placed"), phase(&nowhere, "tasks")), ("waiting", "-"));

    let n1 = FakeNode::join(&server, "n1", 1).await;
    let n2 = FakeNode::join(&server, "n2", 2).await;
    let pod = server.running(1).await.remove(0);
    let (node, other) = if pod.node == "n1" { (&n1, &n2) } else { (&n2, &n1) };
    let asked = async {
        let question = node.when("the question", |told| told.questions.first().cloned()).await;
        assert_eq!(question.pod, pod.id);
        let refused = answer(other, question.request_id).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        answer(node, question.request_id).await.unwrap();
    };
    let (explained, ()) = tokio::join!(explain(&server, &pod.id), asked);
    let explained = explained.unwrap();
    assert_eq!(explained.node_error, "");
    assert_eq!((phase(&explained, "placed"), phase(&explained, "published")), ("done", "done"));
    assert_eq!(phase(&explained, "tasks"), "done");
    assert!(explained.steps.iter().any(|step| step.name == "placed" && step.ended_ms_ago.is_some()));

    // It is asked again and says nothing.
    let silent = explain(&server, &pod.id).await.unwrap();
    assert!(silent.node_error.ends_with("does not answer within 3 s"), "{}", silent.node_error);
    assert_eq!(phase(&silent, "placed"), "done");
    assert_eq!(code(explain(&server, "no-such").await).0, Code::NotFound);
}

/// When a pod was gone, so was every word on it.
#[tokio::test]
async fn a_pod_that_is_gone_is_explained_from_the_log_as_far_as_that_reaches() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    server.apply("blog", 1, "one").await;
    let pod = server.running(1).await.remove(0).id;
    let ending =
        v1::PodEnding { what: "task t: exited".into(), output: "no \x1b[2Jtable".into(), for_good: false };
    let report = v1::PodReport {
        id: pod.clone(),
        phase: v1::PodPhase::Failed.into(),
        ending: Some(ending),
        ..Default::default()
    };
    node.say(Report::Pods(v1::PodReports { pods: vec![report] })).await;
    server.pods_when("it failed", |pods| pods.iter().all(|pod| pod.phase() == v1::PodPhase::Failed)).await;
    let failed = events(&server, &pod).await;
    assert!(failed.iter().any(|event| event.output == "no ?[2Jtable"), "{failed:?}");
    server.apply("blog", 0, "one").await;
    server.pods_when("it is gone", <[v1::Pod]>::is_empty).await;
    server.apply("blog", 1, "one").await;
    let other = server.running(1).await.remove(0).id;

    let explained = explain(&server, &pod).await.unwrap();
    let (gone, ending) = (explained.gone.unwrap(), explained.ending.unwrap());
    assert_eq!((gone.by.as_str(), gone.why.as_str()), ("user:root", "fewer pods are wanted"));
    assert!(gone.stopped_revision > 0 && gone.stopped_revision < gone.revision, "{gone:?}");
    assert_eq!((gone.instead[0].id.as_str(), gone.instead_total), (other.as_str(), 1));
    assert_eq!((ending.what.as_str(), ending.output.as_str()), ("task t: exited", "no ?[2Jtable"));
    let refused = |pod: &'static str| async { code(explain(&server, pod).await) };
    let (found, said) = refused("blog-web-zzzzz").await;
    assert_eq!(found, Code::NotFound);
    assert!(said.starts_with("there never was a pod `blog-web-zzzzz`"), "{said}");

    let compact = v1::CompactHistoryRequest { keep_revisions: 1, ..Default::default() };
    server.local().await.compact_history(compact).await.unwrap();
    let said = code(explain(&server, &pod).await).1;
    assert!(said.contains("the history, which begins with revision"), "{said}");
    server.stop().await;
}

/// Events with the places where they are, until `enough`.
async fn followed(
    server: &TestServer,
    after: Option<v1::EventPosition>,
    enough: impl Fn(&[v1::ClusterEvent]) -> bool,
) -> (Vec<v1::ClusterEvent>, v1::EventPosition) {
    let request =
        v1::WatchEventsRequest { follow: true, positions: true, after, limit: 1000, ..Default::default() };
    let mut stream = server.local().await.watch_events(request).await.unwrap().into_inner();
    let (mut events, mut place) = (vec![], None);
    while !(enough(&events) && place.is_some()) {
        let next = tokio::time::timeout(support::DEADLINE, stream.message()).await;
        let mut event = next.unwrap_or_else(|_| panic!("no more came: {events:?}")).unwrap().unwrap();
        place = event.position.take();
        assert!(place.is_some(), "each says where it is: {event:?}");
        events.extend((event != v1::ClusterEvent::default()).then_some(event));
    }
    (events, place.unwrap())
}

fn revisions(events: &[v1::ClusterEvent]) -> Vec<u64> {
    events.iter().map(|event| event.revision).filter(|revision| *revision > 0).collect()
}

/// A follower ended with its server, and the next one began with what it had seen.
#[tokio::test]
async fn a_follower_of_events_goes_on_in_the_next_server_without_gap_or_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    for number in 0..5 {
        server.apply(&format!("j{number}"), 0, "one").await;
    }
    let (before, place) = followed(&server, None, |events| revisions(events).len() >= 6).await;
    server.stop().await;

    let server = TestServer::start(dir.path()).await;
    for number in 5..8 {
        server.apply(&format!("j{number}"), 0, "one").await;
    }
    let last = server.status().await.revision;
    let reached = |events: &[v1::ClusterEvent]| revisions(events).contains(&last);
    let (after, place) = followed(&server, Some(place), reached).await;
    let all = [revisions(&before), revisions(&after)].concat();
    assert!(all.iter().zip(&all[1..]).all(|(one, next)| one + 1 == *next), "{all:?}");
    assert_eq!(all.last(), Some(&last));
    assert!(after.iter().all(|event| event.kind != "gap"), "{after:?}");

    // What was compacted meanwhile cannot be told, and nor can what another store did.
    for number in 8..12 {
        server.apply(&format!("j{number}"), 0, "one").await;
    }
    let compact = v1::CompactHistoryRequest { keep_revisions: 1, ..Default::default() };
    server.local().await.compact_history(compact).await.unwrap();
    let (gap, _) = followed(&server, Some(place.clone()), |events| events.len() >= 2).await;
    assert_eq!(gap[0].kind, "gap");
    assert!(gap[0].what.contains(&format!("revisions {} to ", last + 1)), "{gap:?}");
    let other = v1::EventPosition { epoch: "another".into(), ..place };
    let (gap, _) = followed(&server, Some(other), |events| !events.is_empty()).await;
    assert!(gap[0].kind == "gap" && gap[0].what.contains("another store"), "{gap:?}");
    server.stop().await;
}

#[tokio::test]
async fn one_stream_has_revisions_and_what_nodes_say_of_their_own_pods() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let n1 = FakeNode::join(&server, "n1", 1).await;
    let n2 = FakeNode::join(&server, "n2", 2).await;
    server.apply("blog", 1, "one").await;
    let pod = server.running(1).await.remove(0);
    let (own, foreign) = if pod.node == "n1" { (&n1, &n2) } else { (&n2, &n1) };
    let mut follow = {
        let request =
            v1::WatchEventsRequest { pod: pod.id.clone(), follow: true, limit: 1, ..Default::default() };
        server.local().await.watch_events(request).await.unwrap().into_inner()
    };
    follow.message().await.unwrap().unwrap();
    let event = |what: &str| {
        let event =
            v1::PodEvent { pod: pod.id.clone(), kind: "step-done".into(), what: what.into(), unix_ms: 1 };
        Report::Events(v1::PodEvents { events: vec![event], lost: 0 })
    };
    own.say(event("link after 3ms")).await;
    let heard = follow.message().await.unwrap().unwrap();
    assert_eq!(
        (heard.by.as_str(), heard.what.as_str()),
        (format!("node:{}", pod.node).as_str(), "link after 3ms")
    );

    foreign.say(event("a lie")).await;
    let report =
        v1::PodReport { id: pod.id.clone(), phase: v1::PodPhase::Failed.into(), ..Default::default() };
    foreign.say(Report::Pods(v1::PodReports { pods: vec![report] })).await;
    for what in ["an event", "phase, message and restarts"] {
        let refused = follow.message().await.unwrap().unwrap();
        assert_eq!(refused.kind, "refused");
        assert!(refused.what.contains(what), "{}", refused.what);
        assert!(refused.what.ends_with(&format!("node {} owns it", pod.node)), "{}", refused.what);
    }
    assert_eq!(server.running(1).await[0].message, "", "nothing was written");

    let all = events(&server, &pod.id).await;
    let kinds: Vec<&str> = all.iter().map(|event| event.kind.as_str()).collect();
    for kind in ["pod-created", "revision", "step-done", "refused"] {
        assert!(kinds.contains(&kind), "{kind}: {kinds:?}");
    }
    assert!(events(&server, "no-such").await.is_empty());
}
