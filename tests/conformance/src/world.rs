//! The node, its pods and the internet.
//!
//! ```text
//! pod1 ─┐                    lo 198.51.100.2, 198.51.100.3
//! pod2 ─┤ node eth0 ── eth0 net eth1 ── eth0 far
//! pod3 ─┘   192.0.2.11   .1      203.0.113.1    .9, MTU 1300
//! ```
//! `net` is the router and the remotes in one; it knows no way to the pods' private addresses.

use std::{
    cell::Cell,
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use dataplane::{
    Config, Dataplane, Desired, Filtering, Ipv6Exit, MasqueradeBackend, NdpBackend, Pod, Uplink,
};
use hextet_tests::{
    capture::{Capture, Packet},
    command::{Run, ip_batch},
    netns::{self, NetNs},
    wait::wait_until,
};
use tempfile::TempDir;

use crate::Backend;

/// The node's address.
pub const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
/// The router's address on the node's link.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// A remote.
pub const REMOTE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// Another remote.
pub const OTHER_REMOTE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 3);
/// A remote behind a second hop, whose link carries less.
pub const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// The same in IPv6.
pub const FAR_IPV6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 9);
/// What the link to [`FAR`] carries.
pub const FAR_MTU: u16 = 1300;

/// How long anything may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(15);

/// The same for what is known not to come.
const LITTLE_PATIENCE: Duration = Duration::from_secs(2);

thread_local! {
    static IS_LOST: Cell<bool> = const { Cell::new(false) };
}

/// How long to wait for anything in this test.
pub fn patience() -> Duration {
    if IS_LOST.get() { LITTLE_PATIENCE } else { PATIENCE }
}

/// Says whether this thread's test is known to fail, and need not wait for long.
pub(crate) fn expect_failure(is_lost: bool) {
    IS_LOST.set(is_lost);
}

const BPFFS: &str = "/sys/fs/bpf";
const PODS: u8 = 3;

/// Namespaces of one test, gone with it.
pub struct World {
    id: String,
    backend: Backend,
    dir: TempDir,
    private: Option<Capture>,
}

impl World {
    /// Makes the namespaces and lets the dataplane make pods.
    ///
    /// # Panics
    /// When the machine does not let it.
    pub fn new(backend: Backend) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("hxconf-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::tempdir().expect("a folder for the state");
        let mut world = Self { id, backend, dir, private: None };
        world.wire();
        world.start_node();
        // What a pod's kernel says at its start is over before anything is looked at.
        let private = "src net 10.254.0.0/20 or dst net 10.254.0.0/20";
        world.private = Some(Capture::start(&world.net(), "eth0", private).expect("tcpdump runs"));
        world
    }

    /// Which backend it has.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The node.
    pub fn node(&self) -> NetNs {
        self.place("node")
    }

    /// The router and the remotes.
    pub fn net(&self) -> NetNs {
        self.place("net")
    }

    /// The far remote.
    pub fn far(&self) -> NetNs {
        self.place("far")
    }

    /// A pod, counted from 1.
    pub fn pod(&self, n: u8) -> NetNs {
        self.place(&format!("pod{n}"))
    }

