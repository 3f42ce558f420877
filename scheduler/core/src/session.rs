//! One attached node: what it has said and is not written down yet, and what it has been told.
//!
//! Kept in memory alone. A stream that ends loses both: the next one begins with everything, in both directions.

use std::collections::BTreeMap;

use crate::{
    assignment::{self, Diff, View},
    change::{Revision, Value},
    event::{Conflict, Event, PodReport},
    pod::{PodId, PodPhase},
    state::State,
};

/// Reports of different pods that wait for the disk.
pub const REPORTS_MAX: usize = 10_000;

/// What a node has reported and is not written down yet: the newest word on each pod and on its address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inbox {
    reports: BTreeMap<PodId, PodReport>,
    conflicts: BTreeMap<PodId, Conflict>,
    /// It has reported although it counts as lost.
    returned: bool,
}

/// Why a report is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more pods are reported than a node can have")]
pub struct InboxFull;

impl Inbox {
    /// How a pod is.
    ///
    /// # Errors
    /// [`REPORTS_MAX`] wait already.
    pub fn report(&mut self, report: PodReport) -> Result<(), InboxFull> {
        if self.reports.len() >= REPORTS_MAX {
            return Err(InboxFull);
        }
        let older = self.reports.remove(&report.id);
        self.reports.insert(report.id.clone(), newer(older, report));
        Ok(())
    }

    /// Another machine has a pod's address.
    ///
    /// # Errors
    /// [`REPORTS_MAX`] wait already.
    pub fn conflict(&mut self, conflict: Conflict) -> Result<(), InboxFull> {
        if self.conflicts.len() >= REPORTS_MAX {
            return Err(InboxFull);
        }
        self.conflicts.insert(conflict.pod.clone(), conflict);
        Ok(())
    }

    /// The node has reported although it counts as lost.
    pub fn returned(&mut self) {
        self.returned = true;
    }

    /// All that waits, if anything does.
    pub fn take(&mut self) -> Option<Inbox> {
        let taken = std::mem::take(self);
        (taken != Inbox::default()).then_some(taken)
    }

    /// What was taken could not be written down. Reports that came in the meantime are newer.
    pub fn put_back(&mut self, taken: Inbox) {
        for (id, report) in taken.reports {
            let report = match self.reports.remove(&id) {
                Some(since) => newer(Some(report), since),
                None => report,
            };
            self.reports.insert(id, report);
        }
        for (id, conflict) in taken.conflicts {
            self.conflicts.entry(id).or_insert(conflict);
        }
        self.returned = true;
    }

    /// What `node` has said, as events to bring about in this order. Without reports the first says that the
    /// node has returned. Those that are brought about twice change nothing the second time.
    #[must_use]
    pub fn events(self, node: &str) -> Vec<Event> {
        let reports = Event::PodReports(node.to_owned(), self.reports.into_values().collect());
        let conflict = |conflict| Event::AddressConflict(node.to_owned(), conflict);
        std::iter::once(reports).chain(self.conflicts.into_values().map(conflict)).collect()
    }
}

/// The newer word. How a pod ended is said once, and is not lost with an older one.
fn newer(older: Option<PodReport>, newer: PodReport) -> PodReport {
    let before = older.and_then(|older| older.ending);
    PodReport { ending: newer.ending.or(before), ..newer }
}

/// Nodes whose pods count as lost from this revision on. Their streams end: what they said of their pods counts no
/// more, and only a new stream begins with everything.
pub fn unheard(revision: &Revision) -> impl Iterator<Item = &str> {
    let lost = |value: &Option<Value>| match value {
        Some(Value::Pod(pod)) => pod.phase == PodPhase::Lost,
        _ => false,
    };
    revision.changes.iter().filter_map(move |change| match &change.new {
        Some(Value::Pod(pod)) if lost(&change.new) && !lost(&change.old) => pod.node.as_deref(),
        _ => None,
    })
}

/// What one stream has told its node.
#[derive(Clone, Debug)]
pub struct Told {
    node: String,
    view: View,
    revision: u64,
}

/// A message to a node: all that it must run, or what has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Telling {
    /// What the node must know.
    pub diff: Diff,
    /// The state that it is of.
    pub revision: u64,
    /// It is everything: what it does not name must end.
    pub full: bool,
}

