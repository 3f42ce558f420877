//! What the node says of its own accord about its pods' addresses, and when: advertisements to neighbours and
//! routers, and probes whether an address is another's.
//!
//! | frame | to | source |
//! | --- | --- | --- |
//! | advertisement, O=1, three times, [`RETRANS_TIMER`] apart | `ff02::1` | RFC 4861 section 7.2.6 |
//! | advertisement, O=0, once | `ff02::2` | RFC 9131 |
//! | advertisement of a dead node's address, O=0, once | `ff02::1` | RFC 4861 section 7.2.5 |
//! | probe with a nonce, once, if asked for | solicited-node group | RFC 4862 section 5.4, RFC 7527 section 4 |
//!
//! Of a dead node's addresses it says one thing, unless they are its own: an advertisement with O=0, so that whoever has
//! an entry asks again instead of trusting it (RFC 4861 section 7.2.5). Who is just asking takes this node's MAC address for
//! it, and is told by ICMP that the pod is unreachable.
//!
//! An address that is probed is used meanwhile (RFC 4429 section 3.3): its first advertisement says O=0, so that it
//! overrides nobody's, and those with O=1 follow when the probe has remained unanswered.
//!
//! [`Announcements`] is state, and time is an argument: the shell asks [`Announcements::next`] for frames until there
//! is none, sleeps until [`Announcements::wake`], and hands in what it hears.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::Ipv6Addr,
    time::Duration,
};

use crate::{Action, Mac, Op};

/// Between two frames about one address (RFC 4861 section 10, `RETRANS_TIMER`).
pub const RETRANS_TIMER: Duration = Duration::from_secs(1);

/// Frames in a second, over all addresses: a multicast frame costs every host of the LAN, and on a radio link it
/// is sent at the lowest rate. 10,000 new addresses are first heard of within 100 seconds, and meanwhile the
/// node answers for all of them.
pub const FRAMES_PER_SECOND_MAX: u32 = 200;

/// Frames that may be sent at once after silence: all about 32 new addresses.
pub const FRAMES_BURST_MAX: u32 = 64;

/// One address is reported to be another's no more often than this.
pub const CONFLICT_INTERVAL: Duration = Duration::from_secs(10);

/// Reports of conflicts in a second, over all addresses that are not being probed: whoever is on the LAN can claim
/// them all.
pub const CONFLICTS_PER_SECOND_MAX: u32 = 10;

/// Addresses that are kept, as many as the table of the NDP proxy holds. One more is not announced.
pub const ADDRESSES_MAX: usize = 131_072;

/// Addresses of dead nodes that wait to be spoken of. Of further ones nothing is said.
pub const DEAD_MAX: usize = 4_096;

/// What tells a probe from its own echo (RFC 7527 section 4.1).
pub type Nonce = [u8; 6];

/// A frame to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A neighbour advertisement with R=1 and S=0 that gives the uplink's MAC address for `address`.
    Advertisement {
        /// Source and target.
        address: Ipv6Addr,
        /// Whom it is for.
        to: Audience,
        /// The O flag.
        overrides: bool,
    },
    /// A neighbour solicitation from `::` to the solicited-node group of `address`.
    Probe {
        /// The target.
        address: Ipv6Addr,
        /// The nonce option.
        nonce: Nonce,
    },
}

/// Whom an advertisement is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// `ff02::1`: whoever has an entry.
    Nodes,
    /// `ff02::2`: routers, which make one (RFC 9131).
    Routers,
}

/// Something that was heard on the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The address.
    pub address: Ipv6Addr,
    /// Who said so.
    pub mac: Mac,
    /// How.
    pub kind: ClaimKind,
}

/// How somebody claims an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimKind {
    /// By an advertisement: it is theirs.
    Advertisement,
    /// By a probe: it is to become theirs.
    Probe(Option<Nonce>),
}

/// An address that the node answers for and another claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The address.
    pub address: Ipv6Addr,
    /// Who claims it.
    pub mac: Mac,
    /// It was being probed: the other machine answered, or probes for it at the same time. Otherwise it was said
    /// once, unasked, as anybody can say it of any address.
    pub probed: bool,
}

/// What is said about one address, one frame after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Probe,
    First,
    Routers,
    Second,
    Third,
    /// Nothing more; it is only watched.
    Done,
}

