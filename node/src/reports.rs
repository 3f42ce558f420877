//! What the server still has to be told of this node's pods: the last word per pod, never a queue of words.

use std::collections::{BTreeMap, BTreeSet};

use hextet_api::v1::{
    AddressConflict, NodeLeaving, NodeReport, PodPhase, PodReport, PodReports, node_report,
};
use tokio::sync::mpsc::{OwnedPermit, Sender};
use tonic::transport::Channel;

use crate::{
    attach::report,
    pod_state::{Phase, Report},
};

/// Pods in one message.
const PODS_PER_MESSAGE: usize = 500;

/// The present stream, and what is new since it was told last.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    stream: Option<(Sender<NodeReport>, Channel)>,
    sent: BTreeMap<String, Report>,
    news: BTreeMap<String, Report>,
    gone: BTreeSet<String>,
    conflicts: BTreeMap<String, AddressConflict>,
}

impl Reports {
    /// A new stream knows nothing: `all` is news.
    pub(crate) fn attached(
        &mut self,
        stream: Sender<NodeReport>,
        channel: Channel,
        all: BTreeMap<String, Report>,
    ) {
        *self = Reports { stream: Some((stream, channel)), news: all, ..Reports::default() };
    }

    pub(crate) fn detached(&mut self) {
        *self = Reports::default();
    }

    pub(crate) fn channel(&self) -> Option<Channel> {
        self.stream.as_ref().map(|(_, channel)| channel.clone())
    }

    /// The last word to the server: the node is taken down. False when there is no stream.
    pub(crate) async fn leave(&self) -> bool {
        let Some((stream, _)) = &self.stream else { return false };
        stream.send(report(node_report::Report::Leaving(NodeLeaving {}))).await.is_ok()
    }

    /// The state of `pod`; said only when it is another than the one that was said last.
    pub(crate) fn pod(&mut self, pod: &str, now: Option<Report>) {
        let Some(now) = now.filter(|_| self.stream.is_some()) else { return };
        if self.sent.get(pod) == Some(&now) {
            self.news.remove(pod);
        } else {
            self.news.insert(pod.to_owned(), now);
        }
    }

    /// Nothing is left of `pod`. The server asks again on each new stream until it has heard it.
    pub(crate) fn gone(&mut self, pod: &str) {
        self.sent.remove(pod);
        self.news.remove(pod);
        self.conflicts.remove(pod);
        if self.stream.is_some() {
            self.gone.insert(pod.to_owned());
        }
    }

    /// Another machine has the address of `pod`. The answer is another address.
    pub(crate) fn conflict(&mut self, pod: &str, conflict: AddressConflict) {
        if self.stream.is_some() {
            self.conflicts.insert(pod.to_owned(), conflict);
        }
    }

    /// Room in the stream, once there is any, if there is something to say; else waits for ever.
    pub(crate) fn room(&self) -> impl Future<Output = OwnedPermit<NodeReport>> + use<> {
        let waits = !(self.news.is_empty() && self.gone.is_empty() && self.conflicts.is_empty());
        let stream = self.stream.as_ref().filter(|_| waits).map(|(stream, _)| stream.clone());
        async move {
            if let Some(stream) = stream
                && let Ok(permit) = stream.reserve_owned().await
            {
                return permit;
            }
            // The end of a stream is told as an event.
            std::future::pending().await
        }
    }

    /// The next message, whose pods then count as told.
    pub(crate) fn take(&mut self) -> NodeReport {
        if let Some((_, conflict)) = self.conflicts.pop_first() {
            return report(node_report::Report::Conflict(conflict));
        }
        let gone = take_some(&mut self.gone, PODS_PER_MESSAGE, |set| set.pop_first());
        let news = take_some(&mut self.news, PODS_PER_MESSAGE - gone.len(), |map| map.pop_first());
        let gone = gone.into_iter().map(|id| PodReport { id, gone: true, ..PodReport::default() });
        let mut pods: Vec<PodReport> = gone.collect();
        for (id, now) in news {
            pods.push(message(&id, &now));
            self.sent.insert(id, now);
        }
        report(node_report::Report::Pods(PodReports { pods }))
    }
}

