//! A Rust compiler with its library source: BPF has no precompiled `core`. The order is the one of
//! `dataplane/build.rs`: rustup's nightly, then Debian's.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::process;

/// Debian's compiler for web engines, newer than its rustc, and the library source of the same version.
pub(super) const PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];

/// A compiler that can build the BPF object.
pub(super) struct BpfCompiler {
    /// The program.
    pub(super) rustc: PathBuf,
    /// Where its own libraries are.
    pub(super) sysroot: PathBuf,
    /// The major version of its LLVM, which the linker's must equal.
    pub(super) llvm_major: u32,
}

/// The first compiler that has its library source.
pub(super) fn find() -> Option<BpfCompiler> {
    let chosen = std::env::var_os("HEXTET_BPF_RUSTC").map(PathBuf::from);
    let nightly = plain_output(Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]));
    let candidates = [chosen, nightly.map(PathBuf::from), Some(PathBuf::from("/usr/bin/rustc"))];
    candidates.into_iter().flatten().find_map(|rustc| with_source(&rustc))
}

/// [`find`], with what to do when there is none.
pub(super) fn require() -> Result<BpfCompiler> {
    find().context(
        "there is no Rust compiler with library source for BPF: `rustup component add rust-src --toolchain nightly`, \
         or on Debian 12 `apt-get install --no-install-recommends rustc-web rust-web-src`",
    )
}

fn with_source(rustc: &Path) -> Option<BpfCompiler> {
    let sysroot = PathBuf::from(plain_output(Command::new(rustc).args(["--print", "sysroot"]))?);
    let source = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
    let version = plain_output(Command::new(rustc).arg("-vV"))?;
    source.exists().then_some(())?;
    Some(BpfCompiler { rustc: rustc.to_owned(), sysroot, llvm_major: llvm_major(&version)? })
}

/// What a command prints, run as from a plain shell: rustup's proxies obey what the outer cargo sets.
fn plain_output(command: &mut Command) -> Option<String> {
    let text = process::output(command.env_remove("RUSTC").env_remove("RUSTUP_TOOLCHAIN")).ok()?;
    Some(text.trim().to_owned())
}

fn llvm_major(version: &str) -> Option<u32> {
    let line = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    line.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_major_is_read_from_what_rustc_prints() {
        assert_eq!(llvm_major("rustc 1.96.0\nrelease: 1.96.0\nLLVM version: 22.1.2\n"), Some(22));
    }

    #[test]
    fn a_compiler_that_does_not_name_its_llvm_is_not_one() {
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }

    #[test]
    fn a_compiler_that_is_not_there_is_not_found() {
        assert!(with_source(Path::new("/nonexistent/rustc")).is_none());
    }
}
