//! Starts the agent: checks, opens, joins, asks what was replaced while it was away, and boots.
//!
//! The order is what makes a failed start harmless: nothing is made in the kernel before the node knows who it
//! is and that it can do what it was asked for.

use std::{collections::BTreeMap, io, path::Path, sync::Arc};

use anyhow::{Context as _, Result, bail};
use dataplane::{Changes, Config, Dataplane, Features, NoBpf, announce::Announcer};
use dataplane_core::{Filtering, Ipv6Exit, MasqueradeBackend, NdpBackend};
use hextet_api::v1::{NodeHello, Resources};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::geteuid,
};
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use crate::{
    agent::{Agent, Inbox, Schedule, UplinkChoice, underlay},
    assignment::Head,
    attach::{self, Hello},
    behind::Behind,
    certificates::Certificates,
    config::{
        MasqueradeChoice, NdpChoice, NodeConfig, NodePaths, machine_cpu_millis, machine_memory_bytes,
        supervisor_program,
    },
    conflict::Conflicts,
    desired::Backends,
    events::Events,
    files,
    identity::Identity,
    join,
    lease::{self, Hold},
    lease_file, local,
    lock::NodeLock,
    log_sender::LogSender,
    lost_peers::LostPeers,
    pods::{NETNS_DIR, Pods},
    port_log::PortLog,
    rejoin,
    reports::Reports,
    roster::Roster,
    store::{READ_MAX, Settings, Store},
    supervisor::namespace,
};

/// What waits for the agent; who has more to say waits too.
const INBOX_MAX: usize = 64;

/// Runs the agent until `shutdown`; pods, links, maps and traffic stay.
///
/// # Errors
/// One sentence on what keeps this machine from being a node. Nothing was then made in the kernel.
pub async fn run(config: NodeConfig, shutdown: impl Future) -> Result<()> {
    tokio::pin!(shutdown);
    let config = NodeConfig { paths: config.paths.absolute()?, ..config };
    let paths = config.paths.clone();
    require_root("run a node")?;
    require_pid_namespaces(namespace::probe())?;
    make_folders(&paths)?;
    let lock = NodeLock::take(&paths.state_dir).await?;
    let machine = lock.machine().context("cannot tell which machine this is")?;
    raise_open_files();
    let store = Arc::new(Store::open_within(&paths.store(), READ_MAX).await?);
    let known = store.identity()?.is_some();
    let had_pins = std::fs::read_dir(&paths.bpf_dir).is_ok_and(|mut pins| pins.next().is_some());
    let dataplane = open_dataplane(&paths).await?;
    let uplink = UplinkChoice { device: config.uplink.clone(), address: config.underlay };
    let identified = tokio::select! {
        identified = identify(&config, &store, &dataplane, &uplink) => identified.map(Some),
        // Joining can be interrupted, and is taken up again by the next start.
        _ = &mut shutdown => Ok(None),
    };
    if !known && !had_pins && !matches!(identified, Ok(Some(_))) {
        // Opening the dataplane has pinned its maps. Nothing else was made, and what else is there may be of
        // another node.
        for error in dataplane::bpf::Bpf::teardown(&paths.bpf_dir) {
            warn!(%error, "left behind");
        }
    }
    let Some((identity, backends)) = identified? else { return Ok(()) };
    let auto = config.ndp == NdpChoice::Auto || config.masquerade == MasqueradeChoice::Auto;
    refuse_fallback(auto, store.settings()?.as_ref(), &dataplane.features().bpf)?;
    store.save_settings(&Settings {
        uplink: config.uplink.clone(),
        underlay: config.underlay,
        ndp: backends.ndp,
        masquerade: backends.masquerade,
        filtering: backends.filtering,
        ipv6_exit: backends.ipv6_exit,
    })?;
    let assignment = store.assignment()?;
    let listener = local::listen(&paths.run_dir)
        .with_context(|| format!("cannot listen in {}", paths.run_dir.display()))?;

    let (news, keepers) = mpsc::channel(INBOX_MAX);
    let (call, calls) = mpsc::channel(INBOX_MAX);
    let (from_server, server) = mpsc::channel(INBOX_MAX);
    let (hello, hello_watch) = watch::channel(hello(&config, &assignment.head, &machine));
    let (announcer, conflicts) = Announcer::new();
    let changes =
        dataplane.changes().inspect_err(|error| warn!(%error, "changes are only found by the audit")).ok();
    let certificates = Arc::new(Certificates::new(store.clone(), identity.clone(), machine));
    let lease = Arc::new(Hold::new(&paths.run_dir));
    info!(node = identity.name, prefix = %identity.prefix, pods = assignment.pods.len(), "node starts");
    let mut agent = Agent {
        pods: Pods::new(paths.clone(), identity.clone(), supervisor_program(), news),
        roster: Roster::new(identity.clone(), assignment).with_hooks(config.hooks.clone()),
        started: tokio::time::Instant::now(),
        identity,
        paths,
        store,
        dataplane,
        announcer,
        conflicts: Conflicts::default(),
        lost_peers: LostPeers::default(),
        behind: Behind::default(),
        backends,
        uplink,
        hello,
        lease: lease.clone(),
        reports: Reports::default(),
        logs: LogSender::new(),
        schedule: Schedule::new(),
        underlay: None,
        ports: PortLog::open(&config.paths.state_dir),
        refused: BTreeMap::new(),
        settled: None,
        traces: changes.as_ref().map(Changes::traces).unwrap_or_default(),
        events: Events::default(),
        taken_for_copy: None,
        deleted: None,
        is_held: false,
        is_alone: false,
    };
    lease::start(certificates.clone(), hello_watch.clone(), lease)
        .context("cannot start the lease's thread")?;
    let attach = tokio::spawn(attach::run(certificates, hello_watch, from_server));
    let mut inbox = Inbox { server, keepers, calls, conflicts, changes };
    agent.boot(&mut inbox).await;
    info!("node ready");
    let local = tokio::spawn(local::serve(listener, call));
    let result = agent.run(inbox, shutdown).await;
    attach.abort();
    local.abort();
    result
}

