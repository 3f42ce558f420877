//! Programs that follow events: one run at a time for each, the events that wait bounded, nobody waits for them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use tokio::sync::mpsc::{self, error::TrySendError};
use tracing::warn;

use crate::{
    hook_keeper::{self, Place},
    supervisor::hook::HookSpec,
};

/// Events that wait for one script; those beyond are lost, and the next run is told how many.
pub(crate) const WAITING_MAX: usize = 32;
/// How many events were lost before this one.
const LOST: &str = "HEXTET_EVENTS_LOST";

/// The scripts of this node that have had an event, by pod (none for an operator's) and name.
#[derive(Debug, Default)]
pub(crate) struct Scripts(BTreeMap<(Option<String>, String), Script>);

#[derive(Debug)]
struct Script {
    events: mpsc::Sender<HookSpec>,
    lost: Arc<AtomicU32>,
}

impl Scripts {
    /// Has `spec` run after those that wait. Returns at once.
    pub(crate) fn run(&mut self, pod: Option<&str>, place: Place, spec: HookSpec) {
        let key = (pod.map(str::to_owned), spec.name.clone());
        let script = self.0.entry(key).or_insert_with(|| Script::start(place));
        match script.events.try_send(spec) {
            Ok(()) => {}
            Err(TrySendError::Full(spec)) => {
                let lost = script.lost.fetch_add(1, Ordering::Relaxed) + 1;
                warn!(hook = spec.name, lost, "a script is behind: an event is lost to it");
            }
            Err(TrySendError::Closed(_)) => {}
        }
    }

    /// The pod is gone: its scripts end with the events that they have.
    pub(crate) fn forget(&mut self, pod: &str) {
        self.0.retain(|(of, _), _| of.as_deref() != Some(pod));
    }
}

impl Script {
    fn start(place: Place) -> Script {
        let (events, receiver) = mpsc::channel(WAITING_MAX);
        let lost = Arc::new(AtomicU32::new(0));
        tokio::spawn(follow(place, receiver, lost.clone()));
        Script { events, lost }
    }
}

async fn follow(place: Place, mut events: mpsc::Receiver<HookSpec>, lost: Arc<AtomicU32>) {
    while let Some(mut spec) = events.recv().await {
        let before = lost.swap(0, Ordering::Relaxed);
        spec.env.insert(LOST.to_owned(), before.to_string());
        if let Err(why) = hook_keeper::run(&place, &spec, false).await {
            warn!(hook = spec.name, why, "a script that follows events failed");
        }
    }
}
