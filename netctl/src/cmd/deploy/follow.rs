//! Shows how far a deploy is until it has come to an end, also over a restart of the server.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use hextet_api::v1::{self, DeployStage};

use crate::{
    client::{Client, ServerArgs, request},
    cmd::{asked_to_end, deploys::DeployRow},
    duration,
    print::{self, Format},
};

/// The server is asked this often.
const INTERVAL: Duration = Duration::from_millis(500);
/// A wait whose words alone change, such as those of how much room there is, is told again after this long.
const WORDS_INTERVAL: Duration = Duration::from_secs(10);
/// A server that does not answer is asked again for this long.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// Says what was begun; programs get the last state that is known, once.
pub(super) fn begun(deploy: &v1::Deploy, detach: bool, format: Format) -> anyhow::Result<()> {
    if format != Format::Table {
        return if detach { state(deploy, format) } else { Ok(()) };
    }
    let strategy = DeployRow::new(deploy.clone(), 0).strategy;
    let text = format!("deploy {} ({strategy}): version {} to {}", deploy.id, deploy.previous, deploy.next);
    print::to_stdout(|out| Ok(print::lines(out, text.lines())?))
}

pub(super) async fn follow(
    server: &ServerArgs,
    mut client: Client,
    mut deploy: v1::Deploy,
    format: Format,
) -> anyhow::Result<()> {
    let (id, mut shown, mut heard) = (deploy.id.clone(), None, Instant::now());
    loop {
        if format == Format::Table {
            show(&deploy, &mut shown)?;
        }
        if is_end(deploy.stage()) {
            return end(deploy, format);
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = asked_to_end() => bail!(left_alone(&id)),
        }
        match ask(&client, &id).await {
            Ok(newer) => (deploy, heard) = (newer, Instant::now()),
            Err(status) if is_away(status.code()) && heard.elapsed() < SILENCE_MAX => {
                if let Ok(fresh) = Client::connect(server).await {
                    client = fresh;
                }
            }
            Err(status) if status.code() == tonic::Code::NotFound => {
                bail!("deploy {id} is gone: its job was removed, or somebody has acknowledged how it ended");
            }
            Err(status) => return Err(client.explain(&status)).context(left_alone(&id)),
        }
    }
}

fn state(deploy: &v1::Deploy, format: Format) -> anyhow::Result<()> {
    let row = DeployRow::new(deploy.clone(), 0);
    print::to_stdout(|out| print::value(out, format, &row))
}

fn left_alone(id: &str) -> String {
    format!("deploy {id} goes on without being followed; `netctl deploys {id}` shows how far it is")
}

fn is_away(code: tonic::Code) -> bool {
    use tonic::Code::{Cancelled, DeadlineExceeded, Unavailable, Unknown};
    matches!(code, Unavailable | Cancelled | Unknown | DeadlineExceeded)
}

async fn ask(client: &Client, id: &str) -> Result<v1::Deploy, tonic::Status> {
    let message = v1::ListDeploysRequest { deploy: id.to_owned() };
    let answer = client.cluster().list_deploys(request(message)).await?;
    let none = || tonic::Status::not_found(format!("there is no deploy `{id}`"));
    answer.into_inner().deploys.into_iter().next().ok_or_else(none)
}

/// The last line that was printed.
struct Shown {
    state: String,
    waits_for: String,
    output: String,
    at: Instant,
}

fn show(deploy: &v1::Deploy, shown: &mut Option<Shown>) -> anyhow::Result<()> {
    let (state, waits_for, at) = (line(deploy), deploy.waits_for.clone(), Instant::now());
    let is_known = shown.as_ref().is_some_and(|shown| {
        let is_recent = at - shown.at < WORDS_INTERVAL;
        shown.state == state && (shown.waits_for == waits_for || is_recent)
    });
    if !is_known {
        let wait = if waits_for.is_empty() { String::new() } else { format!("; {waits_for}") };
        let text = format!("{state}{wait}\n{}", news(deploy, shown.as_ref()));
        print::to_stdout(|out| Ok(print::lines(out, text.lines())?))?;
        *shown = Some(Shown { state, waits_for, output: deploy.output.clone(), at });
    }
    Ok(())
}

/// The last lines of what has failed, unless they were shown.
fn news(deploy: &v1::Deploy, shown: Option<&Shown>) -> String {
    let is_known = shown.is_some_and(|shown| shown.output == deploy.output);
    if is_known { String::new() } else { print::quoted(&deploy.output) }
}

/// One line without what it waits for; what only time changes is not in it.
fn line(deploy: &v1::Deploy) -> String {
    let row = DeployRow::new(deploy.clone(), 0);
    let mut line = format!("  {}: {}", row.step, row.stage);
    if !is_end(deploy.stage()) {
        let _ = write!(
            line,
            ", {} of {} new pods run, {} others",
            deploy.new_running, deploy.new_wanted, deploy.others
        );
    }
    if !deploy.reason.is_empty() {
        let _ = write!(line, "; {}", deploy.reason);
    }
    if deploy.stage() == DeployStage::Held {
        let _ = write!(line, " (`netctl deploy resume {}`)", deploy.job);
    }
    line
}

fn is_end(stage: DeployStage) -> bool {
    matches!(stage, DeployStage::Promoted | DeployStage::Aborted | DeployStage::GaveUp)
}

fn end(deploy: v1::Deploy, format: Format) -> anyhow::Result<()> {
    let took = Duration::from_millis(deploy.ended_unix_ms.saturating_sub(deploy.begun_unix_ms));
    let (id, previous, promoted) =
        (deploy.id.clone(), deploy.previous, deploy.stage() == DeployStage::Promoted);
    let reason = deploy.reason.clone();
    match format {
        Format::Table if promoted => {
            let text = format!("deploy {id} promoted after {}", duration::age(took));
            print::to_stdout(|out| Ok(print::lines(out, text.lines())?))?;
        }
        Format::Table => {}
        Format::Json | Format::Yaml => state(&deploy, format)?,
    }
    if promoted { Ok(()) } else { Err(anyhow::anyhow!("deploy {id}: version {previous} is back: {reason}")) }
}
