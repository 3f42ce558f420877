//! Carries what a task wrote from its node to whoever asked, and keeps none of it.
//!
//! A reader asks the server, the server asks the node over its command stream, and the node opens a stream
//! of its own for the answer. Each stage holds a bounded number of chunks; a slow reader slows its node's
//! reading and nothing else.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use hextet_api::v1::{LogChunk, SendLogsRequest};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::hub::Hub;

/// Requests that wait for their node's answer at a time.
const WAITING_MAX: usize = 1000;
/// Chunks between a node and a reader.
const CHUNKS_MAX: usize = 8;
/// Bytes in a chunk.
const CHUNK_LEN_MAX: usize = 64 * 1024;
/// Bytes of what a node calls a place in a log.
const POSITION_LEN_MAX: usize = 128;
/// How long a node may take to begin its answer.
pub(crate) const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Where a node's answer goes.
pub(crate) type Reader = mpsc::Sender<Result<LogChunk, Status>>;

/// Requests that wait for their node's answer.
#[derive(Default)]
pub(crate) struct Relays(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    last: u64,
    readers: BTreeMap<u64, (String, Reader)>,
}

impl Relays {
    /// A new request to `node`: its number, and where its answer comes out.
    pub(crate) fn ask(&self, node: &str) -> Result<(u64, mpsc::Receiver<Result<LogChunk, Status>>), Status> {
        let mut waiting = self.lock();
        if waiting.readers.len() >= WAITING_MAX {
            return Err(Status::resource_exhausted(
                "too many requests for logs wait for their nodes: try again",
            ));
        }
        let (reader, chunks) = mpsc::channel(CHUNKS_MAX);
        waiting.last += 1;
        let number = waiting.last;
        waiting.readers.insert(number, (node.to_owned(), reader));
        Ok((number, chunks))
    }

    /// `node` begins its answer to a request. Another node's requests are none of its business.
    pub(crate) fn answer(&self, number: u64, node: &str) -> Option<Reader> {
        let mut waiting = self.lock();
        let asked = waiting.readers.get(&number).is_some_and(|(asked, _)| asked == node);
        if asked { waiting.readers.remove(&number).map(|(_, reader)| reader) } else { None }
    }

    /// Gives up a request that the node has not begun to answer.
    pub(crate) fn give_up(&self, number: u64) -> Option<Reader> {
        self.lock().readers.remove(&number).map(|(_, reader)| reader)
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the reader when its node does not begin to answer.
pub(crate) async fn watch_over(hub: Weak<Hub>, number: u64, node: String) {
    tokio::time::sleep(ANSWER_MAX).await;
    if let Some(reader) = hub.upgrade().and_then(|hub| hub.relays.give_up(number)) {
        let _ = reader.try_send(Err(Status::deadline_exceeded(format!("node {node} does not answer"))));
    }
}

/// Carries a node's answer to its reader until either ends.
pub(crate) async fn carry(
    reader: Reader,
    first: SendLogsRequest,
    mut rest: Streaming<SendLogsRequest>,
) -> Result<(), Status> {
    let mut next = Some(first);
    loop {
        let Some(chunk) = next else { return Ok(()) };
        pass_on(&reader, chunk).await?;
        next = tokio::select! {
            message = rest.message() => match message {
                Ok(message) => message,
                Err(status) => {
                    let _ = reader.send(Err(Status::unavailable("the node's connection was cut"))).await;
                    return Err(status);
                }
            },
            () = reader.closed() => return Err(gone()),
        };
    }
}

async fn pass_on(reader: &Reader, chunk: SendLogsRequest) -> Result<(), Status> {
    if !chunk.error.is_empty() {
        let _ = reader.send(Err(Status::failed_precondition(chunk.error))).await;
        return Ok(());
    }
    if chunk.data.len() > CHUNK_LEN_MAX {
        return Err(Status::invalid_argument("a chunk has at most 64 KiB"));
    }
    let SendLogsRequest { data, position, .. } = chunk;
    if position.len() > POSITION_LEN_MAX {
        return Err(Status::invalid_argument("a position has at most 128 bytes"));
    }
    if data.is_empty() && position.is_empty() {
        return Ok(());
    }
    reader.send(Ok(LogChunk { data, position })).await.map_err(|_| gone())
}

fn gone() -> Status {
    Status::cancelled("the reader has gone")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_is_answered_once_and_by_its_node_alone() {
        let relays = Relays::default();
        let (number, mut chunks) = relays.ask("n1").unwrap();
        assert!(relays.answer(number, "n2").is_none());
        let reader = relays.answer(number, "n1").unwrap();
        assert!(relays.answer(number, "n1").is_none());
        assert!(relays.give_up(number).is_none(), "it is being answered");
        let chunk = |data: &str| SendLogsRequest { data: data.into(), ..SendLogsRequest::default() };
        pass_on(&reader, chunk("text")).await.unwrap();
        assert_eq!(chunks.recv().await.unwrap().unwrap().data, b"text");
        let long = pass_on(&reader, chunk(&"x".repeat(CHUNK_LEN_MAX + 1))).await.unwrap_err();
        assert_eq!(long.code(), tonic::Code::InvalidArgument);
        let error = SendLogsRequest { error: "no such task".into(), ..SendLogsRequest::default() };
        pass_on(&reader, error).await.unwrap();
        assert_eq!(chunks.recv().await.unwrap().unwrap_err().message(), "no such task");
        drop(chunks);
        assert_eq!(pass_on(&reader, chunk("more")).await.unwrap_err().code(), tonic::Code::Cancelled);
    }

    #[test]
    fn requests_that_wait_have_a_bound() {
        let relays = Relays::default();
        let waiting: Vec<_> = (0..WAITING_MAX).map(|_| relays.ask("n1").unwrap()).collect();
        assert_eq!(relays.ask("n1").unwrap_err().code(), tonic::Code::ResourceExhausted);
        relays.give_up(waiting[0].0);
        relays.ask("n1").unwrap();
    }
}
