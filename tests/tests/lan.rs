//! LAN mode: pods have addresses of the LAN, and nothing is configured on its other hosts and its router. Every
//! way to and from them, both kinds of node in one cluster, a successor under traffic, and addresses that others
//! have.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hextet_tests::capture::Capture;
use hextet_tests::frame::{self, Frame};
use hextet_tests::probe::{self, all_greet, greet, http_get, ping, udp_ask};
use hextet_tests::progress::write_now;
use hextet_tests::scenario::{BUSYBOX, CURL, Needs, PING, RADVD, TCPDUMP, check, scenario};
use hextet_tests::topology::{LAN_ULA, lan_prefix};
use hextet_tests::wait::{scaled, wait_for};
use hextet_tests::{Options, Pod, Testbed, jobs, walk};

const NEEDS: Needs = Needs { programs: &[CURL, PING, TCPDUMP, BUSYBOX, RADVD] };
const SOON: Duration = Duration::from_secs(20);
/// The wan host.
const WAN: &str = "2001:db8:ffff::2";
const WAN_V4: &str = "198.51.100.2";
/// Probes for an address.
const PROBES: &str = "icmp6 and ip6[40] == 135 and src host ::";
/// Advertisements to all nodes that override what they knew.
const OVERRIDES: &str = "icmp6 and ip6[40] == 136 and ip6[44] & 0x20 != 0 and dst host ff02::1";

fn lan(nodes: u8) -> Options {
    Options { nodes, lan: true, ..Options::default() }
}

#[test]
fn pods_have_addresses_of_the_lan() {
    scenario("pods_have_addresses_of_the_lan", NEEDS, lan(3), everywhere);
}

#[test]
fn pods_have_addresses_of_the_lan_with_the_kernels_backends() {
    let node_args = ["--ndp", "kernel", "--masquerade", "nftables"].map(str::to_owned).to_vec();
    let options = Options { node_args, ..lan(3) };
    scenario("pods_have_addresses_of_the_lan_with_the_kernels_backends", NEEDS, options, everywhere);
}

fn everywhere(testbed: &Testbed) -> Result<()> {
    testbed.apply(&jobs::hello(4))?;
    let mut pods = check("four pods run", || testbed.wait_running("hello", 4, SOON))?;
    pods.sort_by(|a, b| a.node.cmp(&b.node));
    check("their addresses are the LAN's", || in_the_lan(&pods))?;
    for place in ["client", "router"] {
        let host = testbed.netns(place);
        check(&format!("each answers {place}, on which nothing is configured"), || {
            all_greet(&host, &pods, SOON)?;
            unconfigured(testbed, place)
        })?;
    }
    check("each answers each, on its own node too", || {
        let each = |from: &Pod| pods.iter().try_for_each(|to| greet(&testbed.netns(&from.id), to));
        pods.iter().try_for_each(|from| each(from).with_context(|| format!("from {}", from.id)))
    })?;
    check("each reaches a LAN host that made its own address", || to_the_lan(testbed, &pods))?;
    check("the IPv6 internet sees their own addresses, and reaches them", || {
        to_the_internet(testbed, &pods)
    })?;
    check("an IPv4 server sees their node", || to_ipv4(testbed, &pods))?;
    check("a ping between nodes is the same at every hop", || {
        let (from, to) = (&pods[0], pods.last().context("there are pods")?);
        ensure!(from.node != to.node, "both are on {}", to.node);
        let hops = walk::between_pods(testbed, from, to)?;
        walk::same_everywhere(&walk::pings(testbed, &hops, to.address(), 3)?, 2)
    })?;
    check("a ping from the LAN is the same at every hop", || {
        let hops = walk::from_the_lan(testbed, &pods[1])?;
        walk::same_everywhere(&walk::pings(testbed, &hops, pods[1].address(), 3)?, 1)
    })?;
    check("there is no route but to a node's own pods", || routes(testbed, &pods))?;
    check("an address that no pod has is the LAN's, and nobody's", || nobody(testbed, &pods))?;
    check("nothing is planned when nothing has changed", || testbed.plans_nothing())
}

fn in_the_lan(pods: &[Pod]) -> Result<()> {
    let lan = lan_prefix();
    let prefix = lan.strip_suffix("/64").context("it is a /64")?.parse::<Ipv6Addr>()?.segments();
    for pod in pods {
        ensure!(pod.address().segments()[..4] == prefix[..4], "{} has {}", pod.id, pod.address());
    }
    Ok(())
}

