//! `netctl watch`: follows the addresses of a job's pods, as a load balancer does.

use std::{fmt, io, net::Ipv6Addr, time::Duration};

use hextet_api::{
    endpoints::{self, Change, Endpoint, EndpointSet, EndpointsError},
    v1::WatchRequest,
};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::{
    client::{Client, ServerArgs},
    print::{self, Format},
    selector::Selector,
};

const ANSWERS_MAX: usize = 16;
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Follow the addresses of a job's pods
///
/// First all that there are, then each change as it is committed. A lost connection is taken up again
/// where it ended.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl watch hello/web -o json")]
pub(super) struct Args {
    /// JOB or JOB/GROUP
    #[arg(value_name = "JOB[/GROUP]")]
    selector: Selector,
    #[command(flatten)]
    server: ServerArgs,
}

/// One change, as it is printed.
#[derive(Debug, Serialize)]
struct Line {
    revision: u64,
    pod: String,
    state: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<Ipv6Addr>,
}

impl Line {
    fn new(revision: u64, change: Change) -> Line {
        match change {
            Change::Set(Endpoint { pod, group, node, address, state }) => Line {
                revision,
                pod,
                state: state.to_string(),
                group: Some(group),
                node: Some(node),
                address: Some(address),
            },
            Change::Removed(pod) => {
                Line { revision, pod, state: "gone".into(), group: None, node: None, address: None }
            }
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.revision, self.pod, self.state)?;
        match (&self.address, &self.node) {
            (Some(address), Some(node)) => write!(f, " {address} {node}"),
            _ => Ok(()),
        }
    }
}

/// Why a stream ended.
enum Ended {
    /// It can be taken up again.
    Lost(Status),
    /// It cannot.
    Failed(anyhow::Error),
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let mut set = EndpointSet::default();
    let mut backoff = BACKOFF_MIN;
    let mut told = false;
    loop {
        let before = set.clone();
        match follow(&client, &args.selector, &mut set, format).await {
            Ended::Failed(error) => return Err(error),
            Ended::Lost(status) => {
                let progress = set != before;
                backoff = if progress { BACKOFF_MIN } else { (backoff * 2).min(BACKOFF_MAX) };
                if progress || !told {
                    print::note(format!("{:#}; trying again", client.explain(&status)));
                }
                told = true;
                tokio::time::sleep(backoff).await;
            }
        }
    }
}

async fn follow(client: &Client, selector: &Selector, set: &mut EndpointSet, format: Format) -> Ended {
    let group = selector.group.as_deref().unwrap_or_default();
    let (answers, requests) = mpsc::channel(ANSWERS_MAX);
    // The channel is empty, so there is room.
    let _ = answers.try_send(set.subscribe(&selector.job, group, "netctl watch"));
    let mut stream = match client.endpoints().watch(ReceiverStream::new(requests)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return ended(client, status),
    };
    loop {
        let response = match stream.message().await {
            Ok(Some(message)) => message.response,
            Ok(None) => return Ended::Lost(Status::unavailable("the server ended the stream")),
            Err(status) => return ended(client, status),
        };
        let Some(response) = response else { return Ended::Failed(EndpointsError::Unknown.into()) };
        let changes = match set.apply(response) {
            Ok(None) => continue,
            Ok(Some(changes)) => changes,
            Err(error) => return Ended::Failed(error.into()),
        };
        if let Err(error) = show(set.revision(), changes, format) {
            return Ended::Failed(error);
        }
        acknowledge(&answers, set.revision()).await;
    }
}

fn show(revision: u64, changes: Vec<Change>, format: Format) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    changes.into_iter().try_for_each(|change| print::item(&mut out, format, &Line::new(revision, change)))
}

async fn acknowledge(answers: &mpsc::Sender<WatchRequest>, revision: u64) {
    // The other end goes with the stream, whose own error says why.
    let _ = answers.send(endpoints::ack(revision)).await;
}

fn ended(client: &Client, status: Status) -> Ended {
    match status.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted | Code::Internal => {
            Ended::Lost(status)
        }
        _ => Ended::Failed(client.explain(&status)),
    }
}

#[cfg(test)]
mod tests {
    use hextet_api::endpoints::EndpointState;

    use super::*;

    fn printed(format: Format, change: Change) -> String {
        let mut out = Vec::new();
        print::item(&mut out, format, &Line::new(17, change)).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn ready() -> Change {
        Change::Set(Endpoint {
            pod: "hello-web-aaaaa".into(),
            group: "web".into(),
            node: "n1".into(),
            address: "fd12::1".parse().unwrap(),
            state: EndpointState::Ready,
        })
    }

    #[test]
    fn a_change_is_one_line() {
        assert_eq!(printed(Format::Table, ready()), "17 hello-web-aaaaa ready fd12::1 n1\n");
        let gone = Change::Removed("hello-web-aaaaa".into());
        assert_eq!(printed(Format::Table, gone), "17 hello-web-aaaaa gone\n");
    }

    #[test]
    fn a_change_is_one_line_of_json() {
        assert_eq!(
            printed(Format::Json, ready()),
            "{\"revision\":17,\"pod\":\"hello-web-aaaaa\",\"state\":\"ready\",\"group\":\"web\",\"node\":\"n1\",\
             \"address\":\"fd12::1\"}\n"
        );
    }
}
