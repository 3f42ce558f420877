//! A node's store is overwritten: its pods go on, its agent and `netctl node down` say what is damaged, the node is taken
//! down all the same, and comes back.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use hextet_tests::{
    Options, Pod, Testbed, jobs, netns,
    probe::all_greet,
    scenario::{BUSYBOX, CURL, Needs, check, scenario},
    wait_until,
};

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX] };
const SOON: Duration = Duration::from_secs(20);
const NODE: &str = "n2";
const PAGE: usize = 4096;

#[test]
fn a_node_with_a_damaged_store_is_taken_down_and_comes_back() {
    let options = Options { nodes: 2, ..Options::default() };
    scenario("a_node_with_a_damaged_store_is_taken_down_and_comes_back", NEEDS, options, damaged);
}

fn damaged(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    let pets = ["availability: pet", "constraints: {node: n2}"];
    let single = ["availability: singleton", "constraints: {node: n2}"];
    testbed.apply(&jobs::hello_as("cat", 2, &pets))?;
    testbed.apply(&jobs::hello_as("one", 1, &single))?;
    let mut pods = testbed.wait_running("cat", 2, SOON)?;
    pods.extend(testbed.wait_running("one", 1, SOON)?);
    all_greet(&client, &pods, SOON)?;

    spoil(testbed, "cat-")?;
    check("its pods are lost to the store: the agent says so, and pods go on", || {
        let said = start_in_vain(testbed)?;
        ensure!(
            said.contains("pods: the page at byte") && said.contains("keeps the node's identity"),
            "{said}"
        );
        let shown = testbed.netctl_on(NODE, &["node", "show"])?.failed_with(1)?;
        ensure!(shown.contains("is damaged (pods: the page at byte"), "{shown}");
        let pets: Vec<Pod> = pods.iter().filter(|pod| pod.id.starts_with("cat-")).cloned().collect();
        all_greet(&client, &pets, SOON)
    })?;
    check("it is taken down, the server knows, and the identity stays", || {
        let said = testbed.netctl_on(NODE, &["node", "down"])?.success()?;
        for words in [
            "the server knows that the node is down",
            "is damaged: pods: the page at byte",
            "The identity of node n2 could be read",
        ] {
            ensure!(said.contains(words), "{words}: {said}");
        }
        is_down(testbed, &pods)
    })?;
    check("the same pods are back at their addresses", || {
        testbed.agent(NODE).start_until_ready()?;
        let mut again = testbed.wait_running("cat", 2, SOON)?;
        again.extend(testbed.wait_running("one", 1, SOON)?);
        ensure!(again == pods, "{again:?} were {pods:?}");
        all_greet(&client, &again, SOON)?;
        testbed.plans_nothing_on(NODE)
    })?;

    spoil(testbed, "key_pkcs8_der")?;
    check("its identity is lost to the store: it is taken down, and nothing is invented", || {
        let said = start_in_vain(testbed)?;
        ensure!(said.contains("which node this is cannot be read"), "{said}");
        let said = testbed.netctl_on(NODE, &["node", "down"])?.success()?;
        ensure!(said.contains("the server was not told") && said.contains("netctl node dead NAME"), "{said}");
        is_down(testbed, &pods)?;
        let state = testbed.agent(NODE).dir().join("state");
        ensure!(!state.join("node.redb").exists() && state.join("node.redb.damaged").exists(), "{said}");
        Ok(())
    })?;
    check("the machine joins again as it was told, and the pods have places", || {
        testbed.wait_node(NODE, "lost", SOON)?;
        // It may still run a singleton, as far as the server knows, for a quarter of a lease.
        wait_until(SOON, "the node can be removed", || {
            testbed.netctl(&["rm", "node/n2"]).is_ok_and(|output| output.ok())
        })?;
        fs::remove_file(testbed.agent(NODE).dir().join("joined"))?;
        testbed.agent(NODE).start_until_ready()?;
        let mut again = testbed.wait_running("cat", 2, SOON)?;
        again.extend(testbed.wait_running("one", 1, SOON)?);
        all_greet(&client, &again, SOON)
    })
}

/// Turns a bit of every page of the node's store that holds the text, while its agent is dead.
fn spoil(testbed: &Testbed, text: &str) -> Result<()> {
    let agent = testbed.agent(NODE);
    agent.kill9()?;
    wait_until(SOON, "the kernel is through with the agent", || agent.pid().is_none())?;
    let path = agent.dir().join("state/node.redb");
    let mut bytes = fs::read(&path)?;
    let mut spoiled = 0;
    for page in bytes.chunks_mut(PAGE).skip(1) {
        let found = page.windows(text.len()).position(|window| window == text.as_bytes());
        found.into_iter().for_each(|at| page[at] ^= 1);
        spoiled += usize::from(found.is_some());
    }
    ensure!(spoiled > 0, "no page of {} pages holds {text}", bytes.len() / PAGE);
    Ok(fs::write(&path, bytes)?)
}

/// What an agent says that ends because of its store.
fn start_in_vain(testbed: &Testbed) -> Result<String> {
    let agent = testbed.agent(NODE);
    let before = agent.daemon().log_len();
    agent.start()?;
    wait_until(SOON, "the agent ends", || agent.pid().is_none())?;
    let said = agent.daemon().log_since(before);
    ensure!(said.contains("the node's store") && said.contains("node.redb is damaged"), "{said}");
    ensure!(said.contains("run `netctl node down`") && !said.contains("panicked"), "{said}");
    Ok(said)
}

/// Nothing of the node is left in the kernel.
fn is_down(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    ensure!(pods.iter().all(|pod| !netns::list().contains(&pod.id)), "a pod's namespace is left");
    let routes = testbed.run_in(NODE, &["ip", "-6", "route", "show", "proto", "118"]).success()?;
    ensure!(routes.trim().is_empty(), "routes are left: {routes}");
    let links = testbed.run_in(NODE, &["ip", "-br", "link", "show"]).success()?;
    ensure!(!links.lines().any(|line| line.starts_with("hx")), "links are left: {links}");
    let pins = std::path::Path::new(hextet_tests::machine::PINS).join(testbed.netns(NODE).name());
    ensure!(!pins.exists(), "pins are left in {}", pins.display());
    Ok(())
}
