//! Answers every call that there is no leader, and why.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{sync::watch, task::JoinSet};
use tonic::{
    Status,
    body::Body,
    codegen::http::{Request, Response},
    service::Routes,
    transport::Server,
};
use tower::{Layer, Service};

use crate::{
    front::{self, Inlets, Mode},
    pki::Pki,
    term,
    tls::{self, Shown},
};

/// A client that was told so comes back to look for a leader.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(1);

/// Answers connections that come into the inlets for as long as the tasks live.
pub(crate) fn serve(pki: Arc<Pki>, mode: watch::Receiver<Mode>) -> anyhow::Result<(Inlets, JoinSet<()>)> {
    let (inlets, outlets) = front::channel();
    let builder = || term::limits(Server::builder()).max_connection_age(CONNECTION_AGE_MAX);
    let acceptor = tls::acceptor(Arc::new(Shown::new(pki.clone())?))?;
    let incoming = tls::handshakes(outlets.tcp, acceptor, pki);
    let tcp = builder().layer(Sorry(mode.clone())).add_routes(Routes::default());
    let unix = builder().layer(Sorry(mode)).add_routes(Routes::default());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { drop(tcp.serve_with_incoming(incoming).await) });
    tasks.spawn(async move { drop(unix.serve_with_incoming(outlets.unix).await) });
    Ok((inlets, tasks))
}

#[derive(Clone)]
struct Sorry(watch::Receiver<Mode>);

impl Sorry {
    fn status(&self) -> Status {
        let why = match &*self.0.borrow() {
            Mode::Nobody(why) => why.clone(),
            Mode::Follows(leader) => format!("the leader does not answer at {}", leader.servers.join(", ")),
            Mode::Leads(_) => "this server has just begun to lead".to_owned(),
        };
        Status::unavailable(format!("no server leads now ({why}): try again"))
    }
}

impl<S> Layer<S> for Sorry {
    type Service = Sorry;

    fn layer(&self, _: S) -> Sorry {
        self.clone()
    }
}

impl<B> Service<Request<B>> for Sorry {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<B>) -> Self::Future {
        ready(Ok(self.status().into_http()))
    }
}
