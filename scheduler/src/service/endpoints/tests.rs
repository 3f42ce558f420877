//! What a watcher is sent, over a hub without a server.

use std::collections::BTreeMap;

use scheduler_core::{
    event::{Event, PodReport},
    pod::PodPhase,
};

use super::*;
use crate::{
    hub::scheduler,
    writer::tests::{Next, apply, hub, join},
};

#[tokio::test]
async fn a_reader_that_falls_behind_gets_the_net_change_and_holds_up_nobody() {
    let (hub, _store) = hub();
    join(&hub).await;
    apply(&hub, "a").await.unwrap();
    let (reader, mut messages) = reader(&hub);
    let mut known = BTreeMap::new();
    let mut received = 0;
    let snapshot = messages.recv().await.unwrap().unwrap();
    take(&mut known, snapshot);

    let commits = 3000;
    for number in 0..commits {
        report(&hub, if number % 2 == 0 { PodPhase::Running } else { PodPhase::Failed }).await;
    }
    report(&hub, PodPhase::Running).await;
    let wanted = BTreeMap::from([(pod(&hub), v1::EndpointState::Ready)]);
    let last = hub.state().revision();
    loop {
        let revision = take(&mut known, messages.recv().await.unwrap().unwrap());
        received += 1;
        if revision == last {
            break;
        }
    }
    assert_eq!(known, wanted);
    assert!(received < commits, "{received} messages for {commits} revisions");
    drop(messages);
    // It notices with its next message.
    report(&hub, PodPhase::Failed).await;
    assert_eq!(reader.await.unwrap().code(), tonic::Code::Cancelled);
}

/// An event whose sending outlasted the time of a bookmark was forgotten, and the bookmark went past it: the
/// time is only for the waiting.
#[tokio::test]
async fn a_reader_that_stalls_past_a_bookmark_misses_nothing() {
    let (hub, _store) = hub();
    join(&hub).await;
    apply(&hub, "a").await.unwrap();
    let (_reader, mut messages) = reader(&hub);
    let mut known = BTreeMap::new();
    take(&mut known, messages.recv().await.unwrap().unwrap());
    report(&hub, PodPhase::Running).await;
    time::sleep(Duration::from_millis(200)).await;
    report(&hub, PodPhase::Failed).await;
    let last = hub.state().revision();
    time::sleep(BOOKMARK_INTERVAL + Duration::from_secs(1)).await;
    while take(&mut known, messages.recv().await.unwrap().unwrap()) != last {}
    assert_eq!(known, BTreeMap::from([(pod(&hub), v1::EndpointState::Starting)]));
}

#[tokio::test]
async fn a_server_that_is_behind_its_store_tells_nobody_of_the_past() {
    let (hub, store) = hub();
    join(&hub).await;
    apply(&hub, "a").await.unwrap();
    let newest = hub.state().revision();
    let subscribe = v1::Subscribe {
        epoch: hub.store.epoch().to_owned(),
        from_revision: newest + 1,
        ..v1::Subscribe::default()
    };
    // What the reader knows is nowhere: it begins anew.
    let (_reader, mut messages) = reader_from(&hub, subscribe.clone());
    let first = messages.recv().await.unwrap().unwrap();
    assert!(matches!(first.response, Some(Message::Compacted(_))), "{first:?}");
    // Somebody else has written it.
    store.next(Next::Fails { written: true });
    apply(&hub, "b").await.unwrap_err();
    let (reader, mut messages) = reader_from(&hub, subscribe);
    assert!(messages.recv().await.is_none(), "nothing is sent");
    assert_eq!(reader.await.unwrap().code(), tonic::Code::Unavailable);
}

/// A reader of job `a` behind a channel that holds one message.
fn reader(hub: &Arc<Hub>) -> (task::JoinHandle<Status>, mpsc::Receiver<Result<WatchResponse, Status>>) {
    reader_from(hub, v1::Subscribe::default())
}

/// One that asks for this.
fn reader_from(
    hub: &Arc<Hub>,
    subscribe: v1::Subscribe,
) -> (task::JoinHandle<Status>, mpsc::Receiver<Result<WatchResponse, Status>>) {
    let (out, messages) = mpsc::channel(1);
    let selector: Selector = "a".parse().unwrap();
    let hub = hub.clone();
    let reader = tokio::spawn(async move {
        let reader = Reader { hub: &hub, known: watch::Reader::new(selector), out: &out };
        reader.follow(&subscribe).await
    });
    (reader, messages)
}

fn pod(hub: &Hub) -> String {
    hub.state().pods().keys().next().unwrap().to_string()
}

async fn report(hub: &Hub, phase: PodPhase) {
    let id = hub.state().pods().keys().next().unwrap().clone();
    let report = PodReport {
        id,
        phase,
        message: String::new(),
        restarts: 0,
        gone: false,
        ending: None,
        version: None,
    };
    hub.write(scheduler(), Event::PodReports("n1".to_owned(), vec![report])).await.unwrap();
}

/// Does what a load balancer does, and gives the revision.
fn take(known: &mut BTreeMap<String, v1::EndpointState>, message: WatchResponse) -> u64 {
    let (revision, upserts, removals) = match message.response.unwrap() {
        Message::Snapshot(snapshot) => (snapshot.revision, snapshot.endpoints, vec![]),
        Message::Event(event) => (event.revision, event.upserts, event.removals),
        Message::Bookmark(bookmark) => (bookmark.revision, vec![], vec![]),
        Message::Compacted(_) => panic!("nothing was compacted"),
    };
    for endpoint in upserts {
        let state = endpoint.state();
        known.insert(endpoint.pod, state);
    }
    known.retain(|id, _| !removals.contains(id));
    revision
}
