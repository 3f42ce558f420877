//! `netctl pods`: lists pods with their addresses.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal as _, Write},
    net::Ipv6Addr,
};

use hextet_api::{
    address,
    v1::{self, PodPhase},
};
use serde::Serialize;

use super::{age, now_unix_ms};
use crate::{
    client::{Client, ServerArgs, request},
    print::{self, Format, Row},
    selector::Selector,
    unreadable,
};

/// How many reasons of pods that do not run are told beside the table.
const REASONS_MAX: usize = 5;

/// List pods with their addresses
///
/// RESTARTS counts how often tasks were started again because they had ended, or what runs them had; a new text counts nothing.
///
/// With --ipv6 and a standard output that is no terminal: one bare address per line, running pods first. Pods that stand by
/// for a rollout are left out there, as no load balancer is to send them anything; -o json has them, with `standby`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  netctl pods hello/web\n  ping -6 $(netctl pods --ipv6 | head -1)")]
pub(super) struct Args {
    /// JOB or JOB/GROUP; without it, every pod
    #[arg(value_name = "JOB[/GROUP]")]
    selector: Option<Selector>,
    /// Addresses: alone in a pipe, with little beside them on a terminal
    #[arg(long)]
    ipv6: bool,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Clone, Debug, Serialize)]
struct PodRow {
    pod: String,
    job: String,
    group: String,
    job_version: u32,
    node: Option<String>,
    address: Option<Ipv6Addr>,
    state: &'static str,
    message: String,
    restarts: u32,
    /// No load balancer is told of it.
    standby: bool,
    created_unix_ms: u64,
    #[serde(skip)]
    age: String,
    #[serde(skip)]
    phase: PodPhase,
}

impl Row for PodRow {
    const HEADER: &'static [&'static str] =
        &["POD", "NODE", "ADDRESS", "STATE", "AGE", "VERSION", "RESTARTS"];

    fn cells(&self) -> Vec<String> {
        let mut cells = self.address_cells();
        cells.extend([self.job_version.to_string(), self.restarts.to_string()]);
        cells
    }
}

const IPV6_HEADER: [&str; 5] = ["POD", "NODE", "ADDRESS", "STATE", "AGE"];

impl PodRow {
    fn new(pod: v1::Pod, now_unix_ms: u64) -> anyhow::Result<PodRow> {
        let phase = pod.phase();
        let address = if pod.address.is_empty() { None } else { Some(address::ipv6(&pod.address)?) };
        Ok(PodRow {
            age: age(pod.created_unix_ms, now_unix_ms),
            phase,
            state: if pod.standby && phase == PodPhase::Running { "standby" } else { state(phase) },
            address,
            pod: pod.id,
            job: pod.job,
            group: pod.group,
            job_version: pod.job_version,
            node: Some(pod.node).filter(|node| !node.is_empty()),
            message: pod.message,
            restarts: pod.restarts,
            standby: pod.standby,
            created_unix_ms: pod.created_unix_ms,
        })
    }

    fn address_cells(&self) -> Vec<String> {
        vec![
            self.pod.clone(),
            self.node.clone().unwrap_or_default(),
            self.address.map(|address| address.to_string()).unwrap_or_default(),
            self.state.to_owned(),
            self.age.clone(),
        ]
    }
}

pub(super) fn state(phase: PodPhase) -> &'static str {
    match phase {
        PodPhase::Unspecified => "unknown",
        PodPhase::Pending => "pending",
        PodPhase::Starting => "starting",
        PodPhase::Running => "running",
        PodPhase::Failed => "failed",
        PodPhase::Terminating => "terminating",
        PodPhase::Lost => "lost",
    }
}

/// What is most likely to answer comes first.
fn rank(phase: PodPhase) -> u8 {
    match phase {
        PodPhase::Running => 0,
        PodPhase::Starting => 1,
        PodPhase::Failed => 2,
        PodPhase::Terminating => 3,
        PodPhase::Lost => 4,
        PodPhase::Pending | PodPhase::Unspecified => 5,
    }
}

pub(super) async fn run(args: Args, format: Option<Format>) -> anyhow::Result<()> {
    let (rows, lost) = list(&args).await?;
    unreadable::tell(&lost);
    match (format, args.ipv6) {
        (None, true) if !io::stdout().is_terminal() => {
            print::to_stdout(|out| bare(out, &rows))?;
            if lost.is_empty() && rows.iter().all(|row| row.address.is_none()) {
                print::note("no such pod has an address: `netctl pods` says why");
            }
            match rows.iter().filter(|row| row.standby).count() {
                0 => {}
                1 => print::note("one pod stands by and is left out: `netctl pods` shows it"),
                more => {
                    print::note(format!("{more} pods stand by and are left out: `netctl pods` shows them"))
                }
            }
            Ok(())
        }
        (None | Some(Format::Table), ipv6) => show(&rows, &lost, ipv6),
        (Some(format), _) => {
            let lines = unreadable::lines(rows, lost);
            print::list(format, &lines)
        }
    }
}

