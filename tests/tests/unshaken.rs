//! The traffic does not know that the agent exists: while agents are killed and started again, no packet is
//! lost and no flow breaks.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use hextet_tests::command::Run;
use hextet_tests::netns::NetNs;
use hextet_tests::probe::{Pings, all_greet, ping};
use hextet_tests::process::Daemon;
use hextet_tests::progress::Progress;
use hextet_tests::scenario::{BUSYBOX, CURL, IPERF, Needs, PING, check, scenario};
use hextet_tests::wait::time_scale;
use hextet_tests::{Options, Testbed, jobs, wait_until};
use serde_json::Value;

const NEEDS: Needs = Needs { programs: &[CURL, PING, IPERF, BUSYBOX] };
const WAN: &str = "198.51.100.2";
/// How long the flows run, in seconds: longer than all agents need to be killed and ready again.
const FLOW_S: u32 = 8;
const PING_INTERVAL: Duration = Duration::from_millis(10);

#[test]
fn agents_die_and_no_packet_is_lost() {
    scenario("agents_die_and_no_packet_is_lost", NEEDS, Options::default(), run);
}

fn run(testbed: &Testbed) -> Result<()> {
    testbed.apply(jobs::HELLO)?;
    let mut pods = testbed.wait_running("hello", 3, Duration::from_secs(20))?;
    pods.sort_by(|a, b| a.node.cmp(&b.node));
    let client = testbed.netns("client");
    all_greet(&client, &pods, Duration::from_secs(10))?;
    let (one, three) = (testbed.netns(&pods[0].id), testbed.netns(&pods[2].id));
    iperf_server(testbed, "iperf-pod", &three)?;
    iperf_server(testbed, "iperf-wan", &testbed.netns("wan"))?;
    let seconds = (f64::from(FLOW_S) * time_scale()) as u32;
    let to_pod = Flow { from: one.clone(), to: pods[2].address().into(), seconds };
    let to_wan = Flow { from: one.clone(), to: WAN.parse()?, seconds };
    check("pings and flows, with every agent killed and started and the testbed up again", || {
        std::thread::scope(|scope| {
            let flows = [scope.spawn(|| to_pod.ping()), scope.spawn(|| from_lan(&client, &to_pod).ping())];
            let streams = [scope.spawn(|| to_pod.stream()), scope.spawn(|| to_wan.stream())];
            let agents = kill_and_start_agents(testbed);
            for flow in flows {
                no_loss(flow.join().map_err(|_| anyhow!("a ping panicked"))??)?;
            }
            for stream in streams {
                stream.join().map_err(|_| anyhow!("a flow panicked"))??;
            }
            agents
        })
    })?;
    check("each pod still answers", || all_greet(&client, &pods, Duration::from_secs(5)))
}

/// Traffic for a while.
struct Flow {
    from: NetNs,
    to: IpAddr,
    seconds: u32,
}

fn from_lan(client: &NetNs, flow: &Flow) -> Flow {
    Flow { from: client.clone(), ..*flow }
}

impl Flow {
    fn ping(&self) -> Result<Pings> {
        let per_second = (1.0 / PING_INTERVAL.as_secs_f64()) as u32;
        ping(&self.from, self.to, self.seconds * per_second, PING_INTERVAL)
    }

    /// One TCP connection; every second of it must have moved data.
    fn stream(&self) -> Result<()> {
        let (to, seconds) = (self.to.to_string(), self.seconds.to_string());
        let args = ["iperf3", "-J", "-c", &to, "-t", &seconds, "-b", "200M"];
        let limit = Duration::from_secs(u64::from(self.seconds) + 20);
        let output = Run::new(&args).inside(&self.from).limit(limit).output()?;
        let report: Value = serde_json::from_str(&output.stdout).with_context(|| output.to_string())?;
        ensure!(output.ok(), "iperf3 to {to}: {}", report["error"]);
        let intervals = report["intervals"].as_array().context("iperf3 reports intervals")?;
        let silent = intervals.iter().filter(|i| i["sum"]["bytes"].as_f64() == Some(0.0)).count();
        ensure!(intervals.len() + 1 >= self.seconds as usize, "iperf3 to {to} ended after {intervals:?}");
        ensure!(silent == 0, "{silent} of {} seconds moved nothing to {to}", intervals.len());
        Ok(())
    }
}

fn no_loss(pings: Pings) -> Result<()> {
    ensure!(pings.sent > 0 && pings.received == pings.sent, "packets were lost: {pings:?}");
    Ok(())
}

fn kill_and_start_agents(testbed: &Testbed) -> Result<()> {
    for node in testbed.nodes() {
        let agent = testbed.agent(&node);
        agent.kill9()?;
        agent.start_until_ready()?;
    }
    // A second `up` must not touch what runs.
    Testbed::up(testbed.prefix().clone(), testbed.options().clone(), Progress::Quiet).map(drop)
}

fn iperf_server(testbed: &Testbed, name: &str, place: &NetNs) -> Result<()> {
    let server = Daemon::new(name, place.clone(), testbed.dir());
    let mut command = std::process::Command::new("iperf3");
    command.args(["-s", "--forceflush"]);
    server.start(command)?;
    wait_until(Duration::from_secs(5), "iperf3 listens", || server.log().contains("listening"))?;
    Ok(())
}
