//! The cluster's certificate authority: made at the first start, and never seen by anybody but the server.
//!
//! Certificates are valid from a fixed day far in the past, so that a machine whose clock is off still gets
//! as far as being told so. Names inside a signing request are ignored: the server writes them.
//!
//! While one CA takes the place of another there are keys of both. The server then shows a certificate of the new one,
//! and beside it one that the old one has made for the new one: who believes either believes the server.

use std::{
    fmt, fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hextet_api::connect::Credentials;
use rcgen::{CertificateSigningRequestParams, ExtendedKeyUsagePurpose, KeyPair, SanType};
use ring::digest::{SHA256, digest};
use scheduler_core::{event::Enrolled, time::WallTime};
use tokio::sync::watch;
use tracing::warn;
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer as _};

mod authority;
mod files;
mod leaf;

pub(crate) use self::authority::{Authority, Ca, Keyring, signer};
use self::leaf::ServerPem;

/// The DNS name in the server's certificate, wherever it listens.
pub const SERVER_NAME: &str = "hextet-server";

/// What a server's certificate towards another server says. No caller can be enrolled with it.
pub(crate) const SERVER_URI: &str = "hextet:server";

/// How long certificates of the server and its clients are good for, from the day on which they are made. Each is
/// replaced when less than [`hextet_api::connect::RENEW_BEFORE`] is left.
const CERTIFICATE_VALID: Duration = Duration::from_secs(365 * 24 * 3600);
/// The CA of a cluster that has never replaced it, and the keyring of one that has.
const CERTIFICATE_FILE: &str = "ca.crt";
const KEY_FILE: &str = "ca.key";
const KEYRING_FILE: &str = "authorities.json";
const CSR_LEN_MAX: usize = 8 * 1024;

/// The CAs and the server's own certificate.
pub struct Pki {
    dir: PathBuf,
    loaded: RwLock<Arc<Loaded>>,
    /// The CA that makes certificates, for those who are to be told.
    issuing: watch::Sender<[u8; 32]>,
    /// The CA of which only nodes are believed.
    compromised: RwLock<Option<String>>,
    changes: AtomicU64,
    /// Held by who changes what is loaded.
    changing: Mutex<()>,
}

/// What is in use at a time.
pub(crate) struct Loaded {
    /// Grows with each change.
    pub(crate) version: i64,
    pub(crate) keyring: Keyring,
    /// Those of the keyring; the first makes certificates.
    pub(crate) cas: Vec<Ca>,
    /// What the server shows: its own certificate, and the way from there to every CA.
    pub(crate) chain: Vec<Vec<u8>>,
    server: ServerPem,
}

