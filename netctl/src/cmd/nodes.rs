//! `netctl nodes`: lists nodes.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use hextet_api::{
    address,
    v1::{self, NodePhase},
};
use ipnetwork::Ipv6Network;
use scheduler_core::{
    countable::Countables,
    quantity::{Cpu, Memory, Resources},
};
use serde::Serialize;

use super::{age, now_unix_ms};
use crate::{
    client::{Client, ServerArgs, request},
    print::{self, Format, Row},
    unreadable,
};

/// List nodes
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl nodes")]
pub(super) struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Serialize)]
struct NodeRow {
    node: String,
    state: &'static str,
    prefix: Option<Ipv6Network>,
    underlay: Option<Ipv6Addr>,
    underlay_v4: Option<Ipv4Addr>,
    group_id: u32,
    pods: u32,
    capacity: Resources,
    used: Resources,
    #[serde(skip_serializing_if = "Countables::is_empty")]
    resources: Countables,
    #[serde(skip_serializing_if = "Countables::is_empty")]
    resources_used: Countables,
    labels: BTreeMap<String, String>,
    joined_unix_ms: u64,
    agent_version: String,
    #[serde(skip)]
    age: String,
}

impl Row for NodeRow {
    const HEADER: &'static [&'static str] =
        &["NODE", "STATE", "PREFIX", "UNDERLAY", "PODS", "CPU", "MEMORY", "RESOURCES", "AGE", "AGENT"];
    const TEXT: &'static [&'static str] = &["RESOURCES", "AGENT"];

    fn cells(&self) -> Vec<String> {
        let memory = |amount: Memory| amount.rounded();
        vec![
            self.node.clone(),
            self.state.to_owned(),
            self.prefix.map(|prefix| prefix.to_string()).unwrap_or_default(),
            self.underlay.map(|underlay| underlay.to_string()).unwrap_or_default(),
            self.pods.to_string(),
            format!("{}/{}", self.used.cpu, self.capacity.cpu),
            format!("{}/{}", memory(self.used.memory), memory(self.capacity.memory)),
            self.used_of_resources(),
            self.age.clone(),
            self.agent_version.clone(),
        ]
    }
}

impl NodeRow {
    /// `gpu=1/4`.
    fn used_of_resources(&self) -> String {
        let all = self.resources.0.iter();
        let all = all.map(|(name, has)| format!("{name}={}/{has}", self.resources_used.get(name)));
        all.collect::<Vec<_>>().join(",")
    }

    fn new(node: v1::Node, now_unix_ms: u64) -> anyhow::Result<NodeRow> {
        Ok(NodeRow {
            state: state(node.phase()),
            prefix: node.prefix.as_ref().map(Ipv6Network::try_from).transpose()?,
            underlay: filled(&node.underlay).map(address::ipv6).transpose()?,
            underlay_v4: filled(&node.underlay_v4).map(address::ipv4).transpose()?,
            resources: countables(&node.capacity),
            resources_used: countables(&node.used),
            capacity: resources(node.capacity),
            used: resources(node.used),
            age: age(node.joined_unix_ms, now_unix_ms),
            node: node.name,
            group_id: node.group_id,
            pods: node.pods,
            labels: node.labels,
            joined_unix_ms: node.joined_unix_ms,
            agent_version: node.agent_version,
        })
    }
}

pub(super) fn state(phase: NodePhase) -> &'static str {
    match phase {
        NodePhase::Unspecified => "unknown",
        NodePhase::Joined => "joined",
        NodePhase::Ready => "ready",
        NodePhase::CutOff => "cut-off",
        NodePhase::Lost => "lost",
        NodePhase::Dead => "dead",
    }
}

/// Bytes that are there.
pub(super) fn filled(bytes: &[u8]) -> Option<&[u8]> {
    Some(bytes).filter(|bytes| !bytes.is_empty())
}

fn resources(message: Option<v1::Resources>) -> Resources {
    let message = message.unwrap_or_default();
    Resources { cpu: Cpu(message.cpu_millis), memory: Memory(message.memory_bytes) }
}

fn countables(message: &Option<v1::Resources>) -> Countables {
    Countables(message.as_ref().map(|message| message.countables.clone()).unwrap_or_default())
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let answer = client.answer(client.cluster().list_nodes(request(v1::ListNodesRequest {}))).await?;
    unreadable::tell(&answer.unreadable);
    if answer.nodes.is_empty() && answer.unreadable.is_empty() && format == Format::Table {
        print::note("there are no nodes: `netctl token --for node` makes the line to paste on one");
        return Ok(());
    }
    let now = now_unix_ms();
    let rows: Vec<NodeRow> =
        answer.nodes.into_iter().map(|node| NodeRow::new(node, now)).collect::<anyhow::Result<_>>()?;
    let lines = unreadable::lines(rows, answer.unreadable);
    print::list(format, &lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_one_line() {
        let prefix: Ipv6Network = "fd12:3456:789a:1::/64".parse().unwrap();
        let node = v1::Node {
            name: "n1".into(),
            prefix: Some(prefix.into()),
            underlay: "2001:db8:1::11".parse::<Ipv6Addr>().unwrap().octets().to_vec(),
            capacity: Some(v1::Resources {
                cpu_millis: 4_000,
                memory_bytes: (8 << 30) + 12_345,
                countables: [("gpu".to_owned(), 4)].into(),
            }),
            used: Some(v1::Resources {
                cpu_millis: 300,
                memory_bytes: 192 << 20,
                countables: [("gpu".to_owned(), 1)].into(),
            }),
            phase: NodePhase::Ready.into(),
            pods: 3,
            joined_unix_ms: 0,
            agent_version: "0.1.0".into(),
            ..Default::default()
        };
        let joining = v1::Node { name: "n2".into(), phase: NodePhase::Joined.into(), ..Default::default() };
        let rows = [NodeRow::new(node, 5_000).unwrap(), NodeRow::new(joining, 5_000).unwrap()];
        let mut out = Vec::new();
        print::rows(&mut out, Format::Table, &rows).unwrap();
        expect_test::expect![[r"
            NODE  STATE   PREFIX                 UNDERLAY        PODS  CPU         MEMORY     RESOURCES  AGE  AGENT
            n1    ready   fd12:3456:789a:1::/64  2001:db8:1::11  3     300m/4000m  192Mi/8Gi  gpu=1/4    5s   0.1.0
            n2    joined  -                      -               0     0m/0m       0/0        -          5s   -
        "]]
        .assert_eq(&String::from_utf8(out).unwrap());
    }
}
