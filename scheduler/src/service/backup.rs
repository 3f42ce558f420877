//! A backup as a stream. A reader that does not read is given up, for the room that its snapshot holds.

use std::{sync::Arc, time::Duration};

use hextet_api::v1;
use tokio::{sync::mpsc, task};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::{backup, hub::Hub, store::StoreError, writer::chain};

/// Bytes of one message, about.
const CHUNK_BYTES: usize = 256 * 1024;
/// Parts before the first one of what the store holds, as of one revision from there on.
const HEAD: u32 = 2;
/// Messages between the store and the connection.
const OUT_MAX: usize = 8;
/// How long a reader may take to read one.
const SEND_MAX: Duration = Duration::from_secs(30);

type Out = mpsc::Sender<Result<v1::BackupChunk, Status>>;

pub(super) async fn start(hub: &Arc<Hub>) -> Result<ReceiverStream<Result<v1::BackupChunk, Status>>, Status> {
    // The keys are those of the state that is written: nobody replaces a CA before that is held.
    let rotating = hub.rotating.clone().lock_owned().await;
    let keyring = hub.pki.keyring();
    let lease = hub.leases().length();
    let (out, chunks) = mpsc::channel(OUT_MAX);
    let (hub, runtime) = (hub.clone(), tokio::runtime::Handle::current());
    task::spawn_blocking(move || {
        let (mut waiting, mut rotating, mut records) = (Vec::new(), Some(rotating), 0);
        let send = |bytes: Vec<u8>| runtime.block_on(send(&hub, &out, Ok(v1::BackupChunk { data: bytes })));
        let written = backup::write(hub.store.as_ref(), keyring, lease, &mut |bytes| {
            records += 1;
            if records > HEAD {
                rotating = None;
            }
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

/// A server that ends waits for no reader.
async fn send(hub: &Hub, out: &Out, message: Result<v1::BackupChunk, Status>) -> Result<(), StoreError> {
    tokio::select! {
        sent = tokio::time::timeout(SEND_MAX, out.send(message)) => {
            sent.ok().and_then(Result::ok).ok_or(StoreError::Reader)
        }
        () = hub.closed() => Err(StoreError::Reader),
    }
}
