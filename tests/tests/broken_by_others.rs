//! Somebody else changes the kernel under a node: nothing is lost where the kernel can hold it, what is broken is
//! repaired, and the node tells what was broken and by whom.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hextet_tests::meter::{Kind, Meter, Route, allow_ping, no_loss, through_within};
use hextet_tests::netns::NetNs;
use hextet_tests::probe::{all_greet, host_link};
use hextet_tests::progress::write_now;
use hextet_tests::scenario::{BUSYBOX, CURL, NFT, Needs, check, scenario};
use hextet_tests::wait::{scaled, wait_for, wait_until};
use hextet_tests::{Options, Pod, Testbed, jobs};
use serde_json::Value;

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX, NFT] };
const SOON: Duration = Duration::from_secs(20);
/// Of a machine that runs four testbeds at once. What a quiet one needs is in docs/operating.md.
const REPAIRED: Duration = Duration::from_secs(3);
const WAN: [u8; 4] = [198, 51, 100, 2];

/// A testbed with traffic over the node n1: from its pod to another node's, to the internet, and from the LAN.
struct Bench<'a> {
    testbed: &'a Testbed,
    pods: Vec<Pod>,
    meter: Meter,
}

#[test]
fn what_the_kernel_can_hold_is_not_lost() {
    scenario("what_the_kernel_can_hold_is_not_lost", NEEDS, Options::default(), |testbed| {
        nothing_lost(&Bench::up(testbed)?)
    });
}

#[test]
fn what_others_break_is_repaired_and_told() {
    scenario("what_others_break_is_repaired_and_told", NEEDS, Options::default(), |testbed| {
        repaired(&mut Bench::up(testbed)?)
    });
}

#[test]
fn a_flushed_rule_set_is_put_back() {
    let node_args = vec!["--masquerade".into(), "nftables".into()];
    let options = Options { node_args, ..Options::default() };
    scenario("a_flushed_rule_set_is_put_back", NEEDS, options, |testbed| {
        // Until the rules are back the node's own kernel gets the pods' answers, and resets their connections.
        let bench = Bench::up_with(testbed, &[Kind::Udp, Kind::Ping])?;
        bench.mended("nft flush ruleset", "table ip hextet", By::Named("nft (process "), || {
            bench.run("n1", "nft flush ruleset")
        })
    });
}

#[test]
fn a_node_that_dies_leaves_nothing_that_senders_wait_for() {
    let options = Options { nodes: 2, ..Options::default() };
    scenario("a_node_that_dies_leaves_nothing_that_senders_wait_for", NEEDS, options, node_dies);
}

/// First only the agent of n2, which its traffic must not notice although its lease ends; then the machine.
fn node_dies(testbed: &Testbed) -> Result<()> {
    testbed.apply(&jobs::hello_as("pets", 2, &["availability: pet"]))?;
    let mut pods = testbed.wait_running("pets", 2, SOON)?;
    pods.sort_by(|a, b| a.node.cmp(&b.node));
    all_greet(&testbed.netns("client"), &pods, SOON)?;
    let (one, two, client) =
        (testbed.netns(&pods[0].id), testbed.netns(&pods[1].id), testbed.netns("client"));
    let there = Route { name: "pod to pod", from: one.clone(), to: two, address: pods[1].address().into() };
    let meter = Meter::start(&[there], &[Kind::Udp, Kind::Tcp, Kind::Ping])?;
    check("the lease of a node without an agent ends, and no packet is lost", || {
        no_loss(&meter.during(SOON, || {
            testbed.agent("n2").kill9()?;
            testbed.wait_node("n2", "lost", SOON)?;
            asked(testbed, 1)
        })?)
    })?;
    drop(meter);
    testbed.agent("n2").start_until_ready()?;
    testbed.wait_node("n2", "ready", SOON)?;
    all_greet(&one, &pods, SOON)?;
    check("the route to a dead node ends with its lease, and senders are told at once", || {
        // By itself it would trust for ten minutes what it heard.
        let trust = "/proc/sys/net/ipv6/neigh/eth0/base_reachable_time_ms";
        client.run(|| std::fs::write(trust, "1200000"))?.context(trust)?;
        all_greet(&client, &pods, SOON)?;
        // The machine loses its power, as far as others can tell.
        testbed.run_in("sw", &["ip", "link", "set", "n2", "down"]).success()?;
        testbed.wait_node("n2", "lost", SOON)?;
        let (took, ()) = wait_for(TOLD, "n1 has no route to it", || no_peers(testbed))?;
        write_now(&format!("       {took:.1?} after the end of the lease\n"));
        told(testbed, "n1", 0, "node n2 does not report and does not answer", By::Nobody)?;
        is_settled(testbed, "n1")?;
        unreachable(&one, &pods[1])
    })?;
    check("a LAN host that has just talked to its pod asks for it anew", || unreachable(&client, &pods[1]))?;
    check("it comes back without the server, and has its route again", || {
        testbed.server().kill9()?;
        testbed.run_in("sw", &["ip", "link", "set", "n2", "up"]).success()?;
        all_greet(&one, &pods, SOON)?;
        told(testbed, "n1", 0, "node n2 answers at ", By::Nobody)?;
        testbed.server().start()?;
        testbed.wait_node("n2", "ready", SOON)
    })?;
    check("dead again, it is removed and stays without routes", || {
        testbed.run_in("sw", &["ip", "link", "set", "n2", "down"]).success()?;
        testbed.wait_node("n2", "lost", SOON)?;
        wait_for(TOLD, "n1 has no route to it", || no_peers(testbed)).map(drop)
    })?;
    check("a node that is removed has no routes left", || {
        testbed.netctl(&["rm", "node/n2"])?.success()?;
        wait_for(SOON, "n1 has no route to it", || no_peers(testbed)).map(drop)
    })
}

