//! `hextet-simulation`: plays seeds until one fails, and prints the way there. Each is played twice: a cluster with one
//! server, and several servers over one store.

use std::{
    io::{IsTerminal as _, Write as _, stderr},
    process::ExitCode,
};

use clap::Parser;
use hextet_simulation::{Options, Outcome, play, play_several};

/// Plays a cluster with faults, one seed after the other
#[derive(Parser)]
struct Args {
    /// How many seeds
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Machines that run pods
    #[arg(long, default_value_t = Options::default().nodes)]
    nodes: usize,
    /// Steps with faults; afterwards everything must converge
    #[arg(long, default_value_t = Options::default().steps)]
    steps: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let options = Options { nodes: args.nodes.max(1), steps: args.steps, ..Options::default() };
    // What did not hold is told with its seed.
    std::panic::set_hook(Box::new(|_| {}));
    for (number, seed) in (args.seed..).take(usize::try_from(args.seeds).unwrap_or(usize::MAX)).enumerate() {
        for play in [play, play_several] {
            let outcome = play(seed, &options);
            if outcome.failure.is_some() {
                tell_failure(&args, seed, &outcome);
                return ExitCode::FAILURE;
            }
            progress(number as u64 + 1, args.seeds, seed, &outcome);
        }
    }
    println!("{} seeds from {} on: everything held", args.seeds, args.seed);
    ExitCode::SUCCESS
}

fn progress(done: u64, all: u64, seed: u64, outcome: &Outcome) {
    let figures = outcome.figures;
    if stderr().is_terminal() {
        eprint!(
            "\r{done}/{all} seeds, the last one with {} revisions and {} faults   ",
            figures.revisions, figures.faults
        );
        let _ = stderr().flush();
        if done == all {
            eprintln!();
        }
    } else {
        eprintln!("seed {seed}: {:016x} {figures:?}", outcome.hash);
    }
}

fn tell_failure(args: &Args, seed: u64, outcome: &Outcome) {
    let Some(failure) = &outcome.failure else { return };
    eprintln!();
    failure.trace.iter().for_each(|line| eprintln!("{line}"));
    eprintln!("error: seed {seed}: {}", failure.what);
    eprintln!(
        "note: the same again: cargo xtask simulate --seeds 1 --seed {seed} --nodes {} --steps {}",
        args.nodes, args.steps
    );
}
