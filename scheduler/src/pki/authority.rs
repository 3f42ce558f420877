//! A CA with its key, and all that a cluster has of them at a time.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use ring::digest::{SHA256, digest};
use scheduler_core::authority::Authorities;
use serde::{Deserialize, Serialize};
use x509_parser::{
    extensions::ParsedExtension,
    pem::parse_x509_pem,
    prelude::{FromDer as _, X509Certificate},
};

use super::{PkiError, leaf};

/// What makes a CA: every server of a cluster has it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Authority {
    certificate_pem: String,
    key_pem: String,
}

/// The CAs that servers have keys of.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Keyring {
    /// The one that makes certificates.
    pub(crate) issuing: Authority,
    /// The one that goes out of use, or one that is to come into use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) others: Vec<Authority>,
}

/// A CA that is ready for use.
pub(crate) struct Ca {
    pub(crate) der: Vec<u8>,
    /// SHA-256 of the certificate.
    pub(crate) fingerprint: [u8; 32],
    /// How certificates name the key that signed them (RFC 5280 section 4.2.1.2).
    pub(crate) key_id: Vec<u8>,
    pub(crate) issuer: Issuer<'static, KeyPair>,
    name: String,
}

impl Authority {
    /// The one with which a cluster begins.
    pub(crate) fn make(epoch: &str) -> Result<Authority, PkiError> {
        Authority::named(&format!("hextet cluster {}", epoch.get(..8).unwrap_or(epoch)))
    }

    /// One that takes the place of another: by its name they are told apart.
    pub(crate) fn make_next(epoch: &str) -> Result<Authority, PkiError> {
        let cluster = epoch.get(..8).unwrap_or(epoch);
        Authority::named(&format!("hextet cluster {cluster} ca {:016x}", rand::random::<u64>()))
    }

    fn named(name: &str) -> Result<Authority, PkiError> {
        let key = KeyPair::generate().map_err(PkiError::Make)?;
        let certificate = params(name).and_then(|params| params.self_signed(&key)).map_err(PkiError::Make)?;
        Ok(Authority { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// As it is in two files.
    pub(crate) fn of_pem(certificate_pem: String, key_pem: String) -> Authority {
        Authority { certificate_pem, key_pem }
    }

    pub(crate) fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    pub(crate) fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// SHA-256 of the certificate, in hex; empty when that cannot be read.
    pub(crate) fn fingerprint(&self) -> String {
        der(&self.certificate_pem).map(|der| super::sha256_hex(&der)).unwrap_or_default()
    }

    pub(super) fn ready(&self) -> Result<Ca, rcgen::Error> {
        let der = der(&self.certificate_pem)?;
        let (key_id, name) = key_id_and_name(&der).ok_or(rcgen::Error::CouldNotParseCertificate)?;
        let key = KeyPair::from_pem(&self.key_pem)?;
        let issuer = Issuer::from_ca_cert_pem(&self.certificate_pem, key)?;
        let fingerprint = digest(&SHA256, &der).as_ref().try_into().expect("SHA-256 has 32 bytes");
        Ok(Ca { der, fingerprint, key_id, issuer, name })
    }
}

impl Ca {
    pub(crate) fn fingerprint_hex(&self) -> String {
        super::sha256_hex(&self.der)
    }

    /// A certificate by `other` for this one: whoever believes that one can go on from there.
    pub(super) fn vouched_by(&self, other: &Ca) -> Result<Vec<u8>, rcgen::Error> {
        Ok(params(&self.name)?.signed_by(self.issuer.key(), &other.issuer)?.der().to_vec())
    }
}

impl Keyring {
    pub(crate) fn of(issuing: Authority) -> Keyring {
        Keyring { issuing, others: Vec::new() }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Authority> {
        std::iter::once(&self.issuing).chain(&self.others)
    }

    /// The same with one that is to come into use.
    pub(crate) fn with(&self, next: Authority) -> Keyring {
        let mut keyring = self.clone();
        keyring.others.push(next);
        keyring
    }

    /// What the state asks for; none when a key of it is missing.
    pub(crate) fn as_wanted(&self, wanted: &Authorities) -> Option<Keyring> {
        let find = |ca: &str| self.all().find(|authority| authority.fingerprint() == ca).cloned();
        let others = match &wanted.leaving {
            Some(leaving) => vec![find(&leaving.ca)?],
            None => Vec::new(),
        };
        Some(Keyring { issuing: find(&wanted.issuing)?, others })
    }
}

/// The key that signed a certificate, as that names it.
pub(crate) fn signer(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|id| id.0.to_vec()),
        _ => None,
    })
}

fn key_id_and_name(certificate: &[u8]) -> Option<(Vec<u8>, String)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let key_id =
        certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        })?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
    Some((key_id, name))
}

pub(super) fn der(pem: &str) -> Result<Vec<u8>, rcgen::Error> {
    let parsed = parse_x509_pem(pem.as_bytes()).map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
    Ok(parsed.1.contents)
}

fn params(name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2070, 1, 1);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(leaf::serial());
    Ok(params)
}
