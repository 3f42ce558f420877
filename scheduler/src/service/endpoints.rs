//! The stream of pod addresses for load balancers.
//!
//! One task per reader. It holds what its reader knows, so that a reader that falls behind gets the net
//! change and holds up nobody.

use std::{sync::Arc, time::Duration};

use hextet_api::v1::{
    self, WatchRequest, WatchResponse, endpoints_server::Endpoints, watch_request::Request as Answer,
    watch_response::Response as Message,
};
use scheduler_core::{
    change::Revision,
    drain::SubscriberId,
    endpoint::Selector,
    token::Role,
    watch::{self, Begin, Resume},
};
use tokio::{
    sync::{
        OwnedSemaphorePermit, Semaphore,
        broadcast::{self, error::RecvError},
        mpsc,
    },
    task,
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use crate::{auth, convert, hub::Hub, identity::Identity, rotation, writer::chain};

/// How long a reader may take to say what it wants.
const SUBSCRIBE_MAX: Duration = Duration::from_secs(10);
/// How long a reader may take to read a message.
const SEND_MAX: Duration = Duration::from_secs(30);
/// Quiet for this long, a reader gets a bookmark. The contract says 10 s.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(5);
/// Endpoints in one message of a snapshot.
const CHUNK_LEN: usize = 1000;
/// Revisions read from the store at a time.
const REPLAY_CHUNK: usize = 256;
/// Messages between the task and the connection.
const OUT_MAX: usize = 16;

/// Readers at a time.
const READERS_MAX: usize = 10_000;

pub(crate) struct EndpointsService {
    hub: Arc<Hub>,
    bound: Arc<Semaphore>,
}

impl EndpointsService {
    pub(crate) fn new(hub: Arc<Hub>) -> EndpointsService {
        EndpointsService { hub, bound: Arc::new(Semaphore::new(READERS_MAX)) }
    }
}

#[tonic::async_trait]
impl Endpoints for EndpointsService {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (caller, signer) = (auth::caller(&request), auth::signer(&request));
        let (out, messages) = mpsc::channel(OUT_MAX);
        let counted = self.bound.clone().try_acquire_owned();
        let counted = counted.map_err(|_| Status::resource_exhausted("too many readers: try again later"))?;
        let hub = self.hub.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = run(hub.clone(), caller.clone(), request.into_inner(), out, counted) => {}
                never = rotation::note_when_late(&hub, &caller, signer) => match never {},
            }
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

type Out = mpsc::Sender<Result<WatchResponse, Status>>;

async fn run(
    hub: Arc<Hub>,
    caller: Identity,
    answers: Streaming<WatchRequest>,
    out: Out,
    _counted: OwnedSemaphorePermit,
) {
    let status = tokio::select! {
        status = serve(&hub, &caller, answers, &out) => status,
        () = hub.closed() => Status::unavailable("the server is stopping"),
        () = out.closed() => return,
    };
    let _ = time::timeout(SEND_MAX, out.send(Err(status))).await;
}

async fn serve(hub: &Arc<Hub>, caller: &Identity, mut answers: Streaming<WatchRequest>, out: &Out) -> Status {
    let (selector, subscribe) = match subscription(caller, &mut answers).await {
        Ok(subscription) => subscription,
        Err(status) => return status,
    };
    let name = format!("{} ({})", caller.changer(), subscribe.client.chars().take(64).collect::<String>());
    info!(%name, %selector, "load balancer subscribed");
    let subscriber = Subscriber::new(hub, &selector);
    let reader = Reader { hub, known: watch::Reader::new(selector.clone()), out };
    let status = tokio::select! {
        status = reader.follow(&subscribe) => status,
        status = read_answers(&subscriber, &name, answers) => status,
    };
    info!(%name, %selector, reason = status.message(), "load balancer left");
    status
}

/// The first message: what the reader wants, which must be within what it may read.
async fn subscription(
    caller: &Identity,
    answers: &mut Streaming<WatchRequest>,
) -> Result<(Selector, v1::Subscribe), Status> {
    let first = time::timeout(SUBSCRIBE_MAX, answers.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("the subscription is missing"))??;
    let Some(Answer::Subscribe(subscribe)) = first.and_then(|first| first.request) else {
        return Err(Status::invalid_argument("a reader subscribes first"));
    };
    let group = Some(&subscribe.group).filter(|group| !group.is_empty());
    let text = group.map_or(subscribe.job.clone(), |group| format!("{}/{group}", subscribe.job));
    let selector: Selector =
        text.parse().map_err(|error| Status::invalid_argument(format!("{text}: {error}")))?;
    if let Identity::Enrolled { enrolled, .. } = caller
        && let Role::Lb(own) = &enrolled.role
        && !own.covers(&selector)
    {
        return Err(Status::permission_denied(format!(
            "this certificate reads the addresses of {own}, not of {selector}"
        )));
    }
    Ok((selector, subscribe))
}

/// Counts among those that drains wait for, until it is dropped.
struct Subscriber<'a> {
    hub: &'a Hub,
    id: SubscriberId,
}

