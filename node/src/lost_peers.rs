//! Peers whose lease has ended: each is asked whether it is there, again and again, and has no routes while it does not
//! answer. One that is only cut off from the server answers, and its traffic goes on. Pure: time is an argument.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
    time::Duration,
};

use dataplane::Reachability;
use rand::Rng;
use tokio::time::Instant;

use crate::assignment::Peer;

/// A peer that was asked is asked again after so long: it may have come back, or died after all.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// One that does not answer is asked ever more rarely, after a quarter of the time that it has been silent for: each
/// question is a multicast frame of each node.
const ASK_AGAIN_MAX: Duration = Duration::from_secs(300);
/// While the uplink is down nobody can answer.
const ASK_WITHOUT_LINK: Duration = Duration::from_secs(1);
/// How often it is looked whether it has answered. The kernel gives up after 3 s (`ucast_solicit`, `retrans_time_ms`).
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// The peers whose lease has ended.
#[derive(Debug, Default)]
pub(crate) struct LostPeers {
    peers: BTreeMap<String, Lost>,
}

#[derive(Clone, Copy, Debug)]
struct Lost {
    address: Ipv6Addr,
    /// When it is asked next.
    ask: Instant,
    /// When it is looked whether it has answered; none when it is known.
    look: Option<Instant>,
    silent: bool,
    /// Hosts of the link were made to doubt its pods' addresses.
    doubted: bool,
    /// Since when it has not answered.
    since: Instant,
}

/// What is to be done now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Due {
    /// The kernel is to ask these.
    pub(crate) ask: Vec<(String, Ipv6Addr)>,
    /// It has asked these.
    pub(crate) look: Vec<(String, Ipv6Addr)>,
}

impl LostPeers {
    /// Takes in who is lost; those that come new are due at once, and returned.
    pub(crate) fn follow(&mut self, peers: &BTreeMap<String, Peer>, now: Instant) -> Vec<String> {
        let is_lost = |name: &String, lost: &Lost| {
            peers.get(name).is_some_and(|peer| peer.lost && peer.underlay == lost.address)
        };
        self.peers.retain(|name, lost| is_lost(name, lost));
        let mut new = Vec::new();
        for (name, peer) in peers.iter().filter(|(_, peer)| peer.lost) {
            self.peers.entry(name.clone()).or_insert_with(|| {
                new.push(name.clone());
                Lost {
                    address: peer.underlay,
                    ask: now,
                    look: None,
                    silent: false,
                    doubted: false,
                    since: now,
                }
            });
        }
        new
    }

