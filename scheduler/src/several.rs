//! Several servers with one store in etcd: one leads, the others forward to it.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use scheduler_core::state::State;
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    sync::watch,
    task::{JoinSet, spawn_blocking},
    time::{interval, sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    audit::Audit,
    backup,
    clock::Clock,
    election::{self, Followed, Leader, Outcome, Seat},
    etcd::{self, Etcd, EtcdError, Location},
    follower::Follower,
    founding::{self, Keeper, Opened, Shared},
    front::{Front, Lead, Mode},
    mutex::lock,
    pki::Pki,
    put_back::{self, Look},
    server::{Ready, ServerConfig, SocketFile, Sockets},
    sorry,
    store::{Copy, EtcdStore, Store as _, StoreError},
    term::Term,
    writer::chain,
};

/// Between two tries.
const RETRY: Duration = Duration::from_millis(200);
/// How long tokens name a server that is not there.
const NAMED: Duration = Duration::from_secs(7 * 24 * 3600);
/// How often a server says that it is there.
const SAY: Duration = Duration::from_secs(3600);
/// How often the leader looks which servers there are.
const LOOK: Duration = Duration::from_secs(2);
/// The most servers that are looked at.
const SERVERS_PAGE: i64 = 64;

/// One server of several.
struct Member<'a> {
    config: &'a ServerConfig,
    etcd: Etcd,
    prefix: String,
    pki: Arc<Pki>,
    own: Leader,
    front: Front,
    /// Until the server ends.
    socket_file: Mutex<Option<SocketFile>>,
    audit: Arc<Audit>,
    /// Where all servers are reached.
    servers: watch::Receiver<Vec<String>>,
    clock: Clock,
    /// Whether it was said that the server can be reached.
    is_told: AtomicBool,
}

/// Runs until `shutdown` resolves, whoever leads.
pub(crate) async fn run(
    config: &ServerConfig,
    location: &Location,
    clock: Clock,
    sockets: Sockets,
    shutdown: impl Future<Output = ()>,
    ready: impl FnOnce(&Ready),
) -> anyhow::Result<()> {
    tokio::pin!(shutdown);
    let etcd = Etcd::new(location)?;
    let (_, pki) = tokio::select! {
        () = &mut shutdown => return Ok(()),
        shared = share(&etcd, location, config, clock) => shared?,
    };
    let (mode, is_mode) = watch::channel(Mode::Nobody("the server starts".to_owned()));
    let (sorry, _sorry) = sorry::serve(pki.clone(), is_mode)?;
    let Sockets { listeners, socket, socket_file, addresses, servers: own } = sockets;
    let front = Front::start(listeners, socket, mode, &sorry);
    let (tell_servers, servers) = watch::channel(own.clone());
    let mut tasks = JoinSet::new();
    tasks.spawn(be_named(etcd.clone(), location.prefix.clone(), own.clone()));
    tasks.spawn(look_for_servers(etcd.clone(), location.prefix.clone(), own.clone(), tell_servers));
    tasks.spawn(look_for_authorities(etcd.clone(), location.prefix.clone(), pki.clone(), clock));
    let (prefix, audit) = (location.prefix.clone(), Arc::new(Audit::open(&config.state_dir, clock)));
    let member = Member {
        config,
        etcd,
        prefix,
        pki,
        own: Leader { addresses: own },
        front,
        socket_file: Mutex::new(Some(socket_file)),
        audit,
        servers,
        clock,
        is_told: AtomicBool::new(false),
    };
    member.stand_again_and_again(&mut shutdown, addresses, ready).await
}

/// What all servers share. Without etcd there is nothing to begin with.
async fn share(
    etcd: &Etcd,
    location: &Location,
    config: &ServerConfig,
    clock: Clock,
) -> anyhow::Result<(Shared, Arc<Pki>)> {
    let mut told = false;
    loop {
        match founding::share(etcd, &location.prefix, &config.state_dir, clock).await {
            Err(error) if matches!(error.downcast_ref(), Some(EtcdError::Unreachable { .. })) => {
                if !told {
                    warn!("{error:#}: the server starts when it does");
                    told = true;
                }
                sleep(RETRY).await;
            }
            result => return result,
        }
    }
}

