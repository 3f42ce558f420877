//! Which CAs vouch for the members of a cluster, and how one takes the place of another.
//!
//! There is one, and for the time of a rotation there are two: certificates are made by the new one, and those of the
//! old one are believed until everybody has another. CAs are named by the SHA-256 of their certificates, in hex. Keys
//! and certificates themselves are deliberately not here: the shell keeps them, before the state names them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{node::Node, time::WallTime};

/// The most people and load balancers of whom it is remembered that they came with a certificate of the old CA.
pub const LATE_MAX: usize = 1000;

/// Names in an error; the others are counted.
const NAMED_MAX: usize = 20;

/// The CAs of a cluster that has replaced its first one, or is about to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authorities {
    /// The one with which the cluster began: that of every node of which nothing else is known.
    pub first: String,
    /// The one that makes certificates.
    pub issuing: String,
    /// The one that goes out of use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<Leaving>,
}

/// A CA that makes no more certificates, and whose certificates are believed as yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    /// Which.
    pub ca: String,
    /// Since when.
    pub since: WallTime,
    /// Somebody else may have its key: only nodes, whose keys are known, are believed with its certificates.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub compromised: bool,
    /// People and load balancers that came with a certificate of it, by their key; at most [`LATE_MAX`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub late: BTreeMap<String, Late>,
}

/// A person or load balancer with a certificate of the CA that goes out of use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Late {
    /// As the certificate names them.
    pub holder: String,
    /// When the certificate ends, and this need not be known any more.
    pub ends: WallTime,
}

/// What an operator wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Another CA is to make certificates.
    Rotate {
        /// The one that does so now.
        present: String,
        /// The one that is to. Its key is kept by now.
        next: String,
        /// Somebody else may have the key of the present one.
        compromised: bool,
    },
    /// Back to the one before.
    Undo,
    /// The one that goes out of use is not believed any more.
    Retire {
        /// Also when somebody has no other certificate.
        force: bool,
    },
}

/// Why a turn is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TurnError {
    /// One at a time.
    #[error(
        "a rotation of the CA is under way: `netctl ca status` says who is missing; end it with `netctl ca retire`, or go back \
         with `netctl ca undo`"
    )]
    UnderWay,
    /// There is one CA.
    #[error("no rotation of the CA is under way; `netctl ca rotate` begins one")]
    NotUnderWay,
    /// The way back leads to a key that somebody else has.
    #[error(
        "the CA before this one was compromised: there is no way back to it; `netctl ca rotate` makes another"
    )]
    Compromised,
    /// Somebody would be locked out.
    #[error(
        "{count} would be locked out, whose certificates are of the old CA: {names}. They get another as soon as they \
         reach the server; wait for them, or leave them out with `netctl ca retire --force`: each then needs a new token"
    )]
    Missing {
        /// How many.
        count: usize,
        /// The first of them.
        names: String,
    },
}

impl Authorities {
    /// Whether certificates of this CA are believed.
    #[must_use]
    pub fn trusts(&self, ca: &str) -> bool {
        self.issuing == ca || self.is_leaving(ca)
    }

    /// Whether this CA goes out of use.
    #[must_use]
    pub fn is_leaving(&self, ca: &str) -> bool {
        self.leaving.as_ref().is_some_and(|leaving| leaving.ca == ca)
    }

    /// The CA that made a node's certificate.
    #[must_use]
    pub fn of_node<'a>(&'a self, node: &'a Node) -> &'a str {
        node.ca.as_deref().unwrap_or(&self.first)
    }

    /// The CA that makes another certificate for somebody who can keep the CA that comes with it, or cannot.
    #[must_use]
    pub fn for_renewal(&self, takes_ca: bool) -> &str {
        match &self.leaving {
            Some(leaving) if !takes_ca => &leaving.ca,
            _ => &self.issuing,
        }
    }

    /// Who has no certificate of the CA that makes them: nodes by name, then people and load balancers.
    #[must_use]
    pub fn missing<'a>(&self, nodes: impl Iterator<Item = &'a Node>, now: WallTime) -> Vec<String> {
        let Some(leaving) = &self.leaving else { return Vec::new() };
        let nodes = nodes.filter(|node| self.of_node(node) != self.issuing);
        let late = leaving.late.values().filter(|late| late.ends > now);
        let words = |late: &Late| late.holder.trim_start_matches("hextet:").to_owned();
        nodes.map(|node| format!("node/{}", node.name)).chain(late.map(words)).collect()
    }
}

/// What follows from a turn, or why it is not taken. `missing` would be locked out by the end of the old CA.
///
/// # Errors
/// Nothing changes then.
pub fn turn(
    now: Option<&Authorities>,
    turn: &Turn,
    missing: &[String],
    at: WallTime,
) -> Result<Authorities, TurnError> {
    let leaving = now.and_then(|now| now.leaving.as_ref());
    match (turn, now, leaving) {
        (Turn::Rotate { .. }, _, Some(_)) => Err(TurnError::UnderWay),
        (Turn::Rotate { present, next, compromised }, now, None) => Ok(Authorities {
            first: now.map_or(present, |now| &now.first).clone(),
            issuing: next.clone(),
            leaving: Some(left(present, at, *compromised)),
        }),
        (Turn::Undo, Some(_), Some(leaving)) if leaving.compromised => Err(TurnError::Compromised),
        (Turn::Undo, Some(now), Some(leaving)) => Ok(Authorities {
            first: now.first.clone(),
            issuing: leaving.ca.clone(),
            leaving: Some(left(&now.issuing, at, false)),
        }),
        (Turn::Retire { force }, Some(now), Some(_)) if *force || missing.is_empty() => {
            Ok(Authorities { leaving: None, ..now.clone() })
        }
        (Turn::Retire { .. }, Some(_), Some(_)) => Err(are_missing(missing)),
        (Turn::Undo | Turn::Retire { .. }, ..) => Err(TurnError::NotUnderWay),
    }
}

