//! `cargo xtask demo [--keep]`: what Hextet does, on a testbed, step by step.
//! The demo itself is a command of the testbed program (`tests/`).

use std::process::ExitCode;

use anyhow::Result;

use crate::{setup, testbed, workspace::Workspace};

/// Makes the machine ready, builds and hands over to the testbed program.
pub(crate) fn run(workspace: &Workspace, args: &testbed::Args) -> Result<ExitCode> {
    setup::ensure(workspace)?;
    testbed::hand_over(workspace, Some("demo"), args)
}
