//! The single-use token with which a node joins or a person or load balancer logs in.
//!
//! A token names the servers, the cluster's CA by its fingerprint, and a secret that the server accepts
//! once. It is not a credential: [`crate::connect::enroll`] turns it into one. It deliberately says nothing
//! about how long it is valid or what it allows: the server decides that, and can take it back.
//!
//! # Layout
//! `hx1-` and then, in base64url without padding:
//! ```text
//! version (1 byte, 1) | role (1) | SHA-256 of the CA certificate (32) | secret (16)
//! | count of servers (1) | for each: length (1), `host:port` in UTF-8
//! ```

use std::{fmt, str::FromStr};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};

/// The most servers that a token may name.
pub const SERVERS_MAX: usize = 8;

/// The most characters that are read as a token.
pub const TOKEN_LEN_MAX: usize = 4096;

const PREFIX: &str = "hx1-";
const VERSION: u8 = 1;

/// Lets its holder become one node, user or load balancer of one cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// What its holder becomes.
    pub role: Role,
    /// SHA-256 of the DER of the cluster's CA certificate.
    pub fingerprint: Fingerprint,
    /// What the server accepts once.
    pub secret: [u8; 16],
    /// Where the servers listen, `host:port`, in the order in which they are tried.
    pub servers: Vec<String>,
}

/// What the holder of a token becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A machine that runs pods.
    Node,
    /// A person, in tokens of servers that had no levels yet.
    User,
    /// A reader of the addresses of one selector.
    Lb,
    /// A person, or a tool that acts for one, who may do everything.
    Admin,
    /// A person who runs jobs and looks after nodes.
    Operator,
    /// A person who looks.
    Viewer,
}

/// SHA-256 of the DER of a certificate; prints as hex.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

/// Why a text is not a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Another text, or a token of a later format.
    #[error("not a token: it starts with `hx1-`; `netctl token` makes one")]
    Prefix,
    /// A character of another alphabet, often from a line break or a quote.
    #[error(
        "not a token: `{character}` at character {position} is not one of A-Z a-z 0-9 - _; copy it again"
    )]
    Character {
        /// What is there.
        character: char,
        /// Counted from 1.
        position: usize,
    },
    /// It ends too early.
    #[error("the token is cut off: copy all of it, it is one line without spaces")]
    CutOff,
    /// Bytes follow its end.
    #[error("the token is too long: something was pasted behind it")]
    TooLong,
    /// Made by a later server.
    #[error("the token has format {0}; this program reads format 1: use the server's version of netctl")]
    Version(u8),
    /// Damaged, or made by a later server.
    #[error(
        "the token is for role {0}, which this program does not know: use the server's version of netctl"
    )]
    Role(u8),
    /// It names no server.
    #[error("the token names no server: start the server with --advertise HOST:PORT and make a new one")]
    NoServers,
    /// A server in it is not `host:port`.
    #[error("the token is damaged: `{0}` is not HOST:PORT; copy it again")]
    Server(String),
}

impl Role {
    /// The word for it on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Node => "node",
            Role::User => "user",
            Role::Lb => "lb",
            Role::Admin => "admin",
            Role::Operator => "operator",
            Role::Viewer => "viewer",
        }
    }

    fn byte(self) -> u8 {
        match self {
            Role::Node => 1,
            Role::User => 2,
            Role::Lb => 3,
            Role::Admin => 4,
            Role::Operator => 5,
            Role::Viewer => 6,
        }
    }
}

impl TryFrom<u8> for Role {
    type Error = TokenError;

