//! `cargo xtask rfc`: makes `docs/rfc.md` out of the clauses in `tests/conformance/rfc/`, the tests that name them
//! and what the conformance suite found. `tidy` fails when the page is not what these say.
//!
//! A test names the clauses that it shows in a comment above it: `//= RFC 4787 REQ-8, RFC 5382 REQ-4`.

use std::{fs, path::Path, process::ExitCode};

use anyhow::{Context, Result, bail};

use crate::{process, setup, test::CONFORMANCE, tidy::tree::Tree, workspace::Workspace};

mod clause;
mod mark;
mod results;
mod table;

use results::Results;

/// The page that is made.
const PAGE: &str = "docs/rfc.md";

/// The folder of the suite: its tests, and in `rfc/` one file of clauses for each RFC.
const SUITE: &str = "tests/conformance";

/// What each of its tests does with each backend.
const RESULTS: &str = "tests/conformance/results.txt";

/// Arguments of `rfc`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Runs the conformance suite first and writes down what passes and what differs on each backend; a new
    /// difference needs its reason in tests/conformance/results.txt before `tidy` is content
    #[arg(long)]
    run: bool,
}

/// Makes the page.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    if args.run {
        run_suite(workspace)?;
    }
    let tree = Tree::read(workspace.root())?;
    let (page, findings) = page(&tree);
    let path = workspace.root().join(PAGE);
    fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))?;
    if !findings.is_empty() {
        bail!("{} findings:\n{}", findings.len(), findings.join("\n"));
    }
    println!("{PAGE} is what the sources say");
    Ok(ExitCode::SUCCESS)
}

/// One line for each clause without a test, test without a clause, and for a page that is out of date.
pub(crate) fn check(tree: &Tree) -> Vec<String> {
    let (page, mut findings) = page(tree);
    if tree.text(PAGE) != Some(&page) {
        findings.push(format!("{PAGE} is not what the sources say: run `cargo xtask rfc`"));
    }
    findings
}

fn page(tree: &Tree) -> (String, Vec<String>) {
    let mut findings = Vec::new();
    let rfcs = clause::read(tree, &mut findings);
    let marks = mark::read(tree, &rfcs, &mut findings);
    let results = Results::read(tree.text(RESULTS).unwrap_or_default(), &mut findings);
    findings.extend(clause::check(&rfcs, &marks));
    findings.extend(results.check(&marks));
    (table::page(&rfcs, &marks, &results), findings)
}

/// Runs every test of the suite as if nothing were known of the backends, and notes the outcome.
fn run_suite(workspace: &Workspace) -> Result<()> {
    if !process::is_root() {
        bail!("the conformance suite makes network namespaces and loads BPF programs: run this as root");
    }
    setup::ensure(workspace)?;
    let mut command = workspace.cargo("test");
    command.args(["--package", CONFORMANCE, "--no-fail-fast", "--", "--nocapture", "--test-threads", "2"]);
    let output = command.env("HEXTET_CONFORMANCE", "learn").output().context("cannot start cargo")?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let path = workspace.root().join(RESULTS);
    let before = Results::read(&fs::read_to_string(&path).unwrap_or_default(), &mut Vec::new());
    let after = before.learn(&said);
    if !output.status.success() || after.is_empty() {
        let log = workspace.target().join("conformance.log");
        fs::write(&log, said.as_bytes())?;
        bail!("the conformance suite did not run to its end: see {}", log.display());
    }
    fs::write(&path, after.to_string()).with_context(|| format!("cannot write {}", path.display()))
}

/// Whether a file belongs to the suite.
fn is_of_suite(path: &Path) -> bool {
    path.starts_with(SUITE)
}
