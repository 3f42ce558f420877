//! TLS towards the server: one CA is trusted, the cluster's.
//!
//! A server whose CA takes the place of another shows the way to the one before it, too: a certificate that the old CA
//! has made for the new one. The CA is known by its fingerprint. With credentials the certificate itself is at hand; with a token the
//! server sends it in its chain, and a chain without it is refused.

use std::{sync::Arc, time::Duration};

use tokio_rustls::rustls::{
    self, CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::WebPkiClientVerifier,
    version::TLS13,
};

use x509_parser::{
    prelude::{FromDer as _, X509Certificate},
    time::ASN1Time,
};

use super::{ConnectError, Credentials};
use crate::token::Fingerprint;

const ALPN_HTTP2: &[u8] = b"h2";

pub(super) fn with_certificate(credentials: &Credentials) -> Result<Arc<ClientConfig>, ConnectError> {
    let ca = CertificateDer::from(credentials.ca_der.clone());
    let chain = vec![CertificateDer::from(credentials.certificate_der.clone()), ca.clone()];
    let key = PrivatePkcs8KeyDer::from(credentials.key_pkcs8_der.clone());
    let config = config(PinnedCa::new(Fingerprint::of(&ca), Some(ca)))
        .with_client_auth_cert(chain, PrivateKeyDer::Pkcs8(key))
        .map_err(ConnectError::Credentials)?;
    Ok(for_http2(config))
}

pub(super) fn with_fingerprint(fingerprint: Fingerprint) -> Arc<ClientConfig> {
    for_http2(config(PinnedCa::new(fingerprint, None)).with_no_client_auth())
}

type ConfigBuilder = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn config(verifier: PinnedCa) -> ConfigBuilder {
    ClientConfig::builder_with_provider(verifier.provider.clone())
        .with_protocol_versions(&[&TLS13])
        .expect("ring knows TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
}

fn for_http2(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    Arc::new(config)
}

/// The server showed a chain without the pinned CA.
#[derive(Debug, thiserror::Error)]
#[error("the CA is {found}, not {expected}")]
pub(super) struct AnotherCa {
    pub(super) found: Fingerprint,
    pub(super) expected: Fingerprint,
}

/// Trusts the certificate with one fingerprint as the only CA, and lets webpki check the rest.
#[derive(Debug)]
struct PinnedCa {
    fingerprint: Fingerprint,
    ca: Option<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl PinnedCa {
    fn new(fingerprint: Fingerprint, ca: Option<CertificateDer<'static>>) -> PinnedCa {
        PinnedCa { fingerprint, ca, provider: Arc::new(ring::default_provider()) }
    }

    /// The pinned CA, when the chain holds it or, with `ca` at hand, when the chain has no other.
    fn find_ca(&self, chain: &[CertificateDer<'_>]) -> Result<CertificateDer<'static>, AnotherCa> {
        let pinned = chain.iter().find(|certificate| Fingerprint::of(certificate) == self.fingerprint);
        match (pinned, &self.ca, chain.last()) {
            (Some(ca), _, _) => Ok(ca.clone().into_owned()),
            (None, Some(ca), None) => Ok(ca.clone()),
            (None, _, last) => {
                let found = Fingerprint::of(last.map_or(&[], |certificate| certificate.as_ref()));
                Err(AnotherCa { found, expected: self.fingerprint })
            }
        }
    }

    fn webpki(&self, ca: CertificateDer<'static>) -> Result<Arc<WebPkiServerVerifier>, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(ca)?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))
    }
}

/// Whether the CA has signed this certificate of a client, whenever that was.
pub(super) fn is_signed_by(certificate: &[u8], ca: &[u8]) -> bool {
    let certificate = CertificateDer::from(certificate.to_vec());
    let mut roots = RootCertStore::empty();
    if roots.add(CertificateDer::from(ca.to_vec())).is_err() {
        return false;
    }
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
    let at = within_validity(&certificate, UnixTime::now());
    verifier.is_ok_and(|verifier| verifier.verify_client_cert(&certificate, &[], at).is_ok())
}

/// The moment nearest to `now` at which the certificate itself is good.
pub fn within_validity(certificate: &CertificateDer<'_>, now: UnixTime) -> UnixTime {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return now };
    let seconds = |time: ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    let (first, last) = (seconds(parsed.validity().not_before), seconds(parsed.validity().not_after));
    UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs().min(last).max(first)))
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // Without a CA at hand, a server that sends its certificate alone is shown by that one.
        let alone = [end_entity.clone()];
        let chain = if intermediates.is_empty() && self.ca.is_none() { &alone } else { intermediates };
        let ca = self.find_ca(chain).map_err(|error| {
            rustls::Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(Arc::new(error))))
        })?;
        // The server's key lies beside the CA's: its certificate's end guards against nothing, and a clock that is off
        // must not cut anybody off.
        let at = within_validity(end_entity, now);
        self.webpki(ca)?.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, at)
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
