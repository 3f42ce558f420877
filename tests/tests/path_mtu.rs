//! A link behind the router carries less than the LAN: the router's errors reach the pods, in both families and through
//! the translation, and what they send next fits.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hextet_tests::netns::NetNs;
use hextet_tests::probe::all_greet;
use hextet_tests::scenario::{BUSYBOX, CURL, Needs, PING, check, scenario};
use hextet_tests::wait::{scaled, wait_for};
use hextet_tests::{Options, Testbed, jobs};

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX, PING] };
const SOON: Duration = Duration::from_secs(20);
const WAN: [&str; 2] = ["198.51.100.2", "2001:db8:ffff::2"];
/// What a connection carries in each direction: some hundred packets.
const BYTES: usize = 1 << 20;

#[test]
fn a_smaller_link_on_the_way_is_learned_by_pods() {
    let options = Options { nodes: 1, ..Options::default() };
    scenario("a_smaller_link_on_the_way_is_learned_by_pods", NEEDS, options, run);
}

#[test]
fn a_smaller_link_on_the_way_is_learned_through_nftables() {
    let node_args = vec!["--masquerade".into(), "nftables".into()];
    let options = Options { nodes: 1, node_args, ..Options::default() };
    scenario("a_smaller_link_on_the_way_is_learned_through_nftables", NEEDS, options, run);
}

fn run(testbed: &Testbed) -> Result<()> {
    testbed.apply(&jobs::hello(1))?;
    let pods = testbed.wait_running("hello", 1, SOON)?;
    all_greet(&testbed.netns("client"), &pods, SOON)?;
    let pod = testbed.netns(&pods[0].id);
    // The smallest that IPv6 allows (RFC 8200 section 5) is last: what was learned is forgotten only after minutes.
    for mtu_bytes in [1400, 1280] {
        narrow(testbed, mtu_bytes)?;
        for wan in WAN {
            let wan: IpAddr = wan.parse()?;
            check(
                &format!("{wan} behind {mtu_bytes} bytes: a datagram that does not fit is refused"),
                || is_refused(&pod, wan, mtu_bytes),
            )?;
            check(&format!("{wan} behind {mtu_bytes} bytes: a connection carries both ways"), || {
                transfer(&pod, &testbed.netns("wan"), wan)
            })?;
            forget(&pod)?;
            check(&format!("{wan} behind {mtu_bytes} bytes: a connection learns it by itself"), || {
                transfer(&pod, &testbed.netns("wan"), wan)?;
                knows(&pod, wan, mtu_bytes)
            })?;
        }
    }
    check("a path that is not narrow is as wide as the LAN", || knows(&pod, "2001:db8:1::100".parse()?, 1500))
}

/// Makes what the router sends on, either way, carry `mtu_bytes` at most: a packet that is larger comes back as an
/// error, as from a router with a smaller link.
fn narrow(testbed: &Testbed, mtu_bytes: u32) -> Result<()> {
    let cluster = testbed.cluster_prefix()?;
    let routes =
        ["198.51.100.0/24 dev eth1", "192.0.2.0/24 dev eth0", "2001:db8:ffff::/64 dev eth1 metric 128"];
    for route in routes.iter().map(|route| (*route).to_owned()).chain([format!("{cluster} dev eth0")]) {
        let line = format!("ip route replace {route} mtu lock {mtu_bytes}");
        let words: Vec<&str> = line.split(' ').collect();
        testbed.run_in("router", &words).success()?;
    }
    Ok(())
}

/// The kernel's own words about a packet that must not be fragmented.
fn is_refused(pod: &NetNs, to: IpAddr, mtu_bytes: u32) -> Result<()> {
    // 1500 bytes with the headers of IP and ICMP.
    let size = if to.is_ipv4() { "1472" } else { "1452" };
    let to = to.to_string();
    wait_for(SOON, "the pod's kernel refuses to send it", || {
        let ping = ["ping", "-n", "-M", "do", "-s", size, "-c", "2", "-i", "0.1", "-W", "1", &to];
        let output =
            hextet_tests::command::Run::new(&ping).inside(pod).output().map_err(|e| e.to_string())?;
        let said = output.stdout + &output.stderr;
        // First the router says it, then the kernel remembers: EMSGSIZE.
        let is_told = said.contains("message too long") && said.contains(&format!("mtu: {mtu_bytes}"))
            || said.contains(&format!("message too long, mtu={mtu_bytes}"));
        if is_told { Ok(()) } else { Err(said) }
    })?;
    Ok(())
}

/// What the pod's kernel believes about the path.
fn knows(pod: &NetNs, to: IpAddr, mtu_bytes: u32) -> Result<()> {
    let to = to.to_string();
    let route = hextet_tests::command::Run::new(&["ip", "route", "get", &to]).inside(pod).success()?;
    let learned = format!(" mtu {mtu_bytes} ");
    let as_wide_as_the_link = mtu_bytes == 1500 && !route.contains(" mtu ");
    ensure!(route.contains(&learned) || as_wide_as_the_link, "the route is {route}");
    Ok(())
}

fn forget(pod: &NetNs) -> Result<()> {
    for family in ["-4", "-6"] {
        let flush = ["ip", family, "route", "flush", "cache"];
        hextet_tests::command::Run::new(&flush).inside(pod).success()?;
    }
    Ok(())
}

/// Carries [`BYTES`] there and as many back, over one connection that the pod opens.
fn transfer(pod: &NetNs, wan: &NetNs, address: IpAddr) -> Result<()> {
    let limit = scaled(Duration::from_secs(20));
    let listener = wan.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)))??;
    let to = SocketAddr::new(address, listener.local_addr()?.port());
    let server = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        take(&mut stream).context("at the server")?;
        give(&mut stream).context("by the server")
    });
    let mut stream = pod.run(|| TcpStream::connect_timeout(&to, limit))??;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    give(&mut stream).context("by the pod")?;
    take(&mut stream).context("at the pod")?;
    server.join().expect("the server does not panic")
}

fn give(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(&vec![0x5a; BYTES]).context("cannot send all")
}

fn take(stream: &mut TcpStream) -> Result<()> {
    let mut bytes = vec![0; BYTES];
    stream.read_exact(&mut bytes).context("not all came")?;
    ensure!(bytes.iter().all(|byte| *byte == 0x5a), "it came changed");
    Ok(())
}
