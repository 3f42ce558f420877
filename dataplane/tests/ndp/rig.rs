//! A LAN of network namespaces on one switch: two nodes, each with an agent's network half at work, and a host that
//! runs nothing of ours.
//!
//! ```text
//! hxndp-<pid>-<n>-a eth0 ──┐
//! hxndp-<pid>-<n>-b eth0 ──┤ hxndp-<pid>-<n>-sw br0
//!    hxndp-<pid>-<n>-host eth0 ──┘
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::{Ipv6Addr, UdpSocket},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use dataplane::{
    Config, Dataplane, Desired, Filtering, Ipv6Exit, MasqueradeBackend, NdpBackend, Op, Pod, Uplink,
    announce::{Announcer, Conflict},
};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};

use crate::support::{Pins, chain};

/// For what takes a loaded machine a while, and a machine that is interpreted still longer (docs/testing.md).
pub(crate) fn patience() -> Duration {
    let scale = std::env::var("HEXTET_TEST_TIME_SCALE").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(20).mul_f64(scale.unwrap_or(1.0))
}

/// Where pods echo datagrams.
pub(crate) const ECHO: u16 = 7;

pub(crate) const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x64];
pub(crate) const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
pub(crate) const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 0x12];

/// A pod's address. All share the solicited-node group of [`group`].
pub(crate) fn pod(n: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 1, 2, 0xa, n, 0, 0xab, 0xcdef)
}

pub(crate) fn group() -> Ipv6Addr {
    "ff02::1:ffab:cdef".parse().unwrap()
}

pub(crate) fn host() -> Ipv6Addr {
    "2001:db8:1::100".parse().unwrap()
}

/// The LAN, gone with it.
pub(crate) struct Lan {
    id: String,
}

