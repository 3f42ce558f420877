//! The cluster through faults: the server, a node, or everything at once goes away and comes back; and what
//! users get wrong is told to them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hextet_tests::cluster::{Agent, Server};
use hextet_tests::moved_clock::days_ahead;
use hextet_tests::netns::{self, NetNs};
use hextet_tests::probe::{all_greet, greet, host_link};
use hextet_tests::process::{Daemon, describe, end_all_in, living_in};
use hextet_tests::progress::Progress;
use hextet_tests::scenario::{BUSYBOX, CURL, FAKETIME, NFT, Needs, check, scenario};
use hextet_tests::testbed::netctl_program;
use hextet_tests::wait::wait_for;
use hextet_tests::{Options, Pod, Testbed, jobs, machine, wait_until};

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX, NFT] };
const SOON: Duration = Duration::from_secs(20);
const NODES: [&str; 3] = ["n1", "n2", "n3"];
/// How soon a node has its pods again that starts with nothing but its disk.
const COLD: Duration = Duration::from_secs(5);
/// What an agent says of a new certificate.
const RENEWED: &str = "the node has a new certificate";

fn ids(pods: &[Pod]) -> BTreeSet<&str> {
    pods.iter().map(|pod| pod.id.as_str()).collect()
}

#[test]
fn a_killed_server_loses_nothing_that_it_acknowledged() {
    scenario("a_killed_server_loses_nothing_that_it_acknowledged", NEEDS, Options::default(), server_dies);
}

fn server_dies(testbed: &Testbed) -> Result<()> {
    let (server, client) = (testbed.server(), testbed.netns("client"));
    check("killed right after an apply: the job is there", || {
        testbed.apply(jobs::HELLO)?;
        server.kill9()?;
        server.start()?;
        let pods = testbed.wait_running("hello", 3, SOON)?;
        all_greet(&client, &pods, SOON)
    })?;
    let three = testbed.pods("hello")?;
    check("while it is dead: pods answer, netctl says so", || {
        server.kill9()?;
        three.iter().try_for_each(|pod| greet(&client, pod))?;
        let said = testbed.netctl(&["jobs"])?.failed_with(1)?;
        ensure!(said.contains("error: "), "netctl says: {said}");
        server.start()
    })?;
    check("a larger count adds, and keeps what was there", || {
        testbed.apply(&jobs::hello(5))?;
        let five = testbed.wait_running("hello", 5, SOON)?;
        ensure!(ids(&three).is_subset(&ids(&five)), "{three:?} are among {five:?}");
        all_greet(&client, &five, SOON)
    })?;
    let five = testbed.pods("hello")?;
    check("a smaller count, killed at once: it shrinks all the same", || {
        testbed.apply(&jobs::hello(2))?;
        server.kill9()?;
        server.start()?;
        let two = testbed.wait_running("hello", 2, SOON)?;
        ensure!(ids(&two).is_subset(&ids(&five)), "{two:?} are among {five:?}");
        let gone: Vec<&Pod> = five.iter().filter(|pod| !two.contains(pod)).collect();
        wait_until(SOON, "the namespaces of the others are gone", || {
            gone.iter().all(|pod| !netns::list().contains(&pod.id))
        })?;
        all_greet(&client, &two, SOON)
    })?;
    check("the same job again changes nothing", || {
        let said = testbed.apply(&jobs::hello(2))?;
        ensure!(said.contains("unchanged"), "netctl says: {said}");
        Ok(())
    })?;
    check("logs show what a task wrote", || logs(testbed))?;
    check("rm removes pods, interfaces, namespaces, routes", || rm(testbed))
}

fn logs(testbed: &Testbed) -> Result<()> {
    let job = "job: talk\ngroups:\n  a:\n    count: 1\n    tasks:\n      t:\n        \
               exec: [/bin/sh, -c, 'echo first; echo second >&2; exec sleep 1000']\n";
    testbed.apply(job)?;
    let pod = testbed.wait_running("talk", 1, SOON)?.remove(0);
    wait_for(SOON, "both lines are in the log", || {
        let log = testbed.netctl(&["logs", &pod.id]).map_err(|e| format!("{e:#}"))?;
        let both = log.stdout.contains("first") && log.stdout.contains("second");
        if both { Ok(()) } else { Err(log.to_string()) }
    })?;
    let tail = testbed.netctl(&["logs", &pod.id, "--tail", "1"])?.success()?;
    ensure!(tail.lines().count() == 1, "one line was asked for: {tail:?}");
    testbed.netctl(&["logs", "talk-a-nosuch"])?.failed_with(1)?;
    Ok(())
}

