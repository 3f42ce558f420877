//! The cluster's CA is replaced under three nodes, of which one is away for a while and one for too long. No packet is
//! lost through all of it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hextet_tests::meter::{Kind, Meter, Route, no_loss};
use hextet_tests::probe::all_greet;
use hextet_tests::scenario::{BUSYBOX, CURL, Needs, check, scenario};
use hextet_tests::wait::wait_for;
use hextet_tests::{Options, Testbed, jobs, wait_until};
use serde_json::Value;

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX] };
const SOON: Duration = Duration::from_secs(20);
/// An attached node moves at its own moment, within 20 s.
const MOVED: Duration = Duration::from_secs(45);

#[test]
fn the_ca_is_replaced_and_traffic_does_not_notice() {
    scenario("the_ca_is_replaced_and_traffic_does_not_notice", NEEDS, Options::default(), run);
}

fn run(testbed: &Testbed) -> Result<()> {
    testbed.apply(&jobs::hello_as("pets", 3, &["availability: pet"]))?;
    let mut pods = testbed.wait_running("pets", 3, SOON)?;
    pods.sort_by(|a, b| a.node.cmp(&b.node));
    let client = testbed.netns("client");
    all_greet(&client, &pods, SOON)?;
    let place = |number: usize| testbed.netns(&pods[number].id);
    let route = |name, from, to: usize| {
        let (from, to, address) = (place(from), place(to), pods[to].address().into());
        Route { name, from, to, address }
    };
    let routes = [route("n1 to n2", 0, 1), route("n1 to n3", 0, 2)];
    let meter = Meter::start(&routes, &[Kind::Udp, Kind::Tcp])?;
    no_loss(&meter.during(SOON, || replace(testbed))?)?;
    drop(meter);
    check("the pods are those that they were, and each answers", || {
        let mut after = testbed.wait_running("pets", 3, SOON)?;
        after.sort_by(|a, b| a.node.cmp(&b.node));
        ensure!(after == pods, "{after:?} were {pods:?}");
        all_greet(&client, &after, SOON)?;
        testbed.plans_nothing()
    })
}

fn replace(testbed: &Testbed) -> Result<()> {
    let (n2, n3) = (testbed.agent("n2"), testbed.agent("n3"));
    n2.kill9()?;
    n3.kill9()?;
    check("the node that is there moves by itself, those that are away are named", || {
        testbed.netctl(&["ca", "rotate", "-m", "a test"])?.success()?;
        testbed.netctl(&["ca", "rotate"])?.failed_with(1)?;
        missing_are(testbed, &["node/n2", "node/n3"])?;
        let said = testbed.netctl(&["ca", "retire"])?.failed_with(1)?;
        ensure!(said.contains("2 would be locked out") && said.contains("node/n2, node/n3"), "{said}");
        Ok(())
    })?;
    check("the server is killed, and goes on where it was", || {
        testbed.server().kill9()?;
        testbed.server().start()?;
        missing_are(testbed, &["node/n2", "node/n3"])
    })?;
    check("a node that was away comes back with the old CA, and moves", || {
        n2.start_until_ready()?;
        missing_are(testbed, &["node/n3"])
    })?;
    check("the old CA ends, and the node that was left out says what to do", || {
        testbed.netctl(&["ca", "retire", "--force", "-m", "n3 is away"])?.success()?;
        let before = n3.daemon().log_len();
        n3.start()?;
        wait_until(SOON, "n3 says so", || {
            n3.daemon().log_since(before).contains("its cluster has replaced its CA since")
        })?;
        n3.terminate()
    })?;
    check("with a new token it is the node that it was, and needs none the next time", || {
        let token = testbed.netctl(&["token", "--for", "node", "--name", "n3"])?.success()?;
        let returned = n3.with_args(&["--rejoin", token.trim()]);
        returned.start_until_ready()?;
        testbed.wait_node("n3", "ready", SOON)?;
        returned.kill9()?;
        testbed.agent("n3").start_until_ready()?;
        testbed.wait_node("n3", "ready", SOON)?;
        let said = testbed.netctl(&["ca", "status"])?.success()?;
        ensure!(said.contains("every certificate is of the one CA"), "{said}");
        Ok(())
    })
}

/// Waits until just these have no certificate of the new CA.
fn missing_are(testbed: &Testbed, expected: &[&str]) -> Result<()> {
    wait_for(MOVED, "those who are missing", || match missing(testbed) {
        Ok(found) if found == expected => Ok(()),
        other => Err(format!("{other:?}, not {expected:?}")),
    })?;
    Ok(())
}

fn missing(testbed: &Testbed) -> Result<Vec<String>> {
    let status = testbed.netctl(&["ca", "status", "-o", "json"])?.success()?;
    let status: Value = serde_json::from_str(&status)?;
    let missing = status["missing"].as_array().context("a list")?.iter();
    Ok(missing.map(|one| one["who"].as_str().unwrap_or_default().to_owned()).collect())
}
