//! Following the stream: pods come in, configurations go out, each revision is answered.
//!
//! A lost connection is taken up again with a growing pause, from the last revision that is in effect.
//! Changes that come close together become one reload.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use hextet_api::{
    connect::{self, ConnectError, Credentials, EnrollError, Key, Wish},
    endpoints::{self, EndpointSet, EndpointsError},
    token::{Role, Token},
    v1::{WatchRequest, WatchResponse, endpoints_client::EndpointsClient},
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};
use tracing::{debug, error, info, warn};

use crate::{
    proxy::Proxy,
    render::{Frame, render},
    state::StateDir,
};

/// The least time between two reloads.
const RELOAD_PAUSE: Duration = Duration::from_millis(100);
/// How long a configuration that failed waits to be tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// How often it is looked whether the credentials end soon.
const RENEW_LOOK: Duration = Duration::from_secs(3600);
/// How long new ones may take.
const RENEW_MAX: Duration = Duration::from_secs(10);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How often nginx is looked after.
const WATCHDOG: Duration = Duration::from_secs(1);
/// A snapshot of this many bytes is 1,000 endpoints with the longest names.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
const ANSWERS_MAX: usize = 16;

/// Keeps one nginx at what the server says.
pub(crate) struct Follower {
    state: StateDir,
    proxy: Proxy,
    frame: Frame,
    token: Option<Token>,
    set: EndpointSet,
    /// Whether the server has answered since the start.
    met: bool,
}

/// Why the stream ended.
enum Ended {
    /// The connection was lost, or the server asks to come again.
    Again(anyhow::Error),
    /// Trying again will not help.
    Never(anyhow::Error),
}

type Answers = mpsc::Sender<WatchRequest>;

impl Follower {
    pub(crate) fn new(state: StateDir, proxy: Proxy, frame: Frame, token: Option<Token>) -> Follower {
        let set = state.load(&frame.selector);
        Follower { state, proxy, frame, token, set, met: false }
    }

    /// Serves until `end`. nginx starts with the last known pods, before the server is asked.
    pub(crate) async fn run(mut self, end: impl Future<Output = ()>) -> anyhow::Result<()> {
        if let Err(error) = self.proxy.apply(&self.text()).await {
            error!("{error:#}");
        } else {
            info!(ready = self.set.ready().count(), "serving with the last known pods");
        }
        let ended = tokio::select! {
            ended = self.follow_for_ever() => ended,
            () = end => Ok(()),
        };
        self.proxy.stop().await;
        ended
    }

    fn text(&self) -> String {
        render(&self.frame, self.set.ready())
    }

    async fn follow_for_ever(&mut self) -> anyhow::Result<()> {
        let mut backoff = BACKOFF_MIN;
        let mut told = String::new();
        loop {
            let started = Instant::now();
            let error = match self.follow().await {
                Ended::Never(error) if !self.met => return Err(error),
                Ended::Never(error) | Ended::Again(error) => format!("{error:#}"),
            };
            match error == told {
                true => debug!("{error}"),
                false => warn!("{error}; serving on with the last known pods"),
            }
            told = error;
            let held = started.elapsed() > BACKOFF_MAX;
            backoff = if held { BACKOFF_MIN } else { (backoff * 2).min(BACKOFF_MAX) };
            self.pause(backoff).await;
        }
    }

    /// Looks after nginx while there is no stream.
    async fn pause(&self, duration: Duration) {
        self.proxy.keep_running().await;
        sleep(duration).await;
    }

    async fn follow(&mut self) -> Ended {
        let channel = match self.connect().await {
            Ok(channel) => channel,
            Err(ended) => return ended,
        };
        // What was saved is what is in effect; a change that failed since is asked for again.
        self.set = self.state.load(&self.frame.selector);
        let (answers, requests) = mpsc::channel(ANSWERS_MAX);
        let selector = &self.frame.selector;
        // The channel is empty, so there is room.
        let _ = answers.try_send(self.set.subscribe(&selector.job, &selector.group, "lb-nginx"));
        let mut client = EndpointsClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        match client.watch(ReceiverStream::new(requests)).await {
            Ok(response) => self.keep_up(response.into_inner(), answers).await,
            Err(status) => ended(status),
        }
    }

    async fn keep_up(&mut self, mut stream: Streaming<WatchResponse>, answers: Answers) -> Ended {
        info!(selector = %self.frame.selector, from = self.set.revision(), "following");
        let mut watchdog = interval(WATCHDOG);
        watchdog.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = interval(RENEW_LOOK);
        let mut due = false;
        let mut next_reload = Instant::now();
        loop {
            tokio::select! {
                message = stream.message() => match self.take_in(message) {
                    Ok(changed) => due |= changed,
                    Err(ended) => return ended,
                },
                () = sleep_until(next_reload), if due => {
                    due = !self.bring_into_effect(&answers).await;
                    next_reload = Instant::now() + if due { RETRY_PAUSE } else { RELOAD_PAUSE };
                }
                _ = watchdog.tick() => self.proxy.keep_running().await,
                _ = looks.tick() => self.keep_fresh().await,
            }
        }
    }

