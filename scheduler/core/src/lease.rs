//! Which nodes live, by what they say and by what their neighbours say of them.
//!
//! A node renews its lease several times a second. One that falls silent is asked about: other nodes of its link look
//! whether their kernels reach it, and nodes elsewhere, when there are none, whether it answers over the routes between. What follows is the table in `docs/node-states.md`.
//!
//! Kept in memory alone and measured on the monotonic clock: a server that starts gives every node time to
//! come back, and a server that was itself stopped for a while does not blame the nodes for it.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    change::{Key, Revision, Value},
    claim::{Claim, Claimant, IsCopy, Taken},
    event::Event,
    node::{Node, NodePhase},
    state::State,
    time::Moment,
};

/// A node is asked about when it has been silent for this part of a lease.
pub const SILENCES_PER_LEASE: u32 = 5;
/// How many leases a node has time to come back after the server has started.
const LEASES_AT_START: u32 = 3;
/// How many of its neighbours are asked about a node at a time.
pub const WITNESSES_MAX: usize = 3;
/// How long an answer is waited for. A witness takes 400 ms to be sure that nobody answers.
pub const ANSWER_MAX: Duration = Duration::from_millis(800);
/// A lease is over for its node when its length has gone by since the node sent what the server granted. The server waits
/// for this much more: clocks may differ by a hundredth, and what ends takes a moment to end.
pub const FENCE_MARGIN_DIVISOR: u32 = 4;

/// Leases of nodes by name.
#[derive(Clone, Debug)]
pub struct Leases {
    lease: Duration,
    nodes: BTreeMap<String, Lease>,
    looked: Moment,
    questions: u64,
}

#[derive(Clone, Debug)]
struct Lease {
    /// When it last gave a sign of life; in the future while it is given time to come back.
    renewed: Moment,
    /// When it has surely ended what only one node may run.
    fenced: Moment,
    phase: NodePhase,
    is_fenced: bool,
    /// Its stream was ended by its machine, which therefore lives: its agent has ended.
    has_ended: bool,
    inquiry: Option<Inquiry>,
    /// Which machine speaks for it.
    claim: Claim,
    /// Until then a machine that spoke for it before may hold what it was granted: nothing is granted anew.
    withheld: Moment,
}

/// What the neighbours of a silent node were asked.
#[derive(Clone, Debug)]
struct Inquiry {
    until: Moment,
    answers: BTreeMap<String, Option<bool>>,
    /// They are on other links: who does not reach it has said nothing.
    routed: bool,
}

/// What is to be done about silent nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// To be asked.
    pub questions: Vec<Question>,
    /// What the state does not hold yet; said again until it does.
    pub findings: Vec<Finding>,
}

/// One node is asked whether it reaches another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Who is asked.
    pub witness: String,
    /// About whom.
    pub about: String,
    /// It is on another link.
    pub routed: bool,
}

/// What is found out about a node that does not report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Nobody says that it is dead.
    CutOff(String),
    /// It is dead as far as anybody can tell, or has no agent.
    Lost(String),
    /// It has surely ended what only one node may run.
    Fenced(String),
}

/// What is found out as events, in the order in which they are to be brought about; none that is of no node.
#[must_use]
pub fn events(findings: Vec<Finding>) -> Vec<Event> {
    let (mut lost, mut cut_off, mut fenced) = (Vec::new(), Vec::new(), Vec::new());
    for finding in findings {
        match finding {
            Finding::Lost(node) => lost.push(node),
            Finding::CutOff(node) => cut_off.push(node),
            Finding::Fenced(node) => fenced.push(node),
        }
    }
    let of = |event: fn(Vec<String>) -> Event, nodes: Vec<String>| (!nodes.is_empty()).then(|| event(nodes));
    let events = [of(Event::LeaseEnded, lost), of(Event::CutOff, cut_off), of(Event::Fenced, fenced)];
    events.into_iter().flatten().collect()
}

impl Leases {
    /// No leases yet; each will be of this length.
    #[must_use]
    pub fn new(lease: Duration, now: Moment) -> Leases {
        Leases { lease, nodes: BTreeMap::new(), looked: now, questions: 0 }
    }

    /// How long a lease is.
    #[must_use]
    pub fn length(&self) -> Duration {
        self.lease
    }

