//! Puts the caller's [`Identity`] into every request, and answers those that may not make it.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use scheduler_core::state::State;
use tonic::{
    Code, Status,
    body::Body,
    codegen::http::{Request, Response},
    transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
};
use tower::{Layer, Service};
use tracing::warn;

use crate::{
    access::{self, Access, Effect},
    audit::{self, Audit, Call},
    hub::Hub,
    identity::{Denied, Identity},
    pki, read_only, rotation, service,
};

/// Checks callers before they reach a service, and writes down what they change.
#[derive(Clone)]
pub(crate) struct AuthLayer {
    pub(crate) door: Door,
    pub(crate) audit: Arc<Audit>,
    pub(crate) hub: Arc<Hub>,
}

/// By which way a caller comes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Door {
    /// Root, and who runs the server.
    Socket,
    /// Whoever has a certificate is who it says.
    Tls,
}

/// A service that only callers who may do so reach.
#[derive(Clone)]
pub(crate) struct Auth<S> {
    inner: S,
    layer: AuthLayer,
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth { inner, layer: self.clone() }
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
        let (caller, from, signer) = self.layer.door.identify(&request);
        let call = Call { caller: caller.clone(), from, path: request.uri().path().to_owned() };
        let (access, effect) = access::of_method(&call.path);
        let hub = &self.layer.hub;
        let allowed = caller.check(access);
        // Whose certificate is good is in the store, and may be in the part that cannot be read.
        if allowed.is_ok()
            && let Some(status) =
                read_only::refusal(hub.store.as_ref(), &call.path, (access, effect), &caller)
        {
            if effect == Effect::Changes {
                self.layer.audit.refused(&call, status.message());
            }
            return Box::pin(async move { Ok(status.into_http()) });
        }
        let state = hub.state();
        let checked = allowed
            .and_then(|()| check_ca(hub, &state, &caller, access, signer.as_deref()))
            .and_then(|()| caller.check_good(access, &state, hub.clock.wall()));
        if let Err(denied) = checked {
            warn!(%caller, path = call.path, "refused");
            self.layer.audit.refused(&call, &denied.to_string());
            let status = match &caller {
                // A certificate that has ended meanwhile is no reason to go on with the pods.
                Identity::Enrolled { enrolled, key, .. } if hub.state().is_deleted(key) => {
                    service::deleted(&enrolled.name)
                }
                _ => refusal(&denied),
            };
            return Box::pin(async move { Ok(status.into_http()) });
        }
        request.extensions_mut().insert(caller);
        request.extensions_mut().insert(Signer(signer));
        let answer = self.inner.call(request);
        if access == Access::Node {
            let audit = self.layer.audit.clone();
            return Box::pin(async move {
                let answer = answer.await;
                let status = outcome(&answer);
                if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) {
                    audit.refused_again(&call, status.message());
                }
                answer
            });
        }
        if effect == Effect::Reads {
            return match hub.store.damage().cloned() {
                Some(damage) => Box::pin(async move { Ok(read_only::doubt(answer.await?, &damage)) }),
                None => Box::pin(answer),
            };
        }
        let audit = self.layer.audit.clone();
        Box::pin(async move { audit.follow(call, answer, outcome).await })
    }
}

/// How a call ended. An answer without a status in its head is one.
fn outcome<E>(answer: &Result<Response<Body>, E>) -> Status {
    match answer {
        Ok(response) => Status::from_header_map(response.headers()).unwrap_or_else(|| Status::ok("")),
        Err(_) => Status::internal("the service has failed"),
    }
}

impl Door {
    /// Who calls, and from where.
    /// The key of the CA that signed the certificate comes along, if there is one.
    fn identify<B>(self, request: &Request<B>) -> (Identity, String, Option<Vec<u8>>) {
        match self {
            Door::Socket => {
                let (identity, from) = at_socket(request.extensions().get::<UdsConnectInfo>());
                (identity, from, None)
            }
            Door::Tls => with_tls(request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>()),
        }
    }
}

/// The socket is its owner's alone; the kernel says who is at the other end all the same.
fn at_socket(connection: Option<&UdsConnectInfo>) -> (Identity, String) {
    let peer = connection.and_then(|connection| connection.peer_cred);
    let from = match peer.and_then(|peer| peer.pid()) {
        Some(pid) => format!("process {pid}"),
        None => "the socket".to_owned(),
    };
    let identity = match peer.map(|peer| peer.uid()) {
        Some(uid) if is_root(uid) => Identity::Local,
        Some(uid) => Identity::NotRoot(uid),
        None => Identity::Nobody,
    };
    (identity, from)
}

/// The user that the server runs as may do what it does.
pub(crate) fn is_root(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

/// The certificate of whoever comes so is by a CA that was in use at the time of the handshake: it may not be any more.
fn check_ca(
    hub: &Arc<Hub>,
    state: &State,
    caller: &Identity,
    access: Access,
    signer: Option<&[u8]>,
) -> Result<(), Denied> {
    let Some(signer) = signer.filter(|_| access != Access::Anybody) else { return Ok(()) };
    let ca = hub.pki.ca_with_key(signer);
    let authorities = state.authorities().map(AsRef::as_ref);
    caller.check_ca(ca.as_deref(), authorities)?;
    // Who renews a certificate is not late.
    if access != Access::Enrolled
        && let (Some(ca), Some(authorities)) = (ca, authorities)
    {
        rotation::note_late(hub, authorities, caller, &ca);
    }
    Ok(())
}

fn with_tls(connection: Option<&TlsConnectInfo<TcpConnectInfo>>) -> (Identity, String, Option<Vec<u8>>) {
    let chain = connection.and_then(TlsConnectInfo::peer_certs);
    let leaf = chain.as_ref().and_then(|chain| chain.first());
    let identity = leaf.map_or(Identity::Nobody, |leaf| Identity::of_certificate(leaf));
    let remote = connection.and_then(|connection| connection.get_ref().remote_addr());
    (identity, audit::from_tcp(remote), leaf.and_then(|leaf| pki::signer(leaf)))
}

fn refusal(denied: &Denied) -> Status {
    match denied {
        Denied::NoCertificate { .. }
        | Denied::NotRoot { .. }
        | Denied::Ended(_)
        | Denied::NodeEnded(_)
        | Denied::Retired
        | Denied::Compromised
        | Denied::Replaced => Status::unauthenticated(denied.to_string()),
        Denied::Role { .. } => Status::permission_denied(denied.to_string()),
    }
}

/// The key of the CA that signed the caller's certificate.
#[derive(Clone)]
struct Signer(Option<Vec<u8>>);

/// The key of the CA that signed the caller's certificate, if there is one.
pub(crate) fn signer<T>(request: &tonic::Request<T>) -> Option<Vec<u8>> {
    request.extensions().get::<Signer>().and_then(|signer| signer.0.clone())
}

/// Who makes a request. Every request that reaches a service has passed the layer.
pub(crate) fn caller<T>(request: &tonic::Request<T>) -> Identity {
    request.extensions().get::<Identity>().cloned().unwrap_or(Identity::Nobody)
}
