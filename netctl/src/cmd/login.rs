//! `netctl login`: turns a token into credentials for this command line.

use std::{io, path::PathBuf};

use anyhow::Context as _;
use hextet_api::{
    connect::{self, ConnectError, Credentials, EnrollError, Key, Wish},
    token::{Role, Token},
};

use super::WrongUse;
use crate::{
    client::{Hinted, credentials_path, variable},
    print, progress,
};

/// Turn a token into credentials for this command line
///
/// They are written to ~/.config/hextet/credentials.json, or where HEXTET_CREDENTIALS says, readable by
/// their owner alone.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example, on the server's machine and then on yours:
  netctl token --for operator --name alice
  netctl login hx1-AQIA...")]
pub(super) struct Args {
    /// What `netctl token --for admin`, `operator` or `viewer` printed, or - to read it from standard input
    token: String,
    /// Where to write them instead
    #[arg(long, value_name = "FILE")]
    credentials: Option<PathBuf>,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let token = read_token(&args.token)?;
    let path = args
        .credentials
        .or_else(|| credentials_path(variable))
        .context("there is no place for credentials: set HOME, or name a file with --credentials")?;
    let credentials = enroll(&token).await?;
    credentials.save(&path)?;
    print::to_stdout(|out| {
        use io::Write as _;
        Ok(writeln!(out, "logged in as {} ({})", credentials.name, path.display())?)
    })
}

fn read_token(given: &str) -> anyhow::Result<Token> {
    let mut text = given.to_owned();
    if given == "-" {
        text.clear();
        io::stdin().read_line(&mut text).context("cannot read the token from standard input")?;
    }
    let token: Token = text.parse().map_err(|error| WrongUse(format!("{error}")))?;
    match token.role {
        Role::User | Role::Admin | Role::Operator | Role::Viewer => Ok(token),
        Role::Node => {
            Err(WrongUse("this token is for a node: run `netctl node --join TOKEN` there".into()).into())
        }
        Role::Lb => {
            Err(WrongUse("this token is for a load balancer: give it to `lb-nginx --join`".into()).into())
        }
    }
}

async fn enroll(token: &Token) -> anyhow::Result<Credentials> {
    let key = Key::generate()?;
    let waiting = format!("logging in at {}", token.servers.join(", "));
    let enrolled = progress::shown(&waiting, connect::enroll(token, &key, Wish::default())).await;
    Ok(enrolled.map_err(explain)?.credentials)
}

fn explain(error: EnrollError) -> anyhow::Error {
    let hint = match &error {
        EnrollError::Connect(
            ConnectError::Tcp { .. } | ConnectError::Timeout { .. } | ConnectError::All(_),
        ) => "is `netctl server` running there, and its port open to this machine?",
        EnrollError::Refused { status } if status.code() == tonic::Code::PermissionDenied => {
            "`netctl token --for operator --name NAME` on the server's machine makes a new token"
        }
        _ => return error.into(),
    };
    Hinted { message: format!("{:#}", anyhow::Error::from(error)), hint: hint.into() }.into()
}
