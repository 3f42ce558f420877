//! The control plane as one future: [`run`].

use std::{
    fs, future::Future, net::SocketAddr, path::PathBuf, sync::Arc, thread::JoinHandle, time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use hextet_api::v1::{
    agent_server::AgentServer, cluster_server::ClusterServer, endpoints_server::EndpointsServer,
    enrollment_server::EnrollmentServer,
};
use ipnetwork::Ipv4Network;
use scheduler_core::{lease::Leases, state::State, token::Role};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
    time,
};
use tonic::{
    service::Routes,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};
use tracing::{info, warn};

use crate::{
    audit::Audit,
    auth::{AuthLayer, Door},
    clock::Clock,
    founding::{self, Opened},
    hub::{Hub, Parts},
    net,
    pki::Pki,
    service::{self, AgentService, ClusterService, EndpointsService, EnrollmentService},
    timers, writer,
};

/// How long the token is good that a server without nodes prints.
const FIRST_TOKEN_VALID: Duration = Duration::from_secs(24 * 3600);
/// Streams end by themselves when the server stops; those that do not are cut after this.
const STOP_MAX: Duration = Duration::from_secs(3);
/// How long a connection may take to prove who it is.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Calls and streams of one connection at a time.
const STREAMS_MAX: u32 = 1000;
const HEADER_LEN_MAX: u32 = 16 * 1024;
/// Shorter leases end while a node waits for its turn on a busy machine.
const LEASE_MIN: Duration = Duration::from_millis(100);

/// How a server runs.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where the store and the certificates are. Made if it is not there.
    pub state_dir: PathBuf,
    /// Where it listens with mutual TLS.
    pub listen: Vec<SocketAddr>,
    /// Where root on this machine reaches it without a certificate.
    pub socket: PathBuf,
    /// `host:port` for tokens to name; empty to take the machine's own addresses.
    pub advertise: Vec<String>,
    /// A node that has not reported for this long is lost.
    pub lease: Duration,
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
    let Opened { store, pki, state } = founding::open(&config.state_dir, config.pod_ipv4, clock).await?;
    let (listeners, socket) = listen(&config).await?;
    let addresses: Vec<SocketAddr> = listeners.iter().map(|(_, address)| *address).collect();
    let servers =
        if config.advertise.is_empty() { net::advertised(&addresses) } else { config.advertise.clone() };

    let (requests, queue) = mpsc::channel(writer::QUEUE_MAX);
    let cluster = state.cluster().context("the store has no cluster")?.clone();
    let leases = Leases::resume(&state, config.lease, clock.now());
    let parts = Parts { clock, store, pki, cluster, servers, state: state.clone(), leases, writer: requests };
    let hub = Arc::new(Hub::new(parts));
    let (writer, mut writer_ended) = start_writer(&hub, state, queue)?;

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let audit = Arc::new(Audit::open(&config.state_dir, clock));
    let mut servers = serve(&hub, &audit, listeners, socket, &stopped)?;
    let mut timers = JoinSet::new();
    timers.spawn(timers::end_leases(hub.clone()));
    timers.spawn(timers::finish_drains(hub.clone()));

    let join_token = first_token(&hub).await;
    ready(&Ready { addresses: addresses.clone(), socket: config.socket.clone(), join_token });
    info!(?addresses, socket = %config.socket.display(), revision = hub.state().revision(), "server ready");

    let result = tokio::select! {
        () = shutdown => Ok(()),
        _ = &mut writer_ended => Err(anyhow::anyhow!("the writer has ended: see the log above")),
        Some(ended) = servers.join_next() => {
            ended.map_err(anyhow::Error::from).and_then(|result| result).and_then(|()| bail!("a listener has ended"))
        }
        Some(_) = timers.join_next() => Err(anyhow::anyhow!("a timer has ended: see the log above")),
    };

    info!("server stops");
    hub.close();
    stop.send_replace(true);
    if time::timeout(STOP_MAX, async { while servers.join_next().await.is_some() {} }).await.is_err() {
        warn!("some streams did not end by themselves");
    }
    servers.shutdown().await;
    timers.shutdown().await;
    let _ = fs::remove_file(&config.socket);
    finish_writer(&hub, writer).await;
    result
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

type Listeners = (Vec<(TcpListener, SocketAddr)>, UnixListener);

