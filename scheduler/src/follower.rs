//! What a server does while another leads: it keeps a copy of the state, so that it can lead at once.
//!
//! One thread reads, and a watch of etcd wakes it. There is no queue between them: a wake that finds it awake is
//! nothing, and what the log had meanwhile is read then.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use crate::{
    etcd::Etcd,
    store::{Copy, StoreError, Went},
};

/// How often it looks by itself, should a watch be silent.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks: a log that always grows is read in larger steps.
const PAUSE: Duration = Duration::from_millis(20);
/// How long a server that is to lead waits for the copy: the thread may be waiting for a member of etcd that has gone.
const FINISH_MAX: Duration = Duration::from_secs(1);
/// Between two tries to read everything.
const RETRY: Duration = Duration::from_secs(1);

/// The thread; it ends when this is dropped.
pub(crate) struct Follower {
    stop: Arc<AtomicBool>,
    wake: SyncSender<()>,
    copy: Receiver<Copy>,
    watch: tokio::task::AbortHandle,
}

impl Follower {
    pub(crate) fn start(etcd: &Etcd, prefix: &str) -> std::io::Result<Follower> {
        let (wake, woken) = sync_channel(1);
        let stop = Arc::new(AtomicBool::new(false));
        let watch = {
            let (own, key, wake) = (etcd.clone(), format!("{prefix}/log/"), wake.clone());
            let watch = etcd.spawn(async move { watch(&own, &key, &wake).await });
            watch.abort_handle()
        };
        let reader = Reader { etcd: etcd.clone(), prefix: prefix.to_owned(), stop: stop.clone(), woken };
        let (give, copy) = sync_channel(1);
        thread::Builder::new().name("follower".to_owned()).spawn(move || {
            if let Some(copy) = reader.run() {
                // Nobody may want it any more.
                drop(give.send(copy));
            }
        })?;
        Ok(Follower { stop, wake, copy, watch })
    }

    /// Ends it and gives the copy, if it has one. Blocks for a moment.
    pub(crate) fn finish(self) -> Option<Copy> {
        self.tell_to_stop();
        self.copy.recv_timeout(FINISH_MAX).ok()
    }

    fn tell_to_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.watch.abort();
        // A wake that waits already is as good.
        let _ = self.wake.try_send(());
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.tell_to_stop();
    }
}

struct Reader {
    etcd: Etcd,
    prefix: String,
    stop: Arc<AtomicBool>,
    woken: Receiver<()>,
}

impl Reader {
    fn run(self) -> Option<Copy> {
        let mut copy = None;
        while !self.is_stopped() {
            copy = match copy {
                None => self.read(),
                Some(copy) => self.follow(copy),
            };
            self.wait(if copy.is_some() { LOOK } else { RETRY });
        }
        copy
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn wait(&self, max: Duration) {
        match self.woken.recv_timeout(max) {
            Ok(()) | Err(RecvTimeoutError::Timeout) if !self.is_stopped() => thread::sleep(PAUSE),
            _ => {}
        }
    }

    fn read(&self) -> Option<Copy> {
        let begun = Instant::now();
        match Copy::read(self.etcd.clone(), &self.prefix, &self.stop) {
            Ok(Some(copy)) => {
                info!(revision = copy.revision(), took = ?begun.elapsed(), "a copy of the state is kept");
                Some(copy)
            }
            Ok(None) => None,
            Err(error) => self.not_read(&error),
        }
    }

    fn not_read(&self, error: &StoreError) -> Option<Copy> {
        warn!(%error, "no copy of the state is kept: should this server lead now, it reads everything first");
        None
    }

    /// Goes along with the log to its end.
    fn follow(&self, mut copy: Copy) -> Option<Copy> {
        while !self.is_stopped() {
            match copy.follow() {
                Ok(Went::On) => {}
                Ok(Went::Nowhere) => break,
                Ok(Went::Astray) => {
                    info!(
                        revision = copy.revision(),
                        "the log does not go on from here: everything is read again"
                    );
                    return None;
                }
                Err(error) => {
                    debug!(%error, "the log is not read");
                    break;
                }
            }
        }
        Some(copy)
    }
}

/// Wakes for as long as somebody is there to be woken.
async fn watch(etcd: &Etcd, prefix: &str, wake: &SyncSender<()>) {
    loop {
        let watched = etcd.changes(prefix, || {
            // It is awake, or will be.
            let _ = wake.try_send(());
        });
        if let Err(error) = watched.await {
            debug!(%error, "the log is not watched");
        }
        tokio::time::sleep(RETRY).await;
    }
}
