//! What users see: help, errors in the command line and in job files, compared with `*.out`.
//!
//! `UPDATE_EXPECT=1 cargo test -p netctl --test golden` writes the files anew.

use std::{
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use expect_test::expect_file;

fn netctl(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_netctl"));
    command.args(args).current_dir(folder()).stdin(Stdio::null());
    // Nothing of the machine or of its user may show.
    command.env_clear().env("COLUMNS", "100").env("HOME", "/nonexistent");
    command.env("HEXTET_SOCKET", "/nonexistent/server.sock");
    command
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// A command as it would be typed, and all that came of it.
fn transcript(args: &[&str]) -> String {
    let output = netctl(args).output().expect("netctl starts");
    let mut text = format!("$ {}\n", [&["netctl"], args].concat().join(" "));
    let (stdout, stderr) = (utf8(output.stdout), utf8(output.stderr));
    for (name, part) in [("", stdout), ("stderr:\n", stderr)] {
        if !part.is_empty() {
            writeln!(text, "{name}{}", part.trim_end()).expect("a String takes all");
        }
    }
    text + &format!("exit {}\n\n", output.status.code().expect("netctl was not killed"))
}

fn utf8(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("netctl writes UTF-8")
}

fn transcripts(commands: &[&[&str]]) -> String {
    commands.iter().map(|args| transcript(args)).collect()
}

fn help(command: &[String]) -> String {
    let args: Vec<&str> = command.iter().map(String::as_str).chain(["--help"]).collect();
    utf8(netctl(&args).output().expect("netctl starts").stdout)
}

/// The command and all below it, as its own help lists them.
fn with_subcommands(command: Vec<String>) -> Vec<Vec<String>> {
    let text = help(&command);
    let listed =
        text.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = listed.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names: Vec<String> =
        names.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    let below = names.into_iter().filter(|name| name != "help").flat_map(|name| {
        let below: Vec<String> = command.iter().cloned().chain([name]).collect();
        with_subcommands(below)
    });
    [command.clone()].into_iter().chain(below).collect()
}

#[test]
fn help_of_every_command() {
    let mut text = String::new();
    for command in with_subcommands(Vec::new()) {
        let args: Vec<&str> = command.iter().map(String::as_str).chain(["--help"]).collect();
        let transcript = transcript(&args);
        assert!(transcript.contains("Example"), "no example: {transcript}");
        text.push_str(&transcript);
    }
    assert!(text.matches("$ netctl").count() >= 17, "commands are missing");
    expect_file!["help.out"].assert_eq(&text);
}

#[test]
fn usage_errors() {
    expect_file!["usage-errors.out"].assert_eq(&transcripts(&[
        &[],
        &["pod"],
        &["pods", "--ipv4"],
        &["pods", "Hello/web"],
        &["pods", "-o", "xml"],
        &["pods", "--socket", "/a", "--credentials", "/b"],
        &["apply"],
        &["rm"],
        &["rm", "pod/x"],
        &["history", "token/x"],
        &["diff"],
        &["diff", "hello"],
        &["diff", "hello@1", "--since", "1h"],
        &["diff", "hello@1", "--by", "user:*"],
        &["plan"],
        &["compact", "--keep", "much"],
        &["server", "--history", "much"],
        &["rollback", "hello"],
        &["rollback", "hello", "--to", "0"],
        &["watch", "hello/"],
        &["logs", "hello-web-aaaaa", "--tail", "0"],
        &["token"],
        &["token", "--for", "root"],
        &["token", "--for", "lb"],
        &["token", "--for", "admin", "--select", "hello"],
        &["token", "--for", "node", "--valid", "soon"],
        &["token", "--for", "node", "--valid", "1ms"],
        &["login", "hello"],
        &["login", "hx1-AQ"],
        &["completions", "tcsh"],
        &["server", "--listen", "here"],
        &["server", "--lease", "5"],
        &["server", "--advertise", "host"],
        &["server", "--pod-ipv4", "10.254.0.1/20"],
        &["cluster", "init", "--pod-prefix", "2001:db8:1::/48"],
        &["cluster", "init", "--pod-prefix", "2001:db8:1::1/64"],
        &["cluster", "init", "--pod-prefix", "ff02::/64"],
        &["cluster", "init", "--pod-prefix", "fe80::/64"],
        &["cluster", "init", "--pod-prefix", "192.0.2.0/24"],
        &["node", "--join", "hx1-AQ"],
        &["node", "--pod-prefix", "2001:db8:1::/60"],
        &["node", "--pod-prefix", "lan"],
        &["node", "--label", "disk"],
        &["node", "--ndp", "arp"],
        &["node", "--cpu", "much"],
        &["node", "--memory", "64MB"],
        &["node", "up"],
    ]));
}

#[test]
fn without_a_server() {
    expect_file!["without-a-server.out"].assert_eq(&transcripts(&[
        &["pods"],
        &["jobs", "-o", "json"],
        &["pods", "--credentials", "/nonexistent/credentials.json"],
        &["apply", "-f", "../../examples/hello.yaml"],
    ]));
}

#[test]
fn job_file_errors() {
    let mut files: Vec<String> = std::fs::read_dir(folder().join("jobs"))
        .expect("tests/jobs is there")
        .map(|entry| format!("jobs/{}", entry.expect("it can be listed").file_name().display()))
        .collect();
    files.sort();
    let mut text = String::new();
    for file in &files {
        let transcript = transcript(&["apply", "-f", file]);
        assert!(transcript.contains("exit 2"), "not an error in a file: {transcript}");
        text.push_str(&transcript);
    }
    text.push_str(&transcript(&["apply", "-f", "jobs/there-is-none.yaml"]));
    expect_file!["job-file-errors.out"].assert_eq(&text);
}

#[test]
fn standard_input_is_a_job_file_too() {
    let mut child = netctl(&["apply", "-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("netctl starts");
    child.stdin.take().expect("it is piped").write_all(b"job: [a]\n").expect("netctl reads");
    let Output { status, stderr, .. } = child.wait_with_output().expect("netctl ends");
    assert_eq!(utf8(stderr), "error: <stdin>:1:6: expected text, found a list\n");
    assert_eq!(status.code(), Some(2));
}

#[test]
fn a_reader_that_stops_reading_is_no_failure() {
    let mut child = netctl(&["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("netctl starts");
    drop(child.stdout.take());
    let Output { status, stderr, .. } = child.wait_with_output().expect("netctl ends");
    assert_eq!((status.code(), utf8(stderr).as_str()), (Some(0), ""));
}

#[test]
fn completions_name_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let text = utf8(netctl(&["completions", shell]).output().expect("netctl starts").stdout);
        assert!(text.contains("routes") && text.contains("--ipv6") || text.contains("-l ipv6"), "{shell}");
    }
}

#[test]
fn the_version_is_that_of_the_package() {
    let text = transcript(&["--version"]);
    assert_eq!(text, format!("$ netctl --version\nnetctl {}\nexit 0\n\n", env!("CARGO_PKG_VERSION")));
}
