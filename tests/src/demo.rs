//! `cargo xtask demo`: a job from `apply` to packets, step by step: each command as a user would type it, where
//! it is typed, and what it printed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::balancer::{self, Balancer};
use crate::cluster::Pod;
use crate::command::Run;
use crate::probe::{HELLO_PORT, all_greet, url};
use crate::progress::Progress;
use crate::testbed::{Options, Testbed, down, exists, netctl_program};
use crate::topology::Prefix;
use crate::wait::{interrupted, wait_for};
use crate::{interrupt, jobs, report, walk};

/// How long pods may take until they run and answer.
const SOON: Duration = Duration::from_secs(30);
/// What a program gives back that was ended by Ctrl-C.
const INTERRUPTED: u8 = 130;

/// Shows everything, then takes the testbed down or, with `keep`, says how to play with it.
///
/// # Errors
/// When there is a testbed already, or this machine cannot have one.
pub fn run(prefix: Prefix, keep: bool) -> Result<ExitCode> {
    if exists(&prefix) {
        bail!(
            "a testbed {prefix} is up: take it down with `cargo xtask testbed down{}`, or give the demo \
             another --prefix",
            prefix_flag(&prefix)
        );
    }
    interrupt::catch()?;
    let shown = show(&prefix);
    let stopped = interrupted();
    interrupt::ignore()?;
    match &shown {
        Ok(()) if keep => {
            say_how_to_play(&prefix);
            return Ok(ExitCode::SUCCESS);
        }
        Ok(()) => {}
        Err(_) if stopped => eprintln!("interrupted: cleaning up"),
        Err(e) => {
            eprintln!("error: {e:#}");
            keep_logs(&prefix);
        }
    }
    let ended = clean_up(&prefix);
    Ok(match stopped {
        true => ExitCode::from(INTERRUPTED),
        false if shown.is_ok() && ended => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn show(prefix: &Prefix) -> Result<()> {
    heading("A small internet and a cluster of three nodes");
    let testbed = Testbed::up(prefix.clone(), Options::default(), Progress::Told)?;
    let demo = Demo { testbed: &testbed };
    demo.nodes()?;
    let pods = demo.job()?;
    demo.curl(&pods)?;
    demo.ipv4(&pods)?;
    demo.every_hop(&pods)?;
    demo.routes()?;
    demo.balancer()?;
    println!("\nAll of that is plain routing: `ip`, `nft`, `bpftool` and `tcpdump` show every part of it.");
    Ok(())
}

struct Demo<'a> {
    testbed: &'a Testbed,
}

impl Demo<'_> {
    fn nodes(&self) -> Result<()> {
        self.netctl("netctl nodes", &["nodes"]).map(drop)
    }

    fn job(&self) -> Result<Vec<Pod>> {
        heading("A job: three pods of a small web server");
        self.netctl("netctl apply -f examples/hello.yaml", &["apply", "-f", jobs::HELLO_PATH])?;
        let mut pods = self.testbed.wait_running("hello", 3, SOON)?;
        pods.sort_by(|a, b| a.node.cmp(&b.node));
        // What it prints on a terminal, asked for by name because this is a pipe.
        self.netctl("netctl pods --ipv6", &["pods", "--ipv6", "-o", "table"])?;
        all_greet(&self.testbed.netns("client"), &pods, SOON)?;
        Ok(pods)
    }

    fn curl(&self, pods: &[Pod]) -> Result<()> {
        heading("From a LAN host that runs nothing of ours, straight to each pod");
        for pod in pods {
            let said = self.typed("client", &["curl", "-sS", "-g", &hello_url(pod)])?;
            ensure!(said.contains(&pod.id), "{} was asked, and {said:?} answered", pod.id);
        }
        heading("From the pod on n1 to the pod on n3");
        let said = self.typed(&pods[0].id, &["curl", "-sS", "-g", &hello_url(&pods[2])])?;
        ensure!(said.contains(&pods[2].id), "{} was asked, and {said:?} answered", pods[2].id);
        Ok(())
    }

    fn ipv4(&self, pods: &[Pod]) -> Result<()> {
        heading("From a pod to a server on the internet that is reached over IPv4 only");
        let log = self.testbed.echo();
        let before = log.log_len();
        self.typed(&pods[0].id, &["curl", "-sS", "http://198.51.100.2/"])?;
        let (_, line) = wait_for(SOON, "the server logs the request", || {
            let line = log.log_since(before).lines().find(|line| line.contains("http")).map(str::to_owned);
            line.ok_or_else(String::new)
        })?;
        println!("the server's log: {line}");
        ensure!(line.contains("peer 192.0.2.11 "), "the server sees {line:?}, not n1's 192.0.2.11");
        println!("192.0.2.11 is n1: the pod's private address never left its node");
        Ok(())
    }

    fn every_hop(&self, pods: &[Pod]) -> Result<()> {
        heading("One ping from the pod on n1 to the pod on n3, captured by tcpdump at every hop");
        let to = pods[2].address();
        let hops = walk::between_pods(self.testbed, &pods[0], &pods[2])?;
        let sights = walk::pings(self.testbed, &hops, to, 1)?;
        println!("{}$ ping -c 1 {to}    while tcpdump runs at:", self.at(&pods[0].id));
        for sight in &sights {
            let (at, link) = (self.at(&sight.hop.place), &sight.hop.link);
            println!("{at}$ tcpdump -nti {link} 'icmp6 and host {to}'");
            sight.text.lines().for_each(|line| println!("    {line}"));
            println!("    (the request's hop limit is {})", walk::request_hop_limit(sight)?);
        }
        walk::same_everywhere(&sights, 2)?;
        println!("every byte is the same at all {} of them, MAC addresses and hop limit aside", sights.len());
        Ok(())
    }

    fn routes(&self) -> Result<()> {
        heading("Why it went there");
        self.typed("n1", &["ip", "-6", "route", "show", "proto", "hextet"]).map(drop)
    }

    fn balancer(&self) -> Result<()> {
        heading("nginx on the router balances over the pods and follows their number");
        let balancer = Balancer::new(self.testbed);
        println!(
            "{}$ lb-nginx --join hx1-... --select hello/web --port {HELLO_PORT} --nginx &",
            self.at("router")
        );
        balancer.join()?;
        let three: BTreeSet<String> = self.ids()?;
        balancer.wait_pods(&three, SOON).with_context(|| balancer.daemon().log())?;
        for _ in 0..3 {
            self.typed("client", &["curl", "-sS", &format!("http://{}/", balancer.address().ip())])?;
        }
        for (count, why) in [(5, "two more"), (2, "only two")] {
            println!("\n# {why}");
            self.follow(&balancer, count)?;
        }
        println!(
            "(nginx is told by lb-nginx, which watches the group; port {} of the router)",
            balancer::PORT
        );
        Ok(())
    }

    /// Applies another count and measures until nginx serves exactly the pods that then are.
    fn follow(&self, balancer: &Balancer<'_>, count: u32) -> Result<()> {
        let line = format!("sed 's/count: 3/count: {count}/' examples/hello.yaml | netctl apply -f -");
        println!("$ {line}");
        let said = self.testbed.netctl_stdin(&["apply", "-f", "-"], &jobs::hello(count))?.success()?;
        let applied = Instant::now();
        print!("{said}");
        let took =
            balancer.wait_count(count as usize, applied, SOON).with_context(|| balancer.daemon().log())?;
        println!("nginx serves {count} pods {:.2} s after that", took.as_secs_f64());
        let ids: BTreeSet<String> =
            self.testbed.wait_running("hello", count as usize, SOON)?.into_iter().map(|pod| pod.id).collect();
        balancer.wait_pods(&ids, SOON)?;
        self.netctl("netctl pods", &["pods"]).map(drop)
    }

    fn ids(&self) -> Result<BTreeSet<String>> {
        Ok(self.testbed.pods("hello")?.into_iter().map(|pod| pod.id).collect())
    }

    /// Runs `netctl` as its user would.
    fn netctl(&self, shown: &str, args: &[&str]) -> Result<String> {
        println!("$ {shown}");
        let said = self.testbed.netctl(args)?.success()?;
        print!("{said}");
        Ok(said)
    }

    /// Runs a program in a place, with the place as its prompt.
    fn typed(&self, place: &str, args: &[&str]) -> Result<String> {
        let quoted = |arg: &&str| if arg.contains('[') { format!("'{arg}'") } else { (*arg).to_owned() };
        println!("{}$ {}", self.at(place), args.iter().map(quoted).collect::<Vec<_>>().join(" "));
        let said = self.testbed.run_in(place, args).limit(Duration::from_secs(10)).success()?;
        print!("{said}");
        Ok(said)
    }

    fn at(&self, place: &str) -> String {
        self.testbed.netns(place).name().to_owned()
    }
}

fn heading(text: &str) {
    println!("\n== {text}");
}

fn hello_url(pod: &Pod) -> String {
    url(pod.address().into(), HELLO_PORT)
}

fn prefix_flag(prefix: &Prefix) -> String {
    if prefix.as_str() == "hx" { String::new() } else { format!(" --prefix {prefix}") }
}

fn say_how_to_play(prefix: &Prefix) {
    let flag = prefix_flag(prefix);
    heading("It goes on running");
    println!(
        "  eval \"$(cargo xtask testbed env{flag})\"    then netctl pods, netctl apply -f ..., netctl --help"
    );
    println!(
        "  cargo xtask testbed exec{flag} client -- ping ADDRESS    or n1, n2, n3, router, wan, a pod's name"
    );
    println!("  cargo xtask testbed status{flag}");
    println!("  cargo xtask testbed down{flag}    takes all of it away");
}

/// Takes the testbed down and says so; whether nothing is left.
fn clean_up(prefix: &Prefix) -> bool {
    println!("\n== Cleaning up");
    let failures = down(prefix);
    for failure in &failures {
        eprintln!("error: {failure:#}");
    }
    if failures.is_empty() {
        println!("nothing of the testbed {prefix} is left on this machine");
    }
    failures.is_empty()
}

/// Keeps what tells why a step failed, for the testbed's own folder goes with the testbed.
fn keep_logs(prefix: &Prefix) {
    let Ok(testbed) = Testbed::open(prefix.clone()) else { return };
    let to = std::env::temp_dir().join(format!("hextet-demo-{prefix}"));
    std::fs::remove_dir_all(&to).ok();
    let kept = std::fs::create_dir_all(&to).map_err(anyhow::Error::from).and_then(|()| {
        std::fs::write(to.join("report"), report::text(&testbed))?;
        logs(testbed.dir()).iter().try_for_each(|log| copy_log(testbed.dir(), log, &to))
    });
    match kept {
        Ok(()) => eprintln!("the logs are in {}", to.display()),
        Err(e) => eprintln!("error: the logs could not be kept: {e:#}"),
    }
    if let Ok(netctl) = netctl_program() {
        let version = Run::new(&[netctl.to_string_lossy().as_ref(), "--version"]).success();
        eprintln!("this was {}", version.unwrap_or_default().trim());
    }
}

/// The log files of a testbed.
fn logs(dir: &Path) -> Vec<PathBuf> {
    let folders = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let folders: Vec<PathBuf> = folders.filter(|path| path.is_dir()).chain([dir.to_owned()]).collect();
    let files = folders.iter().flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten());
    files.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "log")).collect()
}

fn copy_log(dir: &Path, log: &Path, to: &Path) -> Result<()> {
    let name = log.strip_prefix(dir).unwrap_or(log).to_string_lossy().replace('/', "-");
    std::fs::copy(log, to.join(name)).with_context(|| format!("cannot copy {}", log.display()))?;
    Ok(())
}
