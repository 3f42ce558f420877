//! `netctl server`: runs the control plane.

use std::{io, io::Write as _, net::SocketAddr, path::PathBuf, time::Duration};

use hextet_api::{DEFAULT_SOCKET, token::is_host_and_port};
use ipnetwork::Ipv4Network;
use scheduler::{
    etcd::{Location, TlsFiles},
    server::{Ready, ServerConfig, StoreChoice},
};
use scheduler_core::quantity::Memory;

use super::{
    asked_to_end,
    backup::{self, BackupArgs, RestoreArgs},
    block_on, block_on_threads,
    status::{self, StatusArgs},
};
use crate::{duration, print::Format};

/// Where the state is when nothing is said.
pub(super) const STATE_DIR: &str = "/var/lib/hextet/server";

/// Run the control plane
///
/// The first start makes the cluster, unless `netctl cluster init` has: its prefix, its certificate
/// authority, its store. It prints the line to paste on the first node; `netctl token` makes more. Logs go to
/// stderr.
///
/// With --store etcd://... several servers share one cluster: one leads, the others forward to it, and another
/// leads when it dies. Each is started in the same way, with an --advertise of its own.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  netctl server
  netctl server --listen '[2001:db8:1::11]:4679' --advertise n1.example:4679
  netctl server --store etcd://e1.example:2379,e2.example:2379,e3.example:2379")]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Where the cluster's state and keys are kept; with --store, its keys
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    #[command(flatten)]
    store: StoreArgs,
    /// Where to listen for nodes, people and load balancers; may be repeated
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "[::]:4679")]
    listen: Vec<SocketAddr>,
    /// The socket for root on this machine
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// How others reach this server and no other, for tokens and servers; may be repeated [default: this machine's addresses]
    #[arg(long, value_name = "HOST:PORT", value_parser = host_and_port)]
    advertise: Vec<String>,
    /// How long a node may be silent before its pods are replaced
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration::parse)]
    lease: Duration,
    /// How much room the log of changes has on the disk; its oldest part is forgotten when it is full
    #[arg(long, value_name = "BYTES", default_value = "64Mi")]
    history: Memory,
    /// The IPv4 range that every node gives to its own pods; decided at the first start
    /// [default: 10.254.0.0/20]
    #[arg(long, value_name = "PREFIX", value_parser = ipv4_prefix)]
    pod_ipv4: Option<Ipv4Network>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Backup(BackupArgs),
    Restore(RestoreArgs),
    Status(StatusArgs),
}

/// Where the cluster's revisions are kept.
#[derive(Debug, clap::Args)]
pub(super) struct StoreArgs {
    /// Keep the cluster in etcd, for several servers: etcd://HOST:PORT,HOST:PORT/PREFIX, of which one
    /// HOST:PORT is enough [default: a file in the state directory]
    #[arg(long, value_name = "URL")]
    store: Option<Location>,
    /// The CA of etcd's certificates (PEM); without it etcd is spoken to without TLS
    #[arg(long, value_name = "FILE", requires = "store")]
    etcd_ca: Option<PathBuf>,
    /// The certificate to show to etcd (PEM)
    #[arg(long, value_name = "FILE", requires = "etcd_ca", requires = "etcd_key")]
    etcd_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
}

impl StoreArgs {
    pub(super) fn choice(self) -> StoreChoice {
        let Some(location) = self.store else { return StoreChoice::Local };
        let client = self.etcd_cert.zip(self.etcd_key);
        let tls = self.etcd_ca.map(|ca| TlsFiles { ca, client });
        StoreChoice::Etcd(Location { tls, ..location })
    }
}

fn host_and_port(text: &str) -> Result<String, String> {
    if is_host_and_port(text) {
        Ok(text.to_owned())
    } else {
        Err("give HOST:PORT, such as n1.example:4679 or [2001:db8::1]:4679".to_owned())
    }
}

pub(super) fn ipv4_prefix(text: &str) -> Result<Ipv4Network, String> {
    let network: Ipv4Network =
        text.parse().map_err(|_| "give ADDRESS/LENGTH, such as 10.254.0.0/20".to_owned())?;
    if network.network() != network.ip() {
        let meant = format!("{}/{}", network.network(), network.prefix());
        return Err(format!("bits are set behind the prefix: did you mean {meant}?"));
    }
    Ok(network)
}

pub(super) fn run(args: Args, format: Format) -> anyhow::Result<()> {
    match args.command {
        Some(Command::Backup(args)) => return block_on(backup::backup(args, format)),
        Some(Command::Restore(args)) => return block_on(backup::restore(args)),
        Some(Command::Status(args)) => return block_on(status::run(args, format)),
        None => {}
    }
    let config = ServerConfig {
        state_dir: args.state_dir,
        store: args.store.choice(),
        listen: args.listen,
        socket: args.socket,
        advertise: args.advertise,
        lease: args.lease,
        history_bytes: args.history.0,
        pod_ipv4: args.pod_ipv4,
    };
    block_on_threads(scheduler::server::run(config, asked_to_end(), announce))
}

/// Prints the line to paste on the first node. A server that is up stays up when nobody reads it.
fn announce(ready: &Ready) {
    let Some(token) = &ready.join_token else { return };
    let mut out = io::stdout().lock();
    let printed = writeln!(out, "netctl node --join {token}").and_then(|()| out.flush());
    if let Err(error) = printed {
        tracing::warn!(
            "cannot print the line for the first node ({error}): `netctl token --for node` makes another"
        );
    }
}
