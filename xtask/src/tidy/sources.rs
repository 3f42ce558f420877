//! Rules for single files.

use std::path::Path;

use super::tree::{Text, Tree};

/// What git leaves where both sides changed the same lines.
const MERGED: [&str; 2] = ["<<<<<<< ", ">>>>>>> "];

/// Module names that say nothing about what is in them.
const EMPTY_NAMES: [&str; 5] = ["common", "helpers", "misc", "types", "utils"];

/// Crate roots that must refuse unsafe code.
const SAFE: [&str; 7] = [
    "address/src/lib.rs",
    "api/src/lib.rs",
    "dataplane/core/src/lib.rs",
    "netctl/src/main.rs",
    "scheduler/core/src/lib.rs",
    "scheduler/src/lib.rs",
    "xtask/src/main.rs",
];

/// One line for each rule that a file breaks.
pub(super) fn check(tree: &Tree) -> Vec<String> {
    let mut findings: Vec<_> =
        tree.files.iter().filter(|file| is_written_by_hand(&file.path)).flat_map(blanks).collect();
    findings.extend(tree.ending("rs").flat_map(source));
    findings.extend(SAFE.iter().filter_map(|path| unsafe_root(tree, path)));
    findings
}

/// Golden files hold what programs print, and input of tests may be wrong on purpose.
fn is_written_by_hand(path: &Path) -> bool {
    let is = |ending: &str| path.extension().is_some_and(|found| found == ending);
    let is_input =
        path.components().any(|part| part.as_os_str() == "tests" || part.as_os_str() == "testdata");
    !(is("out") || is("txt") || is("yaml") && is_input)
}

fn blanks(file: &Text) -> Vec<String> {
    let path = file.path.display();
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        if line.contains('\t') {
            findings.push(format!("{path}:{}: a tab", index + 1));
        }
        if line.ends_with([' ', '\r']) {
            findings.push(format!("{path}:{}: blanks at the end of the line", index + 1));
        }
        if MERGED.iter().any(|mark| line.starts_with(mark)) {
            findings.push(format!("{path}:{}: a merge was not finished", index + 1));
        }
    }
    if !file.text.ends_with('\n') {
        findings.push(format!("{path}: no newline at the end"));
    }
    findings
}

fn source(file: &Text) -> Vec<String> {
    let path = file.path.display();
    let mut findings = Vec::new();
    if !file.text.starts_with("//!") {
        findings.push(format!("{path}:1: does not open with `//!` and what the file is for"));
    }
    let stem = file.path.file_stem().unwrap_or_default().to_string_lossy();
    if EMPTY_NAMES.contains(&&*stem) {
        findings.push(format!("{path}: `{stem}` says nothing; name the module after what is in it"));
    }
    // Beside the files of `tests/` only `mod.rs` is not a test of its own.
    if stem == "mod" && file.path.components().all(|part| part.as_os_str() != "tests") {
        findings.push(format!("{path}: write `foo.rs` beside `foo/`, not `foo/mod.rs`"));
    }
    findings
}

fn unsafe_root(tree: &Tree, path: &str) -> Option<String> {
    let refuses = tree.text(path).is_some_and(|text| text.contains("#![forbid(unsafe_code)]"));
    (!refuses).then(|| format!("{path}: `#![forbid(unsafe_code)]` is missing"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> Text {
        Text { path: path.into(), text: text.to_owned() }
    }

    #[test]
    fn a_file_says_what_it_is_for() {
        assert_eq!(source(&file("a/b.rs", "//! Routes.\n")), [""; 0]);
        assert_eq!(source(&file("a/b.rs", "use std::fs;\n")).len(), 1);
    }

    #[test]
    fn a_module_is_named_after_what_is_in_it() {
        assert_eq!(source(&file("a/utils.rs", "//! Things.\n")).len(), 1);
        assert_eq!(source(&file("a/mod.rs", "//! Things.\n")).len(), 1);
        assert_eq!(source(&file("node/tests/support/mod.rs", "//! Things.\n")), [""; 0]);
    }

    #[test]
    fn blanks_are_found_with_their_line() {
        assert_eq!(blanks(&file("a.md", "one\ntwo \n")), ["a.md:2: blanks at the end of the line"]);
        assert_eq!(blanks(&file("a.md", "one\n\ttwo\n")), ["a.md:2: a tab"]);
        assert_eq!(blanks(&file("a.md", "one\n<<<<<<< HEAD\n")), ["a.md:2: a merge was not finished"]);
        assert_eq!(blanks(&file("a.md", "one")), ["a.md: no newline at the end"]);
    }

    #[test]
    fn input_of_tests_may_be_wrong() {
        assert!(!is_written_by_hand(Path::new("netctl/tests/jobs/tab.yaml")));
        assert!(!is_written_by_hand(Path::new("netctl/tests/help.out")));
        assert!(is_written_by_hand(Path::new("examples/hello.yaml")));
        assert!(is_written_by_hand(Path::new("netctl/tests/golden.rs")));
    }

    #[test]
    fn a_core_that_allows_unsafe_code_is_found() {
        let tree = Tree { files: vec![file("api/src/lib.rs", "//! The API.\n")] };
        assert!(unsafe_root(&tree, "api/src/lib.rs").is_some());
    }
}
