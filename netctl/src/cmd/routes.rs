//! `netctl routes`: the routes that every node holds.
//!
//! Read from the server's list of nodes, so it is what nodes are told; `ip -6 route show proto hextet` on a
//! node is what it does.

use std::net::Ipv6Addr;

use anyhow::Context as _;
use hextet_api::{address, v1};
use ipnetwork::Ipv6Network;
use serde::Serialize;

use super::nodes::{self, filled};
use crate::{
    client::{Client, ServerArgs, request},
    print::{self, Format, Row},
    unreadable,
};

/// List the routes that every node holds
///
/// One for each node's /64, by way of that node; a node holds all but its own. The rest of the cluster's
/// /48 is unreachable, so that nothing for it leaves by the default route. A router of yours may hold the
/// same routes; a host on the nodes' LAN needs the /48 on-link. Pods with addresses of a LAN need no route.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl routes")]
pub(super) struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Serialize)]
struct RouteRow {
    prefix: Ipv6Network,
    /// None: the packet is refused.
    via: Option<Ipv6Addr>,
    node: Option<String>,
    state: &'static str,
}

impl Row for RouteRow {
    const HEADER: &'static [&'static str] = &["PREFIX", "VIA", "NODE", "STATE"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.prefix.to_string(),
            self.via.map(|via| via.to_string()).unwrap_or_default(),
            self.node.clone().unwrap_or_default(),
            self.state.to_owned(),
        ]
    }
}

/// The route to a node; none while the node has not said where it is, and none to a LAN.
fn route(cluster: Ipv6Network, node: &v1::Node) -> anyhow::Result<Option<RouteRow>> {
    let (Some(prefix), Some(underlay)) = (&node.prefix, filled(&node.underlay)) else { return Ok(None) };
    let prefix = Ipv6Network::try_from(prefix)?;
    if !cluster.contains(prefix.network()) {
        return Ok(None);
    }
    Ok(Some(RouteRow {
        prefix,
        via: Some(address::ipv6(underlay)?),
        node: Some(node.name.clone()),
        state: nodes::state(node.phase()),
    }))
}

/// The /48 first, then by prefix.
fn rows(status: &v1::GetStatusResponse, nodes: &[v1::Node]) -> anyhow::Result<Vec<RouteRow>> {
    let cluster = status.prefix.as_ref().context("the server has not said what the cluster's prefix is")?;
    let cluster = Ipv6Network::try_from(cluster)?;
    let routes = nodes.iter().filter_map(|node| route(cluster, node).transpose());
    let mut rows: Vec<RouteRow> = routes.collect::<anyhow::Result<_>>()?;
    // What is left of it.
    rows.push(RouteRow { prefix: cluster, via: None, node: None, state: "unreachable" });
    rows.sort_by_key(|row| (row.via.is_some(), row.prefix));
    Ok(rows)
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let status = client.answer(client.cluster().get_status(request(v1::GetStatusRequest {}))).await?;
    let answer = client.answer(client.cluster().list_nodes(request(v1::ListNodesRequest {}))).await?;
    unreadable::tell(&answer.unreadable);
    let rows = rows(&status, &answer.nodes)?;
    print::list(format, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_an_underlay_and_one_of_a_lan_have_no_route() {
        let cluster: Ipv6Network = "fd12:3456:789a::/48".parse().unwrap();
        let prefix: Ipv6Network = "fd12:3456:789a:1::/64".parse().unwrap();
        let mut node = v1::Node { name: "n1".into(), prefix: Some(prefix.into()), ..Default::default() };
        assert!(route(cluster, &node).unwrap().is_none());
        node.underlay = "2001:db8:1::11".parse::<Ipv6Addr>().unwrap().octets().to_vec();
        node.set_phase(v1::NodePhase::Ready);
        let lan: Ipv6Network = "2001:db8:1::/64".parse().unwrap();
        let on_a_lan = v1::Node { name: "n2".into(), prefix: Some(lan.into()), ..node.clone() };
        let status = v1::GetStatusResponse { prefix: Some(cluster.into()), ..Default::default() };
        let mut out = Vec::new();
        print::rows(&mut out, Format::Table, &rows(&status, &[node, on_a_lan]).unwrap()).unwrap();
        expect_test::expect![[r"
            PREFIX                 VIA             NODE  STATE
            fd12:3456:789a::/48    -               -     unreachable
            fd12:3456:789a:1::/64  2001:db8:1::11  n1    ready
        "]]
        .assert_eq(&String::from_utf8(out).unwrap());
    }
}
