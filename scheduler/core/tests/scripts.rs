//! Runs the scripts in `testdata`: an event, then what it changed.
//!
//! A block is a command, perhaps with lines that belong to it, then `----`, then what is expected, then an
//! empty line. `UPDATE_SCRIPTS=1 cargo test -p scheduler-core --test scripts` writes what comes out.

#[path = "support/mod.rs"]
mod support;

use std::{collections::BTreeMap, fs, net::Ipv6Addr, path::Path};

use scheduler_core::{
    assignment,
    change::{Change, Key, Revision, Value},
    deploy::{self, DeployId, Fault, Move, OnFailure, Order, Pause, Schedule, Strategy},
    event::{Conflict, Event, Mac, PodReport, PrefixChoice, Refusal, Texts},
    job::Job,
    node::{Hello, Node},
    placement,
    pod::{Pod, PodId, PodPhase},
    quantity::Resources,
    restore::Restored,
    token::{Role, Token},
};
use support::World;

const SEPARATOR: &str = "----";

#[test]
fn scripts_give_what_is_written_in_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no scripts");
    for file in files {
        let written = fs::read_to_string(&file).unwrap();
        let ran = run(&written);
        if std::env::var_os("UPDATE_SCRIPTS").is_some() {
            fs::write(&file, ran).unwrap();
        } else {
            assert_eq!(ran, written, "{}: UPDATE_SCRIPTS=1 writes what comes out", file.display());
        }
    }
}

/// The script with what comes out in the place of what was expected. Comments before a command stay.
fn run(script: &str) -> String {
    let mut world = World::new(1);
    let mut out = String::new();
    let mut lines = script.lines();
    while let Some(line) = lines.next() {
        out.push_str(line);
        out.push('\n');
        if line.starts_with('#') || line.is_empty() {
            continue;
        }
        let body: Vec<&str> = lines.by_ref().take_while(|line| *line != SEPARATOR).collect();
        body.iter().for_each(|line| out.push_str(&format!("{line}\n")));
        let reply = command(&mut world, line, &body.join("\n"));
        out.push_str(&format!("{SEPARATOR}\n{reply}\n"));
        lines.by_ref().take_while(|line| !line.is_empty()).for_each(drop);
    }
    out.trim_end().to_owned() + "\n"
}

fn command(world: &mut World, line: &str, body: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    match words.as_slice() {
        ["join", name, settings @ ..] => join(world, name, settings),
        ["apply"] => {
            let job: Job = serde_norway::from_str(body).unwrap();
            told(world, "user:alice", Event::ApplyJob(job, Texts::new()))
        }
        ["rollback", to] => {
            let job: Job = serde_norway::from_str(body).unwrap();
            told(world, "user:alice", Event::RollbackJob(job, to.parse().unwrap(), Texts::new()))
        }
        ["deploy", strategy] => {
            let job: Job = serde_norway::from_str(body).unwrap();
            told(world, "user:alice", Event::Deploy(job, schedule(strategy)))
        }
        ["moved", id, words @ ..] => moved(world, &id.parse().unwrap(), words),
        ["resume", id] => order(world, id, Order::Resume),
        ["abort", id] => order(world, id, Order::Abort { now: false }),
        ["abort-now", id] => order(world, id, Order::Abort { now: true }),
        ["ack", id] => order(world, id, Order::Acknowledge),
        ["health", id] => {
            format!(
                "{:?}\n",
                deploy::health::health(
                    &world.state,
                    &world.state.deploys()[&id.parse::<deploy::DeployId>().unwrap()]
                )
            )
        }
        ["delete", job] => told(world, "user:alice", Event::DeleteJob((*job).to_owned())),
        ["delete-node", node] => told(world, "user:alice", Event::DeleteNode((*node).to_owned())),
        ["report", node, which, how] => report(world, node, which, how),
        ["conflict", node, which] => conflict(world, node, which, None),
        ["conflict", node, which, address] => conflict(world, node, which, address.parse().ok()),
        ["lease-ended", nodes @ ..] => {
            let nodes = nodes.iter().map(|node| (*node).to_owned()).collect();
            told(world, "scheduler", Event::LeaseEnded(nodes))
        }
        ["cut-off", node] => told(world, "scheduler", Event::CutOff(vec![(*node).to_owned()])),
        ["fenced", node] => told(world, "scheduler", Event::Fenced(vec![(*node).to_owned()])),
        ["dead", node] => told(world, "user:alice", Event::NodeDead((*node).to_owned())),
        ["leaving", node] => told(world, &format!("node:{node}"), Event::NodeLeaving((*node).to_owned(), 0)),
        ["hello", node] => {
            let hello = hello(world, node);
            told(world, &format!("node:{node}"), Event::NodeHello((*node).to_owned(), hello))
        }
        ["returned", node] => told(world, &format!("node:{node}"), Event::NodeReturned((*node).to_owned())),
        ["drained"] => {
            let pods = world.state.pods().keys().cloned().collect();
            told(world, "scheduler", Event::Drained(pods))
        }
        ["restored"] => {
            let mark = Restored { revision: world.state.revision(), time: world.wall, lease_ms: 0 };
            told(world, "user:root", Event::Restored(mark))
        }
        ["settled"] => told(world, "scheduler", Event::RestoreSettled),
        ["token"] => {
            let expires = world.wall + std::time::Duration::from_secs(3600);
            let token = Token { role: Role::Node, name: None, expires, used_by: None };
            told(world, "user:alice", Event::CreateToken("ff".to_owned(), token))
        }
        ["watch", on] => {
            world.watched = *on == "on";
            String::new()
        }
        ["wait", minutes] => {
            world.wall.0 += minutes.parse::<u64>().unwrap() * 60_000;
            String::new()
        }
        ["why", pod] => why_lines(world, &PodId((*pod).to_owned())),
        ["pods"] => world.state.pods().values().map(|pod| pod_line(pod, true)).collect(),
        ["nodes"] => world.state.nodes().values().map(|node| node_line(world, node)).collect(),
        ["assignment", node] => assignment_lines(world, node),
        _ => panic!("no such command: {line}"),
    }
}

