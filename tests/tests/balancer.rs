//! The nginx example on the router: it follows the number of pods, serves on while the server or its own
//! program is away, and no request fails meanwhile.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hextet_tests::balancer::Balancer;
use hextet_tests::probe::{all_greet, request};
use hextet_tests::progress::write_now;
use hextet_tests::scenario::{BUSYBOX, CURL, NGINX, Needs, check, scenario};
use hextet_tests::{Options, Pod, Testbed, jobs, wait_until};

const NEEDS: Needs = Needs { programs: &[CURL, BUSYBOX, NGINX] };
const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_balancer_follows_the_pods() {
    scenario("a_balancer_follows_the_pods", NEEDS, Options::default(), run);
}

fn run(testbed: &Testbed) -> Result<()> {
    testbed.apply(jobs::HELLO)?;
    let three = testbed.wait_running("hello", 3, SOON)?;
    all_greet(&testbed.netns("client"), &three, SOON)?;
    let balancer = Balancer::new(testbed);
    check("it serves all three pods", || {
        balancer.join()?;
        balancer.wait_pods(&names(&three), SOON)?;
        Ok(())
    })?;
    check("it follows while clients ask, and no request fails", || {
        balancer.under_load(|| [5, 2, 4].into_iter().try_for_each(|count| follow(testbed, &balancer, count)))
    })?;
    check("it serves while the server is dead, and resumes", || {
        let pods = testbed.wait_running("hello", 4, SOON)?;
        balancer.under_load(|| {
            testbed.server().kill9()?;
            // The load takes turns with these requests: one look may meet every other pod only.
            balancer.wait_pods(&names(&pods), SOON).context("the same pods are served")?;
            testbed.server().start()
        })?;
        follow(testbed, &balancer, 3)
    })?;
    check("nginx serves while its program is dead, and the program resumes", || {
        balancer.daemon().kill9()?;
        let pods = testbed.wait_running("hello", 3, SOON)?;
        balancer.wait_pods(&names(&pods), SOON).context("the same pods are served")?;
        balancer.start()?;
        follow(testbed, &balancer, 5)
    })?;
    check("without pods it says so", || {
        testbed.netctl(&["rm", "hello"])?.success()?;
        let to = balancer.address();
        let ask = || testbed.netns("client").run(|| request(to, Duration::from_secs(3)));
        wait_until(
            SOON,
            "the balancer answers 503",
            || matches!(ask(), Ok(Err(e)) if e.to_string().contains("503")),
        )?;
        Ok(())
    })
}

fn names(pods: &[Pod]) -> BTreeSet<String> {
    pods.iter().map(|pod| pod.id.clone()).collect()
}

/// Changes the count and waits until the balancer serves exactly those pods; says how long that took.
fn follow(testbed: &Testbed, balancer: &Balancer, count: u32) -> Result<()> {
    testbed.apply(&jobs::hello(count))?;
    let applied = Instant::now();
    let took = balancer.wait_count(count as usize, applied, SOON)?;
    let pods = testbed.wait_running("hello", count as usize, SOON)?;
    balancer.wait_pods(&names(&pods), SOON)?;
    write_now(&format!("       {count} pods served {:.2} s after apply\n", took.as_secs_f64()));
    Ok(())
}