fn left(ca: &str, since: WallTime, compromised: bool) -> Leaving {
    Leaving { ca: ca.to_owned(), since, compromised, late: BTreeMap::new() }
}

fn are_missing(missing: &[String]) -> TurnError {
    let mut names = missing.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
    if missing.len() > NAMED_MAX {
        names.push_str(&format!(" and {} more", missing.len() - NAMED_MAX));
    }
    TurnError::Missing { count: missing.len(), names }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    const NOW: WallTime = WallTime(1_000);

    fn rotate(compromised: bool) -> Turn {
        Turn::Rotate { present: "a".into(), next: "b".into(), compromised }
    }

    fn began(compromised: bool) -> Authorities {
        turn(None, &rotate(compromised), &[], NOW).unwrap()
    }

    /// `issuing<leaving`, or the error's first words.
    fn outcome(now: Option<&Authorities>, taken: &Turn, missing: &[&str]) -> String {
        let missing: Vec<String> = missing.iter().map(|name| (*name).to_owned()).collect();
        match turn(now, taken, &missing, NOW) {
            Ok(Authorities { issuing, leaving: Some(leaving), .. }) => format!("{issuing}<{}", leaving.ca),
            Ok(Authorities { issuing, .. }) => issuing,
            Err(TurnError::UnderWay) => "under way".to_owned(),
            Err(TurnError::NotUnderWay) => "not under way".to_owned(),
            Err(TurnError::Compromised) => "compromised".to_owned(),
            Err(TurnError::Missing { count, .. }) => format!("{count} missing"),
        }
    }

    /// The table of docs/decisions/0015.
    #[test]
    fn every_phase_answers_every_turn() {
        let (moving, bad) = (began(false), began(true));
        let back = turn(Some(&moving), &Turn::Undo, &[], NOW).unwrap();
        let done = turn(Some(&moving), &Turn::Retire { force: false }, &[], NOW).unwrap();
        let again = Turn::Rotate { present: "b".into(), next: "c".into(), compromised: false };
        let (retire, force) = (Turn::Retire { force: false }, Turn::Retire { force: true });
        let row = |now: Option<&Authorities>| {
            [
                outcome(now, &again, &[]),
                outcome(now, &Turn::Undo, &[]),
                outcome(now, &retire, &[]),
                outcome(now, &retire, &["node/n1"]),
                outcome(now, &force, &["node/n1"]),
            ]
        };
        let none = "not under way";
        assert_eq!(row(None), ["c<b", none, none, none, none]);
        assert_eq!(row(Some(&moving)), ["under way", "a<b", "b", "1 missing", "b"]);
        assert_eq!(row(Some(&back)), ["under way", "b<a", "a", "1 missing", "a"]);
        assert_eq!(row(Some(&bad)), ["under way", "compromised", "b", "1 missing", "b"]);
        assert_eq!(row(Some(&done)), ["c<b", none, none, none, none]);
    }

    #[test]
    fn the_first_ca_is_remembered_through_all_rotations() {
        let done = turn(Some(&began(false)), &Turn::Retire { force: false }, &[], NOW).unwrap();
        let again = Turn::Rotate { present: "b".into(), next: "c".into(), compromised: false };
        assert_eq!(turn(Some(&done), &again, &[], NOW).unwrap().first, "a");
    }

    #[test]
    fn who_is_missing_is_named_and_a_certificate_that_has_ended_is_nobodys() {
        let mut moving = began(false);
        let of = |name: &str, ca: Option<&str>| Node { ca: ca.map(str::to_owned), ..testing::node(name) };
        let nodes = [of("n1", None), of("n2", Some("b")), of("n3", Some("a"))];
        let late = |holder: &str, ends| Late { holder: holder.to_owned(), ends: WallTime(ends) };
        let leaving = moving.leaving.as_mut().unwrap();
        leaving.late.insert("k1".into(), late("hextet:lb/edge?select=a", 2_000));
        leaving.late.insert("k2".into(), late("hextet:viewer/bob", 1_000));
        assert_eq!(moving.missing(nodes.iter(), NOW), ["node/n1", "node/n3", "lb/edge?select=a"]);
        assert!(moving.trusts("a") && moving.trusts("b") && !moving.trusts("c"));
        assert_eq!((moving.for_renewal(true), moving.for_renewal(false)), ("b", "a"));
    }

    #[test]
    fn many_that_are_missing_are_counted() {
        let missing: Vec<String> = (0..5000).map(|number| format!("node/n{number}")).collect();
        let error = are_missing(&missing).to_string();
        assert!(error.starts_with("5000 would be locked out") && error.contains("and 4980 more"), "{error}");
        assert!(error.len() < 700, "{error}");
    }
}