fn rm(testbed: &Testbed) -> Result<()> {
    let pods = testbed.pods("")?;
    testbed.netctl(&["rm", "hello"])?.success()?;
    testbed.netctl(&["rm", "talk"])?.success()?;
    wait_until(SOON, "there are no pods", || testbed.pods("").is_ok_and(|left| left.is_empty()))?;
    wait_until(SOON, "their namespaces are gone", || {
        pods.iter().all(|pod| !netns::list().contains(&pod.id))
    })?;
    for pod in &pods {
        ensure!(host_link(testbed, pod).is_err(), "the interface of {} is there", pod.id);
        let routes = testbed.run_in(&pod.node, &["ip", "-6", "route", "show"]).success()?;
        ensure!(!routes.contains(&pod.address().to_string()), "a route is left: {routes}");
    }
    testbed.netctl(&["rm", "hello"])?.failed_with(1)?;
    Ok(())
}

#[test]
fn a_lost_node_loses_its_ha_pods_to_others() {
    let options = Options { server_args: vec!["--lease".into(), "2s".into()], ..Options::default() };
    scenario("a_lost_node_loses_its_ha_pods_to_others", NEEDS, options, node_lost);
}

fn node_lost(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    testbed.apply(jobs::HELLO)?;
    testbed.apply(&jobs::hello_as("cat", 1, &["availability: pet", "constraints: {node: n3}"]))?;
    let before = testbed.wait_running("hello", 3, SOON)?;
    let pet = testbed.wait_running("cat", 1, SOON)?.remove(0);
    all_greet(&client, &before, SOON)?;
    all_greet(&client, std::slice::from_ref(&pet), SOON)?;
    let lost = before.iter().find(|pod| pod.node == "n3").context("a pod is on n3")?.clone();
    check("a new pod takes the place of the one that was lost", || {
        testbed.kill_node("n3", &[&lost, &pet])?;
        testbed.wait_node("n3", "lost", SOON)?;
        let (_, pods) = wait_for(SOON, "three pods run on n1 and n2", || {
            let pods = testbed.pods("hello").map_err(|e| format!("{e:#}"))?;
            let running: Vec<Pod> =
                pods.iter().filter(|p| p.phase == "running" && p.node != "n3").cloned().collect();
            if running.len() == 3 { Ok(running) } else { Err(format!("{pods:?}")) }
        })?;
        let kept = before.iter().filter(|pod| pod.node != "n3");
        ensure!(kept.clone().count() == 2, "two pods were on n1 and n2");
        ensure!(kept.into_iter().all(|pod| pods.contains(pod)), "{before:?} stay among {pods:?}");
        ensure!(pods.iter().all(|pod| pod.address != lost.address), "an address is never given twice");
        all_greet(&client, &pods, SOON)
    })?;
    check("the pet waits for its node", || {
        let pods = testbed.pods("cat")?;
        ensure!(pods.len() == 1 && pods[0].id == pet.id, "the pet is not replaced: {pods:?}");
        ensure!(pods[0].phase == "lost", "it is {}", pods[0].phase);
        Ok(())
    })?;
    check("the node comes back: the pet with its address, nothing of the pod that was replaced", || {
        let eth0 = ["ip", "link", "set", "eth0", "up"];
        testbed.run_in("n3", &eth0).success()?;
        // Its addresses and routes went with the interface; a machine's network configuration sets them again.
        Testbed::up(testbed.prefix().clone(), testbed.options().clone(), Progress::Quiet)?;
        testbed.wait_node("n3", "ready", SOON)?;
        let again = testbed.wait_running("cat", 1, SOON)?.remove(0);
        ensure!(again == pet, "{again:?} is {pet:?}");
        all_greet(&client, std::slice::from_ref(&again), SOON)?;
        testbed.wait_running("hello", 3, SOON)?;
        wait_until(SOON, "the namespace of the replaced pod is gone", || !netns::list().contains(&lost.id))?;
        Ok(())
    })
}

