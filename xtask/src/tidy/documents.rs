//! Commands and crates that documents name must exist, and every crate must be on the map.

use std::{collections::BTreeSet, path::Path};

use clap::CommandFactory;
use serde_json::Value;

use super::tree::{Text, Tree};
use crate::Xtask;

/// The map of the code.
const MAP: &str = "docs/architecture.md";

/// Where the printed help of netctl is kept as golden files.
const GOLDEN: &str = "netctl/tests";

/// One line for each thing that a document says and the code does not.
pub(super) fn check(tree: &Tree, metadata: &Value) -> Vec<String> {
    let xtask: BTreeSet<String> =
        Xtask::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let netctl = netctl_commands(tree);
    let mut findings = Vec::new();
    for document in tree.ending("md") {
        findings.extend(unknown_commands(document, "cargo xtask", &xtask));
        // Without golden files there is nothing to compare with; netctl's own tests demand them.
        if !netctl.is_empty() {
            findings.extend(unknown_commands(document, "netctl", &netctl));
        }
    }
    findings.extend(missing_files(tree));
    findings.extend(unmapped_crates(tree, metadata));
    findings
}

/// Commands in code spans and blocks: `netctl WORD`, or `netctl node WORD`, that are no command.
fn unknown_commands(document: &Text, program: &str, known: &BTreeSet<String>) -> Vec<String> {
    let mut findings = Vec::new();
    for (number, code) in code_of(&document.text) {
        let unknown = commands_after(&code, program).filter_map(|words| unknown(&words, known));
        let path = document.path.display();
        findings.extend(unknown.map(|words| format!("{path}:{number}: there is no `{program} {words}`")));
    }
    findings
}

/// The part of `words` that names no command. A second word is one only below a command with commands.
fn unknown(words: &[&str], known: &BTreeSet<String>) -> Option<String> {
    let first = *words.first()?;
    if !known.contains(first) {
        return Some(first.to_owned());
    }
    let both = format!("{first} {}", words.get(1)?);
    let has_commands = known.iter().any(|command| command.starts_with(&format!("{first} ")));
    (has_commands && !known.contains(&both)).then_some(both)
}

/// Code of a document, with line numbers: whole lines of blocks, and spans between backticks.
fn code_of(text: &str) -> Vec<(usize, String)> {
    let mut code = Vec::new();
    let mut in_block = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if in_block {
            // What follows `#` is a remark.
            let command = line.split(" #").next().unwrap_or(line);
            code.push((index + 1, command.to_owned()));
        } else {
            code.extend(line.split('`').skip(1).step_by(2).map(|span| (index + 1, span.to_owned())));
        }
    }
    code
}

/// The plain words after each `program` that stands where a command can start.
fn commands_after<'a>(code: &'a str, program: &'a str) -> impl Iterator<Item = Vec<&'a str>> {
    code.match_indices(program).filter_map(move |(at, _)| {
        let before = code[..at].chars().next_back();
        let starts = before.is_none_or(|c| c == '(' || c == '/' || c == ' ');
        let after = code[at + program.len()..].strip_prefix(' ')?;
        let words: Vec<_> = after.split(' ').map(command_word).take_while(|word| !word.is_empty()).collect();
        (starts && !words.is_empty()).then_some(words)
    })
}

/// `pods` of `pods)`; nothing of `--ipv6`, `JOB` and `<command>`.
fn command_word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_lowercase() && c != '-').unwrap_or(text.len());
    if text.starts_with(|c: char| c.is_ascii_lowercase()) { &text[..end] } else { "" }
}

/// Commands from the golden file of all help: `$ netctl node plan --help` is the command `node plan`.
fn netctl_commands(tree: &Tree) -> BTreeSet<String> {
    let golden = tree.files.iter().filter(|file| file.path.starts_with(GOLDEN));
    let lines = golden.flat_map(|file| file.text.lines());
    let commands = lines.filter_map(|line| line.strip_prefix("$ netctl ")?.strip_suffix(" --help"));
    commands.map(str::to_owned).collect()
}

