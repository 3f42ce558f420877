//! Neighbour discovery for pods: how many solicitations a node answers, and how soon, with 10, 1,000 and
//! 100,000 addresses. Hextet's BPF program against the kernel's `proxy_ndp` and Debian's `ndppd`.
//!
//! 100,000 real pods do not fit on the machine. The addresses are put into the table that the program reads:
//! copies of a real pod's entry, written into the pinned map with bpftool while the agent is stopped, so that
//! it does not take them out again. The kernel gets the same addresses by `ip neigh add proxy`, and `ndppd`,
//! on another node, as many others, each as a rule of its configuration.

use std::{
    net::Ipv6Addr,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hextet_tests::{
    Testbed,
    command::{Run, ip_batch},
    frame::{Frame, Mac, NEIGHBOR_ADVERTISEMENT, mac_of},
    machine,
    netns::NetNs,
    topology::Place,
    wait_until,
};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::{TimeVal, TimeValLike},
};

use crate::{
    Bench,
    batch::{Receiver, Sender, packet_socket},
    report::{Better, Metric, OURS, median, percentile},
    run_time, say,
    traffic::{Server, enlarge},
};

const MANY: usize = 100_000;
/// Solicitations of one sample of latency.
const PROBES: usize = 1000;
/// How many of them may go unanswered.
const LOST_MAX: usize = PROBES / 10;
/// Lines of one bpftool batch: the largest one is read whole.
const BPFTOOL_BATCH: usize = 2000;

/// How long the kernel may take to learn all addresses (scaled): it looks through a list for each.
const KERNEL_LIMIT: Duration = Duration::from_secs(120);

const TABLE: &str = "neighbour discovery";
const RUN_TIME: &str = "run time of a program, ns a solicitation";
const PROXY_NDP: &str = "proxy_ndp";
const NDPPD: &str = "ndppd";
/// Where `ndppd` runs.
const NDPPD_NODE: u8 = 3;

/// A number of addresses and the rows it fills.
struct Size {
    count: usize,
    rate: Metric,
    p50: Metric,
    p99: Metric,
    run_time: Metric,
}

const SIZES: [Size; 3] = [
    Size {
        count: 10,
        rate: metric("answers, 10 addresses", "1/s", Better::More),
        p50: metric("answer, 10 addresses, median", "us", Better::Less),
        p99: metric("answer, 10 addresses, 99 %", "us", Better::Less),
        run_time: run_time("10 addresses"),
    },
    Size {
        count: 1_000,
        rate: metric("answers, 1,000 addresses", "1/s", Better::More),
        p50: metric("answer, 1,000 addresses, median", "us", Better::Less),
        p99: metric("answer, 1,000 addresses, 99 %", "us", Better::Less),
        run_time: run_time("1,000 addresses"),
    },
    Size {
        count: MANY,
        rate: metric("answers, 100,000 addresses", "1/s", Better::More),
        p50: metric("answer, 100,000 addresses, median", "us", Better::Less),
        p99: metric("answer, 100,000 addresses, 99 %", "us", Better::Less),
        run_time: run_time("100,000 addresses"),
    },
];

const fn metric(name: &'static str, unit: &'static str, better: Better) -> Metric {
    Metric { table: TABLE, name, unit, better }
}

const fn run_time(name: &'static str) -> Metric {
    Metric { table: RUN_TIME, name, unit: "ns", better: Better::Less }
}

/// Measures all ways at all sizes.
pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    let pods = crate::pods::pods(bench)?;
    let pod = pods.iter().find(|pod| pod.node == "n1").context("no pod on n1")?.address();
    bench.report.note(format!(
        "neighbour discovery: {MANY} addresses are one real pod's and copies of its entry in the pinned map, \
         written with bpftool while the agent is stopped"
    ));
    // The rest of the cluster goes on without it.
    bench.cluster.agent("n1").kill9()?;
    let measured = rounds(bench, pod);
    bench.cluster.agent("n1").start_until_ready()?;
    measured?;
    for size in &SIZES[1..] {
        bench.report.compare(size.rate, SIZES[0].rate);
        bench.report.compare(size.p50, SIZES[0].p50);
    }
    Ok(())
}

