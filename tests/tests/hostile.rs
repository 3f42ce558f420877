//! Frames that nobody should send, from the LAN and from a pod: dropped, counted under the right name, and
//! without effect on anybody else.

use std::net::Ipv6Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hextet_tests::capture::{Capture, Packet};
use hextet_tests::frame::{self, Frame, Mac};
use hextet_tests::probe::{all_greet, host_link};
use hextet_tests::progress::write_now;
use hextet_tests::scenario::{BUSYBOX, CURL, Needs, TCPDUMP, check, scenario};
use hextet_tests::wait::wait_for;
use hextet_tests::{Options, Pod, Testbed, jobs};

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX, TCPDUMP] };
const SOON: Duration = Duration::from_secs(20);
/// How often each frame is sent.
const COPIES: usize = 7;
/// Random frames, each a good one with a few bytes changed.
const MUTANTS: usize = 3000;
const SEED: u64 = 0x6865_7874_6574;

#[test]
fn hostile_frames_are_dropped_and_counted() {
    let node_args = vec!["--ndp".into(), "ebpf".into(), "--masquerade".into(), "ebpf".into()];
    let options = Options { nodes: 2, node_args, ..Options::default() };
    scenario("hostile_frames_are_dropped_and_counted", NEEDS, options, run);
}

fn run(testbed: &Testbed) -> Result<()> {
    testbed.apply(&jobs::hello(4))?;
    let mut pods = testbed.wait_running("hello", 4, SOON)?;
    pods.sort_by(|a, b| a.node.cmp(&b.node));
    let client = testbed.netns("client");
    all_greet(&client, &pods, SOON)?;
    from_the_lan(testbed, &pods[0])?;
    check("a LAN host that claims a pod's address does not get its packets", || {
        let mac = frame::mac_of(&client, "eth0")?;
        let claim = Frame::claim(mac, "2001:db8:1::100".parse()?, pods[0].address());
        frame::send(&client, "eth0", &vec![claim.bytes(); COPIES])?;
        all_greet(&testbed.netns(&pods[1].id), &pods, SOON)
    })?;
    from_a_pod(testbed, &pods)?;
    check("random frames from both sides change nothing", || mutants(testbed, &pods))?;
    check("every pod still answers everybody", || {
        all_greet(&client, &pods, SOON)?;
        all_greet(&testbed.netns("router"), &pods, SOON)?;
        pods.iter().try_for_each(|pod| all_greet(&testbed.netns(&pod.id), &pods, SOON))
    })
}

/// Solicitations for a pod, each with one thing wrong, from the client.
fn from_the_lan(testbed: &Testbed, pod: &Pod) -> Result<()> {
    let client = testbed.netns("client");
    let mac = frame::mac_of(&client, "eth0")?;
    let node_mac = frame::mac_of(&testbed.netns(&pod.node), "eth0")?;
    let source: Ipv6Addr = "2001:db8:1::100".parse()?;
    let good = Frame::solicitation(mac, source, pod.address());
    let probe = Frame::solicitation(mac, Ipv6Addr::UNSPECIFIED, pod.address());
    let with = |change: &dyn Fn(&mut Frame)| {
        let mut frame = good.clone();
        change(&mut frame);
        frame
    };
    let wrong = [
        ("drop_hop_limit", with(&|f| f.hop_limit = 64)),
        ("drop_code", with(&|f| f.message[1] = 1)),
        ("drop_length", with(&|f| f.length_error = -4)),
        ("drop_too_long", with(&|f| f.message.extend([14, 1, 0, 0, 0, 0, 0, 0].repeat(20)))),
        ("drop_option", with(&|f| f.message[25] = 0)),
        ("drop_checksum", with(&|f| f.checksum_error = 1)),
        ("drop_source", with(&|f| f.source = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1))),
        ("drop_source", Frame { message: good.message.clone(), ..probe.clone() }),
        // To the node's own MAC address: a switch need not deliver a multicast frame whose IPv6 destination is none.
        ("drop_destination", Frame { to: node_mac, destination: pod.address(), ..probe.clone() }),
    ];
    let answers =
        Capture::start(&client, "eth0", &format!("icmp6 and ip6[40] == 136 and src host {}", pod.address()))?;
    for (counter, frame) in wrong {
        counted(testbed, pod, "ndp_proxy", counter, &client, "eth0", &frame.bytes())?;
    }
    ensure!(answers.packets()?.is_empty(), "a wrong solicitation was answered");
    counted(testbed, pod, "ndp_proxy", "answered", &client, "eth0", &good.bytes())?;
    counted(testbed, pod, "ndp_proxy", "answered_dad", &client, "eth0", &probe.bytes())?;
    answers.wait_packets(Duration::from_secs(3), 2 * COPIES, |_| true)?;
    Ok(())
}

