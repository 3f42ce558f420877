//! Bringing a testbed up, finding one that is up, and taking it down without a trace.
//!
//! Everything that is made has a name from which [`down`] finds it again, so nothing that a crash left
//! behind depends on a record: namespaces by prefix, pods' namespaces by the aliases of the nodes' links and
//! the nodes' own state, processes by the namespace they live in, pins and files by their folder.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use crate::command::{Output, Run, ip_batch_holding};
use crate::lan::Choices;
use crate::machine::{self, Lock};
use crate::netns::{self, NetNs};
use crate::process::{Daemon, end_all_in};
use crate::progress::Progress;
use crate::topology::{self, Place, Prefix};

/// How long processes have between being asked to end and being killed.
const GRACE: Duration = Duration::from_millis(300);

/// What to bring up.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Options {
    /// How many nodes, 1 to [`topology::NODES_MAX`].
    pub nodes: u8,
    /// Whether a server and agents run on it.
    pub cluster: bool,
    /// More arguments of `netctl server`.
    pub server_args: Vec<String>,
    /// More arguments of `netctl node`.
    pub node_args: Vec<String>,
    /// LAN mode: pods have addresses of the LAN, which its other hosts learn from the router.
    #[serde(default)]
    pub lan: bool,
    /// In LAN mode, what nodes choose by number that do not take the cluster's prefix: `own`, or another.
    #[serde(default)]
    pub pod_prefixes: Choices,
}

impl Default for Options {
    fn default() -> Self {
        let (server_args, node_args, pod_prefixes) = Default::default();
        Self { nodes: 3, cluster: true, server_args, node_args, lan: false, pod_prefixes }
    }
}

/// A testbed that is up.
#[derive(Debug)]
pub struct Testbed {
    pub(crate) prefix: Prefix,
    pub(crate) options: Options,
    pub(crate) dir: PathBuf,
    pub(crate) progress: Progress,
    down_on_drop: bool,
}

impl Testbed {
    /// Brings a testbed up, or makes one that is up whole again. It stays until [`down`].
    ///
    /// # Errors
    /// Says what is missing on this machine or what failed.
    pub fn up(prefix: Prefix, options: Options, progress: Progress) -> Result<Self> {
        check_machine(&options)?;
        let lock = Lock::of(&prefix)?;
        let options = merge(&prefix, options)?;
        progress.step("what the machine must have", || machine::borrow(&prefix))?;
        let dir = machine::dir(&prefix);
        let testbed = Self { prefix, options, dir, progress, down_on_drop: false };
        testbed.save()?;
        let made = progress.step("namespaces, cables, addresses", || testbed.make_network(&lock))?;
        progress.step("servers on the internet", || testbed.start_echo())?;
        if !made.is_empty() {
            progress.say(&format!("  made: {}", made.join(", ")));
        }
        if testbed.options.lan {
            progress.step("the router advertises the LAN's prefix", || testbed.start_lan())?;
        }
        if testbed.options.cluster {
            testbed.start_cluster(&lock)?;
        }
        drop(lock);
        Ok(testbed)
    }

