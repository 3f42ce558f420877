//! `netctl apply`: creates or changes jobs from a file.

use std::{fmt, path::PathBuf};

use anyhow::ensure;
use hextet_api::v1;
use scheduler::convert;
use scheduler_core::job::Job;
use serde::Serialize;

use crate::{
    client::{Client, ServerArgs, request},
    job_file,
    print::{self, Format},
};

/// Create or change jobs from a file
///
/// The file holds YAML documents, each a job. All of it is checked before anything is sent: a file with an
/// error changes nothing. A job that is already so is left alone. With --if-version nothing is changed either when
/// somebody else has changed the job meanwhile.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  netctl apply -f examples/hello.yaml -m 'three pods to begin with'
  netctl apply -f examples/hello.yaml --if-version 3")]
pub(super) struct Args {
    /// The file, or - for standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Why; kept with the revision
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    /// Only if this version of the job is in force, as `netctl jobs` shows it; 0: only if there is no such job
    #[arg(long, value_name = "VERSION")]
    if_version: Option<u32>,
    #[command(flatten)]
    server: ServerArgs,
}

/// What became of one job.
#[derive(Debug, Serialize)]
struct Applied {
    job: String,
    version: u32,
    revision: u64,
    changed: bool,
    pods_waiting: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    first_waits_for: String,
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.changed {
            true => write!(f, "job/{} version {} (revision {})", self.job, self.version, self.revision),
            false => write!(f, "job/{} unchanged", self.job),
        }
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let jobs = job_file::read(&args.file)?;
    ensure!(
        args.if_version.is_none() || jobs.len() == 1,
        "--if-version is about one job, and the file holds {}",
        jobs.len()
    );
    let client = Client::connect(&args.server).await?;
    for job in jobs {
        let applied = apply(&client, job, &args.message, args.if_version).await?;
        print::to_stdout(|out| print::item(out, format, &applied))?;
        applied.waits().iter().for_each(print::note);
    }
    Ok(())
}

impl Applied {
    /// What is said of pods that have no place.
    fn waits(&self) -> Option<String> {
        let (job, waiting, why) = (&self.job, self.pods_waiting, &self.first_waits_for);
        let pods = if waiting == 1 { "1 pod waits" } else { &format!("{waiting} pods wait") };
        (waiting > 0).then(|| format!("{pods} for a place: {why} (`netctl pods {job}`, `netctl why`)"))
    }
}

async fn apply(client: &Client, job: Job, message: &str, if_version: Option<u32>) -> anyhow::Result<Applied> {
    let name = job.job.clone();
    let message = v1::ApplyJobRequest {
        job: Some(convert::job_to_message(&job)),
        message: message.to_owned(),
        if_version,
    };
    let answer = client.answer(client.cluster().apply_job(request(message))).await?;
    Ok(Applied {
        job: name,
        version: answer.version,
        revision: answer.revision,
        changed: answer.changed,
        pods_waiting: answer.pods_waiting,
        first_waits_for: answer.first_waits_for,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_became_of_a_job_is_one_line() {
        let first_waits_for = "no node has 4 CPU free".to_owned();
        let applied = Applied {
            job: "hello".into(),
            version: 2,
            revision: 17,
            changed: true,
            pods_waiting: 2,
            first_waits_for,
        };
        assert_eq!(applied.to_string(), "job/hello version 2 (revision 17)");
        let waits = "2 pods wait for a place: no node has 4 CPU free (`netctl pods hello`, `netctl why`)";
        assert_eq!(applied.waits().as_deref(), Some(waits));
        let unchanged = Applied { changed: false, pods_waiting: 0, ..applied };
        assert_eq!((unchanged.to_string().as_str(), unchanged.waits()), ("job/hello unchanged", None));
    }
}
