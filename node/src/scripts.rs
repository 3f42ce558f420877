//! Programs that follow events: one run at a time for each, the events that wait bounded, nobody waits for them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use hextet_lifecycle::Owner;
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::Instant,
};
use tracing::warn;

use crate::{
    hook_keeper::{self, Place},
    keeper::News,
    supervisor::hook::HookSpec,
};

/// Events that wait for one script; those beyond are lost, and the next run is told how many.
pub(crate) const WAITING_MAX: usize = 32;
/// How many events were lost before this one.
const LOST: &str = "HEXTET_EVENTS_LOST";

/// The scripts of this node that have had an event, by pod (none for an operator's) and name.
#[derive(Debug)]
pub(crate) struct Scripts {
    running: BTreeMap<(Option<String>, String), Script>,
    /// How the last run of each came out, by the pod of its event and name.
    ended: BTreeMap<(String, String), Ended>,
    news: mpsc::Sender<(String, News)>,
}

/// How a script's last run for a pod came out.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) owner: Owner,
    pub(crate) result: Result<(), String>,
    pub(crate) runs: u32,
    /// The last lines that it said.
    pub(crate) output: String,
    pub(crate) at: Instant,
}

/// What a script has to say for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ScriptNews {
    pub(crate) name: String,
    pub(crate) owner: Owner,
    pub(crate) result: Result<(), String>,
    pub(crate) output: String,
}

/// An event that waits for its script.
#[derive(Debug)]
pub(crate) struct Order {
    /// Whose event it is.
    pub(crate) pod: String,
    pub(crate) owner: Owner,
    pub(crate) spec: HookSpec,
}

#[derive(Debug)]
struct Script {
    events: mpsc::Sender<Order>,
    lost: Arc<AtomicU32>,
}

impl Scripts {
    pub(crate) fn new(news: mpsc::Sender<(String, News)>) -> Scripts {
        Scripts { running: BTreeMap::new(), ended: BTreeMap::new(), news }
    }

    /// Has a script run after the events that wait. Returns at once.
    pub(crate) fn run(&mut self, place: Place, order: Order) {
        let of = (order.owner == Owner::Job).then(|| order.pod.clone());
        let news = &self.news;
        let script = self.running.entry((of, order.spec.name.clone()));
        let script = script.or_insert_with(|| Script::start(place, news.clone()));
        match script.events.try_send(order) {
            Ok(()) => {}
            Err(TrySendError::Full(Order { pod, spec, .. })) => {
                let lost = script.lost.fetch_add(1, Ordering::Relaxed) + 1;
                warn!(pod, hook = spec.name, lost, "a script is behind: an event is lost to it");
            }
            Err(TrySendError::Closed(_)) => {}
        }
    }

    /// Takes note of how a run came out; what is to be told of it.
    pub(crate) fn heard(&mut self, pod: &str, news: ScriptNews) -> Option<String> {
        let ScriptNews { name, owner, result, output } = news;
        let told = result.as_ref().err().map(|why| failure(&name, owner, why, &output));
        let key = (pod.to_owned(), name);
        let runs = self.ended.get(&key).map_or(0, |ended| ended.runs).saturating_add(1);
        self.ended.insert(key, Ended { owner, result, runs, output, at: Instant::now() });
        told
    }

    /// How the scripts of a pod's events came out, by name.
    pub(crate) fn ended<'a>(&'a self, pod: &'a str) -> impl Iterator<Item = (&'a String, &'a Ended)> {
        self.ended.iter().filter(move |((of, _), _)| of == pod).map(|((_, name), ended)| (name, ended))
    }

    /// The pod is gone: its scripts end with the events that they have.
    pub(crate) fn forget(&mut self, pod: &str) {
        self.running.retain(|(of, _), _| of.as_deref() != Some(pod));
        self.ended.retain(|(of, _), _| of != pod);
    }
}

/// `the job's script tell: exited with status 9; it said: no such host`.
fn failure(name: &str, owner: Owner, why: &str, output: &str) -> String {
    let said = output.lines().rfind(|line| !line.trim().is_empty());
    let said = said.map(|line| format!("; it said: {}", line.trim())).unwrap_or_default();
    format!("the {owner}'s script {name}: {why}{said}")
}

impl Script {
    fn start(place: Place, news: mpsc::Sender<(String, News)>) -> Script {
        let (events, receiver) = mpsc::channel(WAITING_MAX);
        let lost = Arc::new(AtomicU32::new(0));
        tokio::spawn(follow(place, receiver, lost.clone(), news));
        Script { events, lost }
    }
}

async fn follow(
    place: Place,
    mut events: mpsc::Receiver<Order>,
    lost: Arc<AtomicU32>,
    news: mpsc::Sender<(String, News)>,
) {
    while let Some(Order { pod, owner, mut spec }) = events.recv().await {
        let before = lost.swap(0, Ordering::Relaxed);
        spec.env.insert(LOST.to_owned(), before.to_string());
        let result = hook_keeper::run(&place, &spec, false).await;
        if let Err(why) = &result {
            warn!(pod, hook = spec.name, why, "a script that follows events failed");
        }
        let output = hook_keeper::output(&place.folder);
        // The agent may be ending.
        let _ = news.send((pod, News::Script(ScriptNews { name: spec.name, owner, result, output }))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_with_its_last_line_and_kept_until_the_next_run_or_the_pods_end() {
        let mut scripts = Scripts::new(mpsc::channel(1).0);
        let news = |result: Result<(), &str>, output: &str| ScriptNews {
            name: "tell".to_owned(),
            owner: Owner::Job,
            result: result.map_err(str::to_owned),
            output: output.to_owned(),
        };
        let told = scripts.heard("a", news(Err("exited with status 9"), "trying\nno such host\n\n"));
        let expected = "the job's script tell: exited with status 9; it said: no such host";
        assert_eq!(told.as_deref(), Some(expected));
        assert_eq!(
            scripts.heard("a", news(Err("no program"), "")).as_deref(),
            Some("the job's script tell: no program")
        );
        assert_eq!(scripts.ended("a").map(|(_, ended)| ended.runs).collect::<Vec<_>>(), [2]);
        assert_eq!(scripts.ended("b").count(), 0);
        assert_eq!(scripts.heard("a", news(Ok(()), "done")), None);
        assert!(scripts.ended("a").all(|(_, ended)| ended.result.is_ok()));
        scripts.forget("a");
        assert_eq!(scripts.ended("a").count(), 0);
    }
}
