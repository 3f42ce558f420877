//! One connection, made now: a Unix socket, or TCP and TLS to the first server that answers.

use std::{io, path::Path, sync::Arc};

use tokio::{
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{self, ClientConfig, pki_types::ServerName},
};

use super::{CONNECT_TIMEOUT, ConnectError, SERVER_NAME, tls::AnotherCa};

pub(super) async fn socket(path: &Path) -> Result<UnixStream, ConnectError> {
    UnixStream::connect(path)
        .await
        .map_err(|source| ConnectError::Socket { path: path.to_path_buf(), source })
}

/// Tries the servers in order; gives the connection and the server that it is to.
pub(super) async fn any(
    servers: &[String],
    config: &Arc<ClientConfig>,
) -> Result<(TlsStream<TcpStream>, String), ConnectError> {
    let mut errors = Vec::new();
    for server in servers {
        match one(server, config).await {
            Ok(stream) => return Ok((stream, server.clone())),
            Err(error) => {
                tracing::debug!(%server, "{}", super::chain(&error));
                errors.push(error);
            }
        }
    }
    Err(match errors.len() {
        0 => ConnectError::NoServers,
        1 => errors.remove(0),
        _ => ConnectError::All(errors),
    })
}

async fn one(server: &str, config: &Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, ConnectError> {
    match timeout(CONNECT_TIMEOUT, tcp_and_tls(server, config)).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::Timeout { server: server.to_owned() }),
    }
}

async fn tcp_and_tls(server: &str, config: &Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, ConnectError> {
    let tcp = |source| ConnectError::Tcp { server: server.to_owned(), source };
    let stream = TcpStream::connect(server).await.map_err(tcp)?;
    stream.set_nodelay(true).map_err(tcp)?;
    let name = ServerName::try_from(SERVER_NAME).expect("it is a DNS name");
    TlsConnector::from(config.clone()).connect(name, stream).await.map_err(|error| tls_error(server, error))
}

/// Finds in what TLS said that the CA is another one.
fn tls_error(server: &str, error: io::Error) -> ConnectError {
    let server = server.to_owned();
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    if let Some(rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other))) = inner
        && let Some(AnotherCa { found, expected }) = other.0.downcast_ref::<AnotherCa>()
    {
        return ConnectError::AnotherCluster { server, found: *found, expected: *expected };
    }
    ConnectError::Tls { server, source: error }
}
