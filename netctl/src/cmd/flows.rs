//! `netctl flows`: what leaves this node translated, read from its kernel.

use std::net::{IpAddr, SocketAddr};

use ::node::FlowView;
use serde::Serialize;

use super::node::PathArgs;
use crate::print::{self, Format, Row};

/// List the translated flows of this node's pods
///
/// Needs root, on the node of the pods; the agent need not run. A UDP flow is for all ports of its remote.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  netctl flows\n  netctl flows hello-web-1")]
pub(super) struct Args {
    /// Only those of this pod
    #[arg(value_name = "POD")]
    pod: Option<String>,
    #[command(flatten)]
    paths: PathArgs,
}

#[derive(Debug, Serialize)]
struct FlowRow {
    pod: String,
    protocol: &'static str,
    inside: String,
    outside: String,
    remote: String,
    state: Option<&'static str>,
    /// Seconds until it ends, if nothing comes.
    expires_s: u64,
}

impl Row for FlowRow {
    const HEADER: &'static [&'static str] =
        &["POD", "PROTO", "INSIDE", "OUTSIDE", "REMOTE", "STATE", "EXPIRES"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.pod.clone(),
            self.protocol.to_owned(),
            self.inside.clone(),
            self.outside.clone(),
            self.remote.clone(),
            self.state.unwrap_or("-").to_owned(),
            format!("{}s", self.expires_s),
        ]
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let flows = ::node::flows(&args.paths.paths(), args.pod.as_deref()).await?;
    let rows: Vec<FlowRow> = flows.into_iter().map(row).collect();
    print::list(format, &rows)
}

fn row(FlowView { pod, flow }: FlowView) -> FlowRow {
    let end = |address: IpAddr, port: u16| SocketAddr::new(address, port).to_string();
    FlowRow {
        pod,
        protocol: flow.protocol,
        inside: end(flow.inside, flow.inside_port),
        outside: end(flow.outside, flow.outside_port),
        remote: flow.remote_port.map_or_else(|| flow.remote.to_string(), |port| end(flow.remote, port)),
        state: flow.state,
        expires_s: flow.expires_s,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use dataplane::Flow;

    use super::*;

    #[test]
    fn a_flow_is_a_line() {
        let flow = Flow {
            protocol: "udp",
            pod: Ipv4Addr::new(10, 254, 0, 5),
            inside: Ipv4Addr::new(10, 254, 0, 5).into(),
            inside_port: 4000,
            outside: Ipv4Addr::new(192, 0, 2, 11).into(),
            outside_port: 64_800,
            remote: Ipv4Addr::new(198, 51, 100, 2).into(),
            remote_port: None,
            state: None,
            expires_s: 299,
        };
        let mut out = Vec::new();
        print::rows(&mut out, Format::Table, &[row(FlowView { pod: "hello-web-1".into(), flow })]).unwrap();
        let text = String::from_utf8(out).unwrap();
        let words: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        let expected =
            ["hello-web-1", "udp", "10.254.0.5:4000", "192.0.2.11:64800", "198.51.100.2", "-", "299s"];
        assert_eq!(words, expected);
    }
}