/// A certificate and the CA that made it, in DER.
pub struct Signed {
    /// The certificate.
    pub certificate_der: Vec<u8>,
    /// The CA.
    pub ca_der: Vec<u8>,
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
    /// The keyring does not hold what it should.
    #[error("{path} is damaged: put the folder back as it was; without its CA no node can reach the server")]
    Keyring {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A CA that is in use has no key.
    #[error(
        "the store names the CA {ca} and its key is not there: put the folder {path} back as it was when the store was \
         last written"
    )]
    NoKey {
        /// Its SHA-256.
        ca: String,
        /// The folder.
        path: PathBuf,
    },
    /// The CA was replaced meanwhile.
    #[error("the CA was replaced at this moment: try again")]
    Replaced,
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
            make(dir, epoch, &Keyring::of(Authority::make(epoch)?), now)?;
        }
        check_epoch(dir, epoch)?;
        Pki::load(dir, read_keyring(dir)?, 0, now)
    }

    /// Reads the folder `dir` of one of several servers, or makes it. What they share counts more than what is there: another
    /// epoch of a cluster that was restored, and other CAs.
    ///
    /// # Errors
    /// As [`Pki::open`].
    pub(crate) fn open_shared(
        dir: &Path,
        epoch: &str,
        keyring: &Keyring,
        version: i64,
        now: WallTime,
    ) -> Result<Pki, PkiError> {
        if !dir.exists() {
            make(dir, epoch, keyring, now)?;
        }
        follow_epoch(dir, epoch, keyring)?;
        Pki::load(dir, keyring.clone(), version, now)
    }

    fn load(dir: &Path, keyring: Keyring, version: i64, now: WallTime) -> Result<Pki, PkiError> {
        let damaged = |source| PkiError::Damaged { path: dir.to_owned(), source };
        let loaded = Loaded::of(dir, keyring, ServerPem::read(dir)?, version, now).map_err(damaged)?;
        Ok(Pki {
            dir: dir.to_owned(),
            issuing: watch::Sender::new(loaded.cas[0].fingerprint),
            loaded: RwLock::new(Arc::new(loaded)),
            compromised: RwLock::default(),
            changes: AtomicU64::default(),
            changing: Mutex::default(),
        })
    }

    /// What is in use now.
    pub(crate) fn loaded(&self) -> Arc<Loaded> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The CAs with their keys.
    pub(crate) fn keyring(&self) -> Keyring {
        self.loaded().keyring.clone()
    }

    /// The CA that makes certificates, by its SHA-256, now and when another does.
    pub(crate) fn issuing(&self) -> watch::Receiver<[u8; 32]> {
        self.issuing.subscribe()
    }

    /// Keeps a keyring on the disk. It is not in use yet.
    ///
    /// # Errors
    /// The one that was there stays.
    pub(crate) fn keep(&self, keyring: &Keyring) -> Result<(), PkiError> {
        let text = serde_json::to_string_pretty(keyring).expect("texts are JSON");
        files::replace(&self.dir.join(KEYRING_FILE), &text)?;
        // From here on they are not read.
        files::remove(&self.dir.join(KEY_FILE))?;
        files::remove(&self.dir.join(CERTIFICATE_FILE))
    }

    /// Uses a keyring from here on, unless a later one is in use.
    ///
    /// # Errors
    /// What was in use stays.
    pub(crate) fn take(&self, keyring: Keyring, version: i64, now: WallTime) -> Result<(), PkiError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.loaded();
        if version <= before.version {
            return Ok(());
        }
        let next =
            Loaded::of(&self.dir, keyring, before.server.clone(), version, now).map_err(PkiError::Make)?;
        self.put(next);
        Ok(())
    }

    fn put(&self, next: Loaded) {
        let issuing = next.cas[0].fingerprint;
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.issuing.send_if_modified(|now| std::mem::replace(now, issuing) != issuing);
    }

    /// From here on only nodes are believed with certificates of this CA; none: everybody is.
    pub(crate) fn distrust(&self, ca: Option<String>) {
        let mut compromised = self.compromised.write().unwrap_or_else(PoisonError::into_inner);
        if *compromised != ca {
            *compromised = ca;
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// How often what is believed has changed.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Whether a person or load balancer is believed with a certificate by this key.
    pub(crate) fn believes(&self, signer: &[u8]) -> bool {
        let loaded = self.loaded();
        let Some(ca) = loaded.by_key_id(signer) else { return false };
        let compromised = self.compromised.read().unwrap_or_else(PoisonError::into_inner);
        compromised.as_ref().is_none_or(|compromised| *compromised != ca.fingerprint_hex())
    }

    /// The CA with this key, by its SHA-256 in hex; none when it is not in use.
    pub(crate) fn ca_with_key(&self, signer: &[u8]) -> Option<String> {
        self.loaded().by_key_id(signer).map(Ca::fingerprint_hex)
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
        let loaded = self.loaded();
        let ca = loaded.issuing();
        let key = KeyPair::generate().map_err(PkiError::Make)?;
        let mut params = leaf::params("server", now).map_err(PkiError::Make)?;
        let uri = SERVER_URI.to_owned().try_into().map_err(PkiError::Make)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &ca.issuer).map_err(PkiError::Make)?;
        Ok(Credentials {
            name: "server".to_owned(),
            servers: servers.to_vec(),
            ca_der: ca.der.clone(),
            certificate_der: certificate.der().to_vec(),
            key_pkcs8_der: key.serialize_der(),
        })
    }

    /// SHA-256 of the certificate of the CA that makes certificates.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        self.loaded().issuing().fingerprint
    }

    /// The certificate of the CA that makes certificates.
    #[must_use]
    pub fn ca_der(&self) -> Vec<u8> {
        self.loaded().issuing().der.clone()
    }

    /// Whether the server's certificate ends soon.
    pub(crate) fn server_is_due(&self, now: WallTime) -> bool {
        self.loaded().server.is_due(now)
    }

    /// Replaces the server's key and certificate, on the disk first.
    ///
    /// # Errors
    /// The present ones stay.
    pub(crate) fn renew_server(&self, now: WallTime) -> Result<(), PkiError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.loaded();
        let server = ServerPem::make(before.issuing(), now)?;
        server.write(&self.dir)?;
        let next = Loaded::of(&self.dir, before.keyring.clone(), server, before.version, now);
        self.put(next.map_err(PkiError::Make)?);
        Ok(())
    }

    /// A client certificate for the request's public key, by the CA with this SHA-256, or the one that makes certificates.
    ///
    /// # Errors
    /// [`PkiError::Make`]; [`PkiError::Replaced`] when that CA is not in use any more.
    pub fn sign(
        &self,
        request: SigningRequest,
        enrolled: &Enrolled,
        ca: Option<&str>,
        now: WallTime,
    ) -> Result<Signed, PkiError> {
        let loaded = self.loaded();
        let ca = match ca {
            Some(wanted) => loaded.cas.iter().find(|ca| ca.fingerprint_hex() == wanted),
            None => Some(loaded.issuing()),
        };
        let ca = ca.ok_or(PkiError::Replaced)?;
        let mut csr = request.params;
        csr.params = leaf::params(&enrolled.name, now).map_err(PkiError::Make)?;
        let uri = enrolled.uri().try_into().map_err(PkiError::Make)?;
        csr.params.subject_alt_names = vec![SanType::URI(uri)];
        csr.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = csr.signed_by(&ca.issuer).map_err(PkiError::Make)?;
        Ok(Signed { certificate_der: certificate.der().to_vec(), ca_der: ca.der.clone() })
    }

    /// That there is no key of this CA.
    pub(crate) fn no_key(&self, ca: &str) -> PkiError {
        PkiError::NoKey { ca: ca.to_owned(), path: self.dir.clone() }
    }
}

