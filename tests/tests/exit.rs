//! The way to the IPv6 internet: pods with unique local addresses are seen there with their node's global one, and
//! nowhere else with another than their own.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hextet_tests::capture::{Capture, Packet};
use hextet_tests::command::Run;
use hextet_tests::netns::NetNs;
use hextet_tests::probe::{self, all_greet, greet, http_get, ping, udp_ask};
use hextet_tests::scenario::{BUSYBOX, CURL, NFT, Needs, PING, TCPDUMP, check, scenario};
use hextet_tests::topology::Place;
use hextet_tests::{Options, Pod, Testbed, jobs, wait_until};

const NEEDS: Needs = Needs { programs: &[CURL, PING, TCPDUMP, BUSYBOX, NFT] };
/// The wan host.
const WAN: &str = "2001:db8:ffff::2";

#[test]
fn pods_reach_the_ipv6_internet_with_the_nodes_address() {
    scenario("pods_reach_the_ipv6_internet_with_the_nodes_address", NEEDS, nodes(&[]), run);
}

#[test]
fn without_an_exit_pods_leave_as_they_are() {
    let options = nodes(&["--ipv6-exit", "none"]);
    scenario("without_an_exit_pods_leave_as_they_are", NEEDS, options, as_they_are);
}

#[test]
fn nftables_is_a_way_to_the_ipv6_internet_too() {
    let options = nodes(&["--ndp", "kernel", "--masquerade", "nftables"]);
    scenario("nftables_is_a_way_to_the_ipv6_internet_too", NEEDS, options, with_nftables);
}

fn nodes(args: &[&str]) -> Options {
    let node_args = args.iter().map(|arg| (*arg).to_owned()).collect();
    Options { nodes: 2, node_args, ..Options::default() }
}

fn run(testbed: &Testbed) -> Result<()> {
    let internet = Capture::start(&testbed.netns("router"), "eth1", "ip6")?;
    let lan = Capture::start(&testbed.netns("router"), "eth0", "ip6")?;
    let pods = two_pods(testbed)?;
    check("internet servers see the node: TCP, UDP, ping", || seen_as_the_node(testbed, &pods))?;
    check("flows and whois name the pod", || flows(testbed, &pods[0]))?;
    check("a router's errors reach the pod", || errors(testbed, &pods[0]))?;
    check("a large datagram fits through a small link", || small_link(testbed, &pods[0]))?;
    check("hosts on the link see the pod itself", || on_the_link(testbed, &pods))?;
    check("pods see each other's own address", || {
        greet(&testbed.netns(&pods[0].id), &pods[1])?;
        greet(&testbed.netns(&pods[1].id), &pods[0])
    })?;
    check("new flows work while the agent is dead", || {
        testbed.agent(&pods[0].node).kill9()?;
        seen_as_the_node(testbed, &pods[..1])?;
        testbed.agent(&pods[0].node).start_until_ready()
    })?;
    check("after the node's address changed, its new one is seen", || renumbered(testbed, &pods[0]))?;
    check("without a global address nothing leaves", || no_address(testbed, &pods[1]))?;
    check("no pod's address was seen at the router on its way out", || {
        none_leaked(internet)?;
        none_leaked(lan)
    })
}

/// Ports, mapping and filtering are connection tracking's here, and hairpin is missing; the rest is the same.
fn with_nftables(testbed: &Testbed) -> Result<()> {
    let internet = Capture::start(&testbed.netns("router"), "eth1", "ip6")?;
    let pods = two_pods(testbed)?;
    check("internet servers see the node: TCP, UDP, ping", || seen_as_the_node(testbed, &pods))?;
    check("a router's errors reach the pod", || errors(testbed, &pods[0]))?;
    check("a large datagram fits through a small link", || small_link(testbed, &pods[0]))?;
    check("hosts on the link see the pod itself", || on_the_link(testbed, &pods))?;
    check("nothing is planned when nothing has changed", || testbed.plans_nothing())?;
    check("after the node's address changed, its new one is seen", || renumbered(testbed, &pods[0]))?;
    check("no pod's address was seen on its way out", || none_leaked(internet))
}

