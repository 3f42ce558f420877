//! `netctl node`: runs the node agent, or looks at what it put into this machine's kernel.

use std::{collections::BTreeMap, fmt, net::Ipv6Addr, path::PathBuf};

use ::node::{MasqueradeChoice, NdpChoice, NodeConfig, NodeEvent, NodePaths, PodPrefixChoice};
use anyhow::bail;
use dataplane::{Filtering, Ipv6Exit};
use hextet_api::{token::Token, v1};
use hextet_lifecycle::Hook;
use scheduler_core::{
    job,
    quantity::{Cpu, Memory},
};
use serde::Serialize;

use super::{age, asked_to_end, block_on, block_on_threads, now_unix_ms};
use crate::{
    client::{Client, ServerArgs, request, variable},
    print::{self, Format, Row},
};

/// How a line begins that tells what could not be removed.
const FAILED: &str = "failed:";

/// Run the node agent, or look at what it put into this machine's kernel
///
/// Needs root. Joins a cluster with the line that `netctl server` or `netctl token --for node` printed;
/// from then on it needs no token, and starts with what it knows when the server is away. Pods go on when
/// the agent ends.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  netctl node --join hx1-AQEA...
  netctl node --join hx1-AQEA... --pod-prefix 2001:db8:1::/64
  netctl node --label disk=ssd --memory 8Gi
  netctl node show"
)]
pub(super) struct Args {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    paths: PathArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// The token of the cluster to join; needed the first time
    #[arg(long, value_name = "TOKEN")]
    join: Option<Token>,
    /// A new token for a node that was away while its cluster replaced its CA: it keeps its name, prefix and pods
    #[arg(long, value_name = "TOKEN", conflicts_with = "join")]
    rejoin: Option<Token>,
    /// The node's name [default: the token's, else the host's]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The device to the other nodes [default: that of the default route]
    #[arg(long, value_name = "IF")]
    uplink: Option<String>,
    /// The address to which peers send packets for this node's pods [default: the uplink's]
    #[arg(long, value_name = "ADDR")]
    underlay: Option<Ipv6Addr>,
    /// Where the pods' addresses are from: the LAN's /64, `own` for a /64 of the cluster's, or auto: that of
    /// `netctl cluster init` if the uplink has an address in it. Decided when the node joins
    #[arg(long, value_name = "PREFIX", default_value = "auto")]
    pod_prefix: PodPrefixChoice,
    /// Who answers neighbour solicitations for pods: auto, ebpf or kernel
    #[arg(long, value_name = "WHO", default_value = "auto")]
    ndp: NdpChoice,
    /// Who translates the pods' IPv4: auto, ebpf or nftables
    #[arg(long, value_name = "WHO", default_value = "auto")]
    masquerade: MasqueradeChoice,
    /// Who gets in at a pod's outside IPv4 port: address-dependent (whom the pod has written to, from any of
    /// its ports) or endpoint-independent (everybody)
    #[arg(long, value_name = "WHO", default_value = "address-dependent")]
    filtering: Filtering,
    /// What becomes of pods' packets to the IPv6 internet: masquerade (they leave with the node's global address),
    /// none (with the pod's own), or auto (masquerade if the pods' addresses are unique local)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    ipv6_exit: Ipv6Exit,
    /// Programs to run in the lifecycle of each pod here: a YAML file, or a folder of them
    #[arg(long, value_name = "PATH", value_parser = hooks)]
    hooks: Option<Hooks>,
    /// For the constraints of jobs; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// What pods may use in all, such as 4000m [default: what the machine has]
    #[arg(long, value_name = "CPU")]
    cpu: Option<Cpu>,
    /// What pods may use in all, such as 8Gi [default: what the machine has]
    #[arg(long, value_name = "BYTES")]
    memory: Option<Memory>,
    /// What pods may take, such as gpu=4; may be repeated
    #[arg(long = "resource", value_name = "NAME=NUMBER", value_parser = resource)]
    resources: Vec<(String, u32)>,
}

