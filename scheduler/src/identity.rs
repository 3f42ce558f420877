//! Who calls, and whether they have the role that a method needs.
//!
//! An identity comes from a certificate of the cluster's own CA, which names it as a URI, or from the Unix
//! socket, which is root's. Nothing that a caller says in a message makes it somebody.

use std::fmt;

use scheduler_core::{
    authority::Authorities,
    event::Enrolled,
    state::State,
    time::WallTime,
    token::{Level, Role},
};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
};

use crate::{access::Access, pki};

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// A connection without a certificate.
    Nobody,
    /// Root on a server's machine, through the Unix socket, be it of a server that forwards: an admin.
    Local,
    /// Somebody else at the Unix socket, by the number of the user.
    NotRoot(u32),
    /// The holder of a certificate.
    Enrolled {
        /// What the certificate says.
        enrolled: Enrolled,
        /// SHA-256 of its public key, in hex.
        key: String,
        /// When it ends.
        ends: WallTime,
    },
}

/// Why a call is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    #[error(
        "this needs the role {needed}, and the connection has no certificate: `netctl login TOKEN` gets one, or use \
         the Unix socket on the server's machine"
    )]
    NoCertificate { needed: String },
    #[error("the certificate has ended at {0} by the server's clock: `netctl login TOKEN` gets another")]
    Ended(WallTime),
    #[error(
        "the certificate has ended at {0} by the server's clock: it is good for having another, and no more"
    )]
    NodeEnded(WallTime),
    #[error(
        "another key has taken the place of this certificate's: is there a newer copy of the credentials?"
    )]
    Replaced,
    #[error(
        "the CA that signed this certificate was replaced, and is not believed any more: take a new token, for \
         `netctl login TOKEN`, or for `netctl node --rejoin TOKEN` on a node"
    )]
    Retired,
    #[error(
        "the CA that signed this certificate was compromised, and only nodes are believed with it: `netctl login TOKEN` \
         with a new token, which root makes at the Unix socket on the server's machine"
    )]
    Compromised,
    #[error("this needs the role {needed}; {who} has the role {held}")]
    Role { needed: String, who: String, held: &'static str },
    #[error(
        "this needs the role {needed}, and the socket is root's; user {uid} is not root: run this as root, or log in \
         with `netctl login TOKEN`"
    )]
    NotRoot { needed: String, uid: u32 },
}

