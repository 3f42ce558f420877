//! TLS towards those who come over TCP: the cluster's CA vouches for both ends.
//!
//! Who has no certificate gets as far as enrollment, who has one of another CA gets no connection. That a certificate
//! has ended is not found out here but with each call, so that it can be said in words, and so that a node whose
//! certificate has ended while it was cut off can have another. The server's own certificate is looked up for each
//! connection: it is replaced while others go on.

use std::{
    collections::BTreeMap,
    fmt, io,
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
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tracing::{debug, info, warn};

use crate::{
    hub::Hub,
    pki::{self, Ca, Loaded, Pki},
    vouched::Vouched,
};

/// How long a connection may take to prove who it is.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How often it is looked whether the server's own certificate ends soon.
const LOOK_INTERVAL: Duration = Duration::from_secs(3600);
const ALPN_HTTP2: &[u8] = b"h2";

/// What the server shows of itself and whom it believes, for every connection from the next one on: what the [`Pki`]
/// has in use then.
#[derive(Debug)]
pub(crate) struct Shown {
    pki: Arc<Pki>,
    ready: RwLock<Arc<Ready>>,
}

/// One state of the [`Pki`], ready for handshakes.
struct Ready {
    of: Arc<Loaded>,
    certified: Arc<CertifiedKey>,
    /// By the key of the CA.
    clients: BTreeMap<Vec<u8>, Arc<dyn ClientCertVerifier>>,
}

impl Shown {
    pub(crate) fn new(pki: Arc<Pki>) -> anyhow::Result<Shown> {
        let ready = RwLock::new(Arc::new(Ready::of(pki.loaded())?));
        Ok(Shown { pki, ready })
    }

    fn ready(&self) -> Arc<Ready> {
        let (loaded, ready) =
            (self.pki.loaded(), self.ready.read().unwrap_or_else(PoisonError::into_inner).clone());
        if Arc::ptr_eq(&ready.of, &loaded) {
            return ready;
        }
        match Ready::of(loaded) {
            Ok(next) => {
                let next = Arc::new(next);
                *self.ready.write().unwrap_or_else(PoisonError::into_inner) = next.clone();
                next
            }
            Err(error) => {
                warn!("the certificates before these are used: {error:#}");
                ready
            }
        }
    }
}

impl Ready {
    fn of(loaded: Arc<Loaded>) -> anyhow::Result<Ready> {
        let certified = Arc::new(certified(&loaded.chain, loaded.server_key())?);
        let verifier = |ca: &Ca| Ok((ca.key_id.clone(), clients_of(&ca.der)?));
        let clients = loaded.cas.iter().map(verifier).collect::<anyhow::Result<_>>()?;
        Ok(Ready { of: loaded, certified, clients })
    }
}

impl fmt::Debug for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ready").field("version", &self.of.version).finish_non_exhaustive()
    }
}

/// Replaces the server's own certificate before it ends; connections that are there go on.
pub(crate) async fn keep_fresh(hub: Arc<Hub>, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let looks = async {
        let mut ticks = interval(LOOK_INTERVAL);
        loop {
            ticks.tick().await;
            if let Err(error) = renew_own(&hub) {
                warn!("the server's certificate is kept: {error:#}");
            }
        }
    };
    tokio::select! {
        () = stop => Ok(()),
        never = looks => never,
    }
}

fn renew_own(hub: &Hub) -> anyhow::Result<()> {
    let now = hub.clock.wall();
    if hub.pki.server_is_due(now) {
        hub.pki.renew_server(now)?;
        info!("the server has a new certificate");
    }
    Ok(())
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _client: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.ready().certified.clone())
    }
}

fn certified(chain: &[Vec<u8>], key: &str) -> anyhow::Result<CertifiedKey> {
    let chain = chain.iter().map(|der| CertificateDer::from(der.clone())).collect();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).context("the server's key cannot be read")?;
    CertifiedKey::from_der(chain, key, &ring::default_provider()).context("the server's key cannot be used")
}

/// How the server speaks TLS.
pub(crate) fn acceptor(shown: Arc<Shown>) -> anyhow::Result<TlsAcceptor> {
    let provider = Arc::new(ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .context("ring knows TLS 1.3")?
        .with_client_cert_verifier(Arc::new(Clients { shown: shown.clone(), provider }))
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
    pki: Arc<Pki>,
) -> ReceiverStream<io::Result<Vouched<IO>>>
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
            tokio::spawn(handshake(io, acceptor.clone(), pki.clone(), out.clone()));
        }
    });
    ReceiverStream::new(accepted)
}

async fn handshake<IO>(
    io: IO,
    acceptor: TlsAcceptor,
    pki: Arc<Pki>,
    out: mpsc::Sender<io::Result<Vouched<IO>>>,
) where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    match timeout(HANDSHAKE_MAX, acceptor.accept(io)).await {
        // Without a receiver the server stops.
        Ok(Ok(stream)) => drop(out.send(Ok(Vouched::new(stream, pki))).await),
        Ok(Err(error)) => debug!(%error, "a connection did not get through TLS"),
        Err(_) => debug!("a connection did not get through TLS in time"),
    }
}

/// Whose certificate a CA has signed that is in use, whenever that was.
#[derive(Debug)]
struct Clients {
    shown: Arc<Shown>,
    provider: Arc<CryptoProvider>,
}

fn clients_of(ca: &[u8]) -> anyhow::Result<Arc<dyn ClientCertVerifier>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(ca.to_vec())).context("the CA cannot be used")?;
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(ring::default_provider()))
        .allow_unauthenticated()
        .build()
        .context("the CA cannot be used")
}

impl ClientCertVerifier for Clients {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None are named: a client has one certificate, and shows it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    /// A certificate is held to the CA that it names, so that what it names can be relied on from here.
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let ready = self.shown.ready();
        let verifier = pki::signer(end_entity).and_then(|signer| ready.clients.get(&signer));
        let verifier =
            verifier.ok_or(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer))?;
        verifier.verify_client_cert(end_entity, intermediates, within_validity(end_entity, now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
