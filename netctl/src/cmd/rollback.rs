//! `netctl rollback`: gives a job the text of an older version.

use std::fmt;

use hextet_api::v1;
use serde::Serialize;

use crate::{
    client::{Client, ServerArgs, request},
    print::{self, Format},
};

/// Give a job the text that it had in an older version
///
/// It is always a new version, which says which one it equals, also when that text is in force already, and also when
/// the job was removed. `netctl history JOB` lists versions, `netctl diff JOB@3` compares.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl rollback blog --to 3 -m 'version 4 leaks'")]
pub(super) struct Args {
    /// The job
    #[arg(value_name = "JOB")]
    job: String,
    /// The version to go back to
    #[arg(long, value_name = "VERSION", value_parser = clap::value_parser!(u32).range(1..))]
    to: u32,
    /// Why; kept with the revision
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Serialize)]
struct RolledBack {
    job: String,
    version: u32,
    equals: u32,
    revision: u64,
}

impl fmt::Display for RolledBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RolledBack { job, version, equals, revision } = self;
        write!(f, "job/{job} version {version} = {equals} (revision {revision})")
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let job = args.job.strip_prefix("job/").unwrap_or(&args.job).to_owned();
    let message = v1::RollbackJobRequest { name: job.clone(), to: args.to, message: args.message };
    let answer = client.answer(client.cluster().rollback_job(request(message))).await?;
    let done = RolledBack { job, version: answer.version, equals: args.to, revision: answer.revision };
    print::to_stdout(|out| print::one(out, format, &done))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_which_version_it_equals() {
        let done = RolledBack { job: "blog".into(), version: 5, equals: 3, revision: 17 };
        assert_eq!(done.to_string(), "job/blog version 5 = 3 (revision 17)");
    }
}
