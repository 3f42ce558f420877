//! `netctl history`: what was changed, by whom and why.

use std::{fmt, str::FromStr, time::Duration};

use anyhow::bail;
use hextet_api::v1::{self, ObjectFate};
use serde::Serialize;

use super::{age, now_unix_ms};
use crate::{
    client::{Client, ServerArgs, request},
    duration,
    print::{self, Format, Row},
};

/// Fields and objects that are named in one line of the table.
const NAMED_MAX: usize = 3;

/// Show what was changed, by whom and why, the newest first
///
/// Each line is a revision. Changers are people and their tools (`user:NAME`), and the cluster itself (`scheduler`,
/// `node:NAME`). On a terminal a line is cut where that ends. With -o json each revision has all its objects and fields, 50
/// and 200 at most. Of a job, versions from before the beginning of the history are shown as far as they are kept.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  netctl history job/blog
  netctl history --since 1h --by 'user:*'
  netctl history pod/blog-web-00000 --not-by scheduler")]
pub(super) struct Args {
    /// JOB, job/JOB, deploy/JOB@VERSION, node/NODE, pod/POD or cluster/ca; without it, the whole cluster
    #[arg(value_name = "WHAT")]
    what: Option<What>,
    /// At most so many revisions
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// Only those of this last time, such as 1h
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    since: Option<Duration>,
    /// Whole lines, also where they are wider than the terminal
    #[arg(long)]
    wide: bool,
    #[command(flatten)]
    changers: Changers,
    #[command(flatten)]
    server: ServerArgs,
}

/// Whose changes are meant.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Changers {
    /// Only changes by these; * stands for any text; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub(super) by: Vec<String>,
    /// No changes by these; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub(super) not_by: Vec<String>,
}

impl Changers {
    /// Whether everybody's changes are meant.
    pub(super) fn is_empty(&self) -> bool {
        self.by.is_empty() && self.not_by.is_empty()
    }

    pub(super) fn message(&self) -> Option<v1::ChangerFilter> {
        Some(v1::ChangerFilter { by: self.by.clone(), not_by: self.not_by.clone() })
    }
}

/// The key of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct What(String);

impl FromStr for What {
    type Err = String;

    fn from_str(text: &str) -> Result<What, String> {
        if text == "cluster/ca" {
            return Ok(What("authorities".to_owned()));
        }
        let (kind, name) = text.split_once('/').unwrap_or(("job", text));
        if !["job", "deploy", "node", "pod"].contains(&kind) || name.is_empty() || name.contains('/') {
            return Err(format!(
                "`{text}` is none of JOB, job/JOB, deploy/JOB@VERSION, node/NODE, pod/POD and cluster/ca"
            ));
        }
        Ok(What(format!("{kind}/{name}")))
    }
}

/// One object that a revision changed.
#[derive(Debug, Serialize)]
pub(super) struct ObjectRow {
    pub(super) object: String,
    pub(super) fate: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) equals: Option<u32>,
    pub(super) fields: Vec<FieldRow>,
}

/// One field that differs.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct FieldRow {
    pub(super) field: String,
    pub(super) old: Option<String>,
    pub(super) new: Option<String>,
}

#[derive(Debug, Serialize)]
struct RevisionRow {
    revision: u64,
    time_unix_ms: u64,
    changer: String,
    external: bool,
    message: String,
    objects: Vec<ObjectRow>,
    objects_total: u32,
    /// Of revisions from this one on that cannot be read: nothing else is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable_from: Option<u64>,
    #[serde(skip)]
    age: String,
    #[serde(skip)]
    of_one: bool,
}

impl fmt::Display for FieldRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.old, &self.new) {
            (Some(old), Some(new)) => write!(f, "{}: {old} -> {new}", self.field),
            (None, Some(new)) => write!(f, "{}: {new}", self.field),
            (Some(old), None) => write!(f, "{}: {old} -> none", self.field),
            (None, None) => f.write_str(&self.field),
        }
    }
}

impl ObjectRow {
    pub(super) fn new(object: v1::ObjectChange) -> ObjectRow {
        let fate = match object.fate() {
            ObjectFate::Created => "created",
            ObjectFate::Removed => "removed",
            ObjectFate::Changed | ObjectFate::Unspecified => "changed",
        };
        let field =
            |change: v1::FieldChange| FieldRow { field: change.field, old: change.old, new: change.new };
        ObjectRow {
            object: object.key,
            fate,
            version: Some(object.version).filter(|version| *version > 0),
            equals: Some(object.equals).filter(|equals| *equals > 0),
            fields: object.fields.into_iter().map(field).collect(),
        }
    }

