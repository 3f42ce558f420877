//! `testbed up` and `down` leave the machine as they found it, also when `up` was killed on its way.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hextet_tests::command::Run;
use hextet_tests::process::describe;
use hextet_tests::scenario::{Needs, check, fresh_prefix, skipped};
use hextet_tests::testbed::{Options, Testbed, down, exists};
use hextet_tests::topology::{Place, Prefix};
use hextet_tests::{jobs, machine, netns, wait};
use nix::unistd::Pid;

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
    let before = Machine::look(&prefix);
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
        testbed.apply(&jobs::hello_as("trace", 3, &[]))?;
        let pods = testbed.wait_running("trace", 3, Duration::from_secs(20))?;
        let names = netns::list();
        ensure!(pods.iter().all(|pod| is_pod(&pod.id) && names.contains(&pod.id)), "each has one: {pods:?}");
        // That they are found shows that they would be found if they were left.
        let tasks = processes(prefix).iter().filter(|line| line.contains("httpd")).count();
        ensure!(tasks == 3, "{tasks} tasks are found: {:?}", processes(prefix));
    }
    let again = up(prefix, options).output()?;
    ensure!(again.ok() && again.stdout.contains("(it was)"), "the second up says that it was up: {again}");
    ensure!(exists(prefix), "the testbed is up");
    ensure!(Machine::look(prefix) != *before, "a testbed that is up can be seen");
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

/// All that a testbed could leave behind, as far as it can be told from what others make at the same time.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Machine {
    facts: BTreeSet<String>,
}

impl Machine {
    /// What is there of a testbed, and what testbeds share.
    fn look(prefix: &Prefix) -> Self {
        let mut facts = BTreeSet::new();
        facts.extend(
            netns::list()
                .into_iter()
                .filter(|n| prefix.owns(n) || is_pod(n))
                .map(|n| format!("namespace {n}")),
        );
        facts.extend(links().into_iter().map(|name| format!("link {name}")));
        facts.extend(processes(prefix).into_iter().map(|line| format!("process {line}")));
        for root in [machine::ROOT, machine::PINS] {
            files(Path::new(root), prefix, &mut facts);
        }
        let shared =
            [netns::DIR, machine::ROOT, machine::PINS, PROTOCOL_NAME, "/run/hextet", "/var/lib/hextet"];
        facts
            .extend(shared.iter().filter(|path| Path::new(path).exists()).map(|path| format!("file {path}")));
        let mounts = [netns::DIR, machine::BPFFS].into_iter().filter(|path| machine::is_mount(path));
        facts.extend(mounts.map(|path| format!("mount {path}")));
        Self { facts }
    }

    /// The kernel takes what is in a namespace away a moment after the namespace.
    fn is_back(&self, prefix: &Prefix) -> Result<()> {
        let what = format!("nothing of {prefix} is left, and nothing is missing");
        wait::wait_for(Duration::from_secs(10), &what, || {
            let now = Self::look(prefix);
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

const PROTOCOL_NAME: &str = "/etc/iproute2/rt_protos.d/hextet.conf";

/// Whether it is the name of one of the pods that this file starts.
fn is_pod(netns: &str) -> bool {
    netns.starts_with("trace-web-")
}

/// Interfaces here with names that a testbed gives.
fn links() -> Vec<String> {
    let names = nix::net::if_::if_nameindex().expect("the interfaces can be listed");
    let names = names.iter().map(|link| link.name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("hx") || name == "br0" || Place::parse(name).is_some()).collect()
}

/// Processes that have the prefix in their command line, their environment or their folder. Tasks of pods
/// have it in the latter two.
fn processes(prefix: &Prefix) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").expect("processes can be listed");
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let others = pids.filter(|pid| *pid != std::process::id());
    others.filter(|pid| is_of(*pid, prefix)).map(|pid| describe(Pid::from_raw(pid.cast_signed()))).collect()
}

fn is_of(pid: u32, prefix: &Prefix) -> bool {
    let file = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let folder = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
    let all = [file("cmdline"), file("environ"), folder.into_os_string().into_encoded_bytes()];
    all.iter()
        .any(|bytes| bytes.windows(prefix.as_str().len()).any(|part| part == prefix.as_str().as_bytes()))
}

/// Files below `dir` whose path has the prefix in it.
fn files(dir: &Path, prefix: &Prefix, facts: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.to_string_lossy().contains(prefix.as_str()) {
            facts.insert(format!("file {}", path.display()));
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&path, prefix, facts);
        }
    }
}
