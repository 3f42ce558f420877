//! The clauses: one file for each RFC, each clause in our words, with what we do about it.

use serde::Deserialize;

use super::{SUITE, mark::Marks};
use crate::tidy::tree::Tree;

/// An RFC, or what of it concerns us.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rfc {
    /// From the name of the file.
    #[serde(skip)]
    pub(super) number: u32,
    /// Its title.
    pub(super) title: String,
    /// Which part of it is here, and why.
    pub(super) about: String,
    /// In the order of the RFC.
    #[serde(rename = "clause")]
    pub(super) clauses: Vec<Clause>,
}

/// A sentence with a MUST, SHOULD or MAY that concerns us.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Clause {
    /// The RFC's own name for it (`REQ-8`), or section and a word (`7.1.1/hop-limit`).
    pub(super) id: String,
    /// How strong it is.
    pub(super) level: Level,
    /// What it demands, in our words.
    pub(super) says: String,
    /// What we do, as it demands.
    done: Option<String>,
    /// What we do instead, and why.
    differs: Option<String>,
    /// Why it does not concern us.
    not_applicable: Option<String>,
    /// Why no test can show it.
    pub(super) untested: Option<String>,
    /// Tests that cannot name the clause themselves: `path/of/file.rs name`.
    #[serde(default)]
    pub(super) tests: Vec<String>,
}

/// RFC 2119; a clause of an RFC without these words that demands as much counts as if it had them.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Level {
    /// Absolute.
    Must,
    /// With good reasons for exceptions.
    Should,
    /// Left to us.
    May,
}

/// What we do about a clause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict<'a> {
    /// As it demands.
    Done(&'a str),
    /// Something else, with the reason.
    Differs(&'a str),
    /// Nothing, with the reason.
    NotApplicable(&'a str),
}

impl Clause {
    /// What we do about it; none when the file says nothing or two things.
    pub(super) fn verdict(&self) -> Option<Verdict<'_>> {
        match (&self.done, &self.differs, &self.not_applicable) {
            (Some(text), None, None) => Some(Verdict::Done(text)),
            (None, Some(text), None) => Some(Verdict::Differs(text)),
            (None, None, Some(text)) => Some(Verdict::NotApplicable(text)),
            _ => None,
        }
    }
}

impl Level {
    /// The word.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Must => "MUST",
            Self::Should => "SHOULD",
            Self::May => "MAY",
        }
    }
}

/// All files of clauses, by number.
pub(super) fn read(tree: &Tree, findings: &mut Vec<String>) -> Vec<Rfc> {
    let mut rfcs = Vec::new();
    let folder = format!("{SUITE}/rfc");
    for file in tree.ending("toml").filter(|file| file.path.starts_with(&folder)) {
        let path = file.path.display();
        let number = file.path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        match (number, toml::from_str::<Rfc>(&file.text)) {
            (Some(number), Ok(rfc)) => rfcs.push(Rfc { number, ..rfc }),
            (None, _) => findings.push(format!("{path}: the file's name is not the number of an RFC")),
            (_, Err(error)) => findings.push(format!("{path}: {}", error.to_string().trim_end())),
        }
    }
    rfcs.sort_by_key(|rfc| rfc.number);
    rfcs
}

/// One line for each clause that says nothing of us, or is done without a test.
pub(super) fn check(rfcs: &[Rfc], marks: &Marks) -> Vec<String> {
    let mut findings = Vec::new();
    for rfc in rfcs {
        for (index, clause) in rfc.clauses.iter().enumerate() {
            let at = format!("{SUITE}/rfc/{}.toml: {}", rfc.number, clause.id);
            if rfc.clauses[..index].iter().any(|other| other.id == clause.id) {
                findings.push(format!("{at} is there twice"));
            }
            let shown = !marks.of(rfc.number, &clause.id).is_empty();
            match clause.verdict() {
                None => findings.push(format!("{at} needs one of `done`, `differs` and `not-applicable`")),
                Some(Verdict::Done(_)) if !shown && clause.untested.is_none() => findings.push(format!(
                    "{at} has no test: write `//= RFC {} {}` above one, or say in `untested` why there is none",
                    rfc.number, clause.id
                )),
                Some(_) if shown && clause.untested.is_some() => {
                    findings.push(format!("{at} has a test: take out `untested`"));
                }
                Some(_) => {}
            }
        }
    }
    findings
}
