//! `cargo xtask test`: everything that CI runs, cheapest first. It goes on after a failure and ends with the
//! names of what failed and one line of counts.

use std::{process::ExitCode, thread, time::Duration};

use anyhow::{Result, bail};

pub(crate) mod harness;
pub(crate) mod tally;

use crate::{
    artifacts::{self, TestBinary},
    fuzz, process, setup,
    stage::Progress,
    tidy, vm_test,
    workspace::{BPF_PACKAGE, Workspace},
};
use harness::{Limits, Show};
use tally::Tally;

/// The package whose tests build testbeds.
pub(crate) const SCENARIOS: &str = "hextet-tests";

/// The package whose tests build a small world each.
pub(crate) const CONFORMANCE: &str = "hextet-conformance";

/// A unit test binary that takes longer hangs.
const UNIT_DEADLINE: Duration = Duration::from_secs(300);

/// The same for a binary of scenarios, each of which starts clusters.
pub(crate) const SCENARIO_DEADLINE: Duration = Duration::from_secs(900);

/// Arguments of `test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only what needs neither root nor the BPF tools
    #[arg(long)]
    fast: bool,
    /// Leaves out the virtual machine
    #[arg(long)]
    no_vm: bool,
}

/// Runs all stages and prints the counts.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let mut suite = Suite { workspace, progress: Progress::start(), tally: Tally::default() };
    if args.fast {
        suite.fast();
    } else {
        suite.require_root()?;
        setup::ensure(workspace)?;
        suite.full(args);
    }
    print!("{}", suite.tally.details());
    println!("{}", suite.tally);
    Ok(if suite.tally.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Suite<'a> {
    workspace: &'a Workspace,
    progress: Progress,
    tally: Tally,
}

