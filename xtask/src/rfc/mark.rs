//! The tests that name clauses: `//= RFC 4787 REQ-8, RFC 5382 REQ-4` above a test, in any source file.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::clause::Rfc;
use crate::tidy::tree::{Text, Tree};

/// What a comment that names clauses begins with.
const MARK: &str = "//= ";

/// A test that shows a clause.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Test {
    /// Its file, from the top of the checkout.
    pub(super) path: PathBuf,
    /// Its function.
    pub(super) name: String,
}

/// Tests by clause.
#[derive(Debug, Default)]
pub(super) struct Marks(BTreeMap<(u32, String), Vec<Test>>);

impl Marks {
    /// The tests that show a clause.
    pub(super) fn of(&self, rfc: u32, clause: &str) -> &[Test] {
        self.0.get(&(rfc, clause.to_owned())).map_or(&[], Vec::as_slice)
    }

    /// Every test, once for each clause that it shows.
    pub(super) fn tests(&self) -> impl Iterator<Item = &Test> {
        self.0.values().flatten()
    }

    fn add(&mut self, rfc: u32, clause: &str, test: Test) {
        self.0.entry((rfc, clause.to_owned())).or_default().push(test);
    }
}

/// Collects the marks of all sources, and the tests that the clauses name.
pub(super) fn read(tree: &Tree, rfcs: &[Rfc], findings: &mut Vec<String>) -> Marks {
    let mut marks = Marks::default();
    for file in tree.ending("rs") {
        for mark in marks_of(file) {
            match mark.and_then(|(rfc, clause, test)| known(rfcs, rfc, clause).map(|()| (rfc, clause, test)))
            {
                Ok((rfc, clause, test)) => marks.add(rfc, clause, test),
                Err(finding) => findings.push(format!("{}: {finding}", file.path.display())),
            }
        }
    }
    for rfc in rfcs {
        for clause in &rfc.clauses {
            for text in &clause.tests {
                match named(tree, text) {
                    Some(test) => marks.add(rfc.number, &clause.id, test),
                    None => {
                        findings.push(format!("RFC {} {}: there is no test {text}", rfc.number, clause.id))
                    }
                }
            }
        }
    }
    marks
}

/// `path/of/file.rs name`, where there is such a test.
fn named(tree: &Tree, text: &str) -> Option<Test> {
    let (path, name) = text.split_once(' ')?;
    let has_test = tree.text(path)?.contains(&format!("#[test]\nfn {name}("))
        || tree.text(path)?.contains(&format!("#[test]\n    fn {name}("));
    has_test.then(|| Test { path: path.into(), name: name.to_owned() })
}

type Mark<'a> = (u32, &'a str, Test);

fn marks_of(file: &Text) -> Vec<Result<Mark<'_>, String>> {
    let lines: Vec<&str> = file.text.lines().map(str::trim).collect();
    let mut marks = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let Some(clauses) = line.strip_prefix(MARK) else { continue };
        let test = test_below(&file.path, &lines[index..])
            .ok_or_else(|| format!("line {}: `{line}` is not above a test", index + 1));
        for clause in clauses.split(", ") {
            let clause =
                parse(clause).ok_or_else(|| format!("line {}: `{clause}` names no clause", index + 1));
            marks.push(test.clone().and_then(|test| clause.map(|(rfc, id)| (rfc, id, test))));
        }
    }
    marks
}

/// `RFC 4787 REQ-8`
fn parse(text: &str) -> Option<(u32, &str)> {
    let (number, clause) = text.strip_prefix("RFC ")?.split_once(' ')?;
    Some((number.parse().ok()?, clause))
}

/// Tests that are called by a macro, which gives them their attribute.
const CALLED: &str = "dataplane/tests/ndp";

/// The function that follows the comments and attributes.
fn test_below(path: &Path, lines: &[&str]) -> Option<Test> {
    let is_between = |line: &&&str| line.starts_with("//") || line.starts_with("#[");
    let heads: Vec<_> = lines.iter().take_while(is_between).collect();
    let is_called = super::is_of_suite(path) || path.starts_with(CALLED);
    let is_test = is_called || heads.iter().any(|line| line.contains("test]"));
    let signature = lines.get(heads.len())?.trim_start_matches("pub(crate) ").trim_start_matches("async ");
    let signature = signature.strip_prefix("fn ")?;
    let name = signature.split('(').next()?.to_owned();
    is_test.then(|| Test { path: path.to_owned(), name })
}

fn known(rfcs: &[Rfc], rfc: u32, clause: &str) -> Result<(), String> {
    let found = rfcs.iter().filter(|known| known.number == rfc).flat_map(|known| &known.clauses);
    match found.into_iter().any(|known| known.id == clause) {
        true => Ok(()),
        false => Err(format!("tests/conformance/rfc/{rfc}.toml has no clause {clause}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(text: &str) -> Vec<Result<(u32, String, String), String>> {
        let file = Text { path: "a/b.rs".into(), text: text.to_owned() };
        let own = |(rfc, clause, test): Mark<'_>| (rfc, clause.to_owned(), test.name);
        marks_of(&file).into_iter().map(|mark| mark.map(own)).collect()
    }

    #[test]
    fn a_mark_names_the_test_below_it() {
        let text = "//= RFC 4787 REQ-8, RFC 5382 REQ-4\n/// Why.\n#[test]\nfn strangers_stay_out() {}\n";
        let name = "strangers_stay_out".to_owned();
        assert_eq!(
            marks(text),
            [Ok((4787, "REQ-8".to_owned(), name.clone())), Ok((5382, "REQ-4".to_owned(), name))]
        );
    }

    #[test]
    fn a_mark_above_what_is_no_test_is_found() {
        assert!(marks("//= RFC 4787 REQ-8\nfn helper() {}\n")[0].is_err());
        assert!(marks("//= RFC 4787 REQ-8\n\n#[test]\nfn far_away() {}\n")[0].is_err());
        assert!(marks("//= rfc 4787\n#[test]\nfn nothing() {}\n")[0].is_err());
    }
}
