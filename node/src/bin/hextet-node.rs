//! Agent and supervisor as a program of their own, so that this crate's tests need no `netctl`.
//!
//! What is installed is `netctl node` and `netctl supervise`; options here are what tests need, and positional.

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use node::{MasqueradeChoice, NdpChoice, NodeConfig, NodePaths, PodPrefixChoice};
use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
};

/// Where pins go. Without it the kernel's own backends do the work.
const BPF_DIR: &str = "HEXTET_NODE_BPF_DIR";

const USAGE: &str =
    "usage: hextet-node supervise --pod-dir DIR | (run|plan|show|down) DIR [UPLINK] [NAME] [TOKEN]";

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    match run(&words.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["supervise", "--pod-dir", folder] => node::supervisor::run(Path::new(folder)),
        ["supervise", "--hook-dir", folder] => node::supervisor::run_hook(Path::new(folder)),
        ["run", folder, uplink, name, token @ ..] => {
            block_on(agent(folder, uplink, name, token.first().copied()))
        }
        ["plan", folder] => print(block_on(node::plan(&paths(folder)))?),
        ["show", folder] => print(vec![block_on(node::show(&paths(folder)))?.to_string()]),
        ["down", folder] => print(block_on(node::down(&paths(folder)))?),
        _ => bail!(USAGE),
    }
}

fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(work)
}

async fn agent(folder: &str, uplink: &str, name: &str, token: Option<&str>) -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut end = signal(SignalKind::terminate())?;
    let (ndp, masquerade) = match env::var_os(BPF_DIR) {
        Some(_) => (NdpChoice::Auto, MasqueradeChoice::Auto),
        None => (NdpChoice::Kernel, MasqueradeChoice::Nftables),
    };
    let given = |word: &str| (!word.is_empty()).then(|| word.to_owned());
    let config = NodeConfig {
        paths: paths(folder),
        join: token.map(str::parse).transpose().context("TOKEN")?,
        rejoin: None,
        name: given(name),
        uplink: given(uplink),
        underlay: None,
        pod_prefix: PodPrefixChoice::Auto,
        ndp,
        masquerade,
        filtering: dataplane_core::Filtering::default(),
        ipv6_exit: dataplane_core::Ipv6Exit::default(),
        hooks: hooks()?,
        labels: BTreeMap::from([("disk".to_owned(), "ssd".to_owned())]),
        countables: BTreeMap::new(),
        cpu_millis: None,
        memory_bytes: None,
    };
    node::run(config, async move { end.recv().await }).await
}

/// Hooks of the operator, as JSON in a variable.
fn hooks() -> Result<BTreeMap<String, hextet_lifecycle::Hook>> {
    env::var("HEXTET_NODE_HOOKS").map_or(Ok(BTreeMap::new()), |text| Ok(serde_json::from_str(&text)?))
}

fn paths(folder: &str) -> NodePaths {
    let folder = PathBuf::from(folder);
    let bpf_dir = env::var_os(BPF_DIR).map_or_else(|| folder.join("bpf"), PathBuf::from);
    NodePaths { state_dir: folder.join("state"), run_dir: folder.join("run"), bpf_dir }
}

fn print(lines: Vec<String>) -> Result<()> {
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}
