//! The stream of everything that happened: revisions of the log, and what nodes say of their pods.
//!
//! A reader that was cut off goes on from a position: a revision of the log, and a number of what nodes said in one run
//! of a server. What came since is read from the log and from memory, in the order of each; what another run of a server
//! heard was told by that, or is lost with it.

use std::{sync::Arc, time::Duration};

use hextet_api::v1::{self, EventPosition};
use scheduler_core::change::Revision;
use tokio::{
    sync::{
        broadcast::{Receiver, error::RecvError},
        mpsc,
    },
    time,
};
use tonic::Status;

use crate::{
    happenings::{Numbered, is_about},
    hub::Hub,
};

mod past;
mod words;

/// Events between the server and a reader.
const OUT_MAX: usize = 64;
/// A reader that follows hears at least this often how far everything is told.
const BOOKMARK_EVERY: Duration = Duration::from_secs(10);

/// Where a reader's events come out.
pub(super) type Events = tokio_stream::wrappers::ReceiverStream<Result<v1::ClusterEvent, Status>>;

/// One reader, and how far it is.
struct Reader {
    hub: Arc<Hub>,
    pod: String,
    /// It wants to know.
    positions: bool,
    revision: u64,
    number: u64,
    out: mpsc::Sender<Result<v1::ClusterEvent, Status>>,
}

/// The reader has gone.
struct Gone;

/// Past events of a pod, or of all, the oldest first; then, if that is asked for, what comes.
pub(super) async fn watch(hub: &Arc<Hub>, request: v1::WatchEventsRequest) -> Result<Events, Status> {
    let news = (hub.revisions(), hub.happenings.follow());
    let past = past::asked(hub, &request).await?;
    let (out, events) = mpsc::channel(OUT_MAX);
    let v1::WatchEventsRequest { pod, positions, follow, .. } = request;
    let (revision, number) = past.before;
    let mut reader = Reader { hub: hub.clone(), pod, positions, revision, number, out };
    tokio::spawn(async move {
        if reader.tell_past(past).await.is_ok() && follow {
            // It has gone, or has been told that the server goes.
            let _ = reader.follow(news).await;
        }
    });
    Ok(Events::new(events))
}

impl Reader {
    async fn tell_past(&mut self, past: past::Past) -> Result<(), Gone> {
        for (number, event) in past.events {
            self.tell(number, event).await?;
        }
        (self.revision, self.number) = past.until;
        self.bookmark().await
    }

    async fn tell(&mut self, number: Option<u64>, mut event: v1::ClusterEvent) -> Result<(), Gone> {
        self.revision = self.revision.max(event.revision);
        self.number = self.number.max(number.unwrap_or(0));
        event.position = self.positions.then(|| self.position());
        self.out.send(Ok(event)).await.map_err(|_| Gone)
    }

    async fn bookmark(&mut self) -> Result<(), Gone> {
        if !self.positions {
            return Ok(());
        }
        let bare = v1::ClusterEvent { position: Some(self.position()), ..Default::default() };
        self.out.send(Ok(bare)).await.map_err(|_| Gone)
    }

    fn position(&self) -> EventPosition {
        EventPosition {
            epoch: self.hub.store.epoch().to_owned(),
            revision: self.revision,
            run: self.hub.happenings.run().to_owned(),
            number: self.number,
        }
    }

    /// Tells what comes, until the reader or the server ends.
    async fn follow(
        &mut self,
        (mut revisions, mut news): (Receiver<Arc<Revision>>, Receiver<Numbered>),
    ) -> Result<(), Gone> {
        let hub = self.hub.clone();
        let mut bookmarks = time::interval_at(time::Instant::now() + BOOKMARK_EVERY, BOOKMARK_EVERY);
        loop {
            tokio::select! {
                revision = revisions.recv() => match revision {
                    Ok(revision) => self.tell_revision(&revision).await?,
                    Err(RecvError::Lagged(_)) => self.catch_up().await?,
                    Err(RecvError::Closed) => return Ok(()),
                },
                event = news.recv() => match event {
                    Ok((number, event)) => self.tell_news(number, event).await?,
                    Err(RecvError::Lagged(_)) => self.catch_up().await?,
                    Err(RecvError::Closed) => return Ok(()),
                },
                _ = bookmarks.tick() => self.bookmark().await?,
                () = self.out.closed() => return Err(Gone),
                () = hub.closed() => {
                    // A reader that is behind finds out by the end of the stream.
                    let _ = self.out.try_send(Err(Status::unavailable("the server is stopping")));
                    return Ok(());
                }
            }
        }
    }

    async fn tell_revision(&mut self, revision: &Revision) -> Result<(), Gone> {
        if revision.revision <= self.revision {
            return Ok(());
        }
        self.revision = revision.revision;
        match words::of_revision(revision, &self.pod) {
            Some(event) => self.tell(None, event).await,
            None => Ok(()),
        }
    }

    async fn tell_news(&mut self, number: u64, event: v1::ClusterEvent) -> Result<(), Gone> {
        if number <= self.number {
            return Ok(());
        }
        self.number = number;
        if is_about(&event, &self.pod) { self.tell(Some(number), event).await } else { Ok(()) }
    }

    /// The reader is behind what is in memory for it: what it has missed is read.
    async fn catch_up(&mut self) -> Result<(), Gone> {
        match past::since(&self.hub, &self.pod, self.revision, self.number).await {
            Ok(past) => self.tell_past(past).await,
            Err(status) => {
                let _ = self.out.send(Err(status)).await;
                Err(Gone)
            }
        }
    }
}
