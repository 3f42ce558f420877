//! The project's own commands: `cargo xtask <command>`.
//!
//! One file per command; nothing of the workspace is used, so that a crate that does not compile never
//! takes away the tool that says so.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

mod artifacts;
mod bench;
mod build;
mod crash;
mod demo;
mod fuzz;
mod process;
mod rfc;
mod setup;
mod simulate;
mod stage;
mod test;
mod testbed;
mod tidy;
mod vm_test;
mod workspace;

use workspace::Workspace;

/// The project's own commands
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Xtask {
    /// Installs what this machine lacks: Debian packages, a compiler and a linker for BPF
    Setup,
    /// Builds netctl, the testbed and the load balancer example (release)
    Build(build::Args),
    /// Starts a three-node cluster in network namespaces, runs a job on it and shows it working
    Demo(testbed::Args),
    /// Makes, shows and removes the testbed: up, down, exec, env, status
    Testbed(testbed::Args),
    /// Runs everything that CI runs and ends with the counts
    Test(test::Args),
    /// Runs the scenarios on this kernel, or in virtual machines with stock Debian kernels
    VmTest(vm_test::Args),
    /// Measures the network side by side with paths made by hand; `bench scheduler` measures placement
    Bench(bench::Args),
    /// Replays the fuzzers' corpus, then lets each look for an input that breaks its property
    Fuzz(fuzz::Args),
    /// Plays a cluster with faults, from one seed after the other: --seeds N, --seed FIRST
    Simulate(simulate::Args),
    /// Cuts the power and kills servers, one round after the other: --rounds N, --minutes M
    Crash(crash::Args),
    /// Makes docs/rfc.md: each clause of the RFCs, what we do, the test that shows it, the result per backend
    Rfc(rfc::Args),
    /// Checks that the tree keeps its own rules and that the documents match the code
    Tidy,
}

fn main() -> ExitCode {
    match run(Xtask::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Xtask) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::here();
    match command {
        Xtask::Setup => setup::run(&workspace).map(|()| ExitCode::SUCCESS),
        Xtask::Build(args) => build::run(&workspace, &args).map(|()| ExitCode::SUCCESS),
        Xtask::Demo(args) => demo::run(&workspace, &args),
        Xtask::Testbed(args) => testbed::run(&workspace, &args),
        Xtask::Test(args) => test::run(&workspace, &args),
        Xtask::VmTest(args) => vm_test::run(&workspace, &args),
        Xtask::Bench(args) => bench::run(&workspace, &args),
        Xtask::Fuzz(args) => fuzz::run(&workspace, &args),
        Xtask::Simulate(args) => simulate::run(&workspace, &args),
        Xtask::Crash(args) => crash::run(&workspace, &args),
        Xtask::Rfc(args) => rfc::run(&workspace, &args),
        Xtask::Tidy => tidy::run(&workspace),
    }
}
