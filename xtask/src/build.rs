//! `cargo xtask build`: the programs that a user runs.

use anyhow::Result;

use crate::{process, setup, workspace::Workspace};

/// Arguments of `build`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Builds without optimisation, as the tests use it
    #[arg(long)]
    debug: bool,
}

/// Checks the machine and builds the programs of the workspace; `dataplane/build.rs` builds the BPF object.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<()> {
    setup::ensure(workspace)?;
    let profile = if args.debug { "dev" } else { "release" };
    process::run(workspace.cargo_host("build").args(["--bins", "--profile", profile]))?;
    let folder = workspace.target().join(if args.debug { "debug" } else { "release" });
    println!("{}", folder.join("netctl").display());
    Ok(())
}

/// Builds the debug programs that the testbed starts; prints nothing when they are up to date.
pub(crate) fn debug_programs(workspace: &Workspace) -> Result<()> {
    process::run(workspace.cargo_host("build").arg("--bins"))
}
