//! Where the checkout and its target folder are, and how cargo is started in it.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The package that only builds for the BPF target; `dataplane/build.rs` builds it.
pub(crate) const BPF_PACKAGE: &str = "dataplane-ebpf";

/// What `cargo run` sets for this program and an inner cargo must not inherit: build scripts such as
/// ring's declare these as inputs, and would run again on every change between a plain and an inner cargo.
const SET_BY_CARGO_RUN: [&str; 9] = [
    "CARGO",
    "CARGO_BIN_NAME",
    "CARGO_CRATE_NAME",
    "CARGO_MANIFEST_DIR",
    "CARGO_MANIFEST_LINKS",
    "CARGO_MANIFEST_PATH",
    "CARGO_PRIMARY_PACKAGE",
    "LD_LIBRARY_PATH",
    "OUT_DIR",
];

/// The checkout that this program was built from.
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// The checkout of the running `cargo xtask`.
    pub(crate) fn here() -> Self {
        let manifest = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest.parent().expect("xtask/ is inside the workspace").to_owned();
        let target =
            env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir));
        Self { root, target }
    }

    /// The folder of the workspace's `Cargo.toml`.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo's target folder, which also holds all that `setup` and `vm-test` keep.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// The linker for the BPF object and what it was linked with.
    pub(crate) fn bpf_tools(&self) -> PathBuf {
        self.target.join("bpf-tools")
    }

    /// Starts cargo as from a plain shell in the checkout.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut command = Command::new("cargo");
        for (name, _) in env::vars_os() {
            let Some(text) = name.to_str() else { continue };
            if SET_BY_CARGO_RUN.contains(&text) || text.starts_with("CARGO_PKG_") {
                command.env_remove(&name);
            }
        }
        command.current_dir(&self.root).arg(subcommand);
        command
    }

    /// Starts cargo on every package that builds for the host. Always the same selection, so that the
    /// features of shared dependencies are resolved once and nothing is compiled twice.
    pub(crate) fn cargo_host(&self, subcommand: &str) -> Command {
        let mut command = self.cargo(subcommand);
        command.args(["--workspace", "--exclude", BPF_PACKAGE]);
        command
    }
}
