//! The command line as types, and the way from each command to its file.

mod apply;
mod backup;
mod ca;
mod cluster;
mod compact;
mod completions;
mod deploy;
mod deploys;
mod diff;
mod events;
mod flows;
mod history;
mod jobs;
mod login;
mod logs;
mod node;
mod nodes;
mod plan;
mod pods;
mod retry;
mod rm;
mod rollback;
mod routes;
mod server;
mod show;
mod status;
mod supervise;
mod token;
mod watch;
mod whois;
mod why;

use std::{future::Future, io, io::IsTerminal as _};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::print::{Format, note};

/// Pods with real IPv6 addresses, and just enough scheduler to use them
///
/// Plural nouns list, verbs act. Client commands find the server by --socket or --credentials; on the
/// server's machine root needs neither.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// The shape of the result: table, json or yaml
    #[arg(short, long, global = true, value_enum, value_name = "FORMAT", hide_possible_values = true)]
    output: Option<Format>,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  netctl server                          start a cluster; prints the line to paste on each node
  netctl apply -f examples/hello.yaml    run three pods
  ping -6 $(netctl pods --ipv6 | head -1)

`netctl COMMAND --help` shows an example of each command.
Logs of `server` and `node` go to stderr; HEXTET_LOG=debug shows more of them.";

/// Each command says what it does in its own file.
#[derive(Debug, Subcommand)]
enum Command {
    Server(Box<server::Args>),
    Cluster(cluster::Args),
    Node(Box<node::Args>),
    Apply(apply::Args),
    Plan(plan::Args),
    Deploy(deploy::Args),
    Deploys(deploys::Args),
    Rm(rm::Args),
    Rollback(rollback::Args),
    History(history::Args),
    Diff(diff::Args),
    Compact(compact::Args),
    Show(show::Args),
    Jobs(jobs::Args),
    Pods(pods::Args),
    Nodes(nodes::Args),
    Routes(routes::Args),
    Flows(flows::Args),
    Whois(whois::Args),
    Logs(logs::Args),
    Why(why::Args),
    Retry(retry::Args),
    Events(events::Args),
    Watch(watch::Args),
    Token(token::Args),
    Ca(ca::Args),
    Login(login::Args),
    Completions(completions::Args),
    #[command(hide = true)]
    Supervise(supervise::Args),
}

/// A command line that is wrong in a way that clap cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct WrongUse(pub(crate) String);

/// Does what the command line says.
pub(crate) fn run(cli: Cli) -> anyhow::Result<()> {
    let chosen = cli.output;
    let format = chosen.unwrap_or(Format::Table);
    match cli.command {
        Command::Server(args) => server::run(*args, format),
        Command::Cluster(args) => cluster::run(args, format),
        Command::Node(args) => node::run(*args, format),
        Command::Apply(args) => block_on(apply::run(args, format)),
        Command::Plan(args) => block_on(plan::run(args, format)),
        Command::Deploy(args) => block_on(deploy::run(args, format)),
        Command::Deploys(args) => block_on(deploys::run(args, format)),
        Command::Rm(args) => block_on(rm::run(args, format)),
        Command::Rollback(args) => block_on(rollback::run(args, format)),
        Command::History(args) => block_on(history::run(args, format)),
        Command::Diff(args) => block_on(diff::run(args, format)),
        Command::Compact(args) => block_on(compact::run(args, format)),
        Command::Show(args) => block_on(show::run(args, format)),
        Command::Jobs(args) => block_on(jobs::run(args, format)),
        Command::Pods(args) => block_on(pods::run(args, chosen)),
        Command::Nodes(args) => block_on(nodes::run(args, format)),
        Command::Routes(args) => block_on(routes::run(args, format)),
        Command::Flows(args) => block_on(flows::run(args, format)),
        Command::Whois(args) => block_on(whois::run(args, format)),
        Command::Logs(args) => block_on(logs::run(args)),
        Command::Why(args) => block_on(why::run(args, format)),
        Command::Retry(args) => block_on(retry::run(args, format)),
        Command::Events(args) => block_on(events::run(args, format)),
        Command::Watch(args) => block_on(watch::run(args, format)),
        Command::Token(args) => block_on(token::run(args, format)),
        Command::Ca(args) => block_on(ca::run(args, format)),
        Command::Login(args) => block_on(login::run(args)),
        Command::Completions(args) => completions::run(args),
        Command::Supervise(args) => supervise::run(args),
    }
}