/// No route of ours and no permanent neighbour: what a host has that came up by itself.
fn unconfigured(testbed: &Testbed, place: &str) -> Result<()> {
    let routes = testbed.run_in(place, &["ip", "-6", "route", "show", "dev", "eth0"]).success()?;
    let expected = |line: &str| {
        [lan_prefix().as_str(), LAN_ULA, "fe80::/64", "default via fe80:"]
            .iter()
            .any(|known| line.starts_with(known))
    };
    let other: Vec<&str> = routes.lines().filter(|line| !expected(line)).collect();
    ensure!(other.is_empty(), "{place} has {other:?}");
    let fixed = testbed.run_in(place, &["ip", "-6", "neigh", "show", "nud", "permanent"]).success()?;
    ensure!(!fixed.contains("2001:"), "{place} has {fixed:?}");
    Ok(())
}

fn to_the_lan(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    let client = testbed.slaac_address("client")?;
    for pod in pods {
        let pings = ping(&testbed.netns(&pod.id), client.into(), 3, Duration::from_millis(200))?;
        ensure!(pings.received == 3, "{} pings {client}: {pings:?}", pod.id);
    }
    Ok(())
}

fn to_the_internet(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    let wan: IpAddr = WAN.parse()?;
    for pod in pods {
        let place = testbed.netns(&pod.id);
        let wanted = format!("peer {} ", pod.address());
        let http = http_get(&place, &probe::url(wan, 80))?;
        ensure!(http.starts_with(&wanted), "the HTTP server sees {http:?}, not {wanted:?}");
        let udp = udp_ask(&place, (wan, 7).into())?;
        ensure!(udp.starts_with(&wanted), "the UDP server sees {udp:?}, not {wanted:?}");
    }
    all_greet(&testbed.netns("wan"), pods, SOON)
}

fn to_ipv4(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    for pod in pods {
        let number: u8 = pod.node.trim_start_matches('n').parse()?;
        let http = http_get(&testbed.netns(&pod.id), &probe::url(WAN_V4.parse()?, 80))?;
        ensure!(http.starts_with(&format!("peer 192.0.2.{} ", 10 + number)), "{}: {http:?}", pod.id);
    }
    Ok(())
}

fn routes(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    for node in testbed.nodes() {
        let own = pods.iter().filter(|pod| pod.node == node);
        let mut wanted: Vec<String> = own.map(|pod| pod.address().to_string()).collect();
        wanted.push("unreachable".to_owned());
        let shown = testbed.run_in(&node, &["ip", "-6", "route", "show", "proto", "hextet"]).success()?;
        let mut first: Vec<String> =
            shown.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect();
        first.sort();
        wanted.sort();
        ensure!(first == wanted, "{node} has {shown}");
    }
    Ok(())
}

/// An address beside a pod's, in its group: the proxy stays silent, and neighbour discovery ends as on any LAN.
fn nobody(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    let mut octets = pods[0].address().octets();
    octets[8..13].copy_from_slice(&[0xde, 0xad, 0xde, 0xad, 0xde]);
    let absent = Ipv6Addr::from(octets);
    for place in ["client", pods.last().context("there are pods")?.id.as_str()] {
        let words = probe::ping_words(&testbed.netns(place), absent.into())?;
        ensure!(words.contains(" 0 received"), "from {place}: {words}");
    }
    Ok(())
}

#[test]
fn a_cluster_has_both_kinds_of_node() {
    let pod_prefixes = [(3, "own".to_owned()), (4, LAN_ULA.to_owned())].into();
    let options = Options { pod_prefixes, ..lan(4) };
    scenario("a_cluster_has_both_kinds_of_node", NEEDS, options, both_kinds);
}

