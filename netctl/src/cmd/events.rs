//! `netctl events`: what happened, in one stream: revisions of the log and what nodes say of their pods.

use std::{fmt, io};

use anyhow::bail;
use hextet_api::v1;
use serde::Serialize;
use tonic::Status;

use super::{age, now_unix_ms};
use crate::{
    client::{Client, ServerArgs},
    print::{self, Format},
    resume::{self, Resume},
};

/// Show what happened to pods, and who did it
///
/// One stream of everything: changes of the cluster's state, and what nodes did for their pods, step by step. The
/// newest 1,000 at most; nodes' events are kept in the server's memory. With --follow it goes on; a lost connection is taken up
/// again where it ended, for 10 minutes. What cannot be told any more is an event of the kind `gap`.
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
    #[serde(skip_serializing_if = "String::is_empty")]
    output: String,
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
            output: event.output,
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
        let what = print::printable(&self.what);
        write!(f, "{:>6} ago  {:<12} {:<14} {pods}  {what}", self.age, self.by, self.kind)?;
        self.revision.map_or(Ok(()), |revision| write!(f, " (revision {revision})"))?;
        let lines = print::quoted(&self.output);
        if lines.is_empty() { Ok(()) } else { write!(f, "\n{}", lines.trim_end_matches('\n')) }
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let mut reader = Reader { format, ..Reader::default() };
    let mut resume = Resume::default();
    loop {
        let status = match reader.read(&client, &args, &mut resume).await? {
            None if !args.follow => break,
            None => resume::ended(),
            Some(status) if !args.follow || reader.place.is_none() => return Err(client.explain(&status)),
            Some(status) => status,
        };
        resume.again(&client, &status).await?;
    }
    match args.pod {
        Some(pod) if !reader.has_shown => {
            bail!("nothing is known of a pod `{pod}`; `netctl pods` lists pods, `netctl history` what was")
        }
        _ => Ok(()),
    }
}

/// What was shown until now.
#[derive(Debug, Default)]
struct Reader {
    format: Format,
    /// The place of the last event that says it.
    place: Option<v1::EventPosition>,
    has_shown: bool,
}

impl Reader {
    /// Shows what comes until the stream ends; how it did when that was no good end.
    async fn read(
        &mut self,
        client: &Client,
        args: &Args,
        resume: &mut Resume,
    ) -> anyhow::Result<Option<Status>> {
        let message = request(args, self.place.clone());
        let mut events = match client.wait(client.cluster().watch_events(message)).await {
            Ok(events) => events,
            Err(status) => return Ok(Some(status)),
        };
        loop {
            match events.message().await {
                Ok(Some(event)) => {
                    resume.heard();
                    self.hear(event, args)?;
                }
                Ok(None) => return Ok(None),
                Err(status) => return Ok(Some(status)),
            }
        }
    }

    fn hear(&mut self, mut event: v1::ClusterEvent, args: &Args) -> anyhow::Result<()> {
        let place = event.position.take();
        if event != v1::ClusterEvent::default() {
            self.has_shown = true;
            print::item(&mut io::stdout().lock(), self.format, &Line::new(event, now_unix_ms()))?;
        } else if !self.has_shown && self.place.is_none() {
            // The past is told, and there was none.
            let what =
                args.pod.as_ref().map_or("nothing".to_owned(), |pod| format!("nothing of a pod `{pod}`"));
            print::note(format!("{what} is known until now; waiting for events"));
        }
        self.place = place.or(self.place.take());
        Ok(())
    }
}

fn request(args: &Args, after: Option<v1::EventPosition>) -> v1::WatchEventsRequest {
    let pod = args.pod.as_deref().map(|pod| pod.strip_prefix("pod/").unwrap_or(pod).to_owned());
    v1::WatchEventsRequest {
        pod: pod.unwrap_or_default(),
        follow: args.follow,
        limit: args.limit,
        positions: args.follow,
        after,
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
            ..v1::ClusterEvent::default()
        }
    }

    #[test]
    fn an_event_is_one_line() {
        let line = |pods: &[&str], revision| Line::new(event(pods, revision), 6_000).to_string();
        assert_eq!(line(&["a"], 0), "    5s ago  node:n1      pod-running    a  every task runs");
        assert!(line(&["a", "b", "c"], 7).ends_with("a and 2 more  every task runs (revision 7)"));
    }

    #[test]
    fn what_a_task_wrote_stands_below_and_commands_no_terminal() {
        let output = "no such table\n\x1b[2Jgiving up".to_owned();
        let line = Line::new(v1::ClusterEvent { output, ..event(&["a"], 7) }, 6_000).to_string();
        let below: Vec<&str> = line.lines().skip(1).collect();
        assert_eq!(below, ["    | no such table", "    | ?[2Jgiving up"]);
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
