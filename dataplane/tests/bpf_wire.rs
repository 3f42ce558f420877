//! The programs between real kernels: a LAN host that runs nothing of ours finds a pod by neighbour discovery,
//! and a pod's connection leaves with the node's address, goes on while the agent is dead, and is judged by
//! its guard.
//!
//! ```text
//! hxA-<pid>-host eth0 ── eth0 hxA-<pid>-node hxpod ── eth0 hxA-<pid>-pod
//! ```

#[path = "bpf/support.rs"]
mod support;

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use dataplane::bpf::{
    Bpf, GuardEntry, Program,
    Program::{PodGuard, UplinkBackstop, UplinkEgress, UplinkIngress},
};
use dataplane_common::masquerade::{Pool, block};
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns},
};
use support::*;

const POD: &str = "fd12:3456:789a:1:aaaa:bbbb:cc12:3456";
const POD_V4: Ipv4Addr = Ipv4Addr::new(10, 254, 0, 5);
const NODE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
const HOST_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
const POD_MAC: [u8; 6] = [2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];
const HOST_SIDE_MAC: [u8; 6] = [6, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];
const PATIENCE: Duration = Duration::from_secs(10);

/// Three network namespaces, gone with it.
struct Wires {
    prefix: String,
}

impl Wires {
    fn new(test: &str) -> Wires {
        let wires = Wires { prefix: format!("hxA-{}-{test}", std::process::id()) };
        for name in ["host", "node", "pod"] {
            shell(&format!("ip netns add {}", wires.name(name)));
        }
        let (host, node, pod) = (wires.name("host"), wires.name("node"), wires.name("pod"));
        shell(&format!(
            "ip -n {node} link add eth0 address 02:00:00:00:00:11 type veth peer name eth0 address 02:00:00:00:00:64 netns {host}
             ip -n {node} link add hxpod address 06:aa:bb:cc:dd:ee type veth peer name eth0 address 02:aa:bb:cc:dd:ee netns {pod}
             for n in {host} {node} {pod}; do ip -n $n link set lo up; done"
        ));
        wires.sysctl("node", "ipv6/conf/all/forwarding");
        wires.sysctl("node", "ipv4/ip_forward");
        shell(&format!(
            "ip -n {host} link set eth0 up; ip -n {node} link set eth0 up
             ip -n {node} link set hxpod addrgenmode none up; ip -n {pod} link set eth0 addrgenmode none up
             ip -n {host} addr add 192.0.2.100/24 dev eth0; ip -n {node} addr add 192.0.2.11/24 dev eth0
             ip -n {host} addr add fd12:3456:789a:ffff::64/48 dev eth0 nodad
             ip -n {node} addr add fe80::1/64 dev hxpod nodad
             ip -n {node} route add {POD}/128 dev hxpod; ip -n {node} route add 10.254.0.5/32 dev hxpod
             ip -n {node} route add fd12:3456:789a:ffff::/64 dev eth0
             ip -n {node} neigh add {POD} lladdr 02:aa:bb:cc:dd:ee dev hxpod nud permanent
             ip -n {node} neigh add 10.254.0.5 lladdr 02:aa:bb:cc:dd:ee dev hxpod nud permanent
             ip -n {pod} addr add {POD}/128 dev eth0 nodad; ip -n {pod} addr add 10.254.0.5/32 dev eth0
             ip -n {pod} -6 route add default via fe80::1 dev eth0
             ip -n {pod} -4 route add default via inet6 fe80::1 dev eth0"
        ));
        wires
    }

    fn name(&self, machine: &str) -> String {
        format!("{}-{machine}", self.prefix)
    }

    fn sysctl(&self, machine: &str, name: &str) {
        let path = format!("/proc/sys/net/{name}");
        self.on(machine, || std::fs::write(&path, "1").expect("the sysctl can be written"));
    }

    /// Gives the pod a permanent neighbour for its gateway, as agents do. IPv4 needs it: without a link-local
    /// address the pod's kernel has no source to ask with.
    fn know_gateway(&self) {
        let pod = self.name("pod");
        shell(&format!("ip -n {pod} neigh add fe80::1 lladdr 06:aa:bb:cc:dd:ee dev eth0 nud permanent"));
    }

