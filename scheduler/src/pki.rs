//! The cluster's certificate authority: made at the first start, and never seen by anybody but the server.
//!
//! Certificates are valid from a fixed day far in the past, so that a machine whose clock is off still gets
//! as far as being told so. Names inside a signing request are ignored: the server writes them.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock, RwLockReadGuard},
    time::Duration,
};

use hextet_api::connect::{Credentials, RENEW_BEFORE};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber, SigningKey, date_time_ymd,
};
use ring::digest::{SHA256, digest};
use scheduler_core::{event::Enrolled, time::WallTime};
use x509_parser::{
    certification_request::X509CertificationRequest, pem::parse_x509_pem, prelude::FromDer as _,
};

/// The DNS name in the server's certificate, wherever it listens.
pub const SERVER_NAME: &str = "hextet-server";

/// What a server's certificate towards another server says. No caller can be enrolled with it.
pub(crate) const SERVER_URI: &str = "hextet:server";

/// How long certificates of the server and its clients are good for, from the day on which they are made. Each is
/// replaced when less than [`RENEW_BEFORE`] is left.
const CERTIFICATE_VALID: Duration = Duration::from_secs(365 * 24 * 3600);
/// The server's key and certificate, and the two files that they had before.
const SERVER_FILE: &str = "server.pem";
const OLD_CERTIFICATE_FILE: &str = "server.crt";
const OLD_KEY_FILE: &str = "server.key";
const CSR_LEN_MAX: usize = 8 * 1024;

/// The CA and the server's own certificate.
pub struct Pki {
    ca_der: Vec<u8>,
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
    dir: PathBuf,
    server: RwLock<ServerPem>,
}

/// The server's own certificate and key, which live in one file so that they are replaced together.
#[derive(Clone)]
struct ServerPem {
    certificate: String,
    key: String,
}

/// What makes a CA: every server of a cluster has it.
#[derive(Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct Authority {
    certificate_pem: String,
    key_pem: String,
}

/// A public key whose holder has proved to have the private one.
pub struct SigningRequest {
    params: CertificateSigningRequestParams,
    /// SHA-256 of the public key, in hex.
    pub key: String,
}

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file or folder cannot be read or written.
    #[error("cannot {what} {path}")]
    Io {
        /// `read` or `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} is damaged: put the folder back as it was; without its CA no node can reach the server")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rcgen::Error,
    },
    /// The certificates and the store do not belong together.
    #[error(
        "the certificates in {path} are of cluster {found}, the store is of cluster {expected}: put back the one \
         that is missing, or move the whole state directory away and restore a backup with `netctl server restore`"
    )]
    AnotherCluster {
        /// The folder.
        path: PathBuf,
        /// Whose certificates are there.
        found: String,
        /// Whose store is there.
        expected: String,
    },
    /// The store is there and the folder is not.
    #[error(
        "the certificates in {0} are missing and the store is there: put the folder back, or move the state directory away and restore a backup with `netctl server restore`; without its CA no node can reach the server"
    )]
    Missing(PathBuf),
    /// Making or signing failed.
    #[error("cannot make a certificate")]
    Make(#[source] rcgen::Error),
    /// Not a signing request with a good signature.
    #[error("the certificate request is not one that is signed with its own key")]
    Request,
}

impl Pki {
    /// Reads the folder `dir`, or makes it when `is_new`. It remembers the `epoch` of its store.
    ///
    /// # Errors
    /// One sentence that says what is wrong and what to do.
    pub fn open(dir: &Path, epoch: &str, is_new: bool, now: WallTime) -> Result<Pki, PkiError> {
        if !dir.exists() {
            if !is_new {
                return Err(PkiError::Missing(dir.to_owned()));
            }
            make(dir, epoch, &Authority::make(epoch)?, now)?;
        }
        let found = read(&dir.join("epoch"))?.trim().to_owned();
        if found != epoch {
            let (path, expected) = (dir.to_owned(), epoch.to_owned());
            return Err(PkiError::AnotherCluster { path, found, expected });
        }
        load(dir)
    }