    fn try_from(byte: u8) -> Result<Role, TokenError> {
        match byte {
            1 => Ok(Role::Node),
            2 => Ok(Role::User),
            3 => Ok(Role::Lb),
            4 => Ok(Role::Admin),
            5 => Ok(Role::Operator),
            6 => Ok(Role::Viewer),
            other => Err(TokenError::Role(other)),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Fingerprint {
    /// The fingerprint of a certificate in DER.
    pub fn of(certificate_der: &[u8]) -> Fingerprint {
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate_der);
        Fingerprint(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// Leaves the secret out, so that it reaches no log.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("role", &self.role)
            .field("fingerprint", &self.fingerprint)
            .field("servers", &self.servers)
            .finish_non_exhaustive()
    }
}

/// The first [`SERVERS_MAX`] servers of at most 255 bytes are written; a server makes no other tokens.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(self.to_bytes()))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Token, TokenError> {
        let encoded = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        if encoded.len() > TOKEN_LEN_MAX {
            return Err(TokenError::TooLong);
        }
        check_alphabet(encoded)?;
        // With the alphabet checked, what remains is a length that no whole token has.
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(encoded).map_err(|_| TokenError::CutOff)?;
        Token::from_bytes(&bytes)
    }
}

impl Token {
    fn to_bytes(&self) -> Vec<u8> {
        let servers: Vec<&[u8]> = self
            .servers
            .iter()
            .map(|server| server.as_bytes())
            .filter(|server| server.len() <= usize::from(u8::MAX))
            .take(SERVERS_MAX)
            .collect();
        let mut bytes = vec![VERSION, self.role.byte()];
        bytes.extend(self.fingerprint.0);
        bytes.extend(self.secret);
        bytes.push(servers.len() as u8);
        for server in servers {
            bytes.push(server.len() as u8);
            bytes.extend(server);
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Token, TokenError> {
        let mut rest = Reader(bytes);
        let version = rest.byte()?;
        if version != VERSION {
            return Err(TokenError::Version(version));
        }
        let role = Role::try_from(rest.byte()?)?;
        let fingerprint = Fingerprint(rest.array()?);
        let secret = rest.array()?;
        let servers = rest.servers()?;
        if !rest.0.is_empty() {
            return Err(TokenError::TooLong);
        }
        Ok(Token { role, fingerprint, secret, servers })
    }
}

fn check_alphabet(encoded: &str) -> Result<(), TokenError> {
    let strange = |c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_');
    match encoded.chars().enumerate().find(|(_, c)| strange(*c)) {
        Some((index, character)) => {
            Err(TokenError::Character { character, position: PREFIX.len() + index + 1 })
        }
        None => Ok(()),
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], TokenError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(TokenError::CutOff)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, TokenError> {
        Ok(self.take(1)?[0])
    }

    fn array<const LEN: usize>(&mut self) -> Result<[u8; LEN], TokenError> {
        Ok(self.take(LEN)?.try_into().expect("LEN bytes were taken"))
    }

    fn servers(&mut self) -> Result<Vec<String>, TokenError> {
        let count = usize::from(self.byte()?);
        match count {
            0 => Err(TokenError::NoServers),
            1..=SERVERS_MAX => (0..count).map(|_| self.server()).collect(),
            _ => Err(TokenError::TooLong),
        }
    }

    fn server(&mut self) -> Result<String, TokenError> {
        let len = usize::from(self.byte()?);
        let text = String::from_utf8_lossy(self.take(len)?).into_owned();
        if is_host_and_port(&text) { Ok(text) } else { Err(TokenError::Server(text)) }
    }
}

/// Whether `text` is `host:port`, `1.2.3.4:port` or `[::1]:port`.
pub fn is_host_and_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let host_fits = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(inner) => inner.split('%').next().is_some_and(|addr| addr.parse::<std::net::Ipv6Addr>().is_ok()),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)),
    };
    host_fits && port.parse::<u16>().is_ok_and(|port| port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token {
            role: Role::Node,
            fingerprint: Fingerprint([7; 32]),
            secret: [9; 16],
            servers: vec!["[2001:db8::1]:4679".into(), "server.example:4679".into()],
        }
    }

    #[test]
    fn every_role_survives_text() {
        for role in [Role::Node, Role::User, Role::Lb, Role::Admin, Role::Operator, Role::Viewer] {
            let token = Token { role, ..token() };
            assert_eq!(token.to_string().parse(), Ok(token));
        }
    }

    #[test]
    fn white_space_around_a_token_is_ignored() {
        assert_eq!(format!("  {}\n", token()).parse(), Ok(token()));
    }

    #[test]
    fn text_form_is_stable() {
        assert_eq!(
            token().to_string(),
            "hx1-AQEHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwkJCQkJCQkJCQkJCQkJCQkCElsyMDAxOmRiODo6MV06NDY3ORNz\
             ZXJ2ZXIuZXhhbXBsZTo0Njc5"
        );
    }

    #[test]
    fn every_cut_is_noticed() {
        let text = token().to_string();
        for len in PREFIX.len()..text.len() {
            let error = text[..len].parse::<Token>().expect_err("a cut token is no token");
            assert!(matches!(error, TokenError::CutOff), "{len}: {error}");
        }
    }

    #[test]
    fn what_follows_a_token_is_noticed() {
        assert_eq!(format!("{}AAAA", token()).parse::<Token>(), Err(TokenError::TooLong));
        assert_eq!(format!("hx1-{}", "A".repeat(10_000)).parse::<Token>(), Err(TokenError::TooLong));
    }

    #[test]
    fn strange_characters_are_pointed_at() {
        assert_eq!("hx1-AB D".parse::<Token>(), Err(TokenError::Character { character: ' ', position: 7 }));
        assert_eq!("hello".parse::<Token>(), Err(TokenError::Prefix));
    }

    #[test]
    fn later_formats_and_roles_are_named() {
        let encode = |bytes: &[u8]| format!("hx1-{}", BASE64_URL_SAFE_NO_PAD.encode(bytes));
        let mut bytes = token().to_bytes();
        bytes[1] = 9;
        assert_eq!(encode(&bytes).parse::<Token>(), Err(TokenError::Role(9)));
        bytes[0] = 2;
        assert_eq!(encode(&bytes).parse::<Token>(), Err(TokenError::Version(2)));
    }

    #[test]
    fn a_token_needs_a_server() {
        let text = Token { servers: vec![], ..token() }.to_string();
        assert_eq!(text.parse::<Token>(), Err(TokenError::NoServers));
        let text = Token { servers: vec!["::1".into()], ..token() }.to_string();
        assert_eq!(text.parse::<Token>(), Err(TokenError::Server("::1".into())));
    }

    #[test]
    fn hosts_and_ports() {
        for good in ["n1:4679", "192.0.2.1:1", "[::1]:65535", "[fe80::1%eth0]:4679", "a.b-c.d:80"] {
            assert!(is_host_and_port(good), "{good}");
        }
        for bad in ["", "n1", "n1:", "n1:0", "n1:65536", ":4679", "::1:4679x", "[n1]:4679", "n 1:4679"] {
            assert!(!is_host_and_port(bad), "{bad}");
        }
    }

    #[test]
    fn debug_text_holds_no_secret() {
        let text = format!("{:?}", Token { secret: [0xAB; 16], ..token() });
        assert!(!text.contains("171") && !text.to_lowercase().contains("abab"), "{text}");
    }
}
