//! `netctl diff`: what differs between two versions of a job, or between now and then.

use std::{str::FromStr, time::Duration};

use anyhow::Context as _;
use hextet_api::v1;
use scheduler::convert;
use scheduler_core::{history, job::Job, time::WallTime};
use serde::Serialize;

use super::{
    WrongUse,
    history::{Changers, FieldRow, ObjectRow, version_and_equal},
    now_unix_ms,
};
use crate::{
    client::{Client, ServerArgs, request},
    duration, line_diff,
    print::{self, Format},
};

/// Fields of a new pod or node that are worth a line of the table.
const TOLD_OF_NEW: [&str; 4] = ["node", "address", "phase", "prefix"];

/// Show what differs between two versions of a job, or between now and then
///
/// Versions are compared line by line; without a second one, the first is compared with the one in force. With --since,
/// every object that differs from then is shown field by field; what was changed and changed back is left out. With --by
/// or --not-by only what these changers changed counts.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  netctl diff blog@3 blog@4
  netctl diff blog@3
  netctl diff --since 1h --not-by scheduler --not-by 'node:*'")]
pub(super) struct Args {
    /// A version, JOB@VERSION
    #[arg(value_name = "JOB@VERSION", num_args = 0..=2, conflicts_with = "since", required_unless_present = "since")]
    versions: Vec<JobAt>,
    /// Compare now with this long ago, such as 1h
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    since: Option<Duration>,
    #[command(flatten)]
    changers: Changers,
    #[command(flatten)]
    server: ServerArgs,
}

/// A version of a job; 0 is the one in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JobAt {
    job: String,
    version: u32,
}

impl JobAt {
    /// Reads JOB or JOB@VERSION.
    pub(super) fn or_in_force(text: &str) -> Result<JobAt, String> {
        if text.contains('@') {
            return text.parse();
        }
        let job = text.strip_prefix("job/").unwrap_or(text);
        if job.is_empty() {
            Err("a job's name is missing".to_owned())
        } else {
            Ok(JobAt { job: job.to_owned(), version: 0 })
        }
    }
}

impl FromStr for JobAt {
    type Err = String;

    fn from_str(text: &str) -> Result<JobAt, String> {
        let wrong = || format!("`{text}` is not a version: write JOB@VERSION, such as blog@3");
        let (job, version) = text.strip_prefix("job/").unwrap_or(text).split_once('@').ok_or_else(wrong)?;
        let version = version.parse().ok().filter(|version| *version > 0).ok_or_else(wrong)?;
        if job.is_empty() { Err(wrong()) } else { Ok(JobAt { job: job.to_owned(), version }) }
    }
}

/// A text and what is known of it.
#[derive(Debug, Serialize)]
pub(super) struct Side {
    job: String,
    version: u32,
    equals: Option<u32>,
    time_unix_ms: Option<u64>,
    changer: String,
    message: String,
    #[serde(skip)]
    pub(super) text: Job,
}

#[derive(Debug, Serialize)]
struct VersionDiff {
    old: Side,
    new: Side,
    fields: Vec<FieldRow>,
}

#[derive(Debug, Serialize)]
struct NetDiff {
    first_revision: u64,
    last_revision: u64,
    complete: bool,
    objects: Vec<ObjectRow>,
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    match (args.since, args.versions.as_slice()) {
        (Some(since), _) => since_then(&args, since, format).await,
        (None, [old, new @ ..]) => {
            if !args.changers.is_empty() {
                return Err(WrongUse("--by and --not-by belong to --since".to_owned()).into());
            }
            let client = Client::connect(&args.server).await?;
            let in_force = JobAt { version: 0, ..old.clone() };
            let new = new.first().unwrap_or(&in_force);
            versions(side(&client, old).await?, side(&client, new).await?, format)
        }
        (None, []) => Err(WrongUse("give JOB@VERSION or --since TIME".to_owned()).into()),
    }
}

pub(super) async fn side(client: &Client, at: &JobAt) -> anyhow::Result<Side> {
    let message = v1::GetJobVersionRequest { name: at.job.clone(), version: at.version };
    let answer = client.answer(client.cluster().get_job_version(request(message))).await?;
    let known = answer.version.unwrap_or_default();
    let text = convert::job_from_message(answer.job.context("the server sent no text")?)?;
    Ok(Side {
        job: at.job.clone(),
        version: known.version,
        equals: Some(known.equals).filter(|equals| *equals > 0),
        time_unix_ms: Some(known.time_unix_ms).filter(|time| *time > 0),
        changer: known.changer,
        message: known.message,
        text,
    })
}

/// Whether a viewer is not shown all of it.
fn hides(job: &Job) -> bool {
    let tasks = job.groups.values().flat_map(|group| group.tasks.values());
    tasks.flat_map(|task| task.env.values()).any(|value| value == history::HIDDEN)
}

fn versions(old: Side, new: Side, format: Format) -> anyhow::Result<()> {
    if format == Format::Table {
        let lines = version_lines(&old, &new)?;
        if lines.is_empty() {
            let hidden = if hides(&old.text) { ", but for what is hidden from viewers" } else { "" };
            let (job, version) = (&old.job, old.version);
            print::note(format!("{job}@{version} and {}@{} are equal{hidden}", new.job, new.version));
        }
        return print::to_stdout(|out| Ok(print::lines(out, lines.iter().map(String::as_str))?));
    }
    let fields = history::diff_fields(&history::job_fields(&old.text), &history::job_fields(&new.text));
    let row =
        |change: history::FieldChange| FieldRow { field: change.field, old: change.old, new: change.new };
    let diff = VersionDiff { fields: fields.into_iter().map(row).collect(), old, new };
    print::to_stdout(|out| print::value(out, format, &diff))
}