impl Member<'_> {
    async fn stand_again_and_again(
        &self,
        shutdown: &mut (impl Future<Output = ()> + Unpin),
        addresses: Vec<SocketAddr>,
        ready: impl FnOnce(&Ready),
    ) -> anyhow::Result<()> {
        let mut follower = None;
        let mut ready = Some(ready);
        let mut is_ready = |join_token: Option<String>| {
            if let Some(ready) = ready.take() {
                let socket = self.config.socket.clone();
                ready(&Ready { addresses: addresses.clone(), socket, join_token });
            }
        };
        loop {
            let outcome = tokio::select! {
                () = &mut *shutdown => return Ok(()),
                outcome = election::stand(&self.etcd, &self.prefix, &self.own) => outcome,
            };
            match outcome {
                Ok(Outcome::Leads(seat)) => {
                    if self.lead(&seat, follower.take(), shutdown, &mut is_ready).await? {
                        return Ok(());
                    }
                }
                Ok(Outcome::Follows(followed)) => {
                    if follower.is_none() {
                        let started = Follower::start(&self.etcd, &self.prefix);
                        follower = Some(started.context("cannot start the thread that follows")?);
                    }
                    tokio::select! {
                        () = &mut *shutdown => return Ok(()),
                        () = self.follow(&followed, &mut is_ready) => {}
                    }
                }
                Err(error) => self.nobody(chain(&error)).await,
            }
        }
    }

    async fn nobody(&self, why: String) {
        warn!("no server leads: {why}");
        self.front.set(Mode::Nobody(why));
        sleep(RETRY).await;
    }

    /// Forwards until the leader has changed.
    async fn follow(&self, followed: &Followed, is_ready: &mut impl FnMut(Option<String>)) {
        let leader = &followed.leader.addresses;
        if leader.iter().any(|address| self.own.addresses.contains(address)) {
            let why = format!(
                "the server that leads says that it is reached at {}, which is this server: give each server an \
                 --advertise of its own",
                leader.join(", ")
            );
            warn!("{why}");
            self.front.set(Mode::Nobody(why));
        } else {
            info!(?leader, "another server leads: connections are forwarded to it");
            let lead = Lead { servers: leader.clone(), pki: self.pki.clone(), clock: self.clock };
            self.front.set(Mode::Follows(Arc::new(lead)));
        }
        if !self.is_told.swap(true, Ordering::Relaxed) {
            is_ready(None);
        }
        tokio::select! {
            () = election::deposed(&self.etcd, &self.prefix, followed) => {}
            () = self.outlive(followed) => {}
        }
        self.front.set(Mode::Nobody("the leader has gone, another is being chosen".to_owned()));
    }

    /// Takes the lead from a leader that has died. Resolves when it has none any more.
    async fn outlive(&self, followed: &Followed) {
        died(&followed.leader.addresses).await;
        info!("the leader has died");
        if let Err(error) = election::depose(&self.etcd, &self.prefix, followed).await {
            warn!(%error, "cannot take the lead from it: it ends with its lease");
        }
        election::deposed(&self.etcd, &self.prefix, followed).await;
    }

    /// Serves until the seat is lost. True: the server is to end.
    async fn lead(
        &self,
        seat: &Seat,
        follower: Option<Follower>,
        shutdown: &mut (impl Future<Output = ()> + Unpin),
        is_ready: &mut impl FnMut(Option<String>),
    ) -> anyhow::Result<bool> {
        let opened = match self.open(seat.clone(), follower).await {
            Ok(opened) => opened,
            Err(error) => {
                seat.give_up().await;
                return match error.downcast::<StoreError>() {
                    Ok(error @ (StoreError::Etcd(_) | StoreError::Deposed)) => {
                        self.nobody(chain(&error)).await;
                        Ok(false)
                    }
                    Ok(error) => Err(error.into()),
                    Err(error) => Err(error),
                };
            }
        };
        let (mut term, inlets) =
            Term::start(opened, &self.audit, self.config, self.clock, self.servers.clone())?;
        self.front.set(Mode::Leads(inlets));
        info!(revision = term.hub.state().revision(), "this server leads");
        if !self.is_told.swap(true, Ordering::Relaxed) {
            is_ready(term.first_token().await);
        }
        let hub = term.hub.clone();
        let result = tokio::select! {
            () = &mut *shutdown => Ok(true),
            () = seat.lost() => Ok(false),
            () = hub.store_went_back() => {
                self.tell_went_back(seat).await;
                Ok(false)
            }
            error = term.failed() => Err(error),
        };
        self.front.set(Mode::Nobody("the leader has gone, another is being chosen".to_owned()));
        if matches!(result, Ok(true)) {
            self.close().await;
        }
        if matches!(result, Ok(false)) {
            // What is left of it can write nothing, and must not keep this server from following the next.
            tokio::spawn(term.stop());
        } else {
            term.stop().await;
            seat.give_up().await;
        }
        result
    }

    /// A server that is started now need not wait for the clients of this one.
    async fn close(&self) {
        self.front.close().await;
        drop(lock(&self.socket_file).take());
    }

    /// etcd was put back while this server led: the next one that leads, perhaps this one, goes on as after a restore.
    async fn tell_went_back(&self, seat: &Seat) {
        let told = put_back::tell(&self.etcd, &self.prefix, seat, self.config.lease).await;
        if let Err(error) = told {
            warn!(error = %chain(&error), "that the store has gone back cannot be kept: who leads next looks for itself");
        }
        seat.give_up().await;
    }

    /// Takes the store over.
    async fn open(&self, seat: Seat, follower: Option<Follower>) -> anyhow::Result<Opened> {
        let (etcd, prefix, pki) = (self.etcd.clone(), self.prefix.clone(), self.pki.clone());
        let keeper = Keeper::Etcd(etcd.clone(), prefix.clone(), seat.clone());
        let look = Look::take(&etcd, &prefix).await.map_err(StoreError::from)?;
        // The leader before this one may have changed it a moment ago.
        let mut shared = founding::shared(&etcd, &prefix).await.map_err(of_store)?;
        let lease_before = look.lease_before();
        if lease_before.is_some() {
            shared = founding::rename(&etcd, &prefix, &seat, shared).await.map_err(of_store)?;
        }
        shared.tell(&pki, self.clock);
        let (pod_ipv4, clock, writer) = (self.config.pod_ipv4, self.clock, seat.clone());
        let opening = spawn_blocking(move || {
            let store = EtcdStore::open(etcd, &prefix, shared.epoch(), writer)?;
            if let Some(lease_ms) = lease_before {
                backup::go_on(&store, lease_ms, clock)?;
            }
            let state = take_over(&store, follower.and_then(Follower::finish))?;
            founding::begin(Arc::new(store), state, pki, keeper, pod_ipv4, clock)
        });
        let opened = opening.await??;
        look.keep(&self.etcd, &self.prefix, &seat, self.config.lease).await?;
        Ok(opened)
    }
}

