//! What the conformance suite found: one line for each test and backend. The suite itself holds to it, so that a
//! test that begins to pass or to fail is noticed.
//!
//! ```text
//! ebpf one_port_for_all_remotes passes
//! nftables one_port_for_all_remotes differs: the kernel maps by address and port
//! ```

use std::{collections::BTreeMap, fmt};

use super::{is_of_suite, mark::Marks};

/// The file's first lines.
const HEAD: &str = "# Made by `cargo xtask rfc --run`; the suite fails when it finds something else.\n\
                    # The reasons behind `differs:` are written by hand.\n";

/// What a test does with a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It passes.
    Passes,
    /// It fails, with the reason, which is empty until somebody has written it.
    Differs(String),
}

/// Outcomes by test and backend.
#[derive(Debug, Default)]
pub(super) struct Results(BTreeMap<(String, String), Outcome>);

impl Results {
    /// Reads the file.
    pub(super) fn read(text: &str, findings: &mut Vec<String>) -> Self {
        let mut results = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            match parse(line) {
                Some((key, outcome)) => _ = results.insert(key, outcome),
                None => findings.push(format!("{}: `{line}` is not understood", super::RESULTS)),
            }
        }
        Self(results)
    }

    /// What a test does with a backend, if it was run with it.
    pub(super) fn of(&self, test: &str, backend: &str) -> Option<&Outcome> {
        self.0.get(&(test.to_owned(), backend.to_owned()))
    }

    /// Whether nothing was run.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The outcomes in what the suite printed (`CONFORMANCE ebpf name passes`), with the reasons that are known.
    pub(super) fn learn(&self, said: &str) -> Self {
        let found = said.lines().filter_map(|line| parse(line.split_once("CONFORMANCE ")?.1));
        let with_reason = |(key, outcome)| {
            let known = self.0.get(&key).filter(|known| matches!(known, Outcome::Differs(_)));
            match (outcome, known) {
                (Outcome::Differs(_), Some(known)) => (key, known.clone()),
                (outcome, _) => (key, outcome),
            }
        };
        Self(found.map(with_reason).collect())
    }

    /// One line for each test of the suite that was not run, each that is gone, and each difference without reason.
    pub(super) fn check(&self, marks: &Marks) -> Vec<String> {
        let suite = || marks.tests().filter(|test| is_of_suite(&test.path));
        let mut findings = Vec::new();
        for test in suite() {
            if self.of(&test.name, "ebpf").is_none() {
                let finding = format!("{} was never run: `cargo xtask rfc --run`", test.name);
                if !findings.contains(&finding) {
                    findings.push(finding);
                }
            }
        }
        for ((test, backend), outcome) in &self.0 {
            if *outcome == Outcome::Differs(String::new()) {
                findings.push(format!("{}: why does {test} differ with {backend}?", super::RESULTS));
            }
            if !suite().any(|known| known.name == *test) {
                findings.push(format!("{}: no test {test} names a clause", super::RESULTS));
            }
        }
        findings
    }
}

fn parse(line: &str) -> Option<((String, String), Outcome)> {
    let (backend, rest) = line.split_once(' ')?;
    let (test, outcome) = rest.split_once(' ')?;
    let outcome = match outcome.split_once(':') {
        None if outcome == "passes" => Outcome::Passes,
        Some(("differs", reason)) => Outcome::Differs(reason.trim().to_owned()),
        _ => return None,
    };
    Some(((test.to_owned(), backend.to_owned()), outcome))
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HEAD)?;
        for ((test, backend), outcome) in &self.0 {
            match outcome {
                Outcome::Passes => writeln!(f, "{backend} {test} passes")?,
                Outcome::Differs(reason) => writeln!(f, "{backend} {test} differs: {reason}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_keeps_the_reasons_that_were_written() {
        let before = Results::read("nftables a differs: because\nebpf b differs: old\n", &mut Vec::new());
        let after = before.learn("test x ... CONFORMANCE nftables a differs:\nCONFORMANCE ebpf b passes\n");
        assert_eq!(after.of("a", "nftables"), Some(&Outcome::Differs("because".to_owned())));
        assert_eq!(after.of("b", "ebpf"), Some(&Outcome::Passes));
        assert_eq!(Results::read(&after.to_string(), &mut Vec::new()).0, after.0);
    }

    #[test]
    fn a_difference_needs_its_reason() {
        let results = Results::read("ebpf a differs:\nebpf b perhaps\n", &mut Vec::new());
        assert!(results.check(&Marks::default())[0].contains("why does a differ with ebpf?"));
    }
}
