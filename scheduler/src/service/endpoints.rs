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
    drain::SubscriberId,
    endpoint::{self, EndpointDiff, Selection, Selector},
    state::State,
    token::Role,
};
use tokio::{
    sync::{broadcast::error::RecvError, mpsc},
    task, time,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use crate::{auth, convert, hub::Hub, identity::Identity, writer::chain};

/// How long a reader may take to say what it wants.
const SUBSCRIBE_MAX: Duration = Duration::from_secs(10);
/// How long a reader may take to read a message.
const SEND_MAX: Duration = Duration::from_secs(30);
/// Quiet for this long, a reader gets a bookmark. The contract says 10 s.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(5);
/// Endpoints in one message of a snapshot.
const CHUNK_LEN: usize = 1000;
/// A change of more endpoints than this is sent as a snapshot, in chunks.
const EVENT_LEN_MAX: usize = 10_000;
/// A reader that has been away for more revisions than this gets a snapshot.
const REPLAY_MAX: u64 = 10_000;
/// Revisions read from the store at a time.
const REPLAY_CHUNK: usize = 256;
/// Messages between the task and the connection.
const OUT_MAX: usize = 16;

pub(crate) struct EndpointsService(pub(crate) Arc<Hub>);

#[tonic::async_trait]
impl Endpoints for EndpointsService {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let caller = auth::caller(&request);
        let (out, messages) = mpsc::channel(OUT_MAX);
        tokio::spawn(run(self.0.clone(), caller, request.into_inner(), out));
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

type Out = mpsc::Sender<Result<WatchResponse, Status>>;

async fn run(hub: Arc<Hub>, caller: Identity, answers: Streaming<WatchRequest>, out: Out) {
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
    let reader = Reader { hub, selector: &selector, known: Selection::new(), revision: 0, out };
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

/// What one reader knows.
struct Reader<'a> {
    hub: &'a Hub,
    selector: &'a Selector,
    known: Selection,
    revision: u64,
    out: &'a Out,
}

impl Reader<'_> {
    async fn follow(mut self, subscribe: &v1::Subscribe) -> Status {
        let mut revisions = self.hub.revisions();
        let state = self.hub.state();
        let mut result = self.begin(subscribe, &state).await;
        drop(state);
        while result.is_ok() {
            result = match time::timeout(BOOKMARK_INTERVAL, self.next(&mut revisions)).await {
                Ok(result) => result,
                Err(_) => self.bookmark().await,
            };
        }
        result.expect_err("the loop ends with an error")
    }

    /// Sends what was missed, or everything.
    async fn begin(&mut self, subscribe: &v1::Subscribe, state: &State) -> Result<(), Status> {
        if subscribe.epoch.is_empty() {
            return self.snapshot(state).await;
        }
        let (oldest, from) = (self.oldest()?, subscribe.from_revision);
        let known = subscribe.epoch == self.hub.store.epoch()
            && from <= state.revision()
            && from.saturating_add(1) >= oldest;
        if !known {
            let epoch = self.hub.store.epoch().to_owned();
            self.send(Message::Compacted(v1::Compacted { epoch, oldest_revision: oldest })).await?;
            return self.snapshot(state).await;
        }
        if state.revision() - from > REPLAY_MAX {
            return self.snapshot(state).await;
        }
        self.revision = from;
        self.replay(state).await?;
        self.bookmark().await
    }

    /// Everything that is selected, in chunks.
    async fn snapshot(&mut self, state: &State) -> Result<(), Status> {
        self.known = endpoint::select(state, self.selector);
        self.revision = state.revision();
        let endpoints: Vec<_> = self.known.values().map(convert::endpoint).collect();
        let mut chunks: Vec<&[v1::Endpoint]> = endpoints.chunks(CHUNK_LEN).collect();
        if chunks.is_empty() {
            chunks.push(&[]);
        }
        let last = chunks.len() - 1;
        for (number, chunk) in chunks.into_iter().enumerate() {
            let (epoch, revision) = (self.hub.store.epoch().to_owned(), self.revision);
            let endpoints = chunk.to_vec();
            let snapshot = v1::Snapshot { epoch, revision, endpoints, last: number == last };
            self.send(Message::Snapshot(snapshot)).await?;
        }
        Ok(())
    }

    /// The events between `self.revision` and `state`, as they were.
    async fn replay(&mut self, state: &State) -> Result<(), Status> {
        self.known = endpoint::select(state, self.selector);
        while self.revision < state.revision() {
            let entries = self.read_log().await?;
            let Some(last) = entries.last().map(|entry| entry.revision) else {
                return Err(Status::data_loss("the log has a gap: subscribe anew"));
            };
            for entry in entries.iter().filter(|entry| entry.revision <= state.revision()) {
                let diff = endpoint::changed_by(entry, self.selector);
                if !diff.is_empty() {
                    self.send(event(entry.revision, &diff)).await?;
                }
            }
            self.revision = last.min(state.revision());
        }
        Ok(())
    }

    async fn read_log(&self) -> Result<Vec<scheduler_core::change::Revision>, Status> {
        let (store, after) = (self.hub.store.clone(), self.revision);
        let read = task::spawn_blocking(move || store.log_after(after, REPLAY_CHUNK)).await;
        let read = read.map_err(|error| Status::internal(error.to_string()))?;
        read.map_err(|error| Status::unavailable(chain(&error)))
    }

    fn oldest(&self) -> Result<u64, Status> {
        self.hub.store.oldest().map_err(|error| Status::unavailable(chain(&error)))
    }

    /// Waits for a revision that changes something for this reader and sends that.
    async fn next(
        &mut self,
        revisions: &mut tokio::sync::broadcast::Receiver<Arc<scheduler_core::change::Revision>>,
    ) -> Result<(), Status> {
        loop {
            match revisions.recv().await {
                Ok(revision) if revision.revision <= self.revision => {}
                Ok(revision) => {
                    self.revision = revision.revision;
                    let diff = endpoint::changed_by(&revision, self.selector);
                    if !diff.is_empty() {
                        return self.change(diff).await;
                    }
                }
                Err(RecvError::Lagged(_)) => {
                    let state = self.hub.state();
                    self.revision = state.revision();
                    let now = endpoint::select(&state, self.selector);
                    let diff = endpoint::diff(&self.known, &now);
                    if !diff.is_empty() {
                        return self.change(diff).await;
                    }
                }
                Err(RecvError::Closed) => return Err(Status::unavailable("the server is stopping")),
            }
        }
    }

    async fn change(&mut self, diff: EndpointDiff) -> Result<(), Status> {
        if diff.len() > EVENT_LEN_MAX {
            let state = self.hub.state();
            return self.snapshot(&state).await;
        }
        diff.apply(&mut self.known);
        self.send(event(self.revision, &diff)).await
    }

    async fn bookmark(&self) -> Result<(), Status> {
        let epoch = self.hub.store.epoch().to_owned();
        self.send(Message::Bookmark(v1::Bookmark { epoch, revision: self.revision })).await
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

fn event(revision: u64, diff: &EndpointDiff) -> Message {
    Message::Event(v1::Event {
        revision,
        upserts: diff.upserts.iter().map(convert::endpoint).collect(),
        removals: diff.removals.iter().map(ToString::to_string).collect(),
    })
}
