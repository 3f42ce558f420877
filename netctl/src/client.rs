//! The way to the server that client commands take, and its errors in words.

use std::{
    error::Error as _,
    future::Future,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use hextet_api::{
    DEFAULT_SOCKET,
    connect::{self, ConnectError, Credentials, CredentialsError},
    v1::{cluster_client::ClusterClient, endpoints_client::EndpointsClient},
};
use tokio::time::timeout;
use tonic::{Code, Request, Response, Status, transport::Channel};

use crate::{print, progress};

/// A list of 200,000 pods fits.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How long new credentials may take.
const RENEW_MAX: Duration = Duration::from_secs(10);

/// How long one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the server is.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServerArgs {
    /// The server's Unix socket [env: HEXTET_SOCKET] [default: /run/hextet/server.sock]
    #[arg(long, value_name = "PATH", conflicts_with = "credentials")]
    pub(crate) socket: Option<PathBuf>,
    /// What `netctl login` wrote; used when it is there [env: HEXTET_CREDENTIALS] [default:
    /// ~/.config/hextet/credentials.json]
    #[arg(long, value_name = "FILE")]
    pub(crate) credentials: Option<PathBuf>,
}

/// The way that was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Socket(PathBuf),
    Credentials(PathBuf),
}

/// An error with a sentence on what to do next.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Hinted {
    pub(crate) message: String,
    pub(crate) hint: String,
}

/// A connection to the server.
pub(crate) struct Client {
    channel: Channel,
    /// `the server at PLACE`, for errors.
    server: String,
}

impl Target {
    /// Options before variables, the socket before credentials; credentials that are only there by default
    /// count when their file exists.
    fn choose(
        args: &ServerArgs,
        variable: impl Fn(&str) -> Option<PathBuf>,
        exists: impl Fn(&Path) -> bool,
    ) -> Target {
        if let Some(socket) = &args.socket {
            return Target::Socket(socket.clone());
        }
        if let Some(credentials) = &args.credentials {
            return Target::Credentials(credentials.clone());
        }
        if let Some(socket) = variable("HEXTET_SOCKET") {
            return Target::Socket(socket);
        }
        match credentials_path(variable).filter(|path| exists(path)) {
            Some(path) => Target::Credentials(path),
            None => Target::Socket(DEFAULT_SOCKET.into()),
        }
    }
}

/// Where `netctl login` writes.
pub(crate) fn credentials_path(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    variable("HEXTET_CREDENTIALS").or_else(|| Some(variable("HOME")?.join(".config/hextet/credentials.json")))
}

/// A variable of the environment; empty counts as not set.
pub(crate) fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

impl Client {
    pub(crate) async fn connect(args: &ServerArgs) -> anyhow::Result<Client> {
        match Target::choose(args, variable, Path::exists) {
            Target::Socket(path) => {
                let server = path.display().to_string();
                let waiting = format!("connecting to {server}");
                let channel = progress::shown(&waiting, connect::unix(&path)).await.map_err(unreachable)?;
                Ok(Client { channel, server })
            }
            Target::Credentials(path) => {
                let credentials = Credentials::load(&path).map_err(unusable)?;
                let server = credentials.servers.join(", ");
                let waiting = format!("connecting to {server}");
                let connecting = connect::mutual_tls_and_ca(&credentials);
                let (channel, has_moved) =
                    progress::shown(&waiting, connecting).await.map_err(unreachable)?;
                let channel = keep_fresh(&path, &credentials, has_moved, channel).await;
                Ok(Client { channel, server })
            }
        }
    }

