//! Every way that a packet can go, with each of the backends: from the LAN, between pods, to nowhere, to
//! IPv4; and that what is in the kernel is what `ip` and `netctl node plan` say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hextet_tests::capture::{Capture, Packet};
use hextet_tests::probe::{self, all_greet, greet, host_link, http_get, ping, udp_ask};
use hextet_tests::scenario::{BUSYBOX, CURL, NFT, Needs, PING, TCPDUMP, check, scenario};
use hextet_tests::topology::Place;
use hextet_tests::wait::{scaled, wait_for};
use hextet_tests::{Options, Pod, Testbed, jobs, wait_until, walk};

const NEEDS: Needs = Needs { programs: &[CURL, PING, TCPDUMP, BUSYBOX, NFT] };
/// The wan host's IPv4 address.
const WAN: &str = "198.51.100.2";
/// The range that every node gives to its pods.
const POD_IPV4: &str = "10.254.0.0/20";
/// At once: no neighbour discovery has to fail first, which takes 3 s.
const AT_ONCE: Duration = Duration::from_millis(1500);

#[test]
fn path_with_the_best_backends() {
    scenario("path_with_the_best_backends", NEEDS, Options::default(), run);
}

#[test]
fn path_with_the_kernels_backends() {
    scenario("path_with_the_kernels_backends", NEEDS, kernel_backends(3), run);
}

fn run(testbed: &Testbed) -> Result<()> {
    let leaks = Leaks::watch(testbed)?;
    testbed.apply(jobs::HELLO)?;
    let mut pods = check("three pods run", || testbed.wait_running("hello", 3, Duration::from_secs(20)))?;
    pods.sort_by(|a, b| a.node.cmp(&b.node));
    check("one pod on each node", || {
        let nodes: Vec<&str> = pods.iter().map(|pod| pod.node.as_str()).collect();
        ensure!(nodes == ["n1", "n2", "n3"], "the pods are on {nodes:?}");
        Ok(())
    })?;
    let client = testbed.netns("client");
    check("each pod answers a LAN host", || all_greet(&client, &pods, Duration::from_secs(10)))?;
    check("each pod answers each pod, itself too", || each_to_each(testbed, &pods))?;
    check("a ping between pods is the same at every hop", || same_between_pods(testbed, &pods))?;
    check("a ping from the LAN is the same at every hop", || same_from_the_lan(testbed, &pods))?;
    check("an address without a pod is unreachable at once", || nowhere(testbed, &pods))?;
    check("IPv4 servers see the node: TCP, UDP, ping", || to_ipv4(testbed, &pods))?;
    check("the routes are there by the name of the protocol", || routes(testbed, &pods))?;
    check("nothing is planned when nothing has changed", || testbed.plans_nothing())?;
    check("nor after the agents are started anew", || {
        restart_agents(testbed)?;
        testbed.plans_nothing()?;
        all_greet(&client, &pods, Duration::from_secs(5))
    })?;
    check("no pod's IPv4 was seen beyond the nodes", || leaks.none_seen())
}

fn each_to_each(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    pods.iter().try_for_each(|from| {
        let place = testbed.netns(&from.id);
        pods.iter().try_for_each(|to| greet(&place, to).with_context(|| format!("from {}", from.id)))
    })
}

fn same_between_pods(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    let hops = walk::between_pods(testbed, &pods[0], &pods[2])?;
    walk::same_everywhere(&walk::pings(testbed, &hops, pods[2].address(), 3)?, 2)
}

fn same_from_the_lan(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    let hops = walk::from_the_lan(testbed, &pods[1])?;
    walk::same_everywhere(&walk::pings(testbed, &hops, pods[1].address(), 3)?, 1)
}

/// From a pod: in its own node's /64, in a peer's, and in the /48 where no node is.
fn nowhere(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    let place = testbed.netns(&pods[0].id);
    let own = with_host(pods[0].address(), 0xdead);
    let peers = with_host(pods[2].address(), 0xdead);
    for absent in [own, peers, free_subnet(pods)] {
        let start = Instant::now();
        let words = probe::ping_words(&place, absent.into())?;
        let took = start.elapsed();
        ensure!(words.contains("Destination unreachable"), "{absent}: {words}");
        ensure!(took < scaled(AT_ONCE), "{absent}: the answer took {took:?}");
    }
    Ok(())
}

/// Another address of the same /64.
fn with_host(address: Ipv6Addr, host: u16) -> Ipv6Addr {
    let s = address.segments();
    Ipv6Addr::new(s[0], s[1], s[2], s[3], host, host, host, host)
}

/// An address of the /48 in a /64 that none of these pods is in.
fn free_subnet(pods: &[Pod]) -> Ipv6Addr {
    let s = pods[0].address().segments();
    let taken: Vec<u16> = pods.iter().map(|pod| pod.address().segments()[3]).collect();
    let free = (1..).find(|subnet| !taken.contains(subnet)).expect("three of 65536 are taken");
    Ipv6Addr::new(s[0], s[1], s[2], free, 0, 0, 0, 1)
}

fn to_ipv4(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    let wan: IpAddr = WAN.parse()?;
    for pod in pods {
        let place = testbed.netns(&pod.id);
        let wanted = format!("peer {} ", node_ipv4(pod)?);
        let http = http_get(&place, &probe::url(wan, 80))?;
        ensure!(http.starts_with(&wanted), "the HTTP server sees {http:?}, not {wanted:?}");
        let udp = udp_ask(&place, (wan, 7).into())?;
        ensure!(udp.starts_with(&wanted), "the UDP server sees {udp:?}, not {wanted:?}");
        let pings = ping(&place, wan, 3, Duration::from_millis(200))?;
        ensure!(pings.received == 3, "{} pings {WAN}: {pings:?}", pod.id);
    }
    Ok(())
}

