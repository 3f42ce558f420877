//! `netctl completions`: the completions of a shell.

use clap::CommandFactory as _;

use super::Cli;
use crate::print;

/// Print the completions of a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl completions bash > /etc/bash_completion.d/netctl")]
pub(super) struct Args {
    /// bash, zsh or fish
    #[arg(hide_possible_values = true)]
    shell: Shell,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl From<Shell> for clap_complete::Shell {
    fn from(shell: Shell) -> clap_complete::Shell {
        match shell {
            Shell::Bash => clap_complete::Shell::Bash,
            Shell::Zsh => clap_complete::Shell::Zsh,
            Shell::Fish => clap_complete::Shell::Fish,
        }
    }
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let shell = clap_complete::Shell::from(args.shell);
    print::to_stdout(|out| {
        clap_complete::generate(shell, &mut Cli::command(), "netctl", out);
        Ok(())
    })
}
