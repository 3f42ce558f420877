//! Questions to nodes about their pods: asked over the command stream, answered by a call of the node's own.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hextet_api::v1::{self, node_command::Command};
use tokio::{sync::oneshot, time};
use tonic::Status;

use crate::session::Sessions;

/// Questions that wait for their answer at a time.
const WAITING_MAX: usize = 1_000;
/// How long a node may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// Steps of one answer.
const STEPS_MAX: usize = 256;

/// Questions that wait for their node's answer.
#[derive(Default)]
pub(crate) struct Questions(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    last: u64,
    askers: BTreeMap<u64, (String, oneshot::Sender<v1::SendDescriptionRequest>)>,
}

impl Questions {
    /// Asks `node` how far its pod is; with `retry` after it has tried again what has failed.
    ///
    /// # Errors
    /// In words, when it is not attached or does not answer in time.
    pub(crate) async fn ask(
        &self,
        sessions: &Sessions,
        node: &str,
        pod: &str,
        retry: bool,
    ) -> Result<v1::SendDescriptionRequest, String> {
        let (request_id, answer) = self.begin(node)?;
        let command = v1::DescribePod { request_id, pod: pod.to_owned(), retry };
        let result = if sessions.send(node, Command::DescribePod(command)) {
            let answered = time::timeout(ANSWER_MAX, answer).await;
            answered.map_err(|_| format!("node {node} does not answer within {} s", ANSWER_MAX.as_secs()))
        } else {
            Err(format!("node {node} is not attached: its part is known again when its agent is back"))
        };
        self.lock().askers.remove(&request_id);
        match result?.map_err(|_| format!("node {node} does not answer"))? {
            mut answer if answer.error.is_empty() => {
                answer.steps.truncate(STEPS_MAX);
                answer.retried.truncate(STEPS_MAX);
                Ok(answer)
            }
            answer => Err(format!("node {node}: {}", answer.error)),
        }
    }

    /// `node` answers. Another node's questions are none of its business.
    pub(crate) fn answer(&self, node: &str, answer: v1::SendDescriptionRequest) -> Result<(), Status> {
        let mut waiting = self.lock();
        match waiting.askers.get(&answer.request_id) {
            Some((asked, _)) if asked == node => {
                if let Some((_, asker)) = waiting.askers.remove(&answer.request_id) {
                    // Who asked may have gone.
                    let _ = asker.send(answer);
                }
                Ok(())
            }
            Some((asked, _)) => Err(Status::permission_denied(format!("{asked} was asked and not {node}"))),
            None => Err(Status::not_found("nobody waits for this answer any more")),
        }
    }

    fn begin(&self, node: &str) -> Result<(u64, oneshot::Receiver<v1::SendDescriptionRequest>), String> {
        let mut waiting = self.lock();
        if waiting.askers.len() >= WAITING_MAX {
            return Err("too many questions wait for their nodes: try again".to_owned());
        }
        let (asker, answer) = oneshot::channel();
        waiting.last += 1;
        let number = waiting.last;
        waiting.askers.insert(number, (node.to_owned(), asker));
        Ok((number, answer))
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_question_is_answered_by_its_node_alone() {
        let questions = Questions::default();
        let (request_id, answer) = questions.begin("n1").unwrap();
        let message = || v1::SendDescriptionRequest { request_id, ..v1::SendDescriptionRequest::default() };
        let refused = questions.answer("n2", message()).unwrap_err();
        assert_eq!(refused.message(), "n1 was asked and not n2");
        questions.answer("n1", message()).unwrap();
        assert_eq!(answer.await.unwrap().request_id, request_id);
        assert_eq!(questions.answer("n1", message()).unwrap_err().code(), tonic::Code::NotFound);
    }

    #[tokio::test]
    async fn a_node_that_is_not_there_is_named() {
        let error = Questions::default().ask(&Sessions::default(), "n1", "p", false).await.unwrap_err();
        assert!(error.starts_with("node n1 is not attached"), "{error}");
    }

    #[test]
    fn questions_that_wait_have_a_bound() {
        let questions = Questions::default();
        let waiting: Vec<_> = (0..WAITING_MAX).map(|_| questions.begin("n1").unwrap()).collect();
        assert!(questions.begin("n1").unwrap_err().contains("try again"));
        drop(waiting);
    }
}
