//! nginx as a load balancer for a group of pods.
//!
//! Follows the addresses of the pods that a selector selects and keeps nginx's configuration at that. What
//! it deliberately is not: in the way of a request. nginx serves with the last known pods while this program
//! or the server is away.
//!
//! `follow` talks to the server, `render` makes the text, `proxy` brings it into effect, `state` is what
//! survives a restart.
#![forbid(unsafe_code)]

mod follow;
mod proxy;
mod render;
mod select;
mod state;

use std::{io, io::IsTerminal as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use hextet_api::token::Token;
use tracing_subscriber::EnvFilter;

use crate::{follow::Follower, proxy::Proxy, render::Listen, select::Selector, state::StateDir};

/// Keep nginx's upstreams at the addresses of a group of pods
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = EXAMPLES)]
struct Args {
    /// What `netctl token --for lb --select JOB/GROUP` printed; needed the first time
    #[arg(long, value_name = "TOKEN")]
    join: Option<Token>,
    /// Where credentials, the last known pods and, with --nginx, nginx's own files are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/hextet/lb-nginx")]
    state_dir: PathBuf,
    /// Whose pods
    #[arg(long, value_name = "JOB[/GROUP]")]
    select: Selector,
    /// The port that the pods listen on
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// Where nginx listens: a port, or an address and a port; may be repeated
    #[arg(long, value_name = "[ADDRESS:]PORT", default_value = "80")]
    listen: Vec<Listen>,
    /// Run nginx too, with a configuration in the state directory
    #[arg(long, value_name = "PROGRAM", num_args = 0..=1, default_missing_value = "nginx")]
    nginx: Option<PathBuf>,
    /// The file to write, included in the http block of an nginx that is already there
    #[arg(long, value_name = "FILE", required_unless_present = "nginx", conflicts_with = "nginx")]
    output: Option<PathBuf>,
    /// How that nginx is asked whether it can read the file
    #[arg(long, value_name = "COMMAND", default_value = "nginx -t", conflicts_with = "nginx")]
    test: String,
    /// How it is told to
    #[arg(long, value_name = "COMMAND", default_value = "nginx -s reload", conflicts_with = "nginx")]
    reload: String,
}

const EXAMPLES: &str = "\
Examples:
  lb-nginx --join hx1-AQMA... --select hello/web --port 8080 --nginx
  lb-nginx --select hello/web --port 8080 --listen 80 --output /etc/nginx/conf.d/hello.conf

Logs go to stderr; HEXTET_LOG=debug shows more of them.";

fn main() -> ExitCode {
    let args = Args::parse();
    start_logging();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let state = StateDir::open(&args.state_dir)?;
    let proxy = match (args.nginx, args.output) {
        (Some(program), _) => Proxy::managed(program, &state)?,
        (None, output) => {
            let output = output.context("--output FILE or --nginx is needed")?;
            Proxy::external(output, args.test, args.reload)
        }
    };
    let frame = render::Frame { selector: args.select, port: args.port, listen: args.listen };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(Follower::new(state, proxy, frame, args.join).run(asked_to_end()))
}

/// Ends at SIGTERM or SIGINT.
async fn asked_to_end() {
    use tokio::signal::unix::{SignalKind, signal};
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    // Without handlers the signals end the process by themselves.
    let (Ok(mut term), Ok(mut int)) = signals else { return std::future::pending().await };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

fn start_logging() {
    let filter = EnvFilter::builder()
        .with_env_var("HEXTET_LOG")
        .try_from_env()
        .unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        super::Args::command().debug_assert();
    }
}
