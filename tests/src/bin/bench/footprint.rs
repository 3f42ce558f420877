//! Memory and idle processor time of the agent and the server.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::unistd::Pid;

use crate::{
    Bench, pods,
    report::{Better, Metric},
    say,
};

/// How long idleness is watched.
const WATCH: Duration = Duration::from_secs(10);

const TABLE: &str = "idle";
const MEMORY: Metric = Metric { table: TABLE, name: "resident memory", unit: "MiB", better: Better::Less };
const PROCESSOR: Metric = Metric { table: TABLE, name: "processor", unit: "%", better: Better::Less };

/// Watches `n1` and the server with one pod there, while nothing happens.
pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    pods::pods(bench)?;
    say(&format!("idle agent and server: {} s", WATCH.as_secs()));
    watch(bench, MEMORY, PROCESSOR)
}

/// Adds memory and processor time of the agent of `n1` and of the server.
pub(crate) fn watch(bench: &mut Bench, memory: Metric, processor: Metric) -> Result<()> {
    let agent = bench.cluster.agent("n1").pid().context("the agent of n1 does not run")?;
    let server = bench.cluster.server().pid().context("the server does not run")?;
    let processes = [("agent", agent), ("server", server)];
    // What was applied a moment ago may still be under way.
    std::thread::sleep(Duration::from_secs(1));
    let start = Instant::now();
    let before = processes.map(|(_, pid)| used(pid));
    std::thread::sleep(WATCH);
    let took = start.elapsed().as_secs_f64();
    for ((name, pid), before) in processes.into_iter().zip(before) {
        bench.report.add(memory, name, resident_mib(pid)?);
        bench.report.add(processor, name, (used(pid)? - before?) / took * 100.0);
    }
    Ok(())
}

/// Percent of a processor that a process takes for [`WATCH`].
pub(crate) fn busy(pid: Pid) -> Result<f64> {
    let (start, before) = (Instant::now(), used(pid)?);
    std::thread::sleep(WATCH);
    Ok((used(pid)? - before) / start.elapsed().as_secs_f64() * 100.0)
}

fn resident_mib(pid: Pid) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the process is gone")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().context("VmRSS is not a number")?;
    Ok(kib / 1024.0)
}

/// Seconds that all threads of the process ran so far, in nanosecond steps.
fn used(pid: Pid) -> Result<f64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).context("the process is gone")?;
    let nanoseconds: u64 = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    Ok(nanoseconds as f64 / 1e9)
}
