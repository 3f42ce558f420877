//! A new key and certificate for somebody who has one, over a connection that is there.
//!
//! Three steps, and whoever is stopped between two of them has credentials that work: [`renew`] asks for a certificate
//! for a new key, the caller keeps what it gets, and [`confirm`] uses it, from when on the old key is not good any
//! more. Connections that were made with the old one go on.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use tonic::transport::Channel;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{ConnectError, Credentials, CredentialsError, Key, mutual_tls, tls::is_signed_by};
use crate::v1::{ConfirmRequest, RenewRequest, renewal_client::RenewalClient};

/// A certificate that ends sooner than this is replaced. It lasts for a year: who is cut off for a month still has one
/// that is good.
pub const RENEW_BEFORE: Duration = Duration::from_secs(122 * 24 * 3600);

/// Why there are no new credentials.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// No connection with the new ones.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// No new key.
    #[error(transparent)]
    Key(#[from] CredentialsError),
    /// The server's word.
    #[error("{}", status.message())]
    Refused {
        /// With its code.
        status: Box<tonic::Status>,
    },
    /// A server that does not keep to the contract.
    #[error(
        "the server answered with a certificate for another key, or of another CA than it names: is it of this version?"
    )]
    Answer,
}

impl Credentials {
    /// Whether the certificate ends soon, or has ended, and is to be replaced.
    pub fn is_due(&self, now: SystemTime) -> bool {
        self.ends().is_some_and(|ends| now + RENEW_BEFORE >= ends)
    }

    /// When the certificate ends; none when it cannot be read.
    pub fn ends(&self) -> Option<SystemTime> {
        let (_, certificate) = X509Certificate::from_der(&self.certificate_der).ok()?;
        let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
    }
}

/// Asks over `channel`, which was made with `credentials`, for a certificate for a new key. Both are good until the new
/// one is used. When the cluster has replaced its CA, the new one comes along, and is the one that is believed with the new
/// credentials. A node says which machine it is; people do not.
///
/// # Errors
/// The old credentials are as good as before.
pub async fn renew(
    credentials: &Credentials,
    channel: Channel,
    machine: &str,
) -> Result<Credentials, RenewError> {
    let key = Key::generate()?;
    let request = RenewRequest { csr_der: key.request_der()?, machine: machine.to_owned(), takes_ca: true };
    let answer = RenewalClient::new(channel).renew(request).await.map_err(refused)?.into_inner();
    let asked = key.public_key_der()?;
    let is_for_it = X509Certificate::from_der(&answer.certificate_der)
        .is_ok_and(|(_, certificate)| certificate.public_key().raw == asked);
    // A server of an older version says nothing of the CA: it is the one that there was.
    let ca_der = if answer.ca_der.is_empty() { credentials.ca_der.clone() } else { answer.ca_der };
    if !is_for_it || !is_signed_by(&answer.certificate_der, &ca_der) {
        return Err(RenewError::Answer);
    }
    Ok(Credentials {
        ca_der,
        certificate_der: answer.certificate_der,
        key_pkcs8_der: key.pkcs8_der().to_vec(),
        ..credentials.clone()
    })
}

/// Connects with new credentials, which are kept by now, and ends the old ones. Doing it twice does no harm.
///
/// # Errors
/// The old key may still be good.
pub async fn confirm(credentials: &Credentials) -> Result<Channel, RenewError> {
    let channel = mutual_tls(credentials).await?;
    RenewalClient::new(channel.clone()).confirm(ConfirmRequest {}).await.map_err(refused)?;
    Ok(channel)
}

/// All three steps, with the credentials in the file at `path`; gives the new ones and a connection with them.
///
/// # Errors
/// What is in the file is good.
pub async fn renew_kept(
    path: &Path,
    credentials: &Credentials,
    channel: Channel,
) -> Result<(Credentials, Channel), RenewError> {
    let next = renew(credentials, channel, "").await?;
    next.save(path)?;
    let channel = confirm(&next).await?;
    Ok((next, channel))
}

fn refused(status: tonic::Status) -> RenewError {
    RenewError::Refused { status: Box::new(status) }
}
