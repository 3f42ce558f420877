//! A client of etcd: bounded calls, tried at each of its members, on threads of their own.
//!
//! It speaks etcd's protocol by itself (`proto/etcd.proto`), and knows nothing of what the keys mean. Its
//! threads do nothing else, so that a lease is kept alive however busy the server is, and a thread that
//! waits for etcd (`Etcd::wait`) never waits for itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use tokio::{
    runtime::{self, Runtime},
    time::timeout,
};
use tonic::{
    Code, Response, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use self::pb::{
    kv_client::KvClient, lease_client::LeaseClient, request_op::Request, watch_client::WatchClient,
};

mod kv;
pub mod location;
mod standing;

#[doc(hidden)]
#[allow(missing_docs, clippy::all, unreachable_pub, reason = "generated; the .proto holds the docs")]
pub mod pb {
    tonic::include_proto!("etcdserverpb");
}

pub use kv::{Kv, Right, claim, deposition};
pub use location::{Location, LocationError, TlsFiles};
pub(crate) use standing::{Said, Standing};

/// How long one member may take to answer.
const CALL_MAX: Duration = Duration::from_secs(2);
/// How long one member may take to answer that a lease goes on.
const KEEP_ALIVE_MAX: Duration = Duration::from_millis(500);
const CONNECT_MAX: Duration = Duration::from_millis(500);
/// Answers with many values: a page of current values, or of the log.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// Why etcd did not do what it was asked to.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EtcdError {
    /// It cannot be reached, or has no quorum. What was asked for may have been done.
    #[error("etcd at {endpoints} does not answer ({cause})")]
    Unreachable {
        /// Its members.
        endpoints: String,
        /// What the last one that was asked said.
        cause: String,
    },
    /// It has no room.
    #[error(
        "etcd at {endpoints} is full ({cause}): compact and defragment it, or raise its --quota-backend-bytes, and disarm its alarm"
    )]
    Full {
        /// Its members.
        endpoints: String,
        /// What it said.
        cause: String,
    },
    /// It says no.
    #[error("etcd at {endpoints} refuses: {cause}")]
    Refused {
        /// Its members.
        endpoints: String,
        /// What it said.
        cause: String,
    },
    /// A certificate or key cannot be used.
    #[error("cannot use TLS with etcd: {0}")]
    Tls(String),
}

/// A client for programs that measure: servers make their own.
///
/// # Errors
/// [`EtcdError::Tls`].
#[doc(hidden)]
pub fn client(location: &Location) -> Result<impl Kv + Clone + use<>, EtcdError> {
    Etcd::new(location)
}

/// An etcd cluster.
#[derive(Clone)]
pub(crate) struct Etcd(Arc<Inner>);

struct Inner {
    endpoints: String,
    channels: Vec<Channel>,
    /// Which member is asked.
    at: AtomicUsize,
    /// Taken when the last client goes.
    runtime: Option<Runtime>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Etcd {
    /// Connects when it is first asked something.
    ///
    /// # Errors
    /// [`EtcdError::Tls`].
    pub(crate) fn new(location: &Location) -> Result<Etcd, EtcdError> {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("etcd")
            .enable_all()
            .build()
            .map_err(|error| EtcdError::Tls(error.to_string()))?;
        let _inside = runtime.enter();
        let channels = location.endpoints.iter().map(|endpoint| channel(location, endpoint));
        let channels = channels.collect::<Result<_, _>>()?;
        drop(_inside);
        let endpoints = location.endpoints.join(", ");
        let inner = Inner { endpoints, channels, at: AtomicUsize::new(0), runtime: Some(runtime) };
        Ok(Etcd(Arc::new(inner)))
    }

    /// Its members, for people.
    pub(crate) fn endpoints(&self) -> &str {
        &self.0.endpoints
    }

    /// Waits for `work`, in any thread.
    pub(crate) fn wait<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        let (done, answer) = mpsc::sync_channel(1);
        self.spawn(async move {
            // The one that waits is there for as long as this is.
            let _ = done.send(work.await);
        });
        answer.recv().expect("the threads of a client outlive those who wait for it")
    }

