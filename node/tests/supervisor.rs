//! The supervisor as a process: what it starts, what it starts again, and what is left when it ends.
//!
//! Runs as any user; as root the tasks also change their user.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use node::supervisor::{
    READY_LINE,
    spec::{PodSpec, TaskSpec},
    status::{Command as Order, LOCK_FILE, SOCKET_FILE, Status, TaskState},
};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(20);
/// Between every user of a Debian machine and the pods of a real node.
const TEST_UID: u32 = 1_879_040_000;

#[test]
fn a_task_runs_in_its_own_folder_with_its_own_environment() {
    let pod = TestPod::new(&[("web", "pwd; echo $GREETING; id -u; touch mine; exec sleep 1000")]);
    let supervisor = pod.start();
    supervisor.connect().wait_for(|status| running(status, "web"));
    let log = wait_for("the log", || Some(pod.log("web")).filter(|text| text.lines().count() == 3));
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(Path::new(lines[0]), pod.spec.private_folder("web"));
    assert_eq!(lines[1], "hello");
    let uid = pod.spec.uid.unwrap_or(geteuid().as_raw());
    assert_eq!(lines[2], uid.to_string());
    let file = wait_for("the task's file", || fs::metadata(pod.spec.private_folder("web").join("mine")).ok());
    assert_eq!((file.uid(), file.permissions().mode() & 0o777), (uid, 0o644));
}

#[test]
fn a_task_holds_no_rights_and_no_descriptors_of_the_supervisor() {
    let pod = TestPod::new(&[(
        "web",
        "grep -E 'NoNewPrivs|SigBlk|CapEff|Groups' /proc/self/status; ls -l /proc/$$/fd | grep -c '[0-9] ->'; exec sleep 1000",
    )]);
    let _supervisor = pod.start();
    let log = wait_for("the log", || Some(pod.log("web")).filter(|text| text.lines().count() == 5));
    let words: Vec<Vec<&str>> = log.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        words[1..4],
        [vec!["SigBlk:", "0000000000000000"], vec!["CapEff:", "0000000000000000"], vec!["NoNewPrivs:", "1"]],
        "{log}"
    );
    if pod.spec.uid.is_some() {
        assert_eq!(words[0], ["Groups:"], "{log}");
    }
    assert_eq!(words[4], ["3"], "{log}");
}

#[test]
fn a_task_that_ends_is_started_again_with_growing_waits() {
    let pod = TestPod::new(&[("web", "echo start; exit 3")]);
    let supervisor = pod.start();
    let begin = Instant::now();
    let status = supervisor.connect().wait_for(|status| status.tasks["web"].restarts >= 3);
    assert!(begin.elapsed() >= Duration::from_millis(100 + 200 + 400), "{:?}", begin.elapsed());
    assert!(status.tasks["web"].message.starts_with("exited with status 3 after"), "{status:?}");
    assert!(pod.log("web").lines().count() >= 3);
}

/// Its log went with its pod, and all that was left was a number.
#[test]
fn the_last_lines_of_a_task_that_ended_are_told_those_of_its_last_run() {
    let script =
        "if [ -e again ]; then seq 1 100000; echo no such table; exit 3; fi; touch again; echo first; exit 4";
    let pod = TestPod::new(&[("web", script), ("db", "exec sleep 1000")]);
    let supervisor = pod.start();
    let second =
        |status: &Status| status.ending.as_ref().is_some_and(|ending| ending.what.contains("status 3"));
    let ending = supervisor.connect().wait_for(second).ending.unwrap();
    assert!(ending.what.starts_with("task web: exited with status 3 after "), "{ending:?}");
    let lines: Vec<&str> = ending.output.lines().collect();
    assert_eq!((lines.len(), lines[0], lines[9]), (10, "99992", "no such table"));
    // Whoever connects only now is told, too: the task may run again by then.
    assert!(supervisor.connect().wait_for(|status| status.ending.is_some()).ending.is_some());
}

#[test]
fn a_program_that_does_not_exist_is_named() {
    let mut pod = TestPod::new(&[("web", "")]);
    pod.spec.tasks[0].exec = vec!["/no/such/program".into()];
    let supervisor = pod.start();
    let status = supervisor.connect().wait_for(|status| status.tasks["web"].state == TaskState::Failed);
    let ending = status.ending.as_ref().unwrap();
    assert!(ending.what.starts_with("task web: ") && ending.output.is_empty(), "{ending:?}");
    assert_eq!(
        status.tasks["web"].message,
        "cannot run /no/such/program: No such file or directory (os error 2)"
    );
}

