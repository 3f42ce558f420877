//! What nodes say of their pods, and when the control plane did something about one: in memory, bounded.
//!
//! Events of nodes are for people. The newest are kept; those of before a restart of the server are in the nodes' logs.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Mutex,
};

use hextet_api::v1;
use scheduler_core::{
    change::{Key, Revision, Value},
    ownership,
    pod::{Pod, PodId, PodPhase},
    state::State,
    time::Moment,
};
use tokio::sync::broadcast;
use tracing::warn;

use crate::{clock, mutex::lock};

/// Events of nodes that are kept.
const KEPT_MAX: usize = 10_000;
/// Bytes of one event's text.
const TEXT_LEN_MAX: usize = 512;
/// Events that a slow reader may be behind.
const BEHIND_MAX: usize = 1_024;

/// Events of nodes, and moments of pods.
pub(crate) struct Happenings {
    /// What this server's life is called: its numbers are of no other.
    run: String,
    kept: Mutex<Kept>,
    moments: Mutex<BTreeMap<PodId, Moments>>,
    news: broadcast::Sender<Numbered>,
}

#[derive(Default)]
struct Kept {
    last: u64,
    events: VecDeque<Numbered>,
}

/// An event, with its number in this run of the server: from 1, and one more with each.
pub(crate) type Numbered = (u64, v1::ClusterEvent);

/// When this server saw a pod come to a point of its life; none of before its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moments {
    pub(crate) created: Option<Moment>,
    pub(crate) placed: Option<Moment>,
    pub(crate) running: Option<Moment>,
    pub(crate) terminating: Option<Moment>,
    pub(crate) stopped: Option<Moment>,
}

impl Default for Happenings {
    fn default() -> Happenings {
        Happenings {
            run: format!("{:016x}", rand::random::<u64>()),
            kept: Mutex::default(),
            moments: Mutex::default(),
            news: broadcast::Sender::new(BEHIND_MAX),
        }
    }
}

impl Happenings {
    /// `node` tells what happened to its pods. What it says of another node's is refused, with that node's name.
    pub(crate) fn heard(&self, node: &str, state: &State, message: v1::PodEvents) {
        if message.lost > 0 {
            self.keep(event(
                node,
                "lost",
                None,
                format!("{} events were not kept by their node", message.lost),
            ));
        }
        for told in message.events {
            if self.is_own(state, node, &PodId(told.pod.clone()), "an event") {
                let kept = event(node, &told.kind, Some(told.pod), told.what);
                self.keep(v1::ClusterEvent { unix_ms: told.unix_ms, ..kept });
            }
        }
    }

    /// Whether a pod is the node's to speak of. What it says of another's is refused, and told with the owner's name.
    pub(crate) fn is_own(&self, state: &State, node: &str, pod: &PodId, what: &'static str) -> bool {
        match ownership::check_node(state, node, pod, what) {
            Ok(()) => true,
            Err(refused) => {
                warn!(%node, %pod, owner = refused.owner, "{refused}");
                self.keep(event("server", "refused", Some(pod.to_string()), refused.to_string()));
                false
            }
        }
    }

    /// Takes note of the pods that a revision moves on.
    pub(crate) fn committed(&self, revision: &Revision, now: Moment) {
        let mut moments = lock(&self.moments);
        for change in &revision.changes {
            let Key::Pod(id) = &change.key else { continue };
            match &change.new {
                Some(Value::Pod(pod)) => {
                    moments.entry(id.clone()).or_default().see(pod, change.old.is_none(), now)
                }
                _ => drop(moments.remove(id)),
            }
        }
    }

    pub(crate) fn moments(&self, pod: &PodId) -> Moments {
        lock(&self.moments).get(pod).copied().unwrap_or_default()
    }

    /// The name of this server's life.
    pub(crate) fn run(&self) -> &str {
        &self.run
    }

    /// Events of a pod, or of all, that came after a number and are kept, the oldest first; how many that came are not
    /// kept any more; and the number of the last that came.
    pub(crate) fn kept(&self, pod: &str, after: u64) -> (Vec<Numbered>, u64, u64) {
        let kept = lock(&self.kept);
        let lost = (kept.last - kept.events.len() as u64).saturating_sub(after);
        let later = kept.events.iter().filter(|(number, event)| *number > after && is_about(event, pod));
        (later.cloned().collect(), lost, kept.last)
    }

