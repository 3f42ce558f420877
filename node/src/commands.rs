//! The commands about a node: answered by its agent, or from its store and its kernel when none runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use anyhow::{Context as _, Result, bail};
use dataplane::{Counter, Dataplane, MasqueradeBackend, Op, bpf::Bpf};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    agent::{UplinkChoice, planned_teardown, underlay, view},
    assignment::Assignment,
    config::NodePaths,
    desired::{Backends, Underlay, desired},
    events::NodeEvent,
    farewell::{self, untold},
    identity::Identity,
    keeper::{self, Place},
    lease_file,
    local::{self, Answer, Request},
    lock::NodeLock,
    port_log::{self, Holder},
    start::{open_dataplane, require_root},
    store::{READ_MAX, RETRY, Settings, Store, StoreError},
    supervisor::LEASE_LOOK,
    teardown,
    view::{FlowView, NodeView},
};

pub(crate) mod blind;

/// What the agent would do to the kernel now, an operation per line; empty when all is as it should be.
///
/// # Errors
/// When the machine has not joined, or kernel or store cannot be read.
pub async fn plan(paths: &NodePaths) -> Result<Vec<String>> {
    require_root("plan")?;
    let paths = paths.absolute()?;
    match agent_or_store(&paths, Request::Plan).await? {
        Asked::Agent(Answer::Lines(lines)) => Ok(lines),
        Asked::Agent(_) => bail!("the agent answered something else: is it of this version?"),
        Asked::Store(offline) => offline.plan().await,
    }
}

/// What the node is, runs, and can.
///
/// # Errors
/// When the machine has not joined, or kernel or store cannot be read.
pub async fn show(paths: &NodePaths) -> Result<NodeView> {
    require_root("look at a node")?;
    let paths = paths.absolute()?;
    match agent_or_store(&paths, Request::Show).await? {
        Asked::Agent(Answer::View(view)) => Ok(*view),
        Asked::Agent(_) => bail!("the agent answered something else: is it of this version?"),
        Asked::Store(offline) => Ok(offline.view()),
    }
}

/// What others broke and the agent mended since it started, the oldest first.
///
/// # Errors
/// When no agent runs: it alone knows.
pub async fn events(paths: &NodePaths) -> Result<Vec<NodeEvent>> {
    require_root("look at a node's events")?;
    let paths = paths.absolute()?;
    match ask(&paths, Request::Events).await? {
        Some(Answer::Events(events)) => Ok(events),
        Some(_) => bail!("the agent answered something else: is it of this version?"),
        None => bail!("the agent does not run, and events are in its memory only: look into its log"),
    }
}

/// Stops every pod and takes everything out of the kernel; what was done, a line each. The identity stays.
/// An agent that runs ends afterwards.
///
/// # Errors
/// When the kernel cannot be read; what could not be removed is among the lines, and begins with `failed:`.
pub async fn down(paths: &NodePaths) -> Result<Vec<String>> {
    require_root("take a node down")?;
    let paths = paths.absolute()?;
    match ask(&paths, Request::Down).await? {
        Some(Answer::Lines(mut lines)) => {
            // The agent's lock is free when the agent has ended.
            let _lock = NodeLock::take(&paths.state_dir).await?;
            lines.extend(blind::settle_store(&paths, &lines).await);
            Ok(lines)
        }
        Some(_) => bail!("the agent answered something else: is it of this version?"),
        None => down_without_agent(&paths).await,
    }
}

/// What the BPF programs have counted, read from the pins: the agent need not run.
///
/// # Errors
/// When there are no pins or they cannot be read.
pub fn counters(paths: &NodePaths) -> Result<Vec<Counter>> {
    require_root("read the counters")?;
    Ok(Dataplane::counters(&paths.bpf_dir)?)
}