    /// How long a node may be silent before its neighbours are asked about it.
    #[must_use]
    pub fn silence_max(&self) -> Duration {
        self.lease / SILENCES_PER_LEASE
    }

    /// A server starts: every node that was there has time to come back, and what an earlier server has granted is over
    /// only a whole lease from now.
    #[must_use]
    pub fn resume(state: &State, lease: Duration, now: Moment) -> Leases {
        let mut leases = Leases::new(lease, now);
        for node in state.nodes().values() {
            leases.follow(node, now);
        }
        leases.give_all(lease * LEASES_AT_START, now);
        leases
    }

    /// What the state holds of nodes now.
    pub fn committed(&mut self, revision: &Revision, now: Moment) {
        for change in &revision.changes {
            match (&change.key, &change.new) {
                (Key::Node(_), Some(Value::Node(node))) => self.follow(node, now),
                (Key::Node(name), _) => drop(self.nodes.remove(name)),
                _ => {}
            }
        }
    }

    fn follow(&mut self, node: &Node, now: Moment) {
        let fenced = self.fence_from(now);
        let lease = self.nodes.entry(node.name.clone()).or_insert_with(|| Lease {
            renewed: now,
            fenced,
            phase: node.phase,
            is_fenced: false,
            has_ended: false,
            inquiry: None,
            claim: Claim::of(node, fenced),
            withheld: Moment::default(),
        });
        // Whatever made it ready was a sign of life.
        if node.phase == NodePhase::Ready && lease.phase != NodePhase::Ready {
            lease.renewed = lease.renewed.max(now);
        }
        if node.fenced {
            lease.fenced = lease.fenced.min(now);
        }
        if gives_up(node) && (lease.phase, lease.is_fenced) != (node.phase, node.fenced) {
            lease.claim.free();
        }
        (lease.phase, lease.is_fenced) = (node.phase, node.fenced);
    }

    /// A machine asks to speak for `node`: it may, if no other does that may be alive.
    ///
    /// # Errors
    /// Another does.
    pub fn claim(&mut self, node: &str, by: Claimant<'_>, now: Moment) -> Result<Taken, IsCopy> {
        let (until, is_silent) = (self.fence_from(now), !self.runs(node, now));
        let Some(lease) = self.nodes.get_mut(node) else { return Ok(Taken::Again) };
        // That one is dead is an operator's word, and no proof that it has ended everything.
        let had_another = !lease.claim.is_free() || lease.phase == NodePhase::Dead;
        let taken = lease.claim.take(by, is_silent, now, until)?;
        if taken == Taken::Anew && had_another {
            lease.withheld = lease.fenced;
        }
        Ok(taken)
    }

    /// Whether a machine could speak for `node` now.
    ///
    /// # Errors
    /// Another does.
    pub fn may_claim(&self, node: &str, by: Claimant<'_>, now: Moment) -> Result<(), IsCopy> {
        let is_silent = !self.runs(node, now);
        self.nodes.get(node).map_or(Ok(()), |lease| lease.claim.check(by, is_silent, now).map(drop))
    }

    /// What a machine is told that has a key from before, while another one may be alive.
    #[must_use]
    pub fn claimed(&self, node: &str, now: Moment) -> Option<IsCopy> {
        self.nodes.get(node).and_then(|lease| lease.claim.held(now))
    }

    /// A sign of life of `node` has come.
    pub fn renew(&mut self, node: &str, now: Moment) {
        let (until, back) = (self.fence_from(now), now + self.lease);
        if let Some(lease) = self.nodes.get_mut(node) {
            // One that is back needs no more time for that, but perhaps for its other stream.
            lease.renewed = now.max(lease.renewed.min(back));
            lease.claim.renewed(until);
            (lease.has_ended, lease.inquiry) = (false, None);
        }
    }

    /// The node is told for how long its lease runs, as of when it asked. None when it may not be told: it is not ready. No
    /// time while the machine that spoke for it before may hold a lease.
    pub fn grant(&mut self, node: &str, now: Moment) -> Option<Duration> {
        let (fenced, length) = (self.fence_from(now), self.lease);
        let lease = self.nodes.get_mut(node).filter(|lease| lease.phase == NodePhase::Ready)?;
        if now < lease.withheld {
            return Some(Duration::ZERO);
        }
        lease.fenced = fenced.max(lease.fenced);
        Some(length)
    }