/// Runs a client command; it waits more than it works, so one thread will do.
fn block_on<T>(command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    start_logging("warn");
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(command)
}

/// What a daemon that has ended has left, such as a disk that does not answer, is not waited for longer.
const LEFT_MAX: std::time::Duration = std::time::Duration::from_secs(1);

/// Runs a daemon.
fn block_on_threads<T>(daemon: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    start_logging("info");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(daemon);
    runtime.shutdown_timeout(LEFT_MAX);
    result
}

/// Sends what `HEXTET_LOG` lets through to stderr; without it, `default`.
fn start_logging(default: &str) {
    tracing_subscriber::fmt()
        .with_env_filter(log_filter(default))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
}

fn log_filter(default: &str) -> EnvFilter {
    let Ok(text) = std::env::var("HEXTET_LOG") else { return EnvFilter::new(default) };
    EnvFilter::try_new(&text).unwrap_or_else(|error| {
        note(format!("HEXTET_LOG={text} is not used ({error}); write a level such as debug, or node=trace"));
        EnvFilter::new(default)
    })
}

/// Ends when the process is asked to, by SIGTERM or SIGINT.
async fn asked_to_end() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers the signals end the process by themselves.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

/// Milliseconds since the Unix epoch, for ages that people read.
fn now_unix_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// How long ago that was, in words.
fn age(since_unix_ms: u64, now_unix_ms: u64) -> String {
    crate::duration::age(std::time::Duration::from_millis(now_unix_ms.saturating_sub(since_unix_ms)))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use hextet_api::token::{Fingerprint, Role, Token};

    use super::*;

    /// The words of a line as a shell would take them, without its comment.
    fn words(line: &str) -> Vec<String> {
        let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
        for c in line.chars() {
            match (c, quote) {
                ('\'' | '"', None) => (quote, word) = (Some(c), Some(word.unwrap_or_default())),
                (c, Some(end)) if c == end => quote = None,
                ('#', None) if word.is_none() => break,
                (' ', None) => words.extend(word.take()),
                (c, _) => word.get_or_insert_default().push(c),
            }
        }
        words.into_iter().chain(word).collect()
    }

    /// Lines of code blocks that begin with `netctl`, with the page that they are on.
    fn shown(folder: &Path) -> Vec<(String, String)> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut lines = Vec::new();
        for path in entries.filter(|path| path.extension().is_some_and(|end| end == "md")) {
            let text = fs::read_to_string(&path).unwrap();
            let blocks = text.split("```").skip(1).step_by(2);
            let commands = blocks.flat_map(str::lines).filter(|line| line.starts_with("netctl "));
            lines.extend(commands.map(|line| (path.display().to_string(), line.to_owned())));
        }
        lines
    }

    #[test]
    fn commands_in_the_documents_are_commands() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let pages = [root.clone(), root.join("docs"), root.join("lb-examples/nginx")];
        let lines: Vec<_> = pages.iter().flat_map(|folder| shown(folder)).collect();
        assert!(lines.len() > 20, "{lines:?}");
        let (role, fingerprint, servers) = (Role::Node, Fingerprint([0; 32]), vec!["[::1]:1".to_owned()]);
        let token = Token { role, fingerprint, secret: [0; 16], servers }.to_string();
        for (page, line) in lines {
            let line = line.replace("hx1-...", &token);
            let parsed = Cli::try_parse_from(words(&line));
            assert!(parsed.is_ok(), "{page}: `{line}`: {}", parsed.err().unwrap());
        }
    }
}