/// All sizes in every round: the machine is not the same a minute later.
fn rounds(bench: &mut Bench, pod: Ipv6Addr) -> Result<()> {
    let all = addresses(pod, MANY);
    let mut daemon = Daemon::new(bench, pod)?;
    let mut there = 0;
    for (round, size) in (1..=bench.rounds).flat_map(|round| SIZES.iter().map(move |size| (round, size))) {
        say(&format!("{TABLE}, {} addresses: round {round} of {}", size.count, bench.rounds));
        let (few, many) = (there.min(size.count), there.max(size.count));
        let grows = size.count > there;
        // The first is the real pod's own, which stays.
        change_table(&bench.cluster, pod, &all[few.max(1)..many.max(1)], grows)?;
        change_kernel(&bench.by_hand.testbed, &all[few..many], grows)?;
        there = size.count;
        let asked = &all[..size.count];
        let ours = Asker::new(&bench.cluster, asked).context("asking Hextet")?;
        sample(bench, size, OURS, &ours)?;
        let kernel = Asker::new(&bench.by_hand.testbed, asked).context("asking the kernel")?;
        sample(bench, size, PROXY_NDP, &kernel)?;
        daemon.sample(bench, size);
        if round == bench.rounds {
            let times = run_time::during(&bench.cluster, "n1", || ours.flood(bench.span))?;
            times.into_iter().for_each(|(program, ns)| bench.report.add(size.run_time, program, ns));
        }
    }
    Ok(())
}

fn sample(bench: &mut Bench, size: &Size, variant: &'static str, asker: &Asker) -> Result<()> {
    let rate = asker.flood(bench.span).with_context(|| format!("asking {variant} many times"))?;
    bench.report.add(size.rate, variant, rate);
    let times = asker.probe().with_context(|| format!("asking {variant} once"))?;
    bench.report.add(size.p50, variant, median(&times).context("no answer")?);
    bench.report.add(size.p99, variant, percentile(&times, 99.0).context("no answer")?);
    Ok(())
}

/// `ndppd` on a node of its own, which answers for addresses of a group of its own.
struct Daemon {
    node: NetNs,
    addresses: Vec<Ipv6Addr>,
    config: PathBuf,
    /// So many it could not answer for.
    too_many: usize,
}

impl Daemon {
    fn new(bench: &Bench, pod: Ipv6Addr) -> Result<Self> {
        let testbed = &bench.by_hand.testbed;
        let addresses = addresses(Ipv6Addr::from_bits(pod.to_bits() ^ 1), MANY);
        let node = bench.by_hand.node(NDPPD_NODE);
        // It hears what the switch lets through: the group of its addresses is the node's, too.
        let member = Ipv6Addr::from_bits((0xfdbf << 112) | (addresses[0].to_bits() & 0xff_ffff));
        ip_batch(Some(&node), &[format!("addr replace {member}/128 dev eth0 nodad")])?;
        let config = machine::dir(testbed.prefix()).join("ndppd.conf");
        Ok(Self { node, addresses, config, too_many: usize::MAX })
    }

    /// It is not ours: what it cannot do is noted, once, and the others go on.
    fn sample(&mut self, bench: &mut Bench, size: &Size) {
        if size.count >= self.too_many {
            return;
        }
        if let Err(error) = self.try_sample(bench, size) {
            bench.report.note(format!("{NDPPD} with {} addresses: {error:#}", size.count));
            self.too_many = size.count;
        }
    }

    fn try_sample(&self, bench: &mut Bench, size: &Size) -> Result<()> {
        let addresses = &self.addresses[..size.count];
        let rules = addresses.iter().map(|address| format!("  rule {address}/128 {{ static }}\n"));
        let text = format!("proxy eth0 {{\n  router yes\n{}}}\n", rules.collect::<String>());
        std::fs::write(&self.config, text).context("cannot write its configuration")?;
        let mut command = Command::new(NDPPD);
        command.arg("-c").arg(&self.config);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let _daemon = Server(self.node.spawn(&mut command)?);
        let asker = Asker::new(&bench.by_hand.testbed, addresses)?;
        sample(bench, size, NDPPD, &asker)
    }
}

