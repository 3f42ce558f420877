//! Answers the server's wish to read a log: finds it, and sends it over a call of its own.

use std::{path::PathBuf, sync::Arc};

use hextet_api::v1::{ReadLogs, SendLogsRequest, agent_client::AgentClient};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::transport::Channel;
use tracing::debug;

use crate::{
    assignment::{Assignment, PodRecord},
    config::NodePaths,
    logs::{self, Chunk, Position, Selection},
    supervisor::spec::log_path,
};

/// Logs that are read at a time.
const READERS_MAX: usize = 16;
/// Chunks that wait for the network.
const CHUNKS_MAX: usize = 4;

/// Sends logs; each in a task of its own.
#[derive(Debug)]
pub(crate) struct LogSender {
    room: Arc<Semaphore>,
}

impl LogSender {
    pub(crate) fn new() -> LogSender {
        LogSender { room: Arc::new(Semaphore::new(READERS_MAX)) }
    }

    /// Begins to answer `request`; returns at once.
    pub(crate) fn start(
        &self,
        channel: Channel,
        paths: &NodePaths,
        assignment: &Assignment,
        request: ReadLogs,
    ) {
        let permit = self.room.clone().try_acquire_owned();
        let found = match &permit {
            Ok(_) => find(paths, assignment, &request),
            Err(_) => Err(format!("the node sends {READERS_MAX} logs already: try again later")),
        };
        tokio::spawn(async move {
            send(channel, request, found).await;
            drop(permit);
        });
    }
}

fn find(paths: &NodePaths, assignment: &Assignment, request: &ReadLogs) -> Result<PathBuf, String> {
    let pod = assignment.pods.get(&request.pod);
    let pod = pod.ok_or_else(|| format!("pod {} is not on this node", request.pod))?;
    let task = task(pod, &request.task)?;
    Ok(log_path(&paths.pod_state_dir(&request.pod), task))
}

fn task<'a>(pod: &'a PodRecord, wanted: &str) -> Result<&'a str, String> {
    let names: Vec<&str> = pod.tasks.iter().map(|task| task.name.as_str()).collect();
    match names.as_slice() {
        [only] if wanted.is_empty() => Ok(only),
        names => names.iter().find(|name| **name == wanted).copied().ok_or_else(|| {
            let problem = if wanted.is_empty() {
                "name a task".to_owned()
            } else {
                format!("there is no task {wanted}")
            };
            format!("{problem}; the pod has {}", names.join(", "))
        }),
    }
}

async fn send(channel: Channel, request: ReadLogs, found: Result<PathBuf, String>) {
    let id = request.request_id;
    let (chunks, receiver) = mpsc::channel(CHUNKS_MAX);
    // The first message names the request, also when the log is empty and followed; with a place where to go on from in that
    // case. Whoever goes on has one.
    let place = if request.after.is_empty() { Position::default().to_string() } else { String::new() };
    let first = SendLogsRequest { request_id: id, position: place, ..SendLogsRequest::default() };
    let first = tokio_stream::once(first);
    let messages = first.chain(ReceiverStream::new(receiver).map(move |chunk| message(id, chunk)));
    let reader = tokio::spawn(read(request, found, chunks));
    if let Err(status) = AgentClient::new(channel).send_logs(messages).await {
        debug!(request = id, error = status.message(), "a log was not sent to its end");
    }
    // Its channel is closed by now; a reader that waits for a change ends with it.
    let _ = reader.await;
}

async fn read(request: ReadLogs, found: Result<PathBuf, String>, chunks: mpsc::Sender<Chunk>) {
    let result = match found {
        Ok(log) => select(log, &request).map(|selection| logs::read(selection, &chunks)),
        Err(why) => Err(why),
    };
    let result = match result {
        Ok(reading) => reading.await.map_err(|error| format!("{:#}", anyhow::Error::from(error))),
        Err(why) => Err(why),
    };
    if let Err(why) = result {
        // Nobody may be reading any more.
        let _ = chunks.send(Err(why)).await;
    }
}

fn select(log: PathBuf, request: &ReadLogs) -> Result<Selection, String> {
    let after = Some(&request.after).filter(|after| !after.is_empty());
    let after = after.map(|after| after.parse()).transpose()?;
    Ok(Selection { log, tail_lines: request.tail_lines, follow: request.follow, after })
}

fn message(request_id: u64, chunk: Chunk) -> SendLogsRequest {
    let (data, position, error) = match chunk {
        Ok((data, position)) => (data, position.to_string(), String::new()),
        Err(why) => (Vec::new(), String::new(), why),
    };
    SendLogsRequest { request_id, data, error, position }
}

#[cfg(test)]
mod tests {
    use hextet_api::v1;

    use super::*;
    use crate::{
        assignment::{merge, tests::pod},
        identity::tests::identity,
    };

    fn find_in(tasks: &[&str], pod_id: &str, task: &str) -> Result<String, String> {
        let mut one = pod("a", 1);
        let named =
            |name: &&str| v1::Task { name: (*name).into(), exec: vec!["/x".into()], ..v1::Task::default() };
        one.tasks = tasks.iter().map(named).collect();
        let message = v1::Assignment { full: true, pods: vec![one], ..v1::Assignment::default() };
        let assignment = merge(&identity(), &Assignment::default(), message).next;
        let paths = NodePaths { state_dir: "/s".into(), run_dir: "/r".into(), bpf_dir: "/b".into() };
        let request = ReadLogs { pod: pod_id.into(), task: task.into(), ..ReadLogs::default() };
        find(&paths, &assignment, &request).map(|path| path.display().to_string())
    }

    #[test]
    fn the_only_task_needs_no_name() {
        assert_eq!(find_in(&["web"], "a", ""), Ok("/s/pods/a/web.log".into()));
        assert_eq!(find_in(&["web", "db"], "a", "db"), Ok("/s/pods/a/db.log".into()));
    }

    #[test]
    fn what_is_not_there_is_named() {
        assert_eq!(find_in(&["web", "db"], "a", ""), Err("name a task; the pod has web, db".into()));
        assert_eq!(find_in(&["web"], "a", "../x"), Err("there is no task ../x; the pod has web".into()));
        assert_eq!(find_in(&["web"], "b", ""), Err("pod b is not on this node".into()));
    }
}
