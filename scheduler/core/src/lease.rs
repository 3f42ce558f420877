//! Which nodes have reported lately. A lease ends when no report has come for its time.
//!
//! Kept in memory alone and measured on the monotonic clock: a server that starts gives every node time to
//! come back, and a server that was itself stopped for a while does not blame the nodes for it.

use std::{collections::BTreeMap, time::Duration};

use crate::time::Moment;

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
