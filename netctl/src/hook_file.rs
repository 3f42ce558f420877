//! The files of `netctl node --hooks`: programs that the operator adds to the lifecycle of each pod.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use hextet_lifecycle::{Hook, Owner, pod};
use serde::Deserialize;

use crate::{job_file::FILE_LEN_MAX, yaml};

/// One document of a file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    hooks: BTreeMap<String, Hook>,
}

/// Reads a file, or every `*.yaml` of a folder, in the order of their names, and checks that the hooks fit a pod.
pub(crate) fn read(path: &Path) -> anyhow::Result<BTreeMap<String, Hook>> {
    let mut hooks = BTreeMap::new();
    for file in files(path)? {
        for (name, hook) in read_file(&file)? {
            if hooks.insert(name.clone(), hook).is_some() {
                bail!("{}: the hook `{name}` is in another file, too", file.display());
            }
        }
    }
    for (name, hook) in &hooks {
        hook.check(name, Owner::Operator)?;
    }
    pod::graph(&BTreeMap::new(), &hooks)?;
    Ok(hooks)
}

fn files(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let cannot_read = || format!("cannot read {}", path.display());
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = fs::read_dir(path).with_context(cannot_read)?;
    let mut files = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()
        .with_context(cannot_read)?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    Ok(files)
}

fn read_file(path: &Path) -> anyhow::Result<BTreeMap<String, Hook>> {
    let cannot_read = || format!("cannot read {}", path.display());
    let mut text = String::new();
    let file = File::open(path).with_context(cannot_read)?;
    file.take(FILE_LEN_MAX).read_to_string(&mut text).with_context(cannot_read)?;
    let at = |error: yaml::YamlError| match error.mark {
        Some(mark) => format!("{}:{}:{}: {}", path.display(), mark.line, mark.column, error.message),
        None => format!("{}: {}", path.display(), error.message),
    };
    let mut hooks = BTreeMap::new();
    for node in yaml::parse(&text).map_err(|error| anyhow::anyhow!(at(error)))? {
        let document: Document = node.read().map_err(|error| anyhow::anyhow!(at(error)))?;
        hooks.extend(document.hooks);
    }
    Ok(hooks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.yaml"), text).unwrap();
        let error = format!("{:#}", read(folder.path()).unwrap_err());
        error.replace(&folder.path().display().to_string(), "DIR")
    }

    #[test]
    fn every_file_of_a_folder_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let text = |name: &str| {
            format!("hooks:\n  {name}: {{exec: [/bin/true], before: [networking], timeout: 5s}}\n")
        };
        fs::write(folder.path().join("b.yaml"), text("two")).unwrap();
        fs::write(folder.path().join("a.yaml"), text("one")).unwrap();
        fs::write(folder.path().join("README"), "no yaml").unwrap();
        assert_eq!(read(folder.path()).unwrap().keys().collect::<Vec<_>>(), ["one", "two"]);
        fs::write(folder.path().join("c.yaml"), text("two")).unwrap();
        assert!(
            read(folder.path()).unwrap_err().to_string().ends_with("the hook `two` is in another file, too")
        );
    }

    #[test]
    fn what_is_wrong_is_said_before_the_node_starts() {
        assert_eq!(error("hooks:\n  a: {exec: 7}\n").split(": ").next(), Some("DIR/a.yaml:2:13"));
        let circle =
            "hooks:\n  a: {exec: [/x], before: [b], after: [b]}\n  b: {exec: [/x], after: [stopped]}\n";
        assert_eq!(error(circle), "steps wait for each other in a circle: a -> b -> a");
        assert!(
            error("hooks:\n  tasks: {exec: [/x], before: [running]}\n")
                .contains("registered by node already")
        );
    }
}
