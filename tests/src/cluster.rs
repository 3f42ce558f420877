//! The cluster on a testbed: the server in n1, an agent in each node, and `netctl` as a user types it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use crate::command::{Output, Run, ip_batch_holding};
use crate::machine::{self, Lock};
use crate::netns::NetNs;
use crate::process::{Daemon, end_all_in};
use crate::testbed::{Testbed, netctl_program};
use crate::topology::Place;
use crate::wait::{scaled, wait_for};

/// The server's port.
pub const SERVER_PORT: u16 = 4679;
/// A node's lease, as `netctl server` has it by itself.
const LEASE: Duration = Duration::from_secs(5);
/// How long a node may take from its start to `ready`.
const NODE_READY: Duration = Duration::from_secs(20);

/// A pod as `netctl pods` shows it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pod {
    /// Its id, which is also its namespace's name.
    pub id: String,
    /// The node that it is on; empty while it has none.
    pub node: String,
    /// Its address; none while it has no node.
    pub address: Option<Ipv6Addr>,
    /// `running`, `starting`, ...
    pub phase: String,
}

impl Pod {
    /// Its address.
    ///
    /// # Panics
    /// When it has none: ask only pods that run.
    pub fn address(&self) -> Ipv6Addr {
        self.address.unwrap_or_else(|| panic!("pod {} has no address", self.id))
    }
}

/// The server's process.
#[derive(Clone, Debug)]
pub struct Server {
    daemon: Daemon,
    command: ServerCommand,
}

#[derive(Clone, Debug)]
struct ServerCommand {
    dir: PathBuf,
    args: Vec<String>,
    environment: Vec<(String, OsString)>,
}

impl Server {
    /// The same server, to be started with more in its environment.
    #[must_use]
    pub fn with_environment(mut self, more: &[(String, OsString)]) -> Server {
        self.command.environment.extend_from_slice(more);
        self
    }

    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// With what it said, when it does not.
    pub fn start(&self) -> Result<()> {
        let mut command = Command::new(netctl_program()?);
        command.arg("server");
        command.arg("--state-dir").arg(self.command.dir.join("server"));
        command.arg("--socket").arg(socket(&self.command.dir));
        command.arg("--advertise").arg(format!("[{}]:{SERVER_PORT}", n1_address()));
        if !self.command.args.iter().any(|arg| arg == "--lease") {
            // On an emulated machine an agent takes longer than the usual lease to start anew.
            command.arg("--lease").arg(format!("{}s", scaled(LEASE).as_secs()));
        }
        command.args(&self.command.args);
        command.envs(self.command.environment.iter().map(|(k, v)| (k, v)));
        let before = self.daemon.log_len();
        self.daemon.start(command)?;
        self.daemon.wait_ready(Duration::from_secs(10), before, || self.answers())
    }

    /// Ends it as a power failure would.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill9(&self) -> Result<()> {
        self.daemon.kill9()
    }

    /// Its process, if it lives.
    pub fn pid(&self) -> Option<Pid> {
        self.daemon.pid()
    }

    /// Its process as a daemon with a log.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    fn answers(&self) -> bool {
        netctl_at(&self.command.dir, &["nodes"]).is_ok_and(|output| output.ok())
    }
}

/// The agent of one node.
#[derive(Clone, Debug)]
pub struct Agent {
    node: String,
    daemon: Daemon,
    dir: PathBuf,
    testbed_dir: PathBuf,
    environment: Vec<(String, OsString)>,
    args: Vec<String>,
}

impl Agent {
    /// The same agent, to be started with more in its environment.
    #[must_use]
    pub fn with_environment(mut self, more: &[(String, OsString)]) -> Agent {
        self.environment.extend_from_slice(more);
        self
    }

    /// The same agent, to be started with more arguments.
    #[must_use]
    pub fn with_args(&self, more: &[&str]) -> Agent {
        let args = self.args.iter().cloned().chain(more.iter().map(|&arg| arg.to_owned()));
        Agent { args: args.collect(), ..self.clone() }
    }

