//! `netctl compact`: forgets the oldest part of the log of changes.

use std::{fmt, str::FromStr, time::Duration};

use hextet_api::v1;
use scheduler_core::quantity::Memory;
use serde::Serialize;

use super::now_unix_ms;
use crate::{
    client::{Client, ServerArgs, request},
    duration,
    print::{self, Format},
};

/// Forget the oldest part of the history
///
/// The server does so by itself when the history has the size that `netctl server --history` says. What is in force, the
/// newest versions of each job, and which addresses were given, is not touched. Older versions of a job that are in the
/// history alone cannot be brought back then; it says which they are. Watchers that were away since then get a snapshot.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  netctl compact --keep 30d --dry-run
  netctl compact --keep 30d
  netctl compact --keep 10000")]
pub(super) struct Args {
    /// What is kept: this last time, such as 30d, or so many revisions [default: what the server's --history holds]
    #[arg(long, value_name = "TIME|COUNT")]
    keep: Option<Keep>,
    /// Only say what would be forgotten
    #[arg(long, requires = "keep")]
    dry_run: bool,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    Time(Duration),
    Revisions(u64),
}

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Keep, String> {
        match text.parse() {
            Ok(0) => Err("at least one revision is kept".to_owned()),
            Ok(count) => Ok(Keep::Revisions(count)),
            Err(_) => duration::parse(text).map(Keep::Time).map_err(|error| format!("{error}, or a number")),
        }
    }
}

#[derive(Debug, Serialize)]
struct Compacted {
    removed: u64,
    oldest: u64,
    bytes: u64,
    dry_run: bool,
    /// Versions of jobs of which nothing is known any more, by job.
    lost: Vec<String>,
}

impl fmt::Display for Compacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Compacted { removed, oldest, bytes, .. } = self;
        let size = size(*bytes);
        match self.dry_run {
            true => write!(
                f,
                "{removed} revisions would be forgotten; the history, which takes {size}, would begin with revision {oldest}"
            ),
            false => write!(
                f,
                "{removed} revisions forgotten; the history begins with revision {oldest} and takes {size}"
            ),
        }
    }
}

impl Compacted {
    /// What is said of each job that loses versions.
    fn losses(&self) -> impl Iterator<Item = String> {
        let end = if self.dry_run { "would be lost" } else { "are lost" };
        self.lost.iter().map(move |versions| format!("texts {end}: job {versions}"))
    }
}

/// `12Mi`, or `845 bytes`.
fn size(bytes: u64) -> String {
    if bytes < 1 << 10 { format!("{bytes} bytes") } else { format!("{}B", Memory(bytes).rounded()) }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let mut wanted = v1::CompactHistoryRequest { dry_run: args.dry_run, ..Default::default() };
    match args.keep {
        Some(Keep::Revisions(count)) => wanted.keep_revisions = count,
        Some(Keep::Time(time)) => {
            wanted.since_unix_ms = now_unix_ms().saturating_sub(time.as_millis() as u64).max(1);
        }
        None => {}
    }
    let answer = client.answer(client.cluster().compact_history(request(wanted))).await?;
    let v1::CompactHistoryResponse { oldest, removed, bytes, lost } = answer;
    let done = Compacted { removed, oldest, bytes, dry_run: args.dry_run, lost };
    done.losses().for_each(print::note);
    print::to_stdout(|out| print::one(out, format, &done))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!((size(845).as_str(), size(12 << 20).as_str()), ("845 bytes", "12MiB"));
    }

    #[test]
    fn it_says_what_is_lost_and_what_would_be() {
        let lost = vec!["blog: versions 1 to 7".to_owned()];
        let done = Compacted { removed: 20, oldest: 21, bytes: 845, dry_run: false, lost };
        assert_eq!(
            done.to_string(),
            "20 revisions forgotten; the history begins with revision 21 and takes 845 bytes"
        );
        assert_eq!(done.losses().collect::<Vec<_>>(), ["texts are lost: job blog: versions 1 to 7"]);
        let dry = Compacted { dry_run: true, ..done };
        assert!(dry.to_string().starts_with("20 revisions would be forgotten"), "{dry}");
        assert_eq!(dry.losses().collect::<Vec<_>>(), ["texts would be lost: job blog: versions 1 to 7"]);
    }

    #[test]
    fn what_is_kept_is_a_time_or_a_number() {
        assert_eq!("30d".parse(), Ok(Keep::Time(Duration::from_secs(30 * 86_400))));
        assert_eq!("10000".parse(), Ok(Keep::Revisions(10_000)));
        for wrong in ["0", "", "all", "-1"] {
            assert!(wrong.parse::<Keep>().is_err(), "{wrong}");
        }
    }
}
