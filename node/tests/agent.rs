//! The agent as a process, in a network namespace of its own, with a server that does what a test tells it to.
//!
//! Needs root, `ip` and `nsenter`; says so and passes when it is not root. With a BPF file system at /sys/fs/bpf
//! the BPF backends are tested, without one the kernel's own.

#[path = "agent/net.rs"]
mod net;
#[path = "agent/server.rs"]
mod server;

use std::{
    fs::{self, File},
    io::Write as _,
    net::Ipv6Addr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    sync::Arc,
    time::{Duration, Instant},
};

use hextet_api::v1::{
    Hook, LookFor, PodAssignment, PodEvent, PodPhase, PodReport, ReadLogs, StepStatus, Task,
};
use nix::{
    sys::signal::{Signal, kill},
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::{Pid, geteuid},
};
use tempfile::TempDir;

use self::{
    net::{NODE_ADDRESS, Net, SERVER_ADDRESS, in_netns, ip, text},
    server::{CLUSTER, Ca, LEASE_MS, TestServer},
};

const DEADLINE: Duration = Duration::from_secs(30);

#[test]
fn a_node_joins_runs_a_pod_and_removes_it() {
    let Some(mut node) = TestNode::new("run") else { return };
    let server = node.serve();
    server.talk.lock().unwrap().refuse_subnets = 2;
    node.start(true);
    let pod = node.pod(&server, 1, "echo from $HEXTET_POD; exec sleep 1000");
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);

    let address = address(&pod).to_string();
    assert!(ip(&["-n", &node.net.node, "-6", "route", "show", &address]).contains("dev hx"));
    assert!(ip(&["-n", &pod.id, "-6", "addr", "show", "dev", "eth0"]).contains(&address));
    let ping = in_netns(&node.net.node, "ping").args(["-6", "-c1", "-W2", &address]).output().unwrap();
    assert!(ping.status.success(), "{}", text(&ping));
    let (hello, renewals) = {
        let talk = server.talk.lock().unwrap();
        (talk.hellos[0].clone(), talk.renewals)
    };
    assert_eq!(hello.underlay, NODE_ADDRESS.parse::<Ipv6Addr>().unwrap().octets());
    assert_eq!(hello.underlay_v4, [192, 0, 2, 2]);
    assert_eq!(hello.labels["disk"], "ssd");
    node.wait_for("renewals", || server.talk.lock().unwrap().renewals >= renewals + 3);

    server.assign(vec![], vec![pod.id.clone(), "never-was-here".into()]);
    node.wait_for("the pod's end", || server.report(&pod.id).is_some_and(|report| report.gone));
    node.wait_for("the unknown pod's end", || {
        server.report("never-was-here").is_some_and(|report| report.gone)
    });
    assert!(!PathBuf::from("/run/netns").join(&pod.id).exists());
    assert!(!ip(&["-n", &node.net.node, "link"]).contains(" hxaa"));
    assert!(!node.path("state/pods").join(&pod.id).exists());
    assert!(!node.path("run/pods").join(&pod.id).exists());
}

#[test]
fn a_killed_agent_leaves_the_pod_alone_and_its_successor_adopts_it() {
    let Some(mut node) = TestNode::new("adopt") else { return };
    let server = node.serve();
    node.start(true);
    let pod = node.pod(&server, 1, "echo $$ > pid; exec sleep 1000");
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    let before = node.task_pid(&pod);
    node.kill();
    server.talk.lock().unwrap().reports.clear();
    assert!(is_alive(before));
    let links = node.links();
    node.start(false);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    assert_eq!(node.task_pid(&pod), before);
    assert_eq!(node.links(), links, "nothing was made anew");
    let phases: Vec<i32> = server.talk.lock().unwrap().reports.iter().map(|report| report.phase).collect();
    assert!(
        phases.iter().all(|phase| *phase == i32::from(PodPhase::Running)),
        "it never looked otherwise: {phases:?}"
    );
    // The protocol's name is the whole machine's: a test beside this one takes it along when its node goes down.
    let plan = node.run_once("plan");
    let own: Vec<&str> = plan.lines().filter(|line| !line.starts_with("protocol ")).collect();
    assert!(own.is_empty(), "{own:?}");
}

/// It ended with `is the disk full?`, and its node was lost after a lease.
#[test]
fn an_agent_that_starts_on_a_full_disk_keeps_its_pods_and_follows_when_there_is_room() {
    let Some(mut node) = TestNode::new("full") else { return };
    let small = Small::mount(node.path("state"));
    let server = node.serve();
    node.start(true);
    let pod = node.pod(&server, 1, "echo $$ > pid; exec sleep 1000");
    server.assign(vec![pod.clone()], vec![]);
    let other = node.pod(&server, 4, "exec sleep 1000");
    server.assign(vec![other.clone()], vec![]);
    [&pod, &other].iter().for_each(|pod| node.wait_for_phase(&server, &pod.id, PodPhase::Running));
    let before = node.task_pid(&pod);
    small.fill();
    let mut large = node.pod(&server, 2, "exec sleep 1000");
    let filler = (0..10).map(|number| (format!("FILLER{number}"), "x".repeat(100_000)));
    large.tasks[0].env.extend(filler);
    server.assign(vec![large.clone()], vec![]);
    node.wait_for("the agent to say so", || node.log().contains("it cannot be kept"));
    let told = |event: &PodEvent| event.kind == "not-kept" && event.pod == large.id;
    node.wait_for("the server to be told", || server.talk.lock().unwrap().events.iter().any(told));
    let why = |report: PodReport| report.message.contains("is the disk full?");
    node.wait_for("its word on the pod", || server.report(&large.id).is_some_and(why));
    // An end needs no room: it may be what makes some.
    server.assign(vec![], vec![other.id.clone()]);
    node.wait_for("the pod's end", || server.report(&other.id).is_some_and(|report| report.gone));
    // What goes on from what is lost is lost, too.
    let next = node.pod(&server, 3, "exec sleep 1000");
    server.assign(vec![next.clone()], vec![]);
    node.kill();
    server.talk.lock().unwrap().reports.clear();
    node.start(false);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    assert_eq!(node.task_pid(&pod), before);
    node.wait_for("its word on the pod", || server.report(&large.id).is_some_and(why));
    small.make_room();
    [&large, &next].iter().for_each(|pod| node.wait_for_phase(&server, &pod.id, PodPhase::Running));
}

