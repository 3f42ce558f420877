//! `netctl rm`: removes a job, or a node that will not come back.

use std::{fmt, str::FromStr};

use hextet_api::v1;
use serde::Serialize;

use crate::{
    client::{Client, ServerArgs, request},
    print::{self, Format},
};

/// Remove a job, or a node that will not come back
///
/// The pods of a job are stopped; its versions stay in the history. A node can be removed when its lease
/// has ended: its name and /64 are free from then on.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  netctl rm hello\n  netctl rm node/n3 -m 'its board is dead'")]
pub(super) struct Args {
    /// JOB, job/JOB or node/NODE
    #[arg(value_name = "WHAT")]
    what: What,
    /// Why; kept with the revision
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Job(String),
    Node(String),
}

impl FromStr for What {
    type Err = String;

    fn from_str(text: &str) -> Result<What, String> {
        let (what, name): (fn(String) -> What, &str) = match text.split_once('/') {
            None => (What::Job, text),
            Some(("job", name)) => (What::Job, name),
            Some(("node", name)) => (What::Node, name),
            Some(_) => return Err(format!("`{text}` is none of JOB, job/JOB and node/NODE")),
        };
        if name.is_empty() { Err("a name is missing".to_owned()) } else { Ok(what(name.to_owned())) }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::Job(name) => write!(f, "job/{name}"),
            What::Node(name) => write!(f, "node/{name}"),
        }
    }
}

#[derive(Debug, Serialize)]
struct Removed {
    removed: String,
    revision: u64,
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} removed (revision {})", self.removed, self.revision)
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let removed = args.what.to_string();
    let revision = match args.what {
        What::Job(name) => {
            let message = v1::DeleteJobRequest { name, message: args.message };
            client.answer(client.cluster().delete_job(request(message))).await?.revision
        }
        What::Node(name) => {
            let message = v1::DeleteNodeRequest { name, message: args.message };
            client.answer(client.cluster().delete_node(request(message))).await?.revision
        }
    };
    print::to_stdout(|out| print::one(out, format, &Removed { removed, revision }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_and_nodes_are_told_apart() {
        assert_eq!("hello".parse(), Ok(What::Job("hello".into())));
        assert_eq!("job/hello".parse(), Ok(What::Job("hello".into())));
        assert_eq!("node/n1".parse(), Ok(What::Node("n1".into())));
        for wrong in ["", "node/", "pod/x"] {
            assert!(wrong.parse::<What>().is_err(), "{wrong}");
        }
    }
}