    /// Reads the folder `dir` of one of several servers, or makes it with their CA.
    ///
    /// # Errors
    /// As [`Pki::open`]; [`PkiError::AnotherCluster`] also when the folder has another CA.
    pub(crate) fn open_shared(
        dir: &Path,
        epoch: &str,
        authority: &Authority,
        now: WallTime,
    ) -> Result<Pki, PkiError> {
        if !dir.exists() {
            make(dir, epoch, authority, now)?;
        }
        let pki = Pki::open(dir, epoch, false, now)?;
        if pki.ca_pem.trim() == authority.certificate_pem.trim() {
            return Ok(pki);
        }
        let (path, found) = (dir.to_owned(), "another CA of the same name".to_owned());
        Err(PkiError::AnotherCluster { path, found, expected: epoch.to_owned() })
    }

    /// The CA with its key.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub(crate) fn authority(&self) -> Result<Authority, PkiError> {
        Ok(Authority { certificate_pem: self.ca_pem.clone(), key_pem: read(&self.dir.join("ca.key"))? })
    }

    /// What this server shows another one, to act for the root of its own machine.
    ///
    /// # Errors
    /// [`PkiError::Make`].
    pub(crate) fn server_credentials(
        &self,
        servers: &[String],
        now: WallTime,
    ) -> Result<Credentials, PkiError> {
        let key = KeyPair::generate().map_err(PkiError::Make)?;
        let mut params = leaf("server", now).map_err(PkiError::Make)?;
        let uri = SERVER_URI.to_owned().try_into().map_err(PkiError::Make)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(PkiError::Make)?;
        Ok(Credentials {
            name: "server".to_owned(),
            servers: servers.to_vec(),
            ca_der: self.ca_der.clone(),
            certificate_der: certificate.der().to_vec(),
            key_pkcs8_der: key.serialize_der(),
        })
    }

    /// SHA-256 of the CA's certificate.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        digest(&SHA256, &self.ca_der).as_ref().try_into().expect("SHA-256 has 32 bytes")
    }

    /// The CA's certificate.
    #[must_use]
    pub fn ca_der(&self) -> &[u8] {
        &self.ca_der
    }

    /// The CA's certificate.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The server's certificate and the CA's, and the server's key.
    #[must_use]
    pub fn server_identity_pem(&self) -> (String, String) {
        let server = self.server();
        (format!("{}{}", server.certificate, self.ca_pem), server.key.clone())
    }

    /// Whether the server's certificate ends soon.
    pub(crate) fn server_is_due(&self, now: WallTime) -> bool {
        let server = self.server();
        let Ok((_, pem)) = parse_x509_pem(server.certificate.as_bytes()) else { return true };
        let Ok(certificate) = pem.parse_x509() else { return true };
        let ends = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        now + RENEW_BEFORE >= WallTime(ends.saturating_mul(1000))
    }

    /// Replaces the server's key and certificate, on the disk first.
    ///
    /// # Errors
    /// The present ones stay.
    pub(crate) fn renew_server(&self, now: WallTime) -> Result<(), PkiError> {
        let next = ServerPem::make(&self.issuer, now)?;
        let path = self.dir.join(SERVER_FILE);
        let failed = |source| PkiError::Io { what: "write", path: path.clone(), source };
        let beside = path.with_extension("new");
        remove_if_there(&beside).map_err(failed)?;
        write_private(&beside, &next.text()).map_err(failed)?;
        fs::rename(&beside, &path).map_err(failed)?;
        sync_folder(&self.dir).map_err(failed)?;
        for old in [OLD_CERTIFICATE_FILE, OLD_KEY_FILE] {
            remove_if_there(&self.dir.join(old)).map_err(failed)?;
        }
        *self.server.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }

    fn server(&self) -> RwLockReadGuard<'_, ServerPem> {
        self.server.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client certificate for the request's public key, in DER.
    ///
    /// # Errors
    /// [`PkiError::Make`].
    pub fn sign(
        &self,
        request: SigningRequest,
        enrolled: &Enrolled,
        now: WallTime,
    ) -> Result<Vec<u8>, PkiError> {
        let mut csr = request.params;
        csr.params = leaf(&enrolled.name, now).map_err(PkiError::Make)?;
        let uri = enrolled.uri().try_into().map_err(PkiError::Make)?;
        csr.params.subject_alt_names = vec![SanType::URI(uri)];
        csr.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Ok(csr.signed_by(&self.issuer).map_err(PkiError::Make)?.der().to_vec())
    }
}

