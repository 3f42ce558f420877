//! Who calls, and what they may do. The one place where that is decided.
//!
//! An identity comes from a certificate of the cluster's own CA, which names it as a URI, or from the Unix
//! socket, which is root's. Nothing that a caller says in a message makes it somebody.

use scheduler_core::{event::Enrolled, token::Role};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
};

use crate::pki;

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// A connection without a certificate.
    Nobody,
    /// Root on the server's machine, through the Unix socket.
    Local,
    /// The holder of a certificate.
    Enrolled {
        /// What the certificate says.
        enrolled: Enrolled,
        /// SHA-256 of its public key, in hex.
        key: String,
    },
}

/// Who may call a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Anybody,
    Node,
    User,
    UserOrLb,
}

/// Why a call is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    #[error(
        "this needs a certificate: `netctl login TOKEN` gets one, or use the Unix socket on the server's machine"
    )]
    NoCertificate,
    #[error("this needs the role {needed}; this certificate is for {uri}")]
    Role { needed: &'static str, uri: String },
}

/// Who may call the method with this path, `/package.Service/Method`. What is not listed, such as health and
/// reflection, is for people.
pub(crate) fn access(path: &str) -> Access {
    let service = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    match service {
        "hextet.v1.Enrollment" => Access::Anybody,
        "hextet.v1.Agent" => Access::Node,
        "hextet.v1.Endpoints" => Access::UserOrLb,
        _ => Access::User,
    }
}

impl Identity {
    /// What a certificate that the TLS layer has verified says. One that names nobody is nobody's.
    pub(crate) fn of_certificate(der: &[u8]) -> Identity {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Identity::Nobody };
        let names = certificate.subject_alternative_name().ok().flatten();
        let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
        let [GeneralName::URI(uri)] = names else { return Identity::Nobody };
        let key = pki::sha256_hex(certificate.public_key().raw);
        Enrolled::from_uri(uri).map_or(Identity::Nobody, |enrolled| Identity::Enrolled { enrolled, key })
    }

    /// Whether this caller has the access.
    pub(crate) fn check(&self, access: Access) -> Result<(), Denied> {
        let role = match self {
            Identity::Enrolled { enrolled, .. } => Some(&enrolled.role),
            Identity::Local | Identity::Nobody => None,
        };
        let needed = match (access, self, role) {
            (Access::Anybody, _, _) => return Ok(()),
            (Access::User | Access::UserOrLb, Identity::Local, _) => return Ok(()),
            (_, Identity::Nobody, _) => return Err(Denied::NoCertificate),
            (Access::User | Access::UserOrLb, _, Some(Role::User)) => return Ok(()),
            (Access::UserOrLb, _, Some(Role::Lb(_))) | (Access::Node, _, Some(Role::Node)) => return Ok(()),
            (Access::Node, _, _) => "node",
            (Access::User, _, _) => "user",
            (Access::UserOrLb, _, _) => "user or lb",
        };
        Err(Denied::Role { needed, uri: self.uri() })
    }

    /// The name under which changes are logged: `user:alice`.
    pub(crate) fn changer(&self) -> String {
        match self {
            Identity::Nobody => "nobody".to_owned(),
            Identity::Local => "user:root".to_owned(),
            Identity::Enrolled { enrolled, .. } => format!("{}:{}", enrolled.role.word(), enrolled.name),
        }
    }

    fn uri(&self) -> String {
        match self {
            Identity::Enrolled { enrolled, .. } => enrolled.uri(),
            Identity::Local => "the Unix socket".to_owned(),
            Identity::Nobody => "nobody".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_role_reaches_its_services_and_no_other() {
        let paths = ["Enrollment/Enroll", "Agent/Attach", "Endpoints/Watch", "Cluster/ApplyJob", "Other/X"];
        let cases = [
            (Identity::Nobody, [true, false, false, false, false]),
            (Identity::Local, [true, false, true, true, true]),
            (enrolled("hextet:node/n1"), [true, true, false, false, false]),
            (enrolled("hextet:lb/edge?select=a"), [true, false, true, false, false]),
            (enrolled("hextet:user/alice"), [true, false, true, true, true]),
        ];
        for (identity, allowed) in cases {
            let reached = paths.map(|path| identity.check(access(&format!("/hextet.v1.{path}"))).is_ok());
            assert_eq!(reached, allowed, "{identity:?}");
        }
        assert_eq!(access("/grpc.health.v1.Health/Check"), Access::User);
        assert_eq!(access(""), Access::User);
    }

    #[test]
    fn a_refusal_names_the_role_that_is_needed() {
        let refusal = enrolled("hextet:node/n1").check(Access::User).unwrap_err().to_string();
        assert_eq!(refusal, "this needs the role user; this certificate is for hextet:node/n1");
    }

    #[test]
    fn bytes_that_are_no_certificate_are_nobody() {
        assert_eq!(Identity::of_certificate(b"no certificate"), Identity::Nobody);
    }

    fn enrolled(uri: &str) -> Identity {
        Identity::Enrolled { enrolled: Enrolled::from_uri(uri).unwrap(), key: String::new() }
    }
}
