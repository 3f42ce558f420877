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
    #[arg(long, value_name = "DIR")]
    pod_dir: PathBuf,
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    ::node::supervisor::run(&args.pod_dir)
}
