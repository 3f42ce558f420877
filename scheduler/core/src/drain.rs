//! Which load balancers have been told that a pod terminates, and whether all of them have said so.
//!
//! Kept in memory alone. A wait is bounded by [`DRAIN_MAX`]: a balancer that does not answer holds nothing up.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    change::{Key, Revision, Value},
    endpoint::Selector,
    pod::{Pod, PodId, PodPhase},
    state::State,
    time::Moment,
};

/// How long a pod waits for load balancers before it is stopped.
pub const DRAIN_MAX: Duration = Duration::from_secs(2);

/// How long after a server's start its balancers may take to come back. Until then every pod may have one.
pub const RETURN_MAX: Duration = Duration::from_secs(6);

/// Names one subscription.
pub type SubscriberId = u64;

/// Subscribers and the pods that wait for them.
#[derive(Clone, Debug, Default)]
pub struct Drains {
    next: SubscriberId,
    subscribers: BTreeMap<SubscriberId, Subscriber>,
    waiting: BTreeMap<PodId, Waiting>,
    /// When the subscribers from before a restart are back.
    all_back: Moment,
}

#[derive(Clone, Debug)]
struct Subscriber {
    selector: Selector,
    acknowledged: u64,
}

#[derive(Clone, Debug)]
struct Waiting {
    job: Selector,
    revision: u64,
    deadline: Moment,
    /// Subscribers from before a restart are not back yet: only the deadline counts.
    until_deadline: bool,
}

impl Drains {
    /// Those that terminate when a server starts, or soon after, wait for their deadline: their subscribers are not back
    /// yet.
    #[must_use]
    pub fn resume(state: &State, now: Moment) -> Drains {
        // Without pods there was nothing to send anybody.
        let all_back = if state.pods().is_empty() { now } else { now + RETURN_MAX };
        let mut drains = Drains { all_back, ..Drains::default() };
        for pod in state.pods().values().filter(|pod| waits(pod)) {
            drains.wait(pod, state.revision(), now, true);
        }
        drains
    }

    /// A load balancer asks for `selector`, and has applied everything up to `acknowledged`.
    pub fn subscribe(&mut self, selector: Selector, acknowledged: u64) -> SubscriberId {
        self.next += 1;
        self.subscribers.insert(self.next, Subscriber { selector, acknowledged });
        self.next
    }

    /// It has applied everything up to `revision`.
    pub fn acknowledge(&mut self, id: SubscriberId, revision: u64) {
        if let Some(subscriber) = self.subscribers.get_mut(&id) {
            subscriber.acknowledged = subscriber.acknowledged.max(revision);
        }
    }

    /// It has gone; nothing waits for it any more.
    pub fn unsubscribe(&mut self, id: SubscriberId) {
        self.subscribers.remove(&id);
    }

    /// Whether anybody would have to be told that `pod` terminates, as far as is known.
    #[must_use]
    pub fn is_watched(&self, pod: &Pod, now: Moment) -> bool {
        now < self.all_back || self.subscribers.values().any(|subscriber| subscriber.selector.selects(pod))
    }

    /// Notes which pods a committed revision lets wait, and which no longer.
    pub fn committed(&mut self, revision: &Revision, now: Moment) {
        for change in &revision.changes {
            let Key::Pod(id) = &change.key else { continue };
            match &change.new {
                Some(Value::Pod(pod)) if waits(pod) => {
                    self.wait(pod, revision.revision, now, now < self.all_back)
                }
                _ => drop(self.waiting.remove(id)),
            }
        }
    }

    /// Pods that need wait no longer. They are named until a revision says that they are stopped.
    #[must_use]
    pub fn finished(&self, now: Moment) -> Vec<PodId> {
        let done = |waiting: &Waiting| {
            now >= waiting.deadline || (!waiting.until_deadline && self.all_acknowledged(waiting))
        };
        self.waiting.iter().filter(|(_, waiting)| done(waiting)).map(|(id, _)| id.clone()).collect()
    }