/// The flows of `pod`, or of all pods, through the BPF masquerade.
///
/// # Errors
/// When the machine has not joined, there is no such pod, or the flows cannot be read.
pub async fn flows(paths: &NodePaths, pod: Option<&str>) -> Result<Vec<FlowView>> {
    let view = show(paths).await?;
    if let Some(unknown) = pod.filter(|pod| !view.pods.contains_key(*pod)) {
        bail!("there is no pod {unknown} on this node: `netctl node show` lists them");
    }
    if view.masquerade != MasqueradeBackend::Ebpf.to_string() {
        bail!("this node masquerades with nftables: its flows are in `conntrack -L`");
    }
    let names = pods_by_ipv4(&view);
    let flows = Bpf::flows(&paths.absolute()?.bpf_dir)?.into_iter();
    let named = flows.filter_map(|flow| Some(FlowView { pod: names.get(&flow.pod)?.clone(), flow }));
    Ok(named.filter(|flow| pod.is_none_or(|pod| flow.pod == pod)).collect())
}

fn pods_by_ipv4(view: &NodeView) -> BTreeMap<Ipv4Addr, String> {
    view.pods.iter().filter_map(|(id, pod)| Some((pod.ipv4?, id.clone()))).collect()
}

/// The pod that has an outside port, now or at an earlier time (seconds since the Unix epoch).
///
/// # Errors
/// When the address is not one that this node's pods leave with, or maps or log cannot be read.
pub async fn whois(paths: &NodePaths, address: SocketAddr, at: Option<u64>) -> Result<Option<Holder>> {
    let view = show(paths).await?;
    let paths = paths.absolute()?;
    let own = [view.underlay_ipv4.map(IpAddr::from), view.underlay.map(IpAddr::from)];
    if at.is_none() && !own.contains(&Some(address.ip())) && !is_outside(&paths, address.ip())? {
        bail!("{} is no address that this node's pods leave with: ask the node that has it", address.ip());
    }
    if let Some(at) = at {
        return port_log::holder_at(&paths.state_dir, address.port(), at)
            .context("cannot read the log of ports");
    }
    let holder = Bpf::port_holder(&paths.bpf_dir, address.port())?;
    let names = pods_by_ipv4(&view);
    Ok(holder.and_then(|(ipv4, _)| Some(Holder { pod: names.get(&ipv4)?.clone(), ipv4 })))
}

/// Whether a flow leaves with the address: the uplink may have several.
fn is_outside(paths: &NodePaths, address: IpAddr) -> Result<bool> {
    Ok(Bpf::flows(&paths.bpf_dir)?.iter().any(|flow| flow.outside == address))
}

/// The agent's answer; none when there is no agent.
async fn ask(paths: &NodePaths, request: Request) -> Result<Option<Answer>> {
    match local::ask(&paths.run_dir, request).await.context("cannot ask the agent")? {
        Some(Answer::Error(why)) => bail!(why),
        answer => Ok(answer),
    }
}

/// Who answers for the node.
enum Asked {
    Agent(Answer),
    Store(Box<Offline>),
}

/// The agent's answer, or the node without an agent. One that has just started has the store and answers soon.
async fn agent_or_store(paths: &NodePaths, request: Request) -> Result<Asked> {
    let end = Instant::now() + READ_MAX;
    loop {
        if let Some(answer) = ask(paths, request).await? {
            return Ok(Asked::Agent(answer));
        }
        let is_patient = Instant::now() < end;
        // The store is the agent's: many who look would keep it from one that starts.
        if is_patient && NodeLock::is_held(&paths.state_dir) {
            sleep(RETRY).await;
            continue;
        }
        match Offline::open(paths).await {
            Err(error) if is_patient && is_in_use(&error) => sleep(RETRY).await,
            opened => return opened.map(|offline| Asked::Store(Box::new(offline))),
        }
    }
}

fn is_in_use(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(StoreError::InUse { .. }))
}

