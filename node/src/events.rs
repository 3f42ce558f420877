//! What happened on this node that its administrator may want to know of: what others broke and the agent mended,
//! which pods were refused outside ports, who claims a pod's address.
//!
//! Kept in memory, the newest [`EVENTS_MAX`]; `netctl node events` asks for them, and each is a line of the log, too.

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use dataplane::{Author, Op, Subject, Trace};
use dataplane_core::Action;
use serde::{Deserialize, Serialize};
use tracing::warn;

/// The newest events that are kept.
pub(crate) const EVENTS_MAX: usize = 256;

/// Repairs of one look at the kernel that are told one by one; the rest is a number.
const REPAIRS_TOLD_MAX: usize = 30;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeEvent {
    /// When, in milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// What was found: `route fd00::/64 via fe80::2 dev eth0 proto hextet was removed`, which is mended then, or
    /// `pod web-1 was refused 7 new IPv4 flows`.
    pub what: String,
    /// Who did it, as far as the kernel says so.
    pub by: Option<String>,
}

/// The newest events, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct Events(VecDeque<NodeEvent>);

impl Events {
    /// Tells of everything that was mended, in the log as well.
    pub(crate) fn repaired(&mut self, repairs: &[Op], traces: &[Trace]) {
        for op in repairs.iter().take(REPAIRS_TOLD_MAX) {
            self.repair(op.found(), by(op, traces));
        }
        let rest = repairs.len().saturating_sub(REPAIRS_TOLD_MAX);
        if rest > 0 {
            let by = repairs.last().and_then(|op| by(op, traces));
            self.repair(format!("{rest} more things were removed or changed"), by);
        }
    }

    pub(crate) fn list(&self) -> Vec<NodeEvent> {
        self.0.iter().cloned().collect()
    }

    fn repair(&mut self, what: String, by: Option<String>) {
        warn!(by = by.as_deref().unwrap_or("unknown"), "repaired: {what}");
        self.keep(what, by);
    }

    /// Tells of something that nobody can mend here.
    pub(crate) fn happened(&mut self, what: String, by: Option<String>) {
        warn!(by, "{what}");
        self.keep(what, by);
    }

    fn keep(&mut self, what: String, by: Option<String>) {
        if self.0.len() == EVENTS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(NodeEvent { unix_ms: unix_ms(), what, by });
    }
}

/// Those who changed something of that kind, or, when the kernel names nobody, something that it goes down with.
fn by(op: &Op, traces: &[Trace]) -> Option<String> {
    let authors = subjects(&op.action).iter().map(|subject| {
        let about = traces.iter().filter(|trace| trace.subject == *subject);
        about.filter_map(|trace| trace.author.as_ref()).collect::<BTreeSet<&Author>>()
    });
    let authors = authors.into_iter().find(|authors| !authors.is_empty())?;
    Some(authors.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
}

/// What must have been changed for the operation to be needed, the most probable first.
fn subjects(action: &Action) -> &'static [Subject] {
    use Action::*;
    match action {
        RouteAdd(_) | RouteReplace(_) | RouteDelete(_) => &[Subject::Route, Subject::Address, Subject::Link],
        AddressAdd(_) | AddressDelete(_) => &[Subject::Address, Subject::Link],
        NeighbourSet(_) | NeighbourDelete(_) | ProxyAdd { .. } | ProxyDelete { .. } => {
            &[Subject::Neighbour, Subject::Link]
        }
        NetnsAdd | LinkAdd { .. } | LinkSet { .. } | LinkDelete { .. } | LoopbackUp | NdpSet { .. } => {
            &[Subject::Link]
        }
        NftSet(_) | NftDelete => &[Subject::Nftables],
        Attach { .. } | Detach { .. } => &[Subject::Filter, Subject::Link],
        // Files and maps: nothing tells who writes them.
        _ => &[],
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use dataplane_core::{NftTable, Place};

    use super::*;

    fn trace(subject: Subject, author: Option<(u32, &str)>) -> Trace {
        let author = author.map(|(pid, name)| Author { pid, name: Some(name.to_owned()) });
        Trace { subject, author, at: Instant::now() }
    }

    fn op(action: Action) -> Op {
        Op { pod: None, place: Place::Host, action }
    }

    #[test]
    fn who_did_it_is_who_changed_such_a_thing() {
        let traces = [
            trace(Subject::Route, None),
            trace(Subject::Nftables, Some((7, "nft"))),
            trace(Subject::Link, Some((9, "systemd-network"))),
        ];
        let mut events = Events::default();
        let link = Action::LinkDelete { dev: "hx0".to_owned() };
        let sysctl = Action::SysctlSet { key: "a".to_owned(), value: "1".to_owned() };
        events.repaired(&[Action::NftSet(NftTable::Other), link, sysctl].map(op), &traces);
        let by: Vec<_> = events.list().into_iter().map(|event| event.by).collect();
        let names =
            [Some("nft (process 7)".to_owned()), Some("systemd-network (process 9)".to_owned()), None];
        assert_eq!(by, names);
    }

    #[test]
    fn a_storm_is_told_in_few_words_and_old_events_go() {
        let repairs: Vec<Op> = (0..1000).map(|n| op(Action::LinkDelete { dev: format!("hx{n}") })).collect();
        let mut events = Events::default();
        events.repaired(&repairs, &[]);
        assert_eq!(events.list().len(), REPAIRS_TOLD_MAX + 1);
        assert!(events.list().last().unwrap().what.starts_with("970 more things"));
        (0..20).for_each(|_| events.repaired(&repairs, &[]));
        assert_eq!(events.list().len(), EVENTS_MAX);
    }
}
