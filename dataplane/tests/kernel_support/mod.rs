//! A node and a LAN host as two network namespaces with a cable between them, and eyes to look at them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use dataplane::{
    Config, Dataplane, Desired, Filtering, Ipv6Exit, MasqueradeBackend, NdpBackend, Op, Pod, Reconciled,
    Uplink,
};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use tempfile::TempDir;

#[path = "../bpf/bpffs.rs"]
mod bpffs;

use bpffs::{BPFFS, mount_bpffs};

/// Says on stderr that a test was skipped and why.
pub(crate) fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    eprintln!("SKIPPED {test}: {reason}");
}

pub(crate) fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip("needs root");
    }
    root
}

/// A node's namespace, wired to a LAN host's.
pub(crate) struct Lan {
    pub(crate) node: String,
    pub(crate) host: String,
    id: String,
    dir: TempDir,
}

impl Lan {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("hxB-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let lan = Self {
            node: format!("{id}-node"),
            host: format!("{id}-lan"),
            id,
            dir: tempfile::tempdir().unwrap(),
        };
        lan.wire();
        lan
    }

    fn wire(&self) {
        let (node, host) = (&self.node, &self.host);
        for ns in [node, host] {
            run("ip", &["netns", "add", ns]);
            run("ip", &["-n", ns, "link", "set", "lo", "up"]);
        }
        run(
            "ip",
            &["-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", "lan0", "netns", host],
        );
        for (ns, dev, n) in [(node, "eth0", 11), (host, "lan0", 100)] {
            run("ip", &["-n", ns, "addr", "add", &format!("192.0.2.{n}/24"), "dev", dev]);
            run("ip", &["-n", ns, "addr", "add", &format!("2001:db8:1::{n}/64"), "dev", dev, "nodad"]);
            run("ip", &["-n", ns, "link", "set", dev, "up"]);
        }
        run("ip", &["-n", node, "-6", "route", "add", "default", "via", "2001:db8:1::100", "dev", "eth0"]);
        run("ip", &["-n", node, "route", "add", "default", "via", "192.0.2.100", "dev", "eth0"]);
        run("ip", &["-n", host, "-6", "route", "add", "fd00:1:2::/48", "dev", "lan0"]);
        wait_until("link-local addresses are settled", || {
            has_settled_link_local(node, "eth0") && has_settled_link_local(host, "lan0")
        });
    }

    /// A pod's ID that no other test has.
    pub(crate) fn pod(&self, n: usize) -> String {
        format!("{}-pod{n}", self.id)
    }

    /// Kernel backends and `pods` pods.
    pub(crate) fn desired(&self, pods: usize) -> Desired {
        Desired {
            cluster: "fd00:1:2::/48".parse().unwrap(),
            node: "fd00:1:2:a::/64".parse().unwrap(),
            group: "abcdef".parse().unwrap(),
            pod_ipv4: "10.254.0.0/20".parse().unwrap(),
            uplink: Uplink {
                name: "eth0".to_owned(),
                ipv4: Some("192.0.2.11".parse().unwrap()),
                sources: BTreeMap::new(),
                global: Some("2001:db8:1::11".parse().unwrap()),
                on_link: BTreeSet::from(["2001:db8:1::/64".parse().unwrap()]),
            },
            peers: [("fd00:1:2:b::/64".parse().unwrap(), "2001:db8:1::12".parse().unwrap())].into(),
            pods: (1..=pods).map(|n| (self.pod(n), pod(n))).collect(),
            filtering: Filtering::default(),
            ipv6_exit: Ipv6Exit::default(),
            ndp: NdpBackend::Kernel,
            masquerade: MasqueradeBackend::Nftables,
        }
    }

    /// Folders of this test alone; the BPF folder is on no BPF file system.
    pub(crate) fn config(&self) -> Config {
        let dir = |name: &str| self.dir.path().join(name);
        Config {
            bpf_dir: dir("bpf"),
            netns_dir: "/run/netns".into(),
            state_dir: dir("state"),
            rt_protos_dir: dir("rt_protos.d"),
        }
    }

    /// Like [`Lan::config`], on the BPF file system.
    pub(crate) fn bpf_config(&self) -> Config {
        mount_bpffs();
        Config { bpf_dir: Path::new(BPFFS).join(&self.id), ..self.config() }
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Runs `test` in the node's namespace, on a thread with a runtime of its own, as an agent would.
    pub(crate) fn as_node<T: Send>(&self, test: impl AsyncFnOnce() -> T + Send) -> T {
        let netns = Path::new("/run/netns").join(&self.node);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(File::open(netns).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(test())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for arguments in [["link"], ["route"], ["neigh"]] {
                eprintln!("{} {arguments:?}: {}", self.node, ip(&self.node, &arguments));
            }
            eprintln!("routes: {}", ip(&self.node, &["-6", "route"]));
        }
        // Of a test that failed before it took all down.
        for error in dataplane::bpf::Bpf::teardown(&Path::new(BPFFS).join(&self.id)) {
            eprintln!("pins of {}: {}", self.id, chain(&error));
        }
        let entries = fs::read_dir("/run/netns").unwrap().map(|entry| entry.unwrap().file_name());
        for name in entries.filter_map(|name| name.into_string().ok()) {
            if name.starts_with(&format!("{}-", self.id)) {
                let _ = Command::new("ip").args(["netns", "del", &name]).status();
            }
        }
    }
}