/// There must never be two that live: what may be replaced elsewhere has ended here before, also without the agent.
#[test]
fn a_single_pod_ends_with_the_lease_and_starts_again_in_the_term_of_its_assignment() {
    let Some(mut node) = TestNode::new("single") else { return };
    let server = node.serve();
    node.start(true);
    let script = "echo $HEXTET_FENCING_TOKEN > token; echo $$ > pid; setsid sleep 1000 & exec sleep 1000";
    let single = PodAssignment { singleton: true, serial: 7, ..node.pod(&server, 1, script) };
    let free = node.pod(&server, 2, "echo $$ > pid; exec sleep 1000");
    server.assign(vec![single.clone(), free.clone()], vec![]);
    let free_pid = node.task_pid(&free);
    let waits = || server.report(&single.id).is_some_and(|report| report.message.contains("node's lease"));
    node.wait_for("the pod to wait for a lease", waits);
    assert_eq!(node.try_task_pid(&single), None, "it was never started");

    server.talk.lock().unwrap().granted = Some(0);
    node.wait_for_phase(&server, &single.id, PodPhase::Running);
    let first = node.task_pid(&single);
    assert_eq!(node.task_file(&single, "token").unwrap(), "7");
    std::thread::sleep(Duration::from_millis(u64::from(LEASE_MS) + 500));
    assert!(is_alive(first), "a lease that is renewed does not end");

    node.kill();
    let died = Instant::now();
    node.wait_for("the end of what only one node may run", || !is_alive(first));
    assert!(died.elapsed() < Duration::from_millis(u64::from(LEASE_MS) + 500), "{:?}", died.elapsed());
    let netns = PathBuf::from("/run/netns").join(&single.id);
    let left = std::process::Command::new("ip").args(["netns", "pids"]).arg(&single.id).output().unwrap();
    let left: Vec<String> = text(&left).split_whitespace().map(str::to_owned).collect();
    let sleeps =
        |pid: &String| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == "sleep");
    assert!(
        netns.exists() && !left.iter().any(sleeps),
        "a process that left its session ends, too: {left:?}"
    );
    assert!(is_alive(free_pid), "the other pod needs no lease");

    // The server has counted it out meanwhile: grants are of the next term, and so is what it says next.
    server.talk.lock().unwrap().granted = Some(1);
    fs::remove_file(node.path("state/pods").join(&single.id).join("web/pid")).unwrap();
    node.start(false);
    let renewals = server.talk.lock().unwrap().renewals;
    node.wait_for("renewals", || server.talk.lock().unwrap().renewals >= renewals + 10);
    assert_eq!(node.try_task_pid(&single), None, "an assignment of an earlier term starts nothing");
    server.talk.lock().unwrap().term = 1;
    server.assign(vec![single.clone()], vec![]);
    node.wait_for_phase(&server, &single.id, PodPhase::Running);
    assert!(is_alive(node.task_pid(&single)));
}

#[test]
fn a_pod_that_was_replaced_while_its_node_was_down_is_not_started_again() {
    let Some(mut node) = TestNode::new("replaced") else { return };
    let server = node.serve();
    node.start(true);
    let script = "echo started >> starts; exec sleep 1000";
    let (gone, kept) = (node.pod(&server, 1, script), node.pod(&server, 2, script));
    server.assign(vec![gone.clone(), kept.clone()], vec![]);
    [&gone, &kept].iter().for_each(|pod| node.wait_for_phase(&server, &pod.id, PodPhase::Running));
    node.run_once("down");
    node.wait_for_end();
    let starts = node.path("state/pods").join(&gone.id).join("web/starts");
    let link = node.path("starts");
    fs::hard_link(&starts, &link).unwrap();
    server.talk.lock().unwrap().pods = vec![kept.clone()];
    server.talk.lock().unwrap().reports.clear();
    node.start(false);
    node.wait_for_phase(&server, &kept.id, PodPhase::Running);
    node.wait_for("the end of the record", || !starts.exists());
    assert_eq!(fs::read_to_string(&link).unwrap(), "started\n", "it ran once, before");
}

