//! `cargo xtask simulate`: builds the simulation for release and becomes it.

use std::{
    ffi::OsString,
    process::{Command, ExitCode},
};

use anyhow::Result;

use crate::{process, workspace::Workspace};

/// The package of the simulation, and its program.
const SIMULATION: &str = "hextet-simulation";

/// Arguments that are handed over as they are.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// `--seeds N`, `--seed FIRST`, `--nodes N`, `--steps N`; `--help` shows them all
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Builds and plays.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    process::run(workspace.cargo("build").args(["--quiet", "--release", "--package", SIMULATION]))?;
    let program = workspace.target().join("release").join(SIMULATION);
    process::become_program(Command::new(program).args(&args.rest))
}
