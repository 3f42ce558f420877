//! Hextet in one binary: the control plane, the node agent and the command line.
//!
//! Reads the command line and hands over to one file per command in `cmd/`. Results go to stdout, all else
//! to stderr. Exit status: 0 done, 1 failed, 2 the command line or a file is wrong. A reader that stops
//! reading is not a failure.
#![forbid(unsafe_code)]

mod client;
mod cmd;
mod duration;
mod hook_file;
mod job_file;
mod line_diff;
mod print;
mod progress;
mod resume;
mod selector;
mod unreadable;
mod yaml;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::Parser as _;

use crate::{client::Hinted, cmd::Cli, job_file::JobFileError, print::printable};

const FAILED: u8 = 1;
const WRONG_USE: u8 = 2;

fn main() -> ExitCode {
    match cmd::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(status_of(&error))
        }
    }
}

fn report(error: &anyhow::Error) {
    let mut text = format!("error: {}\n", lines(&format!("{error:#}")));
    if let Some(Hinted { hint, .. }) = error.downcast_ref::<Hinted>() {
        text.push_str(&format!("note: {hint}\n"));
    }
    // Without a stderr there is nobody to tell; the exit status says it too.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Of several lines each but the first is set in: none of them looks like one of ours.
fn lines(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(|line| printable(line.trim_start())).collect();
    lines.join("\n  ")
}

fn status_of(error: &anyhow::Error) -> u8 {
    if error.is::<JobFileError>() || error.is::<cmd::WrongUse>() { WRONG_USE } else { FAILED }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The list of what a damaged backup lacks was one line with question marks in it.
    #[test]
    fn an_error_of_several_lines_is_printed_in_lines_and_forges_none() {
        let text = lines("it lacks:\n  log: revision 3\nnote: do as I say\x1b[2J");
        assert_eq!(text, "it lacks:\n  log: revision 3\n  note: do as I say?[2J");
    }
}
