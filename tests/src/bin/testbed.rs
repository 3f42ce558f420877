//! `testbed`: makes the small internet, shows it, runs things in it, and takes it down. `cargo xtask testbed`
//! and `cargo xtask demo` call it.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use hextet_tests::progress::Progress;
use hextet_tests::testbed::{Options, Testbed, down, exists, netctl_program};
use hextet_tests::topology::{Place, Prefix};
use hextet_tests::{demo, echo, machine, netns, status};

/// A small internet out of network namespaces, with a Hextet cluster on it.
#[derive(Parser)]
#[command(name = "testbed", version)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Brings a testbed up and leaves it running; repairs one that is up.
    Up {
        #[command(flatten)]
        which: Which,
        /// How many nodes.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=64))]
        nodes: u8,
        /// Only the network: no server, no agents.
        #[arg(long)]
        no_cluster: bool,
        /// Pods have addresses of the LAN, and the client learns its own from the router.
        #[arg(long)]
        lan: bool,
        /// With --lan: a node that chooses otherwise, such as `--pod-prefix 3=own`; may be repeated.
        #[arg(long, requires = "lan", value_name = "NODE=CHOICE", value_parser = choice)]
        pod_prefix: Vec<(u8, String)>,
        /// One more argument of every `netctl node`, such as `--node-arg=--ndp=kernel`.
        #[arg(long)]
        node_arg: Vec<String>,
        /// One more argument of `netctl server`.
        #[arg(long)]
        server_arg: Vec<String>,
    },
    /// Removes every trace of a testbed.
    Down {
        #[command(flatten)]
        which: Which,
        /// Every testbed of this machine.
        #[arg(long)]
        all: bool,
    },
    /// Runs a command in a place (n1, client, router, wan, sw) or in a pod.
    Exec {
        #[command(flatten)]
        which: Which,
        /// The place, or a pod's id.
        name: String,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Prints shell lines that point `netctl` at the testbed: eval "$(testbed env)".
    Env {
        #[command(flatten)]
        which: Which,
    },
    /// Shows what runs.
    Status {
        #[command(flatten)]
        which: Which,
    },
    /// Shows a job from `apply` to packets, step by step.
    Demo {
        #[command(flatten)]
        which: Which,
        /// Leaves it running.
        #[arg(long)]
        keep: bool,
    },
    /// The servers of `wan`.
    #[command(hide = true)]
    Echo,
}

#[derive(Args)]
struct Which {
    /// What the names of its namespaces start with.
    #[arg(long, default_value = "hx")]
    prefix: String,
}

impl Which {
    fn prefix(&self) -> Result<Prefix> {
        Prefix::new(&self.prefix)
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Cmd) -> Result<ExitCode> {
    match command {
        Cmd::Up { which, nodes, no_cluster, lan, pod_prefix, node_arg, server_arg } => {
            let (cluster, pod_prefixes) = (!no_cluster, pod_prefix.into_iter().collect());
            let options =
                Options { nodes, cluster, server_args: server_arg, node_args: node_arg, lan, pod_prefixes };
            up(which.prefix()?, options)
        }
        Cmd::Down { all: true, .. } => take_down(&every_prefix()),
        Cmd::Down { which, .. } => take_down(&[which.prefix()?]),
        Cmd::Exec { which, name, command } => exec(which.prefix()?, &name, &command),
        Cmd::Env { which } => env(which.prefix()?),
        Cmd::Status { which } => status::print(&Testbed::open(which.prefix()?)?).map(|()| ExitCode::SUCCESS),
        Cmd::Demo { which, keep } => demo::run(which.prefix()?, keep),
        Cmd::Echo => echo::serve().map(|()| ExitCode::SUCCESS),
    }
}

/// `3=own`.
fn choice(text: &str) -> Result<(u8, String), String> {
    let (node, choice) = text.split_once('=').ok_or("give NODE=CHOICE, such as 3=own")?;
    let node = node.parse().map_err(|_| "a node is a number from 1 to 64")?;
    Ok((node, choice.to_owned()))
}

fn up(prefix: Prefix, options: Options) -> Result<ExitCode> {
    let was_up = exists(&prefix);
    let name = prefix.to_string();
    let testbed = Testbed::up(prefix, options, Progress::Told).with_context(|| {
        format!("the testbed {name} did not come up (`testbed down` clears away what there is)")
    })?;
    println!("the testbed {name} is up{}", if was_up { " (it was)" } else { "" });
    let flag = if name == "hx" { String::new() } else { format!(" --prefix {name}") };
    println!("  cargo xtask testbed status{flag}");
    println!("  cargo xtask testbed exec{flag} client -- ping -c 3 2001:db8:1::11");
    if testbed.has_cluster() {
        println!("  eval \"$(cargo xtask testbed env{flag})\" && netctl nodes");
    }
    println!("  cargo xtask testbed down{flag}");
    Ok(ExitCode::SUCCESS)
}

fn take_down(prefixes: &[Prefix]) -> Result<ExitCode> {
    if prefixes.is_empty() {
        println!("no testbed is up");
    }
    let mut failed = false;
    for prefix in prefixes {
        let was_up = exists(prefix);
        let failures = down(prefix);
        failed |= !failures.is_empty();
        for failure in failures {
            eprintln!("error: {failure:#}");
        }
        println!("the testbed {prefix} is down{}", if was_up { "" } else { " (it was)" });
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The prefixes that have a folder, and those that have a namespace of a switch.
fn every_prefix() -> Vec<Prefix> {
    let mut all = machine::testbeds();
    all.extend(netns::list().iter().filter_map(|n| Prefix::new(n.strip_suffix("-sw")?).ok()));
    all.sort();
    all.dedup();
    all
}

fn exec(prefix: Prefix, name: &str, command: &[String]) -> Result<ExitCode> {
    let testbed = Testbed::open(prefix)?;
    let place = testbed.netns(name);
    if place.identity().is_none() {
        let nodes = testbed.nodes().join(", ");
        bail!("there is no place or pod {name}: the places are {nodes}, {}", other_places());
    }
    let mut program = Command::new(&command[0]);
    program.args(&command[1..]).envs(testbed.environment(name));
    // Only comes back when it could not be started.
    let failed = place.run(|| program.exec())?;
    Err(failed).with_context(|| format!("cannot start {}", command[0]))
}

fn other_places() -> String {
    [Place::Client, Place::Router, Place::Wan, Place::Switch].map(|place| place.to_string()).join(", ")
}

fn env(prefix: Prefix) -> Result<ExitCode> {
    let testbed = Testbed::open(prefix)?;
    for (key, value) in testbed.environment("n1") {
        println!("export {key}={}", quoted(&value.to_string_lossy()));
    }
    let netctl: PathBuf = netctl_program()?;
    if let Some(dir) = netctl.parent() {
        println!("export PATH={}:\"$PATH\"", quoted(&dir.to_string_lossy()));
    }
    Ok(ExitCode::SUCCESS)
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