fn version_lines(old: &Side, new: &Side) -> anyhow::Result<Vec<String>> {
    let changed =
        line_diff::unified(&serde_norway::to_string(&old.text)?, &serde_norway::to_string(&new.text)?);
    if changed.is_empty() {
        return Ok(changed);
    }
    let head = [format!("--- {}", headline(old)), format!("+++ {}", headline(new))];
    Ok(head.into_iter().chain(changed).collect())
}

/// `blog@4 = 3, 2026-11-21T12:54:00Z, user:alice: it leaks`
fn headline(side: &Side) -> String {
    let version = version_and_equal(side.version, side.equals.unwrap_or_default());
    let mut text = format!("{}@{version}", side.job);
    if let Some(time) = side.time_unix_ms {
        text.push_str(&format!(", {}, {}: {}", WallTime(time), side.changer, side.message));
    }
    text
}

async fn since_then(args: &Args, since: Duration, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let since_unix_ms = now_unix_ms().saturating_sub(since.as_millis() as u64);
    let message =
        v1::DiffRevisionsRequest { since_unix_ms, changers: args.changers.message(), since_revision: 0 };
    let answer = client.answer(client.cluster().diff_revisions(request(message))).await?;
    if answer.unreadable > 0 {
        print::note(format!(
            "the server's store is damaged: what {} revisions of that time have changed is not in this",
            answer.unreadable
        ));
    } else if !answer.complete {
        let first = answer.first_revision;
        print::note(format!(
            "older revisions of that time are compacted: this is the difference since revision {first}"
        ));
    }
    let diff = NetDiff {
        first_revision: answer.first_revision,
        last_revision: answer.last_revision,
        complete: answer.complete,
        objects: answer.objects.into_iter().map(ObjectRow::new).collect(),
    };
    if format != Format::Table {
        return print::to_stdout(|out| print::value(out, format, &diff));
    }
    if diff.objects.is_empty() {
        print::note("nothing differs from then");
    }
    let lines: Vec<String> = diff.objects.iter().flat_map(object_lines).collect();
    print::to_stdout(|out| Ok(print::lines(out, lines.iter().map(String::as_str))?))
}

fn object_lines(object: &ObjectRow) -> Vec<String> {
    let sign = match object.fate {
        "created" => '+',
        "removed" => '-',
        _ => '~',
    };
    let version = object.version_text().map(|text| format!(" {text}")).unwrap_or_default();
    let told = |row: &&FieldRow| match object.fate {
        "changed" => true,
        "created" => TOLD_OF_NEW.contains(&row.field.as_str()),
        _ => false,
    };
    let fields = object.fields.iter().filter(told).map(|row| format!("    {row}"));
    [format!("{sign} {}{version}", object.object)].into_iter().chain(fields).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(version: u32, count: u32) -> Side {
        let yaml =
            format!("{{job: blog, groups: {{web: {{count: {count}, tasks: {{t: {{exec: [/x]}}}}}}}}}}");
        Side {
            job: "blog".into(),
            version,
            equals: (version == 5).then_some(3),
            time_unix_ms: Some(1_795_265_640_000),
            changer: "user:alice".into(),
            message: "more of it".into(),
            text: serde_norway::from_str(&yaml).unwrap(),
        }
    }

    #[test]
    fn versions_are_compared_line_by_line() {
        expect_test::expect![[r"
            --- blog@4, 2026-11-21T12:54:00Z, user:alice: more of it
            +++ blog@5 = 3, 2026-11-21T12:54:00Z, user:alice: more of it
             job: blog
             groups:
               web:
            -    count: 3
            +    count: 5
                 spread: node
                 tasks:
                   t:"]]
        .assert_eq(&version_lines(&side(4, 3), &side(5, 5)).unwrap().join("\n"));
        assert!(version_lines(&side(4, 3), &side(5, 3)).unwrap().is_empty());
    }

    #[test]
    fn versions_are_read_as_people_write_them() {
        assert_eq!("blog@3".parse(), Ok(JobAt { job: "blog".into(), version: 3 }));
        assert_eq!("job/blog@3".parse(), Ok(JobAt { job: "blog".into(), version: 3 }));
        for wrong in ["blog", "blog@", "blog@0", "@3", "blog@x", "blog@-1"] {
            assert!(wrong.parse::<JobAt>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn objects_are_compared_field_by_field() {
        let field = |name: &str, old: Option<&str>, new: Option<&str>| FieldRow {
            field: name.into(),
            old: old.map(Into::into),
            new: new.map(Into::into),
        };
        let mut object = ObjectRow {
            object: "job/blog".into(),
            fate: "changed",
            version: Some(4),
            equals: Some(3),
            fields: vec![
                field("a", Some("1"), Some("2")),
                field("b", None, Some("2")),
                field("c", Some("1"), None),
            ],
        };
        let lines = ["~ job/blog version 4 = 3", "    a: 1 -> 2", "    b: 2", "    c: 1 -> none"];
        assert_eq!(object_lines(&object), lines);
        object.fate = "removed";
        assert_eq!(object_lines(&object).len(), 1);
    }
}