    /// The testbed with this prefix that is up.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(prefix: Prefix) -> Result<Self> {
        let dir = machine::dir(&prefix);
        let Some(options) = load(&prefix)? else {
            bail!("no testbed {prefix} is up: `cargo xtask testbed up` makes one");
        };
        Ok(Self { prefix, options, dir, progress: Progress::Told, down_on_drop: false })
    }

    /// Makes the end of this value the end of the testbed.
    pub fn down_on_drop(mut self) -> Self {
        self.down_on_drop = true;
        self
    }

    /// Leaves the testbed as it is when this value ends.
    pub fn keep(&mut self) {
        self.down_on_drop = false;
    }

    /// Its prefix.
    pub fn prefix(&self) -> &Prefix {
        &self.prefix
    }

    /// What it was brought up with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The folder of its files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The names of its nodes.
    pub fn nodes(&self) -> Vec<String> {
        (1..=self.options.nodes).map(|number| Place::Node(number).to_string()).collect()
    }

    /// The namespace of a place (`n1`, `client`), or of a pod by its id.
    pub fn netns(&self, name: &str) -> NetNs {
        match Place::parse(name) {
            Some(_) => self.prefix.netns(name),
            None => NetNs::named(name),
        }
    }

    /// A program to run in a place or a pod.
    pub fn run_in(&self, place: &str, args: &[&str]) -> Run {
        Run::new(args).inside(&self.netns(place))
    }

    /// Runs a program in a place or a pod, to its end.
    ///
    /// # Errors
    /// When it cannot be started or takes too long.
    pub fn in_ns(&self, place: &str, args: &[&str]) -> Result<Output> {
        self.run_in(place, args).output()
    }

    /// The servers of `wan`.
    pub fn echo(&self) -> Daemon {
        Daemon::new("echo", self.netns("wan"), &self.dir.join("wan"))
    }

    /// Makes what is missing of the network and says what that was.
    fn make_network(&self, lock: &Lock) -> Result<Vec<String>> {
        let mut made = self.make_namespaces(lock)?;
        made.extend(self.make_cables(lock)?);
        for place in topology::places(self.options.nodes) {
            let netns = self.prefix.netns(&place.to_string());
            netns.set_sysctls(&topology::sysctls(place))?;
            ip_batch_holding(lock, Some(&netns), &self.setup_lines(place))?;
        }
        Ok(made)
    }

    fn setup_lines(&self, place: Place) -> Vec<String> {
        topology::setup_lines(place, self.options.nodes, self.options.lan)
    }

    fn make_namespaces(&self, lock: &Lock) -> Result<Vec<String>> {
        let places = topology::places(self.options.nodes);
        let all = places.iter().map(|place| self.prefix.netns(&place.to_string()));
        let missing: Vec<NetNs> = all.filter(|netns| netns.identity().is_none()).collect();
        for leftover in &missing {
            leftover.remove()?;
        }
        let lines: Vec<String> = missing.iter().map(|netns| format!("netns add {}", netns.name())).collect();
        ip_batch_holding(lock, None, &lines)?;
        Ok(missing.iter().map(|netns| netns.name().to_owned()).collect())
    }

    fn make_cables(&self, lock: &Lock) -> Result<Vec<String>> {
        let switch = self.prefix.netns("sw");
        if !switch.has_link("br0") {
            ip_batch_holding(lock, Some(&switch), &[topology::BRIDGE_LINE.to_owned()])?;
        }
        let present = |(place, link): &(Place, String)| self.prefix.netns(&place.to_string()).has_link(link);
        let missing: Vec<_> =
            topology::cables(self.options.nodes).into_iter().filter(|cable| !present(&cable.a)).collect();
        // Settings named `default` are for interfaces that do not exist yet.
        for place in missing.iter().flat_map(|cable| [cable.a.0, cable.b.0]).collect::<BTreeSet<_>>() {
            self.prefix.netns(&place.to_string()).set_sysctls(&topology::sysctls(place))?;
        }
        let lines: Vec<String> = missing.iter().map(|cable| cable.line(&self.prefix)).collect();
        ip_batch_holding(lock, None, &lines)?;
        Ok(missing.iter().map(|cable| format!("cable {}-{}", cable.a.0, cable.b.0)).collect())
    }

    fn start_echo(&self) -> Result<()> {
        let echo = self.echo();
        if echo.pid().is_some() {
            return Ok(());
        }
        let mut command = Command::new(program_beside_us("testbed")?);
        command.arg("echo");
        let before = echo.log_len();
        echo.start(command)?;
        echo.wait_ready(Duration::from_secs(10), before, || echo.log_since(before).contains("echo serves"))
    }

    fn save(&self) -> Result<()> {
        let path = record(&self.prefix);
        let fresh = path.with_extension("new");
        std::fs::write(&fresh, serde_json::to_vec_pretty(&self.options)?)
            .and_then(|()| std::fs::rename(&fresh, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        if !self.down_on_drop {
            return;
        }
        if std::thread::panicking() {
            crate::report::print(self);
        }
        for failure in down(&self.prefix) {
            self.progress.say(&format!("error: {failure:#}"));
        }
    }
}

/// Removes every trace of a testbed, whatever state it is in. Goes on after a failure and returns them all.
pub fn down(prefix: &Prefix) -> Vec<anyhow::Error> {
    let lock = match Lock::of(prefix) {
        Ok(lock) => lock,
        Err(e) => return vec![e],
    };
    let end = |all: &[NetNs]| end_all_in(&all.iter().filter_map(NetNs::identity).collect(), GRACE).err();
    let ours = owned_namespaces(prefix);
    // Agents first: one that lives makes pods that nobody knows of yet.
    let mut failures: Vec<anyhow::Error> = end(&ours).into_iter().collect();
    let pods = pod_namespaces(prefix, &ours);
    failures.extend(end(&pods));
    let all: Vec<NetNs> = pods.into_iter().chain(ours).collect();
    failures.extend(all.iter().filter_map(|netns| netns.remove().err()));
    failures.extend(remove_pins(prefix));
    failures.extend(machine::give_back(prefix, lock));
    failures
}

/// Whether anything of a testbed is there.
pub fn exists(prefix: &Prefix) -> bool {
    !owned_namespaces(prefix).is_empty() || machine::dir(prefix).exists()
}

/// A program of this build: beside the one that runs, or, for a test, in the folder above it.
///
/// # Errors
/// Says how to build it.
pub fn program_beside_us(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe().context("cannot find the program that runs")?;
    let found = exe.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| {
        format!("{name} is not built beside {}: `cargo xtask build` builds it", exe.display())
    })
}

/// The `netctl` that is tested: `$HEXTET_NETCTL`, or the one of this build.
///
/// # Errors
/// Says how to build it.
pub fn netctl_program() -> Result<PathBuf> {
    match std::env::var_os("HEXTET_NETCTL") {
        Some(path) => Ok(PathBuf::from(path)),
        None => program_beside_us("netctl"),
    }
}