    /// Starts it, with a token when it has not joined yet.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self) -> Result<()> {
        let token = if self.has_joined() { None } else { Some(self.token()?) };
        self.start_with(token.as_deref())
    }

    /// Starts it with this token, or none.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_with(&self, token: Option<&str>) -> Result<()> {
        let mut command = Command::new(netctl_program()?);
        command.arg("node").args(["--name", &self.node]);
        command.args(token.into_iter().flat_map(|token| ["--join", token]));
        command.args(&self.args).envs(self.environment.iter().map(|(k, v)| (k, v)));
        std::fs::create_dir_all(&self.dir)?;
        self.daemon.start(command)?;
        Ok(())
    }

    /// Starts it and waits until it says that it is ready.
    ///
    /// # Errors
    /// With what it said, when it is not.
    pub fn start_until_ready(&self) -> Result<()> {
        let before = self.daemon.log_len();
        self.start()?;
        self.daemon
            .wait_ready(NODE_READY, before, || self.daemon.log_since(before).contains("node ready"))?;
        self.note_joined()
    }

    /// Ends it as a power failure would.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill9(&self) -> Result<()> {
        self.daemon.kill9()
    }

    /// Asks it to end.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub fn terminate(&self) -> Result<()> {
        self.daemon.stop(Signal::SIGTERM)
    }

    /// All that it said.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// Its process as a daemon with a log.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// Its process, if it lives.
    pub fn pid(&self) -> Option<Pid> {
        self.daemon.pid()
    }

    /// The folder of its state, run files and log.
    pub fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    fn token(&self) -> Result<String> {
        let output = netctl_at(&self.testbed_dir, &["token", "--for", "node", "--name", &self.node])?;
        Ok(output.success()?.trim().to_owned())
    }

    fn has_joined(&self) -> bool {
        self.dir.join("joined").exists()
    }

    fn note_joined(&self) -> Result<()> {
        std::fs::write(self.dir.join("joined"), "").context("cannot note that the node has joined")
    }
}

impl Testbed {
    /// Whether a server and agents belong to it.
    pub fn has_cluster(&self) -> bool {
        self.options.cluster
    }

    /// The server.
    pub fn server(&self) -> Server {
        Server {
            daemon: Daemon::new("server", self.netns("n1"), &self.dir),
            command: ServerCommand {
                dir: self.dir.clone(),
                args: self.options.server_args.clone(),
                environment: Vec::new(),
            },
        }
    }

    /// The agent of a node.
    pub fn agent(&self, node: &str) -> Agent {
        let dir = self.dir.join(node);
        Agent {
            node: node.to_owned(),
            daemon: Daemon::new("agent", self.netns(node), &dir),
            dir,
            testbed_dir: self.dir.clone(),
            environment: self.environment(node),
            args: self.node_args(node),
        }
    }

    fn node_args(&self, node: &str) -> Vec<String> {
        let mut choices = self.options.pod_prefixes.iter();
        let chosen = choices.find(|(number, _)| Place::Node(**number).to_string() == node);
        let words = chosen.map(|(_, prefix)| ["--pod-prefix".to_owned(), prefix.clone()]);
        self.options.node_args.iter().cloned().chain(words.into_iter().flatten()).collect()
    }

    /// What `netctl` needs to find the server, and the agent of `place` when that is a node.
    pub fn environment(&self, place: &str) -> Vec<(String, OsString)> {
        if !self.options.cluster {
            return Vec::new();
        }
        let mut all = vec![("HEXTET_SOCKET".to_owned(), socket(&self.dir).into_os_string())];
        if let Some(Place::Node(_)) = Place::parse(place) {
            let dir = self.dir.join(place);
            let pins = PathBuf::from(machine::PINS).join(self.netns(place).name());
            all.push(("HEXTET_NODE_STATE_DIR".into(), dir.join("state").into()));
            all.push(("HEXTET_NODE_RUN_DIR".into(), dir.join("run").into()));
            all.push(("HEXTET_NODE_BPF_DIR".into(), pins.into()));
        }
        all
    }

    /// `netctl` with these arguments, as a user of the cluster.
    ///
    /// # Errors
    /// When it cannot be started or takes too long.
    pub fn netctl(&self, args: &[&str]) -> Result<Output> {
        netctl_at(&self.dir, args)
    }

    /// `netctl` with this text on its standard input.
    ///
    /// # Errors
    /// When it cannot be started or takes too long.
    pub fn netctl_stdin(&self, args: &[&str], text: &str) -> Result<Output> {
        netctl_run(&self.dir, args)?.stdin(text).output()
    }

    /// `netctl` on a node, as its administrator: `netctl node plan` and the like.
    ///
    /// # Errors
    /// When it cannot be started or takes too long.
    pub fn netctl_on(&self, node: &str, args: &[&str]) -> Result<Output> {
        let mut run = netctl_run(&self.dir, args)?.inside(&self.netns(node));
        for (key, value) in self.environment(node) {
            run = run.env(&key, value);
        }
        run.output()
    }

    /// Whether nothing is to be done in the kernel of any node: `netctl node plan` prints nothing.
    ///
    /// # Errors
    /// When it cannot be asked, or with what it prints.
    pub fn plans_nothing(&self) -> Result<()> {
        self.nodes().iter().try_for_each(|node| self.plans_nothing_on(node))
    }

