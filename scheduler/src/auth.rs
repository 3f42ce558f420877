//! Puts the caller's [`Identity`] into every request, and answers those that may not make it.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tonic::{
    Status,
    body::Body,
    codegen::http::{Request, Response},
    transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
};
use tower::{Layer, Service};
use tracing::warn;

use crate::{
    access,
    identity::{Denied, Identity},
};

/// Checks callers before they reach a service.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AuthLayer {
    /// Root, and who runs the server.
    Socket,
    /// Whoever has a certificate is who it says.
    Tls,
}

/// A service that only callers who may do so reach.
#[derive(Clone, Debug)]
pub(crate) struct Auth<S> {
    inner: S,
    layer: AuthLayer,
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth { inner, layer: *self }
    }
}

impl<S, B> Service<Request<B>> for Auth<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let identity = self.layer.identify(&request);
        let path = request.uri().path();
        let (access, _) = access::of_method(path);
        if let Err(denied) = identity.check(access) {
            warn!(caller = %identity, path, "refused");
            let status = refusal(&denied);
            return Box::pin(async move { Ok(status.into_http()) });
        }
        request.extensions_mut().insert(identity);
        Box::pin(self.inner.call(request))
    }
}

impl AuthLayer {
    fn identify<B>(self, request: &Request<B>) -> Identity {
        match self {
            AuthLayer::Socket => at_socket(request.extensions().get::<UdsConnectInfo>()),
            AuthLayer::Tls => with_tls(request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>()),
        }
    }
}

/// The socket is its owner's alone; the kernel says who is at the other end all the same.
fn at_socket(connection: Option<&UdsConnectInfo>) -> Identity {
    let uid = connection.and_then(|connection| connection.peer_cred).map(|peer| peer.uid());
    match uid {
        Some(uid) if uid == 0 || uid == nix::unistd::geteuid().as_raw() => Identity::Local,
        Some(uid) => Identity::NotRoot(uid),
        None => Identity::Nobody,
    }
}

fn with_tls(connection: Option<&TlsConnectInfo<TcpConnectInfo>>) -> Identity {
    let chain = connection.and_then(TlsConnectInfo::peer_certs);
    let leaf = chain.as_ref().and_then(|chain| chain.first());
    leaf.map_or(Identity::Nobody, |leaf| Identity::of_certificate(leaf))
}

fn refusal(denied: &Denied) -> Status {
    match denied {
        Denied::NoCertificate { .. } | Denied::NotRoot { .. } => Status::unauthenticated(denied.to_string()),
        Denied::Role { .. } => Status::permission_denied(denied.to_string()),
    }
}

/// Who makes a request. Every request that reaches a service has passed the layer.
pub(crate) fn caller<T>(request: &tonic::Request<T>) -> Identity {
    request.extensions().get::<Identity>().cloned().unwrap_or(Identity::Nobody)
}