#[test]
fn one_failing_task_does_not_disturb_the_other() {
    let pod = TestPod::new(&[("bad", "exit 1"), ("good", "exec sleep 1000")]);
    let supervisor = pod.start();
    let mut client = supervisor.connect();
    let first = client.wait_for(|status| running(status, "good"));
    let later = client.wait_for(|status| status.tasks["bad"].restarts >= 2);
    assert_eq!(later.tasks["good"].pid, first.tasks["good"].pid);
    assert_eq!(later.tasks["good"].restarts, 0);
}

#[test]
fn stop_ends_the_tasks_and_what_they_started() {
    let pod = TestPod::new(&[(
        "web",
        "setsid sleep 1001 & sleep 1002 & echo $! ; trap 'echo bye; exit 0' TERM; wait",
    )]);
    let mut supervisor = pod.start();
    let mut client = supervisor.connect();
    client.wait_for(|status| running(status, "web"));
    wait_for("the background process", || Some(pod.log("web")).filter(|text| text.contains('\n')));
    let family = descendants(supervisor.process.id());
    assert!(family.len() >= 3, "{family:?}");
    client.order(Order::Stop);
    let last = client.wait_for(|status| status.stopped);
    assert_eq!(last.tasks["web"].state, TaskState::Stopping);
    assert!(supervisor.process.wait().unwrap().success());
    assert!(pod.log("web").contains("bye"), "{}", pod.log("web"));
    assert!(!pod.run_dir().join(SOCKET_FILE).exists());
    assert_eq!(family.into_iter().filter(|pid| is_alive(*pid)).collect::<Vec<u32>>(), Vec::<u32>::new());
}

#[test]
fn a_task_that_ignores_the_request_is_killed_after_its_grace() {
    let pod = TestPod::new(&[("web", "trap '' TERM; while :; do sleep 0.1; done")]);
    let mut supervisor = pod.start();
    let mut client = supervisor.connect();
    client.wait_for(|status| running(status, "web"));
    // The shell sets its trap after it has started.
    wait_for("the trap", || ignores_sigterm(supervisor.process.id()).then_some(()));
    let begin = Instant::now();
    client.order(Order::Stop);
    client.wait_for(|status| status.stopped);
    assert!(begin.elapsed() >= Duration::from_secs(5), "{:?}", begin.elapsed());
    supervisor.process.wait().unwrap();
}