impl SigningRequest {
    /// Reads a PKCS #10 request and checks its signature.
    ///
    /// # Errors
    /// [`PkiError::Request`].
    pub fn parse(der: &[u8]) -> Result<SigningRequest, PkiError> {
        if der.len() > CSR_LEN_MAX {
            return Err(PkiError::Request);
        }
        let (rest, csr) = X509CertificationRequest::from_der(der).map_err(|_| PkiError::Request)?;
        if !rest.is_empty() {
            return Err(PkiError::Request);
        }
        let key = sha256_hex(csr.certification_request_info.subject_pki.raw);
        // This checks the signature.
        let params = CertificateSigningRequestParams::from_der(&der.into()).map_err(|_| PkiError::Request)?;
        Ok(SigningRequest { params, key })
    }
}

/// SHA-256, in hex.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Authority {
    /// A new one.
    pub(crate) fn make(epoch: &str) -> Result<Authority, PkiError> {
        let key = KeyPair::generate().map_err(PkiError::Make)?;
        let params = ca_params(epoch).map_err(PkiError::Make)?;
        let certificate = params.self_signed(&key).map_err(PkiError::Make)?;
        Ok(Authority { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }
}

/// Makes all files in a folder beside `dir` and then gives it its name: a crash leaves all or nothing.
fn make(dir: &Path, epoch: &str, authority: &Authority, now: WallTime) -> Result<(), PkiError> {
    let ca_key = KeyPair::from_pem(&authority.key_pem).map_err(PkiError::Make)?;
    let issuer = Issuer::from_ca_cert_pem(&authority.certificate_pem, ca_key).map_err(PkiError::Make)?;

    let server = ServerPem::make(&issuer, now)?;

    let temporary = dir.with_extension("new");
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| PkiError::Io { what: "write", path, source }
    };
    if temporary.exists() {
        fs::remove_dir_all(&temporary).map_err(failed(&temporary))?;
    }
    fs::DirBuilder::new().mode(0o700).create(&temporary).map_err(failed(&temporary))?;
    let files = [
        ("ca.key", authority.key_pem.clone()),
        ("ca.crt", authority.certificate_pem.clone()),
        (SERVER_FILE, server.text()),
        ("epoch", format!("{epoch}\n")),
    ];
    for (name, text) in files {
        let path = temporary.join(name);
        write_private(&path, &text).map_err(failed(&path))?;
    }
    sync_folder(&temporary).map_err(failed(&temporary))?;
    fs::rename(&temporary, dir).map_err(failed(dir))?;
    dir.parent().map_or(Ok(()), sync_folder).map_err(failed(dir))
}

fn ca_params(epoch: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params
        .distinguished_name
        .push(DnType::CommonName, format!("hextet cluster {}", epoch.get(..8).unwrap_or(epoch)));
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2070, 1, 1);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial());
    Ok(params)
}

/// What certificates of servers and clients have in common.
fn leaf(name: &str, now: WallTime) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2020, 1, 1);
    // A clock that is before this was written is wrong.
    let from = (date_time_ymd(1970, 1, 1) + Duration::from_millis(now.0)).max(date_time_ymd(2026, 11, 1));
    params.not_after = (from + CERTIFICATE_VALID).min(date_time_ymd(2070, 1, 1));
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    Ok(params)
}

