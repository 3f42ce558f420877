//! A hundred pods on three nodes: all answer soon after `apply`. Only a generous deadline is asserted; the
//! time is printed.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hextet_tests::probe::{HELLO_PORT, request};
use hextet_tests::progress::write_now;
use hextet_tests::scenario::{BUSYBOX, Needs, check, scenario};
use hextet_tests::wait::wait_for;
use hextet_tests::{Options, Testbed, jobs, scaled, wait_until};

const NEEDS: Needs = Needs { programs: &[BUSYBOX] };
const COUNT: usize = 100;

#[test]
fn a_hundred_pods_answer() {
    scenario("a_hundred_pods_answer", NEEDS, Options::default(), run);
}

fn run(testbed: &Testbed) -> Result<()> {
    let start = Instant::now();
    testbed.apply(jobs::HELLO_100)?;
    let pods = check("a hundred pods run", || testbed.wait_running("hello", COUNT, Duration::from_secs(60)))?;
    let addresses: std::collections::BTreeSet<_> = pods.iter().map(|pod| pod.address()).collect();
    ensure!(addresses.len() == COUNT, "no address is given twice");
    check("each answers a LAN host with its own name", || {
        testbed.netns("client").run(|| {
            pods.iter().try_for_each(|pod| {
                let to = SocketAddr::from((pod.address(), HELLO_PORT));
                let wanted = format!("hello from {} ", pod.id);
                wait_for(Duration::from_secs(30), &format!("{} answers", pod.id), || {
                    match request(to, scaled(Duration::from_secs(2))) {
                        Ok(body) if body.starts_with(&wanted) => Ok(()),
                        other => Err(format!("{other:?}")),
                    }
                })
                .map(drop)
            })
        })?
    })?;
    write_now(&format!("       {COUNT} pods answer {:.1} s after apply\n", start.elapsed().as_secs_f64()));
    check("and go again", || {
        testbed.netctl(&["rm", "hello"])?.success()?;
        wait_until(Duration::from_secs(60), "there are no pods", || {
            testbed.pods("").is_ok_and(|pods| pods.is_empty())
        })?;
        for node in testbed.nodes() {
            let links = testbed.run_in(&node, &["ip", "-br", "link", "show", "type", "veth"]).success()?;
            ensure!(links.lines().count() == 1, "{node} has only its uplink: {links}");
        }
        Ok(())
    })
}