impl Step {
    /// The next one, and how long after this.
    fn next(self) -> (Step, Duration) {
        match self {
            Step::Probe => (Step::First, Duration::ZERO),
            Step::First => (Step::Routers, Duration::ZERO),
            Step::Routers => (Step::Second, RETRANS_TIMER),
            Step::Second => (Step::Third, RETRANS_TIMER),
            Step::Third | Step::Done => (Step::Done, Duration::ZERO),
        }
    }

    /// New addresses go before repetitions.
    fn round(self) -> usize {
        match self {
            Step::Probe | Step::First | Step::Routers => 0,
            Step::Second => 1,
            Step::Third | Step::Done => 2,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    step: Step,
    due: Duration,
    reported: Option<Duration>,
}

impl Entry {
    const WATCHED: Entry = Entry { step: Step::Done, due: Duration::ZERO, reported: None };
}

/// What is to be said, and what is listened for.
#[derive(Debug)]
pub struct Announcements {
    entries: BTreeMap<Ipv6Addr, Entry>,
    /// By round, then by time: addresses of which a frame is due.
    queues: [BTreeSet<(Duration, Ipv6Addr)>; 3],
    /// Addresses of which nobody knows yet whether they are another's.
    probes: BTreeMap<Ipv6Addr, Nonce>,
    /// Addresses of dead nodes, which come after all that is the node's own.
    dead: VecDeque<Ipv6Addr>,
    frames: Rate,
    conflicts: Rate,
}

impl Default for Announcements {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            queues: Default::default(),
            probes: BTreeMap::new(),
            dead: VecDeque::new(),
            frames: Rate::new(FRAMES_PER_SECOND_MAX, FRAMES_BURST_MAX),
            conflicts: Rate::new(CONFLICTS_PER_SECOND_MAX, CONFLICTS_PER_SECOND_MAX),
        }
    }
}

impl Announcements {
    /// Watches these addresses and no others. What is still to be said about others is not said.
    pub fn watch(&mut self, addresses: &BTreeSet<Ipv6Addr>) {
        let gone: Vec<_> =
            self.entries.keys().filter(|address| !addresses.contains(address)).copied().collect();
        for address in gone {
            self.stop(&address);
            self.entries.remove(&address);
        }
        for address in addresses {
            if self.entries.len() < ADDRESSES_MAX {
                self.entries.entry(*address).or_insert(Entry::WATCHED);
            }
        }
    }

    /// Begins to announce a watched address, from the start if it is being announced. With a nonce it is probed.
    pub fn announce(&mut self, now: Duration, address: Ipv6Addr, probe: Option<Nonce>) {
        if !self.entries.contains_key(&address) {
            return;
        }
        self.stop(&address);
        let step = if probe.is_some() { Step::Probe } else { Step::First };
        self.queues[step.round()].insert((now, address));
        let entry = self.entries.entry(address).or_insert(Entry::WATCHED);
        (entry.step, entry.due) = (step, now);
        self.probes.extend(probe.map(|nonce| (address, nonce)));
    }

    /// Announces everything again: the link's other end may be another, or the MAC address is.
    pub fn announce_all(&mut self, now: Duration) {
        let addresses: Vec<_> = self.entries.keys().copied().collect();
        for address in addresses {
            let probe = self.probes.get(&address).copied();
            self.announce(now, address, probe);
        }
    }

    /// Makes whoever has an entry for these addresses ask again: their node is dead. Not for those that are watched here.
    pub fn doubt(&mut self, addresses: &[Ipv6Addr]) {
        let room = DEAD_MAX - self.dead.len();
        let others = addresses.iter().filter(|address| !self.entries.contains_key(address));
        self.dead.extend(others.take(room));
    }

    /// The next frame to send now, if one is due and the rate allows it.
    pub fn next(&mut self, now: Duration) -> Option<Frame> {
        let due = |queue: &BTreeSet<(Duration, Ipv6Addr)>| queue.first().is_some_and(|(due, _)| *due <= now);
        let round = self.queues.iter().position(due);
        if round.is_none() && self.dead.is_empty() || !self.frames.take(now) {
            return None;
        }
        let Some(round) = round else {
            let address = self.dead.pop_front()?;
            return Some(Frame::Advertisement { address, to: Audience::Nodes, overrides: false });
        };
        let (_, address) = self.queues[round].pop_first()?;
        let entry = self.entries.get_mut(&address)?;
        let frame = frame(address, entry.step, self.probes.get(&address));
        if entry.step == Step::Second {
            self.probes.remove(&address);
        }
        let (step, wait) = entry.step.next();
        (entry.step, entry.due) = (step, now + wait);
        if step != Step::Done {
            self.queues[step.round()].insert((entry.due, address));
        }
        Some(frame)
    }