/// RFC 5280 section 4.1.2.2: positive, at most 20 octets, and not to be guessed.
fn serial() -> SerialNumber {
    let mut bytes = [0; 16];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut bytes);
    bytes[0] &= 0x7F;
    SerialNumber::from_slice(&bytes)
}

/// The epoch that a folder of certificates is for; empty when there is none.
pub(crate) fn epoch(dir: &Path) -> String {
    fs::read_to_string(dir.join("epoch")).unwrap_or_default().trim().to_owned()
}

fn load(dir: &Path) -> Result<Pki, PkiError> {
    let damaged = |name: &str| {
        let path = dir.join(name);
        move |source| PkiError::Damaged { path, source }
    };
    let ca_pem = read(&dir.join("ca.crt"))?;
    let not_pem = |_| rcgen::Error::CouldNotParseCertificate;
    let ca_der = parse_x509_pem(ca_pem.as_bytes()).map_err(not_pem).map_err(damaged("ca.crt"))?.1.contents;
    let ca_key = KeyPair::from_pem(&read(&dir.join("ca.key"))?).map_err(damaged("ca.key"))?;
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key).map_err(damaged("ca.crt"))?;
    let server = RwLock::new(ServerPem::read(dir)?);
    Ok(Pki { ca_der, ca_pem, issuer, dir: dir.to_owned(), server })
}

impl ServerPem {
    fn make(issuer: &Issuer<'_, impl SigningKey>, now: WallTime) -> Result<ServerPem, PkiError> {
        let key = KeyPair::generate().map_err(PkiError::Make)?;
        let mut params = leaf(SERVER_NAME, now).map_err(PkiError::Make)?;
        let name = SERVER_NAME.to_owned().try_into().map_err(PkiError::Make)?;
        params.subject_alt_names = vec![SanType::DnsName(name)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, issuer).map_err(PkiError::Make)?;
        Ok(ServerPem { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    fn text(&self) -> String {
        format!("{}{}", self.key, self.certificate)
    }

    /// From the one file, or from the two that a cluster of before has.
    fn read(dir: &Path) -> Result<ServerPem, PkiError> {
        let damaged = |name: &str, source| PkiError::Damaged { path: dir.join(name), source };
        if !dir.join(SERVER_FILE).exists() {
            let key = read(&dir.join(OLD_KEY_FILE))?;
            let certificate = read(&dir.join(OLD_CERTIFICATE_FILE))?;
            KeyPair::from_pem(&key).map_err(|error| damaged(OLD_KEY_FILE, error))?;
            return ServerPem { certificate, key }
                .checked()
                .map_err(|error| damaged(OLD_CERTIFICATE_FILE, error));
        }
        let text = read(&dir.join(SERVER_FILE))?;
        let begin = text.find("-----BEGIN CERTIFICATE").unwrap_or(text.len());
        let (key, certificate) = text.split_at(begin);
        let server = ServerPem { certificate: certificate.to_owned(), key: key.to_owned() };
        server.checked().map_err(|error| damaged(SERVER_FILE, error))
    }

    fn checked(self) -> Result<ServerPem, rcgen::Error> {
        KeyPair::from_pem(&self.key)?;
        parse_x509_pem(self.certificate.as_bytes()).map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
        Ok(self)
    }
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::Io { what: "read", path: path.to_owned(), source })
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn sync_folder(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use x509_parser::prelude::X509Certificate;

    use super::*;

    const EPOCH: &str = "0123456789abcdef0123456789abcdef";
    const NOW: WallTime = WallTime(1_795_265_640_000);

    #[test]
    fn the_authority_is_made_once_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki");
        let made = Pki::open(&path, EPOCH, true, NOW).unwrap();
        let again = Pki::open(&path, EPOCH, false, NOW).unwrap();
        assert_eq!(made.fingerprint(), again.fingerprint());
        let mode = |name: &str| fs::metadata(path.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("ca.key"), mode("server.pem"), mode("")), (0o600, 0o600, 0o700));
    }

    #[test]
    fn certificates_of_another_cluster_and_missing_ones_are_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki");
        let open = |epoch, is_new| Pki::open(&path, epoch, is_new, NOW).err().map(|error| error.to_string());
        assert!(open(EPOCH, false).unwrap().contains("are missing and the store is there"));
        assert_eq!(open(EPOCH, true), None);
        assert!(open("ffff", true).unwrap().contains("are of cluster 0123456789abcdef"));
        fs::write(path.join("ca.key"), "not a key").unwrap();
        assert!(open(EPOCH, true).unwrap().contains("ca.key is damaged"));
    }

