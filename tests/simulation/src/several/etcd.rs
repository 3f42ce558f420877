//! An etcd that is played: linearizable, with leases, and a network to it that loses requests and answers.
//!
//! It is no part of what is tested, but judges it: every revision that reaches the log is held against those before.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use scheduler::etcd::{
    EtcdError, Kv, Right,
    pb::{self, compare::TargetUnion, request_op::Request, response_op::Response},
};
use scheduler_core::{change::Revision, state::State};

use crate::clock::Time;

/// The leader's key.
pub(super) const LEADER: &str = "/p/leader";
const LOG: &[u8] = b"/p/log/";
/// How long a leader's lease is.
pub(super) const LEASE: Duration = Duration::from_secs(2);

/// What etcd holds, and what became of the cluster in it.
pub(super) struct Etcd {
    keys: BTreeMap<Vec<u8>, Entry>,
    revision: i64,
    leases: BTreeMap<i64, Time>,
    last_lease: i64,
    /// Servers that it cannot be reached from.
    pub(super) cut: BTreeSet<usize>,
    pub(super) is_faulty: bool,
    /// It takes every transaction, whatever that relies on.
    pub(super) ignores_conditions: bool,
    rng: StdRng,
    pub(super) now: Time,
    /// What a server is committing.
    pub(super) attempts: BTreeMap<usize, Vec<Revision>>,
    /// Requests that are on their way although nobody waits for them any more.
    late: Vec<(Time, usize, pb::TxnRequest, Vec<Revision>)>,
    pub(super) log: Vec<Written>,
    /// What the log adds up to, revision by revision.
    pub(super) states: Vec<State>,
    /// Which server made the leader's key at which revision.
    pub(super) terms: BTreeMap<i64, usize>,
    pub(super) wrong: Option<String>,
    pub(super) faults: u64,
}

struct Entry {
    value: Vec<u8>,
    created: i64,
    modified: i64,
    lease: i64,
}

/// A revision that is durable.
pub(super) struct Written {
    pub(super) revision: Revision,
    /// Whose leader's key was there.
    pub(super) fence: i64,
}

impl Etcd {
    pub(super) fn new(rng: StdRng) -> Etcd {
        Etcd {
            keys: BTreeMap::new(),
            revision: 1,
            leases: BTreeMap::new(),
            last_lease: 0,
            cut: BTreeSet::new(),
            is_faulty: true,
            ignores_conditions: false,
            rng,
            now: Time::default(),
            attempts: BTreeMap::new(),
            late: Vec::new(),
            log: Vec::new(),
            states: vec![State::default()],
            terms: BTreeMap::new(),
            wrong: None,
            faults: 0,
        }
    }

    /// The time goes on: leases end, and what was late arrives.
    pub(super) fn advance(&mut self, now: Time) {
        self.now = now;
        let ended: Vec<i64> =
            self.leases.iter().filter(|(_, until)| **until <= now).map(|(id, _)| *id).collect();
        ended.into_iter().for_each(|lease| self.revoke(lease));
        let (due, late) = std::mem::take(&mut self.late).into_iter().partition(|(at, ..)| *at <= now);
        self.late = late;
        let due: Vec<_> = due;
        for (_, server, request, attempt) in due {
            self.apply(server, &request, &attempt);
        }
    }

    pub(super) fn grant(&mut self) -> i64 {
        self.last_lease += 1;
        self.leases.insert(self.last_lease, self.now + LEASE);
        self.last_lease
    }

    pub(super) fn keep_alive(&mut self, lease: i64) -> Duration {
        let Some(until) = self.leases.get_mut(&lease) else { return Duration::ZERO };
        *until = self.now + LEASE;
        LEASE
    }

    pub(super) fn revoke(&mut self, lease: i64) {
        self.leases.remove(&lease);
        let before = self.keys.len();
        self.keys.retain(|_, entry| entry.lease != lease || lease == 0);
        self.revision += i64::from(self.keys.len() != before);
    }

    pub(super) fn reaches(&self, server: usize) -> bool {
        !self.cut.contains(&server)
    }

