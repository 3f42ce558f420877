//! `netctl logs`: shows what a task wrote.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use hextet_api::v1;
use tonic::Status;

use crate::{
    client::{Client, ServerArgs},
    resume::{self, Resume},
};

/// Show what a task wrote
///
/// Its standard output and standard error, read from its node. On a terminal, control characters other than tabs and line ends are
/// shown as `?`. With --follow, a lost connection is taken up again where it ended, for 10 minutes, without a line left out
/// or shown twice; when that is not possible, it fails and says so.
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

/// After the end of a log that was followed: whether it was the pod's or its agent's is known a moment later.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Where the reader is.
#[derive(Debug, Default)]
struct Place {
    /// The end of what was shown, in the words of its node; empty before anything came.
    position: String,
    /// The log came to its end by itself; nobody knows yet whether that is the end of the pod or of its agent.
    has_ended: bool,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let (mut place, mut resume) = (Place::default(), Resume::default());
    loop {
        let status = match read(&client, &args, &mut place, &mut resume).await? {
            None if !args.follow || place.position.is_empty() => return Ok(()),
            None => {
                place.has_ended = true;
                tokio::time::sleep(LOOK_AGAIN).await;
                continue;
            }
            Some(status) if place.has_ended && !resume::is_loss(&status) => return Ok(()),
            Some(status) if !args.follow || place.position.is_empty() => return Err(client.explain(&status)),
            Some(status) => status,
        };
        resume.again(&client, &status).await?;
    }
}

/// Shows what comes until the stream ends; how it did when that was no good end.
async fn read(
    client: &Client,
    args: &Args,
    place: &mut Place,
    resume: &mut Resume,
) -> anyhow::Result<Option<Status>> {
    let message = v1::ReadLogsRequest {
        pod: args.pod.clone(),
        task: args.task.clone().unwrap_or_default(),
        tail_lines: args.tail.unwrap_or(0),
        follow: args.follow,
        after: place.position.clone(),
    };
    let mut chunks = match client.wait(client.cluster().read_logs(message)).await {
        Ok(chunks) => chunks,
        Err(status) => return Ok(Some(status)),
    };
    let terminal = io::stdout().is_terminal();
    loop {
        match chunks.message().await {
            Ok(Some(chunk)) => {
                resume.heard();
                place.has_ended = false;
                show(chunk.data, terminal)?;
                place.position = Some(chunk.position).filter(|new| !new.is_empty()).unwrap_or_default();
            }
            Ok(None) => return Ok(None),
            Err(status) => return Ok(Some(status)),
        }
    }
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