    /// When [`Drains::finished`] will next name a pod if no acknowledgement comes.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.waiting.values().map(|waiting| waiting.deadline).min()
    }

    fn wait(&mut self, pod: &Pod, revision: u64, now: Moment, until_deadline: bool) {
        let job = Selector { job: pod.job.clone(), group: Some(pod.group.clone()) };
        let waiting = Waiting { job, revision, deadline: now + DRAIN_MAX, until_deadline };
        self.waiting.entry(pod.id.clone()).or_insert(waiting);
    }

    fn all_acknowledged(&self, waiting: &Waiting) -> bool {
        let mut concerned = self.subscribers.values().filter(|one| one.selector.covers(&waiting.job));
        concerned.all(|subscriber| subscriber.acknowledged >= waiting.revision)
    }
}

fn waits(pod: &Pod) -> bool {
    pod.phase == PodPhase::Terminating && !pod.stop
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{change::Change, quantity::Resources, time::WallTime};

    #[test]
    fn a_pod_waits_until_every_subscriber_that_selects_it_has_answered() {
        let mut drains = Drains::default();
        let one = drains.subscribe(selector("a"), 0);
        let two = drains.subscribe(selector("a/web"), 0);
        drains.subscribe(selector("a/other"), 0);
        drains.committed(&terminates(7, false), at(0));
        assert_eq!(drains.finished(at(0)), []);
        drains.acknowledge(one, 7);
        drains.acknowledge(two, 6);
        assert_eq!(drains.finished(at(0)), []);
        drains.acknowledge(two, 9);
        assert_eq!(drains.finished(at(0)), [id()]);
        drains.committed(&terminates(8, true), at(1));
        assert_eq!((drains.finished(at(9)), drains.poll_timeout()), (vec![], None));
    }

    #[test]
    fn a_subscriber_that_leaves_or_keeps_silent_holds_nothing_up() {
        let mut drains = Drains::default();
        let one = drains.subscribe(selector("a"), 0);
        drains.committed(&terminates(7, false), at(5));
        assert_eq!(drains.poll_timeout(), Some(at(5) + DRAIN_MAX));
        assert_eq!(drains.finished(at(5) + DRAIN_MAX), [id()]);
        drains.unsubscribe(one);
        assert_eq!(drains.finished(at(5)), [id()]);
    }

    #[test]
    fn after_a_restart_the_deadline_alone_counts() {
        let values = [(Key::Pod(id()), Value::Pod(Arc::new(pod(false))))];
        let drains = Drains::resume(&State::load(7, values), at(0));
        assert_eq!(drains.finished(at(1)), []);
        assert_eq!(drains.finished(at(0) + DRAIN_MAX), [id()]);
    }

    #[test]
    fn soon_after_a_restart_every_pod_may_have_a_balancer_that_is_not_back() {
        let values = [(Key::Pod(id()), Value::Pod(Arc::new(pod(true))))];
        let mut drains = Drains::resume(&State::load(7, values), at(0));
        assert!(drains.is_watched(&pod(false), at(5)));
        drains.committed(&terminates(8, false), at(5));
        assert_eq!((drains.finished(at(6)), drains.finished(at(7))), (vec![], vec![id()]));
        assert!(!drains.is_watched(&pod(false), at(0) + RETURN_MAX));
    }

    fn selector(text: &str) -> Selector {
        text.parse().unwrap()
    }

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }

    fn id() -> PodId {
        PodId("a-web-00000".to_owned())
    }

    fn pod(stop: bool) -> Pod {
        Pod {
            id: id(),
            job: "a".to_owned(),
            group: "web".to_owned(),
            job_version: 1,
            serial: 0,
            resources: Resources::default(),
            countables: Default::default(),
            node: Some("n1".to_owned()),
            address: None,
            phase: PodPhase::Terminating,
            message: String::new(),
            created: WallTime(0),
            restarts: 0,
            stop,
            standby: false,
        }
    }

    fn terminates(revision: u64, stop: bool) -> Revision {
        let change = Change { key: Key::Pod(id()), old: None, new: Some(Value::Pod(Arc::new(pod(stop)))) };
        let (changer, message) = (String::new(), String::new());
        Revision { revision, time: WallTime(0), changer, message, changes: vec![change] }
    }
}
