//! The pods of this node: what was assigned, how far each is, and what the server must hear of them. Pure.
//!
//! What changes the assignment is [`Pending`] until the shell has made it durable, and is followed only then:
//! whatever the agent does for a pod, its store knows of the pod, and what the server hears to be gone is gone from
//! the store.

use std::collections::{BTreeMap, BTreeSet};

use hextet_api::v1;

use crate::{
    assignment::{self, Assignment, PodRecord},
    identity::Identity,
    news::News,
    pod_state::{Action, Event, PodState, Report, Stage},
};

/// What there is to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    /// Bring kernel and desired state together.
    Reconcile,
    /// Something for the processes of a pod.
    Act(String, Action),
    /// Remove the pod's folders, then say [`Roster::finished`].
    Finish(String),
}

/// An assignment that must be durable before it is followed with [`Roster::durable`]. One that cannot be made
/// durable is dropped, and nothing has happened.
#[derive(Debug)]
#[must_use]
pub(crate) struct Pending {
    pub(crate) next: Assignment,
    then: Then,
}

#[derive(Debug)]
enum Then {
    /// Pods that the server wants gone and that are not here.
    Assigned(BTreeSet<String>),
    Displaced(String),
    Forgotten(Vec<String>),
}

/// The pods of this node.
#[derive(Clone, Debug)]
pub(crate) struct Roster {
    identity: Identity,
    assignment: Assignment,
    pods: BTreeMap<String, PodState>,
    news: News,
}

impl Roster {
    /// What the store says, and nothing done yet.
    pub(crate) fn new(identity: Identity, assignment: Assignment) -> Roster {
        Roster { identity, assignment, pods: BTreeMap::new(), news: News::default() }
    }

    pub(crate) fn assignment(&self) -> &Assignment {
        &self.assignment
    }

    pub(crate) fn news(&self) -> &News {
        &self.news
    }

    /// Takes over what the store says is to run here. Of pods that are supervised the server knows as much as this
    /// agent, until their supervisors have answered.
    pub(crate) fn boot(&mut self, is_supervised: impl Fn(&str) -> bool) -> Vec<Duty> {
        let records: Vec<_> =
            self.assignment.pods.iter().map(|(id, pod)| (id.clone(), pod.removing)).collect();
        let mut duties = vec![Duty::Reconcile];
        for (id, removing) in records {
            self.pods.insert(id.clone(), PodState::new(is_supervised(&id)));
            if removing {
                duties.extend(self.happen(&id, Event::Remove));
            }
            self.tell(&id);
        }
        duties
    }

    /// What a message of the server makes of the assignment, and what of it could not be used.
    pub(crate) fn told(&self, message: v1::Assignment) -> (Pending, Vec<String>) {
        let merged = assignment::merge(&self.identity, &self.assignment, message);
        (Pending { next: merged.next, then: Then::Assigned(merged.unknown) }, merged.complaints)
    }

    /// The pod must not use its address any more.
    pub(crate) fn displaced(&self, pod: &str, mac: [u8; 6], why: String) -> Pending {
        let next = assignment::take_address(&self.assignment, pod, mac, why);
        Pending { next, then: Then::Displaced(pod.to_owned()) }
    }

    /// Follows an assignment that is durable by now. `is_changed` says whether a record asks for other processes.
    pub(crate) fn durable(
        &mut self,
        pending: Pending,
        is_changed: impl Fn(&str, &PodRecord, &PodRecord) -> bool,
    ) -> Vec<Duty> {
        let old = std::mem::replace(&mut self.assignment, pending.next);
        match pending.then {
            Then::Assigned(unknown) => self.assigned(&old, &unknown, is_changed),
            Then::Displaced(pod) => {
                let mut duties = vec![Duty::Reconcile];
                duties.extend(self.happen(&pod, Event::Displaced));
                duties
            }
            Then::Forgotten(gone) => self.forgotten(&old, &gone),
        }
    }

    /// New pods begin, changed ones are told, removed ones end.
    fn assigned(
        &mut self,
        old: &Assignment,
        unknown: &BTreeSet<String>,
        is_changed: impl Fn(&str, &PodRecord, &PodRecord) -> bool,
    ) -> Vec<Duty> {
        let mut duties = vec![Duty::Reconcile];
        for (id, record) in self.assignment.pods.clone() {
            self.pods.entry(id.clone()).or_insert_with(|| PodState::new(false));
            let before = old.pods.get(&id);
            let event = if record.removing {
                Some(Event::Remove)
            } else if before.is_some_and(|before| before.address != record.address) {
                Some(Event::Displaced)
            } else {
                before.filter(|before| is_changed(&id, before, &record)).map(|_| Event::Changed)
            };
            duties.extend(event.into_iter().flat_map(|event| self.happen(&id, event)));
            self.tell(&id);
        }
        unknown.iter().for_each(|pod| self.news.gone(pod));
        duties
    }

