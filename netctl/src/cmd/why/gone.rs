//! A pod that is gone: when and why it ended, and what came instead.

use std::fmt;

use hextet_api::v1::{self, PodPhase};
use serde::Serialize;

use crate::{cmd::age, print};

/// How a pod came to its end.
#[derive(Debug, Serialize)]
pub(super) struct Gone {
    revision: u64,
    time_unix_ms: u64,
    why: String,
    /// The change by which it had to end; none when the history does not reach back to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped: Option<Stopped>,
    instead: Vec<Instead>,
    instead_total: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    otherwise: String,
    #[serde(skip)]
    age: String,
}

#[derive(Debug, Serialize)]
struct Stopped {
    revision: u64,
    time_unix_ms: u64,
    by: String,
    message: String,
    #[serde(skip)]
    age: String,
}

#[derive(Debug, Serialize)]
struct Instead {
    pod: String,
    node: String,
    state: &'static str,
    version: u32,
}

/// How a task or a hook failed last.
#[derive(Debug, Serialize)]
pub(super) struct Ending {
    what: String,
    output: String,
    time_unix_ms: u64,
    version: u32,
    #[serde(skip)]
    age: String,
}

impl Gone {
    pub(super) fn new(gone: v1::GonePod, now: u64) -> Gone {
        let stopped = (gone.stopped_revision > 0).then(|| Stopped {
            revision: gone.stopped_revision,
            time_unix_ms: gone.stopped_unix_ms,
            by: gone.by,
            message: gone.message,
            age: age(gone.stopped_unix_ms, now),
        });
        Gone {
            revision: gone.revision,
            time_unix_ms: gone.unix_ms,
            why: gone.why,
            stopped,
            instead: gone.instead.into_iter().map(Instead::new).collect(),
            instead_total: gone.instead_total,
            otherwise: gone.otherwise,
            age: age(gone.unix_ms, now),
        }
    }

    /// When it ended and why: in its own words, else in those of the change.
    pub(super) fn sentence(&self, pod: &v1::Pod) -> String {
        let id = &pod.id;
        let place = if pod.node.is_empty() { String::new() } else { format!(" on {}", pod.node) };
        let why = match (&self.stopped, self.why.as_str()) {
            (Some(stopped), "") => &stopped.message,
            (None, "") => "the history does not reach back to why",
            (_, why) => why,
        };
        let (age, revision) = (&self.age, self.revision);
        if pod.phase() == PodPhase::Terminating || pod.node.is_empty() {
            return format!("{id} is gone: it ended{place} {age} ago (revision {revision}): {why}");
        }
        // Its node has not said that it ended.
        format!(
            "{id} is gone: it was given up{place} {age} ago (revision {revision}), where it may have run on until the node \
             heard of that: {why}"
        )
    }
}

impl Instead {
    fn new(pod: v1::Pod) -> Instead {
        let state = crate::cmd::pods::state(pod.phase());
        Instead { pod: pod.id, node: pod.node, state, version: pod.job_version }
    }
}

impl Ending {
    pub(super) fn new(ending: v1::LastEnding, now: u64) -> Ending {
        Ending {
            age: age(ending.unix_ms, now),
            what: ending.what,
            output: ending.output,
            time_unix_ms: ending.unix_ms,
            version: ending.job_version,
        }
    }
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.stopped {
            // The sentence has its words.
            Some(Stopped { by, age, revision, .. }) if self.why.is_empty() => {
                writeln!(f, "That was done by {by}, {age} ago (revision {revision})")?;
            }
            Some(Stopped { by, age, revision, message, .. }) => {
                writeln!(f, "That was done by {by}, {age} ago (revision {revision}): {message}")?;
            }
            None => writeln!(f, "Who did that is not in the history any more")?,
        }
        if self.instead.is_empty() {
            return writeln!(f, "Nothing came instead: {}", self.otherwise);
        }
        writeln!(f, "Made after it, and there now:")?;
        for Instead { pod, node, state, version } in &self.instead {
            let place = if node.is_empty() { "nowhere" } else { node };
            writeln!(f, "  {pod} of version {version}: {state} on {place}")?;
        }
        match (self.instead_total as usize).saturating_sub(self.instead.len()) {
            0 => Ok(()),
            more => writeln!(f, "  and {more} more"),
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ending { what, output, version, age, .. } = self;
        let said = if output.is_empty() { "; it wrote nothing" } else { "; its last lines:" };
        writeln!(f, "It failed first so {age} ago, in version {version}: {what}{said}")?;
        write!(f, "{}", print::quoted(output))
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::cmd::why::Explanation;

    fn pod(id: &str, node: &str, version: u32, phase: PodPhase) -> v1::Pod {
        v1::Pod {
            id: id.into(),
            node: node.into(),
            job_version: version,
            phase: phase.into(),
            ..Default::default()
        }
    }

    fn explained(gone: v1::GonePod, ending: Option<v1::LastEnding>) -> String {
        explained_last(PodPhase::Terminating, gone, ending)
    }

    fn explained_last(phase: PodPhase, gone: v1::GonePod, ending: Option<v1::LastEnding>) -> String {
        let pod = Some(pod("shop-web-aaaaa", "n1", 4, phase));
        let answer = v1::ExplainPodResponse { pod, gone: Some(gone), ending, ..Default::default() };
        Explanation::of(answer, 300_000).to_string()
    }

    fn gone() -> v1::GonePod {
        v1::GonePod {
            revision: 17,
            unix_ms: 180_000,
            stopped_revision: 15,
            stopped_unix_ms: 178_000,
            by: "deploy".into(),
            message: "deploy shop@4 failed: it goes back".into(),
            why: "the rollout wants 0 pods of version 4".into(),
            instead: vec![pod("shop-web-bbbbb", "n2", 5, PodPhase::Running)],
            instead_total: 3,
            otherwise: String::new(),
        }
    }

    #[test]
    fn a_pod_that_is_gone_says_when_and_why_and_what_came_instead() {
        let ending = v1::LastEnding {
            what: "task web: exited with status 3 after 0.1 s".into(),
            output: "connecting\nno such table".into(),
            unix_ms: 120_000,
            job_version: 4,
        };
        expect![[r"
            shop-web-aaaaa is gone: it ended on n1 2m0s ago (revision 17): the rollout wants 0 pods of version 4
            That was done by deploy, 2m2s ago (revision 15): deploy shop@4 failed: it goes back
            Made after it, and there now:
              shop-web-bbbbb of version 5: running on n2
              and 2 more

            It failed first so 3m0s ago, in version 4: task web: exited with status 3 after 0.1 s; its last lines:
                | connecting
                | no such table
        "]]
        .assert_eq(&explained(gone(), Some(ending)));
    }

    #[test]
    fn where_the_history_does_not_reach_is_said() {
        let forgotten = v1::GonePod {
            stopped_revision: 0,
            why: String::new(),
            instead: vec![],
            otherwise: "job shop is deleted".into(),
            ..gone()
        };
        expect![[r"
            shop-web-aaaaa is gone: it ended on n1 2m0s ago (revision 17): the history does not reach back to why
            Who did that is not in the history any more
            Nothing came instead: job shop is deleted
        "]]
        .assert_eq(&explained(forgotten, None));
    }

    /// It said that the pod had ended while it ran on a node that was only cut off.
    #[test]
    fn a_pod_that_was_replaced_may_have_run_on() {
        let text = explained_last(PodPhase::Lost, gone(), None);
        let said = "was given up on n1 2m0s ago (revision 17), where it may have run on until the node heard of that: ";
        assert!(text.contains(said), "{text}");
    }
}
