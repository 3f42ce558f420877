//! The pods of this node: what was assigned, how far each is, and what the server must hear of them. Pure.
//!
//! What changes the assignment is [`Pending`] until the shell has made it durable, and is followed only then:
//! whatever the agent does for a pod, its store knows of the pod, and what the server hears to be gone is gone from
//! the store.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use hextet_api::v1;
use hextet_lifecycle::{Graph, Hook, Owner, Phase as StepPhase, Step, StepStatus, pod};

use crate::{
    assignment::{self, Assignment, PodRecord},
    identity::Identity,
    news::{News, Told},
    pod_state::{Action, Event, Failure, Phase, PodState, Report},
};

/// What there is to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    /// Bring kernel and desired state together.
    Reconcile,
    /// Something for the processes of a pod.
    Act(String, Action),
    /// Nothing of the pod is left: say [`Roster::finished`].
    Finish(String),
}

/// Something happened to a pod that people, and programs that follow events, may want to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Note {
    pub(crate) pod: String,
    /// One of [`hextet_lifecycle::hook::EVENTS`], or `step-done`, `step-undone`, `script-failed`, `not-kept`.
    pub(crate) kind: &'static str,
    pub(crate) what: String,
    /// What the pod was, when its record is gone.
    pub(crate) last: Option<PodRecord>,
}

/// Notes that nobody has taken are kept to this number, the newest.
const NOTES_MAX: usize = 4096;

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
    Ended,
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
    /// It has taken over what the store says is to run here.
    has_booted: bool,
    /// Hooks of the node's operator.
    hooks: BTreeMap<String, Hook>,
    /// On the caller's monotonic clock.
    now: Duration,
    notes: Vec<Note>,
    /// Pods of which the server wants something that could not be kept, and what it is told of them if that is another
    /// version than the one that runs.
    unkept: BTreeMap<String, Option<Told>>,
    /// A stream has begun, and its first assignment has not come.
    is_news: bool,
}

impl Roster {
    /// What the store says, and nothing done yet.
    pub(crate) fn new(identity: Identity, assignment: Assignment) -> Roster {
        Roster {
            identity,
            assignment,
            pods: BTreeMap::new(),
            news: News::default(),
            has_booted: false,
            hooks: BTreeMap::new(),
            now: Duration::ZERO,
            notes: Vec::new(),
            unkept: BTreeMap::new(),
            is_news: false,
        }
    }

    /// The same with hooks of the node's operator for each pod.
    pub(crate) fn with_hooks(self, hooks: BTreeMap<String, Hook>) -> Roster {
        Roster { hooks, ..self }
    }

    /// It is `now`. What follows from that: waits that are over, and time that is up.
    pub(crate) fn advance(&mut self, now: Duration) -> Vec<Duty> {
        self.now = now;
        let due = |pod: &PodState| pod.due().is_some_and(|due| due <= now);
        let pods: Vec<String> =
            self.pods.iter().filter(|(_, pod)| due(pod)).map(|(id, _)| id.clone()).collect();
        pods.iter().flat_map(|id| self.happen(id, Event::Tick)).collect()
    }

    /// When [`Roster::advance`] has something to do, at the latest.
    pub(crate) fn due(&self) -> Option<Duration> {
        self.pods.values().filter_map(PodState::due).min()
    }

    /// What has happened since this was asked last.
    pub(crate) fn take_notes(&mut self) -> Vec<Note> {
        std::mem::take(&mut self.notes)
    }

    /// The steps of a pod.
    pub(crate) fn steps_now(&self, pod: &str, now: Duration) -> Option<Vec<StepStatus>> {
        Some(self.pods.get(pod)?.steps(now))
    }

    /// Has the server told of `note`.
    pub(crate) fn event(&mut self, note: &Note, unix_ms: u64) {
        let (pod, kind, what) = (note.pod.clone(), note.kind.to_owned(), note.what.clone());
        self.news.event(v1::PodEvent { pod, kind, what, unix_ms });
    }