fn both_kinds(testbed: &Testbed) -> Result<()> {
    let own = testbed.node_prefix("n3")?;
    check("two share the LAN's prefix, one has its own, one has the LAN's other prefix", || {
        let lan = ["n1", "n2", "n4"].map(|node| testbed.node_prefix(node).unwrap_or_default());
        ensure!(lan == [lan_prefix(), lan_prefix(), LAN_ULA.to_owned()], "they have {lan:?}");
        ensure!(!lan.contains(&own), "it has {own}");
        Ok(())
    })?;
    testbed.apply(&jobs::hello(4))?;
    let pods = check("four pods run", || testbed.wait_running("hello", 4, SOON))?;
    check("each answers each", || {
        let place = |pod: &Pod| testbed.netns(&pod.id);
        pods.iter().try_for_each(|from| all_greet(&place(from), &pods, SOON))
    })?;
    check("the way between the two kinds is the same at every hop", || {
        let on = |node: &str| pods.iter().find(|pod| pod.node == node).context("one is on each node");
        let (from, to) = (on("n3")?, on("n1")?);
        let hops = walk::between_pods(testbed, from, to)?;
        walk::same_everywhere(&walk::pings(testbed, &hops, to.address(), 3)?, 2)
    })?;
    check("the LAN's nodes have a route to the other, which has none to them", || {
        let shown = |node| testbed.run_in(node, &["ip", "-6", "route", "show", "proto", "hextet"]).success();
        for node in ["n1", "n2", "n4"] {
            let routes = shown(node)?;
            ensure!(routes.contains(&format!("{own} via 2001:db8:1::13 dev eth0")), "{node}: {routes}");
            ensure!(routes.matches(" via ").count() == 1, "{node}: {routes}");
        }
        let routes = shown("n3")?;
        ensure!(!routes.contains(" via ") && routes.contains(&format!("unreachable {own}")), "n3: {routes}");
        let listed = testbed.netctl(&["routes"])?.success()?;
        ensure!(listed.matches("2001:db8:1::1").count() == 1, "netctl routes: {listed}");
        Ok(())
    })?;
    check("a LAN host reaches the LAN's pods, and with the /48 on its link all", || {
        let client = testbed.netns("client");
        let (routed, lan): (Vec<Pod>, Vec<Pod>) = pods.iter().cloned().partition(|pod| pod.node == "n3");
        all_greet(&client, &lan, SOON)?;
        let (address, _) = own.split_once('/').context("it has a length")?;
        let s = address.parse::<Ipv6Addr>()?.segments();
        let cluster = format!("{}/48", Ipv6Addr::new(s[0], s[1], s[2], 0, 0, 0, 0, 0));
        testbed.run_in("client", &["ip", "-6", "route", "add", &cluster, "dev", "eth0"]).success()?;
        all_greet(&client, &routed, SOON)
    })
}

#[test]
fn a_lan_host_follows_a_pod_to_another_node() {
    scenario("a_lan_host_follows_a_pod_to_another_node", NEEDS, lan(3), follows);
}

/// The one pod of a job, while a LAN host asks it all the time.
fn follows(testbed: &Testbed) -> Result<()> {
    testbed.apply(&jobs::hello_as("walker", 1, &["availability: ha"]))?;
    let first = testbed.wait_running("walker", 1, SOON)?.remove(0);
    let client = testbed.netns("client");
    all_greet(&client, std::slice::from_ref(&first), SOON)?;
    let over = AtomicBool::new(false);
    let (second, published, answered) = std::thread::scope(|scope| -> Result<_> {
        let traffic = scope.spawn(|| keep_asking(testbed, &first, &over));
        let moved = successor(testbed, &first);
        over.store(true, Ordering::SeqCst);
        let asked = traffic.join().expect("it does not panic")?;
        ensure!(asked > 0, "the first pod never answered under way");
        moved
    })?;
    let took = answered.saturating_sub(published);
    write_now(&format!(
        "  a LAN host reached the successor {} ms after it was published\n",
        took.as_millis()
    ));
    check("the LAN host reaches the successor, which is another pod on another node", || {
        ensure!(second.node != first.node && second.address != first.address, "{first:?} {second:?}");
        // A second is the goal on an idle machine; this is for a busy one.
        ensure!(took < scaled(Duration::from_secs(5)), "it took {took:?}");
        greet(&client, &second)
    })
}

/// Takes the pod's node down: what comes in its place, when it was first seen to have an address, and when it
/// first answered the LAN host.
fn successor(testbed: &Testbed, first: &Pod) -> Result<(Pod, Duration, Duration)> {
    let start = Instant::now();
    std::thread::scope(|scope| {
        // It takes a while to end the pods, and those who watch know of the successor before.
        let down = scope.spawn(|| testbed.netctl_on(&first.node, &["node", "down"])?.success());
        let (_, second) = wait_for(SOON, "a successor is published", || {
            let pods = testbed.pods("walker").map_err(|e| format!("{e:#}"))?;
            let second = pods.into_iter().find(|pod| pod.id != first.id && pod.address.is_some());
            second.ok_or_else(|| "there is none".to_owned())
        })?;
        let published = start.elapsed();
        let to = (second.address(), probe::HELLO_PORT).into();
        testbed.netns("client").run(|| {
            wait_for(SOON, "the successor answers", || {
                probe::request(to, scaled(Duration::from_millis(250))).map_err(|e| e.to_string())
            })
        })??;
        let answered = start.elapsed();
        down.join().expect("it does not panic")?;
        Ok((second, published, answered))
    })
}