/// Links of documents to files of this tree.
fn missing_files(tree: &Tree) -> Vec<String> {
    let mut findings = Vec::new();
    for document in tree.ending("md") {
        let folder = document.path.parent().unwrap_or(Path::new(""));
        for link in links_of(&document.text) {
            let wanted = normal(&folder.join(link));
            let exists = tree.files.iter().any(|file| file.path == wanted || file.path.starts_with(&wanted));
            if !exists {
                findings.push(format!("{}: the link to {link} leads nowhere", document.path.display()));
            }
        }
    }
    findings
}

fn links_of(text: &str) -> impl Iterator<Item = &str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let files = targets.filter_map(|target| target.split('#').next());
    files.filter(|target| !target.is_empty() && !target.contains("://") && !target.contains(' '))
}

/// Takes `..` out of a relative path.
fn normal(path: &Path) -> std::path::PathBuf {
    let mut normal = std::path::PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => _ = normal.pop(),
            std::path::Component::CurDir => {}
            part => normal.push(part),
        }
    }
    normal
}

/// Folders of packages that the map does not name.
fn unmapped_crates(tree: &Tree, metadata: &Value) -> Vec<String> {
    let Some(map) = tree.text(MAP) else { return vec![format!("{MAP} is missing")] };
    let root = metadata["workspace_root"].as_str().unwrap_or_default();
    let members: Vec<_> = metadata["workspace_members"].as_array().into_iter().flatten().collect();
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let own = packages.filter(|package| members.contains(&&package["id"]));
    let folders = own.filter_map(|package| {
        Path::new(package["manifest_path"].as_str()?).parent()?.strip_prefix(root).ok()
    });
    let missing = folders.filter(|folder| !map.contains(&format!("{}/", folder.display())));
    missing.map(|folder| format!("{MAP}: the crate {}/ is not on the map", folder.display())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Text {
        Text { path: "README.md".into(), text: text.to_owned() }
    }

    fn known(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_command_that_does_not_exist_is_found_with_its_line() {
        let text =
            "Run `netctl pods`.\n\n```\nnetctl pds --ipv6   # netctl nothing\nping $(netctl pods)\n```\n";
        assert_eq!(
            unknown_commands(&document(text), "netctl", &known(&["pods"])),
            ["README.md:4: there is no `netctl pds`"]
        );
    }

    #[test]
    fn prose_and_placeholders_are_not_commands() {
        let text = "netctl is one binary; `netctl` alone, `netctl --help`, `cargo xtask <command>`.\n";
        assert_eq!(unknown_commands(&document(text), "netctl", &known(&[])), [""; 0]);
        assert_eq!(unknown_commands(&document(text), "cargo xtask", &known(&[])), [""; 0]);
    }

    #[test]
    fn a_command_below_another_is_checked_too() {
        let known = known(&["node", "node plan", "logs"]);
        let text = "`netctl node plan`, `netctl node pln`, `netctl node --join hx1`, `netctl logs web`\n";
        assert_eq!(
            unknown_commands(&document(text), "netctl", &known),
            ["README.md:1: there is no `netctl node pln`"]
        );
    }

    #[test]
    fn commands_are_read_from_golden_files() {
        let text = "$ netctl --help\nUsage\n$ netctl node plan --help\nUsage\n".to_owned();
        let tree = Tree { files: vec![Text { path: "netctl/tests/help.out".into(), text }] };
        assert_eq!(netctl_commands(&tree), known(&["node plan"]));
    }

    #[test]
    fn a_link_to_a_file_that_is_gone_is_found() {
        let files = vec![
            Text {
                path: "docs/a.md".into(),
                text: "[b](../node) [c](c.md#x) [web](https://x.org)".to_owned(),
            },
            Text { path: "node/src/lib.rs".into(), text: "//! Node.\n".to_owned() },
        ];
        assert_eq!(missing_files(&Tree { files }), ["docs/a.md: the link to c.md leads nowhere"]);
    }
}
