//! Streams that end by what happens to their node.

use scheduler_core::{node::NodePhase, pod::PodPhase};

use super::*;
use crate::{
    hub::scheduler,
    writer::tests::{apply, hub, join},
};

/// A node was stopped for a little longer than its lease and went on. Its stream had lasted; the server took its pods
/// back as `starting`, and the node, which had said in this stream that they run, said nothing: load balancers
/// were never sent to them again.
#[tokio::test]
async fn a_stream_does_not_outlive_the_lease_in_which_it_spoke_of_its_pods() {
    let (hub, _store) = hub();
    join(&hub).await;
    apply(&hub, "a").await.unwrap();
    let mut place = Place::take(&hub, "n1");
    let silence = hub.leases().silence_max();
    time::sleep(silence).await;
    hub.write(scheduler(), Event::LeaseEnded(vec!["n1".to_owned()])).await.unwrap();
    assert_eq!(hub.state().pods().values().next().unwrap().phase, PodPhase::Lost);
    time::timeout(Duration::from_secs(5), &mut place.end).await.expect("the stream ends").unwrap_err();
    assert!(!hub.sessions.send("n1", Command::ReadLogs(v1::ReadLogs::default())));
}

/// One that is taken down ends its stream itself, which tells it that its leaving is durable.
#[tokio::test]
async fn a_stream_that_says_that_its_node_leaves_ends_in_its_own_way() {
    let (hub, _store) = hub();
    join(&hub).await;
    apply(&hub, "a").await.unwrap();
    let mut place = Place::take(&hub, "n1");
    let inbox = Inbox::default();
    tokio::select! {
        biased;
        _ = &mut place.end => panic!("somebody else ended it"),
        status = leave(&hub, "n1", &inbox, 1) => assert_eq!(status.code(), tonic::Code::Ok),
    }
    assert_eq!(hub.state().nodes()["n1"].phase, NodePhase::Lost);
}