    /// What was acknowledged to an operator is there, as that operator's.
    pub(super) fn holds(&self, revision: u64, number: u64) -> Result<(), String> {
        let entry = self.log.get(revision as usize - 1);
        if entry.is_some_and(|entry| entry.revision.message == format!("op {number}")) {
            return Ok(());
        }
        Err(format!("the write of op {number} was acknowledged as {revision} and is not in etcd"))
    }

    fn fault(&mut self, of: f64) -> bool {
        let happens = self.is_faulty && self.rng.random_bool(of);
        self.faults += u64::from(happens);
        happens
    }

    fn txn(&mut self, server: usize, request: &pb::TxnRequest) -> Result<pb::TxnResponse, EtcdError> {
        if !self.reaches(server) || self.fault(0.01) {
            return Err(unreachable("the request is lost"));
        }
        let attempt = self.attempts.get(&server).cloned().unwrap_or_default();
        if self.fault(0.01) {
            let at = self.now + Duration::from_millis(self.rng.random_range(1..6_000));
            self.late.push((at, server, request.clone(), attempt));
            return Err(unreachable("the request is late"));
        }
        let response = self.apply(server, request, &attempt);
        if self.fault(0.01) { Err(unreachable("the answer is lost")) } else { Ok(response) }
    }

    fn apply(&mut self, server: usize, request: &pb::TxnRequest, attempt: &[Revision]) -> pb::TxnResponse {
        let is_met = |compare: &pb::Compare| {
            let entry = self.keys.get(&compare.key);
            match compare.target_union {
                Some(TargetUnion::CreateRevision(at)) => entry.map_or(0, |entry| entry.created) == at,
                Some(TargetUnion::ModRevision(at)) => entry.map_or(0, |entry| entry.modified) == at,
                _ => false,
            }
        };
        // What hangs on a lease that has ended is refused.
        let has_lease = |operation: &pb::RequestOp| match &operation.request {
            Some(Request::RequestPut(put)) => put.lease == 0 || self.leases.contains_key(&put.lease),
            _ => true,
        };
        let is_good = request.compare.iter().all(is_met) && request.success.iter().all(has_lease);
        let succeeded = self.ignores_conditions || is_good;
        let operations = if succeeded { &request.success } else { &request.failure };
        self.revision += 1;
        let responses = operations.iter().filter_map(|operation| self.operate(server, operation)).collect();
        if operations.iter().any(writes_log) {
            self.judge(server, attempt);
        }
        let header = Some(pb::ResponseHeader { revision: self.revision, ..pb::ResponseHeader::default() });
        pb::TxnResponse { header, succeeded, responses }
    }

    fn operate(&mut self, server: usize, operation: &pb::RequestOp) -> Option<pb::ResponseOp> {
        let response = match operation.request.as_ref()? {
            Request::RequestPut(put) => {
                if put.key == LEADER.as_bytes() {
                    self.terms.insert(self.revision, server);
                }
                let created = self.keys.get(&put.key).map_or(self.revision, |entry| entry.created);
                let (value, modified, lease) = (put.value.clone(), self.revision, put.lease);
                self.keys.insert(put.key.clone(), Entry { value, created, modified, lease });
                Response::ResponsePut(pb::PutResponse::default())
            }
            Request::RequestDeleteRange(delete) => {
                let is_in = |key: &Vec<u8>| is_in(key, &delete.key, &delete.range_end);
                self.keys.retain(|key, _| !is_in(key));
                Response::ResponseDeleteRange(pb::DeleteRangeResponse::default())
            }
            Request::RequestRange(range) => Response::ResponseRange(self.range(range)),
        };
        Some(pb::ResponseOp { response: Some(response) })
    }

