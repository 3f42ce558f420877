//! Nodes fall silent: dead, cut off, or only busy. Who is replaced, when, and who is left alone.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hextet_tests::netns;
use hextet_tests::probe::{all_greet, greet};
use hextet_tests::progress::Progress;
use hextet_tests::scenario::{BUSYBOX, CURL, NFT, Needs, check, scenario};
use hextet_tests::wait::{scaled, wait_for};
use hextet_tests::{Options, Pod, Testbed, jobs, wait_until};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX, NFT] };
const SOON: Duration = Duration::from_secs(20);
/// The lease that a server has when nothing is said.
const LEASE: Duration = Duration::from_secs(5);
/// Where an agent has to start anew within it, also on a busy machine.
const COPIED_LEASE: Duration = Duration::from_secs(15);

#[test]
fn a_dead_node_is_replaced_long_before_its_lease_ends() {
    scenario("a_dead_node_is_replaced_long_before_its_lease_ends", NEEDS, Options::default(), dead);
}

fn dead(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    testbed.apply(jobs::HELLO)?;
    testbed.apply(&jobs::hello_as("cat", 1, &["availability: pet", "constraints: {node: n3}"]))?;
    let before = testbed.wait_running("hello", 3, SOON)?;
    let pet = testbed.wait_running("cat", 1, SOON)?.remove(0);
    all_greet(&client, &before, SOON)?;
    let lost = before.iter().find(|pod| pod.node == "n3").context("a pod is on n3")?.clone();
    check("a pod in its place answers before the lease could have ended", || {
        let died = Instant::now();
        testbed.kill_node("n3", &[&lost, &pet])?;
        wait_for(SOON, "a pod in its place answers", || {
            let pods = testbed.pods("hello").map_err(|error| format!("{error:#}"))?;
            let new = pods.into_iter().find(|pod| !before.contains(pod) && pod.phase == "running");
            greet(&client, &new.ok_or("there is no new pod")?).map_err(|error| format!("{error:#}"))
        })?;
        let took = died.elapsed();
        println!("a pod in the place of one on a dead node answers after {} ms", took.as_millis());
        ensure!(took < scaled(LEASE), "it took {took:?}");
        Ok(())
    })?;
    check("the pet waits, until somebody says that the node is dead", || {
        let pods = testbed.pods("cat")?;
        ensure!(pods.len() == 1 && pods[0].id == pet.id && pods[0].phase == "lost", "{pods:?}");
        let refused = testbed.netctl(&["node", "dead", "n1"])?.failed_with(1)?;
        ensure!(refused.contains("still reports"), "{refused}");
        testbed.netctl(&["node", "dead", "n3", "-m", "its power supply burnt"])?.success()?;
        testbed.wait_node("n3", "dead", SOON)?;
        testbed.apply(&jobs::hello_as("cat", 1, &["availability: pet"]))?;
        let again = testbed.wait_running("cat", 1, SOON)?.remove(0);
        ensure!(again.node != "n3" && again.id != pet.id, "{again:?}");
        all_greet(&client, &[again], SOON)
    })?;
    check("it was not dead: it returns, and gives up both before it serves them again", || {
        testbed.run_in("n3", &["ip", "link", "set", "eth0", "up"]).success()?;
        let since = testbed.agent("n3").daemon().log_len();
        // Its addresses and routes went with the interface; a machine's network configuration sets them again.
        Testbed::up(testbed.prefix().clone(), testbed.options().clone(), Progress::Quiet)?;
        testbed.wait_node("n3", "ready", SOON)?;
        wait_until(SOON, "nothing of them is left", || {
            [&lost, &pet].iter().all(|pod| !netns::list().contains(&pod.id))
        })?;
        let log = testbed.agent("n3").daemon().log_since(since);
        let ran = |pod: &Pod| log.lines().any(|line| line.contains(&pod.id) && line.contains("running"));
        ensure!(!ran(&lost) && !ran(&pet), "one of them ran again: {log}");
        testbed.wait_running("hello", 3, SOON).map(drop)
    })
}

#[test]
fn a_cut_of_the_control_path_leaves_pods_and_traffic_alone() {
    scenario("a_cut_of_the_control_path_leaves_pods_and_traffic_alone", NEEDS, Options::default(), cut);
}