fn take_some<From, Item>(
    from: &mut From,
    count: usize,
    mut pop: impl FnMut(&mut From) -> Option<Item>,
) -> Vec<Item> {
    std::iter::from_fn(|| pop(from)).take(count).collect()
}

fn message(id: &str, report: &Report) -> PodReport {
    let phase = match report.phase {
        Phase::Starting => PodPhase::Starting,
        Phase::Running => PodPhase::Running,
        Phase::Failed => PodPhase::Failed,
    };
    PodReport {
        id: id.to_owned(),
        phase: phase.into(),
        message: report.message.clone(),
        restarts: report.restarts,
        gone: false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::mpsc::{Receiver, channel};
    use tonic::transport::Endpoint;

    use super::*;

    fn state(phase: Phase) -> Report {
        Report { phase, message: String::new(), restarts: 0 }
    }

    fn attached(all: BTreeMap<String, Report>) -> (Reports, Receiver<NodeReport>) {
        let (sender, receiver) = channel(1);
        let mut reports = Reports::default();
        reports.attached(sender, Endpoint::from_static("http://x").connect_lazy(), all);
        (reports, receiver)
    }

    fn ids(report: NodeReport) -> Vec<(String, bool)> {
        let Some(node_report::Report::Pods(reports)) = report.report else { panic!("not of pods") };
        reports.pods.into_iter().map(|pod| (pod.id, pod.gone)).collect()
    }

    async fn has_news(reports: &Reports) -> bool {
        tokio::time::timeout(Duration::from_millis(20), reports.room()).await.is_ok()
    }

    #[tokio::test]
    async fn a_new_stream_is_told_everything_once() {
        let (mut reports, _stream) = attached(BTreeMap::from([("a".into(), state(Phase::Running))]));
        assert!(has_news(&reports).await);
        assert_eq!(ids(reports.take()), [("a".into(), false)]);
        reports.pod("a", Some(state(Phase::Running)));
        assert!(!has_news(&reports).await);
    }

    #[tokio::test]
    async fn only_the_last_word_is_said() {
        let (mut reports, _stream) = attached(BTreeMap::new());
        reports.pod("a", Some(state(Phase::Starting)));
        reports.pod("a", Some(state(Phase::Failed)));
        assert_eq!(ids(reports.take()).len(), 1);
        reports.pod("a", Some(state(Phase::Running)));
        reports.pod("a", Some(state(Phase::Failed)));
        assert!(!has_news(&reports).await, "it was failed before and is failed now");
    }

    #[tokio::test]
    async fn a_pod_that_is_gone_is_said_to_be_gone_and_nothing_else() {
        let (mut reports, _stream) = attached(BTreeMap::new());
        reports.pod("a", Some(state(Phase::Running)));
        reports.gone("a");
        assert_eq!(ids(reports.take()), [("a".into(), true)]);
    }

    #[tokio::test]
    async fn without_a_stream_nothing_is_kept() {
        let mut reports = Reports::default();
        reports.pod("a", Some(state(Phase::Running)));
        reports.gone("b");
        reports.conflict("a", AddressConflict::default());
        assert!(!has_news(&reports).await);
        assert!(reports.news.is_empty() && reports.gone.is_empty() && reports.conflicts.is_empty());
    }

    #[tokio::test]
    async fn a_conflict_is_said_once_to_a_stream() {
        let (mut reports, _stream) = attached(BTreeMap::new());
        let conflict = AddressConflict { pod: "a".into(), ..AddressConflict::default() };
        reports.conflict("a", conflict.clone());
        assert!(has_news(&reports).await);
        assert_eq!(reports.take().report, Some(node_report::Report::Conflict(conflict)));
        assert!(!has_news(&reports).await);
    }

    #[tokio::test]
    async fn a_message_is_bounded() {
        let many = (0..PODS_PER_MESSAGE + 7).map(|n| (format!("p{n}"), state(Phase::Running))).collect();
        let (mut reports, _stream) = attached(many);
        reports.gone("x");
        assert_eq!(ids(reports.take()).len(), PODS_PER_MESSAGE);
        assert_eq!(ids(reports.take()).len(), 8);
    }
}
