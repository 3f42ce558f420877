//! Turning a token into credentials.

use std::time::{SystemTime, UNIX_EPOCH};

use ipnetwork::Ipv6Network;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{ConnectError, Credentials, CredentialsError, Key, enrollment, tls::is_signed_by};
use crate::{
    token::Token,
    v1::{EnrollRequest, EnrollResponse, enrollment_client::EnrollmentClient},
};

/// What the one who enrolls would like to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// A node's name, or empty to use the name in the token.
    pub name: String,
    /// Nodes: 16 bits, drawn at random.
    pub subnet_id: u16,
    /// Nodes: 24 bits, drawn at random.
    pub group_id: u32,
    /// Nodes: the /64 of the LAN for the pods; none to take the cluster's pod prefix where the uplink is in it,
    /// else a /64 of the node's own.
    pub pod_prefix: Option<Ipv6Network>,
    /// Nodes: the /64s in which the uplink has addresses.
    pub uplink_prefixes: Vec<Ipv6Network>,
}

/// What came of an enrollment.
#[derive(Clone, Debug)]
pub struct Enrolled {
    /// Who the caller is from now on.
    pub credentials: Credentials,
    /// All that the server said.
    pub response: EnrollResponse,
}

/// Why an enrollment failed.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The key cannot be used.
    #[error(transparent)]
    Key(#[from] CredentialsError),
    /// The server's word; its message says what to do.
    #[error("{}", status.message())]
    Refused {
        /// Its code tells a used token (`PERMISSION_DENIED`) from a name that is taken (`ALREADY_EXISTS`)
        /// and a clock that is off (`FAILED_PRECONDITION`).
        status: tonic::Status,
    },
    /// A server that does not keep to the contract.
    #[error("the server at {server} answered with {what}: is it of this version?")]
    Answer {
        /// `host:port`.
        server: String,
        /// What is wrong with the answer.
        what: &'static str,
    },
}

/// Asks for a certificate for `key` with `token`.
///
/// A caller that may be stopped at any point keeps the key first: the same key may enroll again under its
/// name.
///
/// # Errors
/// [`EnrollError::Refused`] when the server says no; the others say what stood in the way.
pub async fn enroll(token: &Token, key: &Key, wish: Wish) -> Result<Enrolled, EnrollError> {
    let (channel, server) = enrollment(token).await?;
    let request = EnrollRequest {
        secret: token.secret.to_vec(),
        name: wish.name,
        csr_der: key.request_der()?,
        subnet_id: wish.subnet_id.into(),
        group_id: wish.group_id,
        client_unix_ms: now_unix_ms(),
        machine_key: key.machine_key()?.to_vec(),
        pod_prefix: wish.pod_prefix.map(Into::into),
        uplink_prefixes: wish.uplink_prefixes.into_iter().map(Into::into).collect(),
    };
    let response = EnrollmentClient::new(channel)
        .enroll(request)
        .await
        .map_err(|status| EnrollError::Refused { status })?
        .into_inner();
    check(key, &response).map_err(|what| EnrollError::Answer { server: server.clone(), what })?;
    let credentials = Credentials {
        name: response.name.clone(),
        servers: first_in_front(&token.servers, &server),
        ca_der: response.ca_der.clone(),
        certificate_der: response.certificate_der.clone(),
        key_pkcs8_der: key.pkcs8_der().to_vec(),
    };
    Ok(Enrolled { credentials, response })
}

/// The connection has shown that the server is the one of the token. Its CA may be another by now.
fn check(key: &Key, response: &EnrollResponse) -> Result<(), &'static str> {
    let Ok((_, certificate)) = X509Certificate::from_der(&response.certificate_der) else {
        return Err("something that is not a certificate");
    };
    let asked = key.public_key_der().map_err(|_| "a certificate for a key that cannot be read")?;
    if certificate.public_key().raw != asked {
        return Err("a certificate for another key");
    }
    if !is_signed_by(&response.certificate_der, &response.ca_der) {
        return Err("a certificate of another CA than it names");
    }
    Ok(())
}

/// The server that answered goes first: it is known to be reachable from here.
fn first_in_front(servers: &[String], first: &str) -> Vec<String> {
    let others = servers.iter().filter(|server| *server != first);
    std::iter::once(first.to_owned()).chain(others.cloned()).collect()
}

fn now_unix_ms() -> u64 {
    // A clock before 1970 is 0: the server then says that it is off.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
