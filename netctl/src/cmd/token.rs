//! `netctl token`: makes a token with which a node, person or load balancer joins.

use std::{fmt, time::Duration};

use hextet_api::v1::{self, TokenRole};
use serde::Serialize;

use super::WrongUse;
use crate::{
    client::{Client, ServerArgs, request},
    duration,
    print::{self, Format},
    selector::Selector,
};

/// The server's bound, too.
const VALID_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Make a token with which a node, person or load balancer joins
///
/// It is good for one use and a limited time. Keep it as you would a password until it is used. An admin may do
/// everything; an operator runs jobs and looks after nodes; a viewer reads.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  netctl token --for node
  netctl token --for operator --name alice --valid 10m
  netctl token --for lb --name edge --select hello/web")]
pub(super) struct Args {
    /// Who may use it: node, admin, operator, viewer or lb (a load balancer)
    #[arg(long = "for", value_name = "ROLE", hide_possible_values = true)]
    role: Role,
    /// For whom; only a node may do without, and names itself then
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    name: String,
    /// What a load balancer may read
    #[arg(long, value_name = "JOB[/GROUP]", required_if_eq("role", "lb"))]
    select: Option<Selector>,
    /// How long it may be used, 30d at most
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration::parse)]
    valid: Duration,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Role {
    Node,
    // The word of clusters that had no levels yet.
    #[value(alias = "user")]
    Admin,
    Operator,
    Viewer,
    Lb,
}

#[derive(Debug, Serialize)]
struct Made {
    token: String,
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.token)
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let message = message(&args)?;
    let client = Client::connect(&args.server).await?;
    let token = client.answer(client.cluster().create_token(request(message))).await?.token;
    match args.role {
        Role::Node => print::note(format!("on the node, as root: netctl node --join {token}")),
        Role::Admin | Role::Operator | Role::Viewer => print::note(format!("there: netctl login {token}")),
        Role::Lb => print::note("lb-nginx, for one, takes it with --join"),
    }
    print::to_stdout(|out| print::one(out, format, &Made { token }))
}

fn message(args: &Args) -> Result<v1::CreateTokenRequest, WrongUse> {
    if args.select.is_some() && args.role != Role::Lb {
        return Err(WrongUse("--select is for load balancers: give --for lb with it".into()));
    }
    if args.name.is_empty() && args.role != Role::Node {
        return Err(WrongUse(
            "a name is missing: give --name for whom the token is, such as --name alice".into(),
        ));
    }
    let valid = Some(args.valid).filter(|valid| *valid <= VALID_MAX);
    let valid_seconds =
        valid.and_then(|valid| u32::try_from(valid.as_secs()).ok()).filter(|seconds| *seconds > 0);
    Ok(v1::CreateTokenRequest {
        role: match args.role {
            Role::Node => TokenRole::Node,
            Role::Admin => TokenRole::Admin,
            Role::Operator => TokenRole::Operator,
            Role::Viewer => TokenRole::Viewer,
            Role::Lb => TokenRole::Lb,
        }
        .into(),
        name: args.name.clone(),
        valid_seconds: valid_seconds.ok_or_else(|| WrongUse("--valid must be from 1s to 30d".into()))?,
        selector: args.select.as_ref().map(Selector::to_string).unwrap_or_default(),
    })
}