fn cut(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    testbed.apply(jobs::HELLO)?;
    let before = testbed.wait_running("hello", 3, SOON)?;
    all_greet(&client, &before, SOON)?;
    check("its neighbours reach it: it is cut off, for more than a lease, and all pods answer", || {
        cut_control(testbed, "n3")?;
        testbed.wait_node("n3", "cut-off", SOON)?;
        let since = Instant::now();
        while since.elapsed() < scaled(LEASE) + Duration::from_secs(2) {
            before.iter().try_for_each(|pod| greet(&client, pod))?;
            sleep(Duration::from_millis(100));
        }
        ensure!(testbed.pods("hello")? == before, "{:?}", testbed.pods("hello")?);
        ensure!(testbed.node_phases()?["n3"] == "cut-off", "{:?}", testbed.node_phases()?);
        Ok(())
    })?;
    check("it is back with the same pods, none restarted", || {
        mend_control(testbed, "n3")?;
        testbed.wait_node("n3", "ready", SOON)?;
        let after = testbed.wait_running("hello", 3, SOON)?;
        ensure!(after == before, "{after:?} were {before:?}");
        testbed.plans_nothing_on("n3")
    })
}

#[test]
fn of_a_singleton_there_are_never_two_that_live() {
    scenario("of_a_singleton_there_are_never_two_that_live", NEEDS, Options::default(), singleton);
}

/// A job whose pod writes who it is, all the time, into a file that outlives it.
fn queue(testbed: &Testbed, more: &str) -> String {
    let beats = testbed.dir().join("beats");
    let script = format!("echo $HEXTET_POD $HEXTET_FENCING_TOKEN >> {}", beats.display());
    format!(
        "job: queue\ngroups:\n  boss:\n    count: 1\n    availability: singleton\n{more}    tasks:\n      t:\n        \
         exec: [/bin/sh, -c, 'while :; do {script}; sleep 0.02; done']\n"
    )
}

fn singleton(testbed: &Testbed) -> Result<()> {
    let beats = testbed.dir().join("beats");
    fs::write(&beats, "")?;
    fs::set_permissions(&beats, fs::Permissions::from_mode(0o666))?;
    testbed.apply(&queue(testbed, "    constraints: {node: n3}\n"))?;
    let first = testbed.wait_running("queue", 1, SOON)?.remove(0);
    let second = check("a change that moves it ends it first", || {
        testbed.apply(&queue(testbed, "    constraints: {node: n2}\n"))?;
        Ok(wait_for(SOON, "it runs on n2", || runs(testbed, |pod| pod.node == "n2"))?.1)
    })?;
    testbed.apply(&queue(testbed, ""))?;
    let third = check("on a node that is cut off it ends by itself, and another starts then", || {
        let at = Instant::now();
        cut_control(testbed, "n2")?;
        let third = wait_for(SOON, "another runs", || runs(testbed, |pod| pod.id != second.id))?.1;
        println!("a singleton runs elsewhere {} ms after its node was cut off", at.elapsed().as_millis());
        Ok(third)
    })?;
    check("back, the node does not start it again, and never were there two", || {
        mend_control(testbed, "n2")?;
        testbed.wait_node("n2", "ready", SOON)?;
        wait_until(SOON, "nothing of the old one is left", || !netns::list().contains(&second.id))?;
        let turns = turns(&fs::read_to_string(&beats)?);
        let pods: Vec<&str> = turns.iter().map(|(pod, _)| pod.as_str()).collect();
        ensure!(pods == [&first.id, &second.id, &third.id], "they took turns: {turns:?}");
        ensure!(turns.is_sorted_by_key(|(_, token)| *token), "the tokens grow: {turns:?}");
        Ok(())
    })
}

#[test]
fn a_singleton_ends_with_its_supervisor_wherever_its_processes_hide() {
    let name = "a_singleton_ends_with_its_supervisor_wherever_its_processes_hide";
    scenario(name, NEEDS, Options::default(), hidden);
}