    /// Events from now on.
    pub(crate) fn follow(&self) -> broadcast::Receiver<Numbered> {
        self.news.subscribe()
    }

    fn keep(&self, event: v1::ClusterEvent) {
        let mut kept = lock(&self.kept);
        if kept.events.len() == KEPT_MAX {
            kept.events.pop_front();
        }
        kept.last += 1;
        let numbered = (kept.last, event);
        kept.events.push_back(numbered.clone());
        // Without readers there is nobody to tell.
        let _ = self.news.send(numbered);
    }
}

impl Moments {
    fn see(&mut self, pod: &Pod, is_new: bool, now: Moment) {
        if is_new {
            self.created = Some(now);
        }
        let once = |moment: &mut Option<Moment>, is: bool| match is {
            true => *moment = moment.or(Some(now)),
            false => *moment = None,
        };
        once(&mut self.placed, pod.node.is_some());
        once(&mut self.running, pod.phase == PodPhase::Running);
        once(&mut self.terminating, pod.phase == PodPhase::Terminating);
        once(&mut self.stopped, pod.stop);
    }
}

/// Whether an event is of this pod; of an empty name every event is.
pub(crate) fn is_about(event: &v1::ClusterEvent, pod: &str) -> bool {
    pod.is_empty() || event.pods.iter().any(|other| other == pod)
}

fn event(by: &str, kind: &str, pod: Option<String>, what: String) -> v1::ClusterEvent {
    let by = if by == "server" { by.to_owned() } else { format!("node:{by}") };
    let pods = pod.into_iter().map(clean).collect();
    let unix_ms = clock::wall().0;
    v1::ClusterEvent {
        unix_ms,
        by,
        kind: clean(kind.to_owned()),
        pods,
        what: clean(what),
        ..Default::default()
    }
}

/// What a node says is shown on terminals: no control characters, and not too long.
fn clean(text: String) -> String {
    text[..text.floor_char_boundary(TEXT_LEN_MAX)]
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pod: &str, what: &str) -> v1::PodEvents {
        let event =
            v1::PodEvent { pod: pod.into(), kind: "pod-running".into(), what: what.into(), unix_ms: 7 };
        v1::PodEvents { events: vec![event], lost: 0 }
    }

    #[test]
    fn events_are_kept_by_pod_without_what_commands_a_terminal() {
        let happenings = Happenings::default();
        let mut follower = happenings.follow();
        happenings.heard("n1", &State::default(), told("a", "one\x1b[2Jtwo"));
        happenings.heard("n1", &State::default(), told("b", "x"));
        let (kept, ..) = happenings.kept("a", 0);
        assert_eq!(
            (kept.len(), kept[0].1.what.as_str(), kept[0].1.by.as_str()),
            (1, "one [2Jtwo", "node:n1")
        );
        let numbers =
            |after| happenings.kept("", after).0.into_iter().map(|(number, _)| number).collect::<Vec<_>>();
        assert_eq!((numbers(0), numbers(1), numbers(2)), (vec![1, 2], vec![2], vec![]));
        assert_eq!(follower.try_recv().unwrap(), kept[0]);
        assert_ne!(happenings.run(), Happenings::default().run());
    }

    #[test]
    fn the_newest_events_are_kept_and_each_is_bounded() {
        let happenings = Happenings::default();
        for n in 0..=KEPT_MAX {
            happenings.heard("n1", &State::default(), told(&format!("p{n}"), &"é".repeat(1_000)));
        }
        let (kept, lost, last) = happenings.kept("", 0);
        assert_eq!((kept.len(), lost, last), (KEPT_MAX, 1, KEPT_MAX as u64 + 1));
        assert_eq!(happenings.kept("", 1).1, 0, "who has seen it has lost nothing");
        assert!(happenings.kept("p0", 0).0.is_empty());
        assert!(happenings.kept("p1", 0).0[0].1.what.len() <= TEXT_LEN_MAX);
    }
}
