//! Where etcd is: `etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`.

use std::{path::PathBuf, str::FromStr};

use hextet_api::token::is_host_and_port;

/// Where the keys are, unless the location says otherwise.
const PREFIX: &str = "/hextet";
const PREFIX_LEN_MAX: usize = 128;
/// Members of an etcd cluster that are named.
const ENDPOINTS_MAX: usize = 9;

/// Where etcd is, and below which key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// `host:port` of its members.
    pub endpoints: Vec<String>,
    /// What every key begins with: `/hextet`.
    pub prefix: String,
    /// None: without TLS.
    pub tls: Option<TlsFiles>,
}

/// How etcd is known, and how this server is known to it. PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The CA of etcd's certificates.
    pub ca: PathBuf,
    /// The certificate and key that are shown to it.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// Why a text is not a location.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    /// Another scheme.
    #[error("write etcd://HOST:PORT, with several members etcd://HOST:PORT,HOST:PORT")]
    Scheme,
    /// Not a member.
    #[error("{0:?} is not HOST:PORT, such as n1.example:2379 or [2001:db8::1]:2379")]
    Endpoint(String),
    /// Too many members.
    #[error("at most {ENDPOINTS_MAX} members can be named")]
    TooMany,
    /// A password would be seen by everybody who lists processes.
    #[error(
        "no user or password here: give etcd a client certificate whose common name is the user (--etcd-cert)"
    )]
    User,
    /// Not a prefix.
    #[error("the prefix after the members has 1 to {PREFIX_LEN_MAX} of a-z, 0-9, '-', '_' and '/'")]
    Prefix,
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Location, LocationError> {
        let rest = text.strip_prefix("etcd://").ok_or(LocationError::Scheme)?;
        let (members, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if members.contains('@') {
            return Err(LocationError::User);
        }
        let endpoints: Vec<String> = members.split(',').map(str::to_owned).collect();
        if let Some(wrong) = endpoints.iter().find(|endpoint| !is_host_and_port(endpoint)) {
            return Err(LocationError::Endpoint(wrong.clone()));
        }
        if endpoints.len() > ENDPOINTS_MAX {
            return Err(LocationError::TooMany);
        }
        Ok(Location { endpoints, prefix: read_prefix(prefix)?, tls: None })
    }
}

fn read_prefix(text: &str) -> Result<String, LocationError> {
    let text = text.trim_end_matches('/');
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_/".contains(&byte);
    match text {
        "" => Ok(PREFIX.to_owned()),
        _ if text.len() <= PREFIX_LEN_MAX && text.bytes().all(good) => Ok(format!("/{text}")),
        _ => Err(LocationError::Prefix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(Vec<String>, String), String> {
        let location: Result<Location, _> = text.parse();
        location.map(|found| (found.endpoints, found.prefix)).map_err(|error| error.to_string())
    }

    #[test]
    fn members_and_a_prefix_are_read() {
        let one = (vec!["127.0.0.1:2379".to_owned()], "/hextet".to_owned());
        assert_eq!(parse("etcd://127.0.0.1:2379"), Ok(one.clone()));
        assert_eq!(parse("etcd://127.0.0.1:2379/"), Ok(one));
        let (members, prefix) = parse("etcd://[2001:db8::1]:2379,b.example:2379/rack/one").unwrap();
        assert_eq!(members, ["[2001:db8::1]:2379", "b.example:2379"]);
        assert_eq!(prefix, "/rack/one");
    }

    #[test]
    fn what_is_wrong_is_said_with_what_is_right() {
        let cases = [
            ("redis://x:1", "write etcd://HOST:PORT"),
            ("etcd://", "is not HOST:PORT"),
            ("etcd://host", "\"host\" is not HOST:PORT"),
            ("etcd://a:1,,b:2", "\"\" is not HOST:PORT"),
            ("etcd://root:secret@host:2379", "no user or password here"),
            ("etcd://a:1/Capital", "the prefix after the members"),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