/// Who connects to the pod is told that it is unreachable, by an error and not by silence: at once by a node, and after
/// 8 s and the next try by a kernel that has to find out.
fn unreachable(from: &NetNs, pod: &Pod) -> Result<()> {
    let (start, to) = (Instant::now(), SocketAddr::new(pod.address().into(), 8080));
    let tried = from.run(|| TcpStream::connect_timeout(&to, scaled(SOON)))?;
    let kind = tried.map(drop).map_err(|error| error.kind());
    ensure!(matches!(kind, Err(ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable)), "{kind:?}");
    write_now(&format!("       told after {:.1?}\n", start.elapsed()));
    Ok(())
}

/// Whether n1 has no routes to peers.
fn no_peers(testbed: &Testbed) -> Result<(), String> {
    let routes = testbed.in_ns("n1", &["ip", "-6", "route", "show", "proto", "118"]);
    let routes = routes.map_err(|error| error.to_string())?.stdout;
    if routes.contains(" via ") { Err(routes) } else { Ok(()) }
}

/// Without being asked, a kernel trusts for 15 to 45 s what it last heard from a neighbour, and then asks for 8 s.
const TOLD: Duration = Duration::from_secs(15);

/// Waits until n1's agent has asked a lost peer so many times whether it is there.
fn asked(testbed: &Testbed, times: usize) -> Result<()> {
    let asked = || testbed.agent("n1").log().matches("a peer is lost: asking whether it is there").count();
    wait_until(SOON, "n1 asks whether n2 is there", || asked() >= times).map(drop)
}