    /// The hook of a pod's job or of the node's operator, and whose it is.
    pub(crate) fn hook(&self, pod: &str, name: &str) -> Option<(&Hook, Owner)> {
        let of_job = self.assignment.pods.get(pod).and_then(|record| record.hooks.get(name));
        let of_operator = || self.hooks.get(name).map(|hook| (hook, Owner::Operator));
        of_job.map(|hook| (hook, Owner::Job)).or_else(of_operator)
    }

    /// Hooks that follow an event of a pod.
    pub(crate) fn following(&self, pod: &str, event: &str) -> Vec<(String, Hook, Owner)> {
        let of_job = self.assignment.pods.get(pod).map(|record| &record.hooks);
        let all = of_job.map(|hooks| (hooks, Owner::Job)).into_iter().chain([(&self.hooks, Owner::Operator)]);
        let follows = |hook: &Hook| hook.on.iter().any(|on| on == event);
        let found = all.flat_map(|(hooks, owner)| hooks.iter().map(move |(name, hook)| (name, hook, owner)));
        found
            .filter(|(_, hook, _)| follows(hook))
            .map(|(name, hook, owner)| (name.clone(), hook.clone(), owner))
            .collect()
    }

    /// Why a pod's hooks are none.
    pub(crate) fn hooks_problem(&self, pod: &str) -> Option<String> {
        let record = self.assignment.pods.get(pod)?;
        pod::graph(&record.hooks, &self.hooks).err().map(|error| error.to_string())
    }

    fn graph(&self, record: &PodRecord) -> Arc<Graph> {
        let none = BTreeMap::new();
        let with_hooks = pod::graph(&record.hooks, &self.hooks);
        Arc::new(with_hooks.unwrap_or_else(|_| {
            let plain = pod::graph(&none, &none).expect("a pod's own steps are a graph");
            let barrier = Step::new(pod::HOOKS, Owner::Operator, "its hooks fit each other").attempts(1);
            let steps = plain.steps().cloned().chain([barrier.before(pod::RUNNING)]);
            Graph::new(steps.collect()).expect("one more step before the last is a graph")
        }))
    }

    fn begin(&mut self, id: &str, from_store: bool, was_hooked: impl Fn(&str) -> bool) -> Vec<Duty> {
        let Some(record) = self.assignment.pods.get(id) else { return Vec::new() };
        let graph = self.graph(record);
        let hooks: Vec<&String> =
            record.hooks.keys().chain(self.hooks.keys()).filter(|name| was_hooked(name)).collect();
        let (pod, actions) = PodState::begin(graph, from_store, &hooks, self.now);
        self.pods.insert(id.to_owned(), pod);
        if !from_store {
            self.note(id, "pod-starting", "it is assigned to this node".to_owned());
        }
        duties(id, actions)
    }

    fn note(&mut self, pod: &str, kind: &'static str, what: String) {
        if self.notes.len() == NOTES_MAX {
            self.notes.remove(0);
        }
        self.notes.push(Note { pod: pod.to_owned(), kind, what, last: None });
    }

    /// Tries again what of the pod has failed, also for good; the names of those steps.
    pub(crate) fn retry(&mut self, id: &str) -> (Vec<String>, Vec<Duty>) {
        let has_failed = |step: &StepStatus| matches!(step.phase, StepPhase::Failed | StepPhase::Retrying);
        let steps = self.steps_now(id, self.now).unwrap_or_default();
        let names: Vec<String> = steps.into_iter().filter(has_failed).map(|step| step.name).collect();
        if names.is_empty() {
            return (names, Vec::new());
        }
        self.note(id, "pod-retried", format!("somebody asked: {} tried again", names.join(", ")));
        let duties = self.happen(id, Event::Retry(names.clone()));
        (names, duties)
    }

    /// A script that followed an event of the pod has failed. Scripts do not follow that.
    pub(crate) fn script_failed(&mut self, pod: &str, what: String) {
        self.note(pod, "script-failed", what);
    }