    /// Something has happened to a pod. What is not of this node is nothing to it.
    pub(crate) fn happen(&mut self, id: &str, event: Event) -> Vec<Duty> {
        let Some(pod) = self.pods.get_mut(id).filter(|_| self.assignment.pods.contains_key(id)) else {
            return Vec::new();
        };
        let actions = pod.step(event);
        self.tell(id);
        let duty = |action| match action {
            Action::Reconcile => Duty::Reconcile,
            Action::Finish => Duty::Finish(id.to_owned()),
            action => Duty::Act(id.to_owned(), action),
        };
        actions.into_iter().map(duty).collect()
    }

    /// Nothing of these pods is left but their records. One that is wanted again starts anew; the others are to be
    /// forgotten.
    pub(crate) fn finished(&mut self, pods: Vec<String>) -> (Vec<Duty>, Option<Pending>) {
        let is_wanted = |pod: &String| self.assignment.pods.get(pod).is_some_and(|record| !record.removing);
        let (again, gone): (Vec<_>, Vec<_>) = pods.into_iter().partition(is_wanted);
        let duties = if again.is_empty() { vec![] } else { vec![Duty::Reconcile] };
        self.pods.extend(again.into_iter().map(|pod| (pod, PodState::new(false))));
        let next = (!gone.is_empty()).then(|| assignment::forget(&self.identity, &self.assignment, &gone));
        (duties, next.map(|next| Pending { next, then: Then::Forgotten(gone) }))
    }

    fn forgotten(&mut self, old: &Assignment, gone: &[String]) -> Vec<Duty> {
        for pod in gone {
            self.pods.remove(pod);
            self.news.gone(pod);
        }
        if is_ipv4_given(old, &self.assignment) { vec![Duty::Reconcile] } else { vec![] }
    }

    /// A stream is there that knows nothing.
    pub(crate) fn attached(&mut self) {
        let all = self.pods.iter().filter_map(|(id, pod)| Some((id.clone(), pod.report()?)));
        self.news.attached(all.collect());
    }

    pub(crate) fn detached(&mut self) {
        self.news.detached();
    }

    /// Asks for another address for a pod whose address is taken.
    pub(crate) fn ask_for_address(&mut self, pod: &str) {
        let Some(record) = self.assignment.pods.get(pod) else { return };
        let Some(mac) = record.taken_by else { return };
        let address = record.address.octets().to_vec();
        let conflict = v1::AddressConflict { pod: pod.to_owned(), address, mac: mac.to_vec() };
        self.news.conflict(pod, conflict);
    }

    /// The next message to the server, whose pods then count as told.
    pub(crate) fn take_news(&mut self) -> v1::NodeReport {
        self.news.take()
    }

    /// Whether nothing of the pod may be in the kernel.
    pub(crate) fn is_absent(&self, pod: &str) -> bool {
        self.pods.get(pod).is_some_and(PodState::is_absent)
    }

    pub(crate) fn stage(&self, pod: &str) -> Option<&Stage> {
        self.pods.get(pod).map(PodState::stage)
    }

    pub(crate) fn report(&self, pod: &str) -> Option<Report> {
        self.pods.get(pod)?.report()
    }

    /// Supervisors of the pod that failed in a row.
    pub(crate) fn failures(&self, pod: &str) -> u32 {
        self.pods.get(pod).map_or(0, PodState::failures)
    }

    /// What a look at the kernel means for each pod that waits for it. `is_desired`: it was to be there;
    /// `failure`: why it is not as it should be.
    pub(crate) fn network_events(
        &self,
        is_desired: impl Fn(&str) -> bool,
        failure: impl Fn(&str) -> Option<String>,
    ) -> Vec<(String, Event)> {
        let event = |id: &str, pod: &PodState| match pod.stage() {
            Stage::Networking(_) => Some(match (failure(id), is_desired(id)) {
                (Some(why), _) => Event::NetworkFailed(why),
                (None, true) => Event::NetworkReady,
                (None, false) => Event::NetworkFailed(self.why_not_desired(id)),
            }),
            Stage::Unlinking(_) => Some(failure(id).map_or(Event::NetworkGone, Event::NetworkFailed)),
            _ => None,
        };
        self.pods.iter().filter_map(|(id, pod)| Some((id.clone(), event(id, pod)?))).collect()
    }