/// Works also when the store is damaged or gone: the kernel and the run folder say what is there.
async fn down_without_agent(paths: &NodePaths) -> Result<Vec<String>> {
    let lock = if paths.state_dir.is_dir() { Some(NodeLock::take(&paths.state_dir).await?) } else { None };
    let mut lines = match (Offline::open(paths).await, &lock) {
        (Ok(mut offline), Some(lock)) => {
            let mut lines = vec![offline.leave(paths, lock).await];
            let planned = offline.planned_teardown().await;
            lines.extend(teardown::all(paths, &mut offline.dataplane, planned).await?);
            lines
        }
        _ => {
            let mut dataplane = open_dataplane(paths).await?;
            let mut lines = blind::end_pods_and_leave(paths, lock.as_ref()).await;
            lines.extend(teardown::empty_kernel(paths, &mut dataplane, Vec::new()).await?);
            lines
        }
    };
    lines.extend(blind::settle_store(paths, &lines).await);
    Ok(lines)
}

/// A node without its agent.
struct Offline {
    identity: Identity,
    assignment: Assignment,
    backends: Backends,
    underlay: Option<Underlay>,
    dataplane: Dataplane,
}

impl Offline {
    async fn open(paths: &NodePaths) -> Result<Offline> {
        if !paths.store().is_file() {
            bail!("this machine has not joined a cluster: there is no {}", paths.store().display());
        }
        let store = Store::open(&paths.store())?;
        let identity = store.identity()?.context("this machine has not joined a cluster yet")?;
        let settings = store.settings()?.context("the agent has never started here: run `netctl node`")?;
        let assignment = store.assignment()?;
        // An agent may start now.
        drop(store);
        let dataplane = open_dataplane(paths).await?;
        Ok(Offline {
            identity,
            assignment,
            backends: backends(&settings),
            underlay: underlay(&dataplane, &UplinkChoice::of(&settings)).await.ok(),
            dataplane,
        })
    }

    async fn plan(mut self) -> Result<Vec<String>> {
        let desired = self.desired().context("the uplink is not there: nothing can be planned")?;
        let observed = self.dataplane.observe(&desired).await?;
        Ok(dataplane::plan(&desired, &observed).iter().map(Op::to_string).collect())
    }

    /// Tells the server that the node is taken down, when what only one node may run has ended. Says how it went.
    async fn leave(&self, paths: &NodePaths, lock: &NodeLock) -> String {
        match self.end_singletons(paths).await {
            Ok(()) => farewell::say(&self.identity, lock).await,
            Err(error) => {
                let why = format!("a pod of which there may only be one has not ended: {error:#}");
                untold(&self.identity.name, &why)
            }
        }
    }

    /// They and their hooks end with the lease; a supervisor that does not look is ended.
    async fn end_singletons(&self, paths: &NodePaths) -> Result<()> {
        lease_file::remove(&paths.run_dir.join(lease_file::LEASE_FILE)).context("cannot end the lease")?;
        let pods = self.assignment.pods.iter().filter(|(_, pod)| pod.singleton.is_some());
        let places = pods.map(|(id, _)| Place::of(paths, id));
        let ends: JoinSet<Result<()>> =
            places.map(|place| async move { keeper::stop(&place).await }).collect();
        let are_there = !ends.is_empty();
        let ended = ends.join_all().await;
        if are_there {
            sleep(2 * LEASE_LOOK).await;
        }
        ended.into_iter().collect()
    }

    async fn planned_teardown(&mut self) -> Vec<String> {
        match self.desired() {
            Some(desired) => planned_teardown(&mut self.dataplane, &desired).await,
            None => Vec::new(),
        }
    }

    fn desired(&self) -> Option<dataplane::Desired> {
        let ending = |id: &str| self.assignment.pods.get(id).is_some_and(|pod| pod.removing);
        Some(desired(
            &self.identity,
            &self.assignment,
            self.underlay.as_ref()?,
            self.backends,
            ending,
            &BTreeSet::new(),
        ))
    }

    fn view(&self) -> NodeView {
        view(&self.identity, &self.assignment, self.backends, self.underlay.as_ref(), &self.dataplane)
    }
}

fn backends(settings: &Settings) -> Backends {
    Backends {
        ndp: settings.ndp,
        masquerade: settings.masquerade,
        filtering: settings.filtering,
        ipv6_exit: settings.ipv6_exit,
    }
}
