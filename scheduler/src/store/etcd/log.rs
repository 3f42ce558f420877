//! The log in etcd: entries, the pieces of large ones, and what takes them away.

use std::collections::BTreeMap;

use super::*;

/// A larger entry is cut into pieces.
const ENTRY_BYTES_MAX: usize = 8 << 10;
const PIECE_BYTES: usize = 512 << 10;

/// One or more revisions in the log.
#[derive(Debug, Serialize, Deserialize)]
enum Entry {
    /// Themselves.
    Whole(Vec<Revision>),
    /// Where their pieces are, how many, and how large together.
    Pieces(String, usize, u64),
}

/// How large the entries of a commit are.
pub(super) struct Bytes {
    /// In the transaction that commits them.
    pub(super) sent: usize,
    /// In etcd.
    pub(super) stored: u64,
}

impl EtcdStore {
    fn log_key(&self, revision: u64) -> String {
        self.key(&format!("log/{revision:016x}"))
    }

    /// What commits these revisions. Large entries are written in pieces first, which nobody reads until then.
    pub(super) fn entries_of(
        &self,
        revisions: &[Revision],
    ) -> Result<(Vec<pb::RequestOp>, Bytes), StoreError> {
        let (mut operations, mut bytes) = (Vec::new(), Bytes { sent: 0, stored: 0 });
        for some in revisions.chunks(revisions.len().div_ceil(ENTRIES_MAX).max(1)) {
            let last = some.last().map_or(0, |last| last.revision);
            let whole = codec::encode(&Entry::Whole(some.to_vec()));
            bytes.stored += whole.len() as u64;
            let entry = if whole.len() <= ENTRY_BYTES_MAX { whole } else { self.write_pieces(&whole, last)? };
            bytes.sent += entry.len();
            operations.push(etcd::put(self.log_key(last), entry, 0));
        }
        Ok((operations, bytes))
    }

    /// Gives the entry that names the pieces.
    fn write_pieces(&self, whole: &[u8], last: u64) -> Result<Vec<u8>, StoreError> {
        let id = format!("{last:016x}.{:016x}", rand::rng().next_u64());
        let pieces: Vec<&[u8]> = whole.chunks(PIECE_BYTES).collect();
        for (number, piece) in pieces.iter().enumerate() {
            let key = self.key(&format!("piece/{id}/{number:06}"));
            let written = self.transact(vec![], vec![etcd::put(key, piece.to_vec(), 0)])?;
            written.ok_or(StoreError::Deposed)?;
        }
        Ok(codec::encode(&Entry::Pieces(id, pieces.len(), whole.len() as u64)))
    }

    /// A page of the entries after revision `from` up to `to`, in order, as of a revision of etcd.
    pub(super) fn entries(
        &self,
        from: u64,
        to: u64,
        page: i64,
        moment: i64,
    ) -> Result<Vec<Vec<Revision>>, StoreError> {
        let found = self.log_page(from, to, page, moment)?;
        if found.is_empty() && from < to {
            return Err(self.damaged(format!("the log ends at revision {from}, the head is at {to}")));
        }
        found.iter().map(|found| self.read_entry(&found.value, moment)).collect()
    }

    fn log_page(&self, from: u64, to: u64, page: i64, moment: i64) -> Result<Vec<pb::KeyValue>, StoreError> {
        let request = pb::RangeRequest {
            key: self.log_key(from.saturating_add(1)).into(),
            range_end: self.log_key(to.saturating_add(1)).into(),
            limit: page,
            revision: moment,
            keys_only: false,
        };
        Ok(self.etcd.range(request)?.kvs)
    }

