//! `cargo xtask vm-test`: the scenarios on this kernel, or on stock Debian kernels in virtual machines.
//!
//! Kernels, modules and QEMU are downloaded as Debian packages and unpacked under `target/vm`; nothing is
//! installed and no root is needed for a machine. One machine per kernel runs all tests; its disk is an
//! initramfs with the tests and every program that they start.

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, bail};

mod archive;
mod guest;
mod machine;
mod modules;
mod packages;

use crate::{
    artifacts::{self, TestBinary},
    process, setup,
    stage::Progress,
    test::{
        SCENARIO_DEADLINE, SCENARIOS,
        harness::{self, Limits, Show},
        tally::Tally,
        test_threads,
    },
    workspace::Workspace,
};

/// Debian 12's own kernel: the oldest that is supported, without TCX.
const SMOKE_KERNEL: &str = "6.1";

/// The scenario of a smoke test.
const SMOKE_SCENARIO: &str = "smoke";

/// The package whose tests run BPF programs in the kernel.
const BPF_TESTS: &str = "dataplane";

/// How the names of those of its test files begin that need nothing but the programs.
const BPF_FILES: &str = "bpf_";

/// Arguments of `vm-test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A Debian kernel to boot, such as 6.1 or 6.12; may be given again. Without it: this kernel
    #[arg(long = "kernel", value_name = "VERSION")]
    kernels: Vec<String>,
    /// Only the tests of the BPF programs and one scenario
    #[arg(long)]
    smoke: bool,
    /// Shows the machine's console
    #[arg(long)]
    console: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// Runs what was asked for and prints the counts, for each kernel and in all.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    setup::ensure(workspace)?;
    let progress = Progress::start();
    let binaries = build(workspace, &progress, args.smoke)?;
    let mut tally = Tally::default();
    if args.kernels.is_empty() {
        tally.add(here(workspace, &binaries, args)?);
    }
    for version in &args.kernels {
        let job = Job { filter: args.filter.clone(), smoke: args.smoke, console: args.console };
        match in_machine(workspace, &progress, version, &binaries, &job) {
            Ok(counts) => tally.add(counts),
            Err(error) => tally.fail(format!("kernel {version}: {error:#}")),
        }
    }
    if let Some(filter) = args.filter.as_deref().filter(|_| tally.is_empty()) {
        tally.fail(format!("no test has `{filter}` in its name"));
    }
    print!("{}", tally.details());
    println!("{tally}");
    Ok(if tally.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The BPF tests and one scenario on Debian's kernel, for `cargo xtask test`.
pub(crate) fn smoke(workspace: &Workspace, progress: &Progress) -> Result<Tally> {
    let binaries = build(workspace, progress, true)?;
    let job = Job { filter: None, smoke: true, console: false };
    in_machine(workspace, progress, SMOKE_KERNEL, &binaries, &job)
}

/// Why no Debian kernel can be had on this machine, if so.
pub(crate) fn cannot_fetch() -> Option<String> {
    let missing = ["apt-get", "apt-cache", "dpkg"].iter().find(|name| process::find_program(name).is_none());
    missing.map(|name| format!("this machine has no {name} to fetch a Debian kernel with"))
}

/// What runs in a machine.
struct Job {
    filter: Option<String>,
    smoke: bool,
    console: bool,
}

/// Builds the programs, and the tests that need a kernel: the BPF tests first, then the scenarios.
fn build(workspace: &Workspace, progress: &Progress, smoke: bool) -> Result<Vec<TestBinary>> {
    progress.stage("building the programs and tests", || {
        process::run(workspace.cargo_host("build").arg("--bins"))?;
        let mut binaries = artifacts::build_tests(workspace)?;
        binaries
            .retain(|binary| binary.integration && [BPF_TESTS, SCENARIOS].contains(&binary.package.as_str()));
        if smoke {
            binaries.retain(|binary| binary.target.starts_with(BPF_FILES) || binary.target == SMOKE_SCENARIO);
        }
        if binaries.is_empty() {
            bail!("there is no test that needs a kernel");
        }
        Ok(binaries)
    })
}

fn here(workspace: &Workspace, binaries: &[TestBinary], args: &Args) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut arguments = test_threads();
    arguments.extend(args.filter.clone());
    for binary in binaries {
        let limits = Limits { deadline: SCENARIO_DEADLINE, show: Show::EachTest };
        tally.add(harness::run_binary(workspace, binary, &arguments, limits)?);
    }
    Ok(tally)
}

fn in_machine(
    workspace: &Workspace,
    progress: &Progress,
    version: &str,
    binaries: &[TestBinary],
    job: &Job,
) -> Result<Tally> {
    if let Some(reason) = cannot_fetch() {
        bail!("{reason}");
    }
    let store = packages::Store::open(workspace)?;
    let qemu = progress.stage("QEMU from Debian", || store.qemu())?;
    let kernel = progress.stage(&format!("kernel {version} from Debian"), || store.kernel(version))?;
    let initramfs = progress.stage("packing the machine's files", || {
        guest::pack(workspace, &store, &kernel, binaries, &guest::script(binaries, job.filter.as_deref()))
    })?;
    progress.say(&format!("booting {}", kernel.release));
    let limit = Duration::from_secs(if job.smoke { 1800 } else { 5400 });
    let machine =
        machine::Machine { qemu: &qemu, kernel: &kernel, initramfs: &initramfs, console: job.console, limit };
    machine.run(progress)
}
