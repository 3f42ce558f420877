//! `cargo xtask setup`: makes a machine able to build and test everything.
//!
//! It looks for the programs and files themselves first and touches nothing when all are there. Missing
//! Debian packages are installed by one apt call; the BPF linker is built into `target/bpf-tools`. It never
//! downloads a Rust toolchain. `HEXTET_BPF_PREBUILT`, `HEXTET_BPF_RUSTC` and `HEXTET_BPF_LINKER`, which
//! `dataplane/build.rs` reads, are believed.

use std::env;

use anyhow::Result;

use crate::workspace::Workspace;

mod apt;
mod bpf_compiler;
mod bpf_linker;
mod services;

/// Installs what is missing and says so, or that nothing is.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    if !ensure(workspace)? {
        println!("setup: nothing is missing");
    }
    Ok(())
}

/// Installs what is missing; silent when nothing is. Tells whether it did anything.
pub(crate) fn ensure(workspace: &Workspace) -> Result<bool> {
    let has_object = env::var_os("HEXTET_BPF_PREBUILT").is_some();
    let has_linker = env::var_os("HEXTET_BPF_LINKER").is_some();
    let mut packages = apt::missing_programs();
    if !has_object && bpf_compiler::find().is_none() {
        packages.extend(bpf_compiler::PACKAGES);
    }
    if !packages.is_empty() {
        apt::install(&packages)?;
    }
    if has_object || has_linker {
        return Ok(!packages.is_empty());
    }
    let built = bpf_linker::ensure(workspace, &bpf_compiler::require()?)?;
    Ok(built || !packages.is_empty())
}
