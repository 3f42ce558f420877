//! `cargo xtask crash`: the tests of power cuts and of killed servers, for longer than every day.
//!
//! A round is one seed: some power cuts on a disk that is played, and 25 kills of a real server with one state
//! directory. The moments of the kills come from the seed, and what the machine does meanwhile does not.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{process, workspace::Workspace};

/// Both tests: the target of `scheduler`, the name, and how many seeds of it are one round.
const TESTS: [(&[&str], &str, u64); 2] = [
    (&["--lib"], "no_power_cut_loses_what_was_acknowledged_or_shows_what_never_was", 20),
    (&["--test", "kill"], "no_kill_loses_what_was_acknowledged", 1),
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many rounds: in each, 20 disks of 20 lives with more cuts in between, and 25 kills of a server
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// The first round's number, from which its seeds come: to play a round again
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    first: u64,
    /// Begins no further round after so many minutes
    #[arg(long, value_name = "NUMBER")]
    minutes: Option<u64>,
}

/// Plays round after round until one fails.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let begun = Instant::now();
    let max = args.minutes.map(|minutes| Duration::from_secs(60 * minutes));
    let mut played = 0;
    for round in args.first..args.first.saturating_add(args.rounds) {
        if max.is_some_and(|max| begun.elapsed() >= max) {
            break;
        }
        println!("round {round}: again with `cargo xtask crash --rounds 1 --first {round}`");
        play(workspace, round).with_context(|| format!("round {round}"))?;
        played += 1;
    }
    println!("{played} rounds in {} s: nothing was lost", begun.elapsed().as_secs());
    Ok(ExitCode::SUCCESS)
}

fn play(workspace: &Workspace, round: u64) -> Result<()> {
    for (target, name, seeds) in TESTS {
        let mut cargo = workspace.cargo("test");
        cargo.args(["--quiet", "-p", "scheduler"]).args(target).args(["--", "--exact", "--nocapture"]);
        let path = if target == ["--lib"] { format!("store::redb::power::{name}") } else { name.to_owned() };
        let first = round.saturating_mul(seeds).to_string();
        cargo.arg(path).env("HEXTET_CRASH_SEED", first).env("HEXTET_CRASH_ROUNDS", seeds.to_string());
        process::run(&mut cargo)?;
    }
    Ok(())
}