impl Suite<'_> {
    fn require_root(&self) -> Result<()> {
        if !process::is_root() {
            bail!(
                "BPF programs and network namespaces need root: run this as root, or `cargo xtask test --fast`, \
                 which leaves them out"
            );
        }
        Ok(())
    }

    fn fast(&mut self) {
        let workspace = self.workspace;
        self.source_checks();
        self.check("clippy", || {
            process::run(workspace.cargo("clippy").args(["--all-targets", "--", "-D", "warnings"]))
        });
        self.check("documents", || document(workspace.cargo("doc")));
        self.part("unit tests", |suite| {
            let limits = Limits { deadline: SCENARIO_DEADLINE, show: Show::Result };
            let mut command = workspace.cargo("test");
            command.args(["--no-fail-fast", "--", "--show-output"]);
            suite.tally.add(harness::run_command(workspace, "default-members", &mut command, limits)?);
            Ok(())
        });
    }

    fn full(&mut self, args: &Args) {
        self.source_checks();
        self.compiler_checks();
        self.all_tests();
        self.fuzzers();
        if !args.no_vm {
            self.virtual_machine();
        }
    }

    /// What needs no compiler.
    fn source_checks(&mut self) {
        let workspace = self.workspace;
        self.check("format", || process::run(workspace.cargo("fmt").args(["--all", "--check"])));
        self.check("tidy", || tidy::check(workspace));
    }

    fn compiler_checks(&mut self) {
        let workspace = self.workspace;
        self.check("clippy", || {
            process::run(workspace.cargo_host("clippy").args(["--all-targets", "--", "-D", "warnings"]))
        });
        self.check("clippy of the BPF programs", || {
            let mut command = workspace.cargo("clippy");
            command.args(["--package", BPF_PACKAGE, "--", "-D", "warnings"]);
            // The crate is no_std and has a panic handler of its own.
            process::run(command.env("CARGO_PROFILE_DEV_PANIC", "abort"))
        });
        self.check("documents", || document(workspace.cargo_host("doc")));
    }

    /// Unit tests that any machine runs, then those that need the kernel, then the scenarios.
    fn all_tests(&mut self) {
        let workspace = self.workspace;
        let built = self.progress.stage("building the programs and tests", || {
            process::run(workspace.cargo_host("build").arg("--bins"))?;
            Ok((artifacts::build_tests(workspace)?, artifacts::metadata(workspace)?))
        });
        let (binaries, metadata) = match built {
            Ok(built) => built,
            Err(error) => return self.tally.fail(format!("building the tests: {error:#}")),
        };
        let default = artifacts::default_members(&metadata);
        let (scenarios, rest): (Vec<_>, Vec<_>) =
            binaries.into_iter().partition(|binary| binary.package == SCENARIOS && binary.integration);
        let (unit, kernel): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|binary| default.contains(&binary.package));
        let (conformance, kernel): (Vec<_>, Vec<_>) =
            kernel.into_iter().partition(|binary| binary.package == CONFORMANCE);
        self.run_all("unit tests", &unit, Limits { deadline: UNIT_DEADLINE, show: Show::Result });
        self.examples_in_documents();
        self.run_all("kernel tests", &kernel, Limits { deadline: UNIT_DEADLINE, show: Show::Result });
        self.run_all("conformance", &conformance, Limits { deadline: SCENARIO_DEADLINE, show: Show::Result });
        self.run_all("scenarios", &scenarios, Limits { deadline: SCENARIO_DEADLINE, show: Show::EachTest });
    }

    fn run_all(&mut self, name: &str, binaries: &[TestBinary], limits: Limits) {
        self.part(name, |suite| {
            for binary in binaries {
                suite.tally.add(harness::run_binary(suite.workspace, binary, &test_threads(), limits)?);
            }
            Ok(())
        });
    }

    fn examples_in_documents(&mut self) {
        self.part("examples in documents", |suite| {
            let mut command = suite.workspace.cargo_host("test");
            command.args(["--doc", "--no-fail-fast"]);
            let limits = Limits { deadline: UNIT_DEADLINE, show: Show::Result };
            suite.tally.add(harness::run_command(suite.workspace, "doc", &mut command, limits)?);
            Ok(())
        });
    }

    /// The corpus was replayed with the unit tests; this looks for something new, for a moment.
    fn fuzzers(&mut self) {
        let workspace = self.workspace;
        match fuzz::short(workspace, &self.progress) {
            Ok(None) => {}
            Ok(Some(reason)) => {
                eprintln!("SKIP fuzzers: needs {reason}");
                self.tally.skip("fuzzers", &reason);
            }
            Err(error) => {
                eprintln!("error: {error:#}");
                self.tally.fail("fuzzers".to_owned());
            }
        }
    }

    fn virtual_machine(&mut self) {
        if let Some(reason) = vm_test::cannot_fetch() {
            eprintln!("SKIP virtual_machine: {reason}");
            return self.tally.skip("virtual_machine", &reason);
        }
        self.part("virtual machine", |suite| {
            suite.tally.add(vm_test::smoke(suite.workspace, &suite.progress)?);
            Ok(())
        });
    }

    /// A check without tests of its own: it is counted when it fails.
    fn check(&mut self, name: &str, work: impl FnOnce() -> Result<()>) {
        if let Err(error) = self.progress.stage(name, work) {
            eprintln!("error: {error:#}");
            self.tally.fail(name.to_owned());
        }
    }

    /// A stage whose tests count themselves; what keeps it from running them is a failure too.
    fn part(&mut self, name: &str, work: impl FnOnce(&mut Self) -> Result<()>) {
        self.progress.say(&format!("{name} ..."));
        if let Err(error) = work(self) {
            self.tally.fail(format!("{name}: {error:#}"));
        }
        self.progress.say(&format!("{name}: so far {}", self.tally));
    }
}

/// Two at a time where there are two processors: scenarios wait more than they work.
pub(crate) fn test_threads() -> Vec<String> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(4);
    vec![format!("--test-threads={threads}")]
}

fn document(mut command: std::process::Command) -> Result<()> {
    process::run(command.args(["--no-deps", "--quiet"]).env("RUSTDOCFLAGS", "-D warnings"))
}
