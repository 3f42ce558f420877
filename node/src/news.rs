//! What the server still has to be told of this node's pods: the last word per pod, never a queue of words. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use hextet_api::v1::{
    AddressConflict, NodeReport, PodEnding, PodEvent, PodEvents, PodPhase, PodReport, PodReports, node_report,
};
use hextet_lifecycle::Ending;

use crate::pod_state::{Phase, Report};

/// Pods in one message.
const PODS_PER_MESSAGE: usize = 500;
/// Events that wait for a server.
const EVENTS_MAX: usize = 1_000;

/// How a pod is, and of which version of its job that is said.
pub(crate) type Told = (Report, u32);

/// What is new since the present stream was told last. Without a stream nothing is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct News {
    attached: bool,
    sent: BTreeMap<String, Told>,
    news: BTreeMap<String, Told>,
    gone: BTreeSet<String>,
    conflicts: BTreeMap<String, AddressConflict>,
    /// The newest, also without a stream.
    events: VecDeque<PodEvent>,
    events_lost: u64,
}

impl News {
    /// A new stream knows nothing: `all` is news.
    pub(crate) fn attached(&mut self, all: BTreeMap<String, Told>) {
        *self = News { attached: true, news: all, ..self.without_stream() };
    }

    pub(crate) fn detached(&mut self) {
        *self = self.without_stream();
    }

    fn without_stream(&mut self) -> News {
        let events = std::mem::take(&mut self.events);
        News { events, events_lost: self.events_lost, ..News::default() }
    }

    /// Something happened to a pod. It is said once; of what nobody hears, the newest are kept.
    pub(crate) fn event(&mut self, event: PodEvent) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
            self.events_lost += 1;
        }
        self.events.push_back(event);
    }

    /// The state of `pod`; said only when it is another than the one that was said last.
    pub(crate) fn pod(&mut self, pod: &str, now: Option<Told>) {
        let Some(now) = now.filter(|_| self.attached) else { return };
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
        if self.attached {
            self.gone.insert(pod.to_owned());
        }
    }

    /// Another machine has the address of `pod`. The answer is another address.
    pub(crate) fn conflict(&mut self, pod: &str, conflict: AddressConflict) {
        if self.attached {
            self.conflicts.insert(pod.to_owned(), conflict);
        }
    }

    /// Whether there is nothing to say.
    pub(crate) fn is_empty(&self) -> bool {
        let nothing_to_tell = self.news.is_empty() && self.gone.is_empty() && self.conflicts.is_empty();
        nothing_to_tell && (self.events.is_empty() || !self.attached)
    }

    /// The next message, whose pods then count as told.
    pub(crate) fn take(&mut self) -> NodeReport {
        if let Some((_, conflict)) = self.conflicts.pop_first() {
            return NodeReport { report: Some(node_report::Report::Conflict(conflict)) };
        }
        if self.news.is_empty() && self.gone.is_empty() {
            let events = self.events.drain(..).collect();
            let lost = std::mem::take(&mut self.events_lost);
            return NodeReport { report: Some(node_report::Report::Events(PodEvents { events, lost })) };
        }
        let gone = take_some(&mut self.gone, PODS_PER_MESSAGE, |set| set.pop_first());
        let news = take_some(&mut self.news, PODS_PER_MESSAGE - gone.len(), |map| map.pop_first());
        let gone = gone.into_iter().map(|id| PodReport { id, gone: true, ..PodReport::default() });
        let mut pods: Vec<PodReport> = gone.collect();
        for (id, now) in news {
            pods.push(message(&id, &now, self.sent.get(&id)));
            self.sent.insert(id, now);
        }
        NodeReport { report: Some(node_report::Report::Pods(PodReports { pods })) }
    }
}

fn take_some<From, Item>(
    from: &mut From,
    count: usize,
    mut pop: impl FnMut(&mut From) -> Option<Item>,
) -> Vec<Item> {
    std::iter::from_fn(|| pop(from)).take(count).collect()
}