#[test]
fn sigterm_stops_the_pod() {
    let pod = TestPod::new(&[("web", "exec sleep 1000")]);
    let mut supervisor = pod.start();
    supervisor.connect().wait_for(|status| running(status, "web"));
    kill(Pid::from_raw(supervisor.process.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert!(supervisor.process.wait().unwrap().success());
}

#[test]
fn the_tasks_end_with_a_killed_supervisor_and_the_next_one_starts_anew() {
    let pod = TestPod::new(&[("web", "exec sleep 1000")]);
    let mut supervisor = pod.start();
    let status = supervisor.connect().wait_for(|status| running(status, "web"));
    let task = status.tasks["web"].pid.unwrap();
    supervisor.process.kill().unwrap();
    supervisor.process.wait().unwrap();
    wait_for("the end of the task", || (!is_alive(task)).then_some(()));
    let next = pod.start();
    let status = next.connect().wait_for(|status| running(status, "web"));
    assert_ne!(status.tasks["web"].pid, Some(task));
}

/// It was seen to go on writing for ever, beside the pod that had replaced its own.
#[test]
fn a_process_that_left_its_session_ends_with_a_killed_supervisor() {
    let Some(pod) =
        root_pod("(setsid sh -c 'while :; do echo x >> beats; sleep 0.02; done' &); exec sleep 1000")
    else {
        return;
    };
    let mut supervisor = pod.start();
    let beats = pod.spec.private_folder("web").join("beats");
    wait_for("its beats", || fs::metadata(&beats).is_ok_and(|file| file.len() > 20).then_some(()));
    let family = descendants(supervisor.process.id());
    assert!(family.len() >= 4, "the init, the task, the shell and its sleep: {family:?}");
    supervisor.process.kill().unwrap();
    supervisor.process.wait().unwrap();
    let at = Instant::now();
    wait_for("the end of all", || (!family.iter().any(|pid| is_alive(*pid))).then_some(()));
    assert!(at.elapsed() < Duration::from_secs(2), "{:?}", at.elapsed());
    let len = fs::metadata(&beats).unwrap().len();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(fs::metadata(&beats).unwrap().len(), len);
}

#[test]
fn whenever_a_supervisor_is_killed_nothing_of_its_pod_is_left() {
    let Some(pod) = root_pod("(setsid sleep 1000 &); (setsid sleep 1000 &); exec sleep 1000") else { return };
    pod.spec.save(&pod.run_dir()).unwrap();
    for delay_ms in 0..40 {
        let mut supervisor = pod.command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        supervisor.kill().unwrap();
        supervisor.wait().unwrap();
        wait_for(&format!("the end of all, after {delay_ms} ms"), || {
            pod.processes().is_empty().then_some(())
        });
    }
}

#[test]
fn a_task_sees_its_own_pods_processes_under_the_ids_that_it_can_signal() {
    let Some(pod) = root_pod(
        "sleep 1001 & until grep -q sleep /proc/$!/comm; do :; done; \
         for p in /proc/[0-9]*; do test \"$(cat $p/comm)\" = sleep && kill ${p#/proc/}; done; wait $!; \
         echo seen: $? $(cat /proc/1/comm) $(cat /proc/$$/comm) $(ls -d /proc/[0-9]* | wc -l); exec sleep 1000",
    ) else {
        return;
    };
    let _supervisor = pod.start();
    let log = wait_for("the log", || Some(pod.log("web")).filter(|text| text.contains("seen: ")));
    // Its init, itself, and what counts.
    let words: Vec<&str> = log.split_once("seen: ").unwrap().1.split_whitespace().collect();
    assert_eq!(words[..3], ["143", "pod-init", "sh"], "{log}");
    assert!(words[3].parse::<u32>().unwrap() <= 5, "{log}");
}

#[test]
fn when_the_init_is_killed_the_tasks_start_anew_in_another_namespace() {
    let Some(pod) = root_pod("(setsid sleep 1001 &); exec sleep 1000") else { return };
    let supervisor = pod.start();
    let mut client = supervisor.connect();
    client.wait_for(|status| running(status, "web"));
    let init = || {
        let children = descendants(supervisor.process.id());
        children.into_iter().find(|pid| field(*pid, "Name:").as_deref() == Some("pod-init"))
    };
    let (first, before) = (init().unwrap(), descendants(supervisor.process.id()));
    kill(Pid::from_raw(first.cast_signed()), Signal::SIGKILL).unwrap();
    let status = client.wait_for(|status| status.tasks["web"].restarts > 0 && running(status, "web"));
    assert!(!before.contains(&status.tasks["web"].pid.unwrap()));
    assert!(!before.iter().any(|pid| is_alive(*pid)), "{before:?}");
    assert_ne!(init(), Some(first));
}

#[test]
fn a_jobs_hook_ends_with_its_killed_runner() {
    let Some(pod) = root_pod("") else { return };
    let folder = pod.run_dir().join("hook");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(pod.run_dir(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    let script = "(setsid sleep 1000 &); echo begun; exec sleep 1000";
    let spec = format!(
        r#"{{"run": "1", "name": "h", "exec": ["/bin/sh", "-c", "{script}"], "env": {{"PATH": "/usr/bin:/bin"}},
            "user": [{TEST_UID}, {TEST_UID}], "netns": "/proc/self/ns/net", "timeout_ms": 60000}}"#
    );
    fs::write(folder.join("spec.json"), spec).unwrap();
    let mut runner = Command::new(env!("CARGO_BIN_EXE_hextet-node"));
    let mut runner = runner.args(["supervise", "--hook-dir"]).arg(&folder).spawn().unwrap();
    wait_for("the hook", || fs::read_to_string(folder.join("output.log")).is_ok().then_some(()));
    let family = wait_for("its processes", || Some(descendants(runner.id())).filter(|all| all.len() >= 3));
    runner.kill().unwrap();
    runner.wait().unwrap();
    wait_for("the end of all", || (!family.iter().any(|pid| is_alive(*pid))).then_some(()));
}

#[test]
fn two_supervisors_for_one_pod_are_impossible() {
    let pod = TestPod::new(&[("web", "exec sleep 1000")]);
    let supervisor = pod.start();
    let second = pod.command().output().unwrap();
    assert!(!second.status.success());
    let text = String::from_utf8(second.stderr).unwrap();
    assert!(text.contains(&format!("process {} supervises", supervisor.process.id())), "{text}");
    supervisor.connect().wait_for(|status| running(status, "web"));
}

#[test]
fn the_supervisor_goes_on_when_nobody_is_connected() {
    let pod = TestPod::new(&[("web", "exec sleep 1000")]);
    let supervisor = pod.start();
    let first = supervisor.connect().wait_for(|status| running(status, "web"));
    let again = supervisor.connect().wait_for(|_| true);
    assert_eq!(first, again);
}

#[test]
fn an_update_restarts_what_changed_and_nothing_else() {
    let mut pod = TestPod::new(&[
        ("same", "exec sleep 1000"),
        ("changed", "exec sleep 1001"),
        ("old", "exec sleep 1002"),
    ]);
    let supervisor = pod.start();
    let mut client = supervisor.connect();
    let before =
        client.wait_for(|status| ["same", "changed", "old"].iter().all(|task| running(status, task)));
    pod.spec.tasks.retain(|task| task.name != "old");
    pod.spec.tasks[1].exec[2] = "exec sleep 1003".into();
    pod.spec.tasks.push(task("new", "exec sleep 1004"));
    pod.spec.fingerprint = "second".into();
    pod.spec.save(&pod.run_dir()).unwrap();
    client.order(Order::Update);
    let after = client.wait_for(|status| {
        status.fingerprint == "second"
            && status.tasks.len() == 3
            && ["same", "changed", "new"].iter().all(|task| running(status, task))
            && status.tasks["changed"].pid != before.tasks["changed"].pid
    });
    assert_eq!(after.tasks["same"], before.tasks["same"]);
    assert!(!is_alive(before.tasks["old"].pid.unwrap()));
}

#[test]
fn an_update_that_cannot_be_read_changes_nothing() {
    let mut pod = TestPod::new(&[("web", "exec sleep 1000")]);
    let supervisor = pod.start();
    let mut client = supervisor.connect();
    let before = client.wait_for(|status| running(status, "web"));
    fs::write(pod.run_dir().join("spec.json"), "{").unwrap();
    client.order(Order::Update);
    wait_for("the complaint", || {
        Some(pod.complaints()).filter(|text| text.contains("is not the spec of a pod"))
    });
    pod.spec.fingerprint = "second".into();
    pod.spec.save(&pod.run_dir()).unwrap();
    client.order(Order::Update);
    let after = client.wait_for(|status| status.fingerprint == "second");
    assert_eq!(after.tasks, before.tasks);
}

#[test]
fn a_folder_with_a_path_too_long_for_a_socket_is_fine() {
    let mut pod = TestPod::new(&[("web", "exec sleep 1000")]);
    pod.run = pod.run_dir().join("x".repeat(120));
    fs::create_dir(pod.run_dir()).unwrap();
    pod.start().connect().wait_for(|status| running(status, "web"));
}

#[test]
fn nonsense_on_the_socket_ends_that_connection_only() {
    let pod = TestPod::new(&[("web", "exec sleep 1000")]);
    let supervisor = pod.start();
    let mut client = supervisor.connect();
    client.wait_for(|status| running(status, "web"));
    client.stream.get_mut().write_all(b"GET / HTTP/1.1\n").unwrap();
    let mut rest = String::new();
    while client.stream.read_line(&mut rest).is_ok_and(|len| len > 0) {}
    supervisor.connect().wait_for(|status| running(status, "web"));
}

#[test]
fn a_pod_without_a_spec_is_refused_with_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_hextet-node"))
        .args(["supervise", "--pod-dir"])
        .arg(folder.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains(&format!("cannot read {}", folder.path().join("spec.json").display())), "{text}");
}

/// A pod whose processes live in a PID namespace.
fn root_pod(script: &str) -> Option<TestPod> {
    if !geteuid().is_root() {
        eprintln!("skipped: only root can make a PID namespace");
        return None;
    }
    Some(TestPod::new(&[("web", script)]))
}

/// A pod's folders and its spec.
struct TestPod {
    folder: TempDir,
    run: PathBuf,
    spec: PodSpec,
}

impl TestPod {
    fn new(tasks: &[(&str, &str)]) -> TestPod {
        let folder = tempfile::tempdir().unwrap();
        // A task's user must be able to walk to its folder.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(folder.path().join("run")).unwrap();
        fs::create_dir(folder.path().join("state")).unwrap();
        let spec = PodSpec {
            pod: "test-web-aaaaa".into(),
            fingerprint: "first".into(),
            netns: None,
            uid: geteuid().is_root().then_some(TEST_UID),
            folder: folder.path().join("state"),
            tasks: tasks.iter().map(|(name, script)| task(name, script)).collect(),
            lease: None,
        };
        TestPod { run: folder.path().join("run"), folder, spec }
    }

    fn run_dir(&self) -> PathBuf {
        self.run.clone()
    }

    /// What the supervisor wrote to its standard error.
    fn complaints(&self) -> String {
        fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    /// The processes that live in the private folder of the task.
    fn processes(&self) -> Vec<u32> {
        let folder = self.spec.private_folder("web");
        let pids = fs::read_dir("/proc").unwrap();
        let pids = pids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let is_inside = |pid: &u32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == folder);
        pids.filter(|pid| is_inside(pid) && is_alive(*pid)).collect()
    }

    fn log(&self, task: &str) -> String {
        fs::read_to_string(self.spec.log(task)).unwrap_or_default()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hextet-node"));
        command.args(["supervise", "--pod-dir"]).arg(self.run_dir());
        command
    }

    fn start(&self) -> Running {
        self.spec.save(&self.run_dir()).unwrap();
        let stderr = File::create(self.folder.path().join("stderr")).unwrap();
        let mut process = self.command().stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), READY_LINE);
        assert!(self.run_dir().join(LOCK_FILE).exists());
        Running { process, run: self.run_dir() }
    }
}

