//! One connection, made now: a Unix socket, or TCP and TLS to the first server that answers.

use std::{collections::BTreeMap, io, path::Path, sync::Arc, time::Duration};

use tokio::{
    net::{TcpStream, UnixStream},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{self, ClientConfig, pki_types::ServerName},
};

use super::{CONNECT_TIMEOUT, ConnectError, SERVER_NAME, tls::AnotherCa};

/// How long a server may be silent before the next one is tried as well.
const PATIENCE: Duration = Duration::from_millis(500);

pub(super) async fn socket(path: &Path) -> Result<UnixStream, ConnectError> {
    UnixStream::connect(path)
        .await
        .map_err(|source| ConnectError::Socket { path: path.to_path_buf(), source })
}

/// Tries the servers in order; gives the first connection that is there, and the server that it is to. One that
/// does not answer for a moment is not given up, but the next is tried beside it.
pub(super) async fn any(
    servers: &[String],
    config: &Arc<ClientConfig>,
) -> Result<(TlsStream<TcpStream>, String), ConnectError> {
    let mut waiting = servers.iter().enumerate();
    let mut trying = JoinSet::new();
    let mut errors = BTreeMap::new();
    loop {
        if let Some((number, server)) = waiting.next() {
            let (server, config) = (server.clone(), config.clone());
            trying.spawn(async move { (number, one(&server, &config).await, server) });
        }
        let patience = if waiting.len() == 0 { CONNECT_TIMEOUT * 2 } else { PATIENCE };
        match timeout(patience, trying.join_next()).await {
            Ok(Some(Ok((_, Ok(stream), server)))) => return Ok((stream, server)),
            Ok(Some(Ok((number, Err(error), server)))) => {
                tracing::debug!(%server, "{}", super::chain(&error));
                errors.insert(number, error);
            }
            Ok(Some(Err(ended))) => tracing::debug!(%ended, "an attempt to connect has ended"),
            Ok(None) => break,
            Err(_) => {}
        }
    }
    let mut errors: Vec<ConnectError> = errors.into_values().collect();
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
