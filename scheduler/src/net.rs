//! Listening sockets, a bound on connections, and the addresses that a token names.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::{fs::PermissionsExt as _, net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::OwnedSemaphorePermit,
};
use tonic::transport::server::Connected;

/// Connections over TCP at a time; the next waits in the kernel's queue.
pub(crate) const CONNECTIONS_MAX: usize = 8192;
/// Connections over the Unix socket at a time.
pub(crate) const SOCKET_CONNECTIONS_MAX: usize = 256;
/// How long to wait after the system could not accept a connection, such as for want of file descriptors.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The most addresses in a token.
const ADVERTISED_MAX: usize = 8;

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    #[error("cannot listen on {address}")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("cannot make the socket {path}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("another server answers on the socket {0}: stop it, or choose another with --socket")]
    SocketInUse(PathBuf),
}

/// A connection, counted for as long as it lives.
pub(crate) struct Connection<IO> {
    io: IO,
    _counted: OwnedSemaphorePermit,
}

impl<IO> Connection<IO> {
    pub(crate) fn new(io: IO, counted: OwnedSemaphorePermit) -> Connection<IO> {
        Connection { io, _counted: counted }
    }

    pub(crate) fn io(&mut self) -> &mut IO {
        &mut self.io
    }
}

/// A socket that connections come to.
pub(crate) trait Accept: Send + 'static {
    /// A connection.
    type Io: Send + Sync + 'static;

    /// Takes the next one.
    fn next(&self) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

impl Accept for TcpListener {
    type Io = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        let (stream, _) = self.accept().await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl Accept for UnixListener {
    type Io = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

/// Listens on TCP.
pub(crate) async fn bind_tcp(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ListenError> {
    let failed = |source| ListenError::Tcp { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Makes the Unix socket, for its owner alone. It gets its name only when its mode is set, so that nobody
/// else can open it in between; what a server that has died left behind is replaced.
pub(crate) fn bind_unix(path: &Path) -> Result<UnixListener, ListenError> {
    if StdUnixStream::connect(path).is_ok() {
        return Err(ListenError::SocketInUse(path.to_owned()));
    }
    let failed = |source| ListenError::Socket { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let temporary = path.with_extension(format!("new-{}", std::process::id()));
    remove_if_there(&temporary).map_err(failed)?;
    let listener = UnixListener::bind(&temporary).map_err(failed)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)?;
    Ok(listener)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Where others reach sockets that listen on `bound`: their own addresses, and for the unspecified one those
/// of the machine that others can reach, IPv6 first.
pub(crate) fn advertised(bound: &[SocketAddr]) -> Vec<String> {
    let machine = machine_addresses();
    let mut found = Vec::new();
    for address in bound {
        let reachable: Vec<IpAddr> = match address.ip() {
            IpAddr::V6(ip) if ip.is_unspecified() => machine.clone(),
            IpAddr::V4(ip) if ip.is_unspecified() => {
                machine.iter().filter(|ip| ip.is_ipv4()).copied().collect()
            }
            ip => vec![ip],
        };
        found.extend(reachable.into_iter().map(|ip| SocketAddr::new(ip, address.port()).to_string()));
    }
    if found.is_empty() {
        // A machine without any address still serves its own pods.
        found.extend(bound.iter().map(|address| format!("[::1]:{}", address.port())));
    }
    found.dedup();
    found.truncate(ADVERTISED_MAX);
    found
}

/// Addresses of interfaces that are up, without loopback and link-local ones, IPv6 first.
fn machine_addresses() -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = Vec::new();
    for interface in getifaddrs().into_iter().flatten() {
        let up = interface.flags.contains(InterfaceFlags::IFF_UP);
        let ours = interface.interface_name.starts_with("hx");
        let Some(address) = interface.address.filter(|_| up && !ours) else { continue };
        let six = address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip()));
        let four = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        found.extend(six.or(four).filter(is_reachable));
    }
    found.sort_by_key(IpAddr::is_ipv4);
    found.dedup();
    found
}

fn is_reachable(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_multicast(),
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
    }
}

impl<IO: Connected> Connected for Connection<IO> {
    type ConnectInfo = IO::ConnectInfo;

    fn connect_info(&self) -> IO::ConnectInfo {
        self.io.connect_info()
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Connection<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Connection<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_was_given_is_advertised_as_it_is() {
        let bound = ["192.0.2.1:4679", "[2001:db8::1]:4679"].map(|text| text.parse().unwrap());
        assert_eq!(advertised(&bound), ["192.0.2.1:4679", "[2001:db8::1]:4679"]);
    }

    #[test]
    fn there_is_always_an_address_and_never_the_unspecified_one() {
        let found = advertised(&["[::]:4679".parse().unwrap()]);
        assert!((1..=ADVERTISED_MAX).contains(&found.len()), "{found:?}");
        assert!(found.iter().all(|address| !address.starts_with("[::]") && address.ends_with(":4679")));
    }

    #[tokio::test]
    async fn the_socket_is_its_owners_and_there_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/server.sock");
        let first = bind_unix(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = bind_unix(&path).unwrap_err().to_string();
        assert!(error.starts_with("another server answers on the socket"), "{error}");
        drop(first);
        bind_unix(&path).unwrap();
    }
}
