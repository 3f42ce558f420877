//! The kernel modules of a machine: those of `modules.list` and what they depend on, unpacked, with an index
//! of their own. Made once per kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::packages::{Kernel, Store};
use crate::process;

const WANTED: &str = include_str!("modules.list");

/// The folder that holds `lib/modules/RELEASE`.
pub(super) fn prepare(store: &Store, kernel: &Kernel) -> Result<PathBuf> {
    let folder = store.folder().join(format!("modules-{}", kernel.release));
    let mark = folder.join(".complete");
    // A changed list makes new modules.
    if fs::read_to_string(&mark).is_ok_and(|list| list == WANTED) {
        return Ok(folder);
    }
    _ = fs::remove_dir_all(&folder);
    let depmod = named(store, "depmod")?;
    let source = kernel.modules()?;
    process::run(Command::new(&depmod).arg("-b").arg(tree_of(&source)).arg(&kernel.release))?;
    let target = folder.join("lib/modules").join(&kernel.release);
    for module in chosen(&fs::read_to_string(source.join("modules.dep"))?) {
        copy_module(&source, &target, &module)?;
    }
    for index in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        fs::copy(source.join(index), target.join(index))
            .with_context(|| format!("the kernel has no {index}"))?;
    }
    process::run(Command::new(&depmod).arg("-b").arg(&folder).arg(&kernel.release))?;
    fs::write(mark, WANTED)?;
    Ok(folder)
}

/// kmod under the name that tells it what to do.
fn named(store: &Store, name: &str) -> Result<PathBuf> {
    let link = store.folder().join(name);
    _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(store.kmod()?, &link)
        .with_context(|| format!("cannot link {}", link.display()))?;
    Ok(link)
}

/// `ROOT` of `ROOT/lib/modules/RELEASE`, which is what depmod is told.
fn tree_of(modules: &Path) -> &Path {
    modules.ancestors().nth(3).unwrap_or(modules)
}

/// The wanted modules of `modules.dep` (`path: path...`) with all that they need.
fn chosen(dependencies: &str) -> BTreeSet<String> {
    let needs: BTreeMap<&str, Vec<&str>> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needed)| (module, needed.split_whitespace().collect()))
        .collect();
    let mut queue: Vec<&str> = needs.keys().copied().filter(|module| is_wanted(module)).collect();
    let mut chosen = BTreeSet::new();
    while let Some(module) = queue.pop() {
        if chosen.insert(module.to_owned()) {
            queue.extend(needs.get(module).into_iter().flatten());
        }
    }
    chosen
}

fn is_wanted(module: &str) -> bool {
    let wanted = WANTED.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let path = module.strip_prefix("kernel/").unwrap_or(module);
    wanted.into_iter().any(|start| path.starts_with(start))
}

/// Copies one module; Debian packs them with xz from 6.10 on.
fn copy_module(source: &Path, target: &Path, module: &str) -> Result<()> {
    let from = source.join(module);
    let to = target.join(module.strip_suffix(".xz").unwrap_or(module));
    fs::create_dir_all(to.parent().expect("a module is in a folder"))?;
    if !module.ends_with(".xz") {
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        return Ok(());
    }
    let unpacked = Command::new("xz").arg("-dc").arg(&from).stdout(File::create(&to)?).status();
    if !unpacked.context("cannot start xz (Debian package xz-utils)")?.success() {
        bail!("cannot unpack {}", from.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_wanted_module_needs_comes_with_it() {
        let dependencies = "kernel/drivers/net/veth.ko:\n\
                            kernel/net/sched/act_x.ko: kernel/drivers/a.ko kernel/drivers/b.ko\n\
                            kernel/drivers/a.ko: kernel/drivers/c.ko\n\
                            kernel/drivers/gpu/big.ko:\n";
        let modules: Vec<_> = chosen(dependencies).into_iter().collect();
        assert_eq!(
            modules,
            [
                "kernel/drivers/a.ko",
                "kernel/drivers/b.ko",
                "kernel/drivers/c.ko",
                "kernel/drivers/net/veth.ko",
                "kernel/net/sched/act_x.ko"
            ]
        );
    }
}