#[test]
fn a_node_boots_cold_without_a_server() {
    scenario("a_node_boots_cold_without_a_server", NEEDS, Options::default(), cold_boot);
}

fn cold_boot(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    testbed.apply(&jobs::hello(6))?;
    let pods = testbed.wait_running("hello", 6, SOON)?;
    all_greet(&client, &pods, SOON)?;
    let on_n2: Vec<Pod> = pods.iter().filter(|pod| pod.node == "n2").cloned().collect();
    ensure!(on_n2.len() == 2, "two pods are on n2: {pods:?}");
    testbed.server().kill9()?;
    check("everything of n2 is gone", || {
        wipe(testbed, "n2", &on_n2)?;
        on_n2.iter().try_for_each(|pod| {
            ensure!(greet(&client, pod).is_err(), "{} answers after its node was wiped", pod.id);
            Ok(())
        })
    })?;
    check("its agent alone brings back the same pods at the same addresses", || {
        testbed.agent("n2").start()?;
        all_greet(&client, &on_n2, SOON)?;
        let from_n1 = pods.iter().find(|pod| pod.node == "n1").context("a pod is on n1")?;
        all_greet(&testbed.netns(&from_n1.id), &on_n2, SOON)
    })?;
    check("the server comes back and agrees", || {
        testbed.server().start()?;
        testbed.wait_node("n2", "ready", SOON)?;
        let after = testbed.wait_running("hello", 6, SOON)?;
        ensure!(after == pods, "{after:?} were {pods:?}");
        all_greet(&client, &after, SOON)
    })
}

#[test]
fn a_month_without_a_server_ends_as_if_nothing_had_been() {
    let needs = Needs { programs: &[CURL, BUSYBOX, NFT, FAKETIME] };
    scenario("a_month_without_a_server_ends_as_if_nothing_had_been", needs, Options::default(), month);
}

/// n1 is left alone, n2 loses its power and starts 40 days later, n3's agent starts 400 days later: its certificate has
/// ended by then.
fn month(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    testbed.apply(&jobs::hello(6))?;
    let pods = testbed.wait_running("hello", 6, SOON)?;
    all_greet(&client, &pods, SOON)?;
    let on = |node: &str| pods.iter().filter(|pod| pod.node == node).cloned().collect::<Vec<Pod>>();
    testbed.server().kill9()?;
    let n2 = testbed.agent("n2").with_environment(&days_ahead(40)?);
    let n3 = testbed.agent("n3").with_environment(&days_ahead(400)?);
    check("a node that starts 40 days later has its pods within 5 s", || {
        wipe(testbed, "n2", &on("n2"))?;
        n2.start()?;
        all_greet(&client, &on("n2"), COLD)
    })?;
    check("pods are kept by an agent that starts 400 days later, and started again", || {
        n3.kill9()?;
        n3.start()?;
        all_greet(&client, &on("n3"), COLD)?;
        let place = NetNs::named(&on("n3")[0].id);
        end_all_in(&place.identity().into_iter().collect(), Duration::ZERO)?;
        all_greet(&client, &on("n3"), COLD)
    })?;
    let agents = || NODES.map(|node| testbed.agent(node).pid());
    let before = agents();
    let reconciles = |server: &Server| {
        returns(testbed, server, &pods)?;
        ensure!(agents() == before, "no agent was started anew: {:?} were {before:?}", agents());
        Ok(())
    };
    let renewals = |node: &str| testbed.agent(node).log().matches(RENEWED).count();
    check("the server returns, with the clock of before: all is as it was", || {
        reconciles(&testbed.server())?;
        ensure!(
            NODES.map(renewals) == [0, 0, 1],
            "who has renewed its certificate: {:?}",
            NODES.map(renewals)
        );
        testbed.server().kill9()
    })?;
    check("the server returns 400 days later, by whose clock no certificate is good: the same", || {
        reconciles(&testbed.server().with_environment(&days_ahead(400)?))?;
        ensure!(
            NODES.map(renewals) == [1, 1, 2],
            "who has renewed its certificate: {:?}",
            NODES.map(renewals)
        );
        testbed.server().kill9()
    })?;
    check("and with the clock of before again", || reconciles(&testbed.server()))
}