    /// The same of one node.
    ///
    /// # Errors
    /// As [`Testbed::plans_nothing`].
    pub fn plans_nothing_on(&self, node: &str) -> Result<()> {
        let plan = self.netctl_on(node, &["node", "plan"])?.success()?;
        ensure!(plan.trim().is_empty(), "{node} plans:\n{plan}");
        Ok(())
    }

    /// Writes `yaml` to a file of the testbed and applies it.
    ///
    /// # Errors
    /// With what `netctl apply` said.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        let path = self.dir.join("job.yaml");
        std::fs::write(&path, yaml).context("cannot write the job")?;
        self.netctl(&["apply", "-f", &path.to_string_lossy()])?.success()
    }

    /// The pods of a job (or of every job, when empty), sorted by id.
    ///
    /// # Errors
    /// When the server does not answer or its answer is not understood.
    pub fn pods(&self, job: &str) -> Result<Vec<Pod>> {
        let selector = (!job.is_empty()).then_some(job);
        let args: Vec<&str> = ["pods"].into_iter().chain(selector).chain(["-o", "json"]).collect();
        let mut pods = parse_pods(&self.netctl(&args)?.success()?)?;
        pods.sort();
        Ok(pods)
    }

    /// Waits until the job has exactly `count` pods and all run; gives them sorted by id.
    ///
    /// # Errors
    /// When that does not happen in time: says what they do.
    pub fn wait_running(&self, job: &str, count: usize, limit: Duration) -> Result<Vec<Pod>> {
        let what = format!("{count} pods of {job} run, and no other");
        let (_, pods) = wait_for(limit, &what, || {
            let pods = self.pods(job).map_err(|e| format!("{e:#}"))?;
            let all_run = pods.len() == count && pods.iter().all(|pod| pod.phase == "running");
            if all_run { Ok(pods) } else { Err(phases(&pods)) }
        })?;
        Ok(pods)
    }

    /// The nodes' names and phases.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn node_phases(&self) -> Result<BTreeMap<String, String>> {
        let nodes = json_rows(&self.netctl(&["nodes", "-o", "json"])?.success()?, "nodes")?;
        Ok(nodes.iter().map(|node| (text(node, &["node"]), phase(node))).collect())
    }

    /// Waits until a node is in a phase (`ready`, `cut-off`, `lost`).
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn wait_node(&self, node: &str, wanted: &str, limit: Duration) -> Result<()> {
        wait_for(limit, &format!("node {node} is {wanted}"), || {
            let phases = self.node_phases().map_err(|e| format!("{e:#}"))?;
            match phases.get(node) {
                Some(phase) if phase == wanted => Ok(()),
                other => Err(format!("it is {}", other.map_or("unknown", String::as_str))),
            }
        })?;
        Ok(())
    }

    /// Pulls a node's cable and ends all that runs on it, these pods included.
    ///
    /// # Errors
    /// When its agent does not run, or something survives.
    pub fn kill_node(&self, node: &str, pods: &[&Pod]) -> Result<()> {
        self.run_in(node, &["ip", "link", "set", "eth0", "down"]).success()?;
        self.agent(node).kill9()?;
        let places = pods.iter().map(|pod| NetNs::named(&pod.id)).chain([self.netns(node)]);
        end_all_in(&places.filter_map(|place| place.identity()).collect(), Duration::ZERO)
    }

    /// The /64 of a node.
    ///
    /// # Errors
    /// When the server does not know it.
    pub fn node_prefix(&self, node: &str) -> Result<String> {
        let nodes = json_rows(&self.netctl(&["nodes", "-o", "json"])?.success()?, "nodes")?;
        let found = nodes.iter().find(|row| text(row, &["node"]) == node);
        let prefix = found.map(|row| text(row, &["prefix"])).unwrap_or_default();
        if prefix.is_empty() {
            bail!("the server knows no prefix of {node}");
        }
        Ok(prefix)
    }

    /// The cluster's /48.
    ///
    /// # Errors
    /// When no node has joined.
    pub fn cluster_prefix(&self) -> Result<String> {
        let node = self.node_prefix("n1")?;
        let (address, _) = node.split_once('/').context("a node's prefix has a length")?;
        let address: Ipv6Addr = address.parse().with_context(|| format!("{node} is not a prefix"))?;
        let s = address.segments();
        Ok(format!("{}/48", Ipv6Addr::new(s[0], s[1], s[2], 0, 0, 0, 0, 0)))
    }

    /// What a node's programs have counted: (program, counter) to number.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn counters(&self, node: &str) -> Result<BTreeMap<(String, String), u64>> {
        let json = self.netctl_on(node, &["node", "counters", "-o", "json"])?.success()?;
        let rows = json_rows(&json, "counters")?;
        let number = |row: &Value| row.get("count").and_then(Value::as_u64).unwrap_or_default();
        let key = |row: &Value| (text(row, &["part"]), text(row, &["counter"]));
        Ok(rows.iter().map(|row| (key(row), number(row))).collect())
    }

    /// Starts what is missing of the cluster and waits until every node is ready.
    pub(crate) fn start_cluster(&self, lock: &Lock) -> Result<()> {
        if self.options.lan {
            self.progress.step("the cluster begins", || self.init_cluster())?;
        }
        if self.server().pid().is_none() {
            self.progress.step("server", || self.server().start())?;
        }
        for node in self.nodes() {
            let agent = self.agent(&node);
            if agent.pid().is_none() {
                self.progress.step(&format!("agent of {node}"), || agent.start_until_ready())?;
            }
        }
        self.progress.step("every node ready", || {
            self.nodes().iter().try_for_each(|node| self.wait_node(node, "ready", NODE_READY))
        })?;
        if self.options.lan { Ok(()) } else { self.route_cluster_on_lan(lock) }
    }

    /// Tells the LAN hosts that run nothing of ours that pods are on the LAN.
    fn route_cluster_on_lan(&self, lock: &Lock) -> Result<()> {
        let line = format!("route replace {} dev eth0", self.cluster_prefix()?);
        for place in ["client", "router"] {
            ip_batch_holding(lock, Some(&self.netns(place)), std::slice::from_ref(&line))?;
        }
        Ok(())
    }
}

