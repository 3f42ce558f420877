//! The conformance suite's ground: a node with pods and the internet around it, as network namespaces, and one run of
//! each test for each backend.
//!
//! A test sees a node only from outside: it sends from pods, remotes and the node itself, and looks at what arrives.
//! `results.txt` holds what each test does with each backend; a test that does something else fails.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

pub mod packet;
pub mod socket;
pub mod world;

pub use world::World;

/// What every run found when it was last written down.
const RESULTS: &str = include_str!("../results.txt");

/// Set by `cargo xtask rfc --run`: every outcome is good, and is printed.
const LEARN: &str = "HEXTET_CONFORMANCE";

/// Who translates the pods' IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The BPF programs at the uplink.
    Ebpf,
    /// The kernel's connection tracking.
    Nftables,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
        })
    }
}

/// Makes a test of each function, which takes a [`World`], for each backend.
#[macro_export]
macro_rules! each_backend {
    ($($test:ident),* $(,)?) => {
        mod ebpf {
            $(#[test] fn $test() { $crate::run($crate::Backend::Ebpf, stringify!($test), super::$test); })*
        }
        mod nftables {
            $(#[test] fn $test() { $crate::run($crate::Backend::Nftables, stringify!($test), super::$test); })*
        }
    };
}

/// Runs one test with one backend in a world of its own, in which no private source may be seen outside.
///
/// # Panics
/// When the test does something else than `results.txt` says.
pub fn run(backend: Backend, name: &str, test: fn(&World)) {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP {backend} {name}: needs root");
        return;
    }
    let world = World::new(backend);
    let is_learning = std::env::var_os(LEARN).is_some();
    let known = known_difference(backend, name).filter(|_| !is_learning);
    world::expect_failure(known.is_some());
    let result = catch_unwind(AssertUnwindSafe(|| {
        test(&world);
        world.assert_nothing_private_was_seen();
    }));
    if is_learning {
        let outcome = if result.is_ok() { "passes" } else { "differs:" };
        println!("\nCONFORMANCE {backend} {name} {outcome}");
        return;
    }
    match (known, result) {
        (None, Ok(())) => {}
        (None, Err(panic)) => resume_unwind(panic),
        (Some(reason), Err(_)) => println!("differs, as is known: {reason}"),
        (Some(reason), Ok(())) => {
            panic!("{name} passes with {backend}, against {reason:?}: `cargo xtask rfc --run` writes it down")
        }
    }
}

fn known_difference(backend: Backend, name: &str) -> Option<&'static str> {
    let line = RESULTS.lines().find_map(|line| line.strip_prefix(&format!("{backend} {name} ")))?;
    line.strip_prefix("differs:").map(str::trim)
}
