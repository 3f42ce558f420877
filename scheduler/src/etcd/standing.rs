//! How far an etcd has come, in numbers that only grow while its data are its own, and fall when a snapshot is put back.
//!
//! Every entry of etcd's own log makes it one longer, and its revision greater by one or not at all. So the log never
//! loses of its lead over the revision. `etcdctl snapshot restore` keeps the revision and begins a new log: the lead falls by
//! about the revision. The term of its elections begins anew, too, and so does the name of its cluster when the restore was
//! given another token.

use serde::{Deserialize, Serialize};

use super::{Etcd, EtcdError, pb};

/// How far an etcd has come. What is kept of it is a little less than what was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Standing {
    /// The name of its cluster.
    cluster: u64,
    /// Of its elections.
    term: u64,
    /// By how much its log is longer than its revision is high.
    lead: i64,
}

/// What a member has said of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    cluster: u64,
    term: u64,
    /// Of the keys, before the numbers that follow.
    revision: i64,
    committed: i64,
    applied: i64,
}

impl Standing {
    /// Of no etcd: each has another one.
    pub(crate) const NONE: Standing = Standing { cluster: 0, term: 0, lead: 0 };
}

impl Said {
    /// Why this etcd, which had `before`, has been put back.
    pub(crate) fn put_back(&self, before: &Standing) -> Option<&'static str> {
        // The revision is older than the number of entries: the lead was no greater.
        let lead_max = self.committed.saturating_sub(self.revision);
        if self.cluster != before.cluster {
            Some("it is another cluster")
        } else if self.term < before.term {
            Some("its elections are counted anew")
        } else if lead_max < before.lead {
            Some("its log was begun anew")
        } else {
            None
        }
    }

    /// What is to be kept, with a revision that was read later: the lead was no smaller.
    pub(crate) fn standing(&self, revision: i64) -> Standing {
        let lead = self.applied.saturating_sub(revision);
        Standing { cluster: self.cluster, term: self.term, lead }
    }
}

impl Etcd {
    /// What a member says that knows all that was written so far. `key` is one that this server may read.
    pub(crate) async fn said(&self, key: &str) -> Result<Said, EtcdError> {
        let call = |channel: tonic::transport::Channel| async move {
            // A linearizable read: the member has caught up when it answers.
            let read = pb::RangeRequest { key: key.into(), ..pb::RangeRequest::default() };
            let read = super::kv_client(channel.clone()).range(read).await?.into_inner().header;
            let status =
                pb::maintenance_client::MaintenanceClient::new(channel).status(pb::StatusRequest {}).await?;
            let member = |header: Option<&pb::ResponseHeader>| header.map(|header| header.member_id);
            if member(read.as_ref()) != member(status.get_ref().header.as_ref()) {
                return Err(tonic::Status::unavailable("two members answered"));
            }
            Ok(status)
        };
        let answer = self.at_each(super::CALL_MAX, call).await?;
        let header = answer.header.unwrap_or_default();
        Ok(Said {
            cluster: header.cluster_id,
            term: header.raft_term,
            revision: header.revision,
            committed: number(answer.raft_index),
            applied: number(answer.raft_applied_index),
        })
    }
}

fn number(index: u64) -> i64 {
    i64::try_from(index).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: Said = Said { cluster: 7, term: 3, revision: 100, committed: 120, applied: 118 };

    #[test]
    fn an_etcd_that_goes_on_was_not_put_back() {
        let before = SAID.standing(101);
        assert_eq!(SAID.put_back(&before), None, "also one that writes all the time");
        let later = Said { revision: 5100, committed: 5120, applied: 5120, ..SAID };
        assert_eq!(later.put_back(&before), None, "each write is an entry");
        let busy = Said { committed: 9000, applied: 9000, ..later };
        assert_eq!(busy.put_back(&before), None, "entries that write nothing");
        assert_eq!(Said { term: 4, ..later }.put_back(&before), None);
    }

    #[test]
    fn one_that_was_put_back_is_told_by_either_number() {
        let before = SAID.standing(101);
        let same_token = Said { term: 3, revision: 100, committed: 6, applied: 6, ..SAID };
        assert_eq!(same_token.put_back(&before), Some("its log was begun anew"));
        assert_eq!(Said { term: 2, ..SAID }.put_back(&before), Some("its elections are counted anew"));
        assert_eq!(Said { cluster: 8, ..SAID }.put_back(&before), Some("it is another cluster"));
        assert!(SAID.put_back(&Standing::NONE).is_some());
        // Once more, by the snapshot of one that had been put back.
        let again = Said { revision: 140, committed: 12, applied: 12, ..SAID };
        assert_eq!(again.put_back(&same_token.standing(110)), Some("its log was begun anew"));
    }
}
