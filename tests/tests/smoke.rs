//! The shortest way through everything, for machines on which each second costs ten: a cluster, one job, a
//! packet from the LAN, one across nodes, one to IPv4.

use std::time::Duration;

use anyhow::{Result, ensure};
use hextet_tests::probe::{all_greet, greet, http_get};
use hextet_tests::scenario::{BUSYBOX, CURL, Needs, check, scenario};
use hextet_tests::{Options, Testbed, jobs};

#[test]
fn pods_answer() {
    scenario("pods_answer", Needs { programs: &[CURL, BUSYBOX] }, Options::default(), run);
}

fn run(testbed: &Testbed) -> Result<()> {
    testbed.apply(jobs::HELLO)?;
    let pods = check("three pods run", || testbed.wait_running("hello", 3, Duration::from_secs(20)))?;
    check("each answers a LAN host", || all_greet(&testbed.netns("client"), &pods, Duration::from_secs(10)))?;
    check("one answers another on another node", || {
        ensure!(pods[0].node != pods[2].node, "the pods are on different nodes: {pods:?}");
        greet(&testbed.netns(&pods[0].id), &pods[2])
    })?;
    check("an IPv4 server sees the node's address", || {
        let answer = http_get(&testbed.netns(&pods[0].id), "http://198.51.100.2/")?;
        let number: u8 = pods[0].node.trim_start_matches('n').parse()?;
        ensure!(answer.starts_with(&format!("peer 192.0.2.{} ", 10 + number)), "it sees {answer:?}");
        Ok(())
    })
}
