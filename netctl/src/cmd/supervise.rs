//! `netctl supervise`: keeps a pod's tasks running, whatever becomes of the node agent.
//!
//! The agent starts it. It starts no async runtime: it forks, and is small for as long as its pod lives.

use std::path::PathBuf;

/// Keep a pod's tasks running
///
/// The node agent starts this, one for each pod; it goes on when the agent ends. Not for use by hand.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl supervise --pod-dir /run/hextet/node/pods/hello-web-x7k2p")]
pub(super) struct Args {
    /// The pod's folder in the agent's run directory
    #[arg(long, value_name = "DIR", required_unless_present = "hook_dir")]
    pod_dir: Option<PathBuf>,
    /// Instead, the folder of a hook: run it to its end
    #[arg(long, value_name = "DIR", conflicts_with = "pod_dir")]
    hook_dir: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    match (args.pod_dir, args.hook_dir) {
        (Some(folder), _) => ::node::supervisor::run(&folder),
        (None, Some(folder)) => ::node::supervisor::run_hook(&folder),
        (None, None) => Err(anyhow::anyhow!("name a folder with --pod-dir or --hook-dir")),
    }
}