/// Who the node is, and what it does its work with; joins the cluster if that is to be done yet.
async fn identify(
    config: &NodeConfig,
    store: &Store,
    dataplane: &Dataplane,
    uplink: &UplinkChoice,
) -> Result<(Identity, Backends)> {
    let chosen = choose(config.ndp, config.masquerade, dataplane.features())?;
    let backends = Backends { filtering: config.filtering, ipv6_exit: config.ipv6_exit, ..chosen };
    check_filtering(backends)?;
    let identity = match store.identity()? {
        Some(identity) => {
            let identity = match &config.rejoin {
                Some(token) => rejoin::rejoin(store, identity, token).await?,
                None => identity,
            };
            join::known(identity, config)?
        }
        // Later it may be missing for a while, as at boot; a new node is better told at once.
        None => join::join(store, config, &underlay(dataplane, uplink).await?).await?,
    };
    Ok((identity, backends))
}

/// Ends with a sentence when this process may not do what it was asked to.
pub(crate) fn require_root(what: &str) -> Result<()> {
    if geteuid().is_root() { Ok(()) } else { bail!("only root can {what}: run it with sudo") }
}

/// Without them no task can be started. When they are only used up, pods that run go on, and so does the agent.
fn require_pid_namespaces(probed: io::Result<()>) -> Result<()> {
    match probed {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => bail!(
            "this kernel has no PID namespaces, with which the processes of a pod end: boot one that was built with \
             CONFIG_PID_NS, as those of distributions are"
        ),
        Err(error) => {
            warn!(
                %error,
                "no PID namespace can be made, so no pod can be started: is user.max_pid_namespaces (sysctl) used up?"
            );
            Ok(())
        }
    }
}

/// Opens the kernel for the node in `paths`.
pub(crate) async fn open_dataplane(paths: &NodePaths) -> Result<Dataplane> {
    let config = Config {
        bpf_dir: paths.bpf_dir.clone(),
        netns_dir: NETNS_DIR.into(),
        ..Config::of_machine(paths.run_dir.clone())
    };
    Ok(Dataplane::open(config).await?)
}

fn make_folders(paths: &NodePaths) -> Result<()> {
    let make = |path: &Path, mode| {
        files::folder(path, mode).with_context(|| format!("cannot make the folder {}", path.display()))
    };
    // Tasks walk through the state folder to their own, and cannot list it.
    make(&paths.state_dir, 0o711)?;
    make(&paths.pods_state_dir(), 0o711)?;
    make(&paths.run_dir, 0o700)?;
    make(&paths.pods_run_dir(), 0o700)
}

/// A pod needs a few descriptors; the usual soft limit ends at some hundred pods.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        debug!(%error, "the limit of open files stays");
    }
}

/// The backends that were asked for, or the best that this kernel has.
fn choose(ndp: NdpChoice, masquerade: MasqueradeChoice, features: &Features) -> Result<Backends> {
    // The kernel's own backends are for kernels without BPF. Here they would be in the way of the better ones,
    // which also check the pods' sources, for want of a mount.
    let auto = ndp == NdpChoice::Auto || masquerade == MasqueradeChoice::Auto;
    if let Err(no @ NoBpf { unmounted: true, .. }) = &features.bpf
        && auto
    {
        bail!("{no}; or choose --ndp kernel --masquerade nftables, with which pods' sources are not checked");
    }
    Ok(Backends {
        ndp: choose_ndp(ndp, &features.bpf)?,
        masquerade: choose_masquerade(masquerade, features)?,
        filtering: Filtering::default(),
        ipv6_exit: Ipv6Exit::default(),
    })
}