/// Without keys.
impl fmt::Debug for Pki {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pki").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Loaded {
    /// The server gets another certificate when its own is not by the CA that makes them.
    fn of(
        dir: &Path,
        keyring: Keyring,
        mut server: ServerPem,
        version: i64,
        now: WallTime,
    ) -> Result<Loaded, rcgen::Error> {
        let cas = keyring.all().map(Authority::ready).collect::<Result<Vec<_>, _>>()?;
        if server.signer().is_some_and(|signer| signer != cas[0].key_id) {
            server = ServerPem::make_for(&cas[0], now)?;
            // The next start makes another.
            if let Err(error) = server.write(dir) {
                warn!("the server's new certificate is not kept: {:#}", anyhow::Error::from(error));
            }
        }
        let mut chain = vec![authority::der(&server.certificate)?, cas[0].der.clone()];
        for other in &cas[1..] {
            chain.extend([cas[0].vouched_by(other)?, other.der.clone()]);
        }
        Ok(Loaded { version, keyring, cas, chain, server })
    }

    /// The CA that makes certificates.
    pub(crate) fn issuing(&self) -> &Ca {
        &self.cas[0]
    }

    pub(crate) fn by_key_id(&self, key_id: &[u8]) -> Option<&Ca> {
        self.cas.iter().find(|ca| ca.key_id == key_id)
    }