    /// `version 4 = 3`.
    pub(super) fn version_text(&self) -> Option<String> {
        let version = self.version?;
        Some(format!("version {}", version_and_equal(version, self.equals.unwrap_or_default())))
    }

    fn in_short(&self) -> String {
        match (self.version_text(), self.fate) {
            (Some(version), _) => version,
            (None, "changed") => in_short(self.fields.iter().map(ToString::to_string).collect()),
            (None, fate) => fate.to_owned(),
        }
    }
}

/// `4 = 3`, or `4` when it is no rollback.
pub(super) fn version_and_equal(version: u32, equals: u32) -> String {
    if equals == 0 { version.to_string() } else { format!("{version} = {equals}") }
}

/// The first few, and how many there are besides.
fn in_short(texts: Vec<String>) -> String {
    let more = texts.len().saturating_sub(NAMED_MAX);
    let mut named = texts.into_iter().take(NAMED_MAX).collect::<Vec<_>>();
    if more > 0 {
        named.push(format!("{more} more"));
    }
    named.join(", ")
}

impl Row for RevisionRow {
    const HEADER: &'static [&'static str] = &["REVISION", "AGE", "CHANGER", "CHANGE", "MESSAGE"];
    const TEXT: &'static [&'static str] = &["CHANGER", "CHANGE", "MESSAGE"];

    fn cells(&self) -> Vec<String> {
        let change = match self.objects.as_slice() {
            [one] if self.of_one => one.in_short(),
            _ => self.objects_in_short(),
        };
        let (age, message) = (self.age.clone(), self.message.clone());
        match self.unreadable_from {
            None => vec![self.revision.to_string(), age, self.changer.clone(), change, message],
            Some(from) if from == self.revision => {
                vec![from.to_string(), String::new(), String::new(), "unreadable".to_owned(), message]
            }
            Some(from) => {
                let range = format!("{from}-{}", self.revision);
                vec![range, String::new(), String::new(), "unreadable".to_owned(), message]
            }
        }
    }
}

impl RevisionRow {
    fn new(revision: v1::Revision, of_one: bool, now_unix_ms: u64) -> RevisionRow {
        RevisionRow {
            revision: revision.revision,
            time_unix_ms: revision.time_unix_ms,
            age: age(revision.time_unix_ms, now_unix_ms),
            changer: revision.changer,
            external: revision.external,
            message: revision.message,
            objects: revision.objects.into_iter().map(ObjectRow::new).collect(),
            objects_total: revision.objects_total,
            unreadable_from: Some(revision.unreadable_from).filter(|from| *from > 0),
            of_one,
        }
    }

    /// `job/blog, 100 pods`: what is alone of its kind by its key.
    fn objects_in_short(&self) -> String {
        let kinds = ["job", "deploy", "node", "pod", "token", "renewal", "authorities", "cluster"];
        let texts = kinds.into_iter().filter_map(|kind| {
            let of_kind: Vec<&ObjectRow> =
                self.objects.iter().filter(|object| object.object.split('/').next() == Some(kind)).collect();
            match of_kind.as_slice() {
                [] => None,
                // Their keys are hashes that tell nobody anything.
                [_] if kind == "token" => Some("a token".to_owned()),
                [_] if kind == "renewal" => Some("a key".to_owned()),
                [_] if kind == "authorities" => Some("cluster/ca".to_owned()),
                [one] => Some(one.object.clone()),
                many if kind == "renewal" => Some(format!("{} keys", self.at_least(many.len()))),
                many => Some(format!("{} {kind}s", self.at_least(many.len()))),
            }
        });
        texts.collect::<Vec<_>>().join(", ")
    }

