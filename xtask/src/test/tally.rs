//! Reads what test binaries print and counts. A binary that ends without its own summary, or that was
//! killed, is a failure of its own.

use std::fmt;

/// What was counted so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    passed: usize,
    failed: usize,
    ignored: usize,
    /// `binary: test: reason`; the test itself ended well, because it cannot say "skipped" to its harness.
    skips: Vec<String>,
    failures: Vec<String>,
    summaries: usize,
}

impl Tally {
    /// Reads one line. Returns whether it tells the end of one test, or a skip.
    pub(crate) fn read(&mut self, binary: &str, line: &str) -> bool {
        let line = line.trim();
        if let Some(summary) = line.strip_prefix("test result: ") {
            self.summarise(summary);
            return false;
        }
        if let Some(skip) = line.strip_prefix("SKIP ").filter(|skip| skip.contains(": ")) {
            return self.note_skip(format!("{binary}: {skip}"));
        }
        let Some((name, outcome)) = test_line(line) else { return false };
        if outcome.starts_with("FAILED") {
            self.failures.push(format!("{binary}: {name}"));
        }
        true
    }

    /// Counts a failure that no test reported.
    pub(crate) fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }

    /// How many `test result` lines were read: one for each harness that came to its end.
    pub(crate) fn summaries(&self) -> usize {
        self.summaries
    }

    /// Adds what another binary printed.
    pub(crate) fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.skips.extend(other.skips);
        self.failures.extend(other.failures);
        self.summaries += other.summaries;
    }

    /// Counts `what` as skipped, with the reason.
    pub(crate) fn skip(&mut self, what: &str, reason: &str) {
        // `passed` is lowered by each skip line, because a skipping test ends well.
        self.passed += usize::from(self.note_skip(format!("{what}: {reason}")));
    }

    /// Whether no test ran, nor was skipped.
    pub(crate) fn is_empty(&self) -> bool {
        self.passed + self.failed + self.ignored + self.skips.len() + self.failures.len() == 0
    }

    /// Whether nothing failed.
    pub(crate) fn is_good(&self) -> bool {
        self.failed == 0 && self.failures.is_empty()
    }

    /// Names of what failed and was skipped, one per line; empty when all passed.
    pub(crate) fn details(&self) -> String {
        let skips = self.skips.iter().map(|skip| format!("skipped: {skip}\n"));
        let failures = self.failures.iter().map(|name| format!("failed: {name}\n"));
        skips.chain(failures).collect()
    }

    /// A test may say twice that it skips.
    fn note_skip(&mut self, skip: String) -> bool {
        let is_new = !self.skips.contains(&skip);
        if is_new {
            self.skips.push(skip);
        }
        is_new
    }

    /// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`
    fn summarise(&mut self, summary: &str) {
        self.summaries += 1;
        self.passed += number_before(summary, "passed");
        self.failed += number_before(summary, "failed");
        self.ignored += number_before(summary, "ignored");
    }
}

/// The line that a run ends with: `N passed, N failed, N skipped`.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let passed = self.passed.saturating_sub(self.skips.len());
        let failed = self.failed.max(self.failures.len());
        let skipped = self.ignored + self.skips.len();
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

fn test_line(line: &str) -> Option<(&str, &str)> {
    let (name, outcome) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let known = ["ok", "FAILED", "ignored"];
    known.iter().any(|word| outcome.starts_with(word)).then_some((name, outcome))
}

fn number_before(summary: &str, word: &str) -> usize {
    let mut words = summary.split([' ', ';']).filter(|word| !word.is_empty());
    let mut last = "";
    words
        .find(|next| {
            *next == word || {
                last = next;
                false
            }
        })
        .map_or(0, |_| last.parse().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Tally {
        let mut tally = Tally::default();
        for line in text.lines() {
            tally.read("net/pods", line);
        }
        tally
    }

    #[test]
    fn the_summaries_of_all_binaries_are_added() {
        let mut tally = read("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out");
        tally.add(read("test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out"));
        assert_eq!(tally.to_string(), "7 passed, 0 failed, 1 skipped");
        assert!(tally.is_good());
    }

    #[test]
    fn a_test_that_skips_is_not_one_that_passed() {
        let tally = read(
            "test a ... ok\nSKIP a: no TCX in this kernel\nSKIP a: no TCX in this kernel\ntest b ... ok\n\
             test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
        );
        assert_eq!(tally.to_string(), "1 passed, 0 failed, 1 skipped");
        assert_eq!(tally.details(), "skipped: net/pods: a: no TCX in this kernel\n");
    }

    #[test]
    fn a_skip_on_two_kernels_is_two_skips() {
        let text = "SKIP a: no TCX\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured;";
        let mut tally = read(text);
        tally.add(read(text));
        assert_eq!(tally.to_string(), "0 passed, 0 failed, 2 skipped");
    }

    #[test]
    fn a_failed_test_is_named() {
        let tally = read(
            "test a ... FAILED\ntest b ... ok\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
        );
        assert_eq!(tally.to_string(), "1 passed, 1 failed, 0 skipped");
        assert_eq!(tally.details(), "failed: net/pods: a\n");
        assert!(!tally.is_good());
    }

    #[test]
    fn a_failure_without_a_test_counts() {
        let mut tally = Tally::default();
        tally.fail("net/pods: ended by signal 9".to_owned());
        assert_eq!(tally.to_string(), "0 passed, 1 failed, 0 skipped");
        assert!(!tally.is_good());
    }

    #[test]
    fn a_stage_that_is_skipped_lowers_no_other_count() {
        let mut tally = read("test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
        tally.skip("vm", "no apt-get");
        assert_eq!(tally.to_string(), "2 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn lines_that_only_look_like_results_are_not_counted() {
        let tally = read("test the network ... with care\nSKIP\nSKIP this\ntest result");
        assert_eq!(tally, Tally::default());
    }
}
