//! `netctl plan`: what an apply would do.

use std::{collections::BTreeMap, path::PathBuf};

use hextet_api::v1::{self, PodFate};
use scheduler::convert;
use serde::Serialize;

use crate::{
    client::{Client, ServerArgs, request},
    job_file,
    print::{self, Format},
};

/// Show what an apply of a file would do; nothing is changed
///
/// Which pods would be placed where, restarted in place with the same address, moved because they cannot stay, or stopped,
/// and which would wait for a place and why. Pods that are not named stay as they are. What is drawn at random, such as
/// addresses, is drawn when it is applied.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl plan -f examples/hello.yaml")]
pub(super) struct Args {
    /// The file, or - for standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Serialize)]
struct Plan {
    job: String,
    from_version: u32,
    to_version: u32,
    pods: Vec<PodRow>,
    #[serde(skip)]
    pods_total: u32,
}

#[derive(Debug, Serialize)]
struct PodRow {
    pod: String,
    node: Option<String>,
    fate: &'static str,
    why: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to_node: Option<String>,
}

impl PodRow {
    fn new(pod: v1::PodPlan) -> PodRow {
        let fate = match pod.fate() {
            PodFate::Placed => "placed",
            PodFate::Restarted => "restarted",
            PodFate::Kept => "kept",
            PodFate::Moved => "moved",
            PodFate::Stopped => "stopped",
            PodFate::Waits => "waits",
            PodFate::Unspecified => "unknown",
        };
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        let (node, to, to_node) = (some(pod.node), some(pod.to), some(pod.to_node));
        PodRow { pod: pod.pod, node, fate, why: pod.why, to, to_node }
    }

    fn line(&self) -> String {
        let PodRow { pod, node, fate, why, to, to_node } = self;
        let on = node.as_ref().map(|node| format!(" on {node}")).unwrap_or_default();
        let and = Some(format!(", {why}")).filter(|_| !why.is_empty()).unwrap_or_default();
        match *fate {
            "placed" => format!("  placed     {pod}{on}"),
            "restarted" => format!("  restarted  {pod}{on}, same address{and}"),
            "kept" => format!("  kept       {pod}{on}{and}"),
            "moved" => {
                let to = to.as_deref().unwrap_or_default();
                let there = to_node.as_ref().map_or("no node yet".to_owned(), |node| format!("on {node}"));
                format!("  moved      {pod}{on} -> {to} {there}: {why}")
            }
            "waits" => format!("  waits      {pod}: {why}"),
            other => format!("  {other:<9}  {pod}{on}: {why}"),
        }
    }
}

impl Plan {
    fn new(plan: v1::JobPlan) -> Plan {
        Plan {
            job: plan.name,
            from_version: plan.from_version,
            to_version: plan.to_version,
            pods: plan.pods.into_iter().map(PodRow::new).collect(),
            pods_total: plan.pods_total,
        }
    }

    fn lines(&self) -> Vec<String> {
        if self.from_version == self.to_version {
            return vec![format!("job/{} unchanged", self.job)];
        }
        let versions = match self.from_version {
            0 => format!("version {}", self.to_version),
            from => format!("version {from} -> {}", self.to_version),
        };
        let head = format!("job/{} {versions}: {}", self.job, self.summary());
        let more = self.pods_total as usize - self.pods.len().min(self.pods_total as usize);
        let more = (more > 0).then(|| format!("  and {more} more"));
        [head].into_iter().chain(self.pods.iter().map(PodRow::line)).chain(more).collect()
    }

    /// `2 placed, 1 waits`.
    fn summary(&self) -> String {
        let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
        self.pods.iter().for_each(|pod| *counts.entry(pod.fate).or_default() += 1);
        let order = ["placed", "restarted", "kept", "moved", "stopped", "waits"];
        let counted = order.into_iter().filter_map(|fate| Some(format!("{} {fate}", counts.get(fate)?)));
        let text = counted.collect::<Vec<_>>().join(", ");
        if text.is_empty() { "no pod is touched".to_owned() } else { text }
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let jobs = job_file::read(&args.file)?;
    let client = Client::connect(&args.server).await?;
    let message = v1::PlanJobsRequest { jobs: jobs.iter().map(convert::job_to_message).collect() };
    let answer = client.answer(client.cluster().plan_jobs(request(message))).await?;
    let plans: Vec<Plan> = answer.jobs.into_iter().map(Plan::new).collect();
    if format == Format::Table {
        let lines: Vec<String> = plans.iter().flat_map(Plan::lines).collect();
        print::to_stdout(|out| Ok(print::lines(out, lines.iter().map(String::as_str))?))?;
        print::note("nothing was changed");
        return Ok(());
    }
    print::to_stdout(|out| print::value(out, format, &plans))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(fate: PodFate, pod: &str, node: &str, why: &str) -> v1::PodPlan {
        let (pod, node, why) = (pod.to_owned(), node.to_owned(), why.to_owned());
        v1::PodPlan { pod, node, fate: fate.into(), why, ..Default::default() }
    }

    #[test]
    fn a_plan_is_a_summary_and_a_line_for_each_pod() {
        let moved = v1::PodPlan {
            to: "b".into(),
            to_node: "n2".into(),
            ..pod(PodFate::Moved, "a", "n1", "its node no longer fits")
        };
        let pods = vec![
            moved,
            pod(PodFate::Placed, "c", "n1", ""),
            pod(PodFate::Restarted, "d", "n1", ""),
            pod(PodFate::Stopped, "e", "n2", "fewer pods are wanted"),
            pod(PodFate::Waits, "f", "", "no node fits"),
        ];
        let plan = v1::JobPlan { name: "blog".into(), from_version: 3, to_version: 4, pods_total: 6, pods };
        expect_test::expect![[r"
            job/blog version 3 -> 4: 1 placed, 1 restarted, 1 moved, 1 stopped, 1 waits
              moved      a on n1 -> b on n2: its node no longer fits
              placed     c on n1
              restarted  d on n1, same address
              stopped    e on n2: fewer pods are wanted
              waits      f: no node fits
              and 1 more"]]
        .assert_eq(&Plan::new(plan).lines().join("\n"));
        let same = v1::JobPlan { name: "blog".into(), from_version: 3, to_version: 3, ..Default::default() };
        assert_eq!(Plan::new(same).lines(), ["job/blog unchanged"]);
    }
}
