//! The test binaries that cargo builds, from its own messages: the same files run here and in a VM.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{process, workspace::Workspace};

/// One test binary of a package: its unit tests, or one file of its `tests/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TestBinary {
    /// Package name.
    pub(crate) package: String,
    /// Target name: the crate's own, or the file's.
    pub(crate) target: String,
    /// Whether it is a file of `tests/`, not unit tests.
    pub(crate) integration: bool,
    /// The program.
    pub(crate) executable: PathBuf,
    /// The package's folder, where cargo would start it.
    pub(crate) folder: PathBuf,
}

impl TestBinary {
    /// The name in reports, `package/target`.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.package, self.target)
    }
}

/// Builds every test of the packages that build for the host, and lists the binaries.
pub(crate) fn build_tests(workspace: &Workspace) -> Result<Vec<TestBinary>> {
    let mut command = workspace.cargo_host("test");
    command.args(["--no-run", "--message-format", "json-render-diagnostics"]);
    let built = command.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    if !built.status.success() {
        bail!("`{}` failed: {}", process::text(&command), built.status);
    }
    let messages = String::from_utf8_lossy(&built.stdout);
    let mut binaries: Vec<_> = messages.lines().filter_map(test_binary).collect();
    binaries.sort();
    Ok(binaries)
}

/// The names of the packages that build and pass their tests without root and without the BPF tools.
pub(crate) fn default_members(metadata: &Value) -> Vec<String> {
    let ids: Vec<_> = metadata["workspace_default_members"].as_array().into_iter().flatten().collect();
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let chosen = packages.filter(|package| ids.contains(&&package["id"]));
    chosen.filter_map(|package| package["name"].as_str().map(str::to_owned)).collect()
}

/// What `cargo metadata` says of the workspace and all that it depends on.
pub(crate) fn metadata(workspace: &Workspace) -> Result<Value> {
    let text = process::output(workspace.cargo("metadata").args(["--format-version", "1", "--locked"]))?;
    serde_json::from_str(&text).context("cannot read what `cargo metadata` printed")
}

fn test_binary(message: &str) -> Option<TestBinary> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    Some(TestBinary {
        package: package_name(message["package_id"].as_str()?)?.to_owned(),
        target: message["target"]["name"].as_str()?.to_owned(),
        integration: message["target"]["kind"][0] == "test",
        executable: message["executable"].as_str()?.into(),
        folder: Path::new(message["manifest_path"].as_str()?).parent()?.to_owned(),
    })
}

/// `path+file:///src/tests#hextet-tests@0.1.0`, or `path+file:///src/xtask#0.1.0` where the folder has the
/// package's name.
fn package_name(id: &str) -> Option<&str> {
    let (folder, version) = id.rsplit_once('#')?;
    match version.split_once('@') {
        Some((name, _)) => Some(name),
        None => folder.rsplit_once('/').map(|(_, name)| name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_named_by_its_id_or_its_folder() {
        assert_eq!(package_name("path+file:///src/tests#hextet-tests@0.1.0"), Some("hextet-tests"));
        assert_eq!(package_name("path+file:///src/xtask#0.1.0"), Some("xtask"));
    }

    #[test]
    fn only_test_artifacts_are_test_binaries() {
        let library = r#"{"reason":"compiler-artifact","profile":{"test":false},"executable":null}"#;
        let test = r#"{"reason":"compiler-artifact","package_id":"path+file:///src/node#0.1.0",
            "manifest_path":"/src/node/Cargo.toml","target":{"kind":["test"],"name":"boots_cold"},
            "profile":{"test":true},"executable":"/src/target/debug/deps/boots_cold-1"}"#;
        assert_eq!(test_binary(library), None);
        let binary = test_binary(test).unwrap();
        assert_eq!((binary.name().as_str(), binary.integration), ("node/boots_cold", true));
        assert_eq!(binary.folder, Path::new("/src/node"));
    }
}