/// A process of the task leaves its session; agent and supervisor are killed. It was seen to go on beside its successor.
fn hidden(testbed: &Testbed) -> Result<()> {
    let (beats, strays) = (testbed.dir().join("beats"), testbed.dir().join("strays"));
    for file in [&beats, &strays] {
        fs::write(file, "")?;
        fs::set_permissions(file, fs::Permissions::from_mode(0o666))?;
    }
    let agent = testbed.agent("n3");
    testbed.apply(&hiding(&beats, "    constraints: {node: n3}\n"))?;
    let first = testbed.wait_running("queue", 1, SOON)?.remove(0);
    testbed.apply(&hiding(&beats, ""))?;
    grows(&beats)?;
    check("it ends with its supervisor, and no agent is there", || {
        let lock = fs::read_to_string(agent.dir().join("run/pods").join(&first.id).join("lock"))?;
        agent.kill9()?;
        kill(Pid::from_raw(lock.trim().parse()?), Signal::SIGKILL)?;
        still(&beats)
    })?;
    // As a process of a version could that had no such namespace.
    let mut stray = leave_behind(&first.id, &strays)?;
    grows(&strays)?;
    let second = check("another runs elsewhere", || {
        Ok(wait_for(SOON, "another runs", || runs(testbed, |pod| pod.id != first.id))?.1)
    })?;
    check("back, the node ends what is left before it says that the pod is gone", || {
        agent.start_until_ready()?;
        testbed.wait_node("n3", "ready", SOON)?;
        wait_until(SOON, "nothing of the old one is left", || !netns::list().contains(&first.id))?;
        still(&strays)?;
        stray.wait()?;
        let turns = turns(&fs::read_to_string(&beats)?);
        let pods: Vec<&str> = turns.iter().map(|(pod, _)| pod.as_str()).collect();
        ensure!(pods == [&first.id, &second.id], "they took turns: {turns:?}");
        ensure!(turns.is_sorted_by_key(|(_, token)| *token), "the tokens grow: {turns:?}");
        Ok(())
    })?;
    check("a node that is taken down leaves nothing of it", || {
        testbed.netctl(&["rm", "queue"])?.success()?;
        wait_until(SOON, "it is gone", || !netns::list().contains(&second.id))?;
        still(&beats)?;
        testbed.apply(&hiding(&beats, "    constraints: {node: n3}\n"))?;
        testbed.wait_running("queue", 1, SOON)?;
        grows(&beats)?;
        testbed.netctl_on("n3", &["node", "down"])?.success()?;
        still(&beats)
    })
}

/// As [`queue`], but the one that writes has left the session of its task.
fn hiding(beats: &Path, more: &str) -> String {
    let script = format!("echo $HEXTET_POD $HEXTET_FENCING_TOKEN >> {}", beats.display());
    format!(
        "job: queue\ngroups:\n  boss:\n    count: 1\n    availability: singleton\n{more}    tasks:\n      t:\n        \
         exec: [/bin/sh, -c, '(setsid sh -c \"while :; do {script}; sleep 0.02; done\" &); exec sleep 100000']\n"
    )
}

/// A process with a pod's user in the pod's network namespace, which no supervisor holds.
fn leave_behind(pod: &str, strays: &Path) -> Result<Child> {
    let script = format!("while :; do echo x >> {}; sleep 0.02; done", strays.display());
    let netns = format!("--net=/run/netns/{pod}");
    let user = ["-S", "1879048193", "-G", "1879048193"];
    let mut command = Command::new("nsenter");
    command.arg(netns).args(user).args(["setsid", "sh", "-c", &script]).current_dir("/");
    command.stdin(Stdio::null()).spawn().context("cannot run nsenter")
}

fn grows(file: &Path) -> Result<()> {
    let before = fs::metadata(file)?.len();
    wait_until(SOON, "it writes", || fs::metadata(file).is_ok_and(|now| now.len() > before)).map(drop)
}

/// Nobody writes any more. That nothing happens cannot be waited for.
fn still(file: &Path) -> Result<()> {
    sleep(Duration::from_millis(300));
    let before = fs::metadata(file)?.len();
    sleep(Duration::from_secs(1));
    let after = fs::metadata(file)?.len();
    ensure!(after == before, "{} has grown by {} bytes", file.display(), after - before);
    Ok(())
}

