//! `netctl ca`: which CA makes certificates, and its replacement.

use std::fmt;

use hextet_api::v1::{self, CaTurn};
use serde::Serialize;

use super::{age, now_unix_ms};
use crate::{
    client::{Client, ServerArgs, request},
    print::{self, Format},
};

/// Replace the cluster's CA while everything goes on, or see how far that is
///
/// The CA vouches for nodes, people, load balancers and servers. A rotation has two steps: `rotate` makes a new CA,
/// from which everybody gets a certificate as they come, while those of the old one are believed; `retire` ends the old
/// one, when everybody has. In between `undo` leads back.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  netctl ca rotate -m 'once a year'\n  netctl ca status\n  netctl ca retire"
)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Say which CA makes certificates, and who has none of it yet
    #[command(after_help = "Example:\n  netctl ca status")]
    Status(StatusArgs),
    /// Make a new CA, which makes all certificates from now on
    ///
    /// Certificates of the old one are believed until `netctl ca retire`, and nobody is locked out. Nodes that are attached
    /// get another within a minute, those that are away when they are back; people when they next run `netctl`, load
    /// balancers within an hour. Tokens of before stay good.
    ///
    /// With --compromised, for a key that somebody else may have: people and load balancers are not believed with the old
    /// CA from now on and must log in again, and tokens that nobody has used are forgotten. Nodes are believed for
    /// their own keys.
    #[command(after_help = "\
Examples:
  netctl ca rotate -m 'once a year'
  netctl ca rotate --compromised -m 'the backup disk was stolen'")]
    Rotate(RotateArgs),
    /// Go back to the CA before, while a rotation is under way
    ///
    /// Everybody who has moved gets a certificate of the old one again; `retire` then ends the new one.
    #[command(after_help = "Example:\n  netctl ca undo")]
    Undo(TurnArgs),
    /// End the old CA: certificates of it are not believed any more
    ///
    /// Refused while somebody has no other, with their names. With --force these are locked out: each needs a new
    /// token, for `netctl node --rejoin` (the node keeps its name, prefix and pods), `netctl login` or `lb-nginx --join`.
    #[command(after_help = "Examples:\n  netctl ca retire\n  netctl ca retire --force -m 'n7 is scrapped'")]
    Retire(RetireArgs),
}

#[derive(Debug, clap::Args)]
struct StatusArgs {
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, clap::Args)]
struct TurnArgs {
    /// Why; kept with the revision
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, clap::Args)]
struct RotateArgs {
    /// Somebody else may have the key of the present CA
    #[arg(long)]
    compromised: bool,
    #[command(flatten)]
    turn: TurnArgs,
}

#[derive(Debug, clap::Args)]
struct RetireArgs {
    /// Lock out who has no other certificate
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    turn: TurnArgs,
}

/// How far a rotation is.
#[derive(Debug, Serialize)]
struct CaStatus {
    /// SHA-256 of the CA that makes certificates.
    issuing: String,
    /// Of the one that goes out of use; empty when no rotation is under way.
    leaving: String,
    since_unix_ms: u64,
    compromised: bool,
    missing: Vec<Missing>,
    missing_count: u32,
    nodes: u32,
    #[serde(skip)]
    age: String,
}

#[derive(Debug, Serialize)]
struct Missing {
    who: String,
    how: String,
}

impl fmt::Display for CaStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "issuing  {}", self.issuing)?;
        if self.leaving.is_empty() {
            return write!(f, "leaving  none: every certificate is of the one CA");
        }
        let compromised =
            if self.compromised { ", COMPROMISED: only nodes are believed with it" } else { "" };
        writeln!(f, "leaving  {} (for {}{compromised})", self.leaving, self.age)?;
        writeln!(f, "missing  {}, in a cluster of {} nodes", self.missing_count, self.nodes)?;
        self.missing.iter().try_for_each(|Missing { who, how }| writeln!(f, "  {who}: {how}"))?;
        let named = u32::try_from(self.missing.len()).unwrap_or(u32::MAX);
        if self.missing_count > named {
            writeln!(f, "  and {} more", self.missing_count - named)?;
        }
        write!(f, "next     {}", self.next())
    }
}

