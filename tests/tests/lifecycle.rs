//! What users see of the lifecycle of a pod: hooks, `netctl why`, `netctl events`.

use std::time::Duration;

use anyhow::{Result, ensure};
use hextet_tests::scenario::{BUSYBOX, CURL, NFT, Needs, check, scenario};
use hextet_tests::wait::wait_for;
use hextet_tests::{Options, Testbed};

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX, NFT] };
const SOON: Duration = Duration::from_secs(20);

fn job(script: &str) -> String {
    format!(
        "job: mill\ngroups:\n  a:\n    hooks:\n      migrate:\n        exec: [/bin/sh, -c, '{script}']\n        \
         before: [running]\n        attempts: 2\n    tasks:\n      t:\n        exec: [/bin/sleep, '1000']\n"
    )
}

#[test]
fn netctl_says_why_a_pod_does_not_run_and_what_happened_to_it() {
    scenario("netctl_says_why_a_pod_does_not_run_and_what_happened_to_it", NEEDS, Options::default(), why);
}

fn why(testbed: &Testbed) -> Result<()> {
    check("a job whose hook does not fit is refused where it is wrong", || {
        let text = job("exit 0").replace("before: [running]", "before: [nowhere]");
        let said = format!("{:#}", testbed.apply(&text).expect_err("it is refused"));
        ensure!(said.contains("`nowhere` is no point for a hook"), "netctl says: {said}");
        Ok(())
    })?;
    testbed.apply(&job("echo no such table; exit 3"))?;
    let pod = testbed.pods("mill")?.remove(0).id;
    let explain = |words: &[&str]| {
        wait_for(SOON, &format!("netctl why says {words:?}"), || {
            let said =
                testbed.netctl(&["why", &format!("pod/{pod}")]).map_err(|error| format!("{error:#}"))?;
            let all = words.iter().all(|word| said.stdout.contains(word));
            if all { Ok(said.stdout) } else { Err(said.to_string()) }
        })
        .map(|(_, said)| said)
    };
    check("a failed hook is named first, with who waits for it and what it said", || {
        let said = explain(&["has failed for good after 2 attempts: exited with status 3", "no such table"])?;
        let first = said.lines().next().unwrap_or_default();
        ensure!(first.starts_with(&format!("{pod} does not run: the job's hook migrate")), "{first}");
        ensure!(first.contains("wait for it"), "{first}");
        ensure!(said.contains("<- the long pole"), "{said}");
        Ok(())
    })?;
    check("a corrected one lets it run, and why says since when", || {
        testbed.apply(&job("exit 0"))?;
        testbed.wait_running("mill", 1, SOON)?;
        let said = explain(&[" runs since "])?;
        ensure!(said.contains("published"), "{said}");
        Ok(())
    })?;
    check("a deploy goes on over an attempt that failed, and its pod is starting meanwhile", || {
        let text = job("[ -e once ] || { touch once; exit 4; }; sleep 3").replace("1000", "1001");
        let deploy = |more: &[&str]| testbed.netctl_stdin(&[&["deploy", "-f", "-"], more].concat(), &text);
        deploy(&["--healthy-for", "1s", "--detach"])?.success()?;
        let again =
            "is starting: hook migrate is tried again, attempt 1 of 2 has failed: exited with status 4";
        wait_for(SOON, &format!("netctl pods says {again:?}"), || {
            let said = testbed.netctl(&["pods", "mill"]).map_err(|error| format!("{error:#}"))?;
            if said.stderr.contains(again) { Ok(()) } else { Err(said.to_string()) }
        })?;
        wait_for(SOON, "the deploy is promoted", || {
            let said = testbed.netctl(&["deploys", "mill"]).map_err(|error| format!("{error:#}"))?;
            if said.stdout.contains("promoted") { Ok(()) } else { Err(said.to_string()) }
        })?;
        let events = testbed.netctl(&["events"])?.success()?;
        let failed = |line: &&str| line.contains("pod-failed") && line.contains("status 4");
        ensure!(!events.lines().any(|line| failed(&line)), "{events}");
        Ok(())
    })?;
    // The one that the deploy has replaced may still be on its way down.
    let pod = testbed.wait_running("mill", 1, SOON)?.remove(0).id;
    check("events tell who did what, the node and the control plane", || {
        let said = testbed.netctl(&["events", "--pod", &pod])?.success()?;
        for word in ["pod-created", "step-failed", "migrate: exited with status 4", "pod-running", "node:"] {
            ensure!(said.contains(word), "{word} is missing: {said}");
        }
        let json = testbed.netctl(&["events", "--pod", &pod, "-o", "json"])?.success()?;
        ensure!(json.lines().all(|line| line.starts_with("{\"unix_ms\":")), "{json}");
        Ok(())
    })?;
    check("a pod that is removed is gone from both", || {
        testbed.netctl(&["rm", "mill"])?.success()?;
        wait_for(SOON, "there is no pod", || match testbed.pods("") {
            Ok(pods) if pods.is_empty() => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        let said = testbed.netctl(&["why", &pod])?.success()?;
        ensure!(said.starts_with(&format!("{pod} is gone: ")), "{said}");
        ensure!(said.contains("by user:root") && said.contains("job mill is deleted"), "{said}");
        let said = testbed.netctl(&["why", "mill-a-zzzzz"])?.failed_with(1)?;
        ensure!(said.contains("there never was a pod `mill-a-zzzzz`"), "{said}");
        let said = testbed.netctl(&["events", "--pod", &pod])?.success()?;
        ensure!(said.contains("pod-gone"), "{said}");
        Ok(())
    })
}
