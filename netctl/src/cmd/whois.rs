//! `netctl whois`: which pod is behind an outside address and port.

use std::{net::SocketAddr, time::Duration};

use anyhow::bail;
use serde::Serialize;

use super::{node::PathArgs, now_unix_ms};
use crate::{
    duration,
    print::{self, Format, Row},
};

/// Say which pod is, or was, behind an outside address and port
///
/// Needs root, on the node that has the address; the agent need not run. Outside ports belong to pods in
/// blocks, and the node writes down each change, so that the answer is exact for an earlier time too.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  netctl whois 192.0.2.11:64801\n  netctl whois '[2001:db8::11]:64801' --ago 2h"
)]
pub(super) struct Args {
    /// What the remote side has seen
    #[arg(value_name = "ADDRESS:PORT")]
    address: SocketAddr,
    /// How long ago it has seen it, such as 90s or 2h [default: now]
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    ago: Option<Duration>,
    #[command(flatten)]
    paths: PathArgs,
}

#[derive(Debug, Serialize)]
struct HolderRow {
    pod: String,
    ipv4: String,
}

impl Row for HolderRow {
    const HEADER: &'static [&'static str] = &["POD", "PRIVATE"];

    fn cells(&self) -> Vec<String> {
        vec![self.pod.clone(), self.ipv4.clone()]
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let at = args.ago.map(|ago| (now_unix_ms() / 1000).saturating_sub(ago.as_secs()));
    let Some(holder) = ::node::whois(&args.paths.paths(), args.address, at).await? else {
        match args.ago {
            None => bail!("port {} is no pod's", args.address.port()),
            Some(_) => bail!(
                "port {} was no pod's then, or the log of ports does not reach back so far",
                args.address.port()
            ),
        }
    };
    let row = HolderRow { pod: holder.pod, ipv4: holder.ipv4.to_string() };
    print::list(format, &[row])
}