impl CaStatus {
    fn next(&self) -> &'static str {
        match (self.missing_count, self.compromised) {
            (0, _) => "`netctl ca retire` ends the old CA",
            (_, false) => {
                "wait for them (nothing is urgent), or leave them out: `netctl ca retire --force`; back: `netctl ca undo`"
            }
            (_, true) => {
                "`netctl ca retire --force` as soon as you can do without them: until then who has the key can pose as the \
                 server to those who are missing"
            }
        }
    }
}

/// What was done.
#[derive(Debug, Serialize)]
struct Turned {
    issuing: String,
    leaving: String,
    revision: u64,
    #[serde(skip)]
    what: &'static str,
}

impl fmt::Display for Turned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |ca: &str| ca.chars().take(16).collect::<String>();
        write!(f, "CA {} {} (revision {})", short(&self.issuing), self.what, self.revision)?;
        if self.leaving.is_empty() {
            return Ok(());
        }
        write!(f, "\nCA {} is believed until `netctl ca retire`", short(&self.leaving))
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    match args.command {
        Command::Status(args) => status(&args.server, format).await,
        Command::Rotate(RotateArgs { compromised, turn }) => {
            let wanted = v1::TurnCaRequest { compromised, ..asked(CaTurn::Rotate, turn.message) };
            take(&turn.server, wanted, "makes certificates from now on", format).await
        }
        Command::Undo(TurnArgs { message, server }) => {
            take(&server, asked(CaTurn::Undo, message), "makes certificates again", format).await
        }
        Command::Retire(RetireArgs { force, turn }) => {
            let wanted = v1::TurnCaRequest { force, ..asked(CaTurn::Retire, turn.message) };
            take(&turn.server, wanted, "is the only one", format).await
        }
    }
}

fn asked(turn: CaTurn, message: String) -> v1::TurnCaRequest {
    v1::TurnCaRequest { turn: turn.into(), message, ..v1::TurnCaRequest::default() }
}

async fn take(
    server: &ServerArgs,
    wanted: v1::TurnCaRequest,
    what: &'static str,
    format: Format,
) -> anyhow::Result<()> {
    let client = Client::connect(server).await?;
    let answer = client.answer(client.cluster().turn_ca(request(wanted))).await?;
    let v1::TurnCaResponse { revision, issuing, leaving } = answer;
    print::to_stdout(|out| print::one(out, format, &Turned { issuing, leaving, revision, what }))
}

async fn status(server: &ServerArgs, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(server).await?;
    let answer = client.answer(client.cluster().get_ca(request(v1::GetCaRequest {}))).await?;
    let missing = answer.missing.into_iter();
    let status = CaStatus {
        age: age(answer.since_unix_ms, now_unix_ms()),
        issuing: answer.issuing,
        leaving: answer.leaving,
        since_unix_ms: answer.since_unix_ms,
        compromised: answer.compromised,
        missing: missing.map(|v1::MissingHolder { who, how }| Missing { who, how }).collect(),
        missing_count: answer.missing_count,
        nodes: answer.nodes_count,
    };
    print::to_stdout(|out| print::one(out, format, &status))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(missing_count: u32) -> CaStatus {
        let of = |who: &str| Missing { who: who.into(), how: "cut-off: gets one when it is back".into() };
        CaStatus {
            issuing: "bb".repeat(32),
            leaving: "aa".repeat(32),
            since_unix_ms: 0,
            compromised: false,
            missing: ["node/n1", "node/n2"].into_iter().take(missing_count as usize).map(of).collect(),
            missing_count,
            nodes: 5000,
            age: "3d2h".into(),
        }
    }

    #[test]
    fn who_is_missing_and_what_to_do_is_said() {
        expect_test::expect![[r"
            issuing  bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb
            leaving  aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa (for 3d2h)
            missing  3, in a cluster of 5000 nodes
              node/n1: cut-off: gets one when it is back
              node/n2: cut-off: gets one when it is back
              and 1 more
            next     wait for them (nothing is urgent), or leave them out: `netctl ca retire --force`; back: `netctl ca undo`
        "]]
        .assert_eq(&format!("{}\n", status(3)));
        assert!(status(0).to_string().ends_with("next     `netctl ca retire` ends the old CA"));
        let compromised = CaStatus { compromised: true, ..status(1) };
        assert!(compromised.to_string().contains("COMPROMISED"), "{compromised}");
        let one = CaStatus { leaving: String::new(), ..status(0) };
        assert!(one.to_string().ends_with("leaving  none: every certificate is of the one CA"), "{one}");
    }
}