/// Addresses of the same /64 that share their low 24 bits, as all pods of a node do; the pod's own is first.
fn addresses(pod: Ipv6Addr, count: usize) -> Vec<Ipv6Addr> {
    let step = 1_u128 << 24;
    (0..count as u128).map(|number| Ipv6Addr::from_bits(pod.to_bits() ^ (number * step))).collect()
}

/// A LAN host that asks for addresses.
struct Asker {
    netns: NetNs,
    frames: Vec<Vec<u8>>,
}

impl Asker {
    fn new(testbed: &Testbed, addresses: &[Ipv6Addr]) -> Result<Self> {
        let netns = testbed.netns("client");
        let own: Mac = mac_of(&netns, "eth0")?;
        let source = Place::Client.addresses().expect("the client has addresses").v6;
        let frames =
            addresses.iter().map(|target| Frame::solicitation(own, source, *target).bytes()).collect();
        let asker = Self { netns, frames };
        asker.wait_for_answer()?;
        Ok(asker)
    }

    /// The switch learns by MLD who listens to the group.
    fn wait_for_answer(&self) -> Result<()> {
        let socket = self.socket()?;
        wait_until(Duration::from_secs(10), "the first and the last address are answered for", || {
            [self.frames.first(), self.frames.last()]
                .into_iter()
                .flatten()
                .all(|frame| ask(&socket, frame).is_some())
        })?;
        Ok(())
    }

    fn socket(&self) -> Result<OwnedFd> {
        self.netns.run(|| -> Result<OwnedFd> {
            let socket = packet_socket("eth0").context("cannot open a packet socket")?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(100))?;
            enlarge(&socket, 64 << 20)?;
            Ok(socket)
        })?
    }

    /// Answers per second when one thread asks as fast as it can, for all addresses in turn.
    fn flood(&self, span: Duration) -> Result<f64> {
        let (socket, done) = (self.socket()?, AtomicBool::new(false));
        // As many frames for few addresses as for many: the sender's own memory costs time, too.
        let frames = self.frames.iter().cycle().take(MANY).cloned().collect();
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut sender = Sender::new(frames);
                while !done.load(Ordering::Relaxed) {
                    // A full queue: what is answered is what counts.
                    sender.send(socket.as_fd()).ok();
                }
            });
            let rate = count_answers(&socket, span);
            done.store(true, Ordering::SeqCst);
            rate
        })
    }

    /// Microseconds from a solicitation to its answer, one at a time.
    fn probe(&self) -> Result<Vec<f64>> {
        let socket = self.socket()?;
        // A step that has no divisor in common with their number visits all of them.
        let order = (0..PROBES).map(|number| &self.frames[number * 7919 % self.frames.len()]);
        let (mut times, mut lost) = (Vec::new(), 0);
        for frame in order {
            match ask(&socket, frame) {
                Some(time) => times.push(time),
                None => lost += 1,
            }
            if lost > LOST_MAX {
                bail!("{lost} of {} solicitations were not answered", times.len() + lost);
            }
        }
        Ok(times)
    }
}