    fn read_entry(&self, value: &[u8], moment: i64) -> Result<Vec<Revision>, StoreError> {
        let (id, count) = match self.decode("log", value)? {
            Entry::Whole(revisions) => return Ok(revisions),
            Entry::Pieces(id, count, _) => (id, count),
        };
        let (mut pieces, mut whole) = (0, Vec::new());
        self.pages(&format!("piece/{id}/"), moment, &mut |_, piece| {
            pieces += 1;
            whole.extend_from_slice(piece);
            Ok(())
        })?;
        if pieces != count {
            return Err(self.damaged(format!("{pieces} of {count} pieces of the entry {id} are there")));
        }
        match self.decode("log", &whole)? {
            Entry::Whole(revisions) => Ok(revisions),
            Entry::Pieces(..) => Err(self.damaged(format!("the entry {id} is made of pieces twice"))),
        }
    }

    /// Removes entries with at most `max` revisions from the beginning of the log, none from `before` on.
    pub(super) fn remove_oldest(
        &self,
        condition: &mut Condition,
        before: u64,
        max: usize,
    ) -> Result<(), StoreError> {
        let mut left = max;
        while left > 0 {
            let (from, to) = (
                condition.head.oldest.saturating_sub(1),
                condition.head.applied.min(before.saturating_sub(1)),
            );
            let page = LOG_PAGE.min(i64::try_from(left).unwrap_or(LOG_PAGE));
            let found = if from < to { self.log_page(from, to, page, 0)? } else { vec![] };
            let (mut operations, mut bytes, mut oldest) = (vec![], 0, condition.head.oldest);
            for found in &found {
                let key = String::from_utf8_lossy(&found.key).into_owned();
                let last = key.rsplit('/').next().and_then(|hex| u64::from_str_radix(hex, 16).ok());
                let last = last.ok_or_else(|| self.damaged(format!("the key {key}")))?;
                left = left.saturating_sub(usize::try_from(last + 1 - oldest).unwrap_or(usize::MAX));
                oldest = last + 1;
                bytes += self.remove_entry(key, &found.value, &mut operations)?;
            }
            if found.is_empty() {
                return Ok(());
            }
            let log_bytes = condition.head.log_bytes.saturating_sub(bytes);
            let head = Head { oldest, log_bytes, ..condition.head };
            for some in operations.chunks(OPERATIONS_MAX) {
                self.write(condition, head, some.to_vec())?;
            }
        }
        Ok(())
    }

    /// What removes an entry; gives how large it is.
    fn remove_entry(
        &self,
        key: String,
        value: &[u8],
        operations: &mut Vec<pb::RequestOp>,
    ) -> Result<u64, StoreError> {
        operations.push(etcd::delete(key));
        match codec::decode(value) {
            Ok(Entry::Pieces(id, _, bytes)) => {
                operations.push(etcd::delete_all(&self.key(&format!("piece/{id}/"))));
                Ok(bytes)
            }
            _ => Ok(value.len() as u64),
        }
    }

    /// Removes pieces that no entry names: their commit was never completed.
    pub(super) fn remove_strays(&self, condition: &mut Condition) -> Result<(), StoreError> {
        let prefix = self.key("piece/");
        let start = prefix.len();
        let found = self.etcd.keys(&prefix, PAGE)?;
        let mut pieces: BTreeMap<String, usize> = BTreeMap::new();
        for found in found {
            let rest = String::from_utf8_lossy(&found.key[start..]).into_owned();
            *pieces.entry(rest.split('/').next().unwrap_or_default().to_owned()).or_default() += 1;
        }
        for (id, pieces) in pieces {
            if !self.is_named(&id)? {
                warn!(entry = id, pieces, "removing what a commit that was never completed left");
                let head = condition.head;
                self.write(condition, head, vec![etcd::delete_all(&self.key(&format!("piece/{id}/")))])?;
            }
        }
        Ok(())
    }

    fn is_named(&self, id: &str) -> Result<bool, StoreError> {
        let revision = id.split('.').next().unwrap_or(id);
        let Some(found) = self.etcd.get(&self.key(&format!("log/{revision}")))? else { return Ok(false) };
        Ok(matches!(self.decode("log", &found.value)?, Entry::Pieces(named, ..) if named == id))
    }
}