    /// Runs on a thread in the machine's network namespace.
    fn on<T: Send>(&self, machine: &str, body: impl FnOnce() -> T + Send) -> T {
        let netns = File::open(format!("/run/netns/{}", self.name(machine))).expect("the namespace exists");
        let run = || {
            setns(&netns, CloneFlags::CLONE_NEWNET).expect("the namespace can be entered");
            body()
        };
        thread::scope(|scope| {
            scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Wires {
    fn drop(&mut self) {
        for machine in ["host", "node", "pod"] {
            let _ = Command::new("ip").args(["netns", "del", &self.name(machine)]).status();
        }
    }
}

fn shell(script: &str) {
    let status = Command::new("sh").args(["-ec", script]).status().expect("there is a shell");
    assert!(status.success(), "{script}");
}

/// Attaches all programs and sets their maps. Called on the node.
fn agent(pins: &Pins) -> Bpf {
    let mut bpf = pins.open();
    bpf.set_local_pod(POD.parse().unwrap(), UPLINK_MAC).unwrap();
    let masquerade = masquerade_to(NODE_V4);
    bpf.set_masquerade(Some(&masquerade)).unwrap();
    let entry = GuardEntry {
        ipv6: POD.parse().unwrap(),
        ipv4: POD_V4,
        pod_ipv4: masquerade.pod_ipv4,
        pod_mac: POD_MAC,
        host_mac: HOST_SIDE_MAC,
    };
    bpf.set_guard(if_nametoindex("hxpod").unwrap(), entry).unwrap();
    let uplink = [UplinkIngress, UplinkEgress, UplinkBackstop].map(|program| (program, "eth0"));
    for (program, ifname) in uplink.into_iter().chain([(PodGuard, "hxpod")]) {
        attach(&mut bpf, program, ifname);
    }
    bpf
}

fn attach(bpf: &mut Bpf, program: Program, ifname: &str) {
    let ifindex = if_nametoindex(ifname).unwrap();
    bpf.attach(program, ifindex, ifname).unwrap_or_else(|e| panic!("{}", chain(&e)));
}

/// Tries until the deadline; for conditions that take the kernel a moment.
fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn echo_server(address: SocketAddr) {
    let listener = TcpListener::bind(address).expect("the address is this machine's");
    thread::spawn(move || {
        while let Ok((mut connection, peer)) = listener.accept() {
            thread::spawn(move || {
                // First line: who is there; then whatever comes goes back.
                let _ = writeln!(connection, "{peer}");
                let mut buffer = [0; 65_536];
                while let Ok(n) = connection.read(&mut buffer) {
                    if n == 0 || connection.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

fn greeting(connection: &mut TcpStream) -> SocketAddr {
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut line = Vec::new();
    let mut byte = [0];
    while byte[0] != b'\n' {
        connection.read_exact(&mut byte).expect("the server says who is there");
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap().trim().parse().unwrap()
}

//= RFC 4861 7.2.4/unicast, RFC 4862 5.4.3/probe
#[test]
fn a_lan_host_finds_a_pod_by_neighbour_discovery() {
    if !may_run("wire ndp") {
        return;
    }
    let pins = Pins::new("wire-ndp");
    let wires = Wires::new("ndp");
    let bpf = wires.on("node", || agent(&pins));
    let pod: Ipv6Addr = POD.parse().unwrap();
    wires.on("pod", || echo_server((pod, 80).into()));
    let peer = wires.on("host", || {
        let mut connection =
            until("a connection to the pod", || TcpStream::connect_timeout(&(pod, 80).into(), PATIENCE).ok());
        greeting(&mut connection)
    });
    assert_eq!(peer.ip().to_string(), "fd12:3456:789a:ffff::64", "unchanged on its way");
    let neighbours = wires.on("host", || {
        let output = Command::new("ip").args(["-6", "neigh", "show", POD, "dev", "eth0"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    });
    assert!(neighbours.contains("lladdr 02:00:00:00:00:11 router"), "{neighbours}");
    assert!(pins.count("ndp_proxy", "answered") >= 1, "{:?}", pins.counters());
    assert!(pins.count("pod_guard", "answered") >= 1, "the pod asked for its gateway: {:?}", pins.counters());
    // A host that wants the address for itself learns that it is taken.
    wires.on("host", || shell(&format!("ip addr add {POD}/64 dev eth0")));
    until("DAD fails on the host", || {
        let output = wires.on("host", || {
            Command::new("ip").args(["-6", "addr", "show", "dev", "eth0", "dadfailed"]).output().unwrap()
        });
        String::from_utf8(output.stdout).unwrap().contains(POD).then_some(())
    });
    assert!(pins.count("ndp_proxy", "answered_dad") >= 1, "{:?}", pins.counters());
    drop(bpf);
}

#[test]
fn a_pods_connection_leaves_with_the_nodes_address_and_outlives_the_agent() {
    if !may_run("wire masquerade") {
        return;
    }
    let pins = Pins::new("wire-masq");
    let wires = Wires::new("masq");
    wires.know_gateway();
    let bpf = wires.on("node", || agent(&pins));
    wires.on("host", || echo_server((HOST_V4, 80).into()));
    let (mut connection, peer, local) = wires.on("pod", || {
        let mut connection = until("a connection to the host", || {
            TcpStream::connect_timeout(&(HOST_V4, 80).into(), PATIENCE / 4).ok()
        });
        let peer = greeting(&mut connection);
        let local = connection.local_addr().unwrap();
        (connection, peer, local)
    });
    assert_eq!(peer.ip(), NODE_V4);
    let pool = Pool::beside(32_768, 60_999);
    let number = pool.number(block::block_of(peer.port().to_be()));
    assert_eq!(number, Some(5), "a port of the pod's home: {}", peer.port());
    assert_eq!(local.ip(), POD_V4);
    // Enough for segmentation offload, without the agent, and over the replacement by a new one.
    drop(bpf);
    transfer(&mut connection);
    let bpf = wires.on("node", || agent(&pins));
    transfer(&mut connection);
    let counters = pins.counters();
    assert_eq!(counters.get(&("masquerade_egress", "new_flow")), Some(&1), "{counters:?}");
    // The guard may have dropped the multicast listener reports of the pod's kernel, which have no source.
    let dropped = counters.keys().any(|(part, name)| *part != "pod_guard" && name.starts_with("drop_"));
    assert!(!dropped, "{counters:?}");
    drop(bpf);
}

/// Sends four megabytes and expects them back.
fn transfer(connection: &mut TcpStream) {
    const BYTES: usize = 4 << 20;
    let sent: Vec<u8> = (0..BYTES).map(|i| ((i * 31) >> 3) as u8).collect();
    let mut writer = connection.try_clone().unwrap();
    let copy = sent.clone();
    let write = thread::spawn(move || writer.write_all(&copy));
    let mut received = vec![0; BYTES];
    connection.read_exact(&mut received).expect("all comes back");
    write.join().unwrap().expect("all is sent");
    assert!(received == sent, "the bytes are those that were sent");
}

#[test]
fn udp_in_fragments_and_icmp_errors_find_their_way() {
    if !may_run("wire fragments") {
        return;
    }
    let pins = Pins::new("wire-frag");
    let wires = Wires::new("frag");
    wires.know_gateway();
    let bpf = wires.on("node", || agent(&pins));
    wires.on("host", || {
        let server = UdpSocket::bind((HOST_V4, 7)).unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 65_536];
            while let Ok((n, peer)) = server.recv_from(&mut buffer) {
                let _ = server.send_to(&buffer[..n], peer);
            }
        });
    });
    wires.on("pod", || {
        let socket = UdpSocket::bind((POD_V4, 4000)).unwrap();
        socket.connect((HOST_V4, 7)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let datagram: Vec<u8> = (0..8_000).map(|i| i as u8).collect();
        let mut answer = vec![0; 9_000];
        until("a datagram in fragments comes back", || {
            socket.send(&datagram).ok()?;
            let n = socket.recv(&mut answer).ok()?;
            (answer[..n] == datagram).then_some(())
        });
        // Nobody listens: the host's ICMP error must reach this socket.
        let socket = UdpSocket::bind((POD_V4, 4001)).unwrap();
        socket.connect((HOST_V4, 9)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        until("the refusal reaches the pod's socket", || {
            let _ = socket.send(b"?");
            let error = socket.recv(&mut answer).err()?;
            (error.kind() == std::io::ErrorKind::ConnectionRefused).then_some(())
        });
    });
    assert!(pins.count("masquerade_ingress", "translated_error") >= 1, "{:?}", pins.counters());
    assert!(pins.count("masquerade_egress", "translated_fragment") >= 5, "{:?}", pins.counters());
    drop(bpf);
}

#[test]
fn a_pod_with_another_address_gets_nowhere() {
    if !may_run("wire guard") {
        return;
    }
    let pins = Pins::new("wire-guard");
    let wires = Wires::new("guard");
    wires.know_gateway();
    let bpf = wires.on("node", || agent(&pins));
    wires.on("pod", || {
        shell("ip addr add 10.254.0.6/32 dev eth0; ip addr add fd12:3456:789a:1::bad/128 dev eth0 nodad")
    });
    wires.on("pod", || {
        let v4 = UdpSocket::bind("10.254.0.6:5000").unwrap();
        let _ = v4.send_to(b"?", (HOST_V4, 7));
        let v6 = UdpSocket::bind("[fd12:3456:789a:1::bad]:5000").unwrap();
        let _ = v6.send_to(b"?", "[fd12:3456:789a:ffff::64]:7");
    });
    let dropped = || ["drop_source_address", "drop_source_ipv4"].map(|name| pins.count("pod_guard", name));
    until("both are dropped", || dropped().iter().all(|count| *count > 0).then_some(()));
    assert_eq!(pins.count("masquerade_egress", "new_flow"), 0, "{:?}", pins.counters());
    drop(bpf);
}