/// The state that a leader begins with: what the copy lacks is read, or everything.
fn take_over(store: &EtcdStore, copy: Option<Copy>) -> Result<State, StoreError> {
    let begun = Instant::now();
    let kept = copy.as_ref().map(Copy::revision);
    let state = copy.map(|copy| store.go_on_from(copy)).transpose()?.flatten();
    let is_whole = state.is_some();
    let state = match state {
        Some(state) => state,
        None => {
            let (revision, values) = store.load()?;
            State::load(revision, values)
        }
    };
    let from = kept.filter(|_| is_whole).unwrap_or(0);
    info!(from, to = state.revision(), took = ?begun.elapsed(), "the state is taken over");
    Ok(state)
}

/// Resolves when nobody listens any more where a connection was accepted before: the kernel of a machine says so
/// at once when a process dies. One that was never reached, or does not answer, proves nothing.
async fn died(addresses: &[String]) {
    let mut reached = None;
    loop {
        match connect(addresses, &mut reached).await {
            Ok(mut stream) => {
                // Nothing comes: the leader waits for TLS, and ends the connection after a while.
                let _ = stream.read(&mut [0; 64]).await;
            }
            Err(error) if reached.is_some() && error.kind() == io::ErrorKind::ConnectionRefused => return,
            Err(_) => sleep(LOOK).await,
        }
    }
}

/// Connects to the address that was reached before, or to the first that can be.
async fn connect(addresses: &[String], reached: &mut Option<String>) -> io::Result<TcpStream> {
    let candidates = reached.as_ref().map_or(addresses, std::slice::from_ref).to_vec();
    let mut result = Err(io::ErrorKind::NotFound.into());
    for address in candidates {
        result = match timeout(LOOK, TcpStream::connect(&address)).await {
            Ok(Ok(stream)) => {
                *reached = Some(address);
                return Ok(stream);
            }
            Ok(Err(error)) => Err(error),
            Err(elapsed) => Err(elapsed.into()),
        };
    }
    result
}

