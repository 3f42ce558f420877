//! The cluster through faults: the server, a node, or everything at once goes away and comes back; and what
//! users get wrong is told to them.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hextet_tests::netns::{self, NetNs};
use hextet_tests::probe::{all_greet, greet, host_link};
use hextet_tests::process::{describe, end_all_in, living_in};
use hextet_tests::scenario::{BUSYBOX, CURL, Needs, check, scenario};
use hextet_tests::wait::wait_for;
use hextet_tests::{Options, Pod, Testbed, jobs, machine, wait_until};

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX] };
const SOON: Duration = Duration::from_secs(20);

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
        cut_off(testbed, "n3", &[&lost, &pet])?;
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
        Testbed::up(
            testbed.prefix().clone(),
            testbed_options(testbed),
            hextet_tests::progress::Progress::Quiet,
        )?;
        testbed.wait_node("n3", "ready", SOON)?;
        let again = testbed.wait_running("cat", 1, SOON)?.remove(0);
        ensure!(again == pet, "{again:?} is {pet:?}");
        all_greet(&client, std::slice::from_ref(&again), SOON)?;
        testbed.wait_running("hello", 3, SOON)?;
        wait_until(SOON, "the namespace of the replaced pod is gone", || !netns::list().contains(&lost.id))?;
        Ok(())
    })
}

fn testbed_options(testbed: &Testbed) -> Options {
    testbed.options().clone()
}

/// A node whose cable is pulled and whose programs die.
fn cut_off(testbed: &Testbed, node: &str, pods: &[&Pod]) -> Result<()> {
    testbed.run_in(node, &["ip", "link", "set", "eth0", "down"]).success()?;
    testbed.agent(node).kill9()?;
    let places = pods.iter().map(|pod| NetNs::named(&pod.id)).chain([testbed.netns(node)]);
    end_all_in(&places.filter_map(|place| place.identity()).collect(), Duration::ZERO)
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
        testbed.in_ns(node, &["ip", family, "route", "flush", "proto", "hextet"])?;
    }
    let pins = std::path::Path::new(machine::PINS).join(place.name());
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
    check("a token is used once", || {
        let token = node_token(testbed, "n9")?;
        join_fails(testbed, "n2", "n9", &damaged(&token), &["token"])?;
        let mut agent = testbed.agent("n1").daemon().log();
        agent.retain(|c| !c.is_control());
        ensure!(agent.contains("ready"), "n1's agent runs: {agent}");
        Ok(())
    })?;
    check("a name that is taken", || {
        let token = node_token(testbed, "")?;
        join_fails(testbed, "n2", "n1", &token, &["n1", "taken"])
    })
}

fn bad_yaml(testbed: &Testbed) -> Result<()> {
    let cases = [
        ("job: hello\ngruops:\n  web: {}\n", ":2:1", "groups"),
        ("job: hello\ngroups:\n  web:\n    count: many\n", ":4:12", "count"),
        ("job: [", ":1:", ""),
        ("job: Hello_World\ngroups: {}\n", ":1:6", ""),
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

/// A token with another secret.
fn damaged(token: &str) -> String {
    let mut text: Vec<char> = token.chars().collect();
    let at = text.len() / 2;
    text[at] = if text[at] == 'A' { 'B' } else { 'A' };
    text.into_iter().collect()
}

/// A second agent on `node` tries to join as `name` and is told why not, in a moment.
fn join_fails(testbed: &Testbed, node: &str, name: &str, token: &str, words: &[&str]) -> Result<()> {
    let dir = testbed.dir().join("joiner");
    let folder = |what: &str| dir.join(what).to_string_lossy().into_owned();
    let (state, run) = (folder("state"), folder("run"));
    let pins = format!("{}/{}", machine::PINS, testbed.netns(node).name()) + "/joiner";
    let output = testbed.netctl_on(
        node,
        &[
            "node",
            "--name",
            name,
            "--join",
            token,
            "--state-dir",
            &state,
            "--run-dir",
            &run,
            "--bpf-dir",
            &pins,
        ],
    )?;
    let said = output.failed_with(1)?;
    ensure!(words.iter().all(|word| said.contains(word)), "{words:?} are not in: {said}");
    Ok(())
}
