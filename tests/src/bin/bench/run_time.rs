//! Where the time goes: the kernel's run-time statistics of a node's programs while something is measured.
//! They cost time themselves, and so are never on while a rate is.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use aya::sys::{Stats, enable_stats};
use dataplane::bpf::Program;
use hextet_tests::{Testbed, command::Run, machine};
use serde_json::Value;

/// Nanoseconds and runs of each program, by its number in the kernel.
type Used = BTreeMap<u64, (&'static str, f64, f64)>;

/// What the programs of a node took in nanoseconds a run while `work` was done; those that ran.
pub(crate) fn during<T>(
    testbed: &Testbed,
    node: &str,
    work: impl FnOnce() -> Result<T>,
) -> Result<Vec<(&'static str, f64)>> {
    let _on = enable_stats(Stats::RunTime).context("cannot switch run-time statistics on (Linux 5.8)")?;
    let before = used(testbed, node)?;
    work()?;
    let mut sums: BTreeMap<&'static str, (f64, f64)> = BTreeMap::new();
    for (id, (name, ns, runs)) in used(testbed, node)? {
        let (_, ns_before, runs_before) = before.get(&id).copied().unwrap_or((name, 0.0, 0.0));
        let sum = sums.entry(name).or_default();
        *sum = (sum.0 + ns - ns_before, sum.1 + runs - runs_before);
    }
    // A handful of runs are neighbour discovery of the testbed's own.
    let busy = sums.into_iter().filter(|(_, (_, runs))| *runs > 1000.0);
    Ok(busy.map(|(name, (ns, runs))| (name, ns / runs)).collect())
}

fn used(testbed: &Testbed, node: &str) -> Result<Used> {
    let mut all = Used::new();
    for link in links(testbed, node)? {
        let Some(program) = name_of(&link) else { continue };
        let id = bpftool(&["link", "show", "pinned", &link.to_string_lossy()])?;
        let id = id["prog_id"].as_u64().context("bpftool names no program")?;
        let shown = bpftool(&["prog", "show", "id", &id.to_string()])?;
        let number = |key: &str| shown[key].as_f64().unwrap_or_default();
        all.insert(id, (program, number("run_time_ns"), number("run_cnt")));
    }
    Ok(all)
}

/// The pins of a node's links, below the folder of its layout's version.
fn links(testbed: &Testbed, node: &str) -> Result<Vec<PathBuf>> {
    let folder = layout(testbed, node)?;
    let pins = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    Ok(pins.flatten().map(|pin| pin.path()).collect())
}

/// `link-eth0-uplink_egress`
fn name_of(link: &Path) -> Option<&'static str> {
    let name = link.file_name()?.to_str()?;
    let program = name.strip_prefix("link-")?.rsplit('-').next()?;
    Program::named(program).map(Program::as_str)
}

/// The folder of a node's pins.
pub(crate) fn layout(testbed: &Testbed, node: &str) -> Result<PathBuf> {
    let folder = PathBuf::from(machine::PINS).join(testbed.netns(node).name());
    let layouts = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let layout = layouts.flatten().map(|layout| layout.path()).find(|layout| layout.is_dir());
    layout.with_context(|| format!("nothing is pinned below {}", folder.display()))
}

/// What `bpftool` says about one thing.
pub(crate) fn bpftool(words: &[&str]) -> Result<Value> {
    let line: Vec<&str> = ["bpftool", "-j"].into_iter().chain(words.iter().copied()).collect();
    let text = Run::new(&line).success()?;
    let value: Value = serde_json::from_str(&text).context("bpftool printed no JSON")?;
    // Some versions print a list of one.
    Ok(match value {
        Value::Array(mut one) if one.len() == 1 => one.remove(0),
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_of_a_link_is_the_last_word_of_its_pin() {
        assert_eq!(name_of(Path::new("/pins/v2/link-pod-a-pod_guard")), Some("pod_guard"));
        assert_eq!(name_of(Path::new("/pins/v2/NAT_PORTS")), None);
    }
}