fn n1_address() -> Ipv6Addr {
    Place::Node(1).addresses().expect("a node has addresses").v6
}

fn socket(dir: &std::path::Path) -> PathBuf {
    dir.join("server.sock")
}

pub(crate) fn netctl_run(dir: &std::path::Path, args: &[&str]) -> Result<Run> {
    let program = netctl_program()?.to_string_lossy().into_owned();
    let line: Vec<&str> = std::iter::once(program.as_str()).chain(args.iter().copied()).collect();
    Ok(Run::new(&line).env("HEXTET_SOCKET", socket(dir)))
}

fn netctl_at(dir: &std::path::Path, args: &[&str]) -> Result<Output> {
    netctl_run(dir, args)?.output()
}

fn phases(pods: &[Pod]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for pod in pods {
        *counts.entry(&pod.phase).or_default() += 1;
    }
    let words: Vec<String> = counts.iter().map(|(phase, count)| format!("{count} {phase}")).collect();
    if words.is_empty() { "there is none".into() } else { format!("there are {}", words.join(", ")) }
}

fn parse_pods(json: &str) -> Result<Vec<Pod>> {
    let rows = json_rows(json, "pods")?;
    let pod = |row: &Value| Pod {
        id: text(row, &["pod"]),
        node: text(row, &["node"]),
        address: text(row, &["address"]).parse().ok(),
        phase: phase(row),
    };
    Ok(rows.iter().map(pod).collect())
}

/// The rows of `-o json`: a list, or a list under a name.
fn json_rows(json: &str, name: &str) -> Result<Vec<Value>> {
    let value: Value = serde_json::from_str(json).with_context(|| format!("not JSON: {json}"))?;
    let rows = value.as_array().or_else(|| value.get(name)?.as_array());
    rows.cloned().with_context(|| format!("no list of {name} in {json}"))
}

fn text(row: &Value, keys: &[&str]) -> String {
    keys.iter().find_map(|key| row.get(key)?.as_str()).unwrap_or_default().to_owned()
}

fn phase(row: &Value) -> String {
    text(row, &["state"]).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_read_with_and_without_an_address() {
        let json = r#"[{"pod": "hello-web-a", "node": "n1", "address": "fd00::1", "state": "running"},
                       {"pod": "hello-web-b", "node": "", "address": null, "state": "pending"}]"#;
        let pods = parse_pods(json).unwrap();
        assert_eq!(pods[0].address(), "fd00::1".parse::<Ipv6Addr>().unwrap());
        assert_eq!((pods[1].address, pods[1].phase.as_str()), (None, "pending"));
        assert_eq!(phases(&pods), "there are 1 pending, 1 running");
    }

    #[test]
    fn something_else_than_a_list_is_an_error() {
        assert!(parse_pods("{}").is_err());
        assert!(parse_pods("PODS").is_err());
    }
}
