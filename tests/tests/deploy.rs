//! Deploys with real pods behind a real balancer: what is promoted, what comes back, and that nobody notices.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hextet_tests::balancer::Balancer;
use hextet_tests::command::Output;
use hextet_tests::scenario::{BUSYBOX, CURL, NGINX, Needs, check, scenario};
use hextet_tests::wait::wait_for;
use hextet_tests::{Options, Pod, Testbed, jobs};
use serde_json::Value;

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX, NGINX] };
const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_deploy_is_promoted_or_goes_back_and_no_request_fails() {
    scenario("a_deploy_is_promoted_or_goes_back_and_no_request_fails", NEEDS, Options::default(), run);
}

fn run(testbed: &Testbed) -> Result<()> {
    testbed.apply(jobs::HELLO)?;
    let first = testbed.wait_running("hello", 3, SOON)?;
    let balancer = Balancer::new(testbed);
    balancer.join()?;
    balancer.wait_pods(&names(&first), SOON)?;
    let second = check("rolling: step by step every pod is another, and no request fails", || {
        balancer.under_load(|| {
            let said = deploy(testbed, &version("two"), &["--strategy", "rolling"])?.success()?;
            ensure!(said.contains("deploy hello@2 (rolling): version 1 to 2"), "{said}");
            ensure!(said.contains("1/3 20%: growing, 0 of 1 new pods run, 3 others"), "{said}");
            ensure!(said.contains("deploy hello@2 promoted after "), "{said}");
            Ok(())
        })?;
        let second = testbed.wait_running("hello", 3, SOON)?;
        ensure!(second.iter().all(|pod| !first.contains(pod)), "{second:?}");
        Ok(second)
    })?;
    check("one that fails is tried again, goes back, and is kept until somebody has looked", || {
        fails(testbed, &balancer, &second)
    })?;
    check("in place: one after the other, each where it is, and back by itself", || {
        in_place(testbed, &second)
    })?;
    check("blue-green: held after the switch, over a killed server, and back in one revision", || {
        switches(testbed, &balancer, &second)
    })
}

/// The version's tasks end a moment after they began.
fn fails(testbed: &Testbed, balancer: &Balancer<'_>, before: &[Pod]) -> Result<()> {
    let bad = jobs::HELLO.replace("exec busybox httpd", "exec false # busybox httpd");
    balancer.under_load(|| {
        let more = ["--strategy", "canary", "--retries", "1", "--retry-after", "1s", "-m", "worth a try"];
        let said = deploy(testbed, &bad, &more)?.failed_with(1)?;
        ensure!(said.contains(": waiting,"), "it is tried again: {said}");
        ensure!(said.contains(" is back: 10 % (step 1 of 2): ") && said.contains("pod hello-web-"), "{said}");
        Ok(())
    })?;
    ensure!(testbed.wait_running("hello", 3, SOON)? == before, "the others were left alone");
    let kept = deploys(testbed, "hello")?;
    let gave_up = kept.iter().find(|deploy| deploy["stage"] == "gave up").context("it is on the list")?;
    ensure!(gave_up["failures"] == 2, "{gave_up}");
    let shown = testbed.netctl(&["deploys"])?;
    let id = gave_up["deploy"].as_str().context("it has a name")?;
    ensure!(shown.stderr.contains(&format!("`netctl deploy ack {id}`")), "{shown}");
    let history = testbed.netctl(&["history", "job/hello"])?.success()?;
    ensure!(
        history.contains("worth a try") && history.contains(&format!("deploy {id} gave up")),
        "{history}"
    );
    testbed.netctl(&["deploy", "ack", id])?.success()?;
    testbed.netctl(&["deploy", "ack", id])?.failed_with(1)?;
    ensure!(deploys(testbed, "hello")?.iter().all(|deploy| deploy["stage"] != "gave up"));
    Ok(())
}

/// A fourth pod would have room: that none is made is not for want of it.
fn in_place(testbed: &Testbed, before: &[Pod]) -> Result<()> {
    let more = ["--in-place", "--retries", "0"];
    let bad = jobs::HELLO.replace("exec busybox httpd", "exec false # busybox httpd");
    let said = deploy(testbed, &bad, &more)?.failed_with(1)?;
    ensure!(said.contains("pod hello-web-") && said.contains("20 % (step 1 of 3)"), "{said}");
    ensure!(testbed.wait_running("hello", 3, SOON)? == before, "all are back where they were");
    let kept = deploys(testbed, "hello")?;
    let gave_up = kept.iter().find(|deploy| deploy["stage"] == "gave up").context("it is on the list")?;
    testbed.netctl(&["deploy", "ack", gave_up["deploy"].as_str().unwrap_or_default()])?.success()?;
    let said = deploy(testbed, &version("in place"), &more)?.success()?;
    ensure!(said.contains(" promoted after "), "{said}");
    ensure!(testbed.wait_running("hello", 3, SOON)? == before, "at the same addresses");
    deploy(testbed, &version("two"), &more)?.success()?;
    Ok(())
}

fn switches(testbed: &Testbed, balancer: &Balancer<'_>, before: &[Pod]) -> Result<()> {
    let (old, more) = (names(before), ["--strategy", "blue-green", "--pause", "hold", "--detach"]);
    let answers = balancer.under_load(|| {
        deploy(testbed, &version("three"), &more)?.success()?;
        wait_stage(testbed, "held")
    })?;
    ensure!(old.contains(&answers[0]), "the old ones answered before");
    let all = names(&testbed.pods("hello")?);
    balancer.wait_pods(&all.difference(&old).cloned().collect(), SOON)?;
    let refused = testbed.netctl(&["rollback", "hello", "--to", "1"])?.failed_with(1)?;
    ensure!(refused.contains("job `hello` is being deployed") && refused.contains("user:root"), "{refused}");
    balancer.under_load(|| {
        testbed.server().kill9()?;
        testbed.server().start()?;
        let held = deploys(testbed, "hello")?;
        ensure!(held.iter().any(|deploy| deploy["stage"] == "held"), "{held:?}");
        testbed.netctl(&["deploy", "abort", "hello", "-m", "too many errors"])?.success()?;
        wait_stage(testbed, "aborted")
    })?;
    balancer.wait_pods(&old, SOON)?;
    ensure!(testbed.wait_running("hello", 3, SOON)? == before, "they stood by all the time");
    Ok(())
}

/// [`jobs::HELLO`] with pods that say something else.
fn version(word: &str) -> String {
    jobs::HELLO.replace("cpu: 50m", &format!("env: {{VERSION: {word}}}\n        cpu: 50m"))
}

fn deploy(testbed: &Testbed, text: &str, more: &[&str]) -> Result<Output> {
    let args = [&["deploy", "-f", "-", "--healthy-for", "1s"], more].concat();
    testbed.netctl_stdin(&args, text)
}

fn deploys(testbed: &Testbed, job: &str) -> Result<Vec<Value>> {
    Ok(serde_json::from_str(&testbed.netctl(&["deploys", job, "-o", "json"])?.success()?)?)
}

fn wait_stage(testbed: &Testbed, stage: &str) -> Result<()> {
    wait_for(SOON, &format!("the deploy is {stage}"), || {
        let all = deploys(testbed, "hello").map_err(|error| format!("{error:#}"))?;
        let last = all.last().ok_or("there is none")?;
        if last["stage"] == stage { Ok(()) } else { Err(last.to_string()) }
    })?;
    Ok(())
}

fn names(pods: &[Pod]) -> std::collections::BTreeSet<String> {
    pods.iter().map(|pod| pod.id.clone()).collect()
}