    fn why_not_desired(&self, pod: &str) -> String {
        let problem = self.assignment.pods.get(pod).and_then(|record| record.problem.clone());
        problem.unwrap_or_else(|| format!("no IPv4 address is free in {}", self.identity.pod_ipv4))
    }

    fn tell(&mut self, pod: &str) {
        self.news.pod(pod, self.pods.get(pod).and_then(PodState::report));
    }
}

/// Whether a pod that had to wait for an IPv4 address has one now.
fn is_ipv4_given(old: &Assignment, new: &Assignment) -> bool {
    new.pods.iter().any(|(id, pod)| pod.ipv4 != old.pods.get(id).and_then(|before| before.ipv4))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        assignment::tests::pod, identity::tests::identity, pod_state::Phase, supervisor::status::Status,
    };

    fn full(pods: Vec<v1::PodAssignment>) -> v1::Assignment {
        v1::Assignment { epoch: "e".into(), revision: 7, full: true, pods, ..v1::Assignment::default() }
    }

    fn roster() -> Roster {
        let mut roster = Roster::new(identity(), Assignment::default());
        roster.attached();
        roster
    }

    /// Makes it durable and follows it.
    fn follow(roster: &mut Roster, message: v1::Assignment) -> Vec<Duty> {
        let (pending, complaints) = roster.told(message);
        assert_eq!(complaints, Vec::<String>::new());
        roster.durable(pending, |_, before, now| before.tasks != now.tasks)
    }

    fn happen(roster: &mut Roster, events: Vec<Event>) -> Vec<Duty> {
        events.into_iter().map(|event| roster.happen("a", event)).last().unwrap()
    }

    fn running() -> Vec<Event> {
        vec![Event::NetworkReady, Event::Status(Status::default())]
    }

    #[test]
    fn what_could_not_be_made_durable_has_not_happened() {
        let mut roster = roster();
        drop(roster.told(full(vec![pod("a", 1)])));
        assert_eq!((roster.assignment(), roster.stage("a")), (&Assignment::default(), None));
        assert_eq!(roster.happen("a", Event::NetworkReady), []);
        follow(&mut roster, full(vec![pod("a", 1)]));
        assert_eq!(roster.happen("a", Event::NetworkReady), [Duty::Act("a".into(), Action::Supervise)]);
    }

    #[test]
    fn a_pod_is_said_to_be_gone_when_the_store_has_forgotten_it() {
        let mut roster = roster();
        follow(&mut roster, full(vec![pod("a", 1)]));
        happen(&mut roster, running());
        assert_eq!(follow(&mut roster, full(vec![]))[1..], [Duty::Act("a".into(), Action::Stop)]);
        let last = happen(&mut roster, vec![Event::SupervisorStopped, Event::NetworkGone]);
        assert_eq!(last, [Duty::Finish("a".into())]);
        roster.take_news();
        let (_, pending) = roster.finished(vec!["a".into()]);
        assert!(roster.news().is_empty(), "not yet");
        let pending = pending.unwrap();
        assert!(pending.next.pods.is_empty());
        assert_eq!(roster.durable(pending, |_, _, _| false), []);
        assert!(!roster.news().is_empty());
    }

    #[test]
    fn a_pod_that_is_wanted_again_while_it_ends_starts_anew() {
        let mut roster = roster();
        follow(&mut roster, full(vec![pod("a", 1)]));
        happen(&mut roster, running());
        follow(&mut roster, full(vec![]));
        follow(&mut roster, full(vec![pod("a", 1)]));
        assert_eq!(roster.stage("a"), Some(&Stage::Stopping));
        happen(&mut roster, vec![Event::SupervisorStopped, Event::NetworkGone]);
        let (duties, pending) = roster.finished(vec!["a".into()]);
        assert!(pending.is_none() && duties == [Duty::Reconcile]);
        assert_eq!(roster.stage("a"), Some(&Stage::Networking(None)));
    }

    #[test]
    fn after_a_restart_of_the_agent_pods_that_were_to_end_end() {
        let mut before = roster();
        follow(&mut before, full(vec![pod("a", 1), pod("b", 2)]));
        follow(&mut before, full(vec![pod("b", 2)]));
        let mut after = Roster::new(identity(), before.assignment().clone());
        assert_eq!(after.boot(|pod| pod == "b")[1..], [Duty::Act("a".into(), Action::Stop)]);
        assert_eq!(after.report("b"), None, "the server knows as much");
        after.happen("b", Event::NetworkReady);
        after.happen("b", Event::Status(Status::default()));
        assert_eq!(after.report("b").map(|report| report.phase), Some(Phase::Running));
    }
}
