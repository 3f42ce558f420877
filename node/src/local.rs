//! The agent's Unix socket for root on the same machine: `netctl node plan`, `show`, `events` and `down`.
//!
//! One request and one answer per connection, each one line of JSON.

use std::{io, path::Path, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};
use tracing::debug;

use crate::{events::NodeEvent, socket, view::NodeView};

/// The socket's file name in the run folder.
pub(crate) const SOCKET_FILE: &str = "agent.sock";
const REQUEST_BYTES_MAX: u64 = 1024;
/// The longest answer: a plan of 10,000 pods.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;
const CONNECTIONS_MAX: usize = 8;
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Request {
    Plan,
    Show,
    Events,
    Down,
}

/// What is answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Answer {
    Lines(Vec<String>),
    View(Box<NodeView>),
    Events(Vec<NodeEvent>),
    Error(String),
}

/// A request with the place for its answer.
pub(crate) type Call = (Request, oneshot::Sender<Answer>);

/// Listens in `run_dir`; the caller holds the node's lock.
pub(crate) fn listen(run_dir: &Path) -> io::Result<UnixListener> {
    let listener = socket::listen(run_dir, SOCKET_FILE)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Passes requests on to the agent, for ever.
pub(crate) async fn serve(listener: UnixListener, calls: mpsc::Sender<Call>) {
    let room = std::sync::Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Ok(permit) = room.clone().acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!(%error, "cannot accept on the agent's socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let calls = calls.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(stream, &calls).await {
                debug!(%error, "a request on the agent's socket failed");
            }
            drop(permit);
        });
    }
}

async fn answer(stream: UnixStream, calls: &mpsc::Sender<Call>) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    timeout(REQUEST_DEADLINE, BufReader::new(reader.take(REQUEST_BYTES_MAX)).read_line(&mut line)).await??;
    let (sender, receiver) = oneshot::channel();
    let answer = match serde_json::from_str(&line) {
        Err(error) => Answer::Error(format!("not a request: {error}")),
        Ok(request) => match calls.send((request, sender)).await {
            Ok(()) => receiver.await.unwrap_or_else(|_| Answer::Error("the agent ends".to_owned())),
            Err(_) => Answer::Error("the agent ends".to_owned()),
        },
    };
    let mut text = serde_json::to_vec(&answer).map_err(io::Error::other)?;
    text.push(b'\n');
    writer.write_all(&text).await
}

const NO_ANSWER: &str = "it does not answer. If it is stopped (`ps -o pid,stat` shows T), continue it with `kill -CONT PID`; or \
                         end it with `kill -9 PID` and ask again: pods and traffic go on without it";

/// Asks the agent that listens in `run_dir`; none when there is none.
pub(crate) async fn ask(run_dir: &Path, request: Request) -> io::Result<Option<Answer>> {
    ask_within(run_dir, request, answer_max(request)).await
}

async fn ask_within(run_dir: &Path, request: Request, max: Duration) -> io::Result<Option<Answer>> {
    let stream = match socket::connect(run_dir, SOCKET_FILE) {
        Ok(stream) => stream,
        Err(error) if is_nobody(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    stream.set_nonblocking(true)?;
    let (reader, mut writer) = UnixStream::from_std(stream)?.into_split();
    let mut line = serde_json::to_vec(&request).map_err(io::Error::other)?;
    line.push(b'\n');
    let mut text = String::new();
    let answered = async {
        writer.write_all(&line).await?;
        BufReader::new(reader.take(ANSWER_BYTES_MAX)).read_line(&mut text).await
    };
    let Ok(answered) = timeout(max, answered).await else {
        return Err(io::Error::new(io::ErrorKind::TimedOut, NO_ANSWER));
    };
    match answered {
        // The socket of an agent that was killed takes connections until the last process that it had just made, and
        // that has it still, is another program.
        Err(error) if is_gone(&error) => return Ok(None),
        answered => answered?,
    };
    if text.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the agent ended before it answered"));
    }
    serde_json::from_str(&text).map(Some).map_err(io::Error::other)
}

/// How long an agent may take: to take a node down it ends every pod.
fn answer_max(request: Request) -> Duration {
    match request {
        Request::Down => Duration::from_secs(300),
        Request::Plan | Request::Show | Request::Events => Duration::from_secs(15),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `netctl node show` waited for ever for an agent that somebody had stopped with SIGSTOP.
    #[tokio::test]
    async fn an_agent_that_is_stopped_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(dir.path().join(SOCKET_FILE)).unwrap();
        let error = ask_within(dir.path(), Request::Show, Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("kill -CONT"), "{error}");
    }

    /// `netctl node down` just after the agent was killed failed with the kernel's "connection reset".
    #[tokio::test]
    async fn an_agent_that_ends_with_the_question_in_its_socket_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let listener = std::os::unix::net::UnixListener::bind(dir.path().join(SOCKET_FILE)).unwrap();
        let folder = dir.path().to_owned();
        let asked = tokio::spawn(async move { ask(&folder, Request::Show).await });
        listener.set_nonblocking(true).unwrap();
        let listener = UnixListener::from_std(listener).unwrap();
        let (asking, _) = listener.accept().await.unwrap();
        drop((asking, listener));
        assert!(asked.await.unwrap().unwrap().is_none());
    }
}
