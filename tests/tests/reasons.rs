//! What remains of a pod that has failed, when it and its logs are long gone; and streams that outlive their server.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hextet_tests::process::Daemon;
use hextet_tests::scenario::{BUSYBOX, Needs, check, scenario};
use hextet_tests::testbed::netctl_program;
use hextet_tests::wait::wait_until;
use hextet_tests::{Options, Testbed};
use nix::sys::signal::Signal;
use serde_json::Value;

const NEEDS: Needs = Needs { programs: &[BUSYBOX] };
const SOON: Duration = Duration::from_secs(20);

/// One pod whose task runs this script.
fn job(script: &str) -> String {
    format!(
        "job: mill\ngroups:\n  a:\n    count: 1\n    tasks:\n      t:\n        exec: [/bin/sh, -c, '{script}']\n"
    )
}

#[test]
fn a_failed_deploy_leaves_what_its_pods_wrote() {
    scenario("a_failed_deploy_leaves_what_its_pods_wrote", NEEDS, Options::default(), remains);
}

fn remains(testbed: &Testbed) -> Result<()> {
    testbed.apply(&job("exec sleep 1000"))?;
    let before = testbed.wait_running("mill", 1, SOON)?;
    // More than is kept, and what would clear a terminal.
    let bad = "seq 1 1000; printf \"\\033[2Jno such table\\n\"; exit 3";
    check("the command that followed the deploy shows it", || {
        let more = ["deploy", "-f", "-", "--retries", "0", "--healthy-for", "2s"];
        let said = testbed.netctl_stdin(&more, &job(bad))?.failed_with(1)?;
        ensure!(said.contains("exited with status 3"), "{said}");
        ensure!(said.contains("\n    | 1000\n    | ?[2Jno such table\n"), "{said}");
        ensure!(
            !said.contains("    | 991\n") && !said.contains('\x1b'),
            "ten lines, and no commands: {said}"
        );
        Ok(())
    })?;
    ensure!(testbed.wait_running("mill", 1, SOON)? == before, "the other was left alone");
    check("the list of deploys keeps it, over a restart of the server", || {
        testbed.server().kill9()?;
        testbed.server().start()?;
        let shown = testbed.netctl(&["deploys", "mill"])?;
        ensure!(shown.stderr.contains("    | ?[2Jno such table\n"), "{shown}");
        let json = testbed.netctl(&["deploys", "mill", "-o", "json"])?.success()?;
        let all: Vec<Value> = serde_json::from_str(&json)?;
        let output = all[0]["output"].as_str().context("it has an output")?;
        ensure!(output.lines().count() == 10 && output.len() <= 2048, "{output}");
        Ok(())
    })?;
    let pod = failed_pod(testbed)?;
    check("netctl why tells of the pod that is gone", || {
        let said = testbed.netctl(&["why", &format!("pod/{pod}")])?.success()?;
        ensure!(said.starts_with(&format!("{pod} is gone: it ended on n")), "{said}");
        ensure!(said.contains("That was done by deploy, "), "{said}");
        ensure!(
            said.contains("task t: exited with status 3") && said.contains("    | ?[2Jno such table\n"),
            "{said}"
        );
        Ok(())
    })?;
    check("netctl events has it where the pod failed", || {
        let said = testbed.netctl(&["events", "--pod", &pod])?.success()?;
        ensure!(said.contains("\n    | ?[2Jno such table\n"), "{said}");
        Ok(())
    })
}

/// The pod that the deploy had made, from the deploy's reason.
fn failed_pod(testbed: &Testbed) -> Result<String> {
    let json = testbed.netctl(&["deploys", "mill", "-o", "json"])?.success()?;
    let all: Vec<Value> = serde_json::from_str(&json)?;
    let reason = all[0]["reason"].as_str().context("it has a reason")?;
    let named = reason.split_whitespace().find(|word| word.starts_with("mill-a-"));
    Ok(named.with_context(|| format!("it names a pod: {reason}"))?.to_owned())
}