/// The pod that runs and is so.
fn runs(testbed: &Testbed, so: impl Fn(&Pod) -> bool) -> Result<Pod, String> {
    let pods = testbed.pods("queue").map_err(|error| format!("{error:#}"))?;
    let found = pods.iter().find(|pod| pod.phase == "running" && so(pod));
    found.cloned().ok_or_else(|| format!("{pods:?}"))
}

/// Who wrote after whom, with the fencing token of each.
fn turns(beats: &str) -> Vec<(String, u64)> {
    let lines = beats.lines().filter_map(|line| line.split_once(' '));
    let mut turns: Vec<(String, u64)> =
        lines.map(|(pod, token)| (pod.to_owned(), token.parse().unwrap_or(0))).collect();
    turns.dedup();
    turns
}

#[test]
fn a_busy_node_is_not_taken_for_a_dead_one() {
    scenario("a_busy_node_is_not_taken_for_a_dead_one", NEEDS, Options::default(), busy);
}

fn busy(testbed: &Testbed) -> Result<()> {
    testbed.apply(jobs::HELLO)?;
    let before = testbed.wait_running("hello", 3, SOON)?;
    let since = testbed.server().daemon().log_len();
    check("every processor is busy for two leases, and nobody is lost", || {
        let hogs = Hogs::start()?;
        let start = Instant::now();
        let mut seen: BTreeMap<String, u32> = BTreeMap::new();
        while start.elapsed() < 2 * LEASE {
            for phase in testbed.node_phases()?.into_values() {
                *seen.entry(phase).or_default() += 1;
            }
        }
        drop(hogs);
        println!("phases of nodes while every processor was busy: {seen:?}");
        ensure!(!seen.contains_key("lost"), "{seen:?}");
        let log = testbed.server().daemon().log_since(since);
        ensure!(!log.contains("lease of"), "a node was lost: {log}");
        let after = testbed.wait_running("hello", 3, SOON)?;
        ensure!(after == before, "{after:?} were {before:?}");
        Ok(())
    })
}

#[test]
fn a_copy_of_a_node_is_refused_and_the_node_unharmed() {
    let lease = format!("{}s", scaled(COPIED_LEASE).as_secs());
    let options = Options { server_args: vec!["--lease".into(), lease], ..Options::default() };
    scenario("a_copy_of_a_node_is_refused_and_the_node_unharmed", NEEDS, options, copied);
}