async fn listen(config: &ServerConfig) -> anyhow::Result<Listeners> {
    let mut listeners = Vec::new();
    for address in &config.listen {
        listeners.push(net::bind_tcp(*address).await?);
    }
    Ok((listeners, net::bind_unix(&config.socket)?))
}

fn start_writer(
    hub: &Arc<Hub>,
    state: State,
    queue: mpsc::Receiver<writer::Command>,
) -> anyhow::Result<(JoinHandle<()>, oneshot::Receiver<()>)> {
    let (ends, ended) = oneshot::channel();
    let writer = writer::start(hub.clone(), state, queue, ends).context("cannot start the writer")?;
    Ok((writer, ended))
}

/// What waits in the queue is still written.
async fn finish_writer(hub: &Hub, writer: JoinHandle<()>) {
    hub.stop_writer().await;
    let joined = tokio::task::spawn_blocking(move || writer.join());
    if time::timeout(STOP_MAX, joined).await.is_err() {
        warn!("the store is still busy with its last write");
    }
}

async fn first_token(hub: &Hub) -> Option<String> {
    if !hub.state().nodes().is_empty() {
        return None;
    }
    let made = service::make_token(hub, "scheduler".to_owned(), Role::Node, None, FIRST_TOKEN_VALID).await;
    match made {
        Ok(token) => Some(token.to_string()),
        Err(error) => {
            warn!(%error, "cannot make a token for the first node");
            None
        }
    }
}

fn serve(
    hub: &Arc<Hub>,
    audit: &Arc<Audit>,
    listeners: Vec<(TcpListener, SocketAddr)>,
    socket: UnixListener,
    stopped: &tokio::sync::watch::Receiver<bool>,
) -> anyhow::Result<JoinSet<anyhow::Result<()>>> {
    let routes = routes(hub)?;
    let tls = tls(&hub.pki);
    let bound = Arc::new(Semaphore::new(net::CONNECTIONS_MAX));
    let mut servers = JoinSet::new();
    for (listener, _) in listeners {
        let server =
            limits(Server::builder()).tls_config(tls.clone()).context("cannot use the certificates")?;
        let router =
            server.layer(AuthLayer { door: Door::Tls, audit: audit.clone() }).add_routes(routes.clone());
        let incoming = net::accept(listener, bound.clone());
        let stop = until(stopped.clone());
        servers.spawn(async move { Ok(router.serve_with_incoming_shutdown(incoming, stop).await?) });
    }
    let router = limits(Server::builder())
        .layer(AuthLayer { door: Door::Socket, audit: audit.clone() })
        .add_routes(routes);
    let incoming = net::accept(socket, Arc::new(Semaphore::new(net::SOCKET_CONNECTIONS_MAX)));
    let stop = until(stopped.clone());
    servers.spawn(async move { Ok(router.serve_with_incoming_shutdown(incoming, stop).await?) });
    Ok(servers)
}

fn limits(server: Server) -> Server {
    server
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_header_list_size(HEADER_LEN_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

/// A client without a certificate gets as far as enrollment; one with a certificate of another CA does not
/// get a connection.
fn tls(pki: &Pki) -> ServerTlsConfig {
    let (chain, key) = pki.server_identity_pem();
    ServerTlsConfig::new()
        .identity(Identity::from_pem(chain, key))
        .client_ca_root(Certificate::from_pem(pki.ca_pem()))
        .client_auth_optional(true)
        .timeout(HANDSHAKE_MAX)
}

fn routes(hub: &Arc<Hub>) -> anyhow::Result<Routes> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(hextet_api::DESCRIPTORS)
        .build_v1()
        .context("the contract's descriptors are not readable")?;
    let (_, health) = tonic_health::server::health_reporter();
    Ok(Routes::new(EnrollmentServer::new(EnrollmentService(hub.clone())))
        .add_service(ClusterServer::new(ClusterService(hub.clone())))
        .add_service(EndpointsServer::new(EndpointsService::new(hub.clone())))
        .add_service(AgentServer::new(AgentService(hub.clone())))
        .add_service(health)
        .add_service(reflection))
}

async fn until(mut stopped: tokio::sync::watch::Receiver<bool>) {
    // An error means that the server has gone: that is a stop, too.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}