fn two_pods(testbed: &Testbed) -> Result<Vec<Pod>> {
    testbed.apply(&jobs::hello(2))?;
    let mut pods = testbed.wait_running("hello", 2, Duration::from_secs(30))?;
    pods.sort_by(|a, b| a.node.cmp(&b.node));
    all_greet(&testbed.netns("client"), &pods, Duration::from_secs(20))?;
    Ok(pods)
}

fn wan() -> IpAddr {
    WAN.parse().expect("it is an address")
}

fn node_address(pod: &Pod) -> Result<Ipv6Addr> {
    let place = Place::parse(&pod.node).with_context(|| format!("{} is a node", pod.node))?;
    Ok(place.addresses().context("a node has addresses")?.v6)
}

fn seen_as_the_node(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    pods.iter().try_for_each(|pod| seen_as(testbed, pod, node_address(pod)?))
}

fn seen_as(testbed: &Testbed, pod: &Pod, address: Ipv6Addr) -> Result<()> {
    let place = testbed.netns(&pod.id);
    let wanted = format!("peer {address} ");
    let http = http_get(&place, &probe::url(wan(), 80))?;
    ensure!(http.starts_with(&wanted), "the HTTP server sees {http:?}, not {wanted:?}");
    let udp = udp_ask(&place, (wan(), 7).into())?;
    ensure!(udp.starts_with(&wanted), "the UDP server sees {udp:?}, not {wanted:?}");
    let pings = ping(&place, wan(), 3, Duration::from_millis(200))?;
    ensure!(pings.received == 3, "{} pings {WAN}: {pings:?}", pod.id);
    Ok(())
}

fn flows(testbed: &Testbed, pod: &Pod) -> Result<()> {
    let shown = testbed.netctl_on(&pod.node, &["flows", &pod.id])?.success()?;
    let outside = format!("[{}]:", node_address(pod)?);
    let line = shown.lines().find(|line| line.contains(&outside) && line.contains(" tcp "));
    let line = line.with_context(|| format!("no TCP flow from {outside} in:\n{shown}"))?;
    ensure!(line.contains(&format!("[{}]:", pod.address())) && line.contains(WAN), "{line}");
    let seen = line.split_whitespace().find(|word| word.starts_with(&outside)).context("an outside end")?;
    let holder = testbed.netctl_on(&pod.node, &["whois", seen])?.success()?;
    ensure!(holder.contains(&pod.id), "{seen} is of {holder}");
    Ok(())
}

/// A hop limit that ends at the router, and an address that the router has no way to.
fn errors(testbed: &Testbed, pod: &Pod) -> Result<()> {
    let place = testbed.netns(&pod.id);
    let output = ping_all_words(&place, &["-t", "2", WAN])?;
    ensure!(output.contains("Time exceeded: Hop limit"), "{output}");
    let output = ping_all_words(&place, &["2001:db8:eeee::1"])?;
    ensure!(output.contains("Destination unreachable"), "{output}");
    Ok(())
}

fn ping_all_words(place: &NetNs, args: &[&str]) -> Result<String> {
    let all: Vec<&str> =
        ["ping", "-n", "-c", "1", "-W", "5"].into_iter().chain(args.iter().copied()).collect();
    let output = Run::new(&all).inside(place).output()?;
    Ok(output.stdout + &output.stderr)
}

/// The router's error with the MTU comes back through the translation, and fragments go through it in both
/// directions.
fn small_link(testbed: &Testbed, pod: &Pod) -> Result<()> {
    for (place, link) in [("router", "eth1"), ("wan", "eth0")] {
        testbed.run_in(place, &["ip", "link", "set", link, "mtu", "1300"]).success()?;
    }
    let place = testbed.netns(&pod.id);
    let mut said = String::new();
    // The first one is too big; the error teaches the pod.
    wait_until(Duration::from_secs(20), "a datagram of 2000 bytes comes back", || {
        said = ping_all_words(&place, &["-s", "2000", WAN]).unwrap_or_else(|e| e.to_string());
        said.contains(" 0% packet loss")
    })
    .context(said)?;
    let route = Run::new(&["ip", "-6", "route", "get", WAN]).inside(&place).success()?;
    ensure!(route.contains("mtu 1300"), "the pod has learnt no MTU: {route}");
    for (place, link) in [("router", "eth1"), ("wan", "eth0")] {
        testbed.run_in(place, &["ip", "link", "set", link, "mtu", "1500"]).success()?;
    }
    Ok(())
}

