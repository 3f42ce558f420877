//! `netctl jobs`: lists jobs.

use hextet_api::v1;
use serde::Serialize;

use super::{age, history::version_and_equal, now_unix_ms};
use crate::{
    client::{Client, ServerArgs, request},
    print::{self, Format, Row},
    unreadable,
};

/// List jobs
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl jobs -o json")]
pub(super) struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Serialize)]
struct JobRow {
    job: String,
    version: u32,
    /// The version whose text it has by a rollback.
    equals: Option<u32>,
    pods_running: u32,
    pods_wanted: u32,
    groups: Vec<GroupRow>,
    applied_unix_ms: u64,
    changer: String,
    #[serde(skip)]
    age: String,
}

#[derive(Debug, Serialize)]
struct GroupRow {
    name: String,
    count: u32,
}

impl Row for JobRow {
    const HEADER: &'static [&'static str] = &["JOB", "VERSION", "RUNNING", "GROUPS", "AGE", "CHANGER"];
    const TEXT: &'static [&'static str] = &["GROUPS", "CHANGER"];

    fn cells(&self) -> Vec<String> {
        let groups: Vec<&str> = self.groups.iter().map(|group| group.name.as_str()).collect();
        vec![
            self.job.clone(),
            version_and_equal(self.version, self.equals.unwrap_or_default()),
            format!("{}/{}", self.pods_running, self.pods_wanted),
            groups.join(","),
            self.age.clone(),
            self.changer.clone(),
        ]
    }
}

impl JobRow {
    fn new(status: v1::JobStatus, now_unix_ms: u64) -> JobRow {
        let job = status.job.unwrap_or_default();
        let group = |group: v1::Group| GroupRow { name: group.name, count: group.count };
        JobRow {
            job: job.name,
            version: status.version,
            equals: Some(status.equals).filter(|equals| *equals > 0),
            pods_running: status.pods_running,
            pods_wanted: status.pods_wanted,
            groups: job.groups.into_iter().map(group).collect(),
            applied_unix_ms: status.applied_unix_ms,
            changer: status.changer,
            age: age(status.applied_unix_ms, now_unix_ms),
        }
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let answer = client.answer(client.cluster().list_jobs(request(v1::ListJobsRequest {}))).await?;
    unreadable::tell(&answer.unreadable);
    if answer.jobs.is_empty() && answer.unreadable.is_empty() && format == Format::Table {
        print::note("there are no jobs: `netctl apply -f FILE` makes one");
        return Ok(());
    }
    let now = now_unix_ms();
    let rows: Vec<JobRow> = answer.jobs.into_iter().map(|status| JobRow::new(status, now)).collect();
    let lines = unreadable::lines(rows, answer.unreadable);
    print::list(format, &lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_one_line() {
        let group = |name: &str| v1::Group { name: name.into(), count: 3, ..Default::default() };
        let status = v1::JobStatus {
            job: Some(v1::Job {
                name: "hello".into(),
                groups: vec![group("web"), group("db")],
                ..v1::Job::default()
            }),
            version: 2,
            pods_wanted: 6,
            pods_running: 4,
            applied_unix_ms: 1_000,
            changer: "user:root".into(),
            equals: 1,
        };
        let mut out = Vec::new();
        print::rows(&mut out, Format::Table, &[JobRow::new(status, 66_000)]).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "JOB    VERSION  RUNNING  GROUPS  AGE   CHANGER\n\
             hello  2 = 1    4/6      web,db  1m5s  user:root\n"
        );
    }
}