/// Sends copies of a frame and waits until the node has counted each of them under that name.
fn counted(
    testbed: &Testbed,
    pod: &Pod,
    program: &str,
    counter: &str,
    place: &hextet_tests::netns::NetNs,
    link: &str,
    bytes: &[u8],
) -> Result<()> {
    check(&format!("{program} counts {counter}"), || {
        let key = (program.to_owned(), counter.to_owned());
        let now = || -> Result<u64> {
            let counters = testbed.counters(&pod.node)?;
            counters
                .get(&key)
                .copied()
                .with_context(|| format!("there is no counter {key:?} in {counters:?}"))
        };
        let before = now()?;
        frame::send(place, link, &vec![bytes.to_vec(); COPIES])?;
        let wanted = before + COPIES as u64;
        wait_for(Duration::from_secs(5), &format!("{wanted} are counted"), || match now() {
            Ok(count) if count >= wanted => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        Ok(())
    })
}

/// A frame that a pod sends, and the counter that it ends in.
type Attack = (&'static str, &'static str, Vec<u8>);

/// All that a pod with CAP_NET_RAW can try on its link: dropped, counted, and without effect on the node's tables, on
/// a pod beside it or on another host.
fn from_a_pod(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    let pod = &pods[0];
    let beside = pods.iter().find(|other| other.node == pod.node && other.id != pod.id);
    let beside = beside.context("two pods are on one node")?;
    let place = testbed.netns(&pod.id);
    let link = Link::of(testbed, pod, beside)?;
    let before = tables(testbed, pod, beside)?;
    let filter =
        format!("arp or vlan or src host {} or src host {SPOOFED} or src host 192.0.2.66", pod.address());
    let captures = [
        Capture::start(&testbed.netns(&pod.node), "eth0", &filter)?,
        Capture::start(&testbed.netns(&beside.id), "eth0", &filter)?,
    ];
    for (name, counter, bytes) in link.attacks() {
        check(name, || counted(testbed, pod, "pod_guard", counter, &place, "eth0", &bytes))?;
    }
    let seen = captures.map(Capture::finish);
    for (capture, what) in seen.into_iter().zip(["left the node", "came to the pod beside it"]) {
        let packets: Vec<Packet> = capture?;
        ensure!(packets.is_empty(), "{} packets {what}: {:02x?}", packets.len(), packets[0].bytes);
    }
    check("nobody's routes and neighbours have changed", || {
        let after = tables(testbed, pod, beside)?;
        ensure!(after == before, "before: {before}\nafter: {after}");
        Ok(())
    })?;
    check("what the pod may send is counted, too", || {
        let echo = link.echo().bytes();
        counted(testbed, pod, "pod_guard", "pass", &place, "eth0", &echo)
    })
}

const SPOOFED: &str = "2001:db8:1::66";
const WAN6: &str = "2001:db8:ffff::2";

/// The routes of the node and of a pod's neighbour, and all that holds for long in their neighbour tables.
fn tables(testbed: &Testbed, pod: &Pod, beside: &Pod) -> Result<String> {
    let mut text = String::new();
    let views: [&[&str]; 5] = [
        &["ip", "-6", "route", "show", "table", "all"],
        &["ip", "route", "show", "table", "all"],
        &["ip", "neigh", "show", "nud", "permanent"],
        &["ip", "-6", "neigh", "show", "proxy"],
        &["ip", "addr"],
    ];
    for place in [&pod.node, &pod.id, &beside.id] {
        for view in views {
            text += &format!("{place} {view:?}:\n{}", testbed.run_in(place, view).success()?);
        }
    }
    // Others come and go with traffic; none may be the pod's doing.
    let mac = testbed.run_in(&pod.id, &["cat", "/sys/class/net/eth0/address"]).success().unwrap_or_default();
    for place in [pod.node.as_str(), "client", "router", &beside.id] {
        let all = testbed.run_in(place, &["ip", "neigh"]).success()?;
        let wrong: Vec<&str> =
            all.lines().filter(|line| line.contains(mac.trim()) && !line.contains("PERMANENT")).collect();
        ensure!(mac.trim().is_empty() || wrong.is_empty(), "{place} has learned {wrong:?}");
    }
    Ok(text)
}

/// The pod's end of its link, and who is around.
struct Link {
    own: Mac,
    gateway: Mac,
    address: Ipv6Addr,
    ipv4: [u8; 4],
    beside: Ipv6Addr,
    beside_ipv4: [u8; 4],
}

impl Link {
    fn of(testbed: &Testbed, pod: &Pod, beside: &Pod) -> Result<Link> {
        Ok(Link {
            own: frame::mac_of(&testbed.netns(&pod.id), "eth0")?,
            gateway: frame::mac_of(&testbed.netns(&pod.node), &host_link(testbed, pod)?)?,
            address: pod.address(),
            ipv4: ipv4_of(testbed, pod)?,
            beside: beside.address(),
            beside_ipv4: ipv4_of(testbed, beside)?,
        })
    }

    fn echo(&self) -> Frame {
        Frame::echo(self.gateway, self.own, self.address, ip(WAN6))
    }

    fn attacks(&self) -> Vec<Attack> {
        let mut attacks = self.spoofed();
        attacks.extend(self.discovery());
        attacks.extend(self.hidden());
        attacks.extend(self.servers());
        attacks.extend(self.other_links());
        attacks
    }

    fn spoofed(&self) -> Vec<Attack> {
        let echo = self.echo();
        let from = |source| Frame { source, ..echo.clone() }.bytes();
        vec![
            ("another host's IPv6 address", "drop_source_address", from(ip(SPOOFED))),
            ("another pod's IPv6 address", "drop_source_address", from(self.beside)),
            ("the gateway's IPv6 address", "drop_source_address", from(ip("fe80::1"))),
            ("another host's IPv4 address", "drop_source_ipv4", self.udp4([192, 0, 2, 66], WAN4, 1, 7)),
            ("another pod's IPv4 address", "drop_source_ipv4", self.udp4(self.beside_ipv4, WAN4, 1, 7)),
            (
                "another MAC address",
                "drop_source_mac",
                Frame { from: [2, 0, 0, 0, 0, 1], ..echo.clone() }.bytes(),
            ),
            (
                "the gateway's MAC address",
                "drop_source_mac",
                Frame { from: self.gateway, ..echo.clone() }.bytes(),
            ),
            ("IPv4 to another pod", "drop_ipv4_between_pods", self.udp4(self.ipv4, self.beside_ipv4, 1, 7)),
            ("to another pod's link-local address", "drop_link_local", self.to_link_local()),
            ("a loose source route", "drop_ipv4_options", self.source_routed()),
        ]
    }

    fn to_link_local(&self) -> Vec<u8> {
        Frame { destination: ip("fe80::2"), ..self.echo() }.bytes()
    }

    fn discovery(&self) -> Vec<Attack> {
        let (nodes, routers) = (ip("ff02::1"), ip("ff02::2"));
        let claim = |target| Frame::claim(self.own, self.address, target).bytes();
        let ask = |source, target| Frame::solicitation(self.own, source, target).bytes();
        let query = [&[130, 0, 0, 0, 0, 1, 0, 0][..], &[0; 16]].concat();
        vec![
            (
                "router advertisement",
                "drop_router_advertisement",
                self.message(nodes, advertisement(self.own)),
            ),
            ("router advertisement to the gateway", "drop_router_advertisement", {
                self.message(ip("fe80::1"), advertisement(self.own))
            }),
            ("redirect", "drop_redirect", self.message(self.beside, redirect(self.address))),
            ("advertisement for another pod", "drop_neighbour_advertisement", claim(self.beside)),
            ("advertisement for the gateway", "drop_neighbour_advertisement", claim(ip("fe80::1"))),
            ("advertisement for itself", "drop_neighbour_advertisement", claim(self.address)),
            ("solicitation for another pod", "drop_solicitation", ask(self.address, self.beside)),
            ("solicitation for a LAN host", "drop_solicitation", ask(self.address, ip("2001:db8:1::100"))),
            ("DAD probe for another pod", "drop_source_address", ask(Ipv6Addr::UNSPECIFIED, self.beside)),
            (
                "router solicitation",
                "drop_router_solicitation",
                self.message(routers, vec![133, 0, 0, 0, 0, 0, 0, 0]),
            ),
            ("query for groups", "drop_mld", self.message(nodes, query)),
            ("report of groups", "drop_mld", self.report()),
            ("IPv4 redirect", "drop_redirect", self.icmp4(5)),
            (
                "ARP for the gateway",
                "drop_arp",
                ethernet([0xff; 6], self.own, 0x0806, &arp(self.own, [192, 0, 2, 1])),
            ),
        ]
    }

    /// RFC 7113: what does not begin with the message itself.
    fn hidden(&self) -> Vec<Attack> {
        let advertisement = advertisement(self.own);
        let options = |next: u8| vec![next, 0, 1, 4, 0, 0, 0, 0];
        let fragment = |next: u8, offset: u8| vec![next, 0, 0, offset << 3 | 1, 0, 0, 0, 7];
        let behind = |first: u8, hop_limit: u8, headers: Vec<u8>| {
            self.ipv6(ip("ff02::1"), first, hop_limit, &[headers, advertisement.clone()].concat())
        };
        let twice = [options(60), options(58)].concat();
        vec![
            (
                "router advertisement behind hop-by-hop options",
                "drop_extension_header",
                behind(0, 255, options(58)),
            ),
            (
                "router advertisement behind destination options",
                "drop_extension_header",
                behind(60, 255, options(58)),
            ),
            (
                "router advertisement behind two headers",
                "drop_extension_header",
                behind(60, 255, twice.clone()),
            ),
            ("the same with an ordinary hop limit", "drop_extension_header", behind(60, 64, twice)),
            ("router advertisement in a fragment", "drop_extension_header", behind(44, 255, fragment(58, 0))),
            ("router advertisement behind options in a fragment", "drop_extension_header", {
                behind(44, 255, [fragment(60, 0), options(58)].concat())
            }),
            ("a first fragment that ends before the message", "drop_extension_header", {
                self.ipv6(self.beside, 44, 255, &[fragment(60, 0), options(58)].concat())
            }),
            ("a later fragment", "drop_extension_header", behind(44, 255, fragment(58, 1))),
        ]
    }

    fn servers(&self) -> Vec<Attack> {
        let dhcpv6 = |from: u16, to: u16| {
            let ports = [from.to_be_bytes(), to.to_be_bytes(), 8_u16.to_be_bytes(), [0; 2]].concat();
            self.ipv6(self.beside, 17, 64, &ports)
        };
        vec![
            ("DHCP server", "drop_dhcp_server", self.udp4(self.ipv4, WAN4, 67, 68)),
            ("DHCP server on another port", "drop_dhcp_server", self.udp4(self.ipv4, WAN4, 6767, 68)),
            ("DHCP to everybody", "drop_multicast", self.udp4(self.ipv4, [255; 4], 67, 68)),
            ("DHCPv6 server", "drop_dhcp_server", dhcpv6(547, 546)),
            ("DHCPv6 server on another port", "drop_dhcp_server", dhcpv6(5547, 546)),
        ]
    }

    /// Frames that a switch would take elsewhere.
    fn other_links(&self) -> Vec<Attack> {
        let tagged = |kind: u16, id: u16| {
            let mut bytes = self.echo().bytes();
            let tag = [kind.to_be_bytes(), id.to_be_bytes()].concat();
            bytes.splice(12..12, tag);
            bytes
        };
        let twice = {
            let mut bytes = tagged(0x8100, 5);
            bytes.splice(12..12, [0x88, 0xa8, 0, 6]);
            bytes
        };
        vec![
            ("a VLAN tag", "drop_vlan", tagged(0x8100, 5)),
            ("a priority tag", "drop_vlan", tagged(0x8100, 7 << 13)),
            ("a service tag", "drop_vlan", tagged(0x88a8, 5)),
            ("two tags", "drop_vlan", twice),
            ("LLDP", "drop_ether_type", ethernet(self.gateway, self.own, 0x88cc, &[0; 46])),
        ]
    }

    fn message(&self, destination: Ipv6Addr, message: Vec<u8>) -> Vec<u8> {
        Frame::new(self.gateway, self.own, self.address, destination, message).bytes()
    }

    /// Behind hop-by-hop options with a router alert (RFC 3810 section 5.2).
    fn report(&self) -> Vec<u8> {
        let group = ip("ff02::1:ff00:66");
        let record = [&[143, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0][..], &group.octets()].concat();
        self.ipv6(ip("ff02::16"), 0, 1, &[&[58, 0, 5, 2, 0, 0, 1, 0][..], &record].concat())
    }

    fn ipv6(&self, destination: Ipv6Addr, next_header: u8, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend((payload.len() as u16).to_be_bytes());
        packet.extend([next_header, hop_limit]);
        packet.extend(self.address.octets());
        packet.extend(destination.octets());
        packet.extend(payload);
        ethernet(self.gateway, self.own, 0x86dd, &packet)
    }

    fn udp4(&self, source: [u8; 4], destination: [u8; 4], from: u16, to: u16) -> Vec<u8> {
        let ports = [from.to_be_bytes(), to.to_be_bytes(), 8_u16.to_be_bytes(), [0; 2]].concat();
        ethernet(self.gateway, self.own, 0x0800, &ipv4(17, source, destination, &[], &ports))
    }

    fn icmp4(&self, kind: u8) -> Vec<u8> {
        let message = [kind, 0, 0, 0, 0, 0, 0, 0];
        ethernet(self.gateway, self.own, 0x0800, &ipv4(1, self.ipv4, WAN4, &[], &message))
    }

    fn source_routed(&self) -> Vec<u8> {
        // Loose source route by way of the router (RFC 791 section 3.1).
        let options = [131, 7, 4, 192, 0, 2, 1, 0];
        let ports = [0, 1, 0, 7, 0, 8, 0, 0];
        ethernet(self.gateway, self.own, 0x0800, &ipv4(17, self.ipv4, WAN4, &options, &ports))
    }
}

const WAN4: [u8; 4] = [198, 51, 100, 2];

fn ip(text: &str) -> Ipv6Addr {
    text.parse().expect("the test writes addresses right")
}

/// A pod's private IPv4 address.
fn ipv4_of(testbed: &Testbed, pod: &Pod) -> Result<[u8; 4]> {
    let json = testbed.run_in(&pod.id, &["ip", "-j", "-4", "addr", "show", "dev", "eth0"]).success()?;
    let links: serde_json::Value = serde_json::from_str(&json)?;
    let address = links[0]["addr_info"][0]["local"].as_str().context("a pod has an IPv4 address")?;
    Ok(address.parse::<std::net::Ipv4Addr>()?.octets())
}

/// A router that everybody should take for the default, and a prefix to make addresses of (RFC 4861 section 4.2).
fn advertisement(own: Mac) -> Vec<u8> {
    let mut message = vec![frame::ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    message.extend([1, 1]);
    message.extend(own);
    message.extend([3, 4, 64, 0xc0, 0, 0, 0xff, 0, 0, 0, 0xff, 0, 0, 0, 0, 0]);
    message.extend(ip("2001:db8:bad::").octets());
    message
}

/// Says that the internet is to be reached by way of `target` (RFC 4861 section 4.5).
fn redirect(target: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![137, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.octets());
    message.extend(ip(WAN6).octets());
    message
}

/// An announcement that `address` is at `own` (RFC 826).
fn arp(own: Mac, address: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend(own);
    packet.extend(address);
    packet.extend([0; 6]);
    packet.extend(address);
    packet
}

/// A packet without checksums: the kernel would drop it for that, so the guard must have done so before.
fn ipv4(protocol: u8, source: [u8; 4], destination: [u8; 4], options: &[u8], payload: &[u8]) -> Vec<u8> {
    let header_len = 20 + options.len();
    let mut packet = vec![0x40 | (header_len / 4) as u8, 0];
    packet.extend(((header_len + payload.len()) as u16).to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
    packet.extend(source);
    packet.extend(destination);
    packet.extend(options);
    packet.extend(payload);
    packet
}

fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(14 + payload.len());
    bytes.extend(to);
    bytes.extend(from);
    bytes.extend(kind.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A ping in IPv4 (RFC 791, RFC 792), without checksums: the source is looked at first.
fn ipv4_echo(to: Mac, from: Mac, source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 1, 0, 0, 64, 1, 0, 0];
    packet.extend(source);
    packet.extend(destination);
    packet.extend([8, 0, 0, 0, 0x12, 0x34, 0, 1]);
    ethernet(to, from, 0x0800, &packet)
}

fn mutants(testbed: &Testbed, pods: &[Pod]) -> Result<()> {
    write_now(&format!("       seed {SEED:#x}\n"));
    let mut random = Random(SEED);
    let client = testbed.netns("client");
    let lan =
        Frame::solicitation(frame::mac_of(&client, "eth0")?, "2001:db8:1::100".parse()?, pods[0].address());
    frame::send(&client, "eth0", &random.mutants(&lan.bytes()))?;
    let place = testbed.netns(&pods[0].id);
    let gateway = frame::mac_of(&testbed.netns(&pods[0].node), &host_link(testbed, &pods[0])?)?;
    let own = frame::mac_of(&place, "eth0")?;
    let echo = Frame::echo(gateway, own, pods[0].address(), pods[1].address());
    frame::send(&place, "eth0", &random.mutants(&echo.bytes()))?;
    let v4 = ipv4_echo(gateway, own, [10, 254, 0, 2], [198, 51, 100, 2]);
    frame::send(&place, "eth0", &random.mutants(&v4))
}

/// xorshift64: the same frames in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Frames of at least an Ethernet header, cut, changed or made longer.
    fn mutants(&mut self, good: &[u8]) -> Vec<Vec<u8>> {
        (0..MUTANTS).map(|_| self.mutant(good)).collect()
    }

    fn mutant(&mut self, good: &[u8]) -> Vec<u8> {
        let mut bytes = good.to_vec();
        match self.below(4) {
            0 => bytes.truncate(14 + self.below(good.len() - 14)),
            1 => bytes.resize(good.len() + self.below(1200), self.next() as u8),
            _ => {}
        }
        for _ in 0..self.below(6) {
            // Not the destination: the frame is to arrive.
            let at = 6 + self.below(bytes.len() - 6);
            bytes[at] = self.next() as u8;
        }
        bytes
    }
}
