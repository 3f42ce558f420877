//! What a backup holds, written below a prefix that nobody uses. The head moves with each transaction, so that what
//! arrives late is refused; it counts for nothing until the restore has come to its end.

use super::*;

/// Revisions that are written in one transaction, several to an entry.
const REVISIONS_MAX: usize = 256;

impl EtcdStore {
    /// Whether etcd takes it.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`].
    pub(crate) fn takes(item: &Item) -> Result<(), StoreError> {
        let Item::Value(key, value) = item else { return Ok(()) };
        let len = codec::encode(value).len();
        if len <= VALUE_BYTES_MAX {
            return Ok(());
        }
        Err(StoreError::TooLarge { key: key.to_string(), len, max: VALUE_BYTES_MAX })
    }

    /// Takes over what another store held. Items come in the order in which a dump gives them.
    ///
    /// # Errors
    /// etcd does not answer, or has no room, or the seat is lost: nobody knows what was written.
    pub(crate) fn fill(&self, items: &[Item]) -> Result<(), StoreError> {
        let mut condition = self.lock();
        let mut revisions = Vec::new();
        let mut batch = Batch::default();
        for item in items {
            let (operation, len) = match item {
                Item::Last(last) => {
                    let (revision, applied, oldest) = (*last, *last, last.saturating_add(1));
                    condition.head = Head { revision, applied, oldest, ..condition.head };
                    continue;
                }
                Item::Value(key, value) => {
                    put(self.reading.key(&format!("current/{key}")), codec::encode(value))
                }
                Item::Address(address, pod) => {
                    put(view::address_key(&self.reading.prefix, *address), pod.clone().into_bytes())
                }
                Item::Entry(revision) => {
                    revisions.push(revision.clone());
                    continue;
                }
            };
            if !batch.has_room(len) {
                self.write_batch(&mut condition, &mut batch)?;
            }
            batch.add(operation, len);
        }
        self.write_batch(&mut condition, &mut batch)?;
        revisions.chunks(REVISIONS_MAX).try_for_each(|some| self.fill_log(&mut condition, some))
    }

    fn write_batch(&self, condition: &mut Condition, batch: &mut Batch) -> Result<(), StoreError> {
        let head = condition.head;
        self.write(condition, head, std::mem::take(batch).operations)
    }

    fn fill_log(&self, condition: &mut Condition, revisions: &[Revision]) -> Result<(), StoreError> {
        let (operations, bytes) = self.entries_of(revisions)?;
        let first = revisions.first().map_or(u64::MAX, |first| first.revision);
        let oldest = condition.head.oldest.min(first);
        let head = Head { oldest, log_bytes: condition.head.log_bytes + bytes.stored, ..condition.head };
        self.write(condition, head, operations)
    }
}

/// Operations of one transaction.
#[derive(Default)]
struct Batch {
    operations: Vec<pb::RequestOp>,
    bytes: usize,
}

impl Batch {
    fn has_room(&self, len: usize) -> bool {
        self.operations.is_empty()
            || (self.operations.len() < OPERATIONS_MAX && self.bytes + len <= REQUEST_BYTES_MAX)
    }

    fn add(&mut self, operation: pb::RequestOp, len: usize) {
        self.operations.push(operation);
        self.bytes += len;
    }
}

/// What writes a key, and how large it is.
fn put(key: String, value: Vec<u8>) -> (pb::RequestOp, usize) {
    let len = key.len() + value.len();
    (etcd::put(key, value, 0), len)
}