#[test]
fn a_node_boots_cold_without_a_server() {
    let Some(mut node) = TestNode::new("cold") else { return };
    let server = node.serve();
    node.start(true);
    let pods = [node.pod(&server, 1, "exec sleep 1000"), node.pod(&server, 2, "exec sleep 1000")];
    server.assign(pods.to_vec(), vec![]);
    pods.iter().for_each(|pod| node.wait_for_phase(&server, &pod.id, PodPhase::Running));
    let before = node.run_once("show");
    drop(server);
    // As a reboot does: no process, no kernel state, no run folder.
    node.run_once("down");
    node.wait_for_end();
    assert_eq!(ip(&["-n", &node.net.node, "-6", "route", "show", "proto", "118"]), "");
    fs::remove_dir_all(node.path("run")).unwrap();

    node.start(false);
    node.wait_for("both pods", || node.run_once("show").matches(" running").count() == 2);
    let lines = |text: &str| {
        text.lines().filter(|line| line.starts_with("pod ")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(lines(&node.run_once("show")), lines(&before));
    let server = node.serve();
    server.talk.lock().unwrap().pods = pods.to_vec();
    pods.iter().for_each(|pod| node.wait_for_phase(&server, &pod.id, PodPhase::Running));
}

#[test]
fn a_machine_that_is_taken_for_a_copy_starts_nothing_until_it_is_served() {
    let Some(mut node) = TestNode::new("copy") else { return };
    let server = node.serve();
    let pod = node.run_and_take_down(&server);
    server.talk.lock().unwrap().taken = Some("another machine is served, at 2001:db8:7::9".to_owned());
    let before = server.talk.lock().unwrap().refusals;
    node.start(false);
    node.wait_for("refusals", || server.talk.lock().unwrap().refusals >= before + 8);
    assert!(!PathBuf::from("/run/netns").join(&pod.id).exists(), "{}", node.log());
    assert_eq!(
        ip(&["-n", &node.net.node, "-6", "route", "show", "proto", "118"]),
        "",
        "nothing is announced"
    );
    let show = node.run_once("show");
    assert!(show.contains("refused     another machine is served, at 2001:db8:7::9"), "{show}");

    server.talk.lock().unwrap().taken = None;
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    assert!(!node.run_once("show").contains("refused "));
    let talk = server.talk.lock().unwrap();
    let (hello, holder) = (talk.hellos.last().unwrap(), talk.holders.last().unwrap());
    assert_eq!(
        (&hello.machine, &hello.underlay),
        (&holder.machine, &holder.underlay),
        "both streams are of one machine"
    );
    assert!(!hello.machine.is_empty());
}

/// It booted where it reached no server, and is a copy: the node's pods run elsewhere, at the same addresses.
#[test]
fn what_a_copy_has_started_without_a_server_ends_when_a_server_refuses_it() {
    let Some(mut node) = TestNode::new("copyends") else { return };
    let server = node.serve();
    let pod = node.run_and_take_down(&server);
    drop(server);
    node.start(false);
    node.wait_for("the pod", || node.run_once("show").contains(" running"));
    let server = node.serve();
    server.talk.lock().unwrap().taken = Some("another machine is served".to_owned());
    node.wait_for("refusals", || server.talk.lock().unwrap().refusals > 2);
    assert!(node.run_once("show").contains(" running"), "it may have only booted again");
    node.wait_for_end();
    assert!(node.log().contains("without a server is ended: another machine is served"), "{}", node.log());
    assert!(!PathBuf::from("/run/netns").join(&pod.id).exists());
    assert_eq!(ip(&["-n", &node.net.node, "-6", "route", "show", "proto", "118"]), "");

    node.start(false);
    node.wait_for("another refusal", || node.run_once("show").contains("refused "));
    assert!(!PathBuf::from("/run/netns").join(&pod.id).exists(), "it starts nothing now");
}

/// It was deleted while it was lost, and its pods run elsewhere. It came back once and ran them for ever.
#[test]
fn a_node_that_was_deleted_gives_up_its_pods_and_starts_none_without_a_server() {
    let Some(mut node) = TestNode::new("deleted") else { return };
    let server = node.serve();
    node.start(true);
    let pod = node.pod(&server, 1, "echo $$ > pid; exec sleep 1000");
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    let pid = node.task_pid(&pod);
    node.kill();
    server.talk.lock().unwrap().deleted = Some("node n1 was deleted here".to_owned());
    node.start(false);
    node.wait_for("the end of the task", || !is_alive(pid));
    node.wait_for("the end of the pod", || !PathBuf::from("/run/netns").join(&pod.id).exists());
    let show = node.run_once("show");
    assert!(show.contains("refused     node n1 was deleted here. Its pods are ended."), "{show}");
    assert!(show.contains("netctl node --join"), "{show}");
    assert!(!show.contains("pod  "), "{show}");

    node.kill();
    drop(server);
    node.start(false);
    std::thread::sleep(Duration::from_secs(3));
    assert!(!PathBuf::from("/run/netns").join(&pod.id).exists(), "{}", node.log());
    // Somebody has put the server back from a backup of before.
    let server = node.serve();
    server.talk.lock().unwrap().pods = vec![pod.clone()];
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
}

/// A machine that boots fast is refused for the rest of its lease: a server that dies in that time is not waited for.
#[test]
fn a_node_that_was_refused_once_boots_cold_when_the_server_dies() {
    let Some(mut node) = TestNode::new("copycold") else { return };
    let server = node.serve();
    let pod = node.run_and_take_down(&server);
    server.talk.lock().unwrap().taken = Some("another machine is served".to_owned());
    node.start(false);
    assert!(node.run_once("show").contains("refused "), "{}", node.log());
    drop(server);
    let died = Instant::now();
    node.wait_for("the pod", || node.run_once("show").contains(" running"));
    assert!(died.elapsed() < Duration::from_secs(8), "{:?}", died.elapsed());
    let server = node.serve();
    server.talk.lock().unwrap().pods = vec![pod.clone()];
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
}

/// The server's machine has an address of another link, which answers an echo request and no solicitation.
#[test]
fn a_node_says_whether_one_on_another_link_answers_over_its_routes() {
    let Some(mut node) = TestNode::new("routed") else { return };
    let server = node.serve();
    node.start(true);
    let (there, nobody) = ("2001:db8:9::1", "2001:db8:9::2");
    ip(&["-n", &node.net.server, "link", "set", "lo", "up"]);
    ip(&["-n", &node.net.server, "addr", "add", &format!("{there}/128"), "dev", "lo"]);
    ip(&["-n", &node.net.node, "-6", "route", "add", "2001:db8:9::/64", "via", SERVER_ADDRESS]);
    let ask = |name: &str, address: &str, routed| {
        let underlay = address.parse::<Ipv6Addr>().unwrap().octets().to_vec();
        let look_for = LookFor { node: name.to_owned(), underlay, routed };
        server.talk.lock().unwrap().look_for.push(look_for);
        let said = || server.talk.lock().unwrap().seen.iter().find(|seen| seen.node == name).cloned();
        node.wait_for("the answer", || said().is_some());
        said().unwrap().is_there
    };
    assert!(ask("n2", there, true));
    assert!(!ask("n3", nobody, true));
    assert!(!ask("n4", there, false), "it is no neighbour");
}

#[test]
fn what_others_break_is_repaired_at_once() {
    let Some(mut node) = TestNode::new("repair") else { return };
    let server = node.serve();
    node.start(true);
    let pod = node.pod(&server, 1, "echo $$ > pid; exec sleep 1000");
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    let before = node.task_pid(&pod);
    let address = address(&pod).to_string();
    let begin = Instant::now();
    ip(&["-n", &node.net.node, "-6", "route", "del", &address]);
    node.wait_for("the route", || {
        ip(&["-n", &node.net.node, "-6", "route", "show", &address]).contains("dev hx")
    });
    assert!(begin.elapsed() < Duration::from_secs(10), "the audit alone would take longer");
    assert_eq!(node.task_pid(&pod), before);

    // A namespace that was taken away is made anew, and the pod with it.
    ip(&["netns", "del", &pod.id]);
    node.wait_for("another task", || {
        node.try_task_pid(&pod).is_some_and(|pid| pid != before && is_alive(pid))
    });
    node.wait_for("the old task's end", || !is_alive(before));
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    let ping = in_netns(&node.net.node, "ping").args(["-6", "-c1", "-W2", &address]).output().unwrap();
    assert!(ping.status.success(), "{}", text(&ping));
}

#[test]
fn one_failing_pod_does_not_hold_up_the_other() {
    let Some(mut node) = TestNode::new("fail") else { return };
    let server = node.serve();
    node.start(true);
    let mut missing = node.pod(&server, 1, "");
    missing.tasks[0].exec = vec!["/no/such/program".into()];
    let mut wrong = node.pod(&server, 2, "exec sleep 1000");
    wrong.address = CLUSTER.octets().to_vec();
    let fine = node.pod(&server, 3, "exec sleep 1000");
    server.assign(vec![missing.clone(), wrong.clone(), fine.clone()], vec![]);
    node.wait_for_phase(&server, &fine.id, PodPhase::Running);
    node.wait_for_phase(&server, &missing.id, PodPhase::Failed);
    node.wait_for_phase(&server, &wrong.id, PodPhase::Failed);
    let message = |pod: &PodAssignment| server.report(&pod.id).unwrap().message;
    assert!(message(&missing).contains("cannot run /no/such/program"), "{}", message(&missing));
    assert_eq!(message(&wrong), "the server gave it an address that is not of this node");
}

#[test]
fn a_changed_task_restarts_in_place_with_its_address() {
    let Some(mut node) = TestNode::new("change") else { return };
    let server = node.serve();
    node.start(true);
    let mut pod = node.pod(&server, 1, "echo first; exec sleep 1000");
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    let links = node.links();
    pod.tasks[0].exec[2] = "echo second; exec sleep 1000".into();
    pod.job_version = 2;
    server.assign(vec![pod.clone()], vec![]);
    let log = node.path("state/pods").join(&pod.id).join("web.log");
    node.wait_for("the second version", || {
        fs::read_to_string(&log).is_ok_and(|text| text == "first\nsecond\n")
    });
    assert_eq!(node.links(), links);
}

#[test]
fn logs_are_sent_followed_and_end_with_the_pod() {
    let Some(mut node) = TestNode::new("logs") else { return };
    let server = node.serve();
    node.start(true);
    let pod = node.pod(
        &server,
        1,
        "echo one; echo two; while [ ! -e go ]; do sleep 0.1; done; echo three; exec sleep 1000",
    );
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    let request = |request_id, task: &str, tail_lines, follow| ReadLogs {
        request_id,
        pod: pod.id.clone(),
        task: task.into(),
        tail_lines,
        follow,
        after: String::new(),
    };
    let log = |id: u64| {
        server
            .talk
            .lock()
            .unwrap()
            .logs
            .get(&id)
            .map(|(data, error)| (String::from_utf8(data.clone()).unwrap(), error.clone()))
    };
    let folder = node.path("state/pods").join(&pod.id);
    node.wait_for("the log", || {
        fs::read_to_string(folder.join("web.log")).is_ok_and(|text| text == "one\ntwo\n")
    });
    server.read_logs(request(1, "", 1, false));
    node.wait_for("the tail", || log(1) == Some(("two\n".into(), String::new())));
    server.read_logs(request(2, "db", 0, false));
    node.wait_for("the refusal", || {
        log(2) == Some((String::new(), "there is no task db; the pod has web".into()))
    });
    server.read_logs(request(3, "web", 0, true));
    node.wait_for("what is there", || log(3).is_some_and(|(data, _)| data == "one\ntwo\n"));
    File::create(folder.join("web/go")).unwrap();
    node.wait_for("what is added", || log(3).is_some_and(|(data, _)| data == "one\ntwo\nthree\n"));
}

#[test]
fn a_second_agent_is_refused_with_the_first_ones_id() {
    let Some(mut node) = TestNode::new("second") else { return };
    let server = node.serve();
    node.start(true);
    let first = node.agent.as_ref().unwrap().id();
    let second = node.command("run").args(["eth0", "n1"]).output().unwrap();
    assert!(!second.status.success());
    assert!(text(&second).contains(&format!("process {first} runs the node")), "{}", text(&second));
    drop(server);
}

#[test]
fn an_agent_that_cannot_join_leaves_nothing_behind() {
    let Some(node) = TestNode::new("nojoin") else { return };
    let before = ip(&["-n", &node.net.node, "-6", "route"]);
    let sentence = |output: Output| {
        assert!(!output.status.success());
        let all = text(&output);
        all.lines().find(|line| line.starts_with("error: ")).unwrap_or(&all).to_owned()
    };
    let refused = sentence(node.command("run").args(["eth0", "n1"]).output().unwrap());
    assert!(refused.contains("netctl token --for node"), "{refused}");
    let token = node.ca.token().to_string();
    let refused = sentence(node.command("run").args(["eth0", "n1", &token]).output().unwrap());
    assert!(refused.contains("cannot join: cannot reach the server at [2001:db8:7::1]:4679"), "{refused}");
    let refused = sentence(node.command("run").args(["", "n1", &token]).output().unwrap());
    assert!(refused.contains("name it with --uplink"), "{refused}");
    let refused = sentence(node.command("run").args(["eth7", "n1", &token]).output().unwrap());
    assert!(refused.contains("there is no device eth7"), "{refused}");
    let unmounted = node.path("unmounted");
    let mut run = node.command("run");
    run.args(["eth0", "n1", &token]).env("HEXTET_NODE_BPF_DIR", &unmounted);
    let refused = sentence(run.output().unwrap());
    assert!(refused.contains("is not on a BPF file system: mount -t bpf bpf /sys/fs/bpf; or"), "{refused}");
    assert!(!unmounted.exists());
    assert_eq!(ip(&["-n", &node.net.node, "-6", "route"]), before);
    assert!(!ip(&["-n", &node.net.node, "-6", "addr"]).contains("ff02::1:ff"));
}

#[test]
fn down_works_without_an_agent_and_keeps_the_identity() {
    let Some(mut node) = TestNode::new("down") else { return };
    let server = node.serve();
    node.start(true);
    let pod = node.pod(&server, 1, "echo $$ > pid; exec sleep 1000");
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    let task = node.task_pid(&pod);
    node.kill();
    let said = node.run_once("down");
    assert!(said.contains(&format!("stop pod {}", pod.id)), "{said}");
    assert!(said.contains("link del hx"), "{said}");
    assert!(said.contains("the identity stays"), "{said}");
    assert!(!said.contains("failed"), "{said}");
    assert!(!is_alive(task));
    assert_eq!(ip(&["-n", &node.net.node, "-6", "route", "show", "proto", "118"]), "");
    assert!(!PathBuf::from("/run/netns").join(&pod.id).exists());
    let again = node.run_once("down");
    assert!(!again.contains("stop pod") && !again.contains("link del"), "there is nothing left: {again}");
    node.start(false);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
}

/// A LAN host that comes up with a pod's address, and says so, is asked and then believed: the pod leaves.
#[test]
fn a_pod_whose_address_another_host_has_moves_when_the_server_gives_it_another() {
    let Some(mut node) = TestNode::new("moves") else { return };
    let server = node.serve();
    server.talk.lock().unwrap().lan = true;
    node.start(true);
    let asked = server.talk.lock().unwrap().enrolled.clone().unwrap();
    assert_eq!(asked.uplink_prefixes.len(), 1, "the node says which LAN it is on");
    let pod = node.pod(&server, 1, "echo $HEXTET_ADDRESS > address; exec sleep 1000");
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    let first = address(&pod).to_string();
    node.wait_for("the first address", || node.task_file(&pod, "address").is_some_and(|it| it == first));

    node.net.claim(&first, "02:00:00:00:00:77");
    node.wait_for("the conflict", || !server.talk.lock().unwrap().conflicts.is_empty());
    let conflict = server.talk.lock().unwrap().conflicts[0].clone();
    assert_eq!((conflict.pod.as_str(), &conflict.address), (pod.id.as_str(), &pod.address));
    assert_eq!(conflict.mac, [2, 0, 0, 0, 0, 0x77]);
    node.wait_for("the pod to say so", || {
        let said = server.report(&pod.id).map(|report| report.message).unwrap_or_default();
        said.contains("the host with MAC 02:00:00:00:00:77 has its address") && said.contains(&first)
    });
    let own_routes = || ip(&["-n", &node.net.node, "-6", "route", "show", "proto", "118"]);
    assert!(!own_routes().contains(&first), "the address is the other host's alone");

    // It is remembered, and the server is told again by a new stream.
    node.kill();
    server.talk.lock().unwrap().conflicts.clear();
    node.start(false);
    node.wait_for("the conflict again", || !server.talk.lock().unwrap().conflicts.is_empty());
    let own_routes = || ip(&["-n", &node.net.node, "-6", "route", "show", "proto", "118"]);
    assert!(!own_routes().contains(&first), "a restart brought it back");

    let moved = PodAssignment { address: node.pod(&server, 2, "").address, ..pod.clone() };
    let second = address(&moved).to_string();
    server.assign(vec![moved.clone()], vec![]);
    node.wait_for("the second address", || node.task_file(&pod, "address").is_some_and(|it| it == second));
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    assert!(own_routes().contains(&second));
    let ping = in_netns(&node.net.node, "ping").args(["-6", "-c1", "-W2", &second]).output().unwrap();
    assert!(ping.status.success(), "{}", text(&ping));
    assert_eq!(node.run_once("plan"), "");
}

/// A host that has every address that the server can give, as one that answers all probes does.
#[test]
fn after_five_addresses_in_a_row_the_next_is_asked_for_later_and_the_pod_says_so() {
    let Some(mut node) = TestNode::new("row") else { return };
    let server = node.serve();
    server.talk.lock().unwrap().lan = true;
    node.start(true);
    let pods: Vec<PodAssignment> = (1..=6)
        .map(|host| PodAssignment {
            id: format!("{}-x", node.label),
            ..node.pod(&server, host, "sleep 1000")
        })
        .collect();
    pods.iter().for_each(|pod| node.net.take(&address(pod).to_string()));
    let conflicts = || server.talk.lock().unwrap().conflicts.len();
    for (before, pod) in pods.iter().enumerate().take(5) {
        server.assign(vec![pod.clone()], vec![]);
        node.wait_for(&format!("conflict {}", before + 1), || conflicts() == before + 1);
    }
    let asked = Instant::now();
    server.assign(vec![pods[5].clone()], vec![]);
    node.wait_for("the pod to say so", || {
        let said = server.report(&pods[5].id).map(|report| report.message).unwrap_or_default();
        said.contains("these are 6 addresses in a row") && said.contains("asked for in 1 s")
    });
    node.wait_for("conflict 6", || conflicts() == 6);
    assert!(asked.elapsed() >= Duration::from_secs(1), "it was asked for at once");
    let told = server.talk.lock().unwrap().conflicts.clone();
    let told: Vec<&Vec<u8>> = told.iter().map(|conflict| &conflict.address).collect();
    assert_eq!(told, pods.iter().map(|pod| &pod.address).collect::<Vec<_>>());
}

fn hook(name: &str, script: &str, before: &[&str]) -> Hook {
    Hook {
        name: name.into(),
        exec: vec!["/bin/sh".into(), "-c".into(), script.into()],
        before: before.iter().map(|point| (*point).into()).collect(),
        attempts: 2,
        ..Hook::default()
    }
}

#[test]
fn a_hook_runs_in_its_pod_before_the_tasks_keeps_them_back_when_it_fails_and_is_undone() {
    let Some(mut node) = TestNode::new("hook") else { return };
    let server = node.serve();
    node.start(true);
    let mut pod = node.pod(&server, 1, "exec sleep 1000");
    let marks = node.marks();
    let mark = |name: &str| {
        format!(
            "echo said $HEXTET_HOOK; id -u > {0}/{name}; ip addr show eth0 >> {0}/{name}",
            marks.display()
        )
    };
    let mut migrate = hook("migrate", &format!("{}; exit 3", mark("up")), &["running"]);
    migrate.undo = vec!["/bin/sh".into(), "-c".into(), format!("touch {}/down", marks.display())];
    pod.hooks = vec![migrate];
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for("the hook's failure", || {
        server.report(&pod.id).is_some_and(|report| report.message == "hook migrate: exited with status 3")
    });
    node.wait_for("its last attempt", || node.steps(&server, &pod.id, "migrate").phase == "failed");
    let step = node.steps(&server, &pod.id, "migrate");
    assert_eq!((step.attempts, step.output.as_str()), (2, "said migrate\nsaid migrate"));
    assert_eq!(node.steps(&server, &pod.id, "supervisor").phase, "blocked");
    assert!(node.steps(&server, &pod.id, "supervisor").waits_for.contains(&"migrate".to_owned()));
    assert_eq!(node.task_file(&pod, "."), None, "no task was begun");
    let up = fs::read_to_string(marks.join("up")).unwrap();
    assert!(up.lines().next().unwrap().parse::<u32>().unwrap() > 0x7000_0000, "it is the pod's user: {up}");
    assert!(up.contains(&address(&pod).to_string()), "it is in the pod's namespace: {up}");

    // A corrected text goes on from there.
    pod.hooks[0].exec[2] = mark("up");
    pod.job_version = 2;
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    assert!(!marks.join("down").exists());
    server.assign(vec![], vec![pod.id.clone()]);
    node.wait_for("the pod's end", || server.report(&pod.id).is_some_and(|report| report.gone));
    assert!(marks.join("down").exists(), "{}", node.log());
    assert!(!node.path("state/hooks").join(&pod.id).exists());
    let kinds: Vec<String> =
        server.talk.lock().unwrap().events.iter().map(|event| event.kind.clone()).collect();
    for kind in [
        "pod-starting",
        "step-failed",
        "pod-failed",
        "step-done",
        "pod-running",
        "pod-stopping",
        "step-undone",
    ] {
        assert!(kinds.iter().any(|other| other == kind), "{kind}: {kinds:?}");
    }
}

/// Done once, they were taken for done: after `netctl node down`, though the pod began anew, and when a text had restarted the
/// tasks that they follow while no agent was there.
#[test]
fn hooks_run_again_when_their_pod_begins_anew_or_what_they_follow_is_another() {
    let Some(mut node) = TestNode::new("hookagain") else { return };
    let server = node.serve();
    node.start(true);
    let mut pod = node.pod(&server, 1, "exec sleep 1000");
    let marks = node.marks();
    let mark = |name: &str| format!("echo x >> {}/{name}", marks.display());
    let ran = |name: &str| fs::read_to_string(marks.join(name)).unwrap_or_default().lines().count();
    let mut tell = hook("tell", &mark("tell"), &[]);
    tell.after = vec!["running".into()];
    pod.hooks = vec![hook("prepare", &mark("prepare"), &["running"]), tell];
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for("both hooks", || (ran("prepare"), ran("tell")) == (1, 1));
    node.wait_for("their end", || node.steps(&server, &pod.id, "tell").phase == "done");

    node.kill();
    node.start(false);
    node.wait_for("the agent to know", || node.steps(&server, &pod.id, "tell").phase == "done");
    assert_eq!((ran("prepare"), ran("tell")), (1, 1), "an agent that starts anew runs none again");

    node.kill();
    pod.tasks[0].exec[2] = "exec sleep 2000".into();
    pod.job_version = 2;
    server.assign(vec![pod.clone()], vec![]);
    node.start(false);
    node.wait_for("the hook that follows the tasks", || ran("tell") == 2);
    assert_eq!(ran("prepare"), 1);

    node.run_once("down");
    node.wait_for_end();
    node.start(false);
    node.wait_for("both hooks of the new start", || (ran("prepare"), ran("tell")) == (2, 3));
}

/// Another may be started elsewhere when the lease is over: what prepares for the tasks must have ended by then, too.
#[test]
fn a_hook_of_a_single_pod_ends_with_the_lease_and_runs_again_in_the_next_term() {
    let Some(mut node) = TestNode::new("hookfence") else { return };
    let server = node.serve();
    node.start(true);
    let marks = node.marks();
    let script = format!(
        "echo $HEXTET_FENCING_TOKEN > {0}/token; setsid sleep 1000 & echo $! > {0}/stray; echo $$ > {0}/pid; sleep 1000",
        marks.display()
    );
    let mut pod = PodAssignment { singleton: true, serial: 7, ..node.pod(&server, 1, "exec sleep 1000") };
    pod.hooks = vec![hook("prepare", &script, &["running"])];
    let read = |name: &str| fs::read_to_string(marks.join(name)).ok()?.trim().parse::<u32>().ok();
    let work = node.path("state/hooks").join(&pod.id).join("prepare/up/work");
    let process = |name: &str| host_pid(&work, read(name)?);
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for("the hook to wait", || node.steps(&server, &pod.id, "prepare").attempts == 1);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(read("pid"), None, "it runs without a lease");

    server.talk.lock().unwrap().granted = Some(0);
    node.wait_for("the hook", || process("pid").is_some());
    let (first, stray) = (process("pid").unwrap(), process("stray").unwrap());
    assert_eq!(read("token"), Some(7));
    std::thread::sleep(Duration::from_millis(u64::from(LEASE_MS) + 500));
    assert!(is_alive(first), "a lease that is renewed does not end");
    node.kill();
    let died = Instant::now();
    node.wait_for("the hook's end", || !is_alive(first) && !is_alive(stray));
    assert!(died.elapsed() < Duration::from_millis(u64::from(LEASE_MS) + 500), "{:?}", died.elapsed());

    ["pid", "stray"].iter().for_each(|name| fs::remove_file(marks.join(name)).unwrap());
    server.talk.lock().unwrap().granted = None;
    node.start(false);
    std::thread::sleep(Duration::from_millis(u64::from(LEASE_MS)));
    assert_eq!(read("pid"), None, "it runs without a lease");
    server.talk.lock().unwrap().granted = Some(0);
    node.wait_for("the hook again", || read("pid").is_some());
}

#[test]
fn a_hook_that_was_under_way_when_the_agent_was_killed_is_adopted_and_a_done_one_is_not_run_again() {
    let Some(mut node) = TestNode::new("hookadopt") else { return };
    let server = node.serve();
    node.start(true);
    let mut pod = node.pod(&server, 1, "exec sleep 1000");
    let marks = node.marks();
    let script =
        format!("echo once >> {0}/first; while ! test -e {0}/go; do sleep 0.1; done", marks.display());
    let second = format!("echo once >> {}/second", marks.display());
    pod.hooks = vec![hook("first", &script, &["running"]), hook("second", &second, &["first"])];
    server.assign(vec![pod.clone()], vec![]);
    node.wait_for("the hook", || marks.join("first").exists());
    node.kill();
    node.start(false);
    std::thread::sleep(Duration::from_millis(300));
    assert!(server.report(&pod.id).is_none_or(|report| report.phase != i32::from(PodPhase::Running)));
    fs::write(marks.join("go"), "").unwrap();
    node.wait_for_phase(&server, &pod.id, PodPhase::Running);
    assert_eq!(fs::read_to_string(marks.join("first")).unwrap(), "once\n");
    assert_eq!(fs::read_to_string(marks.join("second")).unwrap(), "once\n");
}

#[test]
fn an_operators_script_follows_the_events_that_it_names() {
    let Some(mut node) = TestNode::new("script") else { return };
    let server = node.serve();
    let marks = node.path("events");
    node.hooks = format!(
        r#"{{"tell": {{"exec": ["/bin/sh", "-c", "echo $HEXTET_EVENT $HEXTET_MESSAGE >> {}"], "on": ["pod-running", "pod-failed", "pod-stopping", "pod-gone"]}}}}"#,
        marks.display()
    );
    node.start(true);
    let pod = node.pod(&server, 1, "sleep 0.5; exit 7");
    server.assign(vec![pod.clone()], vec![]);
    let has = |text: &str| {
        fs::read_to_string(&marks).is_ok_and(|all| all.lines().any(|line| line.starts_with(text)))
    };
    node.wait_for("the failure", || has("pod-failed task web: exited with status 7"));
    assert!(has("pod-running"), "{:?}", fs::read_to_string(&marks));
    server.assign(vec![], vec![pod.id.clone()]);
    node.wait_for("the end", || has("pod-stopping") && has("pod-gone"));
}

/// A node in namespaces of its own; everything of it is gone when it is dropped.
struct TestNode {
    label: String,
    ca: Arc<Ca>,
    agent: Option<Child>,
    folder: TempDir,
    net: Net,
    /// Of the operator, as JSON.
    hooks: String,
}

impl TestNode {
    fn new(label: &str) -> Option<TestNode> {
        if !geteuid().is_root() {
            eprintln!("skipped: network namespaces need root");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let label = format!("hxt{}-{label}", std::process::id());
        Some(TestNode { label, ca: Ca::new(), agent: None, folder, net: Net::new(), hooks: "{}".into() })
    }

    fn serve(&self) -> TestServer {
        TestServer::start(&self.net.server, &self.ca)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A folder that tasks and hooks may write to.
    fn marks(&self) -> PathBuf {
        let marks = self.path("marks");
        fs::create_dir(&marks).unwrap();
        fs::set_permissions(&marks, fs::Permissions::from_mode(0o777)).unwrap();
        marks
    }

    fn command(&self, what: &str) -> std::process::Command {
        let mut command = in_netns(&self.net.node, env!("CARGO_BIN_EXE_hextet-node"));
        if on_bpffs() {
            command.env("HEXTET_NODE_BPF_DIR", self.bpf_dir());
        }
        command.env("HEXTET_NODE_HOOKS", &self.hooks);
        command.arg(what).arg(self.folder.path());
        command
    }

    fn bpf_dir(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.net.node)
    }

    /// Starts the agent and waits until it is ready.
    fn start(&mut self, join: bool) {
        let log = File::create(self.path("agent.log")).unwrap();
        let mut command = self.command("run");
        command.args(["eth0", "n1"]);
        if join {
            command.arg(self.ca.token().to_string());
        }
        self.agent = Some(command.stderr(log).spawn().unwrap());
        self.wait_for("the agent", || self.log().contains("node ready"));
    }

    /// Joins, runs a pod, and leaves as a machine does that is switched off: no process, no kernel state, no run folder.
    fn run_and_take_down(&mut self, server: &TestServer) -> PodAssignment {
        self.start(true);
        let pod = self.pod(server, 1, "exec sleep 1000");
        server.assign(vec![pod.clone()], vec![]);
        self.wait_for_phase(server, &pod.id, PodPhase::Running);
        self.run_once("down");
        self.wait_for_end();
        fs::remove_dir_all(self.path("run")).unwrap();
        server.talk.lock().unwrap().reports.clear();
        pod
    }

    /// A step of a pod, as the agent tells the server.
    fn steps(&self, server: &TestServer, pod: &str, step: &str) -> StepStatus {
        let request = server.talk.lock().unwrap().described.len() as u64 + 1;
        server.describe(request, pod);
        self.wait_for("the answer", || server.talk.lock().unwrap().described.contains_key(&request));
        let answer = server.talk.lock().unwrap().described[&request].clone();
        assert_eq!(answer.error, "");
        answer.steps.into_iter().find(|other| other.name == step).unwrap()
    }

    /// Indices and names: a link that was made anew has another index.
    fn links(&self) -> Vec<String> {
        let text = ip(&["-n", &self.net.node, "-o", "link"]);
        text.lines().filter_map(|line| line.split(": <").next()).map(str::to_owned).collect()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    fn kill(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    fn wait_for_end(&mut self) {
        let mut agent = self.agent.take().unwrap();
        self.wait_for("the agent's end", || agent.try_wait().unwrap().is_some());
    }

    fn run_once(&self, what: &str) -> String {
        let output = self.command(what).output().unwrap();
        assert!(output.status.success(), "{what}: {}\n{}", text(&output), self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// A pod with an address of this node, which has joined.
    fn pod(&self, server: &TestServer, host: u128, script: &str) -> PodAssignment {
        let (subnet, group) = {
            let talk = server.talk.lock().unwrap();
            let enrolled = talk.enrolled.as_ref().unwrap();
            (talk.subnet, u128::from(enrolled.group_id))
        };
        let address = subnet | (0xaa_0000_0000 + host) << 24 | group;
        PodAssignment {
            id: format!("{}-{host}", self.label),
            job: "hello".into(),
            group: "web".into(),
            address: address.to_be_bytes().to_vec(),
            tasks: vec![Task {
                name: "web".into(),
                exec: vec!["/bin/sh".into(), "-c".into(), script.into()],
                ..Task::default()
            }],
            job_version: 1,
            ..PodAssignment::default()
        }
    }

    fn wait_for_phase(&self, server: &TestServer, pod: &str, phase: PodPhase) {
        let is = |report: PodReport| report.phase == i32::from(phase);
        self.wait_for(&format!("{pod} to be {phase:?}"), || server.report(pod).is_some_and(is));
    }

    fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition() {
            assert!(
                Instant::now() < deadline,
                "{what} did not come in time; the agent's log:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn task_pid(&self, pod: &PodAssignment) -> u32 {
        self.wait_for("the task's id", || self.try_task_pid(pod).is_some());
        self.try_task_pid(pod).unwrap()
    }

    fn try_task_pid(&self, pod: &PodAssignment) -> Option<u32> {
        let id = self.task_file(pod, "pid")?.parse().ok()?;
        host_pid(&self.path("state/pods").join(&pod.id).join("web"), id)
    }

    /// What the task wrote into its folder.
    fn task_file(&self, pod: &PodAssignment, name: &str) -> Option<String> {
        let path = self.path("state/pods").join(&pod.id).join("web").join(name);
        Some(fs::read_to_string(path).ok()?.trim().to_owned())
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = kill(Pid::from_raw(agent.id().cast_signed()), Signal::SIGTERM);
            let _ = agent.wait();
        }
        let _ = self.command("down").output();
        // Empty by now.
        let _ = fs::remove_dir_all(self.bpf_dir());
    }
}

/// A file system of 16 MiB.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf) -> Small {
        fs::create_dir_all(&at).unwrap();
        let path = at.to_str().unwrap().to_owned();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "hextet-test", &path]).status();
        assert!(mounted.unwrap().success());
        Small(at)
    }

    fn fill(&self) {
        let mut file = fs::File::create(self.0.join("filler")).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
    }

    fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // The pods of the test may still use it.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Where there is no BPF file system, the tests are of the kernel's own backends.
fn on_bpffs() -> bool {
    statfs("/sys/fs/bpf").is_ok_and(|there| there.filesystem_type() == BPF_FS_MAGIC)
}

fn address(pod: &PodAssignment) -> Ipv6Addr {
    <[u8; 16]>::try_from(pod.address.as_slice()).unwrap().into()
}

/// The process that works in `folder` and has the id `pid` in the PID namespace of its pod.
fn host_pid(folder: &Path, pid: u32) -> Option<u32> {
    let pids = fs::read_dir("/proc").unwrap();
    let mut pids = pids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|host| {
        let status = fs::read_to_string(format!("/proc/{host}/status")).unwrap_or_default();
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        ids.split_whitespace().next_back() == Some(&pid.to_string())
            && fs::read_link(format!("/proc/{host}/cwd")).is_ok_and(|cwd| cwd == folder)
    })
}

fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}