impl<'a> Subscriber<'a> {
    fn new(hub: &'a Hub, selector: &Selector) -> Subscriber<'a> {
        Subscriber { hub, id: hub.drains().subscribe(selector.clone(), 0) }
    }

    fn acknowledge(&self, revision: u64) {
        self.hub.drains().acknowledge(self.id, revision);
        self.hub.drains_changed.notify_one();
    }
}

impl Drop for Subscriber<'_> {
    fn drop(&mut self) {
        self.hub.drains().unsubscribe(self.id);
        self.hub.drains_changed.notify_one();
    }
}

async fn read_answers(
    subscriber: &Subscriber<'_>,
    name: &str,
    mut answers: Streaming<WatchRequest>,
) -> Status {
    loop {
        match answers.message().await {
            Ok(Some(WatchRequest { request: Some(Answer::Ack(ack)) })) => {
                subscriber.acknowledge(ack.revision)
            }
            Ok(Some(WatchRequest { request: Some(Answer::Reject(reject)) })) => {
                let reason: String = reject.reason.chars().take(512).collect();
                warn!(%name, revision = reject.revision, reason, "a load balancer could not apply a revision");
            }
            Ok(Some(_)) => {
                return Status::invalid_argument(
                    "a reader subscribes once, and then acknowledges or rejects",
                );
            }
            Ok(None) => return Status::ok("the reader has ended its stream"),
            Err(status) => return status,
        }
    }
}

/// One reader and its connection.
struct Reader<'a> {
    hub: &'a Hub,
    known: watch::Reader,
    out: &'a Out,
}