impl Identity {
    /// What a certificate that the TLS layer has verified says. One that names nobody is nobody's.
    pub(crate) fn of_certificate(der: &[u8]) -> Identity {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Identity::Nobody };
        let names = certificate.subject_alternative_name().ok().flatten();
        let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
        let [GeneralName::URI(uri)] = names else { return Identity::Nobody };
        if *uri == pki::SERVER_URI {
            return Identity::Local;
        }
        let key = pki::sha256_hex(certificate.public_key().raw);
        let ends = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        let ends = WallTime(ends.saturating_mul(1000));
        Enrolled::from_uri(uri).map_or(Identity::Nobody, |enrolled| Identity::Enrolled {
            enrolled,
            key,
            ends,
        })
    }

    /// Whether the CA with this SHA-256 is believed for this caller; none is a CA that is not in use. `None` for
    /// `authorities` is one CA.
    pub(crate) fn check_ca(&self, ca: Option<&str>, authorities: Option<&Authorities>) -> Result<(), Denied> {
        let Some(ca) = ca else { return Err(Denied::Retired) };
        let Some(authorities) = authorities else { return Ok(()) };
        let is_node = matches!(self, Identity::Enrolled { enrolled, .. } if enrolled.role == Role::Node);
        match &authorities.leaving {
            _ if authorities.issuing == ca => Ok(()),
            Some(leaving) if leaving.ca == ca && leaving.compromised && !is_node => Err(Denied::Compromised),
            Some(leaving) if leaving.ca == ca => Ok(()),
            _ => Err(Denied::Retired),
        }
    }

    /// Whether this caller has the access.
    pub(crate) fn check(&self, access: Access) -> Result<(), Denied> {
        let role = match self {
            _ if access == Access::Anybody => return Ok(()),
            Identity::Local => &Role::Admin,
            Identity::Enrolled { enrolled, .. } => &enrolled.role,
            Identity::Nobody => return Err(Denied::NoCertificate { needed: access.needed() }),
            Identity::NotRoot(uid) => return Err(Denied::NotRoot { needed: access.needed(), uid: *uid }),
        };
        if access.includes(role) {
            return Ok(());
        }
        Err(Denied::Role { needed: access.needed(), who: self.to_string(), held: self.role_word() })
    }

    /// Whether the certificate is still good at `now`. One that has ended is good for a node to have another, whose
    /// key the state knows and who may have been cut off for long.
    pub(crate) fn check_good(&self, access: Access, state: &State, now: WallTime) -> Result<(), Denied> {
        let Identity::Enrolled { enrolled, key, ends } = self else { return Ok(()) };
        let is_node = enrolled.role == Role::Node;
        if now >= *ends && !(is_node && access == Access::Enrolled) && access != Access::Anybody {
            return Err(if is_node { Denied::NodeEnded(*ends) } else { Denied::Ended(*ends) });
        }
        if !is_node && state.is_replaced(key) {
            return Err(Denied::Replaced);
        }
        Ok(())
    }

    /// The word for the role in messages and in the audit.
    pub(crate) fn role_word(&self) -> &'static str {
        match self {
            Identity::Nobody | Identity::NotRoot(_) => "none",
            Identity::Local => "admin",
            Identity::Enrolled { enrolled, .. } => enrolled.role.word(),
        }
    }

    /// How much a person may do; none for machines and strangers.
    pub(crate) fn level(&self) -> Option<Level> {
        match self {
            Identity::Local => Some(Level::Admin),
            Identity::Enrolled { enrolled, .. } => enrolled.role.level(),
            Identity::Nobody | Identity::NotRoot(_) => None,
        }
    }

    /// The name under which changes are logged: `user:alice`.
    pub(crate) fn changer(&self) -> String {
        match self {
            Identity::Nobody | Identity::NotRoot(_) => "nobody".to_owned(),
            Identity::Local => "user:root".to_owned(),
            Identity::Enrolled { enrolled, .. } => {
                format!("{}:{}", enrolled.role.changer_word(), enrolled.name)
            }
        }
    }
}

/// Whether a certificate is for a node.
pub(crate) fn is_node(der: &[u8]) -> bool {
    matches!(Identity::of_certificate(der), Identity::Enrolled { enrolled, .. } if enrolled.role == Role::Node)
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::Enrolled { enrolled, .. } => f.write_str(&enrolled.uri()),
            Identity::Local => f.write_str("the Unix socket"),
            Identity::NotRoot(uid) => write!(f, "user {uid} at the Unix socket"),
            Identity::Nobody => f.write_str("nobody"),
        }
    }
}

#[cfg(test)]
mod tests {
    use scheduler_core::authority::{self, Turn};

    use super::*;
    use crate::access::of_method;

    #[test]
    fn each_role_reaches_its_methods_and_no_other() {
        let paths = [
            "Enrollment/Enroll",
            "Agent/Attach",
            "Endpoints/Watch",
            "Cluster/ListPods",
            "Cluster/ApplyJob",
            "Cluster/CreateToken",
        ];
        let cases = [
            (Identity::Nobody, [true, false, false, false, false, false]),
            (Identity::NotRoot(1000), [true, false, false, false, false, false]),
            (Identity::Local, [true, false, true, true, true, true]),
            (enrolled("hextet:node/n1"), [true, true, false, false, false, false]),
            (enrolled("hextet:lb/edge?select=a"), [true, false, true, false, false, false]),
            (enrolled("hextet:viewer/v"), [true, false, true, true, false, false]),
            (enrolled("hextet:operator/o"), [true, false, true, true, true, false]),
            (enrolled("hextet:admin/a"), [true, false, true, true, true, true]),
            (enrolled("hextet:user/alice"), [true, false, true, true, true, true]),
        ];
        for (identity, allowed) in cases {
            let access = |path| of_method(&format!("/hextet.v1.{path}")).0;
            let reached = paths.map(|path| identity.check(access(path)).is_ok());
            assert_eq!(reached, allowed, "{identity:?}");
        }
    }

