//! `netctl cluster`: what is decided of a cluster before its server runs.

use std::{fmt, path::PathBuf};

use hextet_address::{ClusterPrefix, NodePrefix};
use ipnetwork::Ipv4Network;
use scheduler::{
    founding::{self, Founding},
    server::StoreChoice,
};
use serde::Serialize;

use super::{
    block_on,
    server::{STATE_DIR, StoreArgs, ipv4_prefix},
};
use crate::print::{self, Format};

/// Begin a cluster with other prefixes than the usual ones
///
/// `netctl server` begins one by itself: with a /48 drawn at random, of which each node has a /64. Here the
/// pods can be given addresses of the LAN.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl cluster init --pod-prefix 2001:db8:1::/64")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make the state of a new cluster on this machine, for `netctl server` to go on with
    ///
    /// With --pod-prefix, nodes with an address in that /64 give their pods addresses of it: the LAN's other
    /// hosts and its router find them by neighbour discovery and need no configuration. Other nodes have a /64
    /// of the cluster's /48 each. What is decided here is kept for ever.
    #[command(after_help = "\
Examples:
  netctl cluster init --pod-prefix 2001:db8:1::/64
  netctl cluster init --pod-ipv4 172.30.0.0/16
  netctl server")]
    Init(InitArgs),
}

#[derive(Debug, clap::Args)]
struct InitArgs {
    /// The LAN's own /64, global or unique local [default: none, each node has a /64 of its own]
    #[arg(long, value_name = "PREFIX")]
    pod_prefix: Option<NodePrefix>,
    /// The IPv4 range that every node gives to its own pods [default: 10.254.0.0/20]
    #[arg(long, value_name = "PREFIX", value_parser = ipv4_prefix)]
    pod_ipv4: Option<Ipv4Network>,
    /// Where the cluster's state and keys are kept
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    #[command(flatten)]
    store: StoreArgs,
}

/// What the cluster has for ever.
#[derive(Debug, Serialize)]
struct Begun {
    prefix: ClusterPrefix,
    pod_prefix: Option<NodePrefix>,
    pod_ipv4: Ipv4Network,
}

impl fmt::Display for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pods = match self.pod_prefix {
            Some(prefix) => format!("{prefix} on nodes with an address in it"),
            None => "a /64 of the cluster on each node".to_owned(),
        };
        writeln!(f, "cluster   {}", self.prefix)?;
        writeln!(f, "pods      {pods}")?;
        writeln!(f, "pod IPv4  {}", self.pod_ipv4)
    }
}

pub(super) fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let Command::Init(args) = args.command;
    let founding = Founding { pod_prefix: args.pod_prefix, pod_ipv4: args.pod_ipv4 };
    let store = args.store.choice();
    let is_etcd = store != StoreChoice::Local;
    let begin = async { founding::init(&args.state_dir, &store, founding).await };
    let cluster = block_on(begin)?;
    let begun = Begun { prefix: cluster.prefix, pod_prefix: cluster.pod_prefix, pod_ipv4: cluster.pod_ipv4 };
    print::to_stdout(|out| print::one(out, format, &begun))?;
    let store = if is_etcd { ", with the same --store" } else { "" };
    print::note(format!("`netctl server` runs it{}{store}", where_else(&args.state_dir)));
    Ok(())
}

/// What has to be added for the server to find the state.
fn where_else(state_dir: &std::path::Path) -> String {
    if state_dir == std::path::Path::new(STATE_DIR) {
        return String::new();
    }
    format!(", with --state-dir {}", state_dir.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_decided_is_three_lines() {
        let mut begun = Begun {
            prefix: "fd12:3456:789a::/48".parse().unwrap(),
            pod_prefix: Some("2001:db8:1::/64".parse().unwrap()),
            pod_ipv4: "10.254.0.0/20".parse().unwrap(),
        };
        expect_test::expect![[r"
            cluster   fd12:3456:789a::/48
            pods      2001:db8:1::/64 on nodes with an address in it
            pod IPv4  10.254.0.0/20
        "]]
        .assert_eq(&begun.to_string());
        begun.pod_prefix = None;
        assert!(begun.to_string().contains("a /64 of the cluster on each node"));
    }
}