    /// Whether there is a revision to bring into effect.
    fn take_in(&mut self, message: Result<Option<WatchResponse>, Status>) -> Result<bool, Ended> {
        let response = match message {
            Ok(Some(message)) => message.response,
            Ok(None) => return Err(Ended::Again(anyhow::anyhow!("the server ended the stream"))),
            Err(status) => return Err(ended(status)),
        };
        self.met = true;
        let applied = response.ok_or(EndpointsError::Unknown).and_then(|response| self.set.apply(response));
        match applied {
            Ok(changes) => Ok(changes.is_some()),
            Err(error) => Err(Ended::Again(error.into())),
        }
    }

    /// Answers the set's revision; false when it has to be tried again.
    async fn bring_into_effect(&mut self, answers: &Answers) -> bool {
        let revision = self.set.revision();
        let applied = self.proxy.apply(&self.text()).await;
        let answer = match &applied {
            Ok(()) => endpoints::ack(revision),
            Err(error) => endpoints::reject(revision, format!("{error:#}")),
        };
        match &applied {
            Ok(()) => info!(revision, ready = self.set.ready().count(), "in effect"),
            Err(error) => warn!(revision, "{error:#}; the configuration before it stays"),
        }
        if applied.is_ok()
            && let Err(error) = self.state.save(&self.frame.selector, &self.set)
        {
            warn!("{error:#}: after a restart an older state is resumed");
        }
        // The other end goes with the stream, whose own error says why.
        let _ = answers.send(answer).await;
        applied.is_ok()
    }

    /// Replaces the credentials before they end, and when another CA makes certificates. The stream goes on; the next one
    /// is made with the new ones.
    async fn keep_fresh(&self) {
        let path = self.state.file("credentials.json");
        let Ok(credentials) = Credentials::load(&path) else { return };
        // A connection of its own: the stream's may be older than the credentials.
        let Ok((channel, has_moved)) = connect::mutual_tls_and_ca(&credentials).await else { return };
        if !has_moved && !credentials.is_due(SystemTime::now()) {
            return;
        }
        let renewing = connect::renew_kept(&path, &credentials, channel);
        match timeout(RENEW_MAX, renewing).await {
            Ok(Ok(_)) => info!("the credentials are renewed"),
            Ok(Err(error)) => warn!("the credentials are due and cannot be renewed: {error}"),
            Err(_) => warn!("the credentials are due, and the server does not renew them in time"),
        }
    }

    async fn connect(&self) -> Result<Channel, Ended> {
        let credentials = self.credentials().await?;
        connect::mutual_tls(&credentials).await.map_err(from_connect)
    }

    /// Those that were kept, or new ones for the token.
    async fn credentials(&self) -> Result<Credentials, Ended> {
        let path = self.state.file("credentials.json");
        if path.exists() {
            return Credentials::load(&path).map_err(|error| Ended::Never(error.into()));
        }
        let token = self.usable_token().map_err(Ended::Never)?;
        let never = |error: connect::CredentialsError| Ended::Never(error.into());
        // The same key may be enrolled again if this program ends before the answer is kept.
        let key = Key::kept_in(&self.state.file("key.der")).map_err(never)?;
        let enrolled = connect::enroll(token, &key, Wish::default()).await.map_err(from_enroll)?;
        enrolled.credentials.save(&path).map_err(never)?;
        info!(name = %enrolled.credentials.name, "enrolled");
        Ok(enrolled.credentials)
    }

    fn usable_token(&self) -> anyhow::Result<&Token> {
        let selector = &self.frame.selector;
        let token = self.token.as_ref().with_context(|| {
            format!("there are no credentials yet: give --join with what `netctl token --for lb --select {selector}` prints")
        })?;
        if token.role != Role::Lb {
            bail!(
                "the token is for a {}: `netctl token --for lb --select {selector}` makes the right one",
                token.role
            );
        }
        Ok(token)
    }
}

fn ended(status: Status) -> Ended {
    let error = match status.message() {
        "" => anyhow::anyhow!("the server answered {:?}", status.code()),
        message => anyhow::anyhow!("{message}"),
    };
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated | Code::InvalidArgument | Code::Unimplemented => {
            Ended::Never(error)
        }
        _ => Ended::Again(error),
    }
}

fn from_connect(error: ConnectError) -> Ended {
    match error {
        ConnectError::AnotherCluster { .. } | ConnectError::Credentials(_) | ConnectError::NoServers => {
            Ended::Never(error.into())
        }
        error => Ended::Again(error.into()),
    }
}

fn from_enroll(error: EnrollError) -> Ended {
    match error {
        EnrollError::Connect(error) => from_connect(error),
        EnrollError::Refused { status } => ended(status),
        error => Ended::Never(error.into()),
    }
}
