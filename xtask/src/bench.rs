//! `cargo xtask bench`: builds for release and becomes the benchmark program of `tests/`, or with `scheduler` as its
//! first word that of `scheduler/bench`, which needs neither root nor BPF.

use std::{
    ffi::OsString,
    process::{Command, ExitCode},
};

use anyhow::{Result, bail};

use crate::{process, setup, workspace::Workspace};

/// Arguments that are handed over as they are.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// What the benchmark program is given; `--help` shows its own help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Makes the machine ready, builds and measures.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    if args.rest.first().is_some_and(|word| word == "scheduler") {
        process::run(workspace.cargo_host("build").args(["--release", "-p", "scheduler-bench"]))?;
        let mut command = Command::new(workspace.target().join("release/scheduler-bench"));
        return process::become_program(command.args(&args.rest[1..]));
    }
    if !process::is_root() {
        bail!("the benchmarks make network namespaces and load BPF programs: run this as root");
    }
    setup::ensure(workspace)?;
    process::run(workspace.cargo_host("build").args(["--release", "--bins"]))?;
    let results = workspace.target().join("bench");
    let mut command = Command::new(workspace.target().join("release/bench"));
    process::become_program(command.arg("--results").arg(results).args(&args.rest))
}
