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
    testbed.apply(&jobs::hello(2))?;
    let mut pods = testbed.wait_running("hello", 2, SOON)?;
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
    from_a_pod(testbed, &pods[0])?;
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

/// What a pod sends in another's name.
fn from_a_pod(testbed: &Testbed, pod: &Pod) -> Result<()> {
    let place = testbed.netns(&pod.id);
    let own = frame::mac_of(&place, "eth0")?;
    let gateway = frame::mac_of(&testbed.netns(&pod.node), &host_link(testbed, pod)?)?;
    let spoofed: Ipv6Addr = "2001:db8:1::66".parse()?;
    let wan: Ipv6Addr = "2001:db8:ffff::2".parse()?;
    let echo = Frame::echo(gateway, own, pod.address(), wan);
    let message = |kind: u8| {
        let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        message.extend([0; 16]);
        Frame { message, ..echo.clone() }.bytes()
    };
    let wrong = [
        ("drop_source_address", Frame { source: spoofed, ..echo.clone() }.bytes()),
        ("drop_source_mac", Frame { from: [2, 0, 0, 0, 0, 1], ..echo.clone() }.bytes()),
        ("drop_router_advertisement", message(frame::ROUTER_ADVERTISEMENT)),
        ("drop_neighbour_advertisement", message(frame::NEIGHBOR_ADVERTISEMENT)),
        ("drop_source_address", ipv4_echo(gateway, own, [192, 0, 2, 66], [198, 51, 100, 2])),
        ("drop_arp", ethernet(gateway, own, 0x0806, &[0; 28])),
        ("drop_ether_type", ethernet(gateway, own, 0x88cc, &[0; 46])),
    ];
    let filter = format!("src host {spoofed} or src host 192.0.2.66");
    let uplink = Capture::start(&testbed.netns(&pod.node), "eth0", &filter)?;
    for (counter, bytes) in wrong {
        counted(testbed, pod, "pod_guard", counter, &place, "eth0", &bytes)?;
    }
    counted(testbed, pod, "pod_guard", "pass", &place, "eth0", &echo.bytes())?;
    let leaked: Vec<Packet> = uplink.finish()?;
    ensure!(leaked.is_empty(), "{} spoofed packets left the node", leaked.len());
    Ok(())
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