    /// The node's stream has ended, by its own machine's word if that comes at once.
    pub fn ended(&mut self, node: &str, now: Moment) {
        let silence_max = self.silence_max();
        if let Some(lease) = self.nodes.get_mut(node) {
            lease.has_ended = now - lease.renewed < silence_max;
        }
    }

    /// What `witness` says of `about`.
    pub fn answered(&mut self, witness: &str, about: &str, is_there: bool) {
        let inquiry = self.nodes.get_mut(about).and_then(|lease| lease.inquiry.as_mut());
        if let Some(answer) = inquiry.and_then(|inquiry| inquiry.answers.get_mut(witness)) {
            *answer = Some(is_there);
        }
    }

    /// Whether the lease of `node` runs.
    #[must_use]
    pub fn runs(&self, node: &str, now: Moment) -> bool {
        self.nodes.get(node).is_some_and(|lease| self.is_renewed(lease, now))
    }

    fn is_renewed(&self, lease: &Lease, now: Moment) -> bool {
        now - lease.renewed < self.silence_max()
    }

    /// Looks at every lease. It must be called several times in a silence: after a longer gap the server itself was
    /// stopped, could have read nothing, and gives all nodes time.
    pub fn look(&mut self, state: &State, now: Moment) -> Look {
        self.look_with(|name| state.neighbours(name), now)
    }

