//! A backup as a stream. A reader that does not read is given up, for the room that its snapshot holds.

use std::{sync::Arc, time::Duration};

use hextet_api::v1;
use tokio::{sync::mpsc, task};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::{backup, hub::Hub, store::StoreError, writer::chain};

/// Bytes of one message, about.
const CHUNK_BYTES: usize = 256 * 1024;
/// Messages between the store and the connection.
const OUT_MAX: usize = 8;
/// How long a reader may take to read one.
const SEND_MAX: Duration = Duration::from_secs(30);

type Out = mpsc::Sender<Result<v1::BackupChunk, Status>>;

pub(super) fn start(hub: &Arc<Hub>) -> Result<ReceiverStream<Result<v1::BackupChunk, Status>>, Status> {
    let authority = hub.pki.authority().map_err(|error| Status::internal(chain(&error)))?;
    let lease = hub.leases().length();
    let (out, chunks) = mpsc::channel(OUT_MAX);
    let (hub, runtime) = (hub.clone(), tokio::runtime::Handle::current());
    task::spawn_blocking(move || {
        let mut waiting = Vec::new();
        let send = |bytes: Vec<u8>| runtime.block_on(send(&out, Ok(v1::BackupChunk { data: bytes })));
        let written = backup::write(hub.store.as_ref(), authority, lease, &mut |bytes| {
            waiting.extend(bytes);
            if waiting.len() < CHUNK_BYTES { Ok(()) } else { send(std::mem::take(&mut waiting)) }
        });
        let ended = written.and_then(|()| send(waiting));
        if let Err(error) = ended {
            // Without its last record a backup is refused, also when this does not arrive.
            let _ = out.try_send(Err(Status::unavailable(chain(&error))));
        }
    });
    Ok(ReceiverStream::new(chunks))
}

async fn send(out: &Out, message: Result<v1::BackupChunk, Status>) -> Result<(), StoreError> {
    let sent = tokio::time::timeout(SEND_MAX, out.send(message)).await;
    sent.ok().and_then(Result::ok).ok_or(StoreError::Reader)
}
