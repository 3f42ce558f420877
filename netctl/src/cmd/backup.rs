//! `netctl server backup`, `netctl server restore` and `netctl server status`.

use std::path::PathBuf;

use hextet_api::v1;
use scheduler::{
    backup::{self, Incomplete, NewFile, Restored},
    server::StoreChoice,
};
use serde::Serialize;

use super::server::{STATE_DIR, StoreArgs};
use crate::{
    client::{Client, ServerArgs},
    print::{self, Format},
};

/// Write all that the running server holds, and the cluster's CA with its key, to a file
///
/// The server goes on meanwhile; the file holds one revision. It has mode 0600: whoever has it can be the cluster. A file
/// that is there is not replaced. It needs the server's Unix socket. Of a damaged store the file holds what can be
/// read, and says so: `netctl server restore` takes it only with --incomplete.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl server backup /root/hextet-$(date +%F).backup")]
pub(super) struct BackupArgs {
    /// The file to make
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    server: ServerArgs,
}

/// Make the state of a server of a backup, in a directory or in etcd, for `netctl server` to go on with
///
/// There must be no cluster, and no server that runs. Nodes and people connect with the certificates that they have; load
/// balancers list anew. What was changed after the backup is gone: pods that were placed since then are stopped. Pods that
/// there may only be one of (`availability: singleton`) wait until no lease of the old server can run; end that server
/// first. A restore that was ended half-way leaves nothing that a server starts with: run it again. A file that
/// could only hold a part of a damaged store is refused with what it lacks, unless --incomplete takes what there is.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  netctl server restore /root/hextet-2026-11-22.backup && netctl server
  netctl server restore /root/hextet-2026-11-22.backup --store etcd://e1.example:2379")]
pub(super) struct RestoreArgs {
    /// What `netctl server backup` wrote, of a cluster in a file or in etcd
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Where the cluster's state and keys will be; with --store nothing is put there
    #[arg(long, value_name = "DIR", default_value = STATE_DIR, conflicts_with = "store")]
    state_dir: PathBuf,
    #[command(flatten)]
    store: StoreArgs,
    /// Take what there is of a damaged store, without its history; what is missing is printed
    #[arg(long)]
    incomplete: bool,
}

#[derive(Debug, Serialize)]
struct BackedUp {
    file: PathBuf,
    bytes: u64,
    /// What is wrong with a damaged store.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    damaged: Vec<String>,
}

impl std::fmt::Display for BackedUp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (file, bytes) = (self.file.display(), self.bytes);
        if self.damaged.is_empty() {
            return write!(f, "{file} holds the cluster and its CA's key ({bytes} bytes)");
        }
        writeln!(
            f,
            "{file} is INCOMPLETE: it holds what can be read of a damaged store, and the CA's key ({bytes} bytes)"
        )?;
        self.damaged.iter().try_for_each(|line| writeln!(f, "  damaged: {line}"))
    }
}

pub(super) async fn backup(args: BackupArgs, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let status = client.answer(client.cluster().get_status(v1::GetStatusRequest {})).await?;
    let mut file = NewFile::create(&args.file)?;
    let mut chunks = client.answer(client.cluster().backup(v1::BackupRequest {})).await?;
    let mut bytes = 0;
    while let Some(chunk) = chunks.message().await.map_err(|status| client.explain(&status))? {
        bytes += chunk.data.len() as u64;
        file.append(&chunk.data)?;
    }
    file.finish()?;
    print::to_stdout(|out| {
        print::one(out, format, &BackedUp { file: args.file, bytes, damaged: status.damage })
    })
}

pub(super) async fn restore(args: RestoreArgs) -> anyhow::Result<()> {
    let incomplete = if args.incomplete { Incomplete::Take } else { Incomplete::Refuse };
    let (place, restored) = match args.store.choice() {
        StoreChoice::Local => {
            let restored = backup::restore(&args.file, &args.state_dir, incomplete)?;
            (args.state_dir.display().to_string(), restored)
        }
        StoreChoice::Etcd(location) => {
            let place = format!("etcd at {} below {}", location.endpoints.join(", "), location.prefix);
            (place, backup::restore_into_etcd(&args.file, &location, incomplete).await?)
        }
    };
    let Restored { revision, epoch, missing, .. } = restored;
    print::to_stdout(|out| {
        let line = format!("{place} holds the cluster as of revision {revision}; its epoch is {epoch}");
        let missing = missing.iter().map(|line| format!("  missing: {line}"));
        let lines: Vec<String> = std::iter::once(line).chain(missing).collect();
        Ok(print::lines(out, lines.iter().map(String::as_str))?)
    })
}
