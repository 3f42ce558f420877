//! Where connections go: into this server's own services while it leads, byte by byte to the leader while it
//! follows, and to an answer in words while nobody leads.
//!
//! The sockets stay open through all of it. TLS goes through from the client to the leader, so that a
//! follower needs to know nobody; what comes in over the Unix socket is root's, and travels with this
//! server's own certificate.

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hextet_api::connect::{self, Credentials};
use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::{
    auth,
    clock::Clock,
    mutex::lock,
    net::{self, Accept, Connection},
    pki::Pki,
};

/// How long a connection waits for a leader before it is told that there is none.
pub(crate) const LEADER_WAIT: Duration = Duration::from_secs(4);
/// Between two tries.
const RETRY: Duration = Duration::from_millis(50);
/// How long one address of the leader may take.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// What happens to connections.
#[derive(Clone)]
pub(crate) enum Mode {
    /// This server leads.
    Leads(Inlets),
    /// Another one does.
    Follows(Arc<Lead>),
    /// Nobody does, and why.
    Nobody(String),
}

/// How the server that leads is reached.
pub(crate) struct Lead {
    /// `host:port`.
    pub(crate) servers: Vec<String>,
    pub(crate) pki: Arc<Pki>,
    pub(crate) clock: Clock,
}

impl Lead {
    /// Made for each connection: a server may follow for longer than a certificate is good.
    fn credentials(&self) -> io::Result<Credentials> {
        self.pki.server_credentials(&self.servers, self.clock.wall()).map_err(io::Error::other)
    }
}

/// Where connections are put in.
#[derive(Clone)]
pub(crate) struct Inlets {
    tcp: mpsc::Sender<io::Result<Connection<TcpStream>>>,
    unix: mpsc::Sender<io::Result<Connection<UnixStream>>>,
}

/// Where they come out.
pub(crate) struct Outlets {
    pub(crate) tcp: ReceiverStream<io::Result<Connection<TcpStream>>>,
    pub(crate) unix: ReceiverStream<io::Result<Connection<UnixStream>>>,
}

/// A way for connections.
pub(crate) fn channel() -> (Inlets, Outlets) {
    let ((tcp, tcp_out), (unix, unix_out)) = (mpsc::channel(1), mpsc::channel(1));
    (Inlets { tcp, unix }, Outlets { tcp: ReceiverStream::new(tcp_out), unix: ReceiverStream::new(unix_out) })
}

/// Accepts connections until it is dropped.
pub(crate) struct Front {
    mode: watch::Sender<Mode>,
    tasks: Mutex<JoinSet<()>>,
}

impl Front {
    /// `sorry` takes the connections that waited for a leader in vain.
    pub(crate) fn start(
        listeners: Vec<TcpListener>,
        socket: UnixListener,
        mode: watch::Sender<Mode>,
        sorry: &Inlets,
    ) -> Front {
        let mut tasks = JoinSet::new();
        let bound = Arc::new(Semaphore::new(net::CONNECTIONS_MAX));
        for listener in listeners {
            tasks.spawn(accept(listener, bound.clone(), mode.subscribe(), sorry.clone()));
        }
        let bound = Arc::new(Semaphore::new(net::SOCKET_CONNECTIONS_MAX));
        tasks.spawn(accept(socket, bound, mode.subscribe(), sorry.clone()));
        Front { mode, tasks: Mutex::new(tasks) }
    }

    /// Closes the sockets, so that the next server can have them. What was put in goes on; what was forwarded ends.
    pub(crate) async fn close(&self) {
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        tasks.shutdown().await;
    }

    /// From here on connections go this way; those that were forwarded end.
    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

/// A kind of connection.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Connected + Unpin + Send + Sync + 'static {
    fn inlet(inlets: &Inlets) -> &mpsc::Sender<io::Result<Connection<Self>>>
    where
        Self: Sized;

    /// Carries bytes both ways until one side ends.
    fn forward(&mut self, leader: &Lead) -> impl Future<Output = io::Result<()>> + Send;
}

impl Stream for TcpStream {
    fn inlet(inlets: &Inlets) -> &mpsc::Sender<io::Result<Connection<Self>>> {
        &inlets.tcp
    }

    async fn forward(&mut self, leader: &Lead) -> io::Result<()> {
        let mut there = connect_tcp(leader).await.map_err(not_there)?;
        copy_bidirectional(self, &mut there).await.map(drop)
    }
}

impl Stream for UnixStream {
    fn inlet(inlets: &Inlets) -> &mpsc::Sender<io::Result<Connection<Self>>> {
        &inlets.unix
    }

    async fn forward(&mut self, leader: &Lead) -> io::Result<()> {
        // The leader believes this server.
        let uid = self.peer_cred()?.uid();
        if !auth::is_root(uid) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let there = timeout(CONNECT_MAX, connect::stream(&leader.credentials()?)).await;
        let there = there.map_err(io::Error::from).and_then(|there| there.map_err(io::Error::other));
        copy_bidirectional(self, &mut there.map_err(not_there)?).await.map(drop)
    }
}

/// Nothing of the connection was used: it may be carried another way.
fn not_there(error: io::Error) -> io::Error {
    io::Error::new(io::ErrorKind::HostUnreachable, error)
}

async fn connect_tcp(leader: &Lead) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the leader has no address");
    for server in &leader.servers {
        match timeout(CONNECT_MAX, TcpStream::connect(server)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => last = error,
            Err(elapsed) => last = elapsed.into(),
        }
    }
    Err(last)
}

async fn accept<L>(listener: L, bound: Arc<Semaphore>, mode: watch::Receiver<Mode>, sorry: Inlets)
where
    L: Accept + Sync,
    L::Io: Stream,
{
    // Those that are open end with the front, too.
    let mut open = JoinSet::new();
    while let Ok(counted) = bound.clone().acquire_owned().await {
        match listener.next().await {
            Ok(io) => {
                open.spawn(direct(Connection::new(io, counted), mode.clone(), sorry.clone()));
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                sleep(net::ACCEPT_PAUSE).await;
            }
        }
        while open.try_join_next().is_some() {}
    }
}

async fn direct<S: Stream>(mut connection: Connection<S>, mut mode: watch::Receiver<Mode>, sorry: Inlets) {
    let end = Instant::now() + LEADER_WAIT;
    while Instant::now() < end {
        let now = mode.borrow_and_update().clone();
        match now {
            Mode::Leads(inlets) => match S::inlet(&inlets).send(Ok(connection)).await {
                Err(mpsc::error::SendError(Ok(back))) => connection = back,
                _ => return,
            },
            Mode::Follows(leader) => tokio::select! {
                result = connection.io().forward(&leader) => match result {
                    Err(error) if error.kind() == io::ErrorKind::HostUnreachable => {
                        debug!(%error, "cannot reach the leader");
                    }
                    _ => return,
                },
                // Another leader: the client begins anew, there.
                _ = mode.changed() => return,
            },
            Mode::Nobody(_) => {
                let _ = timeout(end.saturating_duration_since(Instant::now()), mode.changed()).await;
                continue;
            }
        }
        sleep(RETRY).await;
    }
    // A server that ends takes no more.
    let _ = S::inlet(&sorry).send(Ok(connection)).await;
}