/// Each lets go of the state before anything is sent: a snapshot that is held keeps old values in memory.
impl Reader<'_> {
    async fn follow(mut self, subscribe: &v1::Subscribe) -> Status {
        let mut revisions = self.hub.revisions();
        let mut result = self.begin(subscribe).await;
        while result.is_ok() {
            result = self.next(&mut revisions).await;
        }
        result.expect_err("the loop ends with an error")
    }

    /// Sends what was missed, or everything.
    async fn begin(&mut self, subscribe: &v1::Subscribe) -> Result<(), Status> {
        let same_store = subscribe.epoch == self.hub.store.epoch();
        let resume = Resume { same_store, from: subscribe.from_revision };
        let resume = Some(resume).filter(|_| !subscribe.epoch.is_empty());
        let newest = self.hub.state().revision();
        // A damaged log may lack what the reader has not heard.
        let oldest = if self.hub.store.damage().is_some() { newest + 1 } else { self.oldest()? };
        match watch::begin(resume, oldest, newest) {
            Begin::Snapshot => self.snapshot().await,
            Begin::Compacted => {
                if same_store && subscribe.from_revision > newest {
                    self.is_not_behind(newest).await?;
                }
                let epoch = self.hub.store.epoch().to_owned();
                self.send(Message::Compacted(v1::Compacted { epoch, oldest_revision: oldest })).await?;
                self.snapshot().await
            }
            Begin::Replay(from) => {
                self.replay(from).await?;
                self.tell(self.known.bookmark()).await
            }
        }
    }

    /// A server that was stopped for a while and does not know yet that another one leads would answer a reader that
    /// knows more with what was.
    async fn is_not_behind(&self, newest: u64) -> Result<(), Status> {
        match self.read_log(newest).await?.is_empty() {
            true => Ok(()),
            false => {
                Err(Status::unavailable("this server is behind its store: another one may lead; try again"))
            }
        }
    }

    async fn snapshot(&mut self) -> Result<(), Status> {
        let snapshot = self.known.snapshot(&self.hub.state());
        self.tell(snapshot).await
    }

    /// The events after `from` up to the newest, as they were.
    async fn replay(&mut self, from: u64) -> Result<(), Status> {
        self.known.skip_to(&self.hub.state());
        let mut at = from;
        while at < self.known.revision() {
            let entries = self.read_log(at).await?;
            let Some(last) = entries.last().map(|entry| entry.revision) else {
                return Err(Status::data_loss("the log has a gap: subscribe anew"));
            };
            for message in entries.iter().filter_map(|entry| self.known.replay(entry)) {
                self.tell(message).await?;
            }
            at = last;
        }
        Ok(())
    }

    async fn read_log(&self, after: u64) -> Result<Vec<Revision>, Status> {
        let store = self.hub.store.clone();
        let read = task::spawn_blocking(move || store.log_after(after, REPLAY_CHUNK)).await;
        let read = read.map_err(|error| Status::internal(error.to_string()))?;
        read.map_err(|error| Status::unavailable(chain(&error)))
    }

    fn oldest(&self) -> Result<u64, Status> {
        self.hub.store.oldest().map_err(|error| Status::unavailable(chain(&error)))
    }

    /// Waits for a revision that changes something for this reader and sends that.
    async fn next(&mut self, revisions: &mut broadcast::Receiver<Arc<Revision>>) -> Result<(), Status> {
        let bookmark_due = Instant::now() + BOOKMARK_INTERVAL;
        loop {
            // Only the waiting is cut short: a change that is taken over is sent, however slow the reader.
            let Ok(received) = time::timeout_at(bookmark_due, revisions.recv()).await else {
                return self.tell(self.known.bookmark()).await;
            };
            let message = match received {
                Ok(revision) => self.known.committed(&revision, || self.hub.state()),
                Err(RecvError::Lagged(_)) => self.known.lagged(&self.hub.state()),
                Err(RecvError::Closed) => return Err(Status::unavailable("the server is stopping")),
            };
            if let Some(message) = message {
                return self.tell(message).await;
            }
        }
    }

    async fn tell(&self, message: watch::Message) -> Result<(), Status> {
        let epoch = self.hub.store.epoch().to_owned();
        match message {
            watch::Message::Snapshot { revision, endpoints } => {
                let endpoints: Vec<_> = endpoints.iter().map(convert::endpoint).collect();
                self.send_chunks(&epoch, revision, &endpoints).await
            }
            watch::Message::Event { revision, diff } => {
                let upserts = diff.upserts.iter().map(convert::endpoint).collect();
                let removals = diff.removals.iter().map(ToString::to_string).collect();
                self.send(Message::Event(v1::Event { revision, upserts, removals })).await
            }
            watch::Message::Bookmark { revision } => {
                self.send(Message::Bookmark(v1::Bookmark { epoch, revision })).await
            }
        }
    }

    async fn send_chunks(
        &self,
        epoch: &str,
        revision: u64,
        endpoints: &[v1::Endpoint],
    ) -> Result<(), Status> {
        let mut chunks: Vec<&[v1::Endpoint]> = endpoints.chunks(CHUNK_LEN).collect();
        if chunks.is_empty() {
            chunks.push(&[]);
        }
        let last = chunks.len() - 1;
        for (number, chunk) in chunks.into_iter().enumerate() {
            let (epoch, endpoints) = (epoch.to_owned(), chunk.to_vec());
            let snapshot = v1::Snapshot { epoch, revision, endpoints, last: number == last };
            self.send(Message::Snapshot(snapshot)).await?;
        }
        Ok(())
    }

    async fn send(&self, message: Message) -> Result<(), Status> {
        let sent = self.out.send(Ok(WatchResponse { response: Some(message) }));
        match time::timeout(SEND_MAX, sent).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::cancelled("the reader has gone")),
            Err(_) => Err(Status::deadline_exceeded("the reader does not read")),
        }
    }
}

#[cfg(test)]
mod tests;