    fn look_with<'a>(&mut self, neighbours: impl Fn(&str) -> Vec<&'a str>, now: Moment) -> Look {
        let gap = now - self.looked;
        self.looked = now;
        if gap > self.silence_max() / 2 {
            self.give_all(self.lease, now);
            let until = self.fence_from(now);
            self.nodes.values_mut().for_each(|lease| lease.claim.renewed(until));
        }
        let mut look = Look::default();
        let mut elsewhere = None;
        // Most nodes report, and of them there is nothing to find.
        let is_silent = |lease: &Lease| lease.phase != NodePhase::Ready || !self.is_renewed(lease, now);
        let silent = self.nodes.iter().filter(|(_, lease)| is_silent(lease));
        for name in silent.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            look.findings.extend(self.fence_is_over(&name, now));
            if !self.runs(&name, now) && self.nodes[&name].phase.has_pods() {
                self.note_seen(&name, now);
                let witnesses = Witnesses { neighbours: &neighbours, elsewhere: &mut elsewhere };
                self.look_at(&name, witnesses, now, &mut look);
            }
        }
        look
    }

    fn give_all(&mut self, time: Duration, now: Moment) {
        let until = now + time;
        self.nodes.values_mut().for_each(|lease| lease.renewed = until.max(lease.renewed));
    }

    fn fence_is_over(&self, name: &str, now: Moment) -> Option<Finding> {
        let lease = &self.nodes[name];
        let is_silent = lease.phase.is_gone() || lease.phase == NodePhase::CutOff;
        let is_news = is_silent && !lease.is_fenced && now >= lease.fenced;
        is_news.then(|| Finding::Fenced(name.to_owned()))
    }

    /// What its neighbours reach is the machine that speaks for it.
    fn note_seen(&mut self, name: &str, now: Moment) {
        let until = self.fence_from(now);
        let Some(lease) = self.nodes.get_mut(name) else { return };
        let mut answers = lease.inquiry.iter().flat_map(|inquiry| inquiry.answers.values());
        if answers.any(|answer| *answer == Some(true)) {
            lease.claim.seen(until);
        }
    }

    /// One that is silent.
    fn look_at<'a>(
        &mut self,
        name: &str,
        witnesses: Witnesses<'_, impl Fn(&str) -> Vec<&'a str>>,
        now: Moment,
        look: &mut Look,
    ) {
        let lease = &self.nodes[name];
        let waited_in_vain = now - lease.renewed >= self.lease;
        let Some(inquiry) = &lease.inquiry else {
            return self.ask(name, witnesses, now, look);
        };
        let nobody_on_link = inquiry.routed || inquiry.answers.is_empty();
        let all = inquiry.answers.values().all(Option::is_some);
        let mut answers: Vec<bool> = inquiry.answers.values().flatten().copied().collect();
        answers.retain(|is_there| *is_there || !inquiry.routed);
        if !all && !answers.contains(&true) && now < inquiry.until {
            return;
        }
        let finding = match answers.as_slice() {
            [] if !waited_in_vain => None,
            [] if lease.has_ended => Some(Finding::Lost(name.to_owned())),
            // Without a neighbour to ask the lease decides, unless it is the server that is cut off.
            [] if nobody_on_link && self.others_report(name, now) => Some(Finding::Lost(name.to_owned())),
            [] => Some(Finding::CutOff(name.to_owned())),
            some if !some.contains(&true) => Some(Finding::Lost(name.to_owned())),
            _ if lease.has_ended && !waited_in_vain => None,
            _ if lease.has_ended => Some(Finding::Lost(name.to_owned())),
            _ => Some(Finding::CutOff(name.to_owned())),
        };
        let is_known = |finding: &Finding| {
            matches!(finding, Finding::CutOff(_)) && self.nodes[name].phase == NodePhase::CutOff
        };
        look.findings.extend(finding.filter(|finding| !is_known(finding)));
        if now >= inquiry.until {
            self.ask(name, witnesses, now, look);
        }
    }

    /// Asks some neighbours that report, each time others; without any, some nodes elsewhere.
    fn ask<'a>(
        &mut self,
        about: &str,
        witnesses: Witnesses<'_, impl Fn(&str) -> Vec<&'a str>>,
        now: Moment,
        look: &mut Look,
    ) {
        let neighbours = (witnesses.neighbours)(about);
        let fresh = neighbours.into_iter().filter(|name| *name != about && self.is_fresh(name, now));
        let fresh: Vec<String> = fresh.map(str::to_owned).collect();
        let routed = fresh.is_empty();
        // One that is asked about is silent, and not among those elsewhere.
        let all =
            if routed { witnesses.elsewhere.get_or_insert_with(|| self.all_fresh(now)) } else { &fresh };
        let turn = usize::try_from(self.questions).unwrap_or(0) % all.len().max(1);
        let chosen = all.iter().cycle().skip(turn).take(all.len().min(WITNESSES_MAX));
        let chosen: Vec<String> = chosen.cloned().collect();
        self.questions += 1;
        let question =
            |witness: &String| Question { witness: witness.clone(), about: about.to_owned(), routed };
        look.questions.extend(chosen.iter().map(question));
        let answers = chosen.into_iter().map(|witness| (witness, None)).collect();
        let until = now + ANSWER_MAX.max(self.silence_max());
        if let Some(lease) = self.nodes.get_mut(about) {
            lease.inquiry = Some(Inquiry { until, answers, routed });
        }
    }

    fn all_fresh(&self, now: Moment) -> Vec<String> {
        self.nodes.keys().filter(|name| self.is_fresh(name, now)).cloned().collect()
    }

    fn others_report(&self, name: &str, now: Moment) -> bool {
        self.nodes.keys().any(|other| other != name && self.is_fresh(other, now))
    }

    /// Whether a node is ready and has just renewed its lease: not one that is merely given time to come back.
    fn is_fresh(&self, node: &str, now: Moment) -> bool {
        self.nodes.get(node).is_some_and(|lease| {
            lease.phase == NodePhase::Ready && lease.renewed <= now && self.is_renewed(lease, now)
        })
    }

    fn fence_from(&self, now: Moment) -> Moment {
        now + self.lease + self.lease / FENCE_MARGIN_DIVISOR
    }
}

/// Who can be asked.
struct Witnesses<'a, F> {
    /// Those on the link of a node.
    neighbours: &'a F,
    /// All that report; found once in a look, when somebody has no neighbour.
    elsewhere: &'a mut Option<Vec<String>>,
}

/// Whether no machine speaks for it any more: it was taken down, declared dead, or joins anew.
fn gives_up(node: &Node) -> bool {
    match node.phase {
        NodePhase::Joined | NodePhase::Dead => true,
        NodePhase::Lost => node.fenced,
        NodePhase::Ready | NodePhase::CutOff => false,
    }
}

#[cfg(test)]
mod tests;
