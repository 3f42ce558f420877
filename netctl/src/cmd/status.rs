//! `netctl server status`: how the server and its store are.

use std::fmt;

use hextet_api::v1;
use ipnetwork::IpNetwork;
use scheduler_core::time::WallTime;
use serde::Serialize;

use crate::{
    client::{Client, ServerArgs, request},
    print::{self, Format},
};

/// Say how the server is, and whether its store is damaged
///
/// A server whose store is damaged goes on reading: it says here what is damaged, and takes no change until a backup
/// is restored. Exit status 1 then, and when the store took no change, as on a full disk. Of several servers the
/// first is the one that leads.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl server status")]
pub(super) struct StatusArgs {
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Serialize)]
struct ServerStatus {
    /// `None` when it cannot be read.
    prefix: Option<IpNetwork>,
    epoch: String,
    revision: u64,
    version: String,
    /// It goes on from a backup, and leases from before may still run.
    #[serde(skip_serializing_if = "Option::is_none")]
    restored: Option<Restored>,
    /// `host:port` of all servers; the one that leads is first.
    servers: Vec<String>,
    /// Why the store takes no change; empty if it does.
    #[serde(skip_serializing_if = "String::is_empty")]
    writes_fail: String,
    /// How many have no certificate of the new CA; none when no rotation is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_missing: Option<u32>,
    /// What is wrong with the store, a line each.
    damage: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Restored {
    /// The last one of the backup.
    revision: u64,
    unix_ms: u64,
    /// Singletons get a place then.
    wait_ms: u32,
}

/// The store is damaged; what is wrong is printed already.
#[derive(Debug, thiserror::Error)]
#[error(
    "the store is damaged and is only read: end the server, then restore a backup with `netctl server restore` or put back a copy of the file"
)]
struct Damaged;

/// The store takes nothing; why is printed already.
#[derive(Debug, thiserror::Error)]
#[error("the store takes no change: pods go on, and the server tries again with the next change")]
struct TakesNoChange;

impl fmt::Display for ServerStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let store = match (self.damage.is_empty(), self.writes_fail.is_empty()) {
            (true, true) => "good".to_owned(),
            (true, false) => format!("TAKES NO CHANGE: {}", self.writes_fail),
            (false, _) => "DAMAGED, only read".to_owned(),
        };
        let prefix = self.prefix.map_or_else(|| "unreadable".to_owned(), |prefix| prefix.to_string());
        writeln!(f, "cluster   {prefix}")?;
        writeln!(f, "epoch     {}", self.epoch)?;
        writeln!(f, "revision  {}", self.revision)?;
        writeln!(f, "version   {}", self.version)?;
        let (first, others) = self.servers.split_first().unzip();
        let others: String = others.into_iter().flatten().map(|server| format!(" {server}")).collect();
        let leads = if others.is_empty() { "" } else { " (leads)" };
        writeln!(f, "servers   {}{leads}{others}", first.map_or("", String::as_str))?;
        if let Some(missing) = self.ca_missing {
            writeln!(
                f,
                "ca        is being replaced, {missing} have no new certificate yet: `netctl ca status`"
            )?;
        }
        writeln!(f, "store     {store}")?;
        if let Some(Restored { revision, unix_ms, wait_ms }) = &self.restored {
            let (time, seconds) = (WallTime(*unix_ms), f64::from(*wait_ms) / 1000.0);
            writeln!(
                f,
                "restored  from a backup of revision {revision}, {time}: singletons wait {seconds:.1} s, in which leases from before may run"
            )?;
        }
        self.damage.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

pub(super) async fn run(args: StatusArgs, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let answer = client.answer(client.cluster().get_status(request(v1::GetStatusRequest {}))).await?;
    let prefix = answer.prefix.as_ref().map(ipnetwork::Ipv6Network::try_from).transpose()?;
    let status = ServerStatus {
        prefix: prefix.map(IpNetwork::V6),
        epoch: answer.epoch,
        revision: answer.revision,
        version: answer.server_version,
        restored: answer.restored.map(restored),
        servers: answer.servers,
        writes_fail: answer.writes_fail,
        ca_missing: (!answer.ca_leaving.is_empty()).then_some(answer.ca_missing),
        damage: answer.damage,
    };
    print::to_stdout(|out| print::one(out, format, &status))?;
    match status {
        ServerStatus { damage, .. } if !damage.is_empty() => Err(Damaged.into()),
        ServerStatus { writes_fail, .. } if !writes_fail.is_empty() => Err(TakesNoChange.into()),
        _ => Ok(()),
    }
}

fn restored(message: v1::RestoredStatus) -> Restored {
    let v1::RestoredStatus { revision, unix_ms, wait_ms } = message;
    Restored { revision, unix_ms, wait_ms }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_store_is_said_to_be_so() {
        let mut status = ServerStatus {
            prefix: None,
            epoch: "e".into(),
            revision: 7,
            version: "1".into(),
            restored: None,
            servers: vec!["192.0.2.1:7443".into(), "192.0.2.2:7443".into()],
            writes_fail: String::new(),
            ca_missing: None,
            damage: vec!["log: revision 3 is missing".into()],
        };
        expect_test::expect![[r"
            cluster   unreadable
            epoch     e
            revision  7
            version   1
            servers   192.0.2.1:7443 (leads) 192.0.2.2:7443
            store     DAMAGED, only read
              log: revision 3 is missing
        "]]
        .assert_eq(&status.to_string());
        status.damage.clear();
        status.ca_missing = Some(2);
        assert!(status.to_string().contains("2 have no new certificate yet: `netctl ca status`"), "{status}");
        assert!(status.to_string().ends_with("store     good\n"));
        status.writes_fail = "the disk is full".into();
        assert!(status.to_string().ends_with("store     TAKES NO CHANGE: the disk is full\n"));
    }

    #[test]
    fn a_cluster_that_was_restored_says_for_how_long_singletons_wait() {
        let status = ServerStatus {
            ca_missing: None,
            prefix: Some("fd00:1:2::/48".parse().unwrap()),
            epoch: "e".into(),
            revision: 8,
            version: "1".into(),
            servers: vec![],
            writes_fail: String::new(),
            restored: Some(Restored { revision: 7, unix_ms: 0, wait_ms: 4_200 }),
            damage: vec![],
        };
        let text = status.to_string();
        let line = "restored  from a backup of revision 7, 1970-01-01T00:00:00Z: singletons wait 4.2 s";
        assert!(text.lines().last().unwrap().starts_with(line), "{text}");
    }
}
