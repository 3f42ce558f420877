//! Nodes whose pods have addresses of their LAN: what they get when they join, and what comes of a conflict.

mod support;

use std::{net::Ipv6Addr, path::Path};

use hextet_api::{
    connect::{Key, Wish},
    v1::{self, node_report::Report},
};
use ipnetwork::Ipv6Network;
use scheduler::{
    founding::{self, Founding},
    server::StoreChoice,
};
use support::{FakeNode, TestServer, Watch, config, subscribe, try_enroll_with};
use tonic::{Code, Status};

const LAN: &str = "2001:db8:1::/64";
const MAC: [u8; 6] = [2, 0, 0, 0, 1, 0];

/// A server whose cluster began with a pod prefix.
async fn server(dir: &Path) -> TestServer {
    let founding = Founding { pod_prefix: Some(LAN.parse().unwrap()), ..Founding::default() };
    founding::init(&config(dir).state_dir, &StoreChoice::Local, founding).await.unwrap();
    TestServer::start(dir).await
}

fn wish(number: u16) -> Wish {
    Wish {
        name: format!("n{number}"),
        subnet_id: number,
        group_id: number.into(),
        uplink_prefixes: prefixes(&["fd00::/64", LAN]),
        ..Wish::default()
    }
}

fn prefixes(texts: &[&str]) -> Vec<Ipv6Network> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// The /64 that a node gets.
async fn joined(server: &TestServer, wish: Wish) -> Result<Ipv6Network, Status> {
    let token = server.token(v1::TokenRole::Node, "", "").await;
    let enrolled = try_enroll_with(&token, &Key::generate().unwrap(), wish).await?;
    Ok(Ipv6Network::try_from(&enrolled.response.node_prefix.unwrap()).unwrap())
}

#[tokio::test]
async fn a_node_on_the_lan_shares_its_prefix_and_any_other_has_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let lan: Ipv6Network = LAN.parse().unwrap();
    assert_eq!(joined(&server, wish(1)).await.unwrap(), lan);
    assert_eq!(joined(&server, wish(2)).await.unwrap(), lan, "shared");

    let elsewhere = Wish { uplink_prefixes: prefixes(&["2001:db8:2::/64"]), ..wish(3) };
    let own = joined(&server, elsewhere).await.unwrap();
    assert_eq!(own.network().segments()[3], 3, "{own}");
    let unasked = joined(&server, Wish { uplink_prefixes: vec![], ..wish(4) }).await.unwrap();
    assert_eq!(unasked.network().segments()[3], 4, "{unasked}");

    let other = "fd00:aa:bb:cc::/64".parse().unwrap();
    assert_eq!(joined(&server, Wish { pod_prefix: Some(other), ..wish(5) }).await.unwrap(), other);
    server.stop().await;
}

#[tokio::test]
async fn what_is_no_prefix_of_a_lan_is_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let own = joined(&server, Wish { uplink_prefixes: vec![], ..wish(1) }).await.unwrap().to_string();
    let wrong = [
        ("2001:db8::/48", "pod_prefix: 2001:db8::/48 must be a /64"),
        ("ff02::/64", "neither global unicast (2000::/3) nor unique local"),
        ("fe80::/64", "neither global unicast (2000::/3) nor unique local"),
        (own.as_str(), "is inside of the cluster's own"),
    ];
    for (prefix, why) in wrong {
        let wish = Wish { pod_prefix: Some(prefix.parse().unwrap()), ..wish(2) };
        let refused = joined(&server, wish).await.unwrap_err();
        assert!(refused.message().contains(why), "{prefix}: {refused}");
        let code = if prefix == own { Code::FailedPrecondition } else { Code::InvalidArgument };
        assert_eq!(refused.code(), code, "{prefix}");
    }
    let many = Wish { uplink_prefixes: prefixes(&[LAN; 65]), ..wish(2) };
    assert_eq!(joined(&server, many).await.unwrap_err().message(), "an uplink has at most 64 prefixes");
    server.stop().await;
}

#[tokio::test]
async fn a_pod_whose_address_is_taken_moves_and_readers_follow() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let token = server.token(v1::TokenRole::Node, "", "").await;
    let enrolled = try_enroll_with(&token, &Key::generate().unwrap(), wish(1)).await.unwrap();
    let node = FakeNode::attach(enrolled.credentials).await;
    server.apply("hello", 1, "one").await;
    let pod = server.running(1).await.remove(0);
    let mut watch = Watch::start(server.watcher().await, subscribe("hello")).await;
    assert_eq!(watch.snapshot().await.endpoints[0].address, pod.address);

    let conflict =
        v1::AddressConflict { pod: pod.id.clone(), address: pod.address.clone(), mac: MAC.to_vec() };
    node.say(Report::Conflict(conflict)).await;
    let moved = watch.event().await.upserts.remove(0);
    assert_eq!(moved.pod, pod.id);
    assert_eq!(moved.state(), v1::EndpointState::Starting);
    assert_ne!(moved.address, pod.address);
    let ready = watch.event().await.upserts.remove(0);
    assert_eq!((ready.state(), &ready.address), (v1::EndpointState::Ready, &moved.address));
    let told = node.told.lock().unwrap().pods[&pod.id].address.clone();
    assert_eq!(told, moved.address);
    let lan: Ipv6Network = LAN.parse().unwrap();
    assert!(lan.contains(Ipv6Addr::from(<[u8; 16]>::try_from(told).unwrap())));
    server.stop().await;
}

#[tokio::test]
async fn a_conflict_that_makes_no_sense_ends_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let node = FakeNode::join(&server, "n1", 1).await;
    node.say(Report::Conflict(v1::AddressConflict { address: vec![0; 16], ..Default::default() })).await;
    let ended = node.when("an end", |told| told.ended.clone()).await;
    assert_eq!((ended.code(), ended.message()), (Code::InvalidArgument, "conflict.mac: it has 6 bytes"));
    server.stop().await;
}