impl Lan {
    pub(crate) fn new() -> Lan {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let lan =
            Lan { id: format!("hxndp-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)) };
        lan.switch();
        lan.wire("a", MAC_A, 0x11);
        lan.wire("b", MAC_B, 0x12);
        lan.wire("host", HOST_MAC, 0x100);
        shell(&format!("ip -n {} -6 route add fd00:1:2::/48 dev eth0", lan.name("host")));
        lan
    }

    /// A switch that floods, unless a test makes it snoop.
    fn switch(&self) {
        let sw = self.name("sw");
        shell(&format!(
            "ip netns add {sw}; ip -n {sw} link add br0 type bridge mcast_snooping 0; ip -n {sw} link set br0 up"
        ));
    }

    fn wire(&self, machine: &str, mac: [u8; 6], n: u16) {
        let (ns, sw) = (self.name(machine), self.name("sw"));
        let mac = text(mac);
        let ipv4 = n & 0xff;
        shell(&format!(
            "ip netns add {ns}; ip -n {ns} link set lo up
             ip -n {sw} link add port-{machine} type veth peer name eth0 address {mac} netns {ns}
             ip -n {sw} link set port-{machine} master br0 up; ip -n {ns} link set eth0 up
             ip -n {ns} addr add 192.0.2.{ipv4}/24 dev eth0
             ip -n {ns} addr add 2001:db8:1::{n:x}/64 dev eth0 nodad"
        ));
        until("link-local addresses are settled", || {
            let settled = self.ip(machine, &["-6", "addr", "show", "dev", "eth0", "-tentative"]);
            settled.to_string().contains("fe80").then_some(())
        });
    }

    pub(crate) fn name(&self, machine: &str) -> String {
        format!("{}-{machine}", self.id)
    }

    /// Runs on a thread in the machine's network namespace.
    pub(crate) fn on<T: Send>(&self, machine: &str, body: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let run = || {
                enter(&self.name(machine));
                body()
            };
            scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// What `ip -j` says there.
    pub(crate) fn ip(&self, machine: &str, arguments: &[&str]) -> Value {
        let output =
            Command::new("ip").args(["-n", &self.name(machine), "-j", "-d"]).args(arguments).output();
        serde_json::from_slice(&output.unwrap().stdout).unwrap_or(Value::Null)
    }

    pub(crate) fn run_ip(&self, machine: &str, arguments: &str) {
        shell(&format!("ip -n {} {arguments}", self.name(machine)));
    }

    /// MAC address and state of a neighbour entry.
    pub(crate) fn neighbour(&self, machine: &str, address: Ipv6Addr) -> Option<(String, String)> {
        let rows = self.ip(machine, &["-6", "neigh", "show", &address.to_string(), "dev", "eth0"]);
        let row = rows.as_array()?.first()?;
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Some((word(&row["lladdr"]), word(&row["state"][0])))
    }

    /// Entries of the machine's neighbour table, the kernel's own count.
    pub(crate) fn neighbours(&self, machine: &str) -> usize {
        let rows = self.ip(machine, &["-6", "neigh", "show", "nud", "all", "dev", "eth0"]);
        rows.as_array().map_or(0, Vec::len)
    }

    /// Makes the switch ask who listens to what and send only there, as switches with MLD snooping do.
    pub(crate) fn snoop(&self) {
        self.run_ip(
            "sw",
            "link set br0 type bridge mcast_snooping 1 mcast_querier 1 mcast_query_response_interval 100",
        );
    }

    /// Whether the switch knows that somebody listens to `group`.
    pub(crate) fn snooped(&self, group: Ipv6Addr) -> bool {
        let arguments = ["-n", &self.name("sw"), "-j", "mdb", "show", "dev", "br0"];
        let output = Command::new("bridge").args(arguments).output().unwrap();
        String::from_utf8_lossy(&output.stdout).contains(&format!("\"{group}\""))
    }

    /// One echo request there that is answered.
    pub(crate) fn pings(&self, machine: &str, target: &str) -> bool {
        let netns = format!("--net=/run/netns/{}", self.name(machine));
        let ping = ["ping", "-n", "-c", "1", "-W", "2", target];
        Command::new("nsenter").arg(netns).args(ping).output().unwrap().status.success()
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        if thread::panicking() {
            for machine in ["a", "b", "host"] {
                eprintln!("{machine}: neighbours {}", self.ip(machine, &["-6", "neigh"]));
                eprintln!(
                    "{machine}: addresses {}",
                    self.ip(machine, &["-6", "addr", "show", "dev", "eth0"])
                );
            }
        }
        let names = fs::read_dir("/run/netns")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        for name in names.filter(|name| name.starts_with(&format!("{}-", self.id))) {
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

/// What a node is to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Role {
    pub(crate) machine: &'static str,
    pub(crate) backend: NdpBackend,
    /// Whether addresses are announced at all.
    pub(crate) announces: bool,
    /// Whether they are probed.
    pub(crate) probes: bool,
}

impl Role {
    pub(crate) fn new(machine: &'static str, backend: NdpBackend) -> Role {
        Role { machine, backend, announces: true, probes: false }
    }
}

enum Order {
    Reconcile(Vec<Ipv6Addr>, oneshot::Sender<Vec<Op>>),
    Teardown(oneshot::Sender<()>),
}

/// A node at work on a thread of its own: dataplane and announcer, as in the agent. It ends without cleaning up, as a
/// killed agent does; [`Node::teardown`] takes all down.
pub(crate) struct Node {
    role: Role,
    id: String,
    orders: Option<mpsc::Sender<Order>>,
    thread: Option<JoinHandle<()>>,
    conflicts: Arc<Mutex<Vec<Conflict>>>,
    pins: Arc<Pins>,
    state: Arc<TempDir>,
}

impl Node {
    pub(crate) fn start(lan: &Lan, role: Role) -> Node {
        let pins = Arc::new(Pins::new(&format!("{}-{}", lan.id, role.machine)));
        let mut node = Node {
            role,
            id: lan.name(role.machine),
            orders: None,
            thread: None,
            conflicts: Arc::default(),
            pins,
            state: Arc::new(tempfile::tempdir().unwrap()),
        };
        node.begin();
        node
    }

    fn begin(&mut self) {
        let (orders, inbox) = mpsc::channel(1);
        let (role, id, config) = (self.role, self.id.clone(), self.config());
        let conflicts = self.conflicts.clone();
        let run = move || {
            enter(&id);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work(role, &id, config, inbox, conflicts));
        };
        (self.orders, self.thread) = (Some(orders), Some(thread::spawn(run)));
    }

    fn config(&self) -> Config {
        Config {
            bpf_dir: self.pins.path().into(),
            netns_dir: "/run/netns".into(),
            state_dir: self.state.path().join("state"),
            rt_protos_dir: self.state.path().join("rt_protos.d"),
        }
    }

    fn order<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> T {
        let (answer, answered) = oneshot::channel();
        let orders = self.orders.as_ref().expect("the node is at work");
        orders.blocking_send(order(answer)).unwrap_or_else(|_| panic!("{} has ended", self.id));
        answered.blocking_recv().unwrap_or_else(|_| panic!("{} has failed", self.id))
    }

    /// Has these pods and no others; what was done.
    pub(crate) fn reconcile(&self, pods: &[Ipv6Addr]) -> Vec<Op> {
        self.order(|answer| Order::Reconcile(pods.to_vec(), answer))
    }

    /// Ends, as if killed, and starts again.
    pub(crate) fn restart(&mut self) {
        self.end();
        self.begin();
    }

    fn end(&mut self) {
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "the node's thread has panicked");
        }
    }

    pub(crate) fn teardown(&self) {
        self.order(Order::Teardown);
    }

    pub(crate) fn count(&self, counter: &str) -> u64 {
        self.pins.count("ndp_proxy", counter)
    }

    pub(crate) fn counters(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        self.pins.counters()
    }

    /// The conflicts since the last call.
    pub(crate) fn conflicts(&self) -> Vec<Conflict> {
        std::mem::take(&mut self.conflicts.lock().unwrap())
    }

    /// The namespace of its pod with this address.
    pub(crate) fn pod_namespace(&self, address: Ipv6Addr) -> String {
        pod_id(&self.id, address)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
    }
}

fn pod_id(node: &str, address: Ipv6Addr) -> String {
    format!("{node}-p{}", address.segments()[4])
}

async fn work(
    role: Role,
    id: &str,
    config: Config,
    mut inbox: mpsc::Receiver<Order>,
    conflicts: Arc<Mutex<Vec<Conflict>>>,
) {
    let mut dataplane = Dataplane::open(config).await.unwrap();
    let (mut announcer, mut heard) = Announcer::new();
    loop {
        let order = tokio::select! {
            order = inbox.recv() => order,
            Some(conflict) = heard.recv() => {
                conflicts.lock().unwrap().push(conflict);
                continue;
            }
        };
        match order {
            None => return,
            Some(Order::Reconcile(pods, answer)) => {
                let desired = desired(role, id, &pods);
                let reconciled = dataplane.reconcile(&desired).await.unwrap();
                let failures: Vec<_> =
                    reconciled.failures.iter().map(|(op, e)| format!("{op}: {}", chain(e))).collect();
                assert!(failures.is_empty(), "{failures:#?}");
                if role.announces {
                    announcer.reconciled(&desired, &reconciled, role.probes).unwrap();
                }
                let _ = answer.send(reconciled.ops);
            }
            Some(Order::Teardown(answer)) => {
                let failures = dataplane.teardown().await.unwrap();
                assert!(failures.is_empty(), "{failures:?}");
                let _ = answer.send(());
            }
        }
    }
}

fn desired(role: Role, id: &str, pods: &[Ipv6Addr]) -> Desired {
    let node = if role.machine == "a" { "fd00:1:2:a::/64" } else { "fd00:1:2:b::/64" };
    let ipv4 = |address: &Ipv6Addr| format!("10.254.0.{}", address.segments()[4]).parse().unwrap();
    let pod = |address: &Ipv6Addr| (pod_id(id, *address), Pod { address: *address, ipv4: ipv4(address) });
    Desired {
        cluster: "fd00:1:2::/48".parse().unwrap(),
        node: node.parse().unwrap(),
        group: "abcdef".parse().unwrap(),
        pod_ipv4: "10.254.0.0/20".parse().unwrap(),
        uplink: Uplink {
            name: "eth0".to_owned(),
            on_link: ["2001:db8:1::/64".parse().unwrap()].into(),
            ..Uplink::default()
        },
        peers: BTreeMap::new(),
        pods: pods.iter().map(pod).collect(),
        ndp: role.backend,
        masquerade: MasqueradeBackend::Ebpf,
        filtering: Filtering::default(),
        ipv6_exit: Ipv6Exit::default(),
    }
}

/// Echoes datagrams in a namespace until it is dropped.
pub(crate) struct Echo {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    pub(crate) fn start(namespace: &str) -> Echo {
        let ended = Arc::new(AtomicBool::new(false));
        let (namespace, end) = (namespace.to_owned(), ended.clone());
        let thread = thread::spawn(move || {
            enter(&namespace);
            let socket = UdpSocket::bind(("::", ECHO)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let mut buffer = [0; 64];
            while !end.load(Ordering::Relaxed) {
                if let Ok((n, peer)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&buffer[..n], peer);
                }
            }
        });
        Echo { ended, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits until a condition holds, and fails with what it was when it does not.
pub(crate) fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {:?}: {what}", patience());
        thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn enter(namespace: &str) {
    let netns = File::open(format!("/run/netns/{namespace}")).expect("the namespace exists");
    setns(netns, CloneFlags::CLONE_NEWNET).expect("the namespace can be entered");
}

pub(crate) fn shell(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().expect("there is a shell");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