    /// What the server wants could not be kept, and is not followed. Noted once of each pod that it changes, until it can
    /// be; of another version than the one that runs, the server is told that it has failed: that counts against the node when
    /// a place is chosen, and a deploy need not wait.
    pub(crate) fn not_kept(&mut self, pending: &Pending, why: &str) {
        let now = &self.assignment.pods;
        let changed = pending.next.pods.iter().filter(|(id, next)| now.get(*id) != Some(next));
        let what = format!("its node goes on as before: what it is told cannot be kept: {why}");
        let word = |id: &str, next: &PodRecord| {
            let is_new = now.get(id).is_none_or(|now| now.job_version != next.job_version);
            let report = Report { phase: Phase::Failed, message: what.clone(), restarts: 0, ending: None };
            is_new.then_some((report, next.job_version))
        };
        let words: Vec<_> = changed.map(|(id, next)| (id.clone(), word(id, next))).collect();
        for (pod, word) in words {
            if self.unkept.insert(pod.clone(), word).is_none() {
                self.note(&pod, "not-kept", what.clone());
            }
            self.tell(&pod);
        }
        // Of these nothing is here, whatever can be kept.
        if let Then::Assigned(unknown) = &pending.then {
            unknown.iter().for_each(|pod| self.news.gone(pod));
        }
    }

    fn note_changes(&mut self, id: &str, before: &(Option<Report>, Vec<StepStatus>), event_is_end: bool) {
        let Some(pod) = self.pods.get(id) else { return };
        let (report, steps) = (pod.report(), pod.steps(self.now));
        // One that had a supervisor when the agent started runs on, until something else is heard of it.
        let runs_on = report.as_ref().is_none_or(|report| report.phase == Phase::Running);
        if before.0.is_none() && runs_on && !pod.is_ending() {
            return;
        }
        for (old, new) in before.1.iter().zip(&steps).filter(|(old, new)| old.name == new.name) {
            if let Some((kind, what)) = step_note(old, new) {
                self.note(id, kind, what);
            }
        }
        if event_is_end {
            self.note(id, "pod-stopping", "its tasks are being stopped".to_owned());
        }
        let Some(report) = report.filter(|report| before.0.as_ref() != Some(report)) else { return };
        let same = before
            .0
            .as_ref()
            .is_some_and(|before| before.phase == report.phase && before.message == report.message);
        match report.phase {
            Phase::Running if !same => self.note(id, "pod-running", "every task runs".to_owned()),
            Phase::Failed if !same => self.note(id, "pod-failed", report.message),
            _ => {}
        }
    }

    pub(crate) fn assignment(&self) -> &Assignment {
        &self.assignment
    }

    pub(crate) fn news(&self) -> &News {
        &self.news
    }