/// What the agent of a node that is there says when it starts again.
fn hello(world: &World, node: &str) -> Hello {
    let node = &world.state.nodes()[node];
    Hello {
        underlay: node.underlay.expect("it has attached before"),
        underlay_v4: node.underlay_v4,
        labels: node.labels.clone(),
        capacity: node.capacity,
        countables: node.countables.clone(),
        agent_version: node.agent_version.clone(),
        machine: node.machine.clone(),
        hardware: node.hardware.clone(),
        session: 0,
    }
}

fn join(world: &mut World, name: &str, settings: &[&str]) -> String {
    let (mut cpu, mut memory) = ("4000m", "8Gi");
    let mut claim = world.next_claim();
    claim.prefix = PrefixChoice::Own;
    let mut labels = BTreeMap::new();
    for (key, value) in settings.iter().map(|setting| setting.split_once('=').unwrap()) {
        match key {
            "cpu" => cpu = value,
            "memory" => memory = value,
            "pods" if value == "auto" => claim.prefix = world.next_claim().prefix,
            "pods" => claim.prefix = PrefixChoice::Lan(value.parse().unwrap()),
            "gpu" => drop(world.countables.0.insert(key.to_owned(), value.parse().unwrap())),
            "subnet" => claim.subnet = value.parse().unwrap(),
            "group" => claim.group_id = value.parse().unwrap(),
            _ => drop(labels.insert(key.to_owned(), value.to_owned())),
        }
    }
    let capacity = Resources { cpu: cpu.parse().unwrap(), memory: memory.parse().unwrap() };
    reply(world.join_with(name, capacity, labels, claim))
}

/// `which` is `all` or a number: the first, second, .. pod of the node by id.
fn report(world: &mut World, node: &str, which: &str, how: &str) -> String {
    let mut all: Vec<PodId> = world.state.pods_on(node).map(|pod| pod.id.clone()).collect();
    all.sort();
    let chosen = match which.parse::<usize>() {
        Ok(number) => vec![all[number - 1].clone()],
        Err(_) => all,
    };
    let phase = if how == "running" { PodPhase::Running } else { PodPhase::Failed };
    let gone = how == "gone";
    let one =
        |id| PodReport { id, phase, message: how.to_owned(), restarts: 0, gone, ending: None, version: None };
    let reports = chosen.into_iter().map(one).collect();
    told(world, &format!("node:{node}"), Event::PodReports(node.to_owned(), reports))
}

/// Another machine has the address of the node's first, second, .. pod, or an address that is no longer its.
fn conflict(world: &mut World, node: &str, which: &str, other: Option<Ipv6Addr>) -> String {
    let number: usize = which.parse().unwrap();
    let pod = {
        let mut all: Vec<_> = world.state.pods_on(node).collect();
        all.sort_by_key(|pod| &pod.id);
        all[number - 1]
    };
    let address = other.or(pod.address).unwrap();
    let conflict = Conflict { pod: pod.id.clone(), address, mac: Mac([2, 0, 0, 0, 1, 0]) };
    told(world, &format!("node:{node}"), Event::AddressConflict(node.to_owned(), conflict))
}

/// A strategy's usual steps, perhaps with `+hold` for those that somebody has to let pass.
fn schedule(strategy: &str) -> Schedule {
    let (strategy, pause) = match strategy.split_once('+') {
        Some((strategy, "hold")) => (strategy, Pause::Hold),
        _ => (strategy, Pause::None),
    };
    let strategy: Strategy = serde_norway::from_str(strategy).unwrap();
    Schedule {
        strategy,
        steps: Schedule::steps_of(strategy, pause),
        healthy_for_ms: 10_000,
        timeout_ms: 300_000,
        retries: 1,
        retry_after_ms: 10_000,
        on_failure: OnFailure::Rollback,
        in_place: false,
    }
}