    /// Not every object of a large revision is listed, and those that are not are of its last kind.
    fn at_least(&self, listed: usize) -> usize {
        listed + (self.objects_total as usize).saturating_sub(self.objects.len())
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let now = now_unix_ms();
    let mut wanted = v1::ListRevisionsRequest {
        key: args.what.as_ref().map(|what| what.0.clone()).unwrap_or_default(),
        since_unix_ms: args.since.map_or(0, |since| now.saturating_sub(since.as_millis() as u64)),
        changers: args.changers.message(),
        ..Default::default()
    };
    let (mut rows, mut begins) = (Vec::new(), (1, 0));
    while rows.len() < args.limit as usize {
        wanted.limit = args.limit - rows.len() as u32;
        let page = client.answer(client.cluster().list_revisions(request(wanted.clone()))).await?;
        let row = |revision| RevisionRow::new(revision, args.what.is_some(), now);
        rows.extend(page.revisions.into_iter().map(row));
        (wanted.before, begins) = (page.next_before, (page.oldest, page.oldest_unix_ms));
        if page.next_before == 0 {
            break;
        }
    }
    let ended = wanted.before == 0 && args.since.is_none();
    if ended {
        beginning(&rows, begins, now).iter().for_each(print::note);
    }
    if rows.iter().any(|row| row.unreadable_from.is_some()) {
        print::note(
            "the server's store is damaged: nobody knows what the revisions that cannot be read have changed",
        );
    }
    if rows.is_empty() {
        let is_all = ended && args.changers.is_empty();
        if let Some(what) = args.what.filter(|_| is_all && begins.0 == 1) {
            bail!("there never was {}", what.0);
        }
        if format == Format::Table {
            print::note("no change is as asked for");
            return Ok(());
        }
    }
    match args.wide {
        true => print::to_stdout(|out| print::rows(out, format, &rows)),
        false => print::list(format, &rows),
    }
}

/// Where the history begins, if that is not with the cluster.
fn beginning(rows: &[RevisionRow], (oldest, unix_ms): (u64, u64), now_unix_ms: u64) -> Option<String> {
    let older = rows.iter().any(|row| row.revision < oldest);
    let kept = if older { ", but for versions of the job" } else { "" };
    let ago = age(unix_ms, now_unix_ms);
    (oldest > 1).then(|| {
        format!("the history begins with revision {oldest}, {ago} ago: what was before is forgotten{kept}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(key: &str, fields: &[&str]) -> v1::ObjectChange {
        let field = |name: &&str| v1::FieldChange {
            field: (*name).to_owned(),
            old: Some("a".to_owned()),
            new: Some("b".to_owned()),
        };
        v1::ObjectChange {
            key: key.to_owned(),
            fate: ObjectFate::Changed.into(),
            fields: fields.iter().map(field).collect(),
            ..Default::default()
        }
    }

    fn change(objects: Vec<v1::ObjectChange>, total: u32, of_one: bool) -> String {
        let revision = v1::Revision { objects, objects_total: total, ..Default::default() };
        RevisionRow::new(revision, of_one, 0).cells()[3].clone()
    }

    #[test]
    fn keys_are_read_as_people_write_them() {
        assert_eq!("blog".parse(), Ok(What("job/blog".into())));
        assert_eq!("node/n1".parse(), Ok(What("node/n1".into())));
        assert_eq!("cluster/ca".parse(), Ok(What("authorities".into())));
        for wrong in ["", "pod/", "token/x", "job/a/b"] {
            assert!(wrong.parse::<What>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_revision_is_told_in_short() {
        let version = v1::ObjectChange { version: 4, equals: 3, ..object("job/blog", &["count"]) };
        assert_eq!(change(vec![version.clone()], 1, true), "version 4 = 3");
        assert_eq!(change(vec![object("pod/x", &["phase"])], 1, true), "phase: a -> b");
        assert_eq!(
            change(vec![object("pod/x", &["a", "b", "c", "d"])], 1, true),
            "a: a -> b, b: a -> b, c: a -> b, 1 more"
        );
        let many = vec![version, object("pod/x", &[]), object("pod/y", &[]), object("token/f", &[])];
        assert_eq!(change(many, 4, false), "job/blog, 2 pods, a token");
        assert_eq!(change(vec![object("pod/x", &[]), object("pod/y", &[])], 100, false), "100 pods");
    }

    #[test]
    fn it_says_where_it_begins() {
        let row = |revision| RevisionRow::new(v1::Revision { revision, ..Default::default() }, true, 0);
        assert_eq!(beginning(&[row(7)], (1, 0), 60_000), None);
        let begins = "the history begins with revision 5, 2m0s ago: what was before is forgotten";
        assert_eq!(beginning(&[row(7)], (5, 0), 120_000).unwrap(), begins);
        let kept = format!("{begins}, but for versions of the job");
        assert_eq!(beginning(&[row(7), row(3)], (5, 0), 120_000).unwrap(), kept);
    }

    #[test]
    fn what_cannot_be_read_is_one_line() {
        let cells = |revision, unreadable_from| {
            let revision = v1::Revision { revision, unreadable_from, ..Default::default() };
            RevisionRow::new(revision, false, 0).cells()
        };
        assert_eq!(cells(17, 17)[..4], ["17", "", "", "unreadable"]);
        assert_eq!(cells(31, 20)[..4], ["20-31", "", "", "unreadable"]);
    }
}