    /// Runs `work` on the client's own threads.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.0.runtime.as_ref().expect("it is taken by drop alone").spawn(work)
    }

    /// All or nothing. It is asked for once: after [`EtcdError::Unreachable`] nobody knows.
    pub(crate) async fn txn(&self, request: pb::TxnRequest) -> Result<pb::TxnResponse, EtcdError> {
        let call = |channel: Channel| {
            let request = request.clone();
            async move { kv_client(channel).txn(request).await }
        };
        self.once(CALL_MAX, call).await
    }

    /// One page of a range.
    pub(crate) async fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, EtcdError> {
        let call = |channel: Channel| {
            let request = request.clone();
            async move { kv_client(channel).range(request).await }
        };
        self.at_each(CALL_MAX, call).await
    }

    /// The value of a key.
    pub(crate) async fn get(&self, key: &str) -> Result<Option<pb::KeyValue>, EtcdError> {
        let request = pb::RangeRequest { key: key.into(), ..pb::RangeRequest::default() };
        Ok(self.range(request).await?.kvs.pop())
    }

    /// Every key that begins with `prefix`.
    pub(crate) async fn all(
        &self,
        prefix: &str,
        keys_only: bool,
        page: i64,
    ) -> Result<Vec<pb::KeyValue>, EtcdError> {
        let mut request = pb::RangeRequest {
            key: prefix.into(),
            range_end: after(prefix),
            limit: page,
            keys_only,
            ..pb::RangeRequest::default()
        };
        let mut found = Vec::new();
        loop {
            let (some, more) = self.page(&mut request).await?;
            found.extend(some);
            if !more {
                return Ok(found);
            }
        }
    }

    /// One page of a range, and whether there are more; the request then asks for the next.
    pub(crate) async fn page(
        &self,
        request: &mut pb::RangeRequest,
    ) -> Result<(Vec<pb::KeyValue>, bool), EtcdError> {
        let answer = self.range(request.clone()).await?;
        if let Some(last) = answer.kvs.last() {
            request.key = [&last.key[..], &[0]].concat();
        }
        Ok((answer.kvs, answer.more))
    }

    /// A new lease, and for how long it is good.
    pub(crate) async fn grant(&self, ttl: Duration) -> Result<(i64, Duration), EtcdError> {
        let request = pb::LeaseGrantRequest { ttl: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX), id: 0 };
        let call = |channel: Channel| async move { LeaseClient::new(channel).lease_grant(request).await };
        let granted = self.at_each(CALL_MAX, call).await?;
        Ok((granted.id, seconds(granted.ttl)))
    }

    /// Ends a lease, and with it its keys.
    pub(crate) async fn revoke(&self, id: i64) -> Result<(), EtcdError> {
        let request = pb::LeaseRevokeRequest { id };
        let call = |channel: Channel| async move { LeaseClient::new(channel).lease_revoke(request).await };
        self.at_each(KEEP_ALIVE_MAX, call).await.map(drop)
    }

    /// For how long from now the lease is good; zero when it has ended.
    pub(crate) async fn keep_alive(&self, id: i64) -> Result<Duration, EtcdError> {
        let call = |channel: Channel| async move {
            let request = tokio_stream::once(pb::LeaseKeepAliveRequest { id });
            let mut answers = LeaseClient::new(channel).lease_keep_alive(request).await?.into_inner();
            let answer = answers.message().await?;
            let answer = answer.ok_or_else(|| Status::unavailable("it ended the stream"))?;
            Ok(Response::new(answer))
        };
        self.at_each(KEEP_ALIVE_MAX, call).await.map(|answer| seconds(answer.ttl))
    }

    /// Returns when a key was deleted after `revision`, or when that is no longer known.
    pub(crate) async fn deleted(&self, key: &str, revision: i64) -> Result<(), EtcdError> {
        let start_revision = revision.saturating_add(1);
        let create = pb::WatchCreateRequest { key: key.into(), range_end: vec![], start_revision };
        let is_delete = |event: &pb::Event| event.r#type() == pb::event::Type::Delete;
        self.watch(create, |message| !message.canceled && !message.events.iter().any(is_delete)).await
    }

    /// Says when something below `prefix`, which ends with `/`, has changed, until the stream ends.
    pub(crate) async fn changes(&self, prefix: &str, mut changed: impl FnMut()) -> Result<(), EtcdError> {
        let (key, range_end) = (prefix.into(), after(prefix));
        let create = pb::WatchCreateRequest { key, range_end, start_revision: 0 };
        let goes_on = |message: &pb::WatchResponse| {
            changed();
            !message.canceled
        };
        self.watch(create, goes_on).await
    }

    /// Watches until `goes_on` says no, or the stream ends.
    async fn watch(
        &self,
        create: pb::WatchCreateRequest,
        mut goes_on: impl FnMut(&pb::WatchResponse) -> bool,
    ) -> Result<(), EtcdError> {
        let union = Some(pb::watch_request::RequestUnion::CreateRequest(create));
        let (requests, stream) = tokio::sync::mpsc::channel(1);
        requests.try_send(pb::WatchRequest { request_union: union }).expect("there is room for one");
        let call = |channel: Channel| async move {
            let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
            WatchClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX).watch(stream).await
        };
        let mut events = self.once(CALL_MAX, call).await?;
        loop {
            match events.message().await {
                Ok(Some(message)) if goes_on(&message) => {}
                Ok(_) => return Ok(()),
                Err(status) => return Err(self.error(&status)),
            }
        }
    }

    /// What may be done twice is tried at each member.
    async fn at_each<T, Call>(&self, max: Duration, call: impl Fn(Channel) -> Call) -> Result<T, EtcdError>
    where
        Call: Future<Output = Result<Response<T>, Status>>,
    {
        let mut result = self.once(max, &call).await;
        for _ in 1..self.0.channels.len() {
            if !matches!(result, Err(EtcdError::Unreachable { .. })) {
                break;
            }
            result = self.once(max, &call).await;
        }
        result
    }

    /// One member is asked. The next call goes to another when this one does not answer.
    async fn once<T, Call>(&self, max: Duration, call: impl FnOnce(Channel) -> Call) -> Result<T, EtcdError>
    where
        Call: Future<Output = Result<Response<T>, Status>>,
    {
        let at = self.0.at.load(Ordering::Relaxed);
        let channel = self.0.channels[at % self.0.channels.len()].clone();
        let result = match timeout(max, call(channel)).await {
            Ok(Ok(response)) => return Ok(response.into_inner()),
            Ok(Err(status)) => self.error(&status),
            Err(_) => self.unreachable(format!("no answer in {max:?}")),
        };
        if matches!(result, EtcdError::Unreachable { .. }) {
            // Whoever comes second has nothing to change.
            let _ = self.0.at.compare_exchange(at, at + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
        Err(result)
    }

    fn error(&self, status: &Status) -> EtcdError {
        let (endpoints, cause) = (self.0.endpoints.clone(), said(status));
        match status.code() {
            Code::ResourceExhausted if cause.contains("space") => EtcdError::Full { endpoints, cause },
            Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::NotFound
            | Code::Unimplemented
            | Code::OutOfRange => EtcdError::Refused { endpoints, cause },
            _ => self.unreachable(cause),
        }
    }

    fn unreachable(&self, cause: String) -> EtcdError {
        EtcdError::Unreachable { endpoints: self.0.endpoints.clone(), cause }
    }
}

fn kv_client(channel: Channel) -> KvClient<Channel> {
    KvClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX)
}

