//! TLS towards those who come over TCP: the cluster's CA vouches for both ends.
//!
//! Who has no certificate gets as far as enrollment, who has one of another CA gets no connection. That a certificate
//! has ended is not found out here but with each call, so that it can be said in words, and so that a node whose
//! certificate has ended while it was cut off can have another. The server's own certificate is looked up for each
//! connection: it is replaced while others go on.

use std::{
    io,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context as _;
use hextet_api::connect::within_validity;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    time::{interval, timeout},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
        client::danger::HandshakeSignatureValid,
        crypto::{CryptoProvider, ring},
        pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
        server::{
            ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
            danger::{ClientCertVerified, ClientCertVerifier},
        },
        sign::CertifiedKey,
        version::TLS13,
    },
    server::TlsStream,
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tracing::{debug, info, warn};

use crate::{hub::Hub, pki::Pki};

/// How long a connection may take to prove who it is.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How often it is looked whether the server's own certificate ends soon.
const LOOK_INTERVAL: Duration = Duration::from_secs(3600);
const ALPN_HTTP2: &[u8] = b"h2";

/// What the server shows of itself, to every connection from the next one on.
#[derive(Debug)]
pub(crate) struct Shown(RwLock<Arc<CertifiedKey>>);

impl Shown {
    pub(crate) fn new(pki: &Pki) -> anyhow::Result<Shown> {
        let (chain, key) = pki.server_identity_pem();
        Ok(Shown(RwLock::new(Arc::new(certified(&chain, &key)?))))
    }

    pub(crate) fn replace(&self, pki: &Pki) -> anyhow::Result<()> {
        let (chain, key) = pki.server_identity_pem();
        let next = Arc::new(certified(&chain, &key)?);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }
}

/// Replaces the server's own certificate before it ends; connections that are there go on.
pub(crate) async fn keep_fresh(
    hub: Arc<Hub>,
    shown: Arc<Shown>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let looks = async {
        let mut ticks = interval(LOOK_INTERVAL);
        loop {
            ticks.tick().await;
            if let Err(error) = renew_own(&hub, &shown) {
                warn!("the server's certificate is kept: {error:#}");
            }
        }
    };
    tokio::select! {
        () = stop => Ok(()),
        never = looks => never,
    }
}

fn renew_own(hub: &Hub, shown: &Shown) -> anyhow::Result<()> {
    let now = hub.clock.wall();
    if hub.pki.server_is_due(now) {
        hub.pki.renew_server(now)?;
        shown.replace(&hub.pki)?;
        info!("the server has a new certificate");
    }
    Ok(())
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _client: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

fn certified(chain: &str, key: &str) -> anyhow::Result<CertifiedKey> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(chain.as_bytes())
        .collect::<Result<_, _>>()
        .context("the server's certificate cannot be read")?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).context("the server's key cannot be read")?;
    CertifiedKey::from_der(chain, key, &ring::default_provider()).context("the server's key cannot be used")
}

/// How the server speaks TLS.
pub(crate) fn acceptor(pki: &Pki, shown: Arc<Shown>) -> anyhow::Result<TlsAcceptor> {
    let provider = Arc::new(ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .context("ring knows TLS 1.3")?
        .with_client_cert_verifier(Arc::new(Clients::of(pki, provider)?))
        .with_cert_resolver(shown);
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    // Who connects again proves again who it is.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Lets connections through when they have spoken TLS. Each holds its place among those that are counted meanwhile, and
/// none waits for another.
pub(crate) fn handshakes<IO>(
    mut incoming: ReceiverStream<io::Result<IO>>,
    acceptor: TlsAcceptor,
) -> ReceiverStream<io::Result<TlsStream<IO>>>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (out, accepted) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let next = tokio::select! {
                next = incoming.next() => next,
                () = out.closed() => return,
            };
            let Some(Ok(io)) = next else { return };
            tokio::spawn(handshake(io, acceptor.clone(), out.clone()));
        }
    });
    ReceiverStream::new(accepted)
}

async fn handshake<IO>(io: IO, acceptor: TlsAcceptor, out: mpsc::Sender<io::Result<TlsStream<IO>>>)
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    match timeout(HANDSHAKE_MAX, acceptor.accept(io)).await {
        // Without a receiver the server stops.
        Ok(Ok(stream)) => drop(out.send(Ok(stream)).await),
        Ok(Err(error)) => debug!(%error, "a connection did not get through TLS"),
        Err(_) => debug!("a connection did not get through TLS in time"),
    }
}

/// Whose certificate the CA has signed, whenever that was.
#[derive(Debug)]
struct Clients {
    webpki: Arc<dyn ClientCertVerifier>,
}

impl Clients {
    fn of(pki: &Pki, provider: Arc<CryptoProvider>) -> anyhow::Result<Clients> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(pki.ca_der().to_vec())).context("the CA cannot be used")?;
        let webpki = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .allow_unauthenticated()
            .build()
            .context("the CA cannot be used")?;
        Ok(Clients { webpki })
    }
}

impl ClientCertVerifier for Clients {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.webpki.verify_client_cert(end_entity, intermediates, within_validity(end_entity, now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}
