//! `netctl watch`: follows the addresses of a job's pods, as a load balancer does.

use std::{fmt, io, net::Ipv6Addr};

use hextet_api::{
    endpoints::{self, Change, Endpoint, EndpointSet, EndpointsError},
    v1::{self, WatchRequest},
};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::{
    client::{Client, ServerArgs, request},
    print::{self, Format},
    resume::{self, Resume},
    selector::Selector,
};

const ANSWERS_MAX: usize = 16;

/// Follow the addresses of a job's pods
///
/// First all that there are, then each change as it is committed. A lost connection is taken up again where it ended, for
/// 10 minutes; when the server does not know any more what was changed meanwhile, all that there are come again. A job that is not
/// there is waited for.
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
    /// It may be taken up again, unless this is a refusal.
    Status(Status),
    /// It may not.
    Failed(anyhow::Error),
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let (mut set, mut resume) = (EndpointSet::default(), Resume::default());
    say_if_there_is_none(&client, &args.selector).await;
    loop {
        match follow(&client, &args.selector, &mut set, &mut resume, format).await {
            Ended::Failed(error) => return Err(error),
            Ended::Status(status) => resume.again(&client, &status).await?,
        }
    }
}

/// Who waits for what is not there shall know it. A load balancer's certificate may not ask; what fails is told by the
/// stream.
async fn say_if_there_is_none(client: &Client, selector: &Selector) {
    let name = selector.job.clone();
    let found = client.cluster().get_job(request(v1::GetJobRequest { name })).await;
    let missing = match found {
        Ok(found) => missing(found.into_inner().job.and_then(|status| status.job), selector),
        Err(status) if status.code() == Code::NotFound => Some(format!("job `{}`", selector.job)),
        Err(_) => None,
    };
    if let Some(what) = missing {
        print::note(format!("there is no {what} now; waiting for it (`netctl jobs` lists jobs)"));
    }
}

fn missing(job: Option<v1::Job>, selector: &Selector) -> Option<String> {
    let (job, group) = (job?, selector.group.as_ref()?);
    let is_there = job.groups.iter().any(|there| there.name == *group);
    (!is_there).then(|| format!("group `{group}` in job `{}`", selector.job))
}

async fn follow(
    client: &Client,
    selector: &Selector,
    set: &mut EndpointSet,
    resume: &mut Resume,
    format: Format,
) -> Ended {
    let group = selector.group.as_deref().unwrap_or_default();
    let (answers, requests) = mpsc::channel(ANSWERS_MAX);
    // The channel is empty, so there is room.
    let _ = answers.try_send(set.subscribe(&selector.job, group, "netctl watch"));
    let mut stream = match client.endpoints().watch(ReceiverStream::new(requests)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Ended::Status(status),
    };
    loop {
        let response = match stream.message().await {
            Ok(Some(message)) => message.response,
            Ok(None) => return Ended::Status(resume::ended()),
            Err(status) => return Ended::Status(status),
        };
        resume.heard();
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
    fn a_group_that_the_job_does_not_have_is_named() {
        let web = v1::Group { name: "web".into(), ..Default::default() };
        let job = Some(v1::Job { groups: vec![web], ..Default::default() });
        let of = |selector: &str| missing(job.clone(), &selector.parse().unwrap());
        assert_eq!(of("shop/nope").as_deref(), Some("group `nope` in job `shop`"));
        assert_eq!((of("shop/web"), of("shop")), (None, None));
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
