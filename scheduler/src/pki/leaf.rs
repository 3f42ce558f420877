//! Certificates of servers and clients, and the file of the server's own.

use std::{path::Path, time::Duration};

use hextet_api::connect::RENEW_BEFORE;
use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber, date_time_ymd,
};
use scheduler_core::time::WallTime;
use x509_parser::pem::parse_x509_pem;

use super::{
    CERTIFICATE_VALID, PkiError, SERVER_NAME,
    authority::{self, Ca},
    files,
};

/// The server's key and certificate, and the two files that they had before.
pub(super) const FILE: &str = "server.pem";
const OLD_CERTIFICATE_FILE: &str = "server.crt";
const OLD_KEY_FILE: &str = "server.key";

/// The server's own certificate and key, which live in one file so that they are replaced together.
#[derive(Clone)]
pub(super) struct ServerPem {
    pub(super) certificate: String,
    pub(super) key: String,
}

impl ServerPem {
    pub(super) fn make(ca: &Ca, now: WallTime) -> Result<ServerPem, PkiError> {
        ServerPem::make_for(ca, now).map_err(PkiError::Make)
    }

    pub(super) fn make_for(ca: &Ca, now: WallTime) -> Result<ServerPem, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = params(SERVER_NAME, now)?;
        let name = SERVER_NAME.to_owned().try_into()?;
        params.subject_alt_names = vec![SanType::DnsName(name)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &ca.issuer)?;
        Ok(ServerPem { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    pub(super) fn text(&self) -> String {
        format!("{}{}", self.key, self.certificate)
    }

    /// The key of the CA that signed it.
    pub(super) fn signer(&self) -> Option<Vec<u8>> {
        authority::signer(&authority::der(&self.certificate).ok()?)
    }

    /// Whether it ends soon.
    pub(super) fn is_due(&self, now: WallTime) -> bool {
        let Ok((_, pem)) = parse_x509_pem(self.certificate.as_bytes()) else { return true };
        let Ok(certificate) = pem.parse_x509() else { return true };
        let ends = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        now + RENEW_BEFORE >= WallTime(ends.saturating_mul(1000))
    }

    /// Puts it in the place of what is in the folder.
    pub(super) fn write(&self, dir: &Path) -> Result<(), PkiError> {
        files::replace(&dir.join(FILE), &self.text())?;
        files::remove(&dir.join(OLD_CERTIFICATE_FILE))?;
        files::remove(&dir.join(OLD_KEY_FILE))
    }

    /// From the one file, or from the two that a cluster of before has.
    pub(super) fn read(dir: &Path) -> Result<ServerPem, PkiError> {
        let damaged = |name: &str, source| PkiError::Damaged { path: dir.join(name), source };
        if !dir.join(FILE).exists() {
            let key = files::read(&dir.join(OLD_KEY_FILE))?;
            let certificate = files::read(&dir.join(OLD_CERTIFICATE_FILE))?;
            KeyPair::from_pem(&key).map_err(|error| damaged(OLD_KEY_FILE, error))?;
            return ServerPem { certificate, key }
                .checked()
                .map_err(|error| damaged(OLD_CERTIFICATE_FILE, error));
        }
        let text = files::read(&dir.join(FILE))?;
        let begin = text.find("-----BEGIN CERTIFICATE").unwrap_or(text.len());
        let (key, certificate) = text.split_at(begin);
        let server = ServerPem { certificate: certificate.to_owned(), key: key.to_owned() };
        server.checked().map_err(|error| damaged(FILE, error))
    }

    fn checked(self) -> Result<ServerPem, rcgen::Error> {
        KeyPair::from_pem(&self.key)?;
        parse_x509_pem(self.certificate.as_bytes()).map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
        Ok(self)
    }
}

/// What certificates of servers and clients have in common.
pub(super) fn params(name: &str, now: WallTime) -> Result<CertificateParams, rcgen::Error> {
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
pub(super) fn serial() -> SerialNumber {
    let mut bytes = [0; 16];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut bytes);
    bytes[0] &= 0x7F;
    SerialNumber::from_slice(&bytes)
}
