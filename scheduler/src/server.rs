//! The control plane as one future: [`run`].

use std::{fs, future::Future, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::ensure;
use ipnetwork::Ipv4Network;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
};
use tracing::{error, info};

use crate::{
    audit::Audit,
    clock::Clock,
    etcd::Location,
    founding,
    front::{Front, Mode},
    net, read_only, several,
    store::Store,
    term::Term,
};

/// Shorter leases end while a node waits for its turn on a busy machine.
const LEASE_MIN: Duration = Duration::from_millis(100);

/// How a server runs.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where the certificates are, and the store unless that is elsewhere. Made if it is not there.
    pub state_dir: PathBuf,
    /// Where the revisions are.
    pub store: StoreChoice,
    /// Where it listens with mutual TLS.
    pub listen: Vec<SocketAddr>,
    /// Where root on this machine reaches it without a certificate.
    pub socket: PathBuf,
    /// `host:port` for tokens to name; empty to take the machine's own addresses.
    pub advertise: Vec<String>,
    /// A node that has not reported for this long is lost.
    pub lease: Duration,
    /// What the log of changes may take on the disk, about; the oldest part is forgotten then.
    pub history_bytes: u64,
    /// The private range that every node hands out to its pods, when it is not [`founding::POD_IPV4`]. Only a first
    /// start decides.
    pub pod_ipv4: Option<Ipv4Network>,
}

/// What a server says when it can be reached.
#[derive(Clone, Debug)]
pub struct Ready {
    /// Where it listens, with the ports that the system chose.
    pub addresses: Vec<SocketAddr>,
    /// Where root reaches it.
    pub socket: PathBuf,
    /// A token for a node, as long as no node has joined: `netctl node --join TOKEN`.
    pub join_token: Option<String>,
}

/// Where the revisions are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StoreChoice {
    /// In the state directory, for one server.
    #[default]
    Local,
    /// In etcd, for several.
    Etcd(Location),
}

/// What a server listens on, and where others reach it.
pub(crate) struct Sockets {
    pub(crate) listeners: Vec<TcpListener>,
    pub(crate) socket: UnixListener,
    pub(crate) socket_file: SocketFile,
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) servers: Vec<String>,
}

/// Runs a server until `shutdown` resolves. `ready` is called once, when it can be reached.
///
/// # Errors
/// It cannot start, or a part of it that it cannot be without has ended.
pub async fn run(
    config: ServerConfig,
    shutdown: impl Future<Output = ()>,
    ready: impl FnOnce(&Ready),
) -> anyhow::Result<()> {
    check(&config)?;
    let clock = Clock::start();
    match &config.store {
        StoreChoice::Local => alone(&config, clock, shutdown, ready).await,
        StoreChoice::Etcd(location) => {
            let sockets = listen(&config).await?;
            several::run(&config, location, clock, sockets, shutdown, ready).await
        }
    }
}

/// The file of the Unix socket, gone with the server that made it: another's is left alone.
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // One that is left behind is replaced by the next start.
        let _ = fs::remove_file(&self.0);
    }
}

/// The one server of its store.
async fn alone(
    config: &ServerConfig,
    clock: Clock,
    shutdown: impl Future<Output = ()>,
    ready: impl FnOnce(&Ready),
) -> anyhow::Result<()> {
    let opened = founding::open(&config.state_dir, config.pod_ipv4, clock).await?;
    tell_damage(opened.store.as_ref());
    let Sockets { listeners, socket, socket_file, addresses, servers } = listen(config).await?;
    let audit = Arc::new(Audit::open(&config.state_dir, clock));
    let (_servers, all_servers) = watch::channel(servers);
    let (mut term, inlets) = Term::start(opened, &audit, config, clock, all_servers)?;
    let front = Front::start(listeners, socket, watch::channel(Mode::Leads(inlets.clone())).0, &inlets);

    let join_token = term.first_token().await;
    ready(&Ready { addresses: addresses.clone(), socket: config.socket.clone(), join_token });
    info!(?addresses, socket = %config.socket.display(), revision = term.hub.state().revision(), "server ready");
    let result = tokio::select! {
        () = shutdown => Ok(()),
        error = term.failed() => Err(error),
    };
    info!("server stops");
    // A server that is started now need not wait for the clients of this one.
    front.close().await;
    drop(socket_file);
    term.stop().await;
    result
}

/// Says what is damaged, a line each, before anything is served.
fn tell_damage(store: &dyn Store) {
    let Some(damage) = store.damage() else { return };
    for flaw in damage.lines() {
        error!("the store is damaged: {flaw}");
    }
    if let Err(refusal) = read_only::check(store) {
        error!("{refusal}");
    }
}

fn check(config: &ServerConfig) -> anyhow::Result<()> {
    ensure!(config.lease >= LEASE_MIN, "--lease is at least {} ms", LEASE_MIN.as_millis());
    config.pod_ipv4.map_or(Ok(()), founding::check_pod_ipv4)?;
    for address in &config.advertise {
        let good = hextet_api::token::is_host_and_port(address);
        ensure!(good, "--advertise {address}: write host:port, such as 192.0.2.1:4679 or [2001:db8::1]:4679");
    }
    Ok(())
}

async fn listen(config: &ServerConfig) -> anyhow::Result<Sockets> {
    let (mut listeners, mut addresses) = (Vec::new(), Vec::new());
    for address in &config.listen {
        let (listener, bound) = net::bind_tcp(*address).await?;
        listeners.push(listener);
        addresses.push(bound);
    }
    let socket = net::bind_unix(&config.socket)?;
    let servers =
        if config.advertise.is_empty() { net::advertised(&addresses) } else { config.advertise.clone() };
    let socket_file = SocketFile(config.socket.clone());
    Ok(Sockets { listeners, socket, socket_file, addresses, servers })
}