/// The server starts: every node attaches, the pods are these and no others, and answer.
fn returns(testbed: &Testbed, server: &Server, pods: &[Pod]) -> Result<()> {
    let agents = NODES.map(|node| testbed.agent(node));
    let since = agents.each_ref().map(|agent| agent.daemon().log_len());
    server.start()?;
    for (agent, since) in agents.iter().zip(since) {
        wait_until(SOON, "each node is attached", || {
            agent.daemon().log_since(since).contains("attached to the server")
        })?;
    }
    let after = testbed.wait_running("hello", pods.len(), SOON)?;
    ensure!(after == pods, "{after:?} were {pods:?}");
    all_greet(&testbed.netns("client"), &after, SOON)
}

/// What a power failure leaves of a node: its disk.
fn wipe(testbed: &Testbed, node: &str, pods: &[Pod]) -> Result<()> {
    testbed.agent(node).kill9()?;
    let place = testbed.netns(node);
    let spaces: Vec<NetNs> = pods.iter().map(|pod| NetNs::named(&pod.id)).collect();
    let all = spaces.iter().chain([&place]).filter_map(NetNs::identity).collect();
    end_all_in(&all, Duration::ZERO)?;
    for (pod, space) in pods.iter().zip(&spaces) {
        let link = host_link(testbed, pod)?;
        testbed.run_in(node, &["ip", "link", "del", &link]).success()?;
        space.remove()?;
    }
    for family in ["-4", "-6"] {
        testbed.in_ns(node, &["ip", family, "route", "flush", "proto", "118"])?;
    }
    let pins = machine_pins(testbed, node);
    std::fs::remove_dir_all(&pins).with_context(|| format!("cannot remove {}", pins.display()))?;
    std::fs::remove_dir_all(testbed.agent(node).dir().join("run")).context("cannot empty the run folder")?;
    let left = living_in(&[place.identity().context("the node's namespace is there")?].into());
    ensure!(left.is_empty(), "still there: {:?}", left.into_iter().map(describe).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn mistakes_are_told() {
    scenario("mistakes_are_told", NEEDS, Options { nodes: 2, ..Options::default() }, mistakes);
}

fn mistakes(testbed: &Testbed) -> Result<()> {
    check("YAML that is not a job: file, line, column, the nearest field", || bad_yaml(testbed))?;
    check("a job with a mistake leaves nothing behind", || {
        ensure!(testbed.pods("")?.is_empty(), "there are pods");
        let jobs = testbed.netctl(&["jobs", "-o", "json"])?.success()?;
        ensure!(jobs.trim() == "[]", "there are jobs: {jobs}");
        Ok(())
    })?;
    let before = kernel_state(testbed, "client")?;
    check("a token of another cluster", || {
        let token = damaged(&node_token(testbed, "n9")?, FINGERPRINT_AT);
        join_fails(testbed, "n9", &token, &["cluster"])
    })?;
    check("a token with a secret that the server does not know", || {
        let token = damaged(&node_token(testbed, "n9")?, SECRET_AT);
        join_fails(testbed, "n9", &token, &["token"])
    })?;
    check("a name that is taken", || {
        let token = node_token(testbed, "")?;
        join_fails(testbed, "n1", &token, &["n1", "taken"])
    })?;
    check("who was refused has nothing of ours in its kernel", || {
        let after = kernel_state(testbed, "client")?;
        ensure!(after == before, "it left something behind: {}", difference(&before, &after));
        Ok(())
    })
}

#[test]
fn a_token_is_used_once() {
    scenario("a_token_is_used_once", NEEDS, Options { nodes: 1, ..Options::default() }, token_used);
}

fn token_used(testbed: &Testbed) -> Result<()> {
    let token = node_token(testbed, "n9")?;
    check("another machine joins with it", || {
        let agent = Daemon::new("joiner", testbed.netns("client"), testbed.dir());
        agent.start(joiner(testbed, "used", "n9", &token)?)?;
        agent.wait_ready(SOON, 0, || agent.log().contains("node ready"))?;
        testbed.wait_node("n9", "ready", SOON)?;
        agent.kill9()
    })?;
    check("a second one does not", || join_fails(testbed, "n8", &token, &["token"]))
}

fn bad_yaml(testbed: &Testbed) -> Result<()> {
    let cases = [
        ("job: hello\ngruops:\n  web: {}\n", ":2:1", "groups"),
        ("job: hello\ngroups:\n  web:\n    count: many\n", ":4:12", "whole number"),
        ("job: [", ":2:1", "not YAML"),
        ("job: Hello_World\ngroups: {}\n", ":1:", "a-z"),
    ];
    for (yaml, place, word) in cases {
        let path = testbed.dir().join("wrong.yaml");
        std::fs::write(&path, yaml)?;
        let said = testbed.netctl(&["apply", "-f", &path.to_string_lossy()])?.failed_with(2)?;
        let at = format!("{}{place}", path.display());
        ensure!(said.contains(&at) && said.contains(word), "{at} and {word:?} are not in: {said}");
    }
    testbed.netctl(&["apply", "-f", "/nonexistent/job.yaml"])?.failed_with(2)?;
    Ok(())
}

fn node_token(testbed: &Testbed, name: &str) -> Result<String> {
    let mut args = vec!["token", "--for", "node"];
    args.extend(if name.is_empty() { vec![] } else { vec!["--name", name] });
    Ok(testbed.netctl(&args)?.success()?.trim().to_owned())
}

/// Where in a token the CA's fingerprint and the secret are: after `hx1-`, four characters for three bytes.
const FINGERPRINT_AT: usize = 4 + 20;
const SECRET_AT: usize = 4 + 56;

/// A token with another character.
fn damaged(token: &str, at: usize) -> String {
    let mut text: Vec<char> = token.chars().collect();
    text[at] = if text[at] == 'A' { 'B' } else { 'A' };
    text.into_iter().collect()
}

/// The client tries to become a node and is told why not, in a moment.
fn join_fails(testbed: &Testbed, name: &str, token: &str, words: &[&str]) -> Result<()> {
    let agent = Daemon::new("refused", testbed.netns("client"), testbed.dir());
    let since = agent.log_len();
    agent.start(joiner(testbed, "refused", name, token)?)?;
    wait_until(SOON, "the agent has given up", || agent.pid().is_none())?;
    let said = agent.log_since(since);
    ensure!(said.contains("error: "), "it says that it is an error: {said}");
    ensure!(words.iter().all(|word| said.contains(word)), "{words:?} are not in: {said}");
    Ok(())
}

/// An agent with a folder of its own.
fn joiner(testbed: &Testbed, folder: &str, name: &str, token: &str) -> Result<Command> {
    let dir = testbed.dir().join(folder);
    let mut command = Command::new(netctl_program()?);
    command.args(["node", "--name", name, "--join", token]);
    command.arg("--state-dir").arg(dir.join("state")).arg("--run-dir").arg(dir.join("run"));
    command.arg("--bpf-dir").arg(machine_pins(testbed, "client"));
    Ok(command)
}

fn machine_pins(testbed: &Testbed, place: &str) -> PathBuf {
    Path::new(machine::PINS).join(testbed.netns(place).name())
}

#[test]
fn node_down_leaves_the_machine_as_it_was() {
    let options = Options { nodes: 2, cluster: false, ..Options::default() };
    scenario("node_down_leaves_the_machine_as_it_was", NEEDS, options, node_down);
}

fn node_down(network: &Testbed) -> Result<()> {
    let before = kernel_state(network, "n2")?;
    let options = Options { cluster: true, ..network.options().clone() };
    let testbed = &Testbed::up(network.prefix().clone(), options, Progress::Quiet)?;
    let client = testbed.netns("client");
    testbed.apply(&jobs::hello_as("cat", 2, &["availability: pet", "constraints: {node: n2}"]))?;
    let pods = testbed.wait_running("cat", 2, SOON)?;
    all_greet(&client, &pods, SOON)?;
    ensure!(kernel_state(testbed, "n2")? != before, "a node with pods can be seen in its kernel");
    check("nothing is left of pods, interfaces, routes, rules, programs, settings", || {
        let said = testbed.netctl_on("n2", &["node", "down"])?.success()?;
        ensure!(said.contains("the server knows that the node is down"), "{said}");
        let nodes = testbed.netctl(&["nodes"])?.success()?;
        ensure!(nodes.lines().any(|line| line.starts_with("n2 ") && line.contains("lost")), "{nodes}");
        wait_until(SOON, "the agent has ended", || testbed.agent("n2").pid().is_none())?;
        ensure!(pods.iter().all(|pod| !netns::list().contains(&pod.id)), "a pod's namespace is left");
        let after = kernel_state(testbed, "n2")?;
        ensure!(after == before, "not as before: {}", difference(&before, &after));
        let left = living_in(&testbed.netns("n2").identity().into_iter().collect());
        ensure!(left.is_empty(), "still there: {:?}", left.into_iter().map(describe).collect::<Vec<_>>());
        Ok(())
    })?;
    check("twice does no harm", || testbed.netctl_on("n2", &["node", "down"])?.success().map(drop))?;
    check("the agent brings the same pods back", || {
        testbed.agent("n2").start_until_ready()?;
        let again = testbed.wait_running("cat", 2, SOON)?;
        ensure!(again == pods, "{again:?} were {pods:?}");
        all_greet(&client, &again, SOON)
    })
}

/// What a node has in its kernel, without counters and what the kernel learns by itself.
fn kernel_state(testbed: &Testbed, node: &str) -> Result<String> {
    let commands: [&[&str]; 8] = [
        &["ip", "-br", "link", "show"],
        &["ip", "-br", "addr", "show"],
        &["ip", "-4", "route", "show", "table", "all"],
        &["ip", "-6", "route", "show", "table", "all"],
        &["ip", "neigh", "show", "nud", "permanent"],
        &["ip", "-6", "neigh", "show", "proxy"],
        &["ip", "rule", "show"],
        &["nft", "-s", "list", "ruleset"],
    ];
    let mut all = String::new();
    for command in commands {
        let said = testbed.run_in(node, command).success()?;
        let mut lines: Vec<String> = said.lines().map(without_lifetime).collect();
        lines.sort_unstable();
        all += &format!("{}\n{}\n", command.join(" "), lines.join("\n"));
    }
    all += &testbed.netns(node).run(settings)?;
    let pins = machine_pins(testbed, node);
    Ok(all + if pins.exists() { "there are pins\n" } else { "" })
}

/// Lines that are in one of both only.
fn difference(before: &str, after: &str) -> String {
    let only = |here: &str, there: &str| {
        here.lines()
            .filter(|line| !there.lines().any(|other| other == *line))
            .collect::<Vec<_>>()
            .join("\n  ")
    };
    format!("gone:\n  {}\nnew:\n  {}", only(before, after), only(after, before))
}

/// Routes that a router advertised would have one; the rest of the line does not change.
fn without_lifetime(line: &str) -> String {
    line.split(" expires ").next().unwrap_or_default().trim_end().to_owned()
}

/// The settings of the namespace of the calling thread that have to do with forwarding.
fn settings() -> String {
    let names = ["forwarding", "force_forwarding", "accept_ra", "proxy_ndp", "rp_filter", "send_redirects"];
    let mut lines = Vec::new();
    for family in ["ipv4", "ipv6"] {
        for device in ["all", "default", "eth0", "lo"] {
            for name in names {
                let path = format!("/proc/sys/net/{family}/conf/{device}/{name}");
                let value = std::fs::read_to_string(&path).unwrap_or_else(|_| "none".to_owned());
                lines.push(format!("{path} {}\n", value.trim()));
            }
        }
    }
    lines.concat()
}

#[test]
fn an_agent_killed_while_it_makes_pods_goes_on() {
    let name = "an_agent_killed_while_it_makes_pods_goes_on";
    scenario(name, NEEDS, Options { nodes: 1, ..Options::default() }, killed_at_work);
}

/// The agent is killed at points that spread over the time in which it makes, then removes, its pods.
fn killed_at_work(testbed: &Testbed) -> Result<()> {
    const PODS: u32 = 12;
    let (agent, client) = (testbed.agent("n1"), testbed.netns("client"));
    for delay_ms in [20_u64, 60, 120, 250, 400] {
        check(&format!("killed {delay_ms} ms after an apply, and after an rm"), || {
            testbed.apply(&jobs::hello_as("work", PODS, &[]).replace("cpu: 50m", "cpu: 5m"))?;
            kill_and_start(&agent, delay_ms)?;
            let pods = testbed.wait_running("work", PODS as usize, SOON)?;
            all_greet(&client, &pods, SOON)?;
            wait_for(SOON, "nothing is planned", || {
                testbed.plans_nothing_on("n1").map_err(|e| format!("{e:#}"))
            })?;
            testbed.netctl(&["rm", "work"])?.success()?;
            kill_and_start(&agent, delay_ms)?;
            wait_for(SOON, "nothing of the pods is left", || nothing_left(testbed, &pods))?;
            Ok(())
        })?;
    }
    Ok(())
}

fn kill_and_start(agent: &Agent, delay_ms: u64) -> Result<()> {
    // The point in time is what is tested; no condition could be waited for.
    std::thread::sleep(Duration::from_millis(delay_ms));
    agent.kill9()?;
    // As a service manager does: a process that the agent was just making may hold its lock until its exec.
    wait_for(SOON, "the agent starts", || agent.start_until_ready().map_err(|e| format!("{e:#}")))?;
    Ok(())
}

/// No pod is listed, and no namespace, interface or process of one is on n1.
fn nothing_left(testbed: &Testbed, pods: &[Pod]) -> Result<(), String> {
    let listed = testbed.pods("").map_err(|e| format!("{e:#}"))?;
    let spaces: Vec<String> =
        netns::list().into_iter().filter(|name| name.starts_with("work-web-")).collect();
    let links: Vec<&str> =
        pods.iter().filter(|pod| host_link(testbed, pod).is_ok()).map(|pod| pod.id.as_str()).collect();
    let place = testbed.netns("n1").identity().into_iter().collect();
    let living: Vec<String> = living_in(&place).into_iter().map(describe).collect();
    let extra: Vec<&String> = living.iter().filter(|line| line.contains("supervise")).collect();
    if listed.is_empty() && spaces.is_empty() && links.is_empty() && extra.is_empty() {
        return Ok(());
    }
    Err(format!("pods {listed:?}, namespaces {spaces:?}, interfaces {links:?}, processes {extra:?}"))
}

#[test]
fn damaged_files_are_named() {
    scenario("damaged_files_are_named", NEEDS, Options { nodes: 1, ..Options::default() }, damaged_files);
}

/// Neither the server nor the agent goes on from a store that it cannot read, nor makes a new one over it.
fn damaged_files(testbed: &Testbed) -> Result<()> {
    testbed.apply(&jobs::hello(1))?;
    testbed.wait_running("hello", 1, SOON)?;
    let (server, agent) = (testbed.server(), testbed.agent("n1"));
    server.kill9()?;
    agent.kill9()?;
    check("the server says which file, and leaves it", || {
        let file = store(&testbed.dir().join("server"))?;
        refuses(&file, || server.start().err())
    })?;
    check("the agent says which file, and leaves it", || {
        let file = store(&agent.dir().join("state"))?;
        let since = agent.daemon().log_len();
        refuses(&file, || {
            let failed = agent.start_until_ready().err();
            failed.map(|e| e.context(agent.daemon().log_since(since)))
        })
    })
}

fn store(dir: &Path) -> Result<PathBuf> {
    let mut paths = std::fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    paths.find(|path| path.extension().is_some_and(|end| end == "redb")).context("there is a store")
}

/// Overwrites a store with noise and starts its owner.
fn refuses(file: &Path, start: impl FnOnce() -> Option<anyhow::Error>) -> Result<()> {
    let noise: Vec<u8> = (0..std::fs::metadata(file)?.len()).map(|i| (i * 7919 % 251) as u8).collect();
    std::fs::write(file, &noise)?;
    let said = format!("{:#}", start().context("it starts from noise")?);
    ensure!(said.contains(&*file.to_string_lossy()), "{} is not in: {said}", file.display());
    ensure!(!said.contains("panicked"), "it panics: {said}");
    ensure!(std::fs::read(file)? == noise, "the file was changed");
    Ok(())
}