    /// Its private address.
    pub fn pod_ipv4(n: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 254, 0, n + 1)
    }

    /// Its address.
    pub fn pod_ipv6(n: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 1, 2, 0xa, u16::from(n), 0, 0xab, 0xcdef)
    }

    /// A count of the programs, zero without them.
    ///
    /// # Panics
    /// When there are pins that cannot be read.
    pub fn count(&self, part: &str, name: &str) -> u64 {
        let counters = Dataplane::counters(&self.bpf_dir()).expect("the counters can be read");
        counters.iter().filter(|c| c.part == part && c.name == name).map(|c| c.count).sum()
    }

    /// Runs a shell script in a place.
    ///
    /// # Panics
    /// When it fails.
    pub fn shell(&self, place: &NetNs, script: &str) {
        let run = Run::new(&["sh", "-ec", script]).inside(place).success();
        run.unwrap_or_else(|e| panic!("{script}: {e:#}"));
    }

    /// Captures in a place.
    ///
    /// # Panics
    /// When tcpdump does not run.
    pub fn capture(&self, place: &NetNs, filter: &str) -> Capture {
        Capture::start(place, "eth0", filter).unwrap_or_else(|e| panic!("{e:#}"))
    }

    /// That no packet with a private address was seen outside of the node, in the whole test.
    ///
    /// # Panics
    /// When there was one.
    pub fn assert_nothing_private_was_seen(&self) {
        let seen =
            self.private.as_ref().expect("it was started").packets().expect("a capture of an Ethernet");
        assert_eq!(seen, Vec::<Packet>::new(), "private addresses outside of the node");
    }

    fn place(&self, name: &str) -> NetNs {
        NetNs::named(format!("{}-{name}", self.id))
    }

    /// Without eBPF it is on no BPF file system, which spares the time to make large maps that nobody uses.
    fn bpf_dir(&self) -> PathBuf {
        match self.backend {
            Backend::Ebpf => PathBuf::from(BPFFS).join(&self.id),
            Backend::Nftables => self.dir.path().join("bpf"),
        }
    }

    fn wire(&self) {
        let (node, net, far) = (self.node(), self.net(), self.far());
        let (node, net, far) = (node.name(), net.name(), far.name());
        let names = [node, net, far].map(|name| format!("netns add {name}"));
        batch(None, &names);
        batch(
            None,
            &[
                format!("link add eth0 netns {node} type veth peer name eth0 netns {net}"),
                format!(
                    "link add eth1 mtu {FAR_MTU} netns {net} type veth peer name eth0 mtu {FAR_MTU} netns {far}"
                ),
            ],
        );
        let settings =
            ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"].map(|key| (key.to_owned(), "1"));
        self.net().set_sysctls(&settings).expect("a router forwards");
        let lines = |text: String| text.lines().map(str::trim).map(str::to_owned).collect::<Vec<_>>();
        batch(
            Some(&self.node()),
            &lines(format!(
                "link set lo up
                 addr add {NODE}/24 dev eth0
                 addr add 2001:db8:1::11/64 dev eth0 nodad
                 link set eth0 up
                 route add default via {ROUTER}
                 route add default via 2001:db8:1::1"
            )),
        );
        batch(
            Some(&self.net()),
            &lines(format!(
                "addr add {ROUTER}/24 dev eth0
                 addr add {REMOTE}/32 dev lo
                 addr add {OTHER_REMOTE}/32 dev lo
                 addr add 203.0.113.1/24 dev eth1
                 addr add 2001:db8:1::1/64 dev eth0 nodad
                 addr add 2001:db8:2::1/64 dev eth1 nodad
                 link set lo up
                 link set eth0 up
                 link set eth1 up
                 route add fd00:1:2::/48 via 2001:db8:1::11"
            )),
        );
        batch(
            Some(&self.far()),
            &lines(format!(
                "addr add {FAR}/24 dev eth0
                 addr add {FAR_IPV6}/64 dev eth0 nodad
                 link set eth0 up
                 route add default via 203.0.113.1
                 route add default via 2001:db8:2::1"
            )),
        );
    }

    fn start_node(&self) {
        mount_bpffs();
        let (config, desired) = (self.config(), self.desired());
        let reconcile = async || {
            let mut dataplane = Dataplane::open(config).await.expect("the kernel can be worked with");
            let done = dataplane.reconcile(&desired).await.expect("the kernel can be read");
            assert!(done.failures.is_empty(), "{:?}", done.failures);
        };
        let as_agent = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(reconcile());
        };
        self.node().run(as_agent).expect("the dataplane comes up");
        // The uplink's own addresses are usable before the first packet of a test needs them.
        let settled = || {
            let run =
                Run::new(&["ip", "-6", "addr", "show", "dev", "eth0", "tentative"]).inside(&self.node());
            run.success().is_ok_and(|text| text.trim().is_empty())
        };
        wait_until(PATIENCE, "the uplink's addresses are settled", settled)
            .unwrap_or_else(|e| panic!("{e:#}"));
    }

    fn config(&self) -> Config {
        let dir = |name: &str| self.dir.path().join(name);
        Config {
            bpf_dir: self.bpf_dir(),
            netns_dir: netns::DIR.into(),
            state_dir: dir("state"),
            rt_protos_dir: dir("rt_protos.d"),
        }
    }

    fn desired(&self) -> Desired {
        let pod = |n| {
            let pod = Pod { address: Self::pod_ipv6(n), ipv4: Self::pod_ipv4(n) };
            (self.pod(n).name().to_owned(), pod)
        };
        let (ndp, masquerade) = match self.backend {
            Backend::Ebpf => (NdpBackend::Ebpf, MasqueradeBackend::Ebpf),
            Backend::Nftables => (NdpBackend::Kernel, MasqueradeBackend::Nftables),
        };
        Desired {
            cluster: "fd00:1:2::/48".parse().expect("a prefix"),
            node: "fd00:1:2:a::/64".parse().expect("a prefix"),
            group: "abcdef".parse().expect("24 bits"),
            pod_ipv4: "10.254.0.0/20".parse().expect("a range"),
            uplink: Uplink { name: "eth0".to_owned(), ipv4: Some(NODE), ..Uplink::default() },
            peers: [].into(),
            pods: (1..=PODS).map(pod).collect(),
            ndp,
            masquerade,
            filtering: Filtering::default(),
            // What is tested here is the way of a pod's own address.
            ipv6_exit: Ipv6Exit::None,
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.private = None;
        for error in dataplane::bpf::Bpf::teardown(&self.bpf_dir()) {
            eprintln!("pins of {}: {error}", self.id);
        }
        let own = |name: &String| name.starts_with(&format!("{}-", self.id));
        for name in netns::list().into_iter().filter(own) {
            if let Err(error) = NetNs::named(name).remove() {
                eprintln!("{error:#}");
            }
        }
    }
}

fn batch(place: Option<&NetNs>, lines: &[String]) {
    ip_batch(place, lines).unwrap_or_else(|e| panic!("{e:#}"));
}

/// As systemd does at boot; it stays, because tests of other processes may use it by now.
fn mount_bpffs() {
    use nix::{
        mount::{MsFlags, mount},
        sys::statfs::{BPF_FS_MAGIC, statfs},
    };
    static MOUNTED: std::sync::Once = std::sync::Once::new();
    MOUNTED.call_once(|| {
        if !statfs(BPFFS).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC) {
            mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
                .expect("bpffs can be mounted");
        }
    });
}