    /// The server's own key, in PEM.
    pub(crate) fn server_key(&self) -> &str {
        &self.server.key
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

/// Makes all files in a folder beside `dir` and then gives it its name: a crash leaves all or nothing.
fn make(dir: &Path, epoch: &str, keyring: &Keyring, now: WallTime) -> Result<(), PkiError> {
    let server = ServerPem::make(&keyring.issuing.ready().map_err(PkiError::Make)?, now)?;
    let temporary = dir.with_extension("new");
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| PkiError::Io { what: "write", path, source }
    };
    if temporary.exists() {
        fs::remove_dir_all(&temporary).map_err(failed(&temporary))?;
    }
    fs::DirBuilder::new().mode(0o700).create(&temporary).map_err(failed(&temporary))?;
    for (name, text) in files_of(epoch, keyring, &server) {
        let path = temporary.join(name);
        files::write_private(&path, &text).map_err(failed(&path))?;
    }
    files::sync_folder(&temporary).map_err(failed(&temporary))?;
    fs::rename(&temporary, dir).map_err(failed(dir))?;
    dir.parent().map_or(Ok(()), files::sync_folder).map_err(failed(dir))
}

fn files_of(epoch: &str, keyring: &Keyring, server: &ServerPem) -> Vec<(&'static str, String)> {
    let mut files = vec![(leaf::FILE, server.text()), ("epoch", format!("{epoch}\n"))];
    if keyring.others.is_empty() {
        files.push((KEY_FILE, keyring.issuing.key_pem().to_owned()));
        files.push((CERTIFICATE_FILE, keyring.issuing.certificate_pem().to_owned()));
    } else {
        files.push((KEYRING_FILE, serde_json::to_string_pretty(keyring).expect("texts are JSON")));
    }
    files
}

/// The epoch that a folder of certificates is for; empty when there is none.
pub(crate) fn epoch(dir: &Path) -> String {
    fs::read_to_string(dir.join("epoch")).unwrap_or_default().trim().to_owned()
}

fn check_epoch(dir: &Path, epoch: &str) -> Result<(), PkiError> {
    let found = files::read(&dir.join("epoch"))?.trim().to_owned();
    if found == epoch {
        return Ok(());
    }
    let (path, expected) = (dir.to_owned(), epoch.to_owned());
    Err(PkiError::AnotherCluster { path, found, expected })
}

/// Another epoch with a CA that is known is that of the same cluster, restored.
fn follow_epoch(dir: &Path, epoch: &str, keyring: &Keyring) -> Result<(), PkiError> {
    let Err(another) = check_epoch(dir, epoch) else { return Ok(()) };
    let own = read_keyring(dir)?;
    let is_known = |ca: &Authority| own.all().any(|own| own.fingerprint() == ca.fingerprint());
    if !keyring.all().any(is_known) {
        return Err(another);
    }
    files::replace(&dir.join("epoch"), &format!("{epoch}\n"))
}

fn read_keyring(dir: &Path) -> Result<Keyring, PkiError> {
    let path = dir.join(KEYRING_FILE);
    if path.exists() {
        let text = files::read(&path)?;
        return serde_json::from_str(&text).map_err(|source| PkiError::Keyring { path, source });
    }
    let (certificate, key) = (files::read(&dir.join(CERTIFICATE_FILE))?, files::read(&dir.join(KEY_FILE))?);
    let damaged = |name| {
        let path = dir.join(name);
        move |source| PkiError::Damaged { path, source }
    };
    KeyPair::from_pem(&key).map_err(damaged(KEY_FILE))?;
    authority::der(&certificate).map_err(damaged(CERTIFICATE_FILE))?;
    Ok(Keyring::of(Authority::of_pem(certificate, key)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use rcgen::{BasicConstraints, CertificateParams, IsCa};
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
        let der = pki.sign(request(), &Enrolled::from_uri("hextet:node/n1").unwrap(), None, NOW).unwrap();
        let (_, certificate) = X509Certificate::from_der(&der.certificate_der).unwrap();
        let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(format!("{names:?}"), "[URI(\"hextet:node/n1\")]");
        assert!(!certificate.is_ca());
        let (_, ca) = X509Certificate::from_der(&der.ca_der).unwrap();
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
        let before = pki.loaded().chain.clone();
        pki.renew_server(day(244)).unwrap();
        assert_ne!(pki.loaded().chain, before);
        assert!(!pki.server_is_due(day(244)));
        let again = Pki::open(&path, EPOCH, false, day(244)).unwrap();
        assert_eq!(again.loaded().chain, pki.loaded().chain);
    }

    /// Clusters that began before the two were one file.
    #[test]
    fn a_key_and_a_certificate_in_two_files_are_read_and_become_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki");
        let made = Pki::open(&path, EPOCH, true, NOW).unwrap();
        let server = made.loaded().server.clone();
        fs::write(path.join("server.crt"), &server.certificate).unwrap();
        fs::write(path.join("server.key"), &server.key).unwrap();
        fs::remove_file(path.join("server.pem")).unwrap();
        let old = Pki::open(&path, EPOCH, false, NOW).unwrap();
        assert_eq!(old.loaded().chain, made.loaded().chain);
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

    #[test]
    fn a_keyring_is_kept_before_it_is_used_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki");
        let pki = Pki::open(&path, EPOCH, true, NOW).unwrap();
        let (first, next) = (pki.keyring().issuing, Authority::make_next(EPOCH).unwrap());
        let both = Keyring { issuing: next.clone(), others: vec![first.clone()] };
        pki.keep(&both).unwrap();
        assert_eq!(pki.fingerprint(), first.ready().unwrap().fingerprint, "it is not in use yet");
        assert!(!path.join("ca.key").exists());
        pki.take(both.clone(), 1, NOW).unwrap();
        assert_eq!(pki.loaded().chain.len(), 4, "its own, the CA's, the one between both, and the old CA's");
        pki.take(Keyring::of(first.clone()), 1, NOW).unwrap();
        assert!(pki.keyring() == both, "what was read before counts no more");

        // The server's own certificate is by the new CA, also when the one that is kept is not.
        let again = Pki::open(&path, EPOCH, false, NOW).unwrap();
        assert!(again.keyring() == both);
        assert_eq!(signer(&again.loaded().chain[0]), Some(next.ready().unwrap().key_id));
        again.keep(&Keyring::of(first.clone())).unwrap();
        let back = Pki::open(&path, EPOCH, false, NOW).unwrap();
        assert_eq!(signer(&back.loaded().chain[0]), Some(first.ready().unwrap().key_id));
        assert!(
            pki.believes(&first.ready().unwrap().key_id) && !back.believes(&next.ready().unwrap().key_id)
        );
    }

    #[test]
    fn a_disk_that_takes_nothing_leaves_the_keys_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pki");
        let pki = Pki::open(&path, EPOCH, true, NOW).unwrap();
        // Root writes anywhere: a folder in the file's place stands for the full disk.
        fs::create_dir(path.join("authorities.json")).unwrap();
        let both = pki.keyring().with(Authority::make_next(EPOCH).unwrap());
        let error = pki.keep(&both).unwrap_err().to_string();
        assert!(error.starts_with("cannot write") && error.contains("authorities.json"), "{error}");
        fs::remove_dir(path.join("authorities.json")).unwrap();
        assert!(Pki::open(&path, EPOCH, false, NOW).unwrap().keyring() == pki.keyring());
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
