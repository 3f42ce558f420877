//! From `netctl apply` to the first reply from a pod, and how long a job with 100 pods takes.

use std::{
    io::ErrorKind,
    net::{Ipv6Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hextet_tests::{Pod, netns::NetNs, wait_until};

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
const STORED: Metric = metric("apply returns");
const BY_NODE: Heard = Heard {
    kernel: metric("another node hears the pod's kernel"),
    program: metric("another node reaches its program"),
};
const BY_LAN: Heard = Heard {
    kernel: metric("a LAN host hears the pod's kernel"),
    program: metric("a LAN host reaches its program"),
};
const ALL: Metric = metric("a LAN host reaches every program");
const GONE: Metric = metric("rm until no pod is left");

/// The rows of one place from which a pod is asked.
struct Heard {
    /// The first answer, a refused connection included.
    kernel: Metric,
    /// The first open connection.
    program: Metric,
}

const fn metric(name: &'static str) -> Metric {
    Metric { table: TABLE, name, unit: "ms", better: Better::Less }
}

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
    let pod = first_pod(bench, start)?;
    let address = pod.address();
    let node = if pod.node == "n1" { "n2" } else { "n1" };
    let places = [(BY_NODE, bench.cluster.netns(node)), (BY_LAN, bench.cluster.netns("client"))];
    // At the same time: a LAN host that asks before anybody can answer asks again only after a second.
    let heard = thread::scope(|scope| -> Result<Vec<_>> {
        let asked = places.map(|(rows, place)| (rows, scope.spawn(move || listen(&place, address, start))));
        let finish = |(rows, asked): (Heard, thread::ScopedJoinHandle<'_, Result<_>>)| {
            Ok((rows, asked.join().map_err(|_| anyhow::anyhow!("a thread that asks panicked"))??))
        };
        asked.into_iter().map(finish).collect()
    })?;
    for (rows, (kernel, program)) in heard {
        bench.report.add(rows.kernel, "one pod", kernel);
        bench.report.add(rows.program, "one pod", program);
    }
    let took = remove(bench, ONE_JOB)?;
    bench.report.add(GONE, "one pod", took);
    Ok(())
}

fn hundred_pods(bench: &mut Bench) -> Result<()> {
    let start = Instant::now();
    bench.cluster.apply(HUNDRED)?;
    bench.report.add(STORED, "100 pods", milliseconds(start));
    let pods = placed(bench, HUNDRED_JOB, HUNDRED_PODS, start)?;
    let mut waiting: Vec<Ipv6Addr> = pods.iter().map(Pod::address).collect();
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

/// Milliseconds since `start` when a pod's kernel, and its program, are first heard in `place`.
fn listen(place: &NetNs, pod: Ipv6Addr, start: Instant) -> Result<(f64, f64)> {
    let until = |wanted: fn(Answer) -> bool| -> Result<f64> {
        while !wanted(ask(pod)) {
            check_patience(start)?;
            thread::sleep(Duration::from_millis(1));
        }
        Ok(milliseconds(start))
    };
    place
        .run(|| Ok((until(|answer| answer != Answer::None)?, until(|answer| answer == Answer::Accepted)?)))?
}

fn first_pod(bench: &Bench, start: Instant) -> Result<Pod> {
    let all = placed(bench, ONE_JOB, 1, start)?;
    all.into_iter().next().context("the pod has no address")
}

/// The job's pods as soon as all have an address. The server draws it when it places a pod.
fn placed(bench: &Bench, job: &str, count: usize, start: Instant) -> Result<Vec<Pod>> {
    loop {
        let mut pods = bench.cluster.pods(job)?;
        pods.retain(|pod| is_new(pod) && pod.address.is_some());
        if pods.len() >= count {
            return Ok(pods);
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
