//! The key and certificate with which a node, user or load balancer is known, and the file they live in.
//!
//! The file is JSON, readable by its owner alone, and replaced as a whole.

use std::{
    fmt, fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::token::Fingerprint;

const FILE_LEN_MAX: u64 = 64 * 1024;

/// Who one is to a cluster, and where its servers are.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// The name in the certificate.
    pub name: String,
    /// `host:port`, in the order in which they are tried.
    pub servers: Vec<String>,
    /// The cluster's CA.
    #[serde(with = "base64_text")]
    pub ca_der: Vec<u8>,
    /// Signed by the CA.
    #[serde(with = "base64_text")]
    pub certificate_der: Vec<u8>,
    /// The private key.
    #[serde(with = "base64_text")]
    pub key_pkcs8_der: Vec<u8>,
}

/// A private key (ECDSA, P-256).
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    pkcs8_der: Vec<u8>,
}

/// Why credentials cannot be read, written or made.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file cannot be read.
    #[error("cannot read the credentials {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write the credentials {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is damaged.
    #[error("{} does not hold credentials: log in again with a new token", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where it is wrong.
        source: serde_json::Error,
    },
    /// No key can be made, or it cannot be used.
    #[error("the private key cannot be used")]
    Key(#[source] rcgen::Error),
}

impl Credentials {
    /// Reads what [`Credentials::save`] wrote.
    ///
    /// # Errors
    /// [`CredentialsError::Read`] or [`CredentialsError::Format`].
    pub fn load(path: &Path) -> Result<Credentials, CredentialsError> {
        let bytes = read_bounded(path)
            .map_err(|source| CredentialsError::Read { path: path.to_path_buf(), source })?;
        serde_json::from_slice(&bytes)
            .map_err(|source| CredentialsError::Format { path: path.to_path_buf(), source })
    }

    /// Writes them to `path`, for the owner alone; the file is replaced as a whole and durably.
    ///
    /// # Errors
    /// [`CredentialsError::Write`]; the file that was there is then unchanged.
    pub fn save(&self, path: &Path) -> Result<(), CredentialsError> {
        let text = serde_json::to_vec_pretty(self).expect("strings and bytes are JSON");
        replace(path, &text).map_err(|source| CredentialsError::Write { path: path.to_path_buf(), source })
    }

    /// The fingerprint of the cluster's CA.
    pub fn ca_fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.ca_der)
    }
}

/// Leaves the key out, so that it reaches no log.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("name", &self.name)
            .field("servers", &self.servers)
            .field("ca", &self.ca_fingerprint())
            .finish_non_exhaustive()
    }
}

impl Key {
    /// Makes a new key.
    ///
    /// # Errors
    /// [`CredentialsError::Key`] when the system gives no random numbers.
    pub fn generate() -> Result<Key, CredentialsError> {
        let pair = rcgen::KeyPair::generate().map_err(CredentialsError::Key)?;
        Ok(Key { pkcs8_der: pair.serialize_der() })
    }

    /// A key that was kept.
    ///
    /// # Errors
    /// [`CredentialsError::Key`] when it is not a PKCS #8 key.
    pub fn from_pkcs8_der(der: Vec<u8>) -> Result<Key, CredentialsError> {
        let key = Key { pkcs8_der: der };
        key.pair()?;
        Ok(key)
    }

    /// The key in the file at `path`; makes it when there is none.
    ///
    /// # Errors
    /// The file cannot be read or written, or holds no key.
    pub fn kept_in(path: &Path) -> Result<Key, CredentialsError> {
        match read_bounded(path) {
            Ok(der) => return Key::from_pkcs8_der(der),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(CredentialsError::Read { path: path.to_path_buf(), source }),
        }
        let key = Key::generate()?;
        replace(path, &key.pkcs8_der)
            .map_err(|source| CredentialsError::Write { path: path.to_path_buf(), source })?;
        Ok(key)
    }

    /// The key, to be kept.
    pub fn pkcs8_der(&self) -> &[u8] {
        &self.pkcs8_der
    }

    /// SHA-256 of the public key (its `SubjectPublicKeyInfo` in DER): the `machine_key` of an enrollment.
    ///
    /// # Errors
    /// None for a key that was made by this type.
    pub fn machine_key(&self) -> Result<[u8; 32], CredentialsError> {
        Ok(Fingerprint::of(&self.public_key_der()?).0)
    }

    /// The public key: its `SubjectPublicKeyInfo` in DER.
    pub(super) fn public_key_der(&self) -> Result<Vec<u8>, CredentialsError> {
        use rcgen::PublicKeyData as _;
        Ok(self.pair()?.subject_public_key_info())
    }

    /// A certificate signing request, PKCS #10 in DER. It holds nothing but the public key: the server
    /// writes the name into the certificate.
    pub(super) fn request_der(&self) -> Result<Vec<u8>, CredentialsError> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let request = params.serialize_request(&self.pair()?).map_err(CredentialsError::Key)?;
        Ok(request.der().to_vec())
    }

    fn pair(&self) -> Result<rcgen::KeyPair, CredentialsError> {
        rcgen::KeyPair::try_from(self.pkcs8_der.as_slice()).map_err(CredentialsError::Key)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(FILE_LEN_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_LEN_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "longer than credentials ever are"));
    }
    Ok(bytes)
}

/// Writes beside the file, syncs, renames: a crash leaves the old file or the new one.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder)?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(beside);
    let written = write_private(&beside, bytes).and_then(|()| fs::rename(&beside, path));
    if let Err(error) = written {
        // The first error is the one to report; the file may not even exist.
        let _ = fs::remove_file(&beside);
        return Err(error);
    }
    fs::File::open(folder)?.sync_all()
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Bytes as base64 text in the file.
mod base64_text {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text).map_err(D::Error::custom)
    }
}
