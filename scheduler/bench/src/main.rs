//! `cargo xtask bench scheduler`: how fast placement is, how much memory the state takes, how both grow with the
//! cluster, and how good the places are beside the best ones.
//!
//! One thread, no server, no store: events go into `scheduler_core::transition::handle`, as the server's writer
//! puts them in. What the disk and the network add is not measured here.

#![forbid(unsafe_code)]

mod fleet;
mod memory;
mod quality;
mod speed;

/// What is measured, by the words on the command line; all of it without any.
const PARTS: [(&str, fn()); 4] = [
    ("speed", speed::targets),
    ("growth", speed::growth),
    ("memory", memory::run),
    ("quality", quality::run),
];

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = chosen.iter().find(|word| PARTS.iter().all(|(name, _)| name != word)) {
        eprintln!("error: there is no part `{unknown}`; there are speed, growth, memory and quality");
        std::process::exit(2);
    }
    for (_, part) in
        PARTS.iter().filter(|(name, _)| chosen.is_empty() || chosen.iter().any(|one| one == name))
    {
        part();
    }
}
