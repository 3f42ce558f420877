//! The testbed without a cluster: that the ground on which the other scenarios stand is what the documents say.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use hextet_tests::capture::{Capture, Packet};
use hextet_tests::frame::{self, Frame};
use hextet_tests::probe::{http_get, ping, udp_ask, url};
use hextet_tests::scenario::{CURL, Needs, PING, TCPDUMP, check, scenario};
use hextet_tests::topology::{Place, router_wan};
use hextet_tests::{Options, Testbed, wait_until};

const NEEDS: Needs = Needs { programs: &[CURL, PING, TCPDUMP] };
const ANSWERED: Duration = Duration::from_secs(3);

#[test]
fn the_small_internet_is_as_documented() {
    let options = Options { nodes: 2, cluster: false, ..Options::default() };
    scenario("the_small_internet_is_as_documented", NEEDS, options, run);
}

fn run(testbed: &Testbed) -> Result<()> {
    check("every LAN host reaches every other and the internet", || everybody(testbed))?;
    check("the internet sees addresses as they are", || untranslated(testbed))?;
    check("a pod's IPv4 gets no answer from the internet", || no_way_back(testbed))?;
    check("nodes do not forward", || nodes_do_not_forward(testbed))?;
    check("a solicitation made by hand is one: the kernel answers it", || by_hand(testbed))?;
    check("the switch forwards no group that nobody on a port has joined", || snooping(testbed))
}

fn addresses(place: Place) -> [IpAddr; 2] {
    let at = place.addresses().expect("it has addresses");
    [at.v4.into(), at.v6.into()]
}

fn everybody(testbed: &Testbed) -> Result<()> {
    let hosts = [Place::Node(1), Place::Node(2), Place::Client, Place::Router, Place::Wan];
    for from in hosts {
        for to in hosts.into_iter().filter(|to| *to != from).flat_map(addresses) {
            let pings = ping(&testbed.netns(&from.to_string()), to, 1, Duration::from_millis(10))?;
            ensure!(pings.received == 1, "{from} cannot reach {to}");
        }
    }
    Ok(())
}

fn untranslated(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    for (own, wan) in addresses(Place::Client).into_iter().zip(addresses(Place::Wan)) {
        let wanted = format!("peer {own} ");
        let http = http_get(&client, &url(wan, 80))?;
        ensure!(http.starts_with(&wanted), "the HTTP server sees {http:?}, not {wanted:?}");
        let udp = udp_ask(&client, SocketAddr::new(wan, 7))?;
        ensure!(udp.starts_with(&wanted), "the UDP server sees {udp:?}, not {wanted:?}");
    }
    let log = testbed.echo().log();
    ensure!(log.contains("http peer 192.0.2.100 ") && log.contains("udp peer 2001:db8:1::100 "), "{log}");
    Ok(())
}

/// What a missing masquerade looks like.
fn no_way_back(testbed: &Testbed) -> Result<()> {
    let n1 = testbed.netns("n1");
    testbed.run_in("n1", &["ip", "addr", "add", "10.254.0.2/32", "dev", "lo"]).success()?;
    let capture = Capture::start(&testbed.netns("wan"), "eth0", "icmp and src host 10.254.0.2")?;
    let output =
        testbed.in_ns("n1", &["ping", "-n", "-c", "1", "-W", "1", "-I", "10.254.0.2", "198.51.100.2"])?;
    ensure!(!output.ok(), "an answer came back: {output}");
    capture.wait_packets(ANSWERED, 1, |_| true)?;
    testbed.run_in("n1", &["ip", "addr", "del", "10.254.0.2/32", "dev", "lo"]).success()?;
    ensure!(
        ping(&n1, "198.51.100.2".parse()?, 1, Duration::from_millis(10))?.received == 1,
        "n1 itself gets one"
    );
    Ok(())
}

fn nodes_do_not_forward(testbed: &Testbed) -> Result<()> {
    for node in testbed.nodes() {
        for family in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            let path = format!("/proc/sys/{family}");
            let value = testbed.netns(&node).run(|| std::fs::read_to_string(&path))??;
            ensure!(value.trim() == "0", "{node}: {family} is {value}");
        }
    }
    let router = router_wan().v6;
    ensure!(router != Ipv6Addr::UNSPECIFIED, "the router has an address on the internet");
    Ok(())
}

fn by_hand(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    let [_, IpAddr::V6(n1)] = addresses(Place::Node(1)) else { unreachable!("the second is IPv6") };
    let good = Frame::solicitation(frame::mac_of(&client, "eth0")?, "2001:db8:1::100".parse()?, n1);
    let filter = format!("icmp6 and ip6[40] == 136 and src host {n1}");
    let wrong = [
        Frame { checksum_error: 1, ..good.clone() },
        Frame { hop_limit: 64, ..good.clone() },
        Frame { length_error: -16, ..good.clone() },
    ];
    let answers = Capture::start(&client, "eth0", &filter)?;
    frame::send(&client, "eth0", &wrong.map(|frame| frame.bytes()))?;
    // Frames are answered in order: the first answer is to the good one, and no other comes.
    frame::send(&client, "eth0", &[good.bytes()])?;
    let seen = answers.wait_packets(ANSWERED, 1, |packet| packet.icmpv6_type() == Some(136))?;
    ensure!(seen.len() == 1, "{} answers to one good solicitation", seen.len());
    ensure!(
        seen[0].hop_limit() == Some(255) && seen[0].ipv6().is_some_and(|(from, _)| from == n1),
        "{seen:?}"
    );
    Ok(())
}

/// A node that has not joined its pods' group would not be asked for them.
fn snooping(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    let mac = frame::mac_of(&client, "eth0")?;
    let source = "2001:db8:1::100".parse()?;
    let ask =
        |target: &str| Ok::<_, anyhow::Error>(Frame::solicitation(mac, source, target.parse()?).bytes());
    let (joined, strange) = (ask("2001:db8:1::12")?, ask("2001:db8:1::dead:beef")?);
    let group = "net ff02::1:ff00:0/104";
    let is_strange = |packet: &Packet| packet.bytes.ends_with(&mac) && packet.bytes[..6] == strange[..6];
    // The switch floods until it has been asking for a while.
    wait_until(Duration::from_secs(20), "the switch keeps a strange group from n2", || {
        let Ok(capture) = Capture::start(&testbed.netns("n2"), "eth0", group) else { return false };
        let sent = frame::send(&client, "eth0", &[strange.clone(), joined.clone()]);
        let came = capture.wait_packets(ANSWERED, 1, |packet| packet.bytes[..6] == joined[..6]);
        let all = capture.packets().unwrap_or_default();
        sent.is_ok() && came.is_ok() && !all.iter().any(is_strange)
    })?;
    Ok(())
}