pub(crate) fn pod(n: usize) -> Pod {
    Pod {
        address: format!("fd00:1:2:a:{n:x}:0:ab:cdef").parse().unwrap(),
        ipv4: format!("10.254.{}.{}", n / 250, n % 250 + 1).parse().unwrap(),
    }
}

/// Reconciles and insists that nothing fails.
pub(crate) async fn reconcile(dataplane: &mut Dataplane, desired: &Desired) -> String {
    let Reconciled { ops, failures, .. } = dataplane.reconcile(desired).await.unwrap();
    let failures: Vec<_> = failures.iter().map(|(op, error)| format!("{op}: {}", chain(error))).collect();
    assert!(failures.is_empty(), "{failures:#?}");
    text(&ops)
}

pub(crate) fn text(ops: &[Op]) -> String {
    ops.iter().map(|op| format!("{op}\n")).collect()
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Runs a program that must succeed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a program in a namespace, without the remounting of /sys that `ip netns exec` does.
pub(crate) fn succeeds_in(ns: &str, program: &str, arguments: &[&str]) -> bool {
    let netns = format!("--net=/run/netns/{ns}");
    Command::new("nsenter").args([&netns, program]).args(arguments).output().unwrap().status.success()
}

pub(crate) fn pings(ns: &str, target: &str) -> bool {
    succeeds_in(ns, "ping", &["-c", "1", "-W", "5", target])
}

/// What `ip -j` says in a namespace.
pub(crate) fn ip(ns: &str, arguments: &[&str]) -> Value {
    let output = Command::new("ip").args(["-n", ns, "-j", "-d"]).args(arguments).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

fn has_settled_link_local(ns: &str, dev: &str) -> bool {
    let shown = |filter: &[&str]| ip(ns, &[&["-6", "addr", "show", "dev", dev], filter].concat()).to_string();
    shown(&[]).contains("fe80") && !shown(&["tentative"]).contains("fe80")
}

/// Everything that a node could have changed in a namespace.
pub(crate) fn snapshot(ns: &str) -> BTreeMap<String, String> {
    let views: [&[&str]; 7] = [
        &["link"],
        &["addr"],
        &["-4", "route", "show", "table", "all"],
        &["-6", "route", "show", "table", "all"],
        &["neigh", "show", "nud", "permanent"],
        &["-6", "neigh", "show", "proxy"],
        &["rule"],
    ];
    let mut snapshot: BTreeMap<_, _> =
        views.iter().map(|view| (format!("ip {}", view.join(" ")), stable(ip(ns, view)))).collect();
    snapshot.insert(
        "nft".to_owned(),
        run("nsenter", &[&format!("--net=/run/netns/{ns}"), "nft", "list", "ruleset"]),
    );
    let sysctls =
        ["conf", "neigh"].map(|kind| format!("/proc/sys/net/ipv6/{kind} /proc/sys/net/ipv4/{kind}"));
    for folder in sysctls {
        let script = format!("grep -r . {folder} 2>/dev/null | grep -v stable_secret | sort");
        let text = run("nsenter", &[&format!("--net=/run/netns/{ns}"), "sh", "-c", &script]);
        snapshot.extend(
            text.lines().filter_map(|line| line.split_once(':')).map(|(k, v)| (k.to_owned(), v.to_owned())),
        );
    }
    snapshot
}

/// Without what changes by itself.
fn stable(mut value: Value) -> String {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(map) => {
                let moving =
                    ["valid_life_time", "preferred_life_time", "used", "refcnt", "stats64", "expires"];
                moving.iter().for_each(|key| drop(map.remove(*key)));
                map.values_mut().for_each(strip);
            }
            Value::Array(values) => values.iter_mut().for_each(strip),
            _ => {}
        }
    }
    strip(&mut value);
    serde_json::to_string_pretty(&value).unwrap()
}

/// Waits for a condition, not for a time.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !condition() {
        assert!(Instant::now() < deadline, "deadline passed before: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
