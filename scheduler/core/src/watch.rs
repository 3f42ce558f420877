//! One reader of the stream of endpoints: what it knows, and what it is told next.
//!
//! A reader that keeps up is told each revision that changes something for it. One that has fallen behind is told
//! the net change. Neither ever misses one and neither is told one twice.

use crate::{
    change::Revision,
    endpoint::{self, Endpoint, EndpointDiff, Selection, Selector},
    state::State,
};

/// A change of more endpoints than this is told as a snapshot.
const EVENT_LEN_MAX: usize = 10_000;
/// A reader that has been away for more revisions than this gets a snapshot.
const REPLAY_MAX: u64 = 10_000;

/// Where a reader wants to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// Whether it read this store before.
    pub same_store: bool,
    /// The last revision that it has applied.
    pub from: u64,
}

/// How a stream begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// With everything.
    Snapshot,
    /// With the word that what it asks for is not there, and then with everything.
    Compacted,
    /// With the events after this revision, as they were, and a bookmark.
    Replay(u64),
}

/// What a reader is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Everything that is selected.
    Snapshot {
        /// The revision that it is of.
        revision: u64,
        /// In the order of the pods.
        endpoints: Vec<Endpoint>,
    },
    /// All that a revision changed, or the net change of several.
    Event {
        /// The last of them.
        revision: u64,
        /// What changed.
        diff: EndpointDiff,
    },
    /// Nothing that is selected has changed up to here.
    Bookmark {
        /// The last revision that was looked at.
        revision: u64,
    },
}

/// What one reader knows.
#[derive(Clone, Debug)]
pub struct Reader {
    selector: Selector,
    known: Selection,
    revision: u64,
}

/// How a stream begins for a reader that wants to go on at `resume`, when the log holds `oldest` to `newest`.
#[must_use]
pub fn begin(resume: Option<Resume>, oldest: u64, newest: u64) -> Begin {
    let Some(Resume { same_store, from }) = resume else { return Begin::Snapshot };
    if !same_store || from > newest || from.saturating_add(1) < oldest {
        return Begin::Compacted;
    }
    if newest - from > REPLAY_MAX { Begin::Snapshot } else { Begin::Replay(from) }
}

impl Reader {
    /// It knows nothing yet.
    #[must_use]
    pub fn new(selector: Selector) -> Reader {
        Reader { selector, known: Selection::new(), revision: 0 }
    }

    /// The last revision that it has been told of, or that changed nothing for it.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Everything.
    pub fn snapshot(&mut self, state: &State) -> Message {
        self.skip_to(state);
        Message::Snapshot { revision: self.revision, endpoints: self.known.values().cloned().collect() }
    }

    /// It will have been told everything up to this state by [`Reader::replay`].
    pub fn skip_to(&mut self, state: &State) {
        (self.known, self.revision) = (endpoint::select(state, &self.selector), state.revision());
    }

    /// What a revision from the log, up to the one that was skipped to, says to it.
    #[must_use]
    pub fn replay(&self, revision: &Revision) -> Option<Message> {
        let diff = endpoint::changed_by(revision, &self.selector);
        let is_told = !diff.is_empty() && revision.revision <= self.revision;
        is_told.then_some(Message::Event { revision: revision.revision, diff })
    }

    /// What the next revision says to it. One that it knows says nothing. `newest` is asked for the state only
    /// when the change is too large for an event.
    pub fn committed<S: AsRef<State>>(
        &mut self,
        revision: &Revision,
        newest: impl FnOnce() -> S,
    ) -> Option<Message> {
        if revision.revision <= self.revision {
            return None;
        }
        self.revision = revision.revision;
        let diff = endpoint::changed_by(revision, &self.selector);
        if diff.len() > EVENT_LEN_MAX {
            return Some(self.snapshot(newest().as_ref()));
        }
        diff.apply(&mut self.known);
        self.event(diff)
    }

    /// It has fallen too far behind to be told each revision: the net change up to this state.
    pub fn lagged(&mut self, state: &State) -> Option<Message> {
        let before = std::mem::take(&mut self.known);
        self.skip_to(state);
        let diff = endpoint::diff(&before, &self.known);
        if diff.len() > EVENT_LEN_MAX { Some(self.snapshot(state)) } else { self.event(diff) }
    }

    /// Nothing has changed for a while.
    #[must_use]
    pub fn bookmark(&self) -> Message {
        Message::Bookmark { revision: self.revision }
    }

    fn event(&self, diff: EndpointDiff) -> Option<Message> {
        (!diff.is_empty()).then_some(Message::Event { revision: self.revision, diff })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_goes_on_where_the_reader_was_when_the_log_still_knows() {
        let at = |from| Some(Resume { same_store: true, from });
        assert_eq!(begin(None, 1, 9), Begin::Snapshot);
        assert_eq!(begin(at(9), 1, 9), Begin::Replay(9));
        assert_eq!(begin(at(4), 5, 9), Begin::Replay(4), "the next one is the oldest");
        assert_eq!(begin(at(3), 5, 9), Begin::Compacted, "the next one is gone");
        assert_eq!(begin(at(10), 1, 9), Begin::Compacted, "it knows what this store does not");
        assert_eq!(begin(at(u64::MAX), 1, 9), Begin::Compacted);
        assert_eq!(begin(Some(Resume { same_store: false, from: 9 }), 1, 9), Begin::Compacted);
        assert_eq!(begin(at(1), 1, REPLAY_MAX + 2), Begin::Snapshot, "too long a way");
    }
}