/// Asks once and waits for the answer: microseconds, or nothing.
fn ask(socket: &OwnedFd, frame: &[u8]) -> Option<f64> {
    let mut sender = Sender::new(vec![frame.to_vec()]);
    let mut receiver = Receiver::new();
    let start = Instant::now();
    sender.send(socket.as_fd()).ok()?;
    while start.elapsed() < Duration::from_millis(100) {
        let mut answers = receiver.receive(socket.as_fd()).ok()?;
        if answers.any(is_advertisement) {
            return Some(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    None
}

fn count_answers(socket: &OwnedFd, span: Duration) -> Result<f64> {
    let mut receiver = Receiver::new();
    let start = Instant::now();
    let mut answers = 0;
    while start.elapsed() < span {
        // The limit of the socket passes when nobody answers.
        if let Ok(batch) = receiver.receive(socket.as_fd()) {
            answers += batch.filter(|frame| is_advertisement(frame)).count();
        }
    }
    if answers == 0 {
        bail!("not one answer came");
    }
    Ok(answers as f64 / start.elapsed().as_secs_f64())
}

/// An Ethernet frame with an IPv6 header and a Neighbor Advertisement right behind it.
fn is_advertisement(frame: &[u8]) -> bool {
    frame.get(14 + 40) == Some(&NEIGHBOR_ADVERTISEMENT)
}

/// Makes the kernel answer for the addresses, or no longer.
fn change_kernel(testbed: &Testbed, addresses: &[Ipv6Addr], answer: bool) -> Result<()> {
    let n1 = testbed.netns("n1");
    n1.set_sysctls(&[
        ("net/ipv6/conf/eth0/forwarding".to_owned(), "1"),
        ("net/ipv6/conf/all/proxy_ndp".to_owned(), "1"),
        ("net/ipv6/conf/eth0/proxy_ndp".to_owned(), "1"),
        // Answers at once; by default it waits up to 0.8 s.
        ("net/ipv6/neigh/eth0/proxy_delay".to_owned(), "0"),
    ])?;
    let verb = if answer { "replace" } else { "del" };
    let lines: Vec<String> =
        addresses.iter().map(|address| format!("neigh {verb} proxy {address} dev eth0")).collect();
    let run = Run::new(&["ip", "-batch", "-"]).limit(KERNEL_LIMIT).inside(&n1);
    run.stdin(lines.join("\n") + "\n").success()?;
    Ok(())
}

/// Puts copies of the pod's entry under other addresses into the table of the BPF program, or takes them out.
fn change_table(testbed: &Testbed, pod: Ipv6Addr, addresses: &[Ipv6Addr], answer: bool) -> Result<()> {
    let map = table(testbed)?;
    let entry = bpftool(&["map", "lookup", "pinned", &map, "key", "hex"], &hex(&pod.octets()))?;
    let value: serde_json::Value = serde_json::from_str(&entry).context("bpftool printed no JSON")?;
    let value: Vec<&str> =
        value["value"].as_array().into_iter().flatten().filter_map(|byte| byte.as_str()).collect();
    let value = value.iter().map(|byte| byte.trim_start_matches("0x")).collect::<Vec<_>>().join(" ");
    if value.is_empty() {
        bail!("the pod {pod} has no entry in {map}");
    }
    for part in addresses.chunks(BPFTOOL_BATCH) {
        let key = |address: &Ipv6Addr| hex(&address.octets()).join(" ");
        let line = |address| match answer {
            true => format!("map update pinned {map} key hex {} value hex {value}\n", key(address)),
            false => format!("map delete pinned {map} key hex {}\n", key(address)),
        };
        let lines = part.iter().map(line);
        Run::new(&["bpftool", "batch", "file", "-"]).stdin(lines.collect::<String>()).success()?;
    }
    Ok(())
}

fn bpftool(words: &[&str], key: &[String]) -> Result<String> {
    let line: Vec<&str> = ["bpftool", "-j"]
        .into_iter()
        .chain(words.iter().copied())
        .chain(key.iter().map(String::as_str))
        .collect();
    Run::new(&line).success()
}

fn hex(bytes: &[u8]) -> Vec<String> {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The pin of the table of addresses that `n1` answers for.
fn table(testbed: &Testbed) -> Result<String> {
    Ok(run_time::layout(testbed, "n1")?.join(NDP_TABLE).to_string_lossy().into_owned())
}

/// The name of that table's pin.
const NDP_TABLE: &str = "NDP_PODS";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_distinct_and_share_the_low_bits() {
        let pod: Ipv6Addr = "fd00:1:2:3:4567:89ab:cdef:1234".parse().unwrap();
        let all = addresses(pod, MANY);
        assert_eq!(all[0], pod);
        assert!(all.iter().all(|address| address.to_bits() & 0xff_ffff == pod.to_bits() & 0xff_ffff));
        assert!(all.iter().all(|address| address.segments()[..4] == pod.segments()[..4]));
        let mut distinct = all.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), MANY);
    }
}
