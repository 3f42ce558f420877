//! The log in etcd: entries, the pieces of large ones, and what takes them away.

use std::collections::BTreeMap;

use super::*;

/// A larger entry is cut into pieces.
const ENTRY_BYTES_MAX: usize = 8 << 10;
const PIECE_BYTES: usize = 512 << 10;

/// One or more revisions in the log.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Entry {
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
            operations.push(etcd::put(self.reading.log_key(last), entry, 0));
        }
        Ok((operations, bytes))
    }

    /// Gives the entry that names the pieces.
    fn write_pieces(&self, whole: &[u8], last: u64) -> Result<Vec<u8>, StoreError> {
        let id = format!("{last:016x}.{:016x}", rand::rng().next_u64());
        let pieces: Vec<&[u8]> = whole.chunks(PIECE_BYTES).collect();
        for (number, piece) in pieces.iter().enumerate() {
            let key = self.reading.key(&format!("piece/{id}/{number:06}"));
            let written = self.transact(vec![], vec![etcd::put(key, piece.to_vec(), 0)])?;
            written.ok_or(StoreError::Deposed)?;
        }
        Ok(codec::encode(&Entry::Pieces(id, pieces.len(), whole.len() as u64)))
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
            let found = if from < to { self.reading.log_page(from, to, page, 0)? } else { vec![] };
            let (mut operations, mut bytes, mut oldest) = (vec![], 0, condition.head.oldest);
            for found in &found {
                let key = String::from_utf8_lossy(&found.key).into_owned();
                let last = key.rsplit('/').next().and_then(|hex| u64::from_str_radix(hex, 16).ok());
                let last = last.ok_or_else(|| self.reading.damaged(format!("the key {key}")))?;
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
                operations.push(etcd::delete_all(&self.reading.key(&format!("piece/{id}/"))));
                Ok(bytes)
            }
            _ => Ok(value.len() as u64),
        }
    }

    /// Removes pieces that no entry names: their commit was never completed.
    pub(super) fn remove_strays(&self, condition: &mut Condition) -> Result<(), StoreError> {
        let prefix = self.reading.key("piece/");
        let start = prefix.len();
        let found = self.reading.etcd.keys(&prefix, PAGE)?;
        let mut pieces: BTreeMap<String, usize> = BTreeMap::new();
        for found in found {
            let rest = String::from_utf8_lossy(&found.key[start..]).into_owned();
            *pieces.entry(rest.split('/').next().unwrap_or_default().to_owned()).or_default() += 1;
        }
        for (id, pieces) in pieces {
            if !self.is_named(&id)? {
                warn!(entry = id, pieces, "removing what a commit that was never completed left");
                let head = condition.head;
                self.write(
                    condition,
                    head,
                    vec![etcd::delete_all(&self.reading.key(&format!("piece/{id}/")))],
                )?;
            }
        }
        Ok(())
    }

    fn is_named(&self, id: &str) -> Result<bool, StoreError> {
        let revision = id.split('.').next().unwrap_or(id);
        let Some(found) = self.reading.etcd.get(&self.reading.key(&format!("log/{revision}")))? else {
            return Ok(false);
        };
        Ok(matches!(self.reading.decode("log", &found.value)?, Entry::Pieces(named, ..) if named == id))
    }
}