    /// When [`Announcements::next`] is to be asked again; `None` when nothing is to be said.
    pub fn wake(&self, now: Duration) -> Option<Duration> {
        let queued = self.queues.iter().filter_map(|queue| queue.first().map(|(due, _)| *due)).min();
        let due = if self.dead.is_empty() { queued? } else { now };
        Some(due.max(self.frames.next(now)))
    }

    /// Whether a probe is under way, so that others' probes matter.
    pub fn is_probing(&self) -> bool {
        !self.probes.is_empty()
    }

    /// Judges what was heard; `own` is the uplink's MAC address. Whoever claims an address that is being probed
    /// ends its announcement.
    pub fn hear(&mut self, now: Duration, own: Mac, claim: &Claim) -> Option<Conflict> {
        if claim.mac == own {
            return None;
        }
        match (claim.kind, self.probes.get(&claim.address)) {
            (ClaimKind::Advertisement, None) => self.report(now, claim),
            // Its own echo, from a bridge that put its own MAC address on it.
            (ClaimKind::Probe(Some(heard)), Some(nonce)) if heard == *nonce => None,
            // Not tentative any more: the answer defends it (RFC 4862 section 5.4.3).
            (ClaimKind::Probe(_), None) => None,
            (_, Some(_)) => Some(self.fail(now, claim)),
        }
    }

    /// A probe fails only once, so that these reports are as few as the addresses that the node makes.
    fn fail(&mut self, now: Duration, claim: &Claim) -> Conflict {
        self.stop(&claim.address);
        self.entries.entry(claim.address).and_modify(|entry| entry.reported = Some(now));
        Conflict { address: claim.address, mac: claim.mac, probed: true }
    }

    fn report(&mut self, now: Duration, claim: &Claim) -> Option<Conflict> {
        let entry = self.entries.get_mut(&claim.address)?;
        let silent = entry.reported.is_some_and(|at| now < at + CONFLICT_INTERVAL);
        if silent || !self.conflicts.take(now) {
            return None;
        }
        entry.reported = Some(now);
        Some(Conflict { address: claim.address, mac: claim.mac, probed: false })
    }

    /// Says nothing more about an address.
    fn stop(&mut self, address: &Ipv6Addr) {
        if let Some(entry) = self.entries.get_mut(address) {
            self.queues[entry.step.round()].remove(&(entry.due, *address));
            entry.step = Step::Done;
        }
        self.probes.remove(address);
    }
}

fn frame(address: Ipv6Addr, step: Step, probe: Option<&Nonce>) -> Frame {
    let (to, overrides) = match (step, probe) {
        (Step::Probe, Some(nonce)) => return Frame::Probe { address, nonce: *nonce },
        (Step::Routers, _) => (Audience::Routers, false),
        (Step::First, Some(_)) => (Audience::Nodes, false),
        _ => (Audience::Nodes, true),
    };
    Frame::Advertisement { address, to, overrides }
}

/// The addresses for which `ops` made the node answer, but for those that failed.
pub fn appeared<'a>(ops: &[Op], failed: impl Iterator<Item = &'a Op>) -> BTreeSet<Ipv6Addr> {
    let mut addresses: BTreeSet<_> = ops.iter().filter_map(answered).collect();
    for address in failed.filter_map(answered) {
        addresses.remove(&address);
    }
    addresses
}

fn answered(op: &Op) -> Option<Ipv6Addr> {
    match op.action {
        Action::NdpSet { address, .. } | Action::ProxyAdd { address, .. } => Some(address),
        _ => None,
    }
}

/// So many in a second, and so many at once after silence.
#[derive(Clone, Copy, Debug)]
struct Rate {
    interval: Duration,
    slack: Duration,
    /// When the last one taken would have been due at an even pace.
    even: Duration,
}

impl Rate {
    fn new(per_second: u32, burst: u32) -> Rate {
        let interval = Duration::from_secs(1) / per_second;
        Rate { interval, slack: interval * (burst - 1), even: Duration::ZERO }
    }

    fn take(&mut self, now: Duration) -> bool {
        if self.even > now + self.slack {
            return false;
        }
        self.even = self.even.max(now) + self.interval;
        true
    }

    /// The earliest time from `now` on at which one can be taken.
    fn next(&self, now: Duration) -> Duration {
        self.even.saturating_sub(self.slack).max(now)
    }
}

#[cfg(test)]
mod tests;
