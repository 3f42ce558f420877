//! What the store and the election ask of etcd, and nothing else: a simulation plays it in etcd's place.

use super::{Etcd, EtcdError, after, created_at, delete, pb, put};

/// The part of etcd that holds keys: linearizable, and all or nothing.
pub trait Kv: Send + Sync + 'static {
    /// All or nothing.
    ///
    /// # Errors
    /// After [`EtcdError::Unreachable`] nobody knows whether it was done.
    fn txn(&self, request: pb::TxnRequest) -> Result<pb::TxnResponse, EtcdError>;

    /// One page of a range.
    ///
    /// # Errors
    /// Nothing was read.
    fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, EtcdError>;

    /// The value of a key.
    ///
    /// # Errors
    /// Nothing was read.
    fn get(&self, key: &str) -> Result<Option<pb::KeyValue>, EtcdError> {
        let request = pb::RangeRequest { key: key.into(), ..pb::RangeRequest::default() };
        Ok(self.range(request)?.kvs.pop())
    }

    /// One page of a range, and whether there are more; the request then asks for the next.
    ///
    /// # Errors
    /// Nothing was read.
    fn page(&self, request: &mut pb::RangeRequest) -> Result<(Vec<pb::KeyValue>, bool), EtcdError> {
        let answer = self.range(request.clone())?;
        if let Some(last) = answer.kvs.last() {
            request.key = [&last.key[..], &[0]].concat();
        }
        Ok((answer.kvs, answer.more))
    }

    /// Every key that begins with `prefix`, without their values.
    ///
    /// # Errors
    /// Not all was read.
    fn keys(&self, prefix: &str, page: i64) -> Result<Vec<pb::KeyValue>, EtcdError> {
        let (key, range_end) = (prefix.into(), after(prefix));
        let mut request = pb::RangeRequest { key, range_end, limit: page, revision: 0, keys_only: true };
        let mut found = Vec::new();
        loop {
            let (some, more) = self.page(&mut request)?;
            found.extend(some);
            if !more {
                return Ok(found);
            }
        }
    }
}

impl Kv for Etcd {
    fn txn(&self, request: pb::TxnRequest) -> Result<pb::TxnResponse, EtcdError> {
        let etcd = self.clone();
        self.wait(async move { etcd.txn(request).await })
    }

    fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, EtcdError> {
        let etcd = self.clone();
        self.wait(async move { etcd.range(request).await })
    }
}

/// A server's right to write: whoever writes names the key and the revision at which it was made.
pub trait Right: Send + Sync + 'static {
    /// The leader's key.
    fn key(&self) -> &str;

    /// The revision of etcd at which this server took the key. No other leader ever has it.
    fn fence(&self) -> i64;

    /// Whether the lease has ended, as far as this server knows.
    fn is_lost(&self) -> bool;
}

/// Takes the leader's key, if it is free.
#[must_use]
pub fn claim(key: &str, value: Vec<u8>, lease: i64) -> pb::TxnRequest {
    let (compare, success) = (vec![created_at(key, 0)], vec![put(key.to_owned(), value, lease)]);
    pb::TxnRequest { compare, success, failure: vec![] }
}

/// Takes the leader's key away from the leader that made it at `fence`.
#[must_use]
pub fn deposition(key: String, fence: i64) -> pb::TxnRequest {
    let (compare, success) = (vec![created_at(&key, fence)], vec![delete(key)]);
    pb::TxnRequest { compare, success, failure: vec![] }
}