/// What the driver decides of the deploy as it is.
fn moved(world: &mut World, id: &DeployId, words: &[&str]) -> String {
    let decided = match words {
        ["passed"] => Move::Passed,
        ["failed", why @ ..] => Move::Failed(Fault { why: why.join(" "), output: String::new() }),
        ["again"] => Move::TryAgain,
        ["back"] => Move::Back,
        _ => panic!("no such move: {words:?}"),
    };
    let moves = world.state.deploys()[id].moves;
    told(world, "deploy", Event::DeployMoved(id.clone(), moves, decided))
}

fn order(world: &mut World, id: &str, order: Order) -> String {
    told(world, "user:alice", Event::DeployOrder(id.parse().unwrap(), order))
}

fn told(world: &mut World, changer: &str, event: Event) -> String {
    reply(world.event(changer, event))
}

fn reply(result: Result<Option<Revision>, Refusal>) -> String {
    match result {
        Err(refusal) => format!("refused: {refusal}\n"),
        Ok(None) => "nothing to change\n".to_owned(),
        Ok(Some(revision)) => {
            let changes = revision.changes.iter().filter(|change| change.key != Key::Counters);
            let changes: String = changes.map(change_line).collect();
            format!("{} by {}: {}\n{changes}", revision.revision, revision.changer, revision.message)
        }
    }
}

fn change_line(change: &Change) -> String {
    let sign = match (&change.old, &change.new) {
        (None, _) => '+',
        (_, None) => '-',
        _ => '~',
    };
    let text = match change.new.as_ref().or(change.old.as_ref()) {
        Some(Value::Pod(pod)) => pod_line(pod, false),
        Some(Value::Node(node)) => format!("{} {}\n", node.name, node.phase),
        Some(Value::Job(job)) => {
            let versions: Vec<_> = job.versions.keys().collect();
            format!(
                "version {}{} kept {versions:?}{}\n",
                job.version,
                job.equals.map(|equals| format!(" = {equals}")).unwrap_or_default(),
                if job.removed { " removed" } else { "" }
            )
        }
        Some(Value::Deploy(deploy)) => format!("deploy {} {}\n", deploy.id, deploy.stage),
        _ => format!("{}\n", change.key),
    };
    format!("{sign} {text}")
}

fn pod_line(pod: &Pod, with_address: bool) -> String {
    let node = pod.node.as_deref().unwrap_or("-");
    let stop = if pod.stop { " stop" } else { "" };
    let stop = if pod.standby { format!(" standby{stop}") } else { stop.to_owned() };
    let address =
        pod.address.filter(|_| with_address).map(|address| format!(" {address}")).unwrap_or_default();
    let (phase, version) = (pod.phase, pod.job_version);
    format!("{} v{version} {phase}{stop} on {node}{address}: {}\n", pod.id, pod.message)
}

fn why_lines(world: &World, pod: &PodId) -> String {
    let why = placement::why_not(&world.state, &world.state.pods()[pod], world.wall);
    let smallest = why.smallest_change().map(|change| format!("smallest change: {change}\n"));
    let nodes = why.nodes.iter();
    let nodes =
        nodes.map(|node| format!("{}: {}; would fit if: {}\n", node.node, node.reason, node.change()));
    smallest.into_iter().chain(nodes).collect()
}

fn node_line(world: &World, node: &Node) -> String {
    let usage = world.state.usage(&node.name);
    let (cpu, pods) = (usage.cpu_millis, usage.pods);
    let counted = if node.countables.is_empty() {
        String::new()
    } else {
        format!(", {} of {}", usage.countables, node.countables)
    };
    let lan = world.state.cluster().is_some_and(|cluster| !cluster.prefix.has_subnet(node.prefix));
    let lan = if lan { format!(", pods in {}", node.prefix) } else { String::new() };
    format!(
        "{} {} {cpu}m of {} used by {pods} pods{counted}{lan}\n",
        node.name, node.phase, node.capacity.cpu
    )
}

fn assignment_lines(world: &World, node: &str) -> String {
    let full = assignment::full(&assignment::view(&world.state, node));
    let peers = full.peers.iter().map(|(name, peer)| {
        let lost = if peer.lost { " lost" } else { "" };
        let left: String = peer.left.iter().map(|address| format!(" left {address}")).collect();
        format!("peer {name} via {}{lost}{left}\n", peer.underlay)
    });
    let pods = full.pods.iter().map(|(id, pod)| {
        let tasks: Vec<_> = pod.spec().unwrap().tasks.values().map(|task| task.exec.join(" ")).collect();
        format!("run {id} v{}: {}\n", pod.job_version, tasks.join("; "))
    });
    let removed = full.removed_pods.iter().map(|id| format!("stop {id}\n"));
    let term = if full.term == 0 { String::new() } else { format!("term {}\n", full.term) };
    peers.chain(pods).chain(removed).chain([term]).collect()
}
