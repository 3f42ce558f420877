//! `netctl events`: what happened, in one stream: revisions of the log and what nodes say of their pods.

use std::{fmt, io};

use anyhow::bail;
use hextet_api::v1;
use serde::Serialize;

use super::{age, now_unix_ms};
use crate::{
    client::{Client, ServerArgs},
    print::{self, Format},
};

/// Show what happened to pods, and who did it
///
/// One stream of everything: changes of the cluster's state, and what nodes did for their pods, step by step. The
/// newest 1,000 at most; nodes' events are kept in the server's memory. With --follow it goes on.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  netctl events --pod hello-web-x7k2p
  netctl events --follow -o json")]
pub(super) struct Args {
    /// Only of this pod, as `netctl pods` lists it
    #[arg(long, value_name = "POD")]
    pod: Option<String>,
    /// Go on as more happens
    #[arg(short, long)]
    follow: bool,
    /// Begin with the last COUNT events
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    #[command(flatten)]
    server: ServerArgs,
}

/// One event, as it is printed.
#[derive(Debug, Serialize)]
struct Line {
    unix_ms: u64,
    by: String,
    kind: String,
    pods: Vec<String>,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    #[serde(skip)]
    age: String,
}

impl Line {
    fn new(event: v1::ClusterEvent, now: u64) -> Line {
        Line {
            age: age(event.unix_ms, now),
            unix_ms: event.unix_ms,
            by: event.by,
            kind: event.kind,
            pods: event.pods,
            what: event.what,
            revision: Some(event.revision).filter(|revision| *revision > 0),
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pods = match self.pods.as_slice() {
            [] => "-".to_owned(),
            [only] => only.clone(),
            [first, rest @ ..] => format!("{first} and {} more", rest.len()),
        };
        write!(f, "{:>6} ago  {:<12} {:<14} {pods}  {}", self.age, self.by, self.kind, self.what)?;
        self.revision.map_or(Ok(()), |revision| write!(f, " (revision {revision})"))
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let pod = args.pod.as_deref().map(|pod| pod.strip_prefix("pod/").unwrap_or(pod).to_owned());
    let message =
        v1::WatchEventsRequest { pod: pod.unwrap_or_default(), follow: args.follow, limit: args.limit };
    let mut events = client.answer(client.cluster().watch_events(message)).await?;
    let mut shown = 0;
    while let Some(event) = events.message().await.map_err(|status| client.explain(&status))? {
        shown += 1;
        print::item(&mut io::stdout().lock(), format, &Line::new(event, now_unix_ms()))?;
    }
    match args.pod {
        Some(pod) if shown == 0 => {
            bail!("nothing is known of a pod `{pod}`; `netctl pods` lists pods, `netctl history` what was")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(pods: &[&str], revision: u64) -> v1::ClusterEvent {
        v1::ClusterEvent {
            unix_ms: 1_000,
            by: "node:n1".into(),
            kind: "pod-running".into(),
            pods: pods.iter().map(|pod| (*pod).into()).collect(),
            what: "every task runs".into(),
            revision,
        }
    }

    #[test]
    fn an_event_is_one_line() {
        let line = |pods: &[&str], revision| Line::new(event(pods, revision), 6_000).to_string();
        assert_eq!(line(&["a"], 0), "    5s ago  node:n1      pod-running    a  every task runs");
        assert!(line(&["a", "b", "c"], 7).ends_with("a and 2 more  every task runs (revision 7)"));
    }

    #[test]
    fn json_has_no_revision_where_there_is_none() {
        let text = serde_json::to_string(&Line::new(event(&["a"], 0), 0)).unwrap();
        assert_eq!(
            text,
            r#"{"unix_ms":1000,"by":"node:n1","kind":"pod-running","pods":["a"],"what":"every task runs"}"#
        );
    }
}