/// Where an agent keeps its files.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Files")]
pub(super) struct PathArgs {
    /// What survives a reboot [env: HEXTET_NODE_STATE_DIR] [default: /var/lib/hextet/node]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// What does not [env: HEXTET_NODE_RUN_DIR] [default: /run/hextet/node]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// BPF programs and maps [env: HEXTET_NODE_BPF_DIR] [default: /sys/fs/bpf/hextet]
    #[arg(long, value_name = "DIR")]
    bpf_dir: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Print what the agent would do to the kernel now
    ///
    /// Nothing is printed when the kernel is as it should be.
    #[command(after_help = "Example:\n  netctl node plan")]
    Plan(PathArgs),
    /// Print what the BPF programs have counted
    ///
    /// Read from the pinned maps; the agent need not run.
    #[command(after_help = "Example:\n  netctl node counters")]
    Counters(PathArgs),
    /// Show who this node is, its peers and pods, and what its kernel offers
    #[command(after_help = "Example:\n  netctl node show")]
    Show(PathArgs),
    /// Print what others broke in this machine's kernel, and the agent mended
    ///
    /// Also which pods were refused outside IPv4 ports, and who claims a pod's address. The newest 256 since the agent started, with who did it as far as the kernel says so. The agent's log
    /// has them, too.
    #[command(after_help = "Example:\n  netctl node events")]
    Events(PathArgs),
    /// Stop every pod and leave the machine as it was found
    ///
    /// The server is told, so that load balancers leave the pods alone and others start elsewhere; the first line says so, or
    /// why not. The agent, if it runs, ends too. The node keeps its name and prefix: `netctl node` brings it back.
    #[command(after_help = "Example:\n  netctl node down")]
    Down(PathArgs),
    /// Say to the server that a node is dead
    ///
    /// For a node that is lost or cut off: then pods that wait for it are replaced, too. Be sure of it: a node
    /// that is alive goes on running them until it hears from the server again. A node that returns is
    /// welcome, without the pods that were replaced.
    #[command(after_help = "Example:\n  netctl node dead n2 -m 'its power supply burnt'")]
    Dead(DeadArgs),
}

#[derive(Debug, clap::Args)]
struct DeadArgs {
    /// The node
    #[arg(value_name = "NODE")]
    node: String,
    /// Why; kept with the revision
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    #[command(flatten)]
    server: ServerArgs,
}

/// What became of a node that was declared dead.
#[derive(Debug, Serialize)]
struct Declared {
    node: String,
    revision: u64,
    changed: bool,
}

impl fmt::Display for Declared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.changed {
            true => write!(f, "node/{} declared dead (revision {})", self.node, self.revision),
            false => write!(f, "node/{} was declared dead before", self.node),
        }
    }
}

impl PathArgs {
    pub(super) fn paths(self) -> NodePaths {
        let choose = |given: Option<PathBuf>, name, default: &str| {
            given.or_else(|| variable(name)).unwrap_or_else(|| default.into())
        };
        NodePaths {
            state_dir: choose(self.state_dir, "HEXTET_NODE_STATE_DIR", "/var/lib/hextet/node"),
            run_dir: choose(self.run_dir, "HEXTET_NODE_RUN_DIR", "/run/hextet/node"),
            bpf_dir: choose(self.bpf_dir, "HEXTET_NODE_BPF_DIR", "/sys/fs/bpf/hextet"),
        }
    }
}

impl Args {
    fn config(self) -> NodeConfig {
        let RunArgs {
            join,
            rejoin,
            name,
            uplink,
            underlay,
            pod_prefix,
            ndp,
            masquerade,
            filtering,
            ipv6_exit,
            hooks,
            labels,
            cpu,
            memory,
            resources,
        } = self.run;
        NodeConfig {
            paths: self.paths.paths(),
            join,
            rejoin,
            name,
            uplink,
            underlay,
            pod_prefix,
            ndp,
            masquerade,
            filtering,
            ipv6_exit,
            hooks: hooks.unwrap_or_default(),
            labels: labels.into_iter().collect(),
            cpu_millis: cpu.map(|Cpu(millis)| millis),
            memory_bytes: memory.map(|Memory(bytes)| bytes),
            countables: resources.into_iter().collect(),
        }
    }
}

/// Something that was mended.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct EventRow {
    event: NodeEvent,
    #[serde(skip)]
    now: u64,
}

impl Row for EventRow {
    const HEADER: &'static [&'static str] = &["AGE", "REPAIRED", "BY"];
    const TEXT: &'static [&'static str] = &["REPAIRED", "BY"];

    fn cells(&self) -> Vec<String> {
        let by = self.event.by.clone().unwrap_or_default();
        vec![age(self.event.unix_ms, self.now), self.event.what.clone(), by]
    }
}

/// One counter of the BPF programs.
#[derive(Debug, Serialize)]
struct CounterRow {
    part: &'static str,
    counter: &'static str,
    count: u64,
}

impl Row for CounterRow {
    const HEADER: &'static [&'static str] = &["PART", "COUNTER", "COUNT"];

    fn cells(&self) -> Vec<String> {
        vec![self.part.to_owned(), self.counter.to_owned(), self.count.to_string()]
    }
}