fn on_the_link(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    let client = Place::Client.addresses().context("the client has addresses")?.v6;
    let capture = Capture::start(&testbed.netns("client"), "eth0", "icmp6")?;
    for pod in pods {
        let pings = ping(&testbed.netns(&pod.id), client.into(), 2, Duration::from_millis(200))?;
        ensure!(pings.received == 2, "{} pings the client: {pings:?}", pod.id);
        let seen = |packet: &Packet| packet.ipv6() == Some((pod.address(), client));
        capture.wait_packets(Duration::from_secs(10), 2, seen)?;
    }
    Ok(())
}

fn renumbered(testbed: &Testbed, pod: &Pod) -> Result<()> {
    let new: Ipv6Addr = "2001:db8:1::77".parse()?;
    let old = node_address(pod)?;
    let address = |verb: &str, ip: Ipv6Addr, rest: &[&str]| -> Result<()> {
        let network = format!("{ip}/64");
        let all: Vec<&str> =
            ["ip", "addr", verb, &network, "dev", "eth0"].into_iter().chain(rest.iter().copied()).collect();
        testbed.run_in(&pod.node, &all).success().map(drop)
    };
    address("add", new, &["nodad"])?;
    address("change", old, &["preferred_lft", "0"])?;
    let becomes = |ip: Ipv6Addr| {
        wait_until(Duration::from_secs(20), &format!("{ip} is seen"), || seen_as(testbed, pod, ip).is_ok())
    };
    becomes(new)?;
    address("change", old, &["preferred_lft", "forever"])?;
    address("del", new, &[])?;
    becomes(old).map(drop)
}

/// The node keeps an address for its peers, which may be unique local.
fn no_address(testbed: &Testbed, pod: &Pod) -> Result<()> {
    let old = format!("{}/64", node_address(pod)?);
    testbed.run_in(&pod.node, &["ip", "addr", "add", "fd99::12/64", "dev", "eth0", "nodad"]).success()?;
    testbed
        .run_in(&pod.node, &["ip", "addr", "change", &old, "dev", "eth0", "preferred_lft", "0"])
        .success()?;
    let place = testbed.netns(&pod.id);
    wait_until(Duration::from_secs(20), "the agent has seen it", || {
        let words = probe::ping_words(&place, wan());
        let counters = testbed.netctl_on(&pod.node, &["node", "counters"]).and_then(|run| run.success());
        words.is_ok_and(|words| words.contains("100% packet loss"))
            && counters.is_ok_and(|text| count(&text, "drop_no_address") > 0)
    })
    .map(drop)
}

fn count(counters: &str, name: &str) -> u64 {
    let line = counters.lines().find(|line| line.split_whitespace().nth(1) == Some(name));
    line.and_then(|line| line.split_whitespace().nth(2)?.parse().ok()).unwrap_or(0)
}

/// Nothing is translated with `none`: what a router of the user's makes of it is the user's affair.
fn as_they_are(testbed: &Testbed) -> Result<()> {
    let internet = Capture::start(&testbed.netns("router"), "eth0", "icmp6")?;
    let pods = two_pods(testbed)?;
    check("a ping to the internet leaves with the pod's own address", || {
        probe::ping_words(&testbed.netns(&pods[0].id), wan())?;
        let wan: Ipv6Addr = WAN.parse()?;
        let own = |packet: &Packet| packet.ipv6() == Some((pods[0].address(), wan));
        internet.wait_packets(Duration::from_secs(10), 1, own).map(drop)
    })?;
    check("hosts on the link see the pod itself", || on_the_link(testbed, &pods))
}

/// That there is traffic at all shows that the capture would have seen the leak.
fn none_leaked(capture: Capture) -> Result<()> {
    let wan: Ipv6Addr = WAN.parse()?;
    let packets = capture.finish()?;
    let to_wan: Vec<_> = packets.iter().filter_map(Packet::ipv6).filter(|(_, to)| *to == wan).collect();
    ensure!(!to_wan.is_empty(), "nothing was seen on its way to {WAN}");
    let leaks: Vec<_> = to_wan.into_iter().filter(|(from, _)| from.is_unique_local()).take(3).collect();
    ensure!(leaks.is_empty(), "pods' own addresses on the way out: {leaks:?}");
    Ok(())
}
