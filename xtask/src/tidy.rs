//! `cargo xtask tidy`: rules of this tree that no compiler checks, and documents that must match the code.
//! Also a test of this package, so that plain `cargo test` runs it.

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::{artifacts, rfc, workspace::Workspace};

mod dependencies;
mod documents;
mod sources;
pub(crate) mod tree;

use tree::Tree;

/// Prints what is wrong, one line each.
pub(crate) fn run(workspace: &Workspace) -> Result<ExitCode> {
    check(workspace)?;
    println!("tidy");
    Ok(ExitCode::SUCCESS)
}

/// All checks.
///
/// # Errors
/// Every finding, one per line.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let metadata = artifacts::metadata(workspace)?;
    let tree = Tree::read(workspace.root())?;
    let mut findings = dependencies::check(&metadata);
    findings.extend(sources::check(&tree));
    findings.extend(documents::check(&tree, &metadata));
    findings.extend(rfc::check(&tree));
    if !findings.is_empty() {
        bail!("{} findings:\n{}", findings.len(), findings.join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_tidy() {
        check(&Workspace::here()).unwrap();
    }
}