/// The pods, and what cannot be read.
async fn list(args: &Args) -> anyhow::Result<(Vec<PodRow>, Vec<v1::Unreadable>)> {
    let client = Client::connect(&args.server).await?;
    let (job, group) = match &args.selector {
        Some(Selector { job, group }) => (job.clone(), group.clone().unwrap_or_default()),
        None => Default::default(),
    };
    let answer =
        client.answer(client.cluster().list_pods(request(v1::ListPodsRequest { job, group }))).await?;
    let now = now_unix_ms();
    let rows = answer.pods.into_iter().map(|pod| PodRow::new(pod, now)).collect::<anyhow::Result<_>>()?;
    Ok((rows, answer.unreadable))
}

fn show(rows: &[PodRow], lost: &[v1::Unreadable], ipv6: bool) -> anyhow::Result<()> {
    if rows.is_empty() && lost.is_empty() {
        print::note("there are no such pods: `netctl jobs` lists the jobs, `netctl apply -f FILE` makes one");
        return Ok(());
    }
    let cells = if ipv6 { PodRow::address_cells } else { PodRow::cells };
    let header: &[&str] = if ipv6 { &IPV6_HEADER } else { PodRow::HEADER };
    let lost = lost.iter().map(|lost| unreadable::cells(unreadable::name(lost), header.len()));
    let lines = rows.iter().map(cells).chain(lost);
    print::to_stdout(|out| Ok(print::table(out, header, lines)?))?;
    reasons(rows).iter().for_each(print::note);
    Ok(())
}

fn bare(out: &mut impl Write, rows: &[PodRow]) -> anyhow::Result<()> {
    let serving = rows.iter().filter(|row| !row.standby);
    let mut ranked: Vec<(u8, Ipv6Addr)> =
        serving.filter_map(|row| Some((rank(row.phase), row.address?))).collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    for (_, address) in ranked {
        writeln!(out, "{address}")?;
    }
    Ok(())
}

/// Why pods do not run: each reason once, with the first pod that has it.
fn reasons(rows: &[PodRow]) -> Vec<String> {
    let mut by_reason: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.phase != PodPhase::Running && !row.message.is_empty()) {
        by_reason.entry((row.state, &row.message)).or_default().push(&row.pod);
    }
    let line = |((state, message), pods): (&(&str, &str), &Vec<&str>)| match pods.as_slice() {
        [pod] => format!("{pod} is {state}: {message}"),
        pods => format!("{} and {} more are {state}: {message}", pods[0], pods.len() - 1),
    };
    let mut lines: Vec<String> = by_reason.iter().take(REASONS_MAX).map(line).collect();
    if by_reason.len() > REASONS_MAX {
        lines.push(format!("{} more reasons: `netctl pods -o json`", by_reason.len() - REASONS_MAX));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, phase: PodPhase, last: u8, message: &str) -> PodRow {
        let placed = phase != PodPhase::Pending;
        let mut address = vec![0xfd; 16];
        address[15] = last;
        let pod = v1::Pod {
            id: id.into(),
            job: "hello".into(),
            group: "web".into(),
            job_version: 1,
            node: if placed { "n1".into() } else { String::new() },
            address: if placed { address } else { Vec::new() },
            phase: phase.into(),
            message: message.into(),
            created_unix_ms: 1_000,
            restarts: u32::from(last),
            standby: false,
        };
        PodRow::new(pod, 43_000).unwrap()
    }

    fn pods() -> Vec<PodRow> {
        vec![
            pod("hello-web-aaaaa", PodPhase::Starting, 1, ""),
            pod("hello-web-bbbbb", PodPhase::Pending, 0, "no node has 4000m of CPU free"),
            pod("hello-web-ccccc", PodPhase::Running, 2, ""),
            pod("hello-web-ddddd", PodPhase::Pending, 0, "no node has 4000m of CPU free"),
        ]
    }

    #[test]
    fn the_table_shows_what_is_missing_as_a_dash() {
        let mut out = Vec::new();
        print::rows(&mut out, Format::Table, &pods()).unwrap();
        expect_test::expect![[r#"
            POD              NODE  ADDRESS                                  STATE     AGE  VERSION  RESTARTS
            hello-web-aaaaa  n1    fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fd01  starting  42s  1        1
            hello-web-bbbbb  -     -                                        pending   42s  1        0
            hello-web-ccccc  n1    fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fd02  running   42s  1        2
            hello-web-ddddd  -     -                                        pending   42s  1        0
        "#]]
        .assert_eq(&String::from_utf8(out).unwrap());
    }

    #[test]
    fn bare_addresses_start_with_those_that_answer() {
        let mut out = Vec::new();
        let mut pods = pods();
        pods.push(PodRow { standby: true, ..pod("hello-web-eeeee", PodPhase::Running, 3, "") });
        bare(&mut out, &pods).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fd02\nfdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fd01\n"
        );
    }

    #[test]
    fn a_reason_is_told_once() {
        assert_eq!(
            reasons(&pods()),
            ["hello-web-bbbbb and 1 more are pending: no node has 4000m of CPU free"]
        );
    }

    #[test]
    fn json_holds_the_values_and_not_the_words() {
        let mut out = Vec::new();
        print::rows(&mut out, Format::Json, &pods()[1..3]).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(json[0]["address"], serde_json::Value::Null);
        assert_eq!(json[1]["address"], "fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fd02");
        assert_eq!(json[1]["created_unix_ms"], 1_000);
        assert_eq!(json[1].get("age"), None);
    }
}
