//! The page: a table for each RFC.

use std::fmt::Write as _;

use super::{
    clause::{Clause, Rfc, Verdict},
    is_of_suite,
    mark::{Marks, Test},
    results::{Outcome, Results},
};

const HEAD: &str = "\
# The RFCs, clause by clause

Every clause of these RFCs that concerns a node, in our words; what we do about it; the test that shows it; and the
result with each backend. Made by `cargo xtask rfc` out of `tests/conformance/rfc/`, the tests and
`tests/conformance/results.txt`; `cargo xtask tidy` fails when this page says something else, when a clause is called
done without a test, or when a difference has no reason. [testing.md](testing.md#conformance) says how it works.

Backends: *ebpf* is the default; *kernel* is `--ndp kernel` for neighbour discovery and `--masquerade nftables` for the
IPv4 exit. A dash: the test looks into the eBPF logic itself and says nothing of the other backend.
";

/// All of it.
pub(super) fn page(rfcs: &[Rfc], marks: &Marks, results: &Results) -> String {
    let mut page = HEAD.to_owned();
    summary(&mut page, rfcs);
    for rfc in rfcs {
        section(&mut page, rfc, marks, results);
    }
    page
}

fn summary(page: &mut String, rfcs: &[Rfc]) {
    page.push_str("\n| RFC | | done | differs | not applicable |\n| --- | --- | --- | --- | --- |\n");
    for rfc in rfcs {
        let count = |wanted: fn(Verdict<'_>) -> bool| {
            rfc.clauses.iter().filter_map(Clause::verdict).filter(|verdict| wanted(*verdict)).count()
        };
        let done = count(|verdict| matches!(verdict, Verdict::Done(_)));
        let differs = count(|verdict| matches!(verdict, Verdict::Differs(_)));
        let not = count(|verdict| matches!(verdict, Verdict::NotApplicable(_)));
        let _ = writeln!(page, "| {} | {} | {done} | {differs} | {not} |", rfc.number, rfc.title);
    }
}

fn section(page: &mut String, rfc: &Rfc, marks: &Marks, results: &Results) {
    let _ = write!(page, "\n## RFC {}: {}\n\n{}\n\n", rfc.number, rfc.title, rfc.about.trim());
    page.push_str("| clause | | it says | we | shown by | ebpf | kernel |\n");
    page.push_str("| --- | --- | --- | --- | --- | --- | --- |\n");
    for clause in &rfc.clauses {
        let tests = marks.of(rfc.number, &clause.id);
        let cells = [
            clause.id.clone(),
            clause.level.word().to_owned(),
            clause.says.clone(),
            verdict(clause),
            shown_by(clause, tests),
            outcome(tests, results, &["ebpf"]),
            outcome(tests, results, &["kernel", "nftables"]),
        ];
        let cells: Vec<_> = cells.iter().map(|cell| cell.replace('\n', " ").replace('|', "\\|")).collect();
        let _ = writeln!(page, "| {} |", cells.join(" | "));
    }
}

fn verdict(clause: &Clause) -> String {
    match clause.verdict() {
        Some(Verdict::Done(text)) => text.to_owned(),
        Some(Verdict::Differs(text)) => format!("**differs:** {text}"),
        Some(Verdict::NotApplicable(text)) => format!("*not applicable:* {text}"),
        None => String::new(),
    }
}

fn shown_by(clause: &Clause, tests: &[Test]) -> String {
    if let Some(reason) = &clause.untested {
        return format!("no test: {reason}");
    }
    let links = tests.iter().map(|test| format!("[{}](../{})", test.name, test.path.display()));
    links.collect::<Vec<_>>().join(", ")
}

/// `passes` when all tests do. Tests outside of the suite are about the eBPF logic, and pass or CI fails.
fn outcome(tests: &[Test], results: &Results, backends: &[&str]) -> String {
    let (suite, others): (Vec<_>, Vec<_>) = tests.iter().partition(|test| is_of_suite(&test.path));
    let found = suite.iter().flat_map(|test| backends.iter().filter_map(|b| results.of(&test.name, b)));
    let found: Vec<_> = found.collect();
    let reasons = found.iter().filter_map(|outcome| match outcome {
        Outcome::Passes => None,
        Outcome::Differs(reason) => Some(reason.as_str()),
    });
    let mut reasons: Vec<_> = reasons.collect();
    reasons.dedup();
    if !reasons.is_empty() {
        return format!("differs: {}", reasons.join("; "));
    }
    let passes = !found.is_empty() || !others.is_empty() && backends == ["ebpf"];
    if passes {
        "passes".to_owned()
    } else if tests.is_empty() {
        String::new()
    } else {
        "-".to_owned()
    }
}
