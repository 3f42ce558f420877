//! One server: stands for election, leads, or follows.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, atomic::AtomicBool},
};

use rand::Rng as _;
use scheduler::{
    etcd::{Kv as _, claim, deposition},
    store::{Copy, Went},
};
use scheduler_core::{endpoint::Selector, tenure::Tenure, watch::Message};

use super::{
    Ask,
    etcd::{Deaf, Etcd, LEADER, LEASE, Link},
    term::Term,
};
use crate::{
    Broken,
    clock::{Clock, Time},
    shared::Shared,
};

pub(super) struct Member {
    number: usize,
    link: Link,
    /// The state as far as it has read it while others lead.
    copy: Option<Copy>,
    clock: Clock,
    role: Role,
    pub(super) frozen_until: Time,
    pub(super) queue: VecDeque<Ask>,
}

enum Role {
    Down,
    Stands,
    Follows { leader: usize, fence: i64 },
    Leads(Box<Term>),
}

impl Member {
    pub(super) fn new(number: usize, etcd: &Arc<Mutex<Etcd>>, shared: &mut Shared) -> Member {
        let (link, clock) = (Link::new(number, etcd), Clock::new(&mut shared.rng));
        let (frozen_until, queue) = (Time::default(), VecDeque::new());
        Member { number, link, copy: None, clock, role: Role::Stands, frozen_until, queue }
    }

    pub(super) fn is_down(&self) -> bool {
        matches!(self.role, Role::Down)
    }

    pub(super) fn term(&self) -> Option<&Term> {
        if let Role::Leads(term) = &self.role { Some(term) } else { None }
    }

    fn term_mut(&mut self) -> Option<&mut Term> {
        if let Role::Leads(term) = &mut self.role { Some(term) } else { None }
    }

    /// Whom it passes on to what it is asked.
    pub(super) fn leads_to(&self) -> Option<usize> {
        match self.role {
            Role::Leads(_) => Some(self.number),
            Role::Follows { leader, .. } => Some(leader),
            Role::Down | Role::Stands => None,
        }
    }

    pub(super) fn start(&mut self, shared: &mut Shared) {
        if self.is_down() {
            shared.note(format!("server {} starts", self.number));
            self.clock.restart(shared.now);
            self.role = Role::Stands;
        }
    }

    pub(super) fn crash(&mut self, shared: &mut Shared) {
        shared.note(format!("server {} is killed", self.number));
        self.role = Role::Down;
        self.copy = None;
        self.queue.clear();
    }

    pub(super) fn compacts_soon(&mut self) {
        if let Some(term) = self.term_mut() {
            term.compacts = true;
        }
    }

    /// Does what there is to do. `is_down`: of each server whether its machine says that nobody listens there.
    pub(super) fn tick(&mut self, is_down: &[bool], shared: &mut Shared) {
        self.link.etcd().attempts.remove(&self.number);
        match self.role {
            Role::Down => {}
            Role::Stands => self.stand(shared),
            Role::Follows { leader, fence } => self.follow(is_down[leader], fence, shared),
            Role::Leads(_) => self.lead(shared),
        }
        if self.term().is_none() {
            // Nobody is told that it was done.
            self.queue.clear();
        }
    }

    fn stand(&mut self, shared: &mut Shared) {
        let asked = self.clock.moment(shared.now);
        match self.link.get(LEADER) {
            Err(_) => return,
            Ok(Some(found)) => {
                let leader = usize::from(found.value[0]);
                self.role = Role::Follows { leader, fence: found.create_revision };
                return;
            }
            Ok(None) => {}
        }
        let lease = self.link.etcd().grant();
        let taken = self.link.txn(claim(LEADER, vec![self.number as u8], lease));
        if let Ok(response) = taken
            && response.succeeded
        {
            let fence = response.header.map_or(0, |header| header.revision);
            shared.note(format!("server {} takes the lead at {fence}", self.number));
            let tenure = Tenure::new(asked, LEASE);
            let copy = self.copy.take();
            if let Some(term) = Term::begin(&self.link, fence, lease, tenure, copy, shared) {
                self.role = Role::Leads(Box::new(term));
                return;
            }
        }
        self.revoke(lease);
    }

    fn revoke(&self, lease: i64) {
        let mut etcd = self.link.etcd();
        if etcd.reaches(self.number) {
            etcd.revoke(lease);
        }
    }

    fn follow(&mut self, is_leader_down: bool, fence: i64, shared: &mut Shared) {
        if is_leader_down && shared.chance(0.3) {
            let _unknown = self.link.txn(deposition(LEADER.to_owned(), fence));
        }
        // Seldom, so that a compaction is faster now and then.
        if shared.rng.random_bool(0.02) {
            self.go_along(shared);
        }
        match self.link.get(LEADER) {
            Ok(Some(found)) if found.create_revision == fence => {}
            Ok(_) => self.role = Role::Stands,
            Err(_) => {}
        }
    }

    /// Goes along with the log, as the thread of a server that follows does.
    fn go_along(&mut self, shared: &mut Shared) {
        self.copy = match self.copy.take() {
            None => self.begin_a_copy(shared.is_broken(Broken::MissesAnEntry)),
            Some(mut copy) => match copy.follow() {
                Ok(Went::Astray) => {
                    shared.figures.astray += 1;
                    None
                }
                _ => Some(copy),
            },
        };
    }

    fn begin_a_copy(&self, misses: bool) -> Option<Copy> {
        let (link, never) = (self.link.clone(), AtomicBool::new(false));
        let read = if misses { Copy::read(Deaf(link), "/p", &never) } else { Copy::read(link, "/p", &never) };
        read.ok().flatten()
    }

    fn lead(&mut self, shared: &mut Shared) {
        let (now, number) = (self.clock.moment(shared.now), self.number);
        // The writer and the keeper of the lease are two threads: either may be first when the process goes on.
        let writes_first = shared.rng.random_bool(0.5);
        let asks: Vec<Ask> = if writes_first { self.queue.drain(..).collect() } else { Vec::new() };
        let (link, wall) = (self.link.clone(), self.clock.wall(shared.now));
        let Some(term) = self.term_mut() else { return };
        term.write(asks, &link, wall, shared);
        if term.keep(&link, now, shared) {
            return;
        }
        shared.note(format!("server {number} leads no more"));
        self.role = Role::Stands;
    }

    /// A watcher begins to read here, after `from`; the term in which it does.
    pub(super) fn subscribe(
        &mut self,
        watcher: usize,
        selector: Selector,
        from: Option<u64>,
        shared: &mut Shared,
    ) -> Option<i64> {
        self.term_mut()?.subscribe(watcher, selector, from, shared)
    }

    /// What a watcher is told next.
    pub(super) fn take(&mut self, watcher: usize, shared: &mut Shared) -> Vec<Message> {
        self.term_mut().map(|term| term.take(watcher, shared)).unwrap_or_default()
    }
}
