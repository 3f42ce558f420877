//! `bench`: measures Hextet side by side with the same paths made by hand, in one run. `cargo xtask bench`
//! builds it for release and starts it; `docs/benchmarks.md` says how each number comes about.
//!
//! Two testbeds of the same shape are up at the same time: one with a cluster, one without, on which pods,
//! masquerade and NDP proxy are made with `ip`, `nft` and the kernel alone. Rounds alternate between them,
//! so that whatever else the machine does meets both. There are no thresholds: a number is not a test.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use hextet_tests::{
    Options, Testbed,
    command::Run,
    interrupt,
    progress::{Progress, write_now},
    testbed::down,
    topology::Prefix,
};

mod batch;
mod by_hand;
mod flows;
mod footprint;
mod lifecycle;
mod masquerade;
mod ndp;
mod pods;
mod report;
mod run_time;
mod traffic;
mod verifier;

use by_hand::ByHand;
use report::Report;

/// The testbed with the cluster.
const CLUSTER: &str = "hxb";
/// The testbed on which everything is made by hand.
const REFERENCE: &str = "hxr";

/// Measures Hextet side by side with paths made by hand
#[derive(Parser)]
#[command(name = "bench", bin_name = "cargo xtask bench")]
struct Cli {
    /// Groups that belong together; all when there is none
    set: Option<Set>,
    /// How many times each measurement is repeated; medians are shown
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long one measurement of a rate takes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// Only this group; may be given again
    #[arg(long)]
    only: Vec<Group>,
    /// Where the raw numbers go
    #[arg(long, default_value = "target/bench")]
    results: PathBuf,
}

/// Groups that are wanted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Set {
    /// What packets and the verifier meet: pods, ndp, masquerade, verifier
    Dataplane,
}

impl Set {
    fn groups(self) -> &'static [Group] {
        match self {
            Self::Dataplane => &[Group::Pods, Group::Ndp, Group::Masquerade, Group::Verifier],
        }
    }
}

/// Measurements that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Pod to pod across nodes
    Pods,
    /// From a pod to an IPv4 host, with few and many flows
    Masquerade,
    /// Neighbour discovery for pods
    Ndp,
    /// From `apply` to the first reply, and 100 pods
    Lifecycle,
    /// Memory and idle processor time
    Footprint,
    /// Time and instructions of the kernel's verifier
    Verifier,
}

/// Adds the numbers of one group to the report.
type Measure = fn(&mut Bench) -> Result<()>;

/// What all measurements share.
struct Bench {
    /// With the cluster.
    cluster: Testbed,
    /// Made by hand.
    by_hand: ByHand,
    rounds: u32,
    span: Duration,
    report: Report,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Takes the testbeds down whatever happens, Ctrl-C included.
fn run(cli: &Cli) -> Result<()> {
    interrupt::catch()?;
    let measured = measure(cli);
    interrupt::ignore()?;
    for failure in take_down()? {
        eprintln!("error: {failure:#}");
    }
    measured
}

/// Takes both testbeds down; what could not be removed.
fn take_down() -> Result<Vec<anyhow::Error>> {
    Ok([Prefix::new(CLUSTER)?, Prefix::new(REFERENCE)?].iter().flat_map(down).collect())
}

fn measure(cli: &Cli) -> Result<()> {
    let started = Instant::now();
    let mut bench = Bench::set_up(cli)?;
    // The masquerade's is the last with a cluster: the flows that fill its tables live for minutes.
    let groups: [(Group, Measure); 6] = [
        (Group::Footprint, footprint::measure),
        (Group::Pods, pods::measure),
        (Group::Lifecycle, lifecycle::measure),
        (Group::Ndp, ndp::measure),
        (Group::Masquerade, masquerade::measure),
        (Group::Verifier, verifier::measure),
    ];
    for (group, measure) in groups.into_iter().filter(|(group, _)| cli.wants(*group)) {
        measure(&mut bench).with_context(|| format!("cannot measure {group:?}"))?;
    }
    println!("{}", bench.report);
    let path = save(&bench.report, &cli.results)?;
    say(&format!("{} s; raw numbers: {}", started.elapsed().as_secs(), path.display()));
    Ok(())
}

impl Cli {
    fn wants(&self, group: Group) -> bool {
        let in_set = self.set.is_none_or(|set| set.groups().contains(&group));
        in_set && (self.only.is_empty() || self.only.contains(&group))
    }
}

impl Bench {
    fn set_up(cli: &Cli) -> Result<Self> {
        // What an interrupted run left behind; there is nothing to say when there is none.
        take_down()?;
        say("two testbeds: one with a cluster, one for what is made by hand");
        let options = |nodes, cluster| Options { nodes, cluster, ..Options::default() };
        let by_hand = Testbed::up(Prefix::new(REFERENCE)?, options(by_hand::NODES, false), Progress::Quiet)?;
        Ok(Self {
            by_hand: ByHand::make(by_hand)?,
            cluster: Testbed::up(Prefix::new(CLUSTER)?, options(3, true), Progress::Quiet)?,
            rounds: cli.rounds,
            span: Duration::from_secs(cli.seconds),
            report: Report::new(cli.rounds, machine()),
        })
    }
}

/// Says what is being done, on stderr.
fn say(line: &str) {
    write_now(&format!("{line}\n"));
}

/// Kernel and processors, for whoever reads the numbers later.
fn machine() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let model = model.trim_start_matches([' ', '\t', ':']);
    format!("kernel {}, {processors} processors ({model})", kernel.trim())
}

fn save(report: &Report, folder: &std::path::Path) -> Result<PathBuf> {
    let time = Run::new(&["date", "-u", "+%Y%m%dT%H%M%SZ"]).success()?;
    let path = folder.join(format!("{}.json", time.trim()));
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    std::fs::write(&path, serde_json::to_vec_pretty(report)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
