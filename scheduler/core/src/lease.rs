//! Which nodes have reported lately. A lease ends when no report has come for its time.
//!
//! Kept in memory alone and measured on the monotonic clock: a server that starts gives every node time to
//! come back, and a server that was itself stopped for a while does not blame the nodes for it.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    change::{Key, Revision, Value},
    node::NodePhase,
    state::State,
    time::Moment,
};

/// How many leases a node has time to come back after the server has started.
const LEASES_AT_START: u32 = 3;

/// Leases of nodes by name.
#[derive(Clone, Debug)]
pub struct Leases {
    lease: Duration,
    ends: BTreeMap<String, Moment>,
    looked: Moment,
}

impl Leases {
    /// No leases yet; each will be of this length.
    #[must_use]
    pub fn new(lease: Duration, now: Moment) -> Leases {
        Leases { lease, ends: BTreeMap::new(), looked: now }
    }

    /// A server starts: every node that was there has time to come back.
    #[must_use]
    pub fn resume(state: &State, lease: Duration, now: Moment) -> Leases {
        let mut leases = Leases::new(lease, now);
        for node in state.nodes().values().filter(|node| node.phase == NodePhase::Ready) {
            leases.extend(&node.name, now + lease * LEASES_AT_START);
        }
        leases
    }

    /// A node that is ready has a lease; one that is lost or deleted has none.
    pub fn committed(&mut self, revision: &Revision, now: Moment) {
        for change in &revision.changes {
            let Key::Node(name) = &change.key else { continue };
            match &change.new {
                Some(Value::Node(node)) if node.phase == NodePhase::Ready => self.renew(name, now),
                _ => self.forget(name),
            }
        }
    }

    /// How long a lease is.
    #[must_use]
    pub fn length(&self) -> Duration {
        self.lease
    }

    /// A report of `node` has come.
    pub fn renew(&mut self, node: &str, now: Moment) {
        self.extend(node, now + self.lease);
    }

    /// Gives `node` until then, if it does not have longer already.
    pub fn extend(&mut self, node: &str, until: Moment) {
        match self.ends.get_mut(node) {
            Some(end) => *end = until.max(*end),
            None => drop(self.ends.insert(node.to_owned(), until)),
        }
    }

    /// The node is lost or deleted: it has no lease until it reports again.
    pub fn forget(&mut self, node: &str) {
        self.ends.remove(node);
    }

    /// Whether the lease of `node` runs.
    #[must_use]
    pub fn runs(&self, node: &str, now: Moment) -> bool {
        self.ends.get(node).is_some_and(|end| now < *end)
    }

    /// Nodes of this state that are to be lost: their lease has ended. One that is lost or deleted may have
    /// reported once more: its lease means nothing until it is ready again. As often as [`Leases::ended`].
    pub fn lost(&mut self, state: &State, now: Moment) -> Vec<String> {
        let is_ready =
            |name: &String| state.nodes().get(name).is_some_and(|node| node.phase == NodePhase::Ready);
        let (lost, stale) = self.ended(now).into_iter().partition::<Vec<_>, _>(is_ready);
        stale.iter().for_each(|name| self.forget(name));
        lost
    }

    /// Nodes whose lease has ended and is not yet forgotten. It must be called at least twice in a lease's
    /// time: after a longer gap the server itself was stopped, could have read no report, and gives all
    /// nodes a lease anew.
    pub fn ended(&mut self, now: Moment) -> Vec<String> {
        let gap = now - self.looked;
        self.looked = now;
        if gap > self.lease / 2 {
            let until = now + self.lease;
            self.ends.values_mut().for_each(|end| *end = until.max(*end));
        }
        self.ends.iter().filter(|(_, end)| now >= **end).map(|(node, _)| node.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(4);

    #[test]
    fn a_lease_ends_when_no_report_comes() {
        let mut leases = leases();
        leases.renew("n1", at(0));
        leases.renew("n2", at(2));
        assert_eq!(look(&mut leases, 2, 3), NONE);
        assert_eq!(look(&mut leases, 4, 5), ["n1"]);
        assert!(!leases.runs("n1", at(4)) && leases.runs("n2", at(4)) && !leases.runs("n3", at(4)));
        leases.renew("n1", at(5));
        assert_eq!(look(&mut leases, 6, 8), ["n2"]);
        leases.forget("n2");
        assert_eq!(look(&mut leases, 8, 8), NONE);
    }

    #[test]
    fn a_report_never_shortens_a_lease() {
        let mut leases = leases();
        leases.extend("n1", at(12));
        leases.renew("n1", at(1));
        assert!(leases.runs("n1", at(11)));
    }

    #[test]
    fn a_server_that_was_stopped_gives_all_nodes_a_lease() {
        let mut leases = leases();
        leases.renew("n1", at(0));
        assert_eq!(leases.ended(at(60)), NONE);
        assert_eq!(look(&mut leases, 61, 63), NONE);
        assert_eq!(leases.ended(at(64)), ["n1"]);
    }

    const NONE: [&str; 0] = [];

    fn leases() -> Leases {
        Leases::new(LEASE, at(0))
    }

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }

    /// Looks every second and gives what the last look found.
    fn look(leases: &mut Leases, from: u64, to: u64) -> Vec<String> {
        (from..=to).map(|second| leases.ended(at(second))).last().unwrap()
    }
}