    /// When [`LostPeers::due`] is to be asked.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.peers.values().map(|lost| lost.look.map_or(lost.ask, |look| look.min(lost.ask))).min()
    }

    /// Whom to ask, and whose answer to look for.
    pub(crate) fn due(&mut self, now: Instant, rng: &mut impl Rng) -> Due {
        let mut due = Due::default();
        for (name, lost) in &mut self.peers {
            let one = (name.clone(), lost.address);
            if lost.ask <= now {
                let wait = ((now - lost.since) / 4).clamp(ASK_AGAIN, ASK_AGAIN_MAX);
                // Not all nodes at once.
                let wait = wait.mul_f64(rng.random_range(0.5..=1.0));
                (lost.ask, lost.look) = (now + wait, Some(now + LOOK_AGAIN));
                due.ask.push(one);
            } else if lost.look.is_some_and(|look| look <= now) {
                lost.look = Some(now + LOOK_AGAIN);
                due.look.push(one);
            }
        }
        due
    }

    /// What the kernel knows of a peer that it has asked. Whether that makes a difference.
    pub(crate) fn heard(&mut self, name: &str, reachability: Reachability, now: Instant) -> bool {
        let Some(lost) = self.peers.get_mut(name) else { return false };
        let silent = match reachability {
            Reachability::Unknown => return false,
            Reachability::Reachable => false,
            Reachability::Unreachable => true,
        };
        lost.look = None;
        if !silent {
            lost.since = now;
            lost.doubted = false;
        }
        std::mem::replace(&mut lost.silent, silent) != silent
    }

    /// The uplink is down: what is not known yet is asked anew.
    pub(crate) fn without_link(&mut self, now: Instant) {
        for lost in self.peers.values_mut().filter(|lost| lost.look.is_some()) {
            (lost.ask, lost.look) = (now + ASK_WITHOUT_LINK, None);
        }
    }

    /// The addresses of dead peers' pods that hosts of the link are to doubt, each once.
    pub(crate) fn doubts(&mut self, peers: &BTreeMap<String, Peer>) -> Vec<Ipv6Addr> {
        let mut doubts = Vec::new();
        for (name, lost) in self.peers.iter_mut().filter(|(_, lost)| lost.silent && !lost.doubted) {
            let left = peers.get(name).map_or(&[][..], |peer| &peer.left);
            lost.doubted = !left.is_empty();
            doubts.extend(left);
        }
        doubts
    }

    /// The peers that do not answer.
    pub(crate) fn silent(&self) -> BTreeSet<String> {
        self.peers.iter().filter(|(_, lost)| lost.silent).map(|(name, _)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use hextet_address::NodePrefix;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    fn peers(lost: &[&str]) -> BTreeMap<String, Peer> {
        let prefix = NodePrefix::new("fd00:1:2:3::/64".parse().unwrap()).unwrap();
        let one = |name: &&str| {
            (
                (*name).to_owned(),
                Peer { prefix, underlay: address(name), lost: lost.contains(name), left: vec![] },
            )
        };
        ["n2", "n3"].iter().map(one).collect()
    }

    fn address(name: &str) -> Ipv6Addr {
        format!("2001:db8::{}", &name[1..]).parse().unwrap()
    }

    fn rng() -> StdRng {
        StdRng::seed_from_u64(1)
    }

    fn named(names: &[&str]) -> Vec<(String, Ipv6Addr)> {
        names.iter().map(|name| ((*name).to_owned(), address(name))).collect()
    }

    #[test]
    fn a_lost_peer_is_asked_at_once_and_looked_at_until_it_is_known() {
        let (mut lost, start) = (LostPeers::default(), Instant::now());
        lost.follow(&peers(&[]), start);
        assert_eq!(lost.next(), None);
        assert_eq!(lost.follow(&peers(&["n2"]), start), ["n2"]);
        assert!(lost.follow(&peers(&["n2"]), start).is_empty());
        assert_eq!(lost.next(), Some(start));
        assert_eq!(lost.due(start, &mut rng()), Due { ask: named(&["n2"]), look: vec![] });
        for n in 1..=3 {
            let now = start + LOOK_AGAIN * n;
            assert_eq!(lost.next(), Some(now));
            assert_eq!(lost.due(now, &mut rng()), Due { ask: vec![], look: named(&["n2"]) });
            assert!(!lost.heard("n2", Reachability::Unknown, now));
        }
        assert!(lost.silent().is_empty());
        assert!(lost.heard("n2", Reachability::Unreachable, start));
        assert_eq!(lost.silent(), BTreeSet::from(["n2".to_owned()]));
        let next = lost.next().unwrap() - start;
        assert!(ASK_AGAIN / 2 <= next && next <= ASK_AGAIN, "{next:?}");
    }

    #[test]
    fn it_is_asked_for_as_long_as_it_is_lost_and_may_come_back_or_die_meanwhile() {
        let (mut lost, mut now) = (LostPeers::default(), Instant::now());
        lost.follow(&peers(&["n2"]), now);
        let all = [
            Reachability::Reachable,
            Reachability::Unreachable,
            Reachability::Unreachable,
            Reachability::Reachable,
        ];
        let changes = all.map(|reachability| {
            assert_eq!(lost.due(now, &mut rng()).ask, named(&["n2"]));
            now += LOOK_AGAIN;
            assert_eq!(lost.due(now, &mut rng()).look, named(&["n2"]));
            let is_change = lost.heard("n2", reachability, now);
            now = lost.next().unwrap();
            is_change
        });
        assert_eq!(changes, [false, true, false, true]);
    }

    #[test]
    fn one_that_reports_again_or_has_gone_is_forgotten_and_one_that_moved_is_asked_anew() {
        let (mut lost, now) = (LostPeers::default(), Instant::now());
        lost.follow(&peers(&["n2", "n3"]), now);
        lost.due(now, &mut rng());
        lost.heard("n2", Reachability::Unreachable, now);
        lost.heard("n3", Reachability::Unreachable, now);
        lost.follow(&peers(&["n3"]), now);
        assert_eq!(lost.silent(), BTreeSet::from(["n3".to_owned()]));
        let mut moved = peers(&["n3"]);
        moved.get_mut("n3").unwrap().underlay = address("n9");
        lost.follow(&moved, now);
        assert!(lost.silent().is_empty());
        assert_eq!(lost.due(now, &mut rng()).ask, [("n3".to_owned(), address("n9"))]);
        lost.follow(&BTreeMap::new(), now);
        assert_eq!((lost.next(), lost.heard("n3", Reachability::Unreachable, now)), (None, false));
    }

    #[test]
    fn the_silent_are_asked_ever_more_rarely_and_nobody_while_the_link_is_down() {
        let (mut lost, mut now) = (LostPeers::default(), Instant::now());
        lost.follow(&peers(&["n2"]), now);
        let mut waits = Vec::new();
        for _ in 0..40 {
            lost.due(now, &mut rng());
            lost.heard("n2", Reachability::Unreachable, now);
            waits.push(lost.next().unwrap() - now);
            now = lost.next().unwrap();
        }
        assert!(waits[3] <= ASK_AGAIN, "as often at first: {waits:?}");
        assert!(waits[39] >= ASK_AGAIN_MAX / 2 && waits[39] <= ASK_AGAIN_MAX, "{waits:?}");
        lost.due(now, &mut rng());
        lost.without_link(now);
        assert_eq!(lost.next(), Some(now + ASK_WITHOUT_LINK));
        assert_eq!(lost.due(now + ASK_WITHOUT_LINK, &mut rng()).ask, named(&["n2"]));
    }

    #[test]
    fn addresses_are_doubted_once_also_when_they_are_named_late() {
        let (mut lost, now) = (LostPeers::default(), Instant::now());
        let mut all = peers(&["n2"]);
        lost.follow(&all, now);
        lost.due(now, &mut rng());
        assert!(lost.doubts(&all).is_empty());
        lost.heard("n2", Reachability::Unreachable, now);
        assert!(lost.doubts(&all).is_empty());
        all.get_mut("n2").unwrap().left = vec![address("n7")];
        assert_eq!(lost.doubts(&all), [address("n7")]);
        assert!(lost.doubts(&all).is_empty());
    }
}