fn node_ipv4(pod: &Pod) -> Result<String> {
    let place = Place::parse(&pod.node).with_context(|| format!("{} is a node", pod.node))?;
    Ok(place.addresses().context("a node has addresses")?.v4.to_string())
}

fn routes(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    let shown = testbed.run_in("n1", &["ip", "-6", "route", "show", "proto", "hextet"]).success()?;
    let cluster = testbed.cluster_prefix()?;
    let mut wanted = vec![
        format!("{} dev {}", pods[0].address(), host_link(testbed, &pods[0])?),
        format!("unreachable {} ", testbed.node_prefix("n1")?),
        format!("unreachable {cluster} "),
    ];
    for (node, via) in [("n2", "2001:db8:1::12"), ("n3", "2001:db8:1::13")] {
        wanted.push(format!("{} via {via} dev eth0", testbed.node_prefix(node)?));
    }
    for line in wanted {
        ensure!(shown.contains(&line), "{line:?} is not in:\n{shown}");
    }
    Ok(())
}

fn restart_agents(testbed: &Testbed) -> Result<()> {
    for node in testbed.nodes() {
        let agent = testbed.agent(&node);
        agent.kill9()?;
        agent.start_until_ready()?;
    }
    let nodes = testbed.nodes();
    nodes.iter().try_for_each(|node| testbed.wait_node(node, "ready", Duration::from_secs(10)))
}

/// Captures on both sides of the router, which translates nothing: a pod's IPv4 there is a leak.
struct Leaks {
    captures: Vec<Capture>,
}

impl Leaks {
    fn watch(testbed: &Testbed) -> Result<Self> {
        let start = |link| Capture::start(&testbed.netns("router"), link, "ip");
        Ok(Self { captures: vec![start("eth0")?, start("eth1")?] })
    }

    fn none_seen(self) -> Result<()> {
        let wan: Ipv4Addr = WAN.parse()?;
        for capture in self.captures {
            // That there is traffic at all shows that the capture would have seen the leak.
            wait_until(Duration::from_secs(5), "the router has seen packets for the wan host", || {
                capture.packets().is_ok_and(|seen| seen.iter().any(|p| p.ipv4().is_some_and(|a| a.1 == wan)))
            })?;
            let packets = capture.finish()?;
            let private = |a: Ipv4Addr| a.octets()[..2] == [10, 254] && a.octets()[2] < 16;
            let leaks = packets.iter().filter_map(Packet::ipv4).filter(|(s, d)| private(*s) || private(*d));
            let leaks: Vec<_> = leaks.take(3).collect();
            ensure!(leaks.is_empty(), "addresses of {POD_IPV4} on the router: {leaks:?}");
        }
        Ok(())
    }
}

#[test]
fn flushed_state_comes_back() {
    scenario("flushed_state_comes_back", NEEDS, kernel_backends(2), flushes);
}

fn kernel_backends(nodes: u8) -> Options {
    let node_args = ["--ndp", "kernel", "--masquerade", "nftables"].map(str::to_owned).to_vec();
    Options { nodes, node_args, ..Options::default() }
}

/// What others do to a machine: a firewall reload, a network restart.
fn flushes(testbed: &Testbed) -> Result<()> {
    testbed.apply(&jobs::hello(2))?;
    let pods = testbed.wait_running("hello", 2, Duration::from_secs(20))?;
    let client = testbed.netns("client");
    all_greet(&client, &pods, Duration::from_secs(10))?;
    let node = pods[0].node.clone();
    let link = host_link(testbed, &pods[0])?;
    let breaks: [(&str, Vec<&str>); 5] = [
        ("routes", vec!["ip", "-6", "route", "flush", "proto", "hextet"]),
        ("nftables", vec!["nft", "flush", "ruleset"]),
        ("neighbours", vec!["ip", "neigh", "flush", "dev", &link, "nud", "permanent"]),
        ("proxied neighbours", vec!["ip", "-6", "neigh", "flush", "proxy"]),
        ("the pod's interface is down", vec!["ip", "link", "set", &link, "down"]),
    ];
    for (what, command) in &breaks {
        check(&format!("{what}: repaired after `{}`", command.join(" ")), || {
            let before = state(testbed, &node, &link)?;
            testbed.run_in(&node, command).success()?;
            wait_for(Duration::from_secs(10), "the node's state is as before", || {
                let now = state(testbed, &node, &link).map_err(|e| format!("{e:#}"))?;
                if now == before { Ok(()) } else { Err(format!("before:\n{before}\nnow:\n{now}")) }
            })?;
            all_greet(&client, &pods, Duration::from_secs(5))?;
            http_get(&testbed.netns(&pods[0].id), &probe::url(WAN.parse()?, 80)).map(drop)
        })?;
    }
    Ok(())
}

/// Routes, neighbours and rules of ours, without counters and ages.
fn state(testbed: &Testbed, node: &str, link: &str) -> Result<String> {
    let commands: [&[&str]; 6] = [
        &["ip", "-6", "route", "show", "proto", "hextet"],
        &["ip", "-4", "route", "show", "proto", "hextet"],
        &["ip", "neigh", "show", "nud", "permanent"],
        &["ip", "-6", "neigh", "show", "proxy"],
        &["ip", "-br", "addr", "show", "dev", link],
        &["nft", "-s", "list", "ruleset"],
    ];
    let mut all = String::new();
    for command in commands {
        let said = testbed.run_in(node, command).success()?;
        let mut lines: Vec<&str> = said.lines().map(str::trim_end).collect();
        lines.sort_unstable();
        all += &(lines.join("\n") + "\n");
    }
    Ok(all)
}