    /// Takes over what the store says is to run here. Of pods that are supervised the server knows as much as this
    /// agent, until their supervisors have answered.
    ///
    /// `was_hooked` says of a pod and a hook whether that was ever begun.
    pub(crate) fn boot(
        &mut self,
        is_supervised: impl Fn(&str) -> bool,
        was_hooked: impl Fn(&str, &str) -> bool,
    ) -> Vec<Duty> {
        let records: Vec<_> =
            self.assignment.pods.iter().map(|(id, pod)| (id.clone(), pod.removing)).collect();
        self.has_booted = true;
        let mut duties = vec![Duty::Reconcile];
        for (id, removing) in records {
            duties.extend(self.begin(&id, is_supervised(&id), |hook| was_hooked(&id, hook)));
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

    /// What of an assignment that cannot be kept can be followed without it: the ends of pods.
    pub(crate) fn ends_alone(&self, lost: &Pending) -> Option<Pending> {
        let mut next = self.assignment.clone();
        for (id, pod) in &mut next.pods {
            pod.removing |= lost.next.pods.get(id).is_none_or(|wanted| wanted.removing);
        }
        (next != self.assignment).then_some(Pending { next, then: Then::Ended })
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
            Then::Assigned(unknown) => {
                self.unkept.clear();
                self.assigned(&old, &unknown, is_changed)
            }
            Then::Ended => self.ended(&old),
            Then::Displaced(pod) => {
                let mut duties = vec![Duty::Reconcile];
                duties.extend(self.happen(&pod, Event::Displaced));
                duties
            }
            Then::Forgotten(gone) => self.forgotten(&old, &gone),
        }
    }

    /// New pods begin, changed ones are told, removed ones end. Before the boot they all wait for it: it knows which are
    /// supervised, of which nothing must be said before.
    fn assigned(
        &mut self,
        old: &Assignment,
        unknown: &BTreeSet<String>,
        is_changed: impl Fn(&str, &PodRecord, &PodRecord) -> bool,
    ) -> Vec<Duty> {
        unknown.iter().for_each(|pod| self.news.gone(pod));
        let mut duties = vec![Duty::Reconcile];
        let is_news = std::mem::take(&mut self.is_news);
        if !self.has_booted {
            return duties;
        }
        for (id, record) in self.assignment.pods.clone() {
            if !self.pods.contains_key(&id) {
                duties.extend(self.begin(&id, false, |_| false));
            }
            let before = old.pods.get(&id);
            let event = if record.removing {
                Some(Event::Remove)
            } else if before.is_some_and(|before| before.address != record.address) {
                Some(Event::Displaced)
            } else {
                // Hooks that have failed for want of a lease are tried again when there may be one.
                let again = is_news && record.singleton.is_some();
                let tasks = before.is_some_and(|before| is_changed(&id, before, &record));
                let changed = |before: &PodRecord| again || tasks || before.hooks != record.hooks;
                let event = || Event::Changed { graph: self.graph(&record), tasks };
                before.is_some_and(changed).then(event)
            };
            duties.extend(event.into_iter().flat_map(|event| self.happen(&id, event)));
            self.tell(&id);
        }
        duties
    }

    fn ended(&mut self, old: &Assignment) -> Vec<Duty> {
        let was_ending = |id: &String| old.pods.get(id).is_some_and(|before| before.removing);
        let pods = self.assignment.pods.iter().filter(|(id, pod)| pod.removing && !was_ending(id));
        let ends: Vec<String> = pods.map(|(id, _)| id.clone()).collect();
        ends.iter().flat_map(|id| self.happen(id, Event::Remove)).collect()
    }

    /// Something has happened to a pod. What is not of this node is nothing to it.
    pub(crate) fn happen(&mut self, id: &str, event: Event) -> Vec<Duty> {
        let now = self.now;
        let Some(pod) = self.pods.get_mut(id).filter(|_| self.assignment.pods.contains_key(id)) else {
            return Vec::new();
        };
        let before = (pod.report(), pod.steps(now));
        let was_ending = pod.is_ending();
        let actions = pod.step(event, now);
        let ends = !was_ending && pod.is_ending();
        self.note_changes(id, &before, ends);
        self.tell(id);
        duties(id, actions)
    }

    /// Nothing of these pods is left but their records. One that is wanted again starts anew; the others are to be
    /// forgotten.
    pub(crate) fn finished(&mut self, pods: Vec<String>) -> (Vec<Duty>, Option<Pending>) {
        let is_wanted = |pod: &String| self.assignment.pods.get(pod).is_some_and(|record| !record.removing);
        let (again, gone): (Vec<_>, Vec<_>) = pods.into_iter().partition(is_wanted);
        let mut duties = if again.is_empty() { vec![] } else { vec![Duty::Reconcile] };
        for pod in &again {
            duties.extend(self.begin(pod, false, |_| false));
        }
        let next = (!gone.is_empty()).then(|| assignment::forget(&self.identity, &self.assignment, &gone));
        (duties, next.map(|next| Pending { next, then: Then::Forgotten(gone) }))
    }

    fn forgotten(&mut self, old: &Assignment, gone: &[String]) -> Vec<Duty> {
        for pod in gone {
            self.pods.remove(pod);
            self.note(pod, "pod-gone", "nothing of it is left".to_owned());
            if let Some(note) = self.notes.last_mut() {
                note.last = old.pods.get(pod).cloned();
            }
            self.news.gone(pod);
        }
        if is_ipv4_given(old, &self.assignment) { vec![Duty::Reconcile] } else { vec![] }
    }

    /// A stream is there that knows nothing.
    pub(crate) fn attached(&mut self) {
        let ids = self.pods.keys().chain(self.unkept.keys());
        let all = ids.filter_map(|id| Some((id.clone(), self.word(id)?)));
        self.news.attached(all.collect());
        self.is_news = true;
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

    /// Whether the pod is being stopped, for good or to begin anew.
    pub(crate) fn is_ending(&self, pod: &str) -> bool {
        self.pods.get(pod).is_some_and(PodState::is_ending)
    }

    pub(crate) fn report(&self, pod: &str) -> Option<Report> {
        self.pods.get(pod)?.report()
    }

    /// What a look at the kernel means for each pod that waits for it. `is_desired`: it was to be there;
    /// `failure`: why it is not as it should be. `unannounced`: why addresses are not announced.
    pub(crate) fn network_events(
        &self,
        is_desired: impl Fn(&str) -> bool,
        failure: impl Fn(&str) -> Option<Failure>,
        unannounced: Option<&str>,
    ) -> Vec<(String, Event)> {
        let no_link = |why| Event::NetworkFailed(Failure { has_link: false, why });
        let ready = || Event::NetworkReady(unannounced.map(str::to_owned));
        let event = |id: &str, pod: &PodState| {
            if pod.awaits_network() {
                Some(match (failure(id), is_desired(id)) {
                    (Some(failure), _) => Event::NetworkFailed(failure),
                    (None, true) => ready(),
                    (None, false) => no_link(self.why_not_desired(id)),
                })
            } else if pod.awaits_end() {
                Some(failure(id).map_or(Event::NetworkGone, Event::NetworkFailed))
            } else {
                (pod.awaits_announcement() && unannounced.is_none()).then(ready)
            }
        };
        self.pods.iter().filter_map(|(id, pod)| Some((id.clone(), event(id, pod)?))).collect()
    }

    fn why_not_desired(&self, pod: &str) -> String {
        let problem = self.assignment.pods.get(pod).and_then(|record| record.problem.clone());
        problem.unwrap_or_else(|| format!("no IPv4 address is free in {}", self.identity.pod_ipv4))
    }

    fn tell(&mut self, pod: &str) {
        self.news.pod(pod, self.word(pod));
    }

    /// What the server is to know of a pod.
    fn word(&self, pod: &str) -> Option<Told> {
        let unkept = self.unkept.get(pod).cloned().flatten();
        unkept.or_else(|| Some((self.pods.get(pod)?.report()?, self.assignment.pods.get(pod)?.job_version)))
    }
}

fn duties(id: &str, actions: Vec<Action>) -> Vec<Duty> {
    let duty = |action| match action {
        Action::Reconcile => Duty::Reconcile,
        Action::Finish => Duty::Finish(id.to_owned()),
        action => Duty::Act(id.to_owned(), action),
    };
    actions.into_iter().map(duty).collect()
}

/// What is worth telling of a step.
fn step_note(old: &StepStatus, new: &StepStatus) -> Option<(&'static str, String)> {
    let name = &new.name;
    let took = || hextet_lifecycle::status::time(new.took_ms.unwrap_or(0));
    let why = || new.error.as_deref().unwrap_or("it failed");
    let gives_up = old.phase == StepPhase::Stopping && new.phase == StepPhase::Gone && new.error.is_some();
    if gives_up {
        return Some(("step-failed", format!("{name} is not undone, and nobody tries again: {}", why())));
    }
    if old.error != new.error && new.error.is_some() {
        return Some(("step-failed", format!("{name}: {}", why())));
    }
    if old.phase == new.phase {
        return None;
    }
    match new.phase {
        StepPhase::Done => Some(("step-done", format!("{name} after {}", took()))),
        // It is tried once more: that it had failed was told.
        StepPhase::Retrying if old.phase == StepPhase::Failed => None,
        StepPhase::Failed | StepPhase::Retrying => Some(("step-failed", format!("{name}: {}", why()))),
        StepPhase::Gone if old.phase == StepPhase::Stopping => {
            Some(("step-undone", format!("{name} after {}", took())))
        }
        _ => None,
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
        assignment::tests::pod,
        identity::tests::identity,
        pod_state::{HookFailure, Phase},
        supervisor::status::Status,
    };

    fn full(pods: Vec<v1::PodAssignment>) -> v1::Assignment {
        v1::Assignment { epoch: "e".into(), revision: 7, full: true, pods, ..v1::Assignment::default() }
    }

    fn roster() -> Roster {
        let mut roster = Roster::new(identity(), Assignment::default());
        roster.boot(|_| false, |_, _| false);
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

    /// What the server is told of pods.
    fn reported(roster: &mut Roster) -> Vec<v1::PodReport> {
        match roster.take_news().report.unwrap() {
            v1::node_report::Report::Pods(pods) => pods.pods,
            other => panic!("{other:?}"),
        }
    }

    fn running() -> Vec<Event> {
        vec![Event::Folders(Ok(())), Event::NetworkReady(None), Event::Status(Status::default())]
    }

    #[test]
    fn what_could_not_be_made_durable_has_not_happened() {
        let mut roster = roster();
        drop(roster.told(full(vec![pod("a", 1)])));
        assert_eq!((roster.assignment(), roster.report("a")), (&Assignment::default(), None));
        assert_eq!(roster.happen("a", Event::NetworkReady(None)), []);
        follow(&mut roster, full(vec![pod("a", 1)]));
        roster.happen("a", Event::Folders(Ok(())));
        assert_eq!(roster.happen("a", Event::NetworkReady(None)), [Duty::Act("a".into(), Action::Supervise)]);
    }

    #[test]
    fn what_cannot_be_kept_is_said_of_the_versions_that_do_not_begin() {
        let mut roster = roster();
        follow(&mut roster, full(vec![pod("a", 1), pod("b", 2)]));
        happen(&mut roster, running());
        drop((roster.take_notes(), roster.take_news()));
        let next = v1::PodAssignment { job_version: 9, ..pod("a", 1) };
        let wanted = full(vec![next, pod("b", 2), pod("c", 3)]);
        for stream in 0..2 {
            let (pending, _) = roster.told(wanted.clone());
            roster.not_kept(&pending, "the disk is full");
            let said: Vec<_> =
                reported(&mut roster).into_iter().map(|pod| (pod.id, pod.job_version)).collect();
            let all = [("a", 9), ("b", 1), ("c", 1)].map(|(id, version)| (id.to_owned(), version));
            match stream {
                0 => assert_eq!(said, [all[0].clone(), all[2].clone()]),
                _ => assert_eq!(said, all, "a new stream knows nothing"),
            }
            let notes: Vec<_> = roster.take_notes().into_iter().map(|note| (note.pod, note.kind)).collect();
            let once = [("a".to_owned(), "not-kept"), ("c".to_owned(), "not-kept")];
            assert_eq!(notes, once[..if stream == 0 { 2 } else { 0 }]);
            roster.attached();
        }
        assert_eq!(roster.report("a").map(|report| report.phase), Some(Phase::Running), "it goes on");
        follow(&mut roster, wanted);
        assert!(reported(&mut roster).iter().all(|pod| !pod.message.contains("cannot be kept")));
    }

    #[test]
    fn what_ends_is_followed_though_the_rest_cannot_be_kept() {
        let mut roster = roster();
        follow(&mut roster, full(vec![pod("a", 1), pod("b", 2)]));
        happen(&mut roster, running());
        let head = roster.assignment().head.clone();
        let removed_pods = vec!["d".to_owned()];
        let wanted = v1::Assignment { revision: 9, removed_pods, ..full(vec![pod("b", 2), pod("c", 3)]) };
        let (lost, _) = roster.told(wanted);
        let ends = roster.ends_alone(&lost).unwrap();
        assert_eq!(roster.durable(ends, |_, _, _| false), [Duty::Act("a".into(), Action::Stop)]);
        assert_eq!(roster.assignment().head, head, "the rest is still to be heard");
        let ending = |roster: &Roster, pod: &str| roster.assignment().pods.get(pod).map(|pod| pod.removing);
        assert_eq!(["a", "b", "c"].map(|pod| ending(&roster, pod)), [Some(true), Some(false), None]);
        roster.take_notes();
        roster.not_kept(&lost, "the disk is full");
        let notes: Vec<_> = roster.take_notes().into_iter().map(|note| note.pod).collect();
        assert_eq!(notes, ["c"], "what ends was kept");
        assert!(reported(&mut roster).iter().any(|pod| pod.id == "d" && pod.gone), "it never was here");
        assert!(roster.ends_alone(&lost).is_none(), "once");
    }

    #[test]
    fn a_pod_is_said_to_be_gone_when_the_store_has_forgotten_it() {
        let mut roster = roster();
        follow(&mut roster, full(vec![pod("a", 1)]));
        happen(&mut roster, running());
        assert_eq!(follow(&mut roster, full(vec![]))[1..], [Duty::Act("a".into(), Action::Stop)]);
        let last =
            happen(&mut roster, vec![Event::SupervisorStopped, Event::Folders(Ok(())), Event::NetworkGone]);
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
        assert!(roster.is_ending("a"));
        happen(&mut roster, vec![Event::SupervisorStopped, Event::Folders(Ok(())), Event::NetworkGone]);
        let (duties, pending) = roster.finished(vec!["a".into()]);
        assert!(pending.is_none() && duties.contains(&Duty::Act("a".into(), Action::MakeFolders)));
        assert_eq!(roster.report("a").map(|report| report.phase), Some(Phase::Starting));
    }

    #[test]
    fn after_a_restart_of_the_agent_pods_that_were_to_end_end() {
        let mut before = roster();
        follow(&mut before, full(vec![pod("a", 1), pod("b", 2)]));
        follow(&mut before, full(vec![pod("b", 2)]));
        let mut after = Roster::new(identity(), before.assignment().clone());
        let duties = after.boot(|pod| pod == "b", |_, _| false);
        assert!(duties.contains(&Duty::Act("a".into(), Action::Stop)));
        assert_eq!(after.report("b"), None, "the server knows as much");
        after.happen("b", Event::Folders(Ok(())));
        after.happen("b", Event::NetworkReady(None));
        after.happen("b", Event::Status(Status::default()));
        assert_eq!(after.report("b").map(|report| report.phase), Some(Phase::Running));
        let of_b =
            |roster: &mut Roster| roster.take_notes().into_iter().filter(|note| note.pod == "b").count();
        assert_eq!(of_b(&mut after), 0, "nothing has happened to it");
        after.happen("b", Event::SupervisorLost("it was killed".into()));
        assert!(of_b(&mut after) > 0);
    }

    /// An agent that starts while a supervisor is down hears the server before it boots. It once said of all other pods
    /// then that they were starting, though they ran: load balancers let go of them, and a rollout stopped them.
    #[test]
    fn what_the_server_says_before_the_boot_makes_no_pod_start_that_runs() {
        let mut before = roster();
        follow(&mut before, full(vec![pod("a", 1), pod("b", 2)]));
        let mut after = Roster::new(identity(), before.assignment().clone());
        after.attached();
        follow(&mut after, full(vec![pod("b", 2), pod("c", 3)]));
        assert!(after.news().is_empty());
        let duties = after.boot(|pod| pod != "c", |_, _| false);
        assert!(duties.contains(&Duty::Act("a".into(), Action::Stop)), "it is told to end");
        assert_eq!(after.report("b"), None, "the server knows as much");
        assert_eq!(after.report("c").map(|report| report.phase), Some(Phase::Starting));
    }

    /// A text was changed and changed back before its node heard of it. The server waited for the restart that it had
    /// asked for, and the node had nothing new to say: the pod was `starting` for ever.
    #[test]
    fn a_pod_with_the_same_tasks_in_another_version_is_said_to_run_again() {
        let mut roster = roster();
        follow(&mut roster, full(vec![pod("a", 1)]));
        happen(&mut roster, running());
        roster.take_news();
        follow(&mut roster, full(vec![pod("a", 1)]));
        assert!(roster.news().is_empty());
        follow(&mut roster, full(vec![v1::PodAssignment { job_version: 3, ..pod("a", 1) }]));
        assert_eq!(reported(&mut roster)[0].phase(), v1::PodPhase::Running);
    }

    #[test]
    fn what_happens_to_a_pod_is_noted_once() {
        let mut roster = roster();
        follow(&mut roster, full(vec![pod("a", 1)]));
        happen(&mut roster, running());
        roster.happen("a", Event::NetworkReady(None));
        let notes: Vec<_> = roster.take_notes().into_iter().map(|note| (note.kind, note.what)).collect();
        let kinds: Vec<&str> = notes.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds[0], "pod-starting");
        assert_eq!(kinds.iter().filter(|kind| **kind == "pod-running").count(), 1, "{notes:?}");
        assert!(notes.contains(&("step-done", "networking after 0ms".to_owned())), "{notes:?}");
        assert_eq!(roster.take_notes(), []);
    }

    #[test]
    fn hooks_that_do_not_fit_keep_the_pod_back_and_say_why() {
        let hooks: BTreeMap<String, Hook> =
            serde_json::from_str(r#"{"a": {"exec": ["/bin/m"], "before": ["running"]}}"#).unwrap();
        let mut roster = roster().with_hooks(hooks.clone());
        follow(&mut roster, full(vec![pod("a", 1)]));
        let mut assignment = roster.assignment().clone();
        assignment.pods.get_mut("a").unwrap().hooks = hooks.clone();
        let mut roster = Roster::new(identity(), assignment).with_hooks(hooks);
        let duties = roster.boot(|_| false, |_, _| false);
        assert!(duties.contains(&Duty::Act("a".into(), Action::RunHook("hooks".into()))));
        assert_eq!(happen(&mut roster, running()[..2].to_vec()), []);
        assert!(roster.hooks_problem("a").unwrap().contains("registered by job already"));
    }

    #[test]
    fn a_hook_that_failed_for_want_of_a_lease_is_tried_again_when_the_node_is_served() {
        let hooks = r#"{"a": {"exec": ["/bin/m"], "before": ["running"], "attempts": 1}}"#;
        let run = Duty::Act("a".into(), Action::RunHook("a".into()));
        let failure = HookFailure { why: "no lease".into(), output: String::new() };
        for singleton in [true, false] {
            let message = || full(vec![v1::PodAssignment { singleton, ..pod("a", 1) }]);
            let mut roster = roster().with_hooks(serde_json::from_str(hooks).unwrap());
            assert!(follow(&mut roster, message()).contains(&run));
            assert!(!roster.happen("a", Event::Hook("a".into(), Err(failure.clone()))).contains(&run));
            assert!(!follow(&mut roster, message()).contains(&run), "the same stream");
            roster.attached();
            assert_eq!(follow(&mut roster, message()).contains(&run), singleton);
        }
    }
}