impl Told {
    /// A stream that has told nothing yet.
    #[must_use]
    pub fn new(node: &str) -> Told {
        Told { node: node.to_owned(), view: View::default(), revision: 0 }
    }

    /// The first message.
    pub fn all(&mut self, state: &State) -> Telling {
        (self.view, self.revision) = (assignment::view(state, &self.node), state.revision());
        Telling { diff: assignment::full(&self.view), revision: self.revision, full: true }
    }

    /// Whether a revision may change what the node must know. When some were missed, nobody knows: the answer
    /// is then in [`Told::what_changed`].
    #[must_use]
    pub fn is_news(&self, revision: &Revision) -> bool {
        revision.revision > self.revision && assignment::concerns(revision, &self.node)
    }

    /// The next message, if the node must know more than it has been told.
    pub fn what_changed(&mut self, state: &State) -> Option<Telling> {
        let view = assignment::view(state, &self.node);
        let diff = assignment::diff(&self.view, &view);
        (self.view, self.revision) = (view, state.revision());
        (!diff.is_empty()).then_some(Telling { diff, revision: self.revision, full: false })
    }
}

#[cfg(test)]
mod tests {
    use hextet_lifecycle::Ending;

    use super::*;
    use crate::pod::PodPhase;

    #[test]
    fn only_the_newest_word_on_a_pod_is_written_down() {
        let mut inbox = Inbox::default();
        inbox.report(report("a", PodPhase::Starting)).unwrap();
        inbox.report(report("a", PodPhase::Running)).unwrap();
        let events = inbox.take().unwrap().events("n1");
        assert_eq!(events, [Event::PodReports("n1".into(), vec![report("a", PodPhase::Running)])]);
        assert_eq!(inbox.take(), None);
    }

    #[test]
    fn what_came_while_an_older_word_waited_for_the_disk_is_newer() {
        let mut inbox = Inbox::default();
        inbox.report(report("a", PodPhase::Starting)).unwrap();
        inbox.report(report("b", PodPhase::Starting)).unwrap();
        let taken = inbox.take().unwrap();
        inbox.report(report("a", PodPhase::Failed)).unwrap();
        inbox.put_back(taken);
        let reports = vec![report("a", PodPhase::Failed), report("b", PodPhase::Starting)];
        assert_eq!(inbox.take().unwrap().events("n1"), [Event::PodReports("n1".into(), reports)]);
    }

    #[test]
    fn how_a_pod_ended_is_not_lost_with_an_older_word() {
        let mut inbox = Inbox::default();
        let ending = Some(Ending::new("task t: exited with status 3", b"no such table"));
        inbox.report(PodReport { ending: ending.clone(), ..report("a", PodPhase::Failed) }).unwrap();
        inbox.report(report("a", PodPhase::Running)).unwrap();
        let taken = inbox.take().unwrap();
        inbox.report(report("a", PodPhase::Failed)).unwrap();
        inbox.put_back(taken);
        let reports = vec![PodReport { ending, ..report("a", PodPhase::Failed) }];
        assert_eq!(inbox.take().unwrap().events("n1"), [Event::PodReports("n1".into(), reports)]);
    }

    #[test]
    fn a_node_that_only_returns_says_so() {
        let mut inbox = Inbox::default();
        inbox.returned();
        assert_eq!(inbox.take().unwrap().events("n1"), [Event::PodReports("n1".into(), vec![])]);
    }

    #[test]
    fn no_more_is_kept_than_a_node_can_have() {
        let mut inbox = Inbox::default();
        let fill = |n: usize| report(&format!("p{n}"), PodPhase::Running);
        assert!((0..REPORTS_MAX).all(|n| inbox.report(fill(n)).is_ok()));
        assert_eq!(inbox.report(fill(REPORTS_MAX)), Err(InboxFull));
    }

    fn report(id: &str, phase: PodPhase) -> PodReport {
        PodReport {
            id: PodId(id.into()),
            phase,
            message: String::new(),
            restarts: 0,
            gone: false,
            version: None,
            ending: None,
        }
    }
}