fn copied(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    let (first, copy) = (testbed.agent("n2"), testbed.agent("n3"));
    testbed.netctl_on("n3", &["node", "down"])?.success()?;
    wait_until(SOON, "the agent of n3 ends", || copy.pid().is_none())?;
    testbed.apply(jobs::HELLO)?;
    let before = testbed.wait_running("hello", 3, SOON)?;
    ensure!(before.iter().any(|pod| pod.node == "n2"), "{before:?}");
    check("an agent that is killed and starts again is not taken for another machine", || {
        first.kill9()?;
        // What a copy of the disk holds; n3 is the machine into which it is put.
        fs::remove_dir_all(copy.dir().join("state"))?;
        let from = first.dir().join("state");
        testbed
            .run_in("n3", &["cp", "-a", &from.to_string_lossy(), &copy.dir().to_string_lossy()])
            .success()?;
        first.start_until_ready()?;
        wait_until(SOON, "n2 is attached", || shown(testbed, "n2").contains("(attached"))?;
        ensure!(!first.log().contains("served, at"), "{}", first.log());
        Ok(())
    })?;
    check("the copy starts nothing and says what it is, and the node goes on", || {
        copy.start_until_ready()?;
        wait_until(SOON, "the copy is refused", || shown(testbed, "n3").contains("refused "))?;
        let said = shown(testbed, "n3");
        ensure!(said.contains("at 2001:db8:1::12; this one looks like a copy"), "{said}");
        let since = Instant::now();
        while since.elapsed() < scaled(COPIED_LEASE) * 5 / 4 {
            all_greet(&client, &before, Duration::from_secs(2))?;
            ensure!(testbed.node_phases()?["n2"] == "ready", "{:?}", testbed.node_phases()?);
            ensure!(shown(testbed, "n2").contains("(attached"), "{}", shown(testbed, "n2"));
        }
        ensure!(testbed.pods("hello")? == before, "{:?}", testbed.pods("hello")?);
        let routes = testbed.run_in("n3", &["ip", "-6", "route", "show", "proto", "118"]).success()?;
        ensure!(routes.trim().is_empty(), "the copy has routes: {routes}");
        Ok(())
    })?;
    check("a node whose machine boots again is served within its lease, and a copy is not", || {
        first.kill9()?;
        // The lock is another file after it: that is what tells machines of one kernel apart.
        let lock = first.dir().join("state/agent.lock");
        wait_until(SOON, "the kernel is through with the agent", || {
            let free = ["flock", "--nonblock", &lock.to_string_lossy(), "true"];
            testbed.run_in("n2", &free).success().is_ok()
        })?;
        fs::rename(&lock, lock.with_extension("of-the-boot-before"))?;
        let started = Instant::now();
        first.start_until_ready()?;
        wait_until(SOON, "n2 is served", || {
            let show = shown(testbed, "n2");
            show.contains("(attached") && !show.contains("refused ")
        })?;
        println!("a node that booted within its lease was served after {} ms", started.elapsed().as_millis());
        ensure!(started.elapsed() < scaled(COPIED_LEASE), "{:?}", started.elapsed());
        let said = shown(testbed, "n3");
        ensure!(said.contains("this one looks like a copy"), "{said}");
        let after = testbed.wait_running("hello", 3, SOON)?;
        all_greet(&client, &after, SOON)
    })?;
    check("a copy that is taken down, which has no agent, takes nothing from the node", || {
        copy.kill9()?;
        let said = testbed.netctl_on("n3", &["node", "down"])?.success()?;
        let why = "the server was not told: node n2 was last served on another machine";
        ensure!(said.contains(why) && said.contains("netctl node dead n2"), "{said}");
        ensure!(testbed.node_phases()?["n2"] == "ready", "{:?}", testbed.node_phases()?);
        Ok(())
    })?;
    check(
        "the node is taken down at once although its agent was killed, and the copy takes its place",
        || {
            first.kill9()?;
            let started = Instant::now();
            let said = testbed.netctl_on("n2", &["node", "down"])?.success()?;
            ensure!(said.contains("the server knows that the node is down"), "{said}");
            ensure!(testbed.node_phases()?["n2"] == "lost", "{:?}", testbed.node_phases()?);
            println!("a node without an agent was taken down after {} ms", started.elapsed().as_millis());
            copy.start_until_ready()?;
            wait_until(SOON, "the copy is served", || {
                let show = shown(testbed, "n3");
                show.contains("(attached") && !show.contains("refused ")
            })?;
            testbed.wait_node("n2", "ready", SOON)?;
            let after = testbed.wait_running("hello", 3, SOON)?;
            all_greet(&client, &after, SOON)
        },
    )
}

/// What an agent says of itself; empty when it does not answer.
fn shown(testbed: &Testbed, node: &str) -> String {
    let shown = testbed.netctl_on(node, &["node", "show"]).and_then(hextet_tests::command::Output::success);
    shown.unwrap_or_default()
}

/// Processes that want all the time that they can get: four for each processor.
struct Hogs(Vec<Child>);

impl Hogs {
    fn start() -> Result<Hogs> {
        let count = 4 * std::thread::available_parallelism()?.get();
        let hog = |_| Command::new("sh").args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn();
        Ok(Hogs((0..count).map(hog).collect::<Result<_, _>>()?))
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        for hog in &mut self.0 {
            let _ = hog.kill();
            let _ = hog.wait();
        }
    }
}

/// Cuts a node's path to the server and nothing else.
fn cut_control(testbed: &Testbed, node: &str) -> Result<()> {
    let rules = "table inet cut {\n chain out {\n  type filter hook output priority 0\n  tcp dport 4679 drop\n }\n}\n";
    let file = testbed.dir().join("cut.nft");
    fs::write(&file, rules)?;
    testbed.run_in(node, &["nft", "-f", &file.to_string_lossy()]).success().map(drop)
}

fn mend_control(testbed: &Testbed, node: &str) -> Result<()> {
    testbed.run_in(node, &["nft", "delete", "table", "inet", "cut"]).success().map(drop)
}
