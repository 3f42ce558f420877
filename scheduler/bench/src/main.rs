//! `cargo xtask bench scheduler`: how fast placement is, how much memory the state takes, how both grow with the
//! cluster, how good the places are beside the best ones, what a server takes that holds all of it, and how soon another takes over.
//!
//! One thread, no server, no store, but for the parts `server` and `takeover`: events go into `scheduler_core::transition::handle`, as
//! the server's writer puts them in.

#![forbid(unsafe_code)]

mod fleet;
mod memory;
mod process;
mod quality;
mod server;
mod speed;
mod takeover;

use std::{env, path::Path, process::exit};

/// What is measured, by the words on the command line; all of it without any.
const PARTS: [(&str, fn()); 6] = [
    ("speed", speed::targets),
    ("growth", speed::growth),
    ("memory", memory::run),
    ("quality", quality::run),
    ("server", server::run),
    ("takeover", takeover::run),
];

/// A part of a part, for a folder.
type Stage = (&'static str, fn(&Path));

/// They are run by `server` and `takeover`.
const STAGES: [Stage; 3] =
    [(server::FILL, server::fill), (server::SERVE, server::serve), (takeover::MEMBER, takeover::serve)];

fn main() {
    let chosen: Vec<String> = env::args().skip(1).collect();
    if let [stage, dir] = chosen.as_slice()
        && let Some((_, stage)) = STAGES.iter().find(|(name, _)| name == stage)
    {
        return stage(Path::new(dir));
    }
    if let Some(unknown) = chosen.iter().find(|word| PARTS.iter().all(|(name, _)| name != word)) {
        eprintln!(
            "error: there is no part `{unknown}`; there are speed, growth, memory, quality, server and takeover"
        );
        exit(2);
    }
    let parts = PARTS.iter().filter(|(name, _)| chosen.is_empty() || chosen.iter().any(|one| one == name));
    let parts: Vec<_> = parts.collect();
    match parts.as_slice() {
        [(_, part)] => part(),
        // Each in a process of its own: memory that one part gave back is no measure for the next.
        parts => parts.iter().for_each(|(name, _)| process::run(&[name])),
    }
}
