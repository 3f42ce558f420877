//! How a pod failed last, kept beside its record for as long as that, and in the log for as long as that.

use std::sync::Arc;

use hextet_lifecycle::Ending;
use serde::{Deserialize, Serialize};

use crate::{
    change::{Key, Value},
    draft::Draft,
    pod::{Pod, PodPhase},
    time::WallTime,
};

/// How a task or a hook of a pod ended last, and what it wrote before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastEnding {
    /// What ended, and how.
    pub what: String,
    /// The last lines that it wrote.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
    /// When its node said so first.
    pub time: WallTime,
    /// The version of the job that the pod was of.
    pub job_version: u32,
    /// It was the last attempt of a hook that is not optional.
    #[serde(default, skip_serializing_if = "is_false")]
    pub for_good: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_false(it: &bool) -> bool {
    !*it
}

impl LastEnding {
    /// Whether this is how the pod is failed now: it may have failed so in another version, or before something else did.
    #[must_use]
    pub fn is_why(&self, pod: &Pod) -> bool {
        let subject = |text: &str| text.split(':').next().map(str::to_owned);
        let is_now = pod.phase != PodPhase::Failed || subject(&pod.message) == subject(&self.what);
        self.job_version == pod.job_version && is_now
    }

    /// What its node said.
    #[must_use]
    pub fn said(&self) -> Ending {
        Ending { what: self.what.clone(), output: self.output.clone(), for_good: self.for_good }
    }
}

/// Keeps what a node says, unless it is what is kept already of this version: a pod that fails again and again costs the log its text
/// once.
pub(crate) fn keep(draft: &mut Draft<'_>, (pod, job_version): (&Pod, u32), said: &Ending, now: WallTime) {
    let is_known = |kept: &Arc<LastEnding>| kept.job_version == job_version && kept.said().is_like(said);
    if draft.ending(&pod.id).is_some_and(is_known) {
        return;
    }
    let Ending { what, output, .. } = Ending::new(&said.what, said.output.as_bytes());
    let ending = LastEnding { what, output, time: now, job_version, for_good: said.for_good };
    draft.put(Key::Ending(pod.id.clone()), Some(Value::Ending(Arc::new(ending))));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{pod::PodId, quantity::Resources};

    fn pod(phase: PodPhase, message: &str, job_version: u32) -> Pod {
        Pod {
            id: PodId("a-b-00000".to_owned()),
            job: "a".to_owned(),
            group: "b".to_owned(),
            job_version,
            serial: 0,
            resources: Resources::default(),
            countables: Default::default(),
            node: None,
            address: None,
            phase,
            message: message.to_owned(),
            created: WallTime(0),
            restarts: 1,
            stop: false,
            standby: false,
        }
    }

    #[test]
    fn what_is_kept_is_why_only_while_it_is() {
        let (what, output) = ("task t: exited with status 3".to_owned(), "no such table".to_owned());
        let ending = LastEnding { what, output, time: WallTime(0), job_version: 2, for_good: false };
        let failed = |message: &str, version| ending.is_why(&pod(PodPhase::Failed, message, version));
        assert!(failed("task t: exited with status 4 after 9.0 s", 2));
        assert!(!failed("task t: exited with status 3", 3), "another version");
        assert!(!failed("supervisor: it was killed", 2), "something else");
        assert!(ending.is_why(&pod(PodPhase::Running, "", 2)), "it was started again");
    }
}
