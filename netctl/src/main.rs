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
    let mut text = format!("error: {}\n", printable(&format!("{error:#}")));
    if let Some(Hinted { hint, .. }) = error.downcast_ref::<Hinted>() {
        text.push_str(&format!("note: {hint}\n"));
    }
    // Without a stderr there is nobody to tell; the exit status says it too.
    let _ = io::stderr().write_all(text.as_bytes());
}

fn status_of(error: &anyhow::Error) -> u8 {
    if error.is::<JobFileError>() || error.is::<cmd::WrongUse>() { WRONG_USE } else { FAILED }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