    pub(crate) fn cluster(&self) -> ClusterClient<Channel> {
        ClusterClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    pub(crate) fn endpoints(&self) -> EndpointsClient<Channel> {
        EndpointsClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// Waits for the answer to one call.
    pub(crate) async fn answer<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> anyhow::Result<T> {
        self.wait(call).await.map_err(|status| self.explain(&status))
    }

    /// The same, with the server's own word for what failed.
    pub(crate) async fn wait<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        let waiting = format!("waiting for {}", self.server);
        progress::shown(&waiting, call).await.map(Response::into_inner)
    }

    /// What the server said, and what to do about it.
    pub(crate) fn explain(&self, status: &Status) -> anyhow::Error {
        explain(&self.server, status)
    }
}

/// A connection with new credentials, when the present ones end soon or are of a CA that goes out of use. Those that cannot be replaced go on being used.
async fn keep_fresh(path: &Path, credentials: &Credentials, has_moved: bool, channel: Channel) -> Channel {
    let now = SystemTime::now();
    // Those that have ended are for the server to refuse, in its words.
    let has_ended = credentials.ends().is_none_or(|ends| ends <= now);
    if has_ended || !(has_moved || credentials.is_due(now)) {
        return channel;
    }
    let renewing = connect::renew_kept(path, credentials, channel.clone());
    match progress::shown("renewing the credentials", timeout(RENEW_MAX, renewing)).await {
        Ok(Ok((_, fresh))) => fresh,
        Ok(Err(error)) => {
            let error = anyhow::Error::from(error);
            let why = if has_moved { "are of a CA that goes out of use" } else { "end soon" };
            print::note(format!("the credentials {why} and cannot be renewed: {error:#}"));
            // What is in the file may be new.
            match Credentials::load(path) {
                Ok(kept) => connect::mutual_tls(&kept).await.unwrap_or(channel),
                Err(_) => channel,
            }
        }
        Err(_) => channel,
    }
}

/// A request that is given up after a while.
pub(crate) fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

fn explain(server: &str, status: &Status) -> anyhow::Error {
    let message = match status.message() {
        "" => format!("the server at {server} answered {:?}", status.code()),
        message => message.to_owned(),
    };
    let hint = match status.code() {
        Code::Unauthenticated | Code::PermissionDenied => {
            let role = role_needed(&message);
            let hint = format!(
                "use the socket as root on the server's machine, or log in: there, `netctl token --for {role} --name NAME` \
                 makes a token, and here `netctl login TOKEN` takes it"
            );
            return Hinted { message, hint }.into();
        }
        // What the transport says has a source, what the server answered has none.
        Code::Unavailable | Code::Cancelled | Code::Unknown | Code::DeadlineExceeded
            if status.source().is_some() =>
        {
            let message = format!("lost the server at {server}: {message}");
            return Hinted { message, hint: "see the log of `netctl server`, then try again".into() }.into();
        }
        Code::Unimplemented => "the server is of another version: see `netctl --version` on its machine",
        _ => return anyhow::Error::msg(message),
    };
    Hinted { message, hint: hint.into() }.into()
}

/// The least role of a person that the server's refusal names.
fn role_needed(refusal: &str) -> &'static str {
    let named = refusal.split_once("needs the role ").map_or("", |(_, named)| named);
    let is_named = |role: &&&str| named.starts_with(**role);
    ["viewer", "operator", "admin"].iter().find(is_named).copied().unwrap_or("operator")
}

fn unreachable(error: ConnectError) -> anyhow::Error {
    let hint = match &error {
        ConnectError::Socket { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            "the socket is root's: run this as root, or log in with `netctl login TOKEN`"
        }
        ConnectError::Socket { .. } => {
            "start a server with `netctl server`, name its socket with --socket, or log in to one elsewhere \
             with `netctl login TOKEN`"
        }
        ConnectError::Tcp { .. } | ConnectError::Timeout { .. } | ConnectError::All(_) => {
            "is `netctl server` running there, and its port open to this machine?"
        }
        _ => return error.into(),
    };
    let message = format!("{:#}", anyhow::Error::from(error));
    Hinted { message, hint: hint.into() }.into()
}

fn unusable(error: CredentialsError) -> anyhow::Error {
    let hint =
        "`netctl login TOKEN` writes credentials; `netctl token --for operator --name NAME` on the server's \
                machine makes a token"
            .to_owned();
    Hinted { message: format!("{:#}", anyhow::Error::from(error)), hint }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(args: &ServerArgs, variables: &[(&str, &str)], file: &str) -> Target {
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| PathBuf::from(value))
        };
        Target::choose(args, variable, |path| path == Path::new(file))
    }

    fn socket(path: &str) -> Target {
        Target::Socket(path.into())
    }

    fn credentials(path: &str) -> Target {
        Target::Credentials(path.into())
    }

    #[test]
    fn options_count_more_than_variables() {
        let variables = [("HEXTET_SOCKET", "/env.sock"), ("HEXTET_CREDENTIALS", "/env.json")];
        let args = ServerArgs { socket: Some("/arg.sock".into()), credentials: None };
        assert_eq!(choose(&args, &variables, "/env.json"), socket("/arg.sock"));
        let args = ServerArgs { socket: None, credentials: Some("/arg.json".into()) };
        assert_eq!(choose(&args, &variables, "/env.json"), credentials("/arg.json"));
        assert_eq!(choose(&ServerArgs::default(), &variables, "/env.json"), socket("/env.sock"));
        assert_eq!(choose(&ServerArgs::default(), &variables[1..], "/env.json"), credentials("/env.json"));
    }

    #[test]
    fn credentials_count_when_they_exist() {
        let home = [("HOME", "/root")];
        let args = ServerArgs::default();
        let file = "/root/.config/hextet/credentials.json";
        assert_eq!(choose(&args, &home, file), credentials(file));
        assert_eq!(choose(&args, &home, "/other"), socket(DEFAULT_SOCKET));
        assert_eq!(choose(&args, &[], file), socket(DEFAULT_SOCKET));
    }

    #[test]
    fn refusals_keep_their_words_and_say_how_to_log_in() {
        let error = explain("/x.sock", &Status::permission_denied("not for you"));
        let hinted = error.downcast_ref::<Hinted>().expect("it has a hint");
        assert_eq!(hinted.message, "not for you");
        assert!(hinted.hint.contains("netctl login TOKEN"));
        for role in ["viewer", "operator", "admin"] {
            let refusal = format!("this needs the role {role}; hextet:node/n1 has the role node");
            let error = explain("/x.sock", &Status::permission_denied(refusal));
            let hint = &error.downcast_ref::<Hinted>().expect("it has a hint").hint;
            assert!(hint.contains(&format!("`netctl token --for {role} --name NAME`")), "{hint}");
        }
        assert_eq!(explain("/x.sock", &Status::not_found("no job `a`")).to_string(), "no job `a`");
    }
}
