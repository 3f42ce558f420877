//! The services of the server that has the store, from its start to its end: one term.

use std::{sync::Arc, thread::JoinHandle, time::Duration};

use anyhow::{Context as _, bail, ensure};
use hextet_api::v1::{
    agent_server::AgentServer, cluster_server::ClusterServer, endpoints_server::EndpointsServer,
    enrollment_server::EnrollmentServer, renewal_server::RenewalServer,
};
use scheduler_core::{lease::Leases, state::State, token::Role};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time,
};
use tonic::{service::Routes, transport::Server};
use tracing::warn;

use crate::{
    audit::Audit,
    auth::{AuthLayer, Door},
    clock::Clock,
    founding::Opened,
    front::{self, Inlets, Outlets},
    hub::{Hub, Parts},
    rotation,
    server::ServerConfig,
    service::{self, AgentService, ClusterService, EndpointsService, EnrollmentService, RenewalService},
    timers,
    tls::{self, Shown},
    writer,
};

/// How long the token is good that a server without nodes prints.
const FIRST_TOKEN_VALID: Duration = Duration::from_secs(24 * 3600);
/// Streams end by themselves when the server stops; those that do not are cut after this.
const STOP_MAX: Duration = Duration::from_secs(3);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Calls and streams of one connection at a time.
const STREAMS_MAX: u32 = 1000;
const HEADER_LEN_MAX: u32 = 16 * 1024;

/// The services, running.
pub(crate) struct Term {
    pub(crate) hub: Arc<Hub>,
    writer: JoinHandle<()>,
    writer_ended: oneshot::Receiver<()>,
    servers: JoinSet<anyhow::Result<()>>,
    timers: JoinSet<()>,
    stop: watch::Sender<bool>,
}

impl Term {
    /// Starts the services; connections go into the inlets. `servers` is where all servers are reached.
    pub(crate) fn start(
        opened: Opened,
        audit: &Arc<Audit>,
        config: &ServerConfig,
        clock: Clock,
        servers: watch::Receiver<Vec<String>>,
    ) -> anyhow::Result<(Term, Inlets)> {
        let Opened { store, pki, keeper, state } = opened;
        let (requests, queue) = mpsc::channel(writer::QUEUE_MAX);
        let cluster = state.cluster().cloned();
        let is_damaged = store.damage().is_some();
        ensure!(cluster.is_some() || is_damaged, "the store has no cluster");
        let leases = Leases::resume(&state, config.lease, clock.now());
        let (history_bytes, writer) = (config.history_bytes, requests);
        let parts = Parts {
            clock,
            store,
            pki,
            keeper,
            cluster,
            servers,
            history_bytes,
            state: state.clone(),
            leases,
            writer,
        };
        let hub = Arc::new(Hub::new(parts));
        rotation::check(&hub)?;
        let (writer, writer_ended) = start_writer(&hub, state, queue)?;
        let (stop, stopped) = watch::channel(false);
        let (inlets, outlets) = front::channel();
        let servers = serve(&hub, audit, outlets, &stopped)?;
        let mut timers = JoinSet::new();
        // Time changes nothing in a damaged store.
        if !is_damaged {
            timers.spawn(timers::look_at_leases(hub.clone()));
            timers.spawn(timers::finish_drains(hub.clone()));
            timers.spawn(timers::drive_deploys(hub.clone()));
            timers.spawn(timers::settle_restore(hub.clone()));
            tell_restored(&hub);
            timers.spawn(timers::trim_history(hub.clone()));
            timers.spawn(rotation::follow(hub.clone()));
        }
        Ok((Term { hub, writer, writer_ended, servers, timers, stop }, inlets))
    }

    /// Resolves when a part has ended that the services cannot be without.
    pub(crate) async fn failed(&mut self) -> anyhow::Error {
        tokio::select! {
            _ = &mut self.writer_ended => anyhow::anyhow!("the writer has ended: see the log above"),
            Some(ended) = self.servers.join_next() => {
                let ended = ended.map_err(anyhow::Error::from).and_then(|result| result);
                ended.and_then(|()| bail!("a listener has ended")).unwrap_or_else(|error: anyhow::Error| error)
            }
            Some(_) = self.timers.join_next() => anyhow::anyhow!("a timer has ended: see the log above"),
        }
    }

    /// Ends streams, calls and timers, and the writer when it has written what waits.
    pub(crate) async fn stop(mut self) {
        self.hub.close();
        self.stop.send_replace(true);
        let ended = async { while self.servers.join_next().await.is_some() {} };
        if time::timeout(STOP_MAX, ended).await.is_err() {
            warn!("some streams did not end by themselves");
        }
        self.servers.shutdown().await;
        self.timers.shutdown().await;
        finish_writer(&self.hub, self.writer).await;
    }

    /// A token for the first node, as long as there is none.
    pub(crate) async fn first_token(&self) -> Option<String> {
        if !self.hub.state().nodes().is_empty() || self.hub.store.damage().is_some() {
            return None;
        }
        let made =
            service::make_token(&self.hub, "scheduler".to_owned(), Role::Node, None, FIRST_TOKEN_VALID).await;
        match made {
            Ok(token) => Some(token.to_string()),
            Err(error) => {
                warn!(%error, "cannot make a token for the first node");
                None
            }
        }
    }
}

/// Says why singletons have no place yet.
fn tell_restored(hub: &Hub) {
    let (state, wait) = (hub.state(), hub.restore_wait());
    if let Some((mark, wait)) = state.restored().zip(wait) {
        let (revision, seconds) = (mark.revision, wait.as_secs_f32());
        warn!(
            revision,
            "the cluster was restored from a backup: singletons wait {seconds:.1} s, in which leases of the server before may still run"
        );
    }
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
    let ended = async {
        hub.stop_writer().await;
        let _ = tokio::task::spawn_blocking(move || writer.join()).await;
    };
    if time::timeout(STOP_MAX, ended).await.is_err() {
        warn!("the store is still busy with its last write");
    }
}

fn serve(
    hub: &Arc<Hub>,
    audit: &Arc<Audit>,
    connections: Outlets,
    stopped: &watch::Receiver<bool>,
) -> anyhow::Result<JoinSet<anyhow::Result<()>>> {
    let routes = routes(hub)?;
    let mut servers = JoinSet::new();
    let acceptor = tls::acceptor(Arc::new(Shown::new(hub.pki.clone())?))?;
    let incoming = tls::handshakes(connections.tcp, acceptor, hub.pki.clone());
    servers.spawn(tls::keep_fresh(hub.clone(), until(stopped.clone())));
    let layer = |door| AuthLayer { door, audit: audit.clone(), hub: hub.clone() };
    let router = limits(Server::builder()).layer(layer(Door::Tls)).add_routes(routes.clone());
    let stop = until(stopped.clone());
    servers.spawn(async move { Ok(router.serve_with_incoming_shutdown(incoming, stop).await?) });
    let router = limits(Server::builder()).layer(layer(Door::Socket)).add_routes(routes);
    let stop = until(stopped.clone());
    servers.spawn(async move { Ok(router.serve_with_incoming_shutdown(connections.unix, stop).await?) });
    Ok(servers)
}

/// What one connection may take.
pub(crate) fn limits(server: Server) -> Server {
    server
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_header_list_size(HEADER_LEN_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
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
        .add_service(RenewalServer::new(RenewalService(hub.clone())))
        .add_service(health)
        .add_service(reflection))
}

async fn until(mut stopped: watch::Receiver<bool>) {
    // An error means that the term has ended: that is a stop, too.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}