/// Asks a pod from the LAN, one request after the other; how many were answered.
fn keep_asking(testbed: &Testbed, pod: &Pod, over: &AtomicBool) -> Result<u32> {
    let to = (pod.address(), probe::HELLO_PORT).into();
    testbed.netns("client").run(|| {
        let mut answered = 0;
        while !over.load(Ordering::SeqCst) {
            answered += u32::from(probe::request(to, Duration::from_millis(100)).is_ok());
        }
        answered
    })
}

#[test]
fn an_address_that_another_host_has_is_given_up() {
    let options = Options { server_args: vec!["--lease".into(), "60s".into()], ..lan(2) };
    scenario("an_address_that_another_host_has_is_given_up", NEEDS, options, conflicts);
}

fn conflicts(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    let mac = frame::mac_of(&client, "eth0")?;
    let certain = Capture::start(&testbed.netns("n1"), "eth0", OVERRIDES)?;
    testbed.apply(&jobs::hello_as("first", 1, &["constraints: {node: n1}"]))?;
    let pod = testbed.wait_running("first", 1, SOON)?.remove(0);
    // Two that probe for one address at the same time both lose it.
    certain.wait_packets(SOON, 1, |_| true)?;
    all_greet(&client, std::slice::from_ref(&pod), SOON)?;

    check("a host that asks first is told that the address is taken", || {
        let address = format!("{}/64", pod.address());
        testbed.run_in("client", &["sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=1"]).success()?;
        testbed.run_in("client", &["ip", "-6", "addr", "add", &address, "dev", "eth0"]).success()?;
        wait_for(SOON, "the host's own probe fails", || {
            let shown = testbed.run_in("client", &["ip", "-6", "addr", "show", "dadfailed"]).success();
            let shown = shown.map_err(|e| format!("{e:#}"))?;
            if shown.contains(&pod.address().to_string()) { Ok(()) } else { Err(shown) }
        })?;
        testbed.run_in("client", &["ip", "-6", "addr", "del", &address, "dev", "eth0"]).success()?;
        still_there(testbed, &pod)
    })?;

    check("a claim that nobody stands by changes nothing", || {
        let node = testbed.netns("n1");
        let asked = Capture::start(&node, "eth0", PROBES)?;
        let said = Capture::start(&node, "eth0", &format!("{OVERRIDES} and not ether src {}", text(&mac)))?;
        let claim = Frame::claim(mac, testbed.slaac_address("client")?, pod.address());
        frame::send(&client, "eth0", &[claim.bytes()])?;
        asked.wait_packets(SOON, 1, |_| true)?;
        // The probe has ended, and whoever believed the claim knows better.
        said.wait_packets(SOON, 1, |_| true)?;
        still_there(testbed, &pod)
    })?;

    let second = check("a host that takes it and stands by it has it: the pod moves", || {
        take_address(testbed, &pod)?;
        // Said again and again: a node listens to one claim in ten seconds.
        let claim = Frame::claim(mac, pod.address(), pod.address()).bytes();
        let second =
            moved(testbed, "first", &pod, || frame::send(&client, "eth0", std::slice::from_ref(&claim)))?;
        says_who(testbed, &pod, &second, &mac)?;
        Ok(second)
    })?;

    check("a pod whose address was taken before it came moves, too", || {
        testbed.agent("n2").kill9()?;
        testbed.apply(&jobs::hello_as("late", 1, &["constraints: {node: n2}"]))?;
        let late = testbed.pods("late")?.pop().context("it has a pod")?;
        take_address(testbed, &late)?;
        testbed.agent("n2").start_until_ready()?;
        let moved = moved(testbed, "late", &late, || Ok(()))?;
        says_who(testbed, &late, &moved, &mac)
    })?;

    check("the address is the host's alone", || {
        let words = probe::ping_words(&testbed.netns("router"), pod.address().into())?;
        ensure!(words.contains(" 1 received"), "{words}");
        let known = testbed.run_in("router", &["ip", "-6", "neigh", "show", &pod.address().to_string()]);
        let known = known.success()?;
        ensure!(known.contains(&text(&mac)), "the router knows {known}");
        still_there(testbed, &second)
    })
}

fn take_address(testbed: &Testbed, pod: &Pod) -> Result<()> {
    let address = format!("{}/64", pod.address());
    testbed.run_in("client", &["ip", "-6", "addr", "add", &address, "dev", "eth0", "nodad"]).success()?;
    Ok(())
}