fn task(name: &str, script: &str) -> TaskSpec {
    let env = [("GREETING", "hello"), ("PATH", "/usr/bin:/bin")];
    TaskSpec {
        name: name.into(),
        exec: vec!["/bin/sh".into(), "-c".into(), script.into()],
        env: env.into_iter().map(|(key, value)| (key.into(), value.into())).collect::<BTreeMap<_, _>>(),
    }
}

/// A supervisor that is killed when the test ends; its tasks end with it.
struct Running {
    process: Child,
    run: PathBuf,
}

impl Running {
    fn connect(&self) -> Client {
        let stream = node::socket::connect(&self.run, SOCKET_FILE).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Client { stream: BufReader::new(stream) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let family = descendants(self.process.id());
        let _ = self.process.kill();
        let _ = self.process.wait();
        for pid in family {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
    }
}

struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    fn wait_for(&mut self, wanted: impl Fn(&Status) -> bool) -> Status {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let mut line = String::new();
            assert!(self.stream.read_line(&mut line).unwrap() > 0, "the supervisor hung up");
            let status: Status = serde_json::from_str(&line).unwrap();
            if wanted(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "not in time; last: {status:?}");
        }
    }

    fn order(&mut self, order: Order) {
        let mut line = serde_json::to_vec(&order).unwrap();
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).unwrap();
    }
}

fn running(status: &Status, task: &str) -> bool {
    status.tasks.get(task).is_some_and(|task| task.state == TaskState::Running)
}

fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what} did not come in time");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn field(pid: u32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(status.lines().find_map(|line| line.strip_prefix(name))?.trim().to_owned())
}

fn is_alive(pid: u32) -> bool {
    field(pid, "State:").is_some_and(|state| !state.starts_with('Z'))
}

fn descendants(of: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap();
    let pids = pids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let children: Vec<u32> = pids.filter(|pid| field(*pid, "PPid:") == Some(of.to_string())).collect();
    children.iter().flat_map(|child| std::iter::once(*child).chain(descendants(*child))).collect()
}

fn ignores_sigterm(supervisor: u32) -> bool {
    descendants(supervisor).iter().any(|pid| {
        let ignored = field(*pid, "SigIgn:").and_then(|mask| u64::from_str_radix(&mask, 16).ok());
        ignored.is_some_and(|mask| mask & (1 << (Signal::SIGTERM as u32 - 1)) != 0)
    })
}