/// The words on a pod. How it ended last is said when that is news beside the words before: not each time that it ends so
/// again.
fn message(id: &str, (report, job_version): &Told, before: Option<&Told>) -> PodReport {
    let before = before.and_then(|(before, of)| Some((before.ending.as_ref()?, of)));
    let is_same = |ending: &Arc<Ending>, (before, of): (&Arc<Ending>, &u32)| {
        Arc::ptr_eq(ending, before) || of == job_version && ending.is_like(before)
    };
    let is_news = |ending: &&Arc<Ending>| before.is_none_or(|before| !is_same(ending, before));
    let ending = report.ending.as_ref().filter(is_news);
    let said = |ending: &Arc<Ending>| {
        let Ending { what, output, for_good } = Ending::clone(ending);
        PodEnding { what, output, for_good }
    };
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
        job_version: *job_version,
        ending: ending.map(said),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(phase: Phase) -> Told {
        (Report { phase, message: String::new(), restarts: 0, ending: None }, 1)
    }

    fn attached(all: BTreeMap<String, Told>) -> News {
        let mut news = News::default();
        news.attached(all);
        news
    }

    fn ids(report: NodeReport) -> Vec<(String, bool)> {
        let Some(node_report::Report::Pods(reports)) = report.report else { panic!("not of pods") };
        reports.pods.into_iter().map(|pod| (pod.id, pod.gone)).collect()
    }

    #[test]
    fn a_new_stream_is_told_everything_once() {
        let mut news = attached(BTreeMap::from([("a".into(), state(Phase::Running))]));
        assert_eq!(ids(news.take()), [("a".into(), false)]);
        news.pod("a", Some(state(Phase::Running)));
        assert!(news.is_empty());
        news.pod("a", Some((state(Phase::Running).0, 2)));
        assert_eq!(ids(news.take()), [("a".into(), false)], "another version is another word");
    }

    #[test]
    fn only_the_last_word_is_said() {
        let mut news = attached(BTreeMap::new());
        news.pod("a", Some(state(Phase::Starting)));
        news.pod("a", Some(state(Phase::Failed)));
        assert_eq!(ids(news.take()).len(), 1);
        news.pod("a", Some(state(Phase::Running)));
        news.pod("a", Some(state(Phase::Failed)));
        assert!(news.is_empty(), "it was failed before and is failed now");
    }

    #[test]
    fn a_pod_that_is_gone_is_said_to_be_gone_and_nothing_else() {
        let mut news = attached(BTreeMap::new());
        news.pod("a", Some(state(Phase::Running)));
        news.gone("a");
        assert_eq!(ids(news.take()), [("a".into(), true)]);
    }

    #[test]
    fn without_a_stream_nothing_is_kept() {
        let mut news = News::default();
        news.pod("a", Some(state(Phase::Running)));
        news.gone("b");
        news.conflict("a", AddressConflict::default());
        assert_eq!(news, News::default());
    }

    #[test]
    fn a_conflict_is_said_once_to_a_stream() {
        let mut news = attached(BTreeMap::new());
        let conflict = AddressConflict { pod: "a".into(), ..AddressConflict::default() };
        news.conflict("a", conflict.clone());
        assert!(!news.is_empty());
        assert_eq!(news.take().report, Some(node_report::Report::Conflict(conflict)));
        assert!(news.is_empty());
    }

    /// A task that ends every half a minute would fill the log with what it writes each time.
    #[test]
    fn how_a_task_ended_is_said_once_to_a_stream_and_again_when_it_is_news() {
        let failed = |output: &str, restarts| {
            let ending = Some(Arc::new(Ending::new("task t: exited with status 3", output.as_bytes())));
            Some((Report { ending, restarts, ..state(Phase::Failed).0 }, 1))
        };
        let said = |news: &mut News| {
            let Some(node_report::Report::Pods(reports)) = news.take().report else { panic!("not of pods") };
            reports.pods[0].ending.as_ref().map(|ending| ending.output.clone())
        };
        let mut news = attached(BTreeMap::new());
        news.pod("a", failed("12:00:01 no table", 0));
        assert_eq!(said(&mut news).as_deref(), Some("12:00:01 no table"));
        news.pod("a", failed("12:00:31 no table", 1));
        assert_eq!(said(&mut news), None);
        news.pod("a", failed("12:01:01 no disk", 2));
        assert_eq!(said(&mut news).as_deref(), Some("12:01:01 no disk"));
        let again = failed("12:01:01 no disk", 2).unwrap();
        news.pod("a", Some(again.clone()));
        assert!(news.is_empty());
        let (report, _) = failed("12:02:01 no disk", 3).unwrap();
        news.pod("a", Some((report.clone(), 2)));
        assert!(said(&mut news).is_some(), "another version failed like it");
        news.pod("a", Some((Report { phase: Phase::Running, ..report }, 3)));
        assert_eq!(said(&mut news), None, "a version with the same tasks has not failed");
        news.detached();
        news.attached(BTreeMap::from([("a".into(), failed("12:01:01 no disk", 2).unwrap())]));
        assert!(said(&mut news).is_some(), "another stream knows nothing");
    }

    #[test]
    fn a_message_is_bounded() {
        let many = (0..PODS_PER_MESSAGE + 7).map(|n| (format!("p{n}"), state(Phase::Running))).collect();
        let mut news = attached(many);
        news.gone("x");
        assert_eq!(ids(news.take()).len(), PODS_PER_MESSAGE);
        assert_eq!(ids(news.take()).len(), 8);
    }
}