fn still_there(testbed: &Testbed, pod: &Pod) -> Result<()> {
    let job = pod.id.split('-').next().unwrap_or_default();
    let now = testbed.wait_running(job, 1, SOON)?.remove(0);
    ensure!(now.address == pod.address, "{} moved to {:?}", pod.id, now.address);
    all_greet(&testbed.netns("n2"), std::slice::from_ref(&now), SOON)
}

/// The same pod, which runs at another address and answers there; `meanwhile` is done until then.
fn moved(testbed: &Testbed, job: &str, from: &Pod, meanwhile: impl Fn() -> Result<()>) -> Result<Pod> {
    let (took, pod) = wait_for(SOON, &format!("{} has moved and runs", from.id), || {
        meanwhile().map_err(|e| format!("{e:#}"))?;
        let pods = testbed.pods(job).map_err(|e| format!("{e:#}"))?;
        let moved = pods.iter().find(|pod| pod.address != from.address && pod.phase == "running");
        moved.cloned().ok_or_else(|| format!("{pods:?}"))
    })?;
    ensure!(pod.id == from.id, "{} was replaced by {}", from.id, pod.id);
    write_now(&format!("  {} has moved after {} ms\n", pod.id, took.as_millis()));
    all_greet(&testbed.netns("client"), std::slice::from_ref(&pod), SOON)?;
    Ok(pod)
}

/// The server's log names the pod, both addresses and the MAC address.
fn says_who(testbed: &Testbed, from: &Pod, to: &Pod, mac: &frame::Mac) -> Result<()> {
    let (old, new, mac) = (from.address(), to.address(), text(mac));
    let wanted = format!("pod {} moves to {new}: the host with MAC {mac} has {old} too", from.id);
    let log = testbed.server().daemon().log();
    if !log.contains(&wanted) {
        bail!("{wanted:?} is not in the server's log:\n{log}");
    }
    Ok(())
}

fn text(mac: &frame::Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[test]
fn a_prefix_that_does_not_fit_is_refused() {
    scenario("a_prefix_that_does_not_fit_is_refused", NEEDS, lan(1), misfits);
}

fn misfits(testbed: &Testbed) -> Result<()> {
    let token = testbed.netctl(&["token", "--for", "node", "--name", "other"])?.success()?;
    let dir = |name: &str| testbed.dir().join("other").join(name).to_string_lossy().into_owned();
    let pins = format!("/sys/fs/bpf/hextet/{}-n9", testbed.prefix());
    let (state, run) = (dir("state"), dir("run"));
    let join = |prefix: &str| -> Result<String> {
        let mut args = vec!["node", "--join", token.trim(), "--pod-prefix", prefix];
        args.extend(["--state-dir", &state, "--run-dir", &run, "--bpf-dir", &pins]);
        let output = testbed.netctl_on("n1", &args)?;
        ensure!(!output.ok(), "{prefix} was taken");
        Ok(output.stderr)
    };
    check("the uplink has no address in it", || {
        let said = join("2001:db8:9::/64")?;
        ensure!(said.contains("the uplink eth0 has no address in it"), "{said}");
        ensure!(said.contains(&format!("it has addresses in: 2001:db8:1::/64, {LAN_ULA}")), "{said}");
        Ok(())
    })?;
    check("it is inside of the cluster's", || {
        let cluster = cluster_prefix(testbed)?;
        let inside = cluster.replace("/48", "/64");
        let host = inside.replace("::/64", "::1/64");
        testbed.run_in("n1", &["ip", "-6", "addr", "add", &host, "dev", "eth0", "nodad"]).success()?;
        let said = join(&inside)?;
        ensure!(said.contains(&format!("is inside of the cluster's own {cluster}")), "{said}");
        Ok(())
    })?;
    check("a cluster that is there keeps what it began with", || {
        let state = testbed.dir().join("server").to_string_lossy().into_owned();
        testbed.server().kill9()?;
        let again = testbed.netctl(&["cluster", "init", "--state-dir", &state])?;
        ensure!(again.stderr.contains("there is a cluster in"), "{}", again.stderr);
        testbed.server().start()
    })
}

/// From the list of routes, which begins with it.
fn cluster_prefix(testbed: &Testbed) -> Result<String> {
    let listed = testbed.netctl(&["routes", "-o", "json"])?.success()?;
    let rows: serde_json::Value = serde_json::from_str(&listed)?;
    rows[0]["prefix"].as_str().map(str::to_owned).context("the first row is the cluster")
}
