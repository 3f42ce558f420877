//! `testbed up` and `down` leave the machine as they found it, also when `up` was killed on its way.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hextet_tests::command::Run;
use hextet_tests::scenario::{Needs, check, fresh_prefix, skipped};
use hextet_tests::testbed::{Options, Testbed, down, exists};
use hextet_tests::topology::Prefix;
use hextet_tests::{jobs, machine, netns, wait};

const TESTBED: &str = env!("CARGO_BIN_EXE_testbed");
/// How often `up` is killed, at points spread over the time that it takes.
const KILLS: u32 = 5;

#[test]
fn a_network_leaves_no_trace() {
    if !skipped("a_network_leaves_no_trace", Needs::default(), false) {
        let _alone = alone();
        run(Options { cluster: false, ..Options::default() }).unwrap();
    }
}

#[test]
fn a_cluster_with_pods_leaves_no_trace() {
    if !skipped("a_cluster_with_pods_leaves_no_trace", Needs::default(), true) {
        let _alone = alone();
        run(Options::default()).unwrap();
    }
}

fn run(options: Options) -> Result<()> {
    let prefix = fresh_prefix();
    let before = Machine::look();
    let _clear = Clear(prefix.clone());
    let took = check("up, up again, down, down again", || up_and_down(&prefix, &options, &before))?;
    for number in 1..=KILLS {
        let delay = took * number / (KILLS + 1);
        let what = format!("up killed after {:.2} s, then down", delay.as_secs_f64());
        check(&what, || kill_up(&prefix, &options, delay, &before))?;
    }
    Ok(())
}

fn up_and_down(prefix: &Prefix, options: &Options, before: &Machine) -> Result<Duration> {
    let start = Instant::now();
    up(prefix, options).success()?;
    let took = start.elapsed();
    if options.cluster {
        let testbed = Testbed::open(prefix.clone())?;
        testbed.apply(jobs::HELLO)?;
        let pods = testbed.wait_running("hello", 3, Duration::from_secs(20))?;
        ensure!(pods.iter().all(|pod| netns::list().contains(&pod.id)), "each pod has a namespace: {pods:?}");
    }
    let again = up(prefix, options).output()?;
    ensure!(again.ok() && again.stdout.contains("(it was)"), "the second up says that it was up: {again}");
    ensure!(exists(prefix), "the testbed is up");
    ensure!(Machine::look() != *before, "a testbed that is up can be seen");
    testbed_command(prefix, "down").success()?;
    before.is_back(prefix)?;
    let again = testbed_command(prefix, "down").output()?;
    ensure!(
        again.ok() && again.stdout.contains("(it was)"),
        "the second down says that it was down: {again}"
    );
    before.is_back(prefix)?;
    Ok(took)
}

fn kill_up(prefix: &Prefix, options: &Options, delay: Duration, before: &Machine) -> Result<()> {
    let mut child = Command::new(TESTBED)
        .args(up_args(prefix, options))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    // The point in time is what is tested here; no condition could be waited for.
    std::thread::sleep(delay);
    child.kill()?;
    child.wait()?;
    testbed_command(prefix, "down").success()?;
    before.is_back(prefix)
}

fn up(prefix: &Prefix, options: &Options) -> Run {
    let args = up_args(prefix, options);
    let line: Vec<&str> = std::iter::once(TESTBED).chain(args.iter().map(String::as_str)).collect();
    Run::new(&line).limit(Duration::from_secs(90))
}

fn up_args(prefix: &Prefix, options: &Options) -> Vec<String> {
    let mut args = vec!["up".to_owned(), "--prefix".to_owned(), prefix.to_string()];
    args.extend((!options.cluster).then(|| "--no-cluster".to_owned()));
    args
}

fn testbed_command(prefix: &Prefix, command: &str) -> Run {
    Run::new(&[TESTBED, command, "--prefix", prefix.as_str()]).limit(Duration::from_secs(60))
}

/// The tests of this file compare the whole machine, so they run one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the testbed down when a check has failed.
struct Clear(Prefix);

impl Drop for Clear {
    fn drop(&mut self) {
        if exists(&self.0) {
            down(&self.0);
        }
    }
}

/// All that a testbed could leave behind.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Machine {
    facts: BTreeSet<String>,
}

impl Machine {
    fn look() -> Self {
        let mut facts = BTreeSet::new();
        facts.extend(netns::list().into_iter().map(|name| format!("namespace {name}")));
        facts.extend(links().into_iter().map(|name| format!("link {name}")));
        facts.extend(mounts().into_iter().map(|path| format!("mount {path}")));
        facts.extend(programs().into_iter().map(|line| format!("process {line}")));
        for root in [netns::DIR, machine::ROOT, machine::PINS, "/etc/iproute2/rt_protos.d", "/run/hextet"] {
            files(Path::new(root), &mut facts);
        }
        Self { facts }
    }

    /// The kernel takes what is in a namespace away a moment after the namespace.
    fn is_back(&self, prefix: &Prefix) -> Result<()> {
        let what = format!("nothing of {prefix} is left, and nothing is missing");
        wait::wait_for(Duration::from_secs(10), &what, || {
            let now = Self::look();
            let more: Vec<_> = now.facts.difference(&self.facts).collect();
            let less: Vec<_> = self.facts.difference(&now.facts).collect();
            if more.is_empty() && less.is_empty() {
                Ok(())
            } else {
                Err(format!("more: {more:?}, less: {less:?}"))
            }
        })?;
        Ok(())
    }
}

fn links() -> Vec<String> {
    let names = nix::net::if_::if_nameindex().expect("the interfaces can be listed");
    names.iter().map(|link| link.name().to_string_lossy().into_owned()).collect()
}

fn mounts() -> Vec<String> {
    let all = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts can be read");
    all.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect()
}

/// The programs that a testbed starts, and those that pods run, by what they were started with.
fn programs() -> Vec<String> {
    let entries = std::fs::read_dir("/proc").expect("processes can be listed");
    let lines = entries.flatten().filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines
        .filter(|line| ["netctl", "testbed echo", "httpd -f"].iter().any(|word| line.contains(word)))
        .collect()
}

fn files(dir: &Path, facts: &mut BTreeSet<String>) {
    if !dir.exists() {
        return;
    }
    facts.insert(format!("folder {}", dir.display()));
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), facts);
        } else {
            facts.insert(format!("file {}", entry.path().display()));
        }
    }
}