/// Says for ever that a server is there, for tokens to name it.
async fn be_named(etcd: Etcd, prefix: String, own: Vec<String>) {
    let Some(first) = own.first() else { return };
    let key = format!("{prefix}/servers/{first}");
    let value = serde_json::to_vec(&own).expect("addresses are text");
    loop {
        let said = async {
            let (lease, _) = etcd.grant(NAMED).await?;
            let success = vec![etcd::put(key.clone(), value.clone(), lease)];
            etcd.txn(etcd::pb::TxnRequest { compare: vec![], success, failure: vec![] }).await
        };
        match said.await {
            Ok(_) => sleep(SAY).await,
            Err(_) => sleep(LOOK).await,
        }
    }
}

/// Keeps the list of servers that tokens name.
async fn look_for_servers(etcd: Etcd, prefix: String, own: Vec<String>, tell: watch::Sender<Vec<String>>) {
    let prefix = format!("{prefix}/servers/");
    let mut ticks = interval(LOOK);
    loop {
        ticks.tick().await;
        let Ok(found) = etcd.all(&prefix, false, SERVERS_PAGE).await else { continue };
        let others = found.iter().filter_map(|found| serde_json::from_slice(&found.value).ok());
        let all: Vec<Vec<String>> = std::iter::once(own.clone()).chain(others).collect();
        let named = in_turn(&all);
        tell.send_if_modified(|now| std::mem::replace(now, named.clone()) != named);
    }
}

/// An etcd that does not answer is for the caller to wait for.
fn of_store(error: anyhow::Error) -> anyhow::Error {
    error.downcast::<EtcdError>().map_or_else(|error| error, |error| StoreError::from(error).into())
}

/// Takes up the CAs that the leader has put there, as long as the server runs.
async fn look_for_authorities(etcd: Etcd, prefix: String, pki: Arc<Pki>, clock: Clock) {
    let mut ticks = interval(LOOK);
    loop {
        ticks.tick().await;
        if let Ok(shared) = founding::shared(&etcd, &prefix).await {
            shared.tell(&pki, clock);
        }
    }
}

/// The first address of each server, then the second of each: a list that is cut off still names every server.
fn in_turn(servers: &[Vec<String>]) -> Vec<String> {
    let longest = servers.iter().map(Vec::len).max().unwrap_or(0);
    let mut named: Vec<String> = Vec::new();
    for address in (0..longest).flat_map(|turn| servers.iter().filter_map(move |server| server.get(turn))) {
        if !named.contains(address) {
            named.push(address.clone());
        }
    }
    named
}

/// Begins a cluster in etcd, unless there is one.
///
/// # Errors
/// There is one, a server runs, or etcd does not answer.
pub(crate) async fn init(
    location: &Location,
    state_dir: &std::path::Path,
    decided: founding::Founding,
) -> anyhow::Result<Arc<scheduler_core::cluster::Cluster>> {
    let clock = Clock::start();
    let etcd = Etcd::new(location)?;
    let (shared, _) = founding::share(&etcd, &location.prefix, state_dir, clock).await?;
    let own = Leader { addresses: vec![] };
    let Outcome::Leads(seat) = election::stand(&etcd, &location.prefix, &own).await? else {
        bail!("a server runs on this etcd already: it has begun the cluster");
    };
    let (prefix, writer) = (location.prefix.clone(), seat.clone());
    let begun = spawn_blocking(move || {
        let store = EtcdStore::open(etcd, &prefix, shared.epoch(), writer)?;
        let (revision, values) = store.load()?;
        let state = State::load(revision, values);
        founding::only_first(state, &store, decided, clock, &prefix)
    });
    let result = begun.await.context("the thread that begins the cluster has ended")?;
    seat.give_up().await;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_server_is_named_before_any_is_named_twice() {
        let servers = [vec!["a:1", "a:2", "a:3"], vec!["b:1"], vec!["a:1", "c:2"]];
        let servers = servers.map(|server| server.into_iter().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(in_turn(&servers), ["a:1", "b:1", "a:2", "c:2", "a:3"]);
    }
}