    #[test]
    fn a_refusal_names_the_role_that_is_needed_and_the_one_that_is_held() {
        let refusal = |identity: Identity, access| identity.check(access).unwrap_err().to_string();
        let operator = Access::Person(Level::Operator);
        assert_eq!(
            refusal(enrolled("hextet:viewer/bob"), operator),
            "this needs the role operator; hextet:viewer/bob has the role viewer"
        );
        assert_eq!(
            refusal(enrolled("hextet:node/n1"), Access::PersonOrLb(Level::Viewer)),
            "this needs the role viewer or lb; hextet:node/n1 has the role node"
        );
        assert_eq!(
            refusal(Identity::Local, Access::Node),
            "this needs the role node; the Unix socket has the role admin"
        );
        assert!(
            refusal(Identity::Nobody, operator)
                .starts_with("this needs the role operator, and the connection")
        );
        let not_root = refusal(Identity::NotRoot(1000), operator);
        assert!(not_root.contains("the role operator, and the socket is root's; user 1000"), "{not_root}");
    }

    #[test]
    fn a_certificate_that_has_ended_is_good_for_a_node_to_have_another() {
        let good =
            |uri, access, now| enrolled(uri).check_good(access, &State::default(), WallTime(now)).is_ok();
        for uri in ["hextet:node/n1", "hextet:admin/a", "hextet:lb/edge?select=a"] {
            assert!(good(uri, Access::Person(Level::Viewer), 999), "{uri}");
            assert!(!good(uri, Access::Person(Level::Viewer), 1000), "{uri}");
            assert!(good(uri, Access::Anybody, 1000), "{uri} may enroll anew");
            assert_eq!(good(uri, Access::Enrolled, 1_000_000), uri == "hextet:node/n1", "{uri}");
        }
        assert!(!good("hextet:node/n1", Access::Node, 1000));
    }

    #[test]
    fn a_compromised_ca_vouches_for_nodes_alone_and_a_retired_one_for_nobody() {
        let turned = |compromised, then: &[Turn]| {
            let rotate = Turn::Rotate { present: "a".into(), next: "b".into(), compromised };
            let begun = authority::turn(None, &rotate, &[], WallTime(0)).unwrap();
            then.iter().fold(begun, |now, next| authority::turn(Some(&now), next, &[], WallTime(0)).unwrap())
        };
        let (node, bob) = (enrolled("hextet:node/n1"), enrolled("hextet:viewer/bob"));
        let retired = turned(false, &[Turn::Retire { force: false }]);
        for (authorities, expected) in [
            (None, [Ok(()), Ok(()), Ok(())]),
            (Some(turned(false, &[])), [Ok(()), Ok(()), Ok(())]),
            (Some(turned(true, &[])), [Ok(()), Err(Denied::Compromised), Err(Denied::Compromised)]),
            (Some(retired), [Err(Denied::Retired), Err(Denied::Retired), Err(Denied::Retired)]),
        ] {
            let check = |who: &Identity, ca| who.check_ca(ca, authorities.as_ref());
            let found = [&node, &bob, &Identity::Local].map(|who| check(who, Some("a")));
            assert_eq!(found, expected, "{authorities:?}");
            assert_eq!(check(&node, None), Err(Denied::Retired));
            assert!(authorities.is_none() || check(&bob, Some("b")).is_ok());
        }
    }

    #[test]
    fn people_are_users_in_the_log_whatever_their_role() {
        let changers = ["user", "admin", "operator", "viewer"]
            .map(|role| enrolled(&format!("hextet:{role}/a")).changer());
        assert_eq!(changers, ["user:a"; 4]);
        assert_eq!(enrolled("hextet:lb/edge?select=a").changer(), "lb:edge");
    }

    #[test]
    fn bytes_that_are_no_certificate_are_nobody() {
        assert_eq!(Identity::of_certificate(b"no certificate"), Identity::Nobody);
    }

    fn enrolled(uri: &str) -> Identity {
        let enrolled = Enrolled::from_uri(uri).unwrap();
        Identity::Enrolled { enrolled, key: String::new(), ends: WallTime(1000) }
    }
}
