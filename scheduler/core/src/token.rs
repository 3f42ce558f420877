//! What is kept of a join or login token: the hash of its secret, and what it may be used for.
//!
//! The secret itself is deliberately never stored.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{endpoint::Selector, time::WallTime};

/// The most tokens that are kept at a time.
pub const TOKENS_MAX: usize = 10_000;

/// SHA-256 of a token's secret, in hex.
pub type TokenId = String;

/// What is kept of a token until it is too old.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// What its holder becomes.
    pub role: Role,
    /// For whom it is; none for a node that names itself.
    pub name: Option<String>,
    /// When it stops being good, by the server's wall clock.
    pub expires: WallTime,
    /// SHA-256, in hex, of the public key that used it.
    pub used_by: Option<String>,
}

/// What the holder of a token becomes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A machine that runs pods.
    Node,
    /// A person of a cluster that had no levels yet, who could do everything: an admin.
    User,
    /// A person, or a tool that acts for one, who may do everything.
    Admin,
    /// A person who runs jobs and looks after nodes.
    Operator,
    /// A person who looks.
    Viewer,
    /// A reader of the addresses of one selector.
    Lb(Selector),
}

/// How much a person may do; each may do what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Reads.
    Viewer,
    /// Runs jobs and looks after nodes.
    Operator,
    /// Says who may do what, and what is lost for ever.
    Admin,
}

impl Role {
    /// The word for it in messages and certificates.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Role::Node => "node",
            Role::User => "user",
            Role::Admin => "admin",
            Role::Operator => "operator",
            Role::Viewer => "viewer",
            Role::Lb(_) => "lb",
        }
    }

    /// The word for it before the name of a changer: a person is a `user` on every level.
    #[must_use]
    pub fn changer_word(&self) -> &'static str {
        if self.level().is_some() { "user" } else { self.word() }
    }

    /// How much a person of this role may do; none for machines.
    #[must_use]
    pub fn level(&self) -> Option<Level> {
        match self {
            Role::User | Role::Admin => Some(Level::Admin),
            Role::Operator => Some(Level::Operator),
            Role::Viewer => Some(Level::Viewer),
            Role::Node | Role::Lb(_) => None,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Viewer => "viewer",
            Level::Operator => "operator",
            Level::Admin => "admin",
        })
    }
}

/// Why a token is not good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// No token has this secret, or it was forgotten after it became too old.
    #[error("the token is not known here, or too old; make a new one with `netctl token`")]
    Unknown,
    /// Somebody else used it.
    #[error("the token was used before and is good for one use; make a new one with `netctl token`")]
    Used,
    /// It is too old.
    #[error("the token is too old; make a new one with `netctl token`")]
    Expired,
    /// It is for something else.
    #[error("the token is for a {0}; make another with `netctl token --for`")]
    Role(&'static str),
    /// It is for somebody else.
    #[error("the token is for another name; leave the name out to take the token's")]
    Name,
}

impl Token {
    /// Checks that the holder of `key` may use it at `now`. Using it again with the same key is allowed,
    /// for one who did not get the first answer.
    ///
    /// # Errors
    /// [`TokenError::Expired`] and [`TokenError::Used`].
    pub fn check(&self, key: &str, now: WallTime) -> Result<(), TokenError> {
        if now >= self.expires {
            return Err(TokenError::Expired);
        }
        if self.used_by.as_deref().is_some_and(|user| user != key) { Err(TokenError::Used) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_of_before_is_an_admin_and_each_level_has_the_ones_before_it() {
        assert_eq!(Role::User.level(), Role::Admin.level());
        assert!(Level::Viewer < Level::Operator && Level::Operator < Level::Admin);
        assert_eq!(Role::Node.level(), None);
        assert_eq!([Role::User, Role::Viewer].map(|role| role.changer_word()), ["user", "user"]);
    }

    /// Tokens that were stored before there were levels.
    #[test]
    fn a_stored_user_token_is_read() {
        let role: Role = serde_json::from_str("\"user\"").unwrap();
        assert_eq!(role, Role::User);
    }

    #[test]
    fn a_token_serves_one_key_until_it_is_too_old() {
        let expires = WallTime(1000);
        let mut token = Token { role: Role::Node, name: None, expires, used_by: None };
        assert_eq!(token.check("a", WallTime(999)), Ok(()));
        token.used_by = Some("a".to_owned());
        assert_eq!(token.check("a", WallTime(999)), Ok(()));
        assert_eq!(token.check("b", WallTime(999)), Err(TokenError::Used));
        assert_eq!(token.check("a", WallTime(1000)), Err(TokenError::Expired));
    }
}