#[test]
fn what_follows_goes_on_over_a_restart_of_the_server() {
    scenario("what_follows_goes_on_over_a_restart_of_the_server", NEEDS, Options::default(), follow);
}

fn follow(testbed: &Testbed) -> Result<()> {
    testbed.apply(&job("n=0; while sleep 0.02; do n=$((n+1)); echo line $n; done"))?;
    let pod = testbed.wait_running("mill", 1, SOON)?.remove(0).id;
    let logs = start(testbed, "logs", &["logs", &pod, "-f"])?;
    let events = start(testbed, "events", &["events", "--follow", "-o", "json"])?;
    let watch = start(testbed, "watch", &["watch", "nope"])?;
    check("who waits for what is not there is told so", || {
        says(&watch, "note: there is no job `nope` now; waiting for it")
    })?;
    wait_until(SOON, "the others have begun", || numbers(&logs).len() > 5 && !revisions(&events).is_empty())?;
    check("a killed server, and one that is stopped: each stream goes on", || {
        for (number, signal) in [(1, Signal::SIGKILL), (2, Signal::SIGTERM)] {
            testbed.server().daemon().stop(signal)?;
            std::thread::sleep(Duration::from_millis(300));
            testbed.server().start()?;
            testbed.apply(&format!(
                "job: other{number}\ngroups: {{a: {{count: 0, tasks: {{t: {{exec: [/bin/true]}}}}}}}}\n"
            ))?;
            says(&events, &format!("job other{number} version 1"))?;
            let lines = numbers(&logs).len();
            wait_until(SOON, "the log goes on", || numbers(&logs).len() > lines + 20)?;
            for stream in [&logs, &events, &watch] {
                let lost =
                    stream.log().matches("note: connection lost; trying again for 10 minutes (").count();
                ensure!(lost == number, "{number} times: {}", stream.log());
            }
        }
        Ok(())
    })?;
    check("no line of the log and no revision is left out or comes twice", || {
        one_after_the_other(&numbers(&logs))?;
        one_after_the_other(&revisions(&events))
    })?;
    check("what was waited for comes", || {
        testbed.apply(&job("exec sleep 1000").replace("job: mill", "job: nope"))?;
        says(&watch, " nope-a-")
    })?;
    check("the log ends with its pod", || {
        testbed.netctl(&["rm", "mill"])?.success()?;
        let said = || logs.log().lines().rev().take(5).collect::<Vec<_>>().join("\n");
        wait_until(SOON, "netctl logs has ended", || logs.pid().is_none()).with_context(said)?;
        ensure!(!logs.log().lines().any(|line| line.starts_with("error:")), "{}", said());
        Ok(())
    })?;
    [events, watch].iter().try_for_each(|stream| stream.stop(Signal::SIGINT))
}

fn start(testbed: &Testbed, name: &str, args: &[&str]) -> Result<Daemon> {
    let stream = Daemon::new(name, testbed.netns("n1"), testbed.dir());
    let mut command = Command::new(netctl_program()?);
    command.args(args).envs(testbed.environment("n1"));
    stream.start(command)?;
    Ok(stream)
}

fn says(stream: &Daemon, words: &str) -> Result<()> {
    wait_until(SOON, &format!("it says {words:?}"), || stream.log().contains(words))
        .map(drop)
        .with_context(|| stream.log())
}

/// Those of the lines of the task, but for one that is not whole yet.
fn numbers(logs: &Daemon) -> Vec<u64> {
    let text = logs.log();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect()
}

fn revisions(events: &Daemon) -> Vec<u64> {
    let text = events.log();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter_map(|event| event["revision"].as_u64()).collect()
}

fn one_after_the_other(numbers: &[u64]) -> Result<()> {
    let wrong = numbers.iter().zip(&numbers[1..]).find(|(one, next)| *one + 1 != **next);
    ensure!(numbers.len() > 10 && wrong.is_none(), "{wrong:?} in {numbers:?}");
    Ok(())
}
