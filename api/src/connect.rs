//! Connections to the server: over its Unix socket, with a certificate, or with a token to get one.
//!
//! Every connection over TCP is TLS 1.3 and pins the cluster's own CA; the system's trust store is not
//! read. A [`Channel`] reconnects by itself, trying the servers in order each time; what a caller does with
//! a call that failed is the caller's to decide.

mod credentials;
mod dial;
mod enroll;
mod renew;
mod tls;

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

pub use self::{
    credentials::{Credentials, CredentialsError, Key},
    enroll::{EnrollError, Enrolled, Wish, enroll},
    renew::{RENEW_BEFORE, RenewError, confirm, renew, renew_kept},
    tls::within_validity,
};
use crate::token::{Fingerprint, Token};

/// The DNS name in the certificate of every server of every cluster.
pub const SERVER_NAME: &str = "hextet-server";

/// How long one server may take to accept a connection and finish the TLS handshake.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often an idle connection is probed.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// How long a probe may go unanswered before the connection counts as lost.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The credentials or the token name no server.
    #[error("no server is named: log in again with a new token")]
    NoServers,
    /// The socket cannot be opened.
    #[error("cannot reach the server at {}", path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No TCP connection.
    #[error("cannot reach the server at {server}")]
    Tcp {
        /// `host:port`.
        server: String,
        /// What the system said.
        source: io::Error,
    },
    /// Nothing answered in [`CONNECT_TIMEOUT`].
    #[error("the server at {server} did not answer within {} s: is its port open to this machine?", CONNECT_TIMEOUT.as_secs())]
    Timeout {
        /// `host:port`.
        server: String,
    },
    /// The server shows another CA.
    #[error(
        "the server at {server} is of another cluster, or its cluster has replaced its CA since: its CA is {found}, the \
             expected one is {expected}; take a new token of the cluster that you mean"
    )]
    AnotherCluster {
        /// `host:port`.
        server: String,
        /// The fingerprint of the last certificate that it showed.
        found: Fingerprint,
        /// The pinned one.
        expected: Fingerprint,
    },
    /// Something else listens there, or the certificate is not the server's.
    #[error("no TLS with the server at {server}: is it `netctl server` that listens there?")]
    Tls {
        /// `host:port`.
        server: String,
        /// What TLS said.
        source: io::Error,
    },
    /// The certificate or key cannot be used.
    #[error("the certificate or key in the credentials cannot be used: log in again with a new token")]
    Credentials(#[source] tokio_rustls::rustls::Error),
    /// The connection ended before the first call.
    #[error("the server at {server} ended the connection at once")]
    Http {
        /// `host:port` or a path.
        server: String,
        /// What HTTP/2 said.
        source: tonic::transport::Error,
    },
    /// Several servers were tried in vain.
    #[error("none of the servers can be used: {}", list(.0))]
    All(Vec<ConnectError>),
}

impl ConnectError {
    /// Whether a server was reached that shows another CA.
    #[must_use]
    pub fn is_another_ca(&self) -> bool {
        match self {
            ConnectError::AnotherCluster { .. } => true,
            ConnectError::All(errors) => errors.iter().any(ConnectError::is_another_ca),
            _ => false,
        }
    }
}

/// Connects to the server's Unix socket, which serves root on its machine.
///
/// # Errors
/// [`ConnectError::Socket`] or [`ConnectError::Http`].
pub async fn unix(path: &Path) -> Result<Channel, ConnectError> {
    let first = dial::socket(path).await?;
    let path = path.to_path_buf();
    let server = path.display().to_string();
    let redial = {
        let path = path.clone();
        move || {
            let path = path.clone();
            async move { dial::socket(&path).await }
        }
    };
    channel(server, first, redial).await
}

/// Connects with a certificate, to the first of its servers that answers.
///
/// # Errors
/// What went wrong with the server, or [`ConnectError::All`] when there are several.
pub async fn mutual_tls(credentials: &Credentials) -> Result<Channel, ConnectError> {
    mutual_tls_and_ca(credentials).await.map(|(channel, _)| channel)
}

/// The same, and whether another CA than that of the credentials makes certificates by now: they are to be renewed then,
/// whenever they end.
///
/// # Errors
/// As [`mutual_tls`].
pub async fn mutual_tls_and_ca(credentials: &Credentials) -> Result<(Channel, bool), ConnectError> {
    let config = tls::with_certificate(credentials)?;
    let (first, server) = dial::any(&credentials.servers, &config).await?;
    let has_moved = has_another_ca(&first, &credentials.ca_der);
    let servers = credentials.servers.clone();
    let redial = move || {
        let (servers, config) = (servers.clone(), config.clone());
        async move { Ok(dial::any(&servers, &config).await?.0) }
    };
    Ok((channel(server, first, redial).await?, has_moved))
}

/// A server shows its own certificate and next the CA that has made it.
fn has_another_ca(stream: &TlsStream<TcpStream>, ca: &[u8]) -> bool {
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.get(1));
    shown.is_some_and(|shown| shown.as_ref() != ca)
}

/// One connection with a certificate, for bytes that are HTTP/2 already.
///
/// # Errors
/// As [`mutual_tls`].
pub async fn stream(credentials: &Credentials) -> Result<TlsStream<TcpStream>, ConnectError> {
    let config = tls::with_certificate(credentials)?;
    Ok(dial::any(&credentials.servers, &config).await?.0)
}

/// Connects without a certificate, to be enrolled; gives the server that answered too.
///
/// The server must show the CA whose fingerprint the token holds, and a certificate that it signed.
///
/// # Errors
/// What went wrong with the server, or [`ConnectError::All`] when there are several.
pub async fn enrollment(token: &Token) -> Result<(Channel, String), ConnectError> {
    let config = tls::with_fingerprint(token.fingerprint);
    let (first, server) = dial::any(&token.servers, &config).await?;
    let servers = token.servers.clone();
    let redial = move || {
        let (servers, config) = (servers.clone(), config.clone());
        async move { Ok(dial::any(&servers, &config).await?.0) }
    };
    let channel = channel(server.clone(), first, redial).await?;
    Ok((channel, server))
}

/// A channel over `first`, and over what `redial` gives once that has ended.
///
/// The first connection is made by the caller, so that its error keeps its type.
async fn channel<Io, Redial, Dialled>(
    server: String,
    first: Io,
    redial: Redial,
) -> Result<Channel, ConnectError>
where
    Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    Redial: Fn() -> Dialled + Clone + Send + 'static,
    Dialled: Future<Output = Result<Io, ConnectError>> + Send,
{
    let mut first = Some(first);
    let connector = tower::service_fn(move |_| {
        let ready = first.take();
        let redial = redial.clone();
        async move {
            match ready {
                Some(io) => Ok(TokioIo::new(io)),
                None => redial().await.map(TokioIo::new),
            }
        }
    });
    // The scheme is http because the connector speaks TLS by itself.
    Endpoint::from_static("http://hextet-server")
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|source| ConnectError::Http { server, source })
}

fn list(errors: &[ConnectError]) -> String {
    let texts: Vec<String> = errors.iter().map(chain).collect();
    texts.join("; ")
}

fn chain(error: &ConnectError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