impl<'a> Bench<'a> {
    fn up(testbed: &'a Testbed) -> Result<Bench<'a>> {
        Bench::up_with(testbed, &[Kind::Udp, Kind::Tcp, Kind::Ping])
    }

    fn up_with(testbed: &'a Testbed, kinds: &[Kind]) -> Result<Bench<'a>> {
        testbed.apply(jobs::HELLO)?;
        let mut pods = testbed.wait_running("hello", 3, SOON)?;
        pods.sort_by(|a, b| a.node.cmp(&b.node));
        let client = testbed.netns("client");
        allow_ping(&client)?;
        all_greet(&client, &pods, SOON)?;
        let (one, three) = (testbed.netns(&pods[0].id), testbed.netns(&pods[2].id));
        let routes = [
            Route { name: "pod to pod", from: one.clone(), to: three, address: pods[2].address().into() },
            Route { name: "pod to IPv4", from: one.clone(), to: testbed.netns("wan"), address: WAN.into() },
            Route { name: "LAN to pod", from: client, to: one, address: pods[0].address().into() },
        ];
        let meter = Meter::start(&routes, kinds)?;
        Ok(Bench { testbed, pods, meter })
    }

    fn run(&self, place: &str, line: &str) -> Result<()> {
        let words: Vec<&str> = line.split(' ').collect();
        self.testbed.run_in(place, &words).success().map(drop)
    }

    fn write(&self, place: &str, key: &str, value: &str) -> Result<()> {
        let (path, value) = (format!("/proc/sys/{key}"), value.to_owned());
        self.testbed.netns(place).run(|| std::fs::write(&path, value))?.with_context(|| path)
    }

    /// The bench's traffic does not notice `work`.
    fn unnoticed(&self, what: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        check(what, || no_loss(&self.meter.during(SOON, work)?))
    }

    /// `work` breaks something on n1: it is mended, and what was broken is told, with who did it.
    fn mended(&self, what: &str, found: &str, by: By, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.mended_on("n1", what, found, by, REPAIRED, work)
    }

    fn mended_on(
        &self,
        node: &str,
        what: &str,
        found: &str,
        by: By,
        limit: Duration,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        check(what, || {
            let before = events(self.testbed, node)?.len();
            let start = Instant::now();
            let accounts = self.meter.during(limit * 10, work)?;
            through_within(&accounts, limit)?;
            told(self.testbed, node, before, found, by)?;
            write_now(&format!("       told after {:.0?} at the latest\n", start.elapsed()));
            is_settled(self.testbed, node)
        })
    }
}

/// Who is expected to be named.
#[derive(Clone, Copy)]
enum By {
    /// The kernel names the process.
    Named(&'static str),
    /// A process that may be gone before its name is asked for.
    Process,
    /// The kernel does not say.
    Nobody,
}

fn nothing_lost(bench: &Bench<'_>) -> Result<()> {
    let testbed = bench.testbed;
    bench.unnoticed("kill -9 of an agent, and its start", || {
        let agent = testbed.agent("n1");
        agent.kill9()?;
        agent.start_until_ready()
    })?;
    bench.unnoticed("an agent is ended and started", || {
        let agent = testbed.agent("n1");
        agent.terminate()?;
        agent.start_until_ready()
    })?;
    bench.unnoticed("the server is killed and started", || {
        testbed.server().kill9()?;
        wait_until(SOON, "the agent notices", || {
            let view = testbed.netctl_on("n1", &["node", "show", "-o", "json"]);
            view.is_ok_and(|view| view.stdout.contains("\"attached\": false"))
        })?;
        testbed.server().start()?;
        testbed.wait_node("n1", "ready", SOON)
    })?;
    bench.unnoticed("nft flush ruleset", || bench.run("n1", "nft flush ruleset"))?;
    check("a clsact qdisc of others is added and removed", || {
        // The kernel stops a device's queues for the moment of such a change, whoever's programs are on it.
        let accounts = bench.meter.during(SOON, || {
            bench.run("n1", "tc qdisc add dev eth0 clsact")?;
            bench.run("n1", "tc qdisc del dev eth0 clsact")
        })?;
        through_within(&accounts, REPAIRED)
    })?;
    bench.unnoticed("routes and rules of others are added and flushed", || {
        for family in ["-4", "-6"] {
            let network = if family == "-4" { "203.0.113.0/24" } else { "2001:db8:55::/64" };
            bench.run("n1", &format!("ip {family} route add {network} dev eth0 proto 99"))?;
            bench.run("n1", &format!("ip {family} rule add pref 99 lookup 99 protocol 99"))?;
            bench.run("n1", &format!("ip {family} route flush proto 99"))?;
            bench.run("n1", &format!("ip {family} rule flush protocol 99"))?;
        }
        Ok(())
    })?;
    bench.unnoticed("a node's address is replaced by another", || move_n3(bench))?;
    check("every pod still answers", || all_greet(&testbed.netns("client"), &bench.pods, SOON))
}

/// n3 gets another address, and loses the one under which its peers know it.
fn move_n3(bench: &Bench<'_>) -> Result<()> {
    bench.run("n3", "ip addr add 2001:db8:1::93/64 dev eth0 nodad")?;
    bench.run("n3", "ip addr del 2001:db8:1::13/64 dev eth0")?;
    wait_for(SOON, "n1 has a route by way of the new address", || {
        let routes = bench.testbed.in_ns("n1", &["ip", "-6", "route", "show", "proto", "118"]);
        let routes = routes.map_err(|error| error.to_string())?.stdout;
        if routes.contains("via 2001:db8:1::93 ") { Ok(()) } else { Err(routes) }
    })?;
    Ok(())
}

fn repaired(bench: &mut Bench<'_>) -> Result<()> {
    let testbed = bench.testbed;
    bench.mended("ip -6 route flush proto 118", "route fd", By::Process, || {
        bench.run("n1", "ip -6 route flush proto 118")
    })?;
    bench.mended("ip route flush proto 118", "route 10.254.", By::Process, || {
        bench.run("n1", "ip route flush proto 118")
    })?;
    bench.mended("writing 0 to all.forwarding", "orwarding was no longer 1", By::Nobody, || {
        bench.write("n1", "net/ipv6/conf/all/forwarding", "1")?;
        bench.write("n1", "net/ipv6/conf/all/forwarding", "0")
    })?;
    bench.mended("writing 0 to ip_forward", "orwarding was no longer 1", By::Nobody, || {
        bench.write("n1", "net/ipv4/ip_forward", "1")?;
        bench.write("n1", "net/ipv4/ip_forward", "0")
    })?;
    let link = host_link(testbed, &bench.pods[0])?;
    bench.mended("a pod's link goes down", "was changed", By::Nobody, || {
        bench.run("n1", &format!("ip link set {link} down"))
    })?;
    bench.mended("neighbours are flushed", "neigh ", By::Nobody, || {
        bench.run("n1", &format!("ip neigh flush nud permanent dev {link}"))?;
        bench.run("n1", &format!("ip -6 neigh flush nud permanent dev {link}"))
    })?;
    bench.mended("the uplink goes down and up", "route fd", By::Nobody, || {
        bench.run("n1", "ip link set eth0 down")?;
        bench.run("n1", "ip link set eth0 up")?;
        // As a network manager does: the kernel forgets IPv6 addresses and static routes of what is down.
        bench.run("n1", "ip addr replace 2001:db8:1::11/64 dev eth0 nodad")?;
        bench.run("n1", "ip route replace default via 192.0.2.1 dev eth0")?;
        bench.run("n1", "ip -6 route replace default via 2001:db8:1::1 dev eth0")
    })?;
    bench.mended("the uplink gets another MAC address", "bpf ndp", By::Nobody, || {
        bench.run("n1", "ip link set eth0 address 02:00:00:00:66:01")?;
        wait_for(SOON, "the proxy answers with the new address", || is_settled_now(testbed, "n1"))?;
        // The others learn it when they ask anew, which their kernels do after some ten seconds.
        let others = ["n2", "n3", "client", "router"];
        others.iter().try_for_each(|place| bench.run(place, "ip -6 neigh flush dev eth0"))
    })?;
    // While nobody translates replies, the node itself gets them, knows nothing of them, and resets the connection.
    bench.meter.forget("tcp pod to ipv4");
    take_programs_off(bench)?;
    check("every pod still answers", || all_greet(&testbed.netns("client"), &bench.pods, SOON))
}

/// Pins of the uplink's programs and of the pod's guard are removed.
fn take_programs_off(bench: &Bench<'_>) -> Result<()> {
    let pins = pins(bench.testbed, "n1")?;
    if pins.is_empty() {
        write_now("       no TCX here: nothing is pinned\n");
        return bench.mended("tc qdisc del clsact", "was taken off", By::Process, || {
            bench.run("n1", "tc qdisc del dev eth0 clsact")
        });
    }
    for pin in pins {
        let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
        bench.mended(&format!("{name} is removed"), "was taken off", By::Nobody, || {
            std::fs::remove_file(&pin).with_context(|| pin.display().to_string())
        })?;
    }
    Ok(())
}

/// The pinned links of a node.
fn pins(testbed: &Testbed, node: &str) -> Result<Vec<std::path::PathBuf>> {
    let dir = testbed.environment(node).into_iter().find(|(key, _)| key == "HEXTET_NODE_BPF_DIR");
    let (_, dir) = dir.context("a node of a cluster has a folder of pins")?;
    let mut links = Vec::new();
    for layout in std::fs::read_dir(dir)? {
        for pin in std::fs::read_dir(layout?.path())? {
            let pin = pin?.path();
            links.extend(
                pin.file_name().is_some_and(|n| n.to_string_lossy().starts_with("link-")).then_some(pin),
            );
        }
    }
    links.sort();
    Ok(links)
}

/// What and by whom, as `netctl node events` tells it.
fn events(testbed: &Testbed, node: &str) -> Result<Vec<(String, Option<String>)>> {
    let json = testbed.netctl_on(node, &["node", "events", "-o", "json"])?.success()?;
    let events: Vec<Value> = serde_json::from_str(&json)?;
    let text = |event: &Value, key: &str| event[key].as_str().map(str::to_owned);
    Ok(events.iter().map(|event| (text(event, "what").unwrap_or_default(), text(event, "by"))).collect())
}

/// Waits until the node has told of what was found, after the first `before` events.
fn told(testbed: &Testbed, node: &str, before: usize, found: &str, by: By) -> Result<()> {
    let (_, author) = wait_for(SOON, &format!("an event that says {found:?}"), || {
        let all = events(testbed, node).map_err(|error| format!("{error:#}"))?;
        let new = &all[before.min(all.len())..];
        new.iter().find(|(what, _)| what.contains(found)).map(|(_, by)| by.clone()).ok_or(format!("{new:?}"))
    })?;
    write_now(&format!("       by {}\n", author.as_deref().unwrap_or("unknown")));
    match (by, author) {
        (By::Named(name), Some(author)) if author.starts_with(name) => Ok(()),
        (By::Process, Some(author)) if author.contains("process") => Ok(()),
        (By::Nobody, _) => Ok(()),
        (_, author) => bail!("it was {author:?}"),
    }
}

fn is_settled(testbed: &Testbed, node: &str) -> Result<()> {
    wait_for(SOON, "there is nothing left to do", || is_settled_now(testbed, node)).map(drop)
}

fn is_settled_now(testbed: &Testbed, node: &str) -> Result<(), String> {
    testbed.plans_nothing_on(node).map_err(|error| format!("{error:#}"))
}
