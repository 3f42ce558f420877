//! `netctl logs`: shows what a task wrote.

use std::io::{self, IsTerminal as _, Write as _};

use hextet_api::v1;

use crate::client::{Client, ServerArgs};

/// Show what a task wrote
///
/// Its standard output and standard error, read from its node. On a terminal, control characters other
/// than tabs and line ends are shown as `?`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl logs hello-web-x7k2p server -f --tail 20")]
pub(super) struct Args {
    /// The pod, as `netctl pods` lists it
    pod: String,
    /// The task; may be left out when the pod has one
    task: Option<String>,
    /// Go on as more is written
    #[arg(short, long)]
    follow: bool,
    /// Start with the last N lines
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tail: Option<u32>,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let message = v1::ReadLogsRequest {
        pod: args.pod,
        task: args.task.unwrap_or_default(),
        tail_lines: args.tail.unwrap_or(0),
        follow: args.follow,
    };
    let mut chunks = client.answer(client.cluster().read_logs(message)).await?;
    let terminal = io::stdout().is_terminal();
    while let Some(chunk) = chunks.message().await.map_err(|status| client.explain(&status))? {
        show(chunk.data, terminal)?;
    }
    Ok(())
}

fn show(mut data: Vec<u8>, terminal: bool) -> io::Result<()> {
    if terminal {
        data.iter_mut().for_each(tame);
    }
    let mut out = io::stdout().lock();
    out.write_all(&data)?;
    out.flush()
}

/// Makes a byte harmless that could command the terminal.
fn tame(byte: &mut u8) {
    if byte.is_ascii_control() && !b"\t\n\r".contains(byte) {
        *byte = b'?';
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_does_not_command_the_terminal() {
        let mut data = b"\x1b[2Jline\tone\r\n\x07\xc3\xa4".to_vec();
        data.iter_mut().for_each(tame);
        assert_eq!(data, b"?[2Jline\tone\r\n?\xc3\xa4");
    }
}
