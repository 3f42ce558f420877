//! From `netctl apply` to the first reply from a pod, and how long a job with 100 pods takes.

use std::{
    io::ErrorKind,
    net::{Ipv6Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hextet_tests::{Pod, wait_until};

use crate::{
    Bench, footprint,
    report::{Better, Metric},
    say,
};

/// A job whose pods serve HTTP, as a user has it.
const HUNDRED: &str = include_str!("../../../../examples/hello-100.yaml");
const HUNDRED_JOB: &str = "hello";
const HUNDRED_PODS: usize = 100;
/// Where the pods of both jobs serve.
const HTTP: u16 = 8080;

const ONE_JOB: &str = "first";
const ONE: &str = "job: first
groups:
  web:
    count: 1
    tasks:
      server:
        exec: [/bin/sh, -c, \"exec busybox httpd -f -p '[::]:8080' -h .\"]
";

const TABLE: &str = "from `netctl apply` on";
const STORED: Metric = Metric { table: TABLE, name: "apply returns", unit: "ms", better: Better::Less };
const REACHED: Metric =
    Metric { table: TABLE, name: "the pod's kernel replies", unit: "ms", better: Better::Less };
const SERVED: Metric =
    Metric { table: TABLE, name: "the pod's program accepts", unit: "ms", better: Better::Less };
const ALL: Metric = Metric { table: TABLE, name: "every pod accepts", unit: "ms", better: Better::Less };
const GONE: Metric =
    Metric { table: TABLE, name: "rm until no pod is left", unit: "ms", better: Better::Less };
const CROWDED: &str = "idle with 100 pods";
const MEMORY: Metric = Metric { table: CROWDED, name: "resident memory", unit: "MiB", better: Better::Less };
const PROCESSOR: Metric = Metric { table: CROWDED, name: "processor", unit: "%", better: Better::Less };

/// One pod, again and again; then a hundred.
pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    for round in 1..=bench.rounds {
        say(&format!("one pod: round {round} of {}", bench.rounds));
        one_pod(bench)?;
    }
    for round in 1..=bench.rounds {
        say(&format!("100 pods: round {round} of {}", bench.rounds));
        hundred_pods(bench)?;
        if round == 1 {
            footprint::watch(bench, MEMORY, PROCESSOR)?;
        }
        let took = remove(bench, HUNDRED_JOB)?;
        bench.report.add(GONE, "100 pods", took);
    }
    Ok(())
}

fn one_pod(bench: &mut Bench) -> Result<()> {
    let start = Instant::now();
    bench.cluster.apply(ONE)?;
    bench.report.add(STORED, "one pod", milliseconds(start));
    let pod = first_address(bench, start)?;
    let reached = until(bench, pod, start, |answer| answer != Answer::None)?;
    bench.report.add(REACHED, "one pod", reached);
    let served = until(bench, pod, start, |answer| answer == Answer::Accepted)?;
    bench.report.add(SERVED, "one pod", served);
    let took = remove(bench, ONE_JOB)?;
    bench.report.add(GONE, "one pod", took);
    Ok(())
}

fn hundred_pods(bench: &mut Bench) -> Result<()> {
    let start = Instant::now();
    bench.cluster.apply(HUNDRED)?;
    bench.report.add(STORED, "100 pods", milliseconds(start));
    let mut waiting = addresses(bench, HUNDRED_JOB, HUNDRED_PODS, start)?;
    let client = bench.cluster.netns("client");
    client.run(|| -> Result<()> {
        while !waiting.is_empty() {
            check_patience(start)?;
            waiting.retain(|pod| ask(*pod) != Answer::Accepted);
        }
        Ok(())
    })??;
    bench.report.add(ALL, "100 pods", milliseconds(start));
    Ok(())
}

/// What a LAN host hears when it opens a connection to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// Nothing, or that there is no such host.
    None,
    /// The pod's kernel says that nothing listens.
    Refused,
    /// The program is there.
    Accepted,
}

fn ask(pod: Ipv6Addr) -> Answer {
    match TcpStream::connect_timeout(&SocketAddr::new(pod.into(), HTTP), Duration::from_millis(20)) {
        Ok(_) => Answer::Accepted,
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Answer::Refused,
        Err(_) => Answer::None,
    }
}

/// Milliseconds since `start` when the LAN host hears what is wanted.
fn until(bench: &Bench, pod: Ipv6Addr, start: Instant, wanted: fn(Answer) -> bool) -> Result<f64> {
    bench.cluster.netns("client").run(|| {
        while !wanted(ask(pod)) {
            check_patience(start)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(milliseconds(start))
    })?
}

fn first_address(bench: &Bench, start: Instant) -> Result<Ipv6Addr> {
    let all = addresses(bench, ONE_JOB, 1, start)?;
    all.first().copied().context("the pod has no address")
}

/// The addresses of the job's pods as soon as all have one. The server draws them when it places a pod.
fn addresses(bench: &Bench, job: &str, count: usize, start: Instant) -> Result<Vec<Ipv6Addr>> {
    loop {
        let pods = bench.cluster.pods(job)?;
        let known: Vec<Ipv6Addr> =
            pods.iter().filter(|pod| is_new(pod)).filter_map(|pod| pod.address).collect();
        if known.len() >= count {
            return Ok(known);
        }
        check_patience(start)?;
    }
}

/// Not one that an earlier round left behind.
fn is_new(pod: &Pod) -> bool {
    pod.phase != "terminating" && pod.phase != "stopped"
}

fn remove(bench: &Bench, job: &str) -> Result<f64> {
    let start = Instant::now();
    bench.cluster.netctl(&["rm", job])?.success()?;
    wait_until(Duration::from_secs(60), &format!("no pod of {job} is left"), || {
        bench.cluster.pods(job).is_ok_and(|pods| pods.is_empty())
    })?;
    Ok(milliseconds(start))
}

fn check_patience(start: Instant) -> Result<()> {
    if start.elapsed() > Duration::from_secs(120) {
        bail!("no answer two minutes after `netctl apply`");
    }
    Ok(())
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
