//! `cargo xtask testbed up|down|exec|env|status`: builds the programs and becomes the testbed program.

use std::{
    ffi::OsString,
    process::{Command, ExitCode},
};

use anyhow::Result;

use crate::{build, process, setup, workspace::Workspace};

/// Arguments that are handed over as they are.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// What the testbed program is given; `--help` shows its own help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

/// Makes the machine ready, builds and hands over to the testbed program.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    setup::ensure(workspace)?;
    hand_over(workspace, None, args)
}

/// Builds what the testbed starts and becomes `testbed [FIRST] ARGS`.
pub(crate) fn hand_over(workspace: &Workspace, first: Option<&str>, args: &Args) -> Result<ExitCode> {
    build::debug_programs(workspace)?;
    let program = workspace.target().join("debug/testbed");
    process::become_program(Command::new(program).args(first).args(&args.rest))
}
