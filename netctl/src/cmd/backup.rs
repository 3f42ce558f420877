//! `netctl server backup`, `netctl server restore` and `netctl server status`.

use std::path::PathBuf;

use hextet_api::v1;
use scheduler::backup::{self, Incomplete, NewFile};
use serde::Serialize;

use super::server::STATE_DIR;
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

/// Make the state directory of a server of a backup, for `netctl server` to go on with
///
/// The directory must hold no cluster. Nodes and people connect with the certificates that they have; load balancers list
/// anew. What was changed after the backup is gone: pods that were placed since then are stopped. Pods that there may only
/// be one of (`availability: singleton`) wait until no lease of the old server can run; end that server first. A file that
/// could only hold a part of a damaged store is refused with what it lacks, unless --incomplete takes what there is.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl server restore /root/hextet-2026-11-22.backup\n  netctl server")]
pub(super) struct RestoreArgs {
    /// What `netctl server backup` wrote
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Where the cluster's state and keys will be
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    /// Take what there is of a damaged store, without its history; what is missing is printed
    #[arg(long)]
    incomplete: bool,
}

#[derive(Debug, Serialize)]
struct BackedUp {
    file: PathBuf,
    bytes: u64,
    /// What a damaged store could not give.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing: Vec<String>,
}

impl std::fmt::Display for BackedUp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (file, bytes) = (self.file.display(), self.bytes);
        if self.missing.is_empty() {
            return write!(f, "{file} holds the cluster and its CA's key ({bytes} bytes)");
        }
        writeln!(
            f,
            "{file} is INCOMPLETE: it holds what can be read of a damaged store, and the CA's key ({bytes} bytes)"
        )?;
        self.missing.iter().try_for_each(|line| writeln!(f, "  missing: {line}"))
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
        print::one(out, format, &BackedUp { file: args.file, bytes, missing: status.damage })
    })
}

pub(super) fn restore(args: RestoreArgs) -> anyhow::Result<()> {
    super::start_logging("warn");
    let incomplete = if args.incomplete { Incomplete::Take } else { Incomplete::Refuse };
    let restored = backup::restore(&args.file, &args.state_dir, incomplete)?;
    let (dir, revision) = (args.state_dir.display(), restored.revision);
    print::to_stdout(|out| {
        let line =
            format!("{dir} holds the cluster as of revision {revision}; its epoch is {}", restored.epoch);
        let missing = restored.missing.iter().map(|line| format!("  missing: {line}"));
        let lines: Vec<String> = std::iter::once(line).chain(missing).collect();
        Ok(print::lines(out, lines.iter().map(String::as_str))?)
    })
}