/// What this machine lacks for a testbed; none when it has all.
pub fn lacks(cluster: bool) -> Option<String> {
    if !Uid::effective().is_root() {
        return Some("root: namespaces and interfaces cannot be made without it".into());
    }
    if !Path::new("/proc/self/ns/net").exists() {
        return Some("a kernel with network namespaces (CONFIG_NET_NS)".into());
    }
    if program("ip").is_none() {
        return Some("the program `ip` (apt-get install iproute2)".into());
    }
    if cluster && !Path::new(machine::BPFFS).exists() {
        return Some("a kernel with BPF (CONFIG_BPF_SYSCALL)".into());
    }
    None
}

/// Where a program is on the search path.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    dirs.map(|dir| dir.join(name)).find(|path| path.is_file())
}

fn check_machine(options: &Options) -> Result<()> {
    if let Some(missing) = lacks(options.cluster) {
        bail!("a testbed needs {missing}");
    }
    if !(1..=topology::NODES_MAX).contains(&options.nodes) {
        bail!("a testbed has 1 to {} nodes, not {}", topology::NODES_MAX, options.nodes);
    }
    if options.cluster {
        netctl_program()?;
    }
    if options.lan && program("radvd").is_none() {
        bail!("a testbed in LAN mode needs the program `radvd` (apt-get install radvd)");
    }
    Ok(())
}

/// The options of a testbed that is up go on: it may only get a cluster that it had not.
fn merge(prefix: &Prefix, wanted: Options) -> Result<Options> {
    let Some(running) = load(prefix)? else { return Ok(wanted) };
    if running.nodes != wanted.nodes {
        bail!(
            "the testbed {prefix} is up with {} nodes, not {}: take it down first",
            running.nodes,
            wanted.nodes
        );
    }
    if running.lan != wanted.lan {
        let is = if running.lan { "" } else { "not " };
        bail!("the testbed {prefix} is up, and {is}in LAN mode: take it down first");
    }
    Ok(Options { cluster: running.cluster || wanted.cluster, ..wanted })
}

fn record(prefix: &Prefix) -> PathBuf {
    machine::dir(prefix).join("testbed.json")
}

fn load(prefix: &Prefix) -> Result<Option<Options>> {
    let path = record(prefix);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    let options = serde_json::from_str(&text);
    options.map(Some).with_context(|| format!("{} is damaged: take the testbed down", path.display()))
}

fn owned_namespaces(prefix: &Prefix) -> Vec<NetNs> {
    netns::list().into_iter().filter(|name| prefix.owns(name)).map(NetNs::named).collect()
}

/// The namespaces of pods of these nodes: their links' aliases name them, and so do folders in the nodes'
/// state, which also know those whose link is already, or not yet, there.
fn pod_namespaces(prefix: &Prefix, ours: &[NetNs]) -> Vec<NetNs> {
    let is_node = |netns: &&NetNs| netns.name().contains("-n");
    let mut names: BTreeSet<String> =
        ours.iter().filter(is_node).filter(|netns| netns.identity().is_some()).flat_map(aliases).collect();
    collect_names(&machine::dir(prefix), 4, &mut names);
    let present: BTreeSet<String> = netns::list().into_iter().collect();
    names
        .intersection(&present)
        .filter(|name| !prefix.owns(name))
        .filter(|name| !is_place_of_another(name))
        .map(NetNs::named)
        .collect()
}

fn is_place_of_another(name: &str) -> bool {
    machine::testbeds().iter().any(|other| other.owns(name))
}

/// The aliases of the links in a namespace.
fn aliases(netns: &NetNs) -> Vec<String> {
    #[derive(Deserialize)]
    struct Link {
        #[serde(default)]
        ifalias: Option<String>,
    }
    let output = Run::new(&["ip", "-j", "link", "show"]).inside(netns).success().unwrap_or_default();
    let links: Vec<Link> = serde_json::from_str(&output).unwrap_or_default();
    links.into_iter().filter_map(|link| link.ifalias).collect()
}

/// Names of folders and files (without what follows a dot) down to `depth` folders below `dir`.
fn collect_names(dir: &Path, depth: usize, names: &mut BTreeSet<String>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        names.insert(name.split('.').next().unwrap_or_default().to_owned());
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_names(&entry.path(), depth - 1, names);
        }
    }
}

fn remove_pins(prefix: &Prefix) -> Vec<anyhow::Error> {
    let Ok(entries) = std::fs::read_dir(machine::PINS) else { return Vec::new() };
    let ours = entries.flatten().filter(|entry| prefix.owns(&entry.file_name().to_string_lossy()));
    ours.filter_map(|entry| {
        let path = entry.path();
        let removed = std::fs::remove_dir_all(&path);
        removed.with_context(|| format!("cannot remove the pins {}", path.display())).err()
    })
    .collect()
}