pub(super) fn run(args: Args, format: Format) -> anyhow::Result<()> {
    match args.command {
        None => block_on_threads(::node::run(args.config(), asked_to_end())),
        Some(Command::Plan(paths)) => block_on(plan(paths.paths(), format)),
        Some(Command::Show(paths)) => block_on(show(paths.paths(), format)),
        Some(Command::Events(paths)) => block_on(events(paths.paths(), format)),
        Some(Command::Down(paths)) => block_on(down(paths.paths(), format)),
        Some(Command::Counters(paths)) => counters(&paths.paths(), format),
        Some(Command::Dead(args)) => block_on(dead(args, format)),
    }
}

async fn dead(args: DeadArgs, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let message = v1::DeclareDeadRequest { name: args.node.clone(), message: args.message };
    let v1::DeclareDeadResponse { revision, changed } =
        client.answer(client.cluster().declare_dead(request(message))).await?;
    let declared = Declared { node: args.node, revision, changed };
    print::to_stdout(|out| print::one(out, format, &declared))
}

async fn plan(paths: NodePaths, format: Format) -> anyhow::Result<()> {
    list(&::node::plan(&paths).await?, format)
}

async fn show(paths: NodePaths, format: Format) -> anyhow::Result<()> {
    let view = ::node::show(&paths).await?;
    print::to_stdout(|out| print::one(out, format, &view))
}

async fn events(paths: NodePaths, format: Format) -> anyhow::Result<()> {
    let now = now_unix_ms();
    let rows: Vec<EventRow> =
        ::node::events(&paths).await?.into_iter().map(|event| EventRow { event, now }).collect();
    print::list(format, &rows)
}

async fn down(paths: NodePaths, format: Format) -> anyhow::Result<()> {
    let lines = ::node::down(&paths).await?;
    list(&lines, format)?;
    match lines.iter().filter(|line| line.starts_with(FAILED)).count() {
        0 => Ok(()),
        1 => bail!("one thing could not be removed: see the line with `{FAILED}`, then try again"),
        failed => {
            bail!("{failed} things could not be removed: see the lines with `{FAILED}`, then try again")
        }
    }
}

fn counters(paths: &NodePaths, format: Format) -> anyhow::Result<()> {
    let row = |counter: dataplane::Counter| CounterRow {
        part: counter.part,
        counter: counter.name,
        count: counter.count,
    };
    let rows: Vec<CounterRow> = ::node::counters(paths)?.into_iter().map(row).collect();
    print::list(format, &rows)
}

fn list(lines: &[String], format: Format) -> anyhow::Result<()> {
    print::to_stdout(|out| match format {
        Format::Table => Ok(print::lines(out, lines.iter().map(String::as_str))?),
        Format::Json | Format::Yaml => print::value(out, format, &lines),
    })
}

/// The hooks of a file or folder, by name.
type Hooks = BTreeMap<String, Hook>;

fn hooks(path: &str) -> Result<Hooks, String> {
    crate::hook_file::read(std::path::Path::new(path)).map_err(|error| format!("{error:#}"))
}

/// `KEY=VALUE`.
fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("give KEY=VALUE, such as disk=ssd")?;
    job::check_label(key, value).map_err(|error| error.to_string())?;
    match key {
        // It is the node's name in the constraints of jobs.
        "node" => Err("the label `node` is the node's name: give --name".to_owned()),
        _ => Ok((key.to_owned(), value.to_owned())),
    }
}

fn resource(text: &str) -> Result<(String, u32), String> {
    let (name, number) = text.split_once('=').ok_or("give NAME=NUMBER, such as gpu=4")?;
    let number = number.parse().map_err(|_| format!("`{number}` is not a number"))?;
    match name {
        "cpu" | "memory" => Err(format!("give it with --{name}")),
        _ => job::check_countable(name, number)
            .map(|()| (name.to_owned(), number))
            .map_err(|error| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_key_and_value() {
        assert_eq!(label("disk=ssd"), Ok(("disk".into(), "ssd".into())));
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        for wrong in ["disk", "=ssd", "disk=", "node=n2"] {
            assert!(label(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn resources_are_name_and_number() {
        assert_eq!(resource("gpu=4"), Ok(("gpu".into(), 4)));
        for wrong in ["gpu", "gpu=", "gpu=x", "=4", "gpu=0", "cpu=4", "Gpu=1", "gpu=9999999"] {
            assert!(resource(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn counters_are_a_table() {
        let row = |counter, count| CounterRow { part: "pod_guard", counter, count };
        let mut out = Vec::new();
        print::rows(&mut out, Format::Table, &[row("passed", 12), row("spoofed", 0)]).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "PART       COUNTER  COUNT\npod_guard  passed   12\npod_guard  spoofed  0\n"
        );
    }
}
