//! A connection that goes on as long as the CA that vouched for its other end is believed.
//!
//! The HTTP/2 layer probes every connection every ten seconds: one that is to end does so within that time also when
//! nobody says anything. Connections of nodes go on: what a node says is believed for its key, which is in the store.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::{
    identity,
    pki::{self, Pki},
};

/// A connection over TLS.
pub(crate) struct Vouched<IO> {
    stream: TlsStream<IO>,
    pki: Arc<Pki>,
    /// The key of the CA that signed the certificate of the other end; none for a node and who has no certificate.
    signer: Option<Vec<u8>>,
    /// How often something had changed in the certificates when it was last looked.
    changes: u64,
}

impl<IO> Vouched<IO> {
    pub(crate) fn new(stream: TlsStream<IO>, pki: Arc<Pki>) -> Vouched<IO> {
        let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let signer = leaf.filter(|leaf| !identity::is_node(leaf)).and_then(|leaf| pki::signer(leaf));
        // Whoever is not believed from the beginning is told so in words, by each call.
        let changes = pki.changes();
        Vouched { stream, pki, signer, changes }
    }

    fn check(&mut self) -> io::Result<()> {
        let Some(signer) = &self.signer else { return Ok(()) };
        let changes = self.pki.changes();
        if changes == self.changes {
            return Ok(());
        }
        self.changes = changes;
        if self.pki.believes(signer) {
            return Ok(());
        }
        // It is looked again each time from here on.
        self.changes = u64::MAX;
        Err(io::Error::new(
            io::ErrorKind::ConnectionAborted,
            "the CA of the certificate is not believed any more",
        ))
    }
}

impl<IO> Connected for Vouched<IO>
where
    TlsStream<IO>: Connected,
{
    type ConnectInfo = <TlsStream<IO> as Connected>::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Vouched<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Vouched<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