/// A node whose pods' sources were checked does not go on without that by itself, for an error that may pass.
fn refuse_fallback(auto: bool, before: Option<&Settings>, bpf: &Result<(), NoBpf>) -> Result<()> {
    let had = |settings: &Settings| {
        settings.ndp == NdpBackend::Ebpf || settings.masquerade == MasqueradeBackend::Ebpf
    };
    match bpf {
        Err(reason) if auto && before.is_some_and(had) => bail!(
            "this node ran with BPF and cannot now: {reason}; its programs go on as they are; to go on without them, \
             with pods' sources not checked, choose --ndp kernel --masquerade nftables"
        ),
        _ => Ok(()),
    }
}

/// nftables filters by the whole remote endpoint, and nothing can be chosen there.
fn check_filtering(backends: Backends) -> Result<()> {
    if backends.masquerade == MasqueradeBackend::Nftables && backends.filtering != Filtering::default() {
        bail!("--filtering {} needs --masquerade ebpf", backends.filtering);
    }
    Ok(())
}

fn choose_ndp(choice: NdpChoice, bpf: &Result<(), NoBpf>) -> Result<NdpBackend> {
    match (choice, bpf) {
        (NdpChoice::Auto | NdpChoice::Ebpf, Ok(())) => Ok(NdpBackend::Ebpf),
        (NdpChoice::Kernel, _) => Ok(NdpBackend::Kernel),
        (NdpChoice::Ebpf, Err(reason)) => bail!("--ndp ebpf needs BPF: {reason}; or choose --ndp kernel"),
        (NdpChoice::Auto, Err(reason)) => {
            warn!(
                %reason,
                "no BPF here: the kernel's own proxy answers neighbour solicitations, and pods' sources are not checked"
            );
            Ok(NdpBackend::Kernel)
        }
    }
}

fn choose_masquerade(choice: MasqueradeChoice, features: &Features) -> Result<MasqueradeBackend> {
    match (choice, &features.bpf, features.nft) {
        (MasqueradeChoice::Auto | MasqueradeChoice::Ebpf, Ok(()), _) => Ok(MasqueradeBackend::Ebpf),
        (MasqueradeChoice::Ebpf, Err(reason), _) => {
            bail!("--masquerade ebpf needs BPF: {reason}; or choose --masquerade nftables")
        }
        (MasqueradeChoice::Nftables, _, true) => Ok(MasqueradeBackend::Nftables),
        (MasqueradeChoice::Auto, Err(reason), true) => {
            warn!(%reason, "no BPF here: nftables translates the pods' IPv4");
            Ok(MasqueradeBackend::Nftables)
        }
        (MasqueradeChoice::Nftables, _, false) => {
            bail!("--masquerade nftables needs the program nft and a kernel with nf_tables: install nftables")
        }
        (MasqueradeChoice::Auto, Err(reason), false) => {
            bail!("nothing here can translate the pods' IPv4: no BPF ({reason}) and no nft; install nftables")
        }
    }
}