    fn range(&self, request: &pb::RangeRequest) -> pb::RangeResponse {
        let found = self.keys.iter().filter(|(key, _)| is_in(key, &request.key, &request.range_end));
        let limit = if request.limit == 0 { usize::MAX } else { request.limit as usize };
        let kv = |(key, entry): (&Vec<u8>, &Entry)| pb::KeyValue {
            key: key.clone(),
            create_revision: entry.created,
            mod_revision: entry.modified,
            value: if request.keys_only { vec![] } else { entry.value.clone() },
        };
        let more = found.clone().count() > limit;
        let header = Some(pb::ResponseHeader { revision: self.revision, ..pb::ResponseHeader::default() });
        pb::RangeResponse { header, kvs: found.take(limit).map(kv).collect(), more }
    }

    /// What reaches the log follows on what is in it, and is the leader's.
    fn judge(&mut self, server: usize, attempt: &[Revision]) {
        let fence = self.keys.get(LEADER.as_bytes()).map_or(0, |entry| entry.created);
        if self.terms.get(&fence) != Some(&server) {
            self.wrong.get_or_insert(format!("server {server} writes in a term that is not its own"));
        }
        for revision in attempt {
            let next = self.log.len() as u64 + 1;
            if revision.revision != next {
                let what = format!("revision {} is written when the next is {next}", revision.revision);
                self.wrong.get_or_insert(what);
                return;
            }
            if self.log.last().is_some_and(|last| last.fence > fence) {
                self.wrong.get_or_insert(format!("revision {next} is of a term before that of the last"));
            }
            let mut state = self.states.last().cloned().unwrap_or_default();
            state.advance(revision);
            self.states.push(state);
            self.log.push(Written { revision: revision.clone(), fence });
        }
    }
}

fn writes_log(operation: &pb::RequestOp) -> bool {
    matches!(&operation.request, Some(Request::RequestPut(put)) if put.key.starts_with(LOG))
}

fn is_in(key: &[u8], from: &[u8], to: &[u8]) -> bool {
    if to.is_empty() { key == from } else { key >= from && key < to }
}

fn unreachable(cause: &str) -> EtcdError {
    EtcdError::Unreachable { endpoints: "etcd".to_owned(), cause: cause.to_owned() }
}

/// One server's way to etcd.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) server: usize,
    etcd: Arc<Mutex<Etcd>>,
}

impl Link {
    pub(super) fn new(server: usize, etcd: &Arc<Mutex<Etcd>>) -> Link {
        Link { server, etcd: etcd.clone() }
    }

    pub(super) fn etcd(&self) -> MutexGuard<'_, Etcd> {
        self.etcd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kv for Link {
    fn txn(&self, request: pb::TxnRequest) -> Result<pb::TxnResponse, EtcdError> {
        self.etcd().txn(self.server, &request)
    }

    fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, EtcdError> {
        let etcd = self.etcd();
        if etcd.reaches(self.server) { Ok(etcd.range(&request)) } else { Err(unreachable("it is cut")) }
    }
}

/// The way of a server that follows, which reads every fifth revision of the log as if it had changed nothing.
pub(super) struct Deaf(pub(super) Link);

impl Kv for Deaf {
    fn txn(&self, request: pb::TxnRequest) -> Result<pb::TxnResponse, EtcdError> {
        self.0.txn(request)
    }

    fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, EtcdError> {
        let mut answer = self.0.range(request)?;
        for entry in answer.kvs.iter_mut().filter(|entry| entry.key.starts_with(LOG)) {
            let hex = std::str::from_utf8(&entry.key[LOG.len()..]).unwrap_or_default();
            let revision = u64::from_str_radix(hex, 16).unwrap_or_default();
            if revision.is_multiple_of(5) {
                let head = format!("\"revision\":{revision},\"time\":0,\"changer\":\"\",\"message\":\"\"");
                entry.value = format!("{{\"Whole\":[{{{head},\"changes\":[]}}]}}").into_bytes();
            }
        }
        Ok(answer)
    }
}

/// The leader's key, as the server that made it sees it. It never hears that it has lost it: etcd knows.
pub(super) struct Seat {
    pub(super) fence: i64,
}

impl Right for Seat {
    fn key(&self) -> &str {
        LEADER
    }

    fn fence(&self) -> i64 {
        self.fence
    }

    fn is_lost(&self) -> bool {
        false
    }
}

pub(super) fn seeded(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}