    #[test]
    fn a_client_is_named_by_the_server_and_not_by_its_request() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(&dir.path().join("pki"), EPOCH, true, NOW).unwrap();
        let der = pki.sign(request(), &Enrolled::from_uri("hextet:node/n1").unwrap(), NOW).unwrap();
        let (_, certificate) = X509Certificate::from_der(&der).unwrap();
        let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(format!("{names:?}"), "[URI(\"hextet:node/n1\")]");
        assert!(!certificate.is_ca());
        let (_, ca) = X509Certificate::from_der(pki.ca_der()).unwrap();
        assert!(ca.is_ca());
        certificate.verify_signature(Some(ca.public_key())).unwrap();
        let years = |time: x509_parser::time::ASN1Time| time.to_datetime().year();
        assert_eq!(years(certificate.validity().not_before), 2020);
        assert_eq!(years(certificate.validity().not_after), 2027);
    }

    #[test]
    fn the_servers_certificate_is_replaced_in_its_last_third_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki");
        let pki = Pki::open(&path, EPOCH, true, NOW).unwrap();
        let day = |day: u64| NOW + Duration::from_secs(day * 24 * 3600);
        assert!(!pki.server_is_due(day(240)) && pki.server_is_due(day(244)));
        let before = pki.server_identity_pem();
        pki.renew_server(day(244)).unwrap();
        assert_ne!(pki.server_identity_pem(), before);
        assert!(!pki.server_is_due(day(244)));
        let again = Pki::open(&path, EPOCH, false, day(244)).unwrap();
        assert_eq!(again.server_identity_pem(), pki.server_identity_pem());
    }

    /// Clusters that began before the two were one file.
    #[test]
    fn a_key_and_a_certificate_in_two_files_are_read_and_become_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki");
        let made = Pki::open(&path, EPOCH, true, NOW).unwrap();
        let server = made.server().clone();
        fs::write(path.join("server.crt"), &server.certificate).unwrap();
        fs::write(path.join("server.key"), &server.key).unwrap();
        fs::remove_file(path.join("server.pem")).unwrap();
        let old = Pki::open(&path, EPOCH, false, NOW).unwrap();
        assert_eq!(old.server_identity_pem(), made.server_identity_pem());
        old.renew_server(NOW).unwrap();
        assert!(!path.join("server.key").exists() && path.join("server.pem").exists());
    }

    #[test]
    fn a_request_with_a_wrong_signature_is_refused() {
        let mut der = request_der();
        assert_eq!(SigningRequest::parse(&der).unwrap().key.len(), 64);
        let last = der.len() - 1;
        der[last] ^= 1;
        assert!(SigningRequest::parse(&der).is_err());
        assert!(SigningRequest::parse(b"").is_err());
        assert!(SigningRequest::parse(&vec![0x30; CSR_LEN_MAX + 1]).is_err());
    }

    fn request() -> SigningRequest {
        SigningRequest::parse(&request_der()).unwrap()
    }

    /// Asks to be a CA and somebody else.
    fn request_der() -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["hextet-server".to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.serialize_request(&key).unwrap().der().to_vec()
    }
}
