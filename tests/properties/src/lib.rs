//! What must hold for every input of the parsers. The fuzzers of `fuzz/` look for an input for which it does not,
//! and a test replays what they have found so far.
//!
//! A property panics when it does not hold. Packets are judged by code of this crate that knows nothing of the code
//! under test: checksums are computed from scratch, rules are written down again, slow and simple.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

pub mod frame;
pub mod job_file;
pub mod masquerade;
pub mod ndp_proxy;
pub mod pod_guard;
pub mod tables;
pub mod token;

// A program is no library, and the API is a large one: what is tested of them is compiled here a second time.
#[allow(dead_code, reason = "the program uses more of it")]
#[path = "../../../netctl/src"]
mod netctl {
    pub(crate) mod job_file;
    pub(crate) mod yaml;
}
#[allow(dead_code, unreachable_pub, reason = "the API's users use more of it")]
#[path = "../../../api/src"]
mod api {
    pub(crate) mod token;
}
use netctl::yaml;

/// Panics when an input breaks it.
pub type Property = fn(&[u8]);

/// Every property, by the name of its fuzzer and of the folder of its corpus.
pub const TARGETS: [(&str, Property); 6] = [
    ("job_file", job_file::holds),
    ("masquerade_egress", masquerade::egress_holds),
    ("masquerade_ingress", masquerade::ingress_holds),
    ("ndp_proxy", ndp_proxy::holds),
    ("pod_guard", pod_guard::holds),
    ("token", token::holds),
];

/// The inputs that a fuzzer has found worth keeping, by path, in order.
///
/// # Panics
/// When the folder is missing or cannot be read.
pub fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    // Not by way of `..`, for a virtual machine has the corpus at its place, and not this package.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("two folders up");
    let folder = root.join("fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("the folder can be read").path()).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        (path, bytes)
    };
    paths.into_iter().map(read).collect()
}