fn hello(config: &NodeConfig, head: &Head, machine: &str) -> Hello {
    let capacity = Resources {
        cpu_millis: config.cpu_millis.unwrap_or_else(machine_cpu_millis),
        memory_bytes: config.memory_bytes.unwrap_or_else(machine_memory_bytes),
        countables: config.countables.clone(),
    };
    Hello {
        rest: NodeHello {
            labels: config.labels.clone(),
            capacity: Some(capacity),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            epoch: head.epoch.clone(),
            revision: head.revision,
            machine: machine.to_owned(),
            session: lease_file::session(),
            ..NodeHello::default()
        },
        ..Hello::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_had_bpf_does_not_go_on_without_it_by_itself() {
        let settings = |ndp, masquerade| Settings {
            uplink: None,
            underlay: None,
            ndp,
            masquerade,
            filtering: Filtering::default(),
            ipv6_exit: Ipv6Exit::default(),
        };
        let had = settings(NdpBackend::Ebpf, MasqueradeBackend::Ebpf);
        let had_not = settings(NdpBackend::Kernel, MasqueradeBackend::Nftables);
        let error = refuse_fallback(true, Some(&had), &no_bpf(false)).unwrap_err().to_string();
        assert!(error.contains("cannot now: too old") && error.contains("--ndp kernel"), "{error}");
        for (auto, before, bpf) in [
            (false, Some(&had), no_bpf(false)),
            (true, Some(&had_not), no_bpf(false)),
            (true, None, no_bpf(false)),
            (true, Some(&had), Ok(())),
        ] {
            assert!(refuse_fallback(auto, before, &bpf).is_ok());
        }
    }

    #[test]
    fn a_kernel_without_pid_namespaces_is_refused_by_name_and_one_that_has_none_left_is_not() {
        let errno = |errno: nix::errno::Errno| Err(io::Error::from(errno));
        let error = require_pid_namespaces(errno(nix::errno::Errno::EINVAL)).unwrap_err().to_string();
        assert!(error.contains("CONFIG_PID_NS"), "{error}");
        assert!(require_pid_namespaces(errno(nix::errno::Errno::ENOSPC)).is_ok());
        if geteuid().is_root() {
            namespace::probe().unwrap();
        }
    }

    fn no_bpf(unmounted: bool) -> Result<(), NoBpf> {
        Err(NoBpf { reason: "too old".to_owned(), unmounted })
    }

    fn features(bpf: bool, nft: bool) -> Features {
        let bpf = if bpf { Ok(()) } else { no_bpf(false) };
        Features { bpf, tcx: true, force_forwarding: true, nft }
    }

    fn masquerade(choice: MasqueradeChoice, bpf: bool, nft: bool) -> Result<MasqueradeBackend, String> {
        choose_masquerade(choice, &features(bpf, nft)).map_err(|error| error.to_string())
    }

    #[test]
    fn auto_is_bpf_where_the_kernel_has_it() {
        assert_eq!(choose_ndp(NdpChoice::Auto, &Ok(())).unwrap(), NdpBackend::Ebpf);
        assert_eq!(masquerade(MasqueradeChoice::Auto, true, false), Ok(MasqueradeBackend::Ebpf));
    }

    #[test]
    fn auto_falls_back_to_the_kernels_own() {
        assert_eq!(choose_ndp(NdpChoice::Auto, &no_bpf(false)).unwrap(), NdpBackend::Kernel);
        assert_eq!(masquerade(MasqueradeChoice::Auto, false, true), Ok(MasqueradeBackend::Nftables));
    }

    #[test]
    fn auto_does_not_make_up_for_a_missing_mount() {
        let features = Features { bpf: no_bpf(true), ..features(false, true) };
        let (kernel, nftables) = (NdpChoice::Kernel, MasqueradeChoice::Nftables);
        for (ndp, masquerade) in [(NdpChoice::Auto, nftables), (kernel, MasqueradeChoice::Auto)] {
            let error = choose(ndp, masquerade, &features).unwrap_err().to_string();
            assert!(error.starts_with("too old; or choose --ndp kernel --masquerade nftables"), "{error}");
        }
        assert!(choose(kernel, nftables, &features).is_ok());
    }

    #[test]
    fn what_was_asked_for_and_is_missing_is_said_with_the_reason() {
        let error = choose_ndp(NdpChoice::Ebpf, &no_bpf(false)).unwrap_err().to_string();
        assert_eq!(error, "--ndp ebpf needs BPF: too old; or choose --ndp kernel");
        assert!(masquerade(MasqueradeChoice::Ebpf, false, true).unwrap_err().contains("too old"));
        assert!(
            masquerade(MasqueradeChoice::Nftables, true, false).unwrap_err().contains("install nftables")
        );
        assert!(masquerade(MasqueradeChoice::Auto, false, false).unwrap_err().contains("install nftables"));
    }

    #[test]
    fn a_filtering_that_nftables_lacks_is_refused_there() {
        let backends = |masquerade, filtering| Backends {
            ndp: NdpBackend::Ebpf,
            masquerade,
            filtering,
            ipv6_exit: Ipv6Exit::default(),
        };
        let error = check_filtering(backends(MasqueradeBackend::Nftables, Filtering::EndpointIndependent));
        let error = error.unwrap_err().to_string();
        assert_eq!(error, "--filtering endpoint-independent needs --masquerade ebpf");
        assert!(check_filtering(backends(MasqueradeBackend::Nftables, Filtering::default())).is_ok());
        assert!(check_filtering(backends(MasqueradeBackend::Ebpf, Filtering::EndpointIndependent)).is_ok());
    }

    #[test]
    fn what_was_asked_for_wins_over_what_is_better() {
        assert_eq!(choose_ndp(NdpChoice::Kernel, &Ok(())).unwrap(), NdpBackend::Kernel);
        assert_eq!(masquerade(MasqueradeChoice::Nftables, true, true), Ok(MasqueradeBackend::Nftables));
    }
}