fn channel(location: &Location, endpoint: &str) -> Result<Channel, EtcdError> {
    let scheme = if location.tls.is_some() { "https" } else { "http" };
    let wrong = |error: &dyn std::fmt::Display| EtcdError::Tls(error.to_string());
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{endpoint}"))
        .map_err(|error| wrong(&error))?
        .connect_timeout(CONNECT_MAX)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(CALL_MAX)
        .keep_alive_timeout(CALL_MAX);
    if let Some(files) = &location.tls {
        endpoint = endpoint.tls_config(tls(files)?).map_err(|error| wrong(&error))?;
    }
    Ok(endpoint.connect_lazy())
}

fn tls(files: &TlsFiles) -> Result<ClientTlsConfig, EtcdError> {
    let read = |path: &std::path::Path| {
        std::fs::read(path).map_err(|error| EtcdError::Tls(format!("{}: {error}", path.display())))
    };
    let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&files.ca)?));
    if let Some((certificate, key)) = &files.client {
        config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(config)
}

/// What the transport means is in its source.
fn said(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}

fn seconds(count: i64) -> Duration {
    Duration::from_secs(u64::try_from(count).unwrap_or(0))
}

/// The first key after all those that begin with `prefix`, which ends with `/`.
pub(crate) fn after(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// Writes `value`, as long as the lease lives if there is one.
pub(crate) fn put(key: String, value: Vec<u8>, lease: i64) -> pb::RequestOp {
    let put = pb::PutRequest { key: key.into(), value, lease };
    pb::RequestOp { request: Some(Request::RequestPut(put)) }
}

/// Reads one key.
pub(crate) fn read(key: &str) -> pb::RequestOp {
    let range = pb::RangeRequest { key: key.into(), ..pb::RangeRequest::default() };
    pb::RequestOp { request: Some(Request::RequestRange(range)) }
}

/// Deletes every key that begins with `prefix`, which ends with `/`.
pub(crate) fn delete_all(prefix: &str) -> pb::RequestOp {
    let delete = pb::DeleteRangeRequest { key: prefix.into(), range_end: after(prefix) };
    pb::RequestOp { request: Some(Request::RequestDeleteRange(delete)) }
}

/// Deletes one key.
pub(crate) fn delete(key: String) -> pb::RequestOp {
    let delete = pb::DeleteRangeRequest { key: key.into(), range_end: vec![] };
    pb::RequestOp { request: Some(Request::RequestDeleteRange(delete)) }
}

/// The key has been there since this revision of etcd, 0 for a key that is not there.
pub(crate) fn created_at(key: &str, revision: i64) -> pb::Compare {
    pb::Compare {
        result: pb::compare::CompareResult::Equal.into(),
        target: pb::compare::CompareTarget::Create.into(),
        key: key.into(),
        target_union: Some(pb::compare::TargetUnion::CreateRevision(revision)),
    }
}

/// The key was written last at this revision of etcd, 0 for a key that is not there.
pub(crate) fn written_at(key: &str, revision: i64) -> pb::Compare {
    pb::Compare {
        result: pb::compare::CompareResult::Equal.into(),
        target: pb::compare::CompareTarget::Mod.into(),
        key: key.into(),
        target_union: Some(pb::compare::TargetUnion::ModRevision(revision)),
    }
}

/// What the reads of a transaction found, in order.
pub(crate) fn found(response: pb::TxnResponse) -> impl Iterator<Item = Option<pb::KeyValue>> {
    response.responses.into_iter().filter_map(|response| match response.response {
        Some(pb::response_op::Response::ResponseRange(mut range)) => Some(range.kvs.pop()),
        _ => None,
    })
}

#[cfg(test)]
mod tests;
